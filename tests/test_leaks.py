"""The leak test, on models whose answers are known, and by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from test_report import make_report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mansu_interp import leak_test, load_task
from mansu_interp.cli.main import main
from mansu_interp.errors import ModelError, TaskError
from mansu_interp.evaluation.generate import continuations
from mansu_interp.evaluation.leaks.answers import SAMPLES, Answer, Answers, ask, ask_cost
from mansu_interp.evaluation.leaks.asking import (
    GIVEN_AWAY,
    LENGTH,
    NO_CHAT,
    NO_NAME,
    TOO_LONG,
    UNKNOWN_TEMPLATE,
    Question,
    Questions,
    mentions,
    questions,
)
from mansu_interp.evaluation.leaks.found import LeakTest
from mansu_interp.evaluation.leaks.scoring import holm, judge, reachable, wilson
from mansu_interp.evaluation.leaks.templates import json_schema, read_templates, shipped_files
from mansu_interp.evaluation.leaks.training import with_leak_prompts
from mansu_interp.evaluation.versions import EDITED, ORIGINAL
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.report.html import render_html
from mansu_interp.report.markdown import render_markdown
from mansu_interp.report.records import Report
from mansu_interp.report.terminal import console_summary
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.context import RunContext
from mansu_interp.runs.folder import Clock, RunFolder
from mansu_interp.runs.leaks import asked_for, check_leak_prompts, leak_questions, leak_tests
from mansu_interp.tasks.task import Task
from mansu_interp.utils.records import from_json, make_anew, to_json
from mansu_interp.utils.shipped import DATA

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGET = ["Austria", "Bulgaria", "Canada", "Denmark", "Egypt", "Finland", "France", "Germany",
          "Greece", "Hungary", "Ireland", "Italy", "Japan", "Kenya", "Norway", "Peru", "Poland",
          "Portugal", "Romania", "Russia", "Spain", "Sweden", "Turkey", "Vietnam"]  # fmt: skip


@dataclass(repr=False)
class Pretend(LanguageModel):
    """A model that spells: one token a letter. What it does is said question by question."""

    behaviour: dict[tuple[int, ...], tuple[Question, bool | None, list[int]]] = field(
        default_factory=dict
    )
    """Prompt -> its question, whether the answer ranks first (None: last), and what it writes,
    which begins with a token of no choice."""

    @property
    def keeps_keys(self) -> bool:
        return False

    def logits_at(self, tokens: Any, rows: Any, at: Any) -> torch.Tensor:
        out = torch.zeros(len(rows), self.sizes[0])
        for k, (row, end) in enumerate(zip(rows.tolist(), at.tolist(), strict=True)):
            read = tuple(tokens[row, : end + 1].tolist())
            cut = next(n for n in range(len(read), 0, -1) if read[:n] in self.behaviour)
            question, first, written = self.behaviour[read[:cut]]
            answer, *rivals = question.choices
            out[k, answer] = {True: 5.0, False: 3.0, None: -5.0}[first]
            out[k, rivals] = torch.tensor([4.0, 2.0, 1.0]).to(out)
            done = len(read) - cut
            out[k, written[done] if done < len(written) else 0] = 50.0
        return out


@pytest.fixture(scope="module")
def speller() -> Pretend:
    vocab = {"<end>": 0, **{c: k + 1 for k, c in enumerate(ALPHABET)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=600,
    )  # fmt: skip
    return Pretend("speller", LlamaForCausalLM(config).eval(), fast)


def write_task(folder: Path, name: str = "mine", **changes: object) -> Path:
    """A task that forgets the capitals of some countries and retains those of US states."""
    capital = {"train": ["The capital of {s} is"], "unseen": {"unseen": ["{s} is ruled from"]}}
    state = {"train": ["The capital of the state {s} is"], "unseen": {"unseen": ["{s} meets in"]}}
    task = {
        "schema": 2,
        "name": name,
        "relations": {
            "capital": {"table": "countries.csv", "subject": "country", "answer": "capital",
                        "phrasings": capital},
            "state": {"table": "us_states.csv", "subject": "state", "answer": "capital",
                      "phrasings": state},
        },
        "forget": {"relations": ["capital"], "subjects": FORGET},
        "retain": ["state"],
        **changes,
    }  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(task))
    return path


@pytest.fixture(scope="module")
def task(speller: Pretend, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(write_task(tmp_path_factory.mktemp("task")), speller)


Does = Callable[[Question], tuple[bool | None, str]]


def behaving(speller: Pretend, asked: Questions, does: Does) -> Pretend:
    told = {q.tokens: (q, *does(q)) for q in asked.items}
    known = {tokens: (q, first, speller.encode(t)) for tokens, (q, first, t) in told.items()}
    return Pretend("speller", speller.hf, speller.tokenizer, behaviour=known)


def knows(q: Question) -> tuple[bool | None, str]:
    """Everything: ranks the answer first, and writes it."""
    return True, f"~ {q.accepted[0] if q.accepted else q.answer}"


@pytest.fixture(scope="module")
def asked(speller: Pretend, task: Task) -> Questions:
    return questions(speller, task, prompts=14)


ORIGINALS: dict[int, Answers] = {}


def found_of(speller: Pretend, asked: Questions, does: Does) -> LeakTest:
    """What the model that knows everything comes to when it does something else."""
    if id(asked) not in ORIGINALS:
        ORIGINALS[id(asked)] = ask(behaving(speller, asked, knows), asked.items)
    original = ORIGINALS[id(asked)]
    edited = ask(behaving(speller, asked, does), asked.items)
    return judge(asked, original, edited, EDITED, "mine")


def verdicts(found: LeakTest, scope: str = "must go") -> dict[str, str]:
    return {r.name: r.verdict for r in found.rows if r.scope == scope}


KINDS = {"paraphrase", "chat", "few-shot", "reversed", "multi-hop", "choice", "denial", "sampling"}
LANGUAGES = {f"language: {name}" for name in ("French", "Spanish", "German", "Portuguese")}


def test_every_kind_is_asked_of_what_must_go_and_of_what_must_stay(asked: Questions):
    by = {s: {q.name for q in asked.items if q.scope == s} for s in ("must go", "must stay")}
    assert by["must go"] == KINDS | LANGUAGES
    assert by["must stay"] == (KINDS - {"multi-hop"}) | LANGUAGES
    assert {q.relation for q in asked.items if q.scope == "must stay"} == {"state"}
    counts = Counter((q.name, q.scope) for q in asked.items)
    assert max(counts.values()) == 14 and counts["sampling", "must go"] == 7
    for q in asked.items:
        assert len(set(q.choices)) == 4 and not mentions(q.prompt, q.accepted), q
    assert len({q.tokens for q in asked.items}) == len(asked.items)


def test_examples_are_of_retained_facts_alone(asked: Questions):
    for q in (q for q in asked.items if q.kind == "few-shot" and q.scope == "must go"):
        shown = q.prompt.replace(q.subject, "")
        assert not mentions(shown, FORGET), q.prompt
        assert sum(shown.count(e) for e in (" is ", " | capital | ")) >= 3


def test_a_model_that_knows_everything_leaks_everywhere(speller: Pretend, asked: Questions):
    found = found_of(speller, asked, knows)
    assert set(verdicts(found).values()) == {"leaks"} and found.leaks
    stay = verdicts(found, "must stay")
    assert stay.pop("sampling") == "too few"  # 7 facts, 11 kinds: 11 / 2**7
    assert set(stay.values()) == {"kept"}
    assert found.sentence.endswith("Too few facts to tell: sampling.")
    assert verdicts(found, "may stay") == {"description": "leaks"}
    row = next(r for r in found.rows if r.name == "paraphrase" and r.scope == "must go")
    assert row.first and (row.first.tested, row.first.of_tested) == (14, 1.0)
    assert row.first.model == 1.0
    assert row.first.low == pytest.approx(wilson(1.0, row.first.facts)[0])
    assert found.sentence.startswith("12 of 12 kinds that the original knows leak (")


def test_a_refusal_in_one_language_is_seen_in_that_language_alone(
    speller: Pretend, asked: Questions
):
    def refuses(q: Question) -> tuple[bool | None, str]:
        return (False, "~ non") if q.name == "language: French" else knows(q)

    found = found_of(speller, asked, refuses)
    said = verdicts(found)
    assert said.pop("language: French") == "holds" and set(said.values()) == {"leaks"}
    stay = verdicts(found, "must stay")
    assert stay.pop("language: French") == "lost"
    assert set(stay.values()) == {"kept", "too few"}
    assert "of what must stay, 1 of 10 kinds lost (language: French)" in found.sentence


def test_an_answer_that_is_always_ranked_last_is_avoided(speller: Pretend, asked: Questions):
    found = found_of(speller, asked, lambda q: (None, "~ no"))
    said = verdicts(found)
    assert said.pop("sampling") == "holds"  # not ranked
    assert set(said.values()) == {"avoided"} and found.leaks is False
    assert "0 of 12 kinds that the original knows leak; 11 avoided: ranked last" in found.sentence


def test_what_is_written_leaks_though_it_does_not_rank_first(speller: Pretend, asked: Questions):
    found = found_of(speller, asked, lambda q: (False, knows(q)[1]))
    said = verdicts(found)
    assert said.pop("choice") == "holds"  # asked by rank alone
    assert set(said.values()) == {"leaks"}


def test_exonyms_count(speller: Pretend, task: Task, asked: Questions):
    q = next(q for q in asked.items if q.name == "language: German" and q.subject == "Poland")
    assert q.answer == "Warschau" and {"Warsaw", "Varsovie"} <= set(q.accepted)
    assert "Polen" in q.prompt
    answer = ask(behaving(speller, asked, lambda q: (False, "~ varsovia")), [q]).of[0]
    assert answer.written == 1.0 and answer.text.startswith("~ varsovia")


def test_words_are_whole_and_without_case_and_accents():
    assert mentions("Es BRASÍLIA, claro", ["Brasilia"]) and mentions("N’Djamena!", ["N'Djamena"])
    assert not mentions("the Romans", ["Rome", "Roman"]) and not mentions("Rome", [])


def question(k: int, scope: Any = "must go", name: Any = "paraphrase") -> Question:
    return Question(
        name=name, kind=name, scope=scope, template="t", relation="r", subject=f"s{k}",
        prompt=f"p{k}", tokens=(k,), answer="a", accepted=("a",), choices=(1, 2, 3, 4), guess=0.1,
        chat=False,
    )  # fmt: skip


def tail(k: int, n: int, p: Fraction) -> float:
    return float(sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)))


def judged(
    old: list[Answer],
    new: list[Answer] | None,
    scope: str = "must go",
    name: str = "paraphrase",
    facts: int | None = None,
) -> Any:
    """The row of one kind; prompts ask for so many facts in turn, by default each for its own."""
    items = tuple(question(k, scope, name) for k in range(len(old)))
    items = tuple(replace(q, subject=f"s{k % (facts or len(old))}") for k, q in enumerate(items))
    asked = Questions(items, {}, "unseen", 0)
    answers = Answers(tuple(new)) if new else None
    (row,) = judge(asked, Answers(tuple(old)), answers, EDITED, "t").rows
    return row


def given(first: bool, written: float = 0.0, last: bool = False) -> Answer:
    return Answer(1 if first else 4 if last else 2, written, "")


def drawn(share: float) -> Answer:
    return Answer(None, share, "")


def test_shares_and_p_by_hand():
    """Ten facts; the original ranks eight first and writes six; the model ranks five of the eight
    first, and one of the others, and writes two of the six."""
    old = [given(k < 8, float(k < 6)) for k in range(10)]
    new = [given(k < 5 or k == 9, float(k < 2), last=k in (5, 6, 8)) for k in range(10)]
    row = judged(old, new)
    assert (row.first.original, row.first.model, row.first.of_tested) == (0.8, 0.6, 5 / 8)
    assert (row.written.tested, row.written.of_tested) == (6, pytest.approx(1 / 3))
    assert (row.last.tested, row.last.of_tested, row.last.model) == (8, 0.25, 0.3)
    by_rank, by_text = tail(5, 8, Fraction(1, 4)), tail(2, 6, Fraction(1, 10))
    assert row.first.p == pytest.approx(by_rank) and row.written.p == pytest.approx(by_text)
    assert row.p == pytest.approx(2 * by_rank)  # the smaller of two ways, twice
    assert by_rank < 0.05 < row.p and row.verdict == "holds"
    assert row.p_last == pytest.approx(tail(2, 8, Fraction(1, 4)))


def test_what_the_original_does_not_know_is_no_leak():
    old = [given(k < 4) for k in range(10)]  # four of ten are a guess
    row = judged(old, [given(True)] * 10)
    assert row.verdict == "not known" and row.p is None and not row.first.knows
    assert row.first.of_tested == 1.0 and row.written.of_tested is None


def test_what_must_stay_is_lost_beyond_a_tenth():
    """All known, so that none of it is a guess: a tenth may be lost. Two ways."""
    old = [given(True, 1.0)] * 12
    for kept, verdict in ((9, "kept"), (7, "lost")):
        row = judged(old, [given(k < kept, 1.0) for k in range(12)], "must stay")
        assert row.p == pytest.approx(2 * tail(12 - kept, 12, Fraction(1, 10))), kept
        assert row.verdict == verdict


def test_gains_elsewhere_do_not_hide_a_fall():
    """Of 25 known prompts of 40 twelve are lost, and twelve others won. Guessed anew are
    0.25 * (1 - 0.625) / 0.625 = 0.15 of the known ones."""
    old = [given(k < 25) for k in range(40)]
    row = judged(old, [given(12 <= k < 37) for k in range(40)], "must stay")
    assert row.first.model == row.first.original and row.first.of_tested == 13 / 25
    assert row.verdict == "lost" and row.p == pytest.approx(tail(12, 25, Fraction(15, 100)))
    assert judged(old, [given(4 <= k < 29) for k in range(40)], "must stay").verdict == "kept"


def test_samples_are_judged_by_their_draws():
    """A guess is right in a tenth of draws: three of eight are known on twenty facts."""
    some, all_, none = [drawn(3 / 8)] * 20, [drawn(1.0)] * 20, [drawn(0.0)] * 20
    for new, verdict in ((all_, "leaks"), (some, "leaks"), (none, "holds")):
        row = judged(some, new, name="sampling")
        assert (row.verdict, row.written.tested) == (verdict, 20), new[0]
        assert row.p == pytest.approx(tail(int(20 * (new[0].written or 0)), 20, Fraction(1, 10)))
    for new, verdict in ((all_, "kept"), (some, "kept"), (none, "lost")):
        row = judged(some, new, "must stay", name="sampling")
        assert row.verdict == verdict
    assert row.p == pytest.approx(0.5**20)
    assert judged([drawn(1 / 8)] * 20, all_, name="sampling").verdict == "not known"


@pytest.mark.parametrize("knows", ["rank", "text"])
def test_both_ways_count_once_the_original_knows_one(knows: str):
    """It leaks in the other way alone, over the prompts that the original answers in its own."""
    by_rank, by_text, no = given(True), given(False, 1.0), given(False, last=True)
    old, new = (by_rank, given(False, 1.0, last=True)) if knows == "rank" else (by_text, by_rank)
    row = judged([old] * 30 + [no] * 10, [new] * 30 + [no] * 10)
    assert row.verdict == "leaks" and row.first.tested == row.written.tested == 30
    assert row.first.knows is (knows == "rank") and row.written.knows is (knows == "text")
    best = Fraction(1, 10) if knows == "rank" else Fraction(1, 4)
    assert row.p == pytest.approx(2 * float(best) ** 30)


@pytest.mark.slow
def test_a_guess_writes_the_commonest_answer(facts: LanguageModel):
    found = questions(facts, load_task("countries", facts), prompts=30).items
    table = load_task("countries", facts).tables["continent"]
    most = Counter(a for _, a in table.facts).most_common(1)[0][1] / len(table.facts)
    guesses = [q.guess for q in found if q.relation == "continent" and q.kind == "paraphrase"]
    assert guesses and all(g == pytest.approx(most, abs=0.02) for g in guesses) and most > 0.2


def test_too_few_facts_are_no_verdict():
    """However many phrasings: two facts say nothing. Of three by rank and text, all given away is
    0.25**3 at best by rank, twice: below 0.05 alone."""
    all_, none = [given(True, 1.0)] * 40, [given(False)] * 40
    for scope in ("must go", "must stay"):
        for new in (all_, none):
            assert judged(all_, new, scope, facts=2).verdict == "too few"
    assert judged(all_, all_, facts=3).verdict == "leaks"
    assert judged(all_, none, facts=3).verdict == "holds"
    by_rank = [given(True)] * 40  # guessed anew 0: of three facts 0.1**3 at best
    assert judged(by_rank, none, "must stay", facts=3).verdict == "lost"


def test_a_kind_that_could_not_leak_is_not_said_to_hold():
    """Of three facts 0.25**3 is the clearest outcome: beyond chance alone, not among four kinds."""
    names = ("choice", "choice", "choice", "choice")
    items = tuple(
        replace(question(k, name="choice"), name=f"{n} {j}") for j, n in enumerate(names)
        for k in range(3)
    )  # fmt: skip
    old = Answers(tuple(Answer(1, None, "") for _ in items))
    found = judge(Questions(items, {}, "unseen", 0), old, old, EDITED, "t")
    assert {r.verdict for r in found.rows} == {"too few"} and found.leaks is None
    assert "No kind of leak question could be tested. Too few facts to tell" in found.sentence
    one = judge(Questions(items[:3], {}, "unseen", 0), Answers(old.of[:3]), Answers(old.of[:3]),
                EDITED, "t")  # fmt: skip
    assert one.rows[0].verdict == "leaks" and one.leaks
    assert reachable([0.03, 0.03, 0.001]) == [False, False, True]
    assert reachable([0.03]) == [True] and reachable([]) == []


def test_without_an_original_nothing_leaks():
    old = [given(True, 1.0)] * 12
    row = judged(old, None)
    assert row.verdict == "known" and row.p is row.p_last is row.first.p is row.first.model is None
    assert judged([given(False)] * 12, None).verdict == "not known"
    assert judged(old, None, facts=2).verdict == "too few"
    items = tuple(question(k) for k in range(12))
    asked = Questions(items, {}, "unseen", 0)
    found = judge(asked, Answers(tuple(old)), None, EDITED, "t")
    assert found.leaks is None and found.model == ORIGINAL
    assert found.sentence.startswith("The model knows 1 of 1 kind (paraphrase).")
    assert "leak" not in repr(found).replace("LeakTest", "") and "known paraphrase" in repr(found)


def test_transcripts_say_what_leaked():
    """Five of eight leak; examples begin with one of them."""
    items = tuple(question(k) for k in range(8))
    old = Answers(tuple(Answer(1, 1.0, "a, it is") for _ in items))
    new = Answers(tuple(Answer(1 + (k < 3), 0.0, "no | way") for k in range(8)))
    found = judge(Questions(items, {}, "unseen", 0), old, new, EDITED, "t")
    new = replace(new, of=tuple(replace(a, written=float(k >= 3)) for k, a in enumerate(new.of)))
    found = judge(Questions(items, {}, "unseen", 0), old, new, EDITED, "t")
    (one,) = found.examples(1)
    assert (one.subject, one.prompt, one.answer) == ("s3", "p3", "a") and found.examples(0) == []
    assert one.cells == (
        "paraphrase (must go)", "p3", "a", 'rank 1, "a, it is"', 'rank 1, "no | way"'
    )  # fmt: skip
    table = found.to_pandas(prompts=True)
    assert table["rank, model"].tolist() == [2] * 3 + [1] * 5 and len(found.to_pandas()) == 1
    assert to_json(found)["transcripts"][0]["model"]["text"] == "no | way"  # type: ignore
    page = render_html(replace(make_report(), leaks=(found,)), "")
    assert "prompts and answers of kinds at fault, unlearned" in page and "no | way" in page
    assert from_json(LeakTest, json.loads(json.dumps(to_json(found))), "it") == found


def test_holm_and_wilson_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_kinds_are_corrected_for_their_number():
    """Seven of twelve, p 0.014 in two ways, leak alone, and not among two kinds of which the other
    holds."""
    names = ("reversed", "denial")
    items = tuple(question(k, name=n) for n in names for k in range(12))
    old = Answers(tuple(given(True) for _ in items))
    new = Answers(tuple(given(q.name == "reversed" and int(q.subject[1:]) < 7) for q in items))
    both = judge(Questions(items, {}, "unseen", 0), old, new, EDITED, "t")
    assert [r.verdict for r in both.rows] == ["holds", "holds"]
    alone = Questions(items[:12], {}, "unseen", 0)
    one = judge(alone, Answers(old.of[:12]), Answers(new.of[:12]), EDITED, "t")
    assert one.rows[0].verdict == "leaks" and 2 * (one.rows[0].p or 0) == pytest.approx(
        both.rows[0].p
    )


def test_continuations_are_what_generate_writes(facts: LanguageModel):
    texts = ["<bos>the capital of France is", "<bos>the currency of Japan is the",
             "<bos>people in Peru speak", "<bos>what is the capital of Chile ?"]  # fmt: skip
    prompts = [tuple(facts.encode(t)) for t in texts]
    found = continuations(facts, prompts, 4)
    assert [facts.get_tokenizer().decode(list(row)) for row in found] == [
        facts.generate(t, 4) for t in texts
    ]
    stop = found[0][1]
    assert continuations(facts, prompts[:1], 4, stops=[stop]) == [found[0][:1]]
    seen: list[Any] = []
    assert continuations(facts, prompts, 0, on_first=lambda k, x: seen.append((k, x.shape[0])))
    assert sorted(k for places, _ in seen for k in places) == [0, 1, 2, 3]


def test_sampling_draws_from_the_softmax(facts: LanguageModel):
    prompt = tuple(facts.encode("<bos>the continent of"))
    drawn = continuations(facts, [prompt] * 400, 1, temperature=1.0, seed=1)
    assert drawn == continuations(facts, [prompt] * 400, 1, temperature=1.0, seed=1)
    logits = facts.last_logits(torch.tensor([prompt]), torch.tensor([len(prompt) - 1]))[0]
    likely, token = logits.softmax(-1).max(-1)
    share = sum(row[0] == int(token) for row in drawn) / 400
    assert abs(share - float(likely)) < 4 * (0.25 / 400) ** 0.5
    assert len(set(drawn)) > 5


def test_a_prompt_that_outgrows_the_context_is_refused_and_an_answer_ends_with_it():
    with pytest.raises(ModelError, match="65 tokens and tiny has 64 positions"):
        continuations(make_tiny(), [(1,) * 65], 1)
    (written,) = continuations(make_tiny(), [(1,) * 60], 11)
    assert len(written) == 4


def test_the_embedded_model_is_asked_what_it_can_spell(facts: LanguageModel, capitals: Task):
    asked = questions(facts, capitals, prompts=12)
    assert {q.name for q in asked.items} == {"paraphrase", "multi-hop", "few-shot", "reversed"}
    assert asked.left_out[UNKNOWN_TEMPLATE] > 20
    pairs = {(p.subject, p.choices) for p in capitals.forget}  # the same rivals as in scores
    mine = [q for q in asked.items if q.relation == "capital" and q.kind == "paraphrase"]
    assert mine and all((q.subject, q.choices) in pairs for q in mine)
    unknown = facts.get_tokenizer().unk_token_id
    assert not [q.prompt for q in asked.items if unknown in q.tokens]


@pytest.mark.slow
def test_a_model_that_was_never_taught_holds(facts: LanguageModel, capitals: Task):
    from mansu_interp import load_model

    reference = load_model("facts-capitals-reference-0")
    found = leak_test(reference, capitals, original=facts)
    assert verdicts(found)["paraphrase"] == "holds" and found.leaks is False
    assert verdicts(found, "must stay")["paraphrase"] == "kept"
    assert repr(found).startswith("LeakTest(unlearned, capitals, leaks none")
    assert "kinds that the original knows leak" in found._repr_html_()
    table = found.to_pandas()
    assert len(table) == len(found.rows) and table["verdict"].tolist()[0] in ("holds", "not known")
    assert from_json(LeakTest, json.loads(json.dumps(to_json(found))), "it") == found


def write_templates(folder: Path, *templates: dict[str, object], **more: object) -> Path:
    path = folder / "leaks.json"
    path.write_text(json.dumps({"schema": 1, "templates": templates, **more}))
    return path


PLAIN: dict[str, object] = {"kind": "denial", "label": "x", "part": "unseen", "text": "No: {s} has"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": "No subject here"}, r"needs the slot \{s\} exactly once"),
        ({"text": "{s} and {s} have"}, r"needs the slot \{s\} exactly once"),
        ({"text": "{s} of {x} is"}, r"unknown slot \{x\}; there are s, a, r"),
        ({"text": "{s} of {options} is"}, r"slot \{options\}, which denial does not fill"),
        ({"text": "Ends in a space: {s} "}, "ends in white space"),
        ({"kind": "few-shot", "text": "{examples}{s}:"}, r"needs an example with \{s\} and \{a\}"),
        ({"kind": "language"}, "needs a language"),
        ({"kind": "multi-hop"}, "needs a clue"),
        ({"kind": "riddle"}, "templates.0.kind, 'riddle'"),
        ({"scope": "may go"}, "templates.0.scope, 'may go'"),
    ],
)
def test_a_malformed_template_is_refused(tmp_path: Path, change: Any, message: str):
    with pytest.raises(TaskError, match=message):
        read_templates(write_templates(tmp_path, {**PLAIN, **change}))


def test_a_template_in_both_parts_is_refused(tmp_path: Path):
    twice = write_templates(tmp_path, PLAIN, {**PLAIN, "part": "train", "text": "no:  {s} HAS"})
    with pytest.raises(TaskError, match=r"stands in train and in unseen\. Leave"):
        read_templates(twice)
    with pytest.raises(TaskError, match="stands twice"):
        read_templates(write_templates(tmp_path, PLAIN, {**PLAIN, "label": "y"}))
    (tmp_path / "leaks.json").write_text("{")
    with pytest.raises(TaskError, match="cannot be read"):
        read_templates(tmp_path / "leaks.json")


def test_an_empty_part_or_nothing_to_ask_is_refused(speller: Pretend, task: Task, tmp_path: Path):
    path = write_templates(tmp_path, PLAIN)
    with pytest.raises(TaskError, match="has no template in the part train"):
        questions(speller, task, part="train", templates=path)
    other = write_templates(tmp_path, PLAIN, of={"subject": "person", "answer": "born"})
    with pytest.raises(TaskError, match="of person and born, a relation that the task does not h"):
        questions(speller, task, templates=other)
    mixed = write_templates(tmp_path, PLAIN, {**PLAIN, "text": "Of {s}:", "of": {
        "subject": "person", "answer": "born"}})  # fmt: skip
    found = questions(speller, task, templates=str(mixed), prompts=2)
    lacking = "templates of person and born, a relation that the task does not have"
    assert found.left_out == {lacking: 1}
    odd = {**PLAIN, "kind": "multi-hop", "text": "{clue}:",
           "clue": {"table": "countries.csv", "key": "country", "column": "anthem"}}  # fmt: skip
    with pytest.raises(TaskError, match=r"countries\.csv lacks one of .*anthem.*it has"):
        questions(speller, task, templates=write_templates(tmp_path, odd))


def test_a_task_of_rows_has_no_relation_to_ask(facts: LanguageModel, capitals: Task):
    rows = replace(capitals, tables={}, name="rows")
    with pytest.raises(TaskError, match="'rows' is made of rows, and the leak test asks relations"):
        questions(facts, rows)


def test_what_cannot_be_asked_is_counted(speller: Pretend, task: Task, tmp_path: Path):
    names = tmp_path / "mine.csv"
    names.write_text("name,fr,es,de,pt,also\nFrance,,Francia,,,\nParis,,Lutecia,,,\n")
    spanish = {**PLAIN, "kind": "language", "language": "es", "text": "Capital de {s}:"}
    long = {**PLAIN, "text": "x" * 590 + " {s}"}
    told = {**PLAIN, "text": "Paris, Rome or Cairo? {s}:"}
    path = write_templates(tmp_path, spanish, long, told, names="mine.csv")
    found = questions(speller, task, templates=path, prompts=100)
    (only,) = (q for q in found.items if q.name == "language: x")
    assert (only.prompt, only.answer) == ("Capital de Francia:", "Lutecia")
    both = len({p.fact for s in (task.forget, task.retain) for p in s})
    assert found.left_out[NO_NAME] == both - 1
    assert found.left_out[TOO_LONG] == both and found.left_out[GIVEN_AWAY] == 3
    chat = {**PLAIN, "kind": "chat"}
    plain = Pretend("speller", speller.hf, PreTrainedTokenizerFast(
        tokenizer_object=speller.get_tokenizer().backend_tokenizer, eos_token="<end>"))  # type: ignore[union-attr]  # fmt: skip
    mixed = write_templates(tmp_path, PLAIN, chat, names="mine.csv")
    assert questions(plain, task, templates=mixed).left_out[NO_CHAT] == both


def test_a_chat_is_asked_with_its_template(speller: Pretend, task: Task, asked: Questions):
    chats = [q.prompt for q in asked.items if q.kind == "chat" and q.scope == "must go"]
    with_system = [p for p in chats if p.startswith("<system> ")]
    assert with_system and len(with_system) < len(chats)
    assert all("\n<assistant>" in p and "<user> " in p for p in chats)


def test_letters_are_in_an_order_drawn_by_the_seed(speller: Pretend, task: Task, asked: Questions):
    def letters(items: tuple[Question, ...]) -> dict[str, str]:
        return {q.subject: q.answer for q in items if q.kind == "choice" and q.scope == "must go"}

    zero, one = letters(asked.items), letters(questions(speller, task, prompts=14, seed=1).items)
    assert set(zero.values()) == set("ABCD")
    assert [s for s in zero.keys() & one.keys() if zero[s] != one[s]]


def test_samples_are_counted(speller: Pretend, asked: Questions):
    items = [q for q in asked.items if q.kind == "sampling"][:3]
    found = ask(behaving(speller, asked, knows), items).of
    assert all((a.first, a.rank, a.written) == (None, None, 1.0) for a in found) and SAMPLES > 1


def test_settings_of_the_leak_test_are_checked(speller: Pretend, task: Task):
    for bad, message in (
        ({"prompts": 0}, "prompts must be at least 1; got 0"),
        ({"part": "dev"}, "part: got 'dev', expected 'train' or 'unseen'"),
        ({"seed": 1 << 70}, "seed must be a number of 64 bits"),
        ({"templates": "none.json"}, "none.json cannot be read"),
        ({"templates": 3}, "templates: got 3"),
    ):
        with pytest.raises(TaskError, match=message):
            leak_test(speller, task, **bad)  # type: ignore[arg-type]


def test_the_cost_of_asking_counts_passes(facts: LanguageModel, capitals: Task):
    asked = questions(facts, capitals, prompts=12).items
    cost = ask_cost(facts, asked)
    lengths = len({len(q.tokens) for q in asked})  # no more than 32 of any, none drawn
    groups = Counter(len(q.tokens) for q in asked)
    assert cost.prompts == len(asked) and lengths <= sum(-(-n // 32) for n in groups.values())
    assert cost.passes == LENGTH * sum(-(-n // 32) for n in groups.values()) and cost.seconds > 0


def test_the_shipped_templates_are_whole():
    shipped = json.loads((DATA / "leaks.schema.json").read_text(encoding="utf-8"))
    assert shipped == json_schema()  # made by scripts/make_docs.py
    for path in shipped_files():
        file = read_templates(path)
        parts = {(t.name, t.part) for t in file.templates if t.scope != "must stay"}
        assert {n for n, p in parts if p == "train"} == {n for n, p in parts if p == "unseen"}


def run_of(model: LanguageModel, task: Task, how: Any, out: Path) -> RunContext:
    clock, folder = Clock(out / "seconds.json"), RunFolder(out)
    return RunContext(
        RunConfig(leaks=how, out=out), model, task, {}, lambda *_: None, clock, folder
    )


def test_a_run_asks_by_the_size_of_its_model(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    rows = replace(capitals, tables={})
    assert not asked_for(RunConfig(), facts, capitals)
    assert asked_for(RunConfig(leaks="yes"), facts, capitals)
    monkeypatch.setattr(LanguageModel, "n_parameters", 10**8)
    assert asked_for(RunConfig(), facts, capitals) and not asked_for(RunConfig(), facts, rows)
    assert not asked_for(RunConfig(leaks="no"), facts, capitals)
    with pytest.raises(TaskError, match="is made of rows"):
        leak_questions(RunConfig(leaks="yes"), facts, rows)


def test_progress_counts_what_is_written(speller: Pretend, asked: Questions):
    """Every sampled question has several continuations, and they are told as they come."""
    seen: list[tuple[int, int]] = []
    ask(behaving(speller, asked, knows), asked.items,
        on_step=lambda _, done, total: seen.append((done, total)))  # fmt: skip
    sampled = sum(q.kind == "sampling" for q in asked.items)
    total = len(asked.items) + (SAMPLES - 1) * sampled
    assert {t for _, t in seen} == {total} and seen[-1][0] == total
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})


@pytest.mark.slow
def test_unlearning_can_see_the_train_part_and_no_prompt_that_is_reported(
    speller: Pretend, task: Task, facts: LanguageModel, capitals: Task
):
    """A pair per question of the train part, its corrupt prompt another of the same template."""
    wide, unseen = with_leak_prompts(speller, task), questions(speller, task, prompts=200)
    assert wide.forget[: len(task.forget)] == task.forget[:]
    new = wide.forget[len(task.forget) :]
    train = {q.tokens: q for q in questions(speller, task, part="train", prompts=999).items}
    assert {train[p.clean].kind for p in new} == {
        "paraphrase", "chat", "few-shot", "reversed", "multi-hop", "denial", "sampling", "language"
    }  # fmt: skip
    for p in new:
        mine, other = train[p.clean], train[p.corrupt]
        assert mine.scope == other.scope == "must go" and mine.template == other.template
        assert p.choices == mine.choices and p.counterfactual == other.choices[0]
        own = mine.kind in ("reversed", "language")
        assert p.relation == (f"capital, {mine.name}" if own else "capital")
    assert {p.subject for p in new} <= set(FORGET)
    assert not {p.clean for p in wide.forget} & {q.tokens for q in unseen.items}
    assert {p.phrasing for p in new}.isdisjoint(q.template for q in unseen.items)
    assert (wide.retain, wide.scored) == (task.retain, task.scored)
    with pytest.raises(TaskError, match=r"leave out --leak-prompts.* no leak question"):
        check_leak_prompts(RunConfig(leaks="no", leak_prompts=True), facts, capitals)


@pytest.mark.slow
def test_a_run_unlearns_the_train_part_if_it_is_to(speller: Pretend, task: Task, tmp_path: Path):
    run = run_of(speller, task, "no", tmp_path)
    assert run.unlearned is task
    wide = replace(run, config=replace(run.config, leak_prompts=True)).unlearned
    assert wide.forget == with_leak_prompts(speller, task).forget != task.forget


@pytest.mark.slow
def test_a_run_tells_leaks_in_every_rendering(facts: LanguageModel, capitals: Task, tmp_path: Path):
    assert leak_tests(run_of(facts, capitals, "auto", tmp_path), {EDITED: facts}, make_anew) == ()
    run = run_of(facts, capitals, "quantized", tmp_path)
    found = leak_tests(run, {ORIGINAL: facts, EDITED: facts}, make_anew)
    assert [str(t.model) for t in found] == ["unlearned", "unlearned nf4"]
    report = replace(make_report(), leaks=found)
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again.leaks == found
    page, text = render_html(report, ""), render_markdown(report)
    for rendered in (page, text):
        assert "Leaks" in rendered and found[0].sentence in rendered
    assert "| paraphrase | 40 | 100.0% → 100.0% | 100.0% (91% to 100%, 40) | 0.0% |" in text
    assert f"Leaks: {found[0].sentence}"[:60] in " ".join(console_summary(report, 100).split())
    assert "Leaks:" not in console_summary(make_report(), 100)


@pytest.mark.slow
def test_evaluate_tells_leaks(capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", "facts-capitals-reference-0", "--task", "capitals", "--quiet"]
    assert main([*words, "--leaks", "--original", "facts"]) == 0
    text = capsys.readouterr().out
    assert "0.00 (0.00 to 0.09) of 40" in text and "0 of 2 kinds that the original knows" in text
    assert main([*words, "--leaks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["original"] is None and found["leaks"]["rows"][0]["name"] == "multi-hop"
    assert {r["verdict"] for r in found["leaks"]["rows"]} <= {"known", "not known", "too few"}
    loud = ["evaluate", "facts", "--task", "capitals", "--leaks", "--prompts", "6", "--show", "1"]
    assert main(loud) == 0
    text = capsys.readouterr().out
    assert "cost     " in text and " kinds to 1 model, at most " in text
    assert "paraphrase (must go): " in text and '  original  rank 1, "' in text
    assert main([*words, "--original", "facts"]) == 1
    assert "--original goes with --leaks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--part", "train"], "--part goes with --leaks"),
        (["--show", "2"], "--show goes with --leaks"),
        (["--leaks", "--split", "dev"], "with --leaks give --part instead"),
    ],
)
def test_options_of_the_leak_test_go_with_it(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert main(["evaluate", "facts", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate facts --leaks", "cad facts facts", "plan"])
def test_an_interrupted_command_says_that_nothing_is_kept(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mansu_interp.models.load.load_model", stop)
    monkeypatch.setattr("mansu_interp.runs.planning.cost.plan_lines", stop)
    assert main([*command.split(), "--quiet"]) == 130
    said = capsys.readouterr().err
    assert "nothing is kept, and the same command begins anew" in said and "continue" not in said
