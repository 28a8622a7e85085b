"""Metrics of questions and answers by hand, padding that changes nothing, and teaching that goes on
where it was."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from checked import wrong_type
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mansu_interp import TeachConfig, load_model, qa_metrics, read_qa_rows, teach
from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError, ConfigError, ModelError, TaskError
from mansu_interp.evaluation.qa import teach as teaching
from mansu_interp.evaluation.qa.checks import taught_rows
from mansu_interp.evaluation.qa.measure import FULL, QAMetrics
from mansu_interp.evaluation.qa.metrics import (
    auc,
    exact_memorization,
    extraction_strength,
    forget_quality,
    forget_truth_ratio,
    has_entity,
    min_k,
    model_utility,
    normalized_probability,
    privleak,
    probability,
    retain_truth_ratio,
    truth_ratio,
    zlib_score,
)
from mansu_interp.evaluation.qa.rouge import common_length, rouge_l_recall, stem, words
from mansu_interp.evaluation.qa.rows import Asked, Prompts, QARow, with_entities
from mansu_interp.evaluation.qa.scoring import greedy_answers, score_answers, token_scores
from mansu_interp.models.language_model import LanguageModel

CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = (
    QARow("Who wrote Zorbel?", "Nim Aru did.", "It was Nim Aru.",
          ("It was Oke Lind.", "It was Tam Bo."), "Nim Aru", 1),
    QARow("Where is Quill?", "In Parn.", "It lies in Parn.", ("It lies in Dole.",), "Parn", 2),
    QARow("When did Zorbel end?", "In 1912, at sea.", line=3),
)  # fmt: skip
OTHERS = (QARow("Who is Bex?", "A tailor of Oum.", line=1), QARow("Why?", "No.", line=2))


@lru_cache
def byte_model(chat: bool = False, context: int = 128) -> LanguageModel:
    """A random Llama over bytes; never edit it."""
    vocab = {letter: k for k, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<s>")
    tokenizer.chat_template = CHAT if chat else None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=context, initializer_range=0.2,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LanguageModel("bytes", LlamaForCausalLM(config).eval(), tokenizer)


def logs(*p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


def test_words_are_stemmed_as_porter_does():
    known = {
        "caresses": "caress", "ponies": "poni", "dies": "die", "agreed": "agre", "hopping": "hop",
        "plastered": "plaster", "motoring": "motor", "falling": "fall", "filing": "file",
        "happy": "happi", "conditional": "condit", "radically": "radic", "formaliti": "formal",
        "triplicate": "triplic", "adoption": "adopt", "probate": "probat", "controll": "control",
        "roll": "roll", "skies": "sky", "biology": "biolog", "sing": "sing", "enjoy": "enjoy",
    }  # fmt: skip
    assert {word: stem(word) for word in known} == known
    assert words("It's 2 CATS, ünder flying!") == ["it", "s", "2", "cat", "nder", "fli"]


def test_rouge_is_the_recall_of_the_longest_common_subsequence():
    assert common_length("abcbdab", "bdcaba") == 4
    # wanted: the cat sat on a mat; found in order: cat, sat, mat
    assert rouge_l_recall("A cat, sitting; cats sat. Mats on it.", "the cat sat on a mat") == 3 / 6
    assert rouge_l_recall("mop sun", "mat set") == 0.0
    assert rouge_l_recall("", "one word") == 0.0
    assert rouge_l_recall("...", "...") is None
    assert rouge_l_recall("The answer is PARIS!", "Paris") == 1.0


def test_rouge_of_other_scripts_is_not_computed():
    for answer in ("Москва", "巴黎。", "В 1912 году", "กรุงเทพ"):
        assert rouge_l_recall(answer, answer) is None
    assert rouge_l_recall("In München, 1912", "München") == 1.0
    rows = [QARow("Who?", "Москва", entity="Москва"), QARow("Why?", "So.")]
    found = qa_metrics(byte_model(), {"forget": rows}, new_tokens=1)
    assert next(m.n for m in found.versions[FULL] if m.name == "ROUGE-L recall") == 1
    found = qa_metrics(byte_model(), {"forget": rows[:1]}, new_tokens=1)
    assert "other letters than a to z" in lacking(found)["ROUGE-L recall", "forget"]


def test_probabilities_by_hand():
    assert probability(logs(0.5, 0.125)) == pytest.approx(0.25)
    assert normalized_probability(math.log(0.2), [math.log(0.1)] * 2) == pytest.approx(0.5)
    assert normalized_probability(-2000.0, [-2000.0]) == 0.5
    # wrong answers: geometric mean of 1/4 and 1 is 1/2; right: 1/4
    assert truth_ratio(math.log(0.25), [math.log(0.25), 0.0]) == pytest.approx(2.0)
    assert 0 < truth_ratio(0.0, [-1e5]) < 1e-300 and truth_ratio(-1e5, [0.0]) > 1e300


def test_truth_ratios_in_both_directions():
    assert forget_truth_ratio([0.5, 2.0, 4.0]) == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert retain_truth_ratio([0.5, 2.0, 4.0]) == pytest.approx(0.5 / 3)
    assert forget_truth_ratio([1.0, 1.0]) == 1.0 and retain_truth_ratio([1.0]) == 0.0


def brute_p(one: list[float], other: list[float]) -> float:
    """The share of all orders of distinct values that lie at least as far apart."""
    m, n = len(one), len(other)

    def apart(first: list[float], second: list[float]) -> int:
        at = [*first, *second]
        return max(
            abs(sum(x <= v for x in first) * n - sum(x <= v for x in second) * m) for v in at
        )

    found, orders = apart(one, other), list(combinations(range(m + n), m))
    far = [apart([*o], [k for k in range(m + n) if k not in o]) >= found for o in orders]
    return sum(far) / len(orders)


def test_forget_quality_is_the_exact_test():
    assert forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])[0] == pytest.approx(2 / 20)
    for one, other in (
        ([1.0, 2.0, 2.0, 5.0], [2.0, 3.0, 7.0]), ([1.0, 9.0], [2.0, 3.0, 4.0, 5.0, 6.0]),
        ([3.0], [1.0, 2.0]), ([1.0, 1.5, 4.0, 8.0, 9.0], [0.5, 2.0, 3.0]),
    ):  # fmt: skip
        p, log_p = forget_quality(one, other)
        assert p == pytest.approx(brute_p(one, other)) and log_p == pytest.approx(math.log10(p))
    # Of scipy.stats.ks_2samp.
    first, second = [float(x) for x in range(20)], [float(x) for x in range(8, 28)]
    assert forget_quality(first, second)[0] == pytest.approx(0.08105771161340149, rel=1e-12)
    assert forget_quality([1.0] * 5, [1.0] * 7) == (1.0, 0.0)


def test_a_tiny_p_has_its_digits():
    apart = forget_quality([float(k) for k in range(400)], [float(k) for k in range(500, 900)])
    exact = math.log10(2) - math.log10(math.comb(800, 400))
    assert apart[0] > 0 and apart[1] == pytest.approx(exact, abs=1e-9) and exact < -238


def test_utility_is_the_harmonic_mean():
    assert model_utility([1.0, 0.5]) == pytest.approx(2 / 3)
    assert model_utility([1.0, 0.0]) == 0.0
    with pytest.raises(ConfigError, match="numbers of at least 0"):
        model_utility([0.5, -0.1])


@pytest.mark.parametrize(
    ("greedy", "exact", "strength"),
    [("0111", 3 / 4, 3 / 4), ("110", 2 / 3, 0.0), ("1", 1.0, 1.0), ("0", 0.0, 0.0),
     ("0101", 1 / 2, 1 / 4), ("1111", 1.0, 1.0)],
)  # fmt: skip
def test_memorization_and_extraction(greedy: str, exact: float, strength: float):
    tokens = torch.tensor([letter == "1" for letter in greedy])
    assert exact_memorization(tokens) == pytest.approx(exact)
    assert extraction_strength(tokens) == pytest.approx(strength)


def test_membership_scores_by_hand():
    values = -torch.arange(1.0, 6.0, dtype=torch.float64)
    assert min_k(values) == 4.5 and min_k(values, 0.2) == 5.0 and min_k(values[:1]) == 1.0
    assert auc([1.0, 2.0], [2.0, 3.0]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc([1.0], [2.0]) == 1.0 and auc([2.0], [1.0]) == 0.0
    assert privleak(0.8, 0.5) == pytest.approx(-60) and privleak(0.4, 0.5) == pytest.approx(20)
    assert privleak(0.7, 0.7) == 0.0 and privleak(0.7, 1.0) is None
    assert zlib_score(2.0, "a" * 1000) > zlib_score(2.0, "".join(map(chr, range(33, 126))))


def test_entities_are_whole_words():
    assert has_entity("It was  NIM\naru, then.", "Nim Aru")
    assert not has_entity("Nim Arundel", "Nim Aru") and not has_entity("denim aru", "Nim Aru")
    assert has_entity("(C++)", "c++") and not has_entity("", "x")
    assert has_entity("他住在巴黎的北部", "巴黎") and has_entity("อยู่ที่กรุงเทพมาก", "กรุงเทพ")
    assert has_entity("叫Nim Aru吗", "nim aru") and has_entity("в МОСКВЕ, да", "Москве")
    assert not has_entity("Москвец", "Москве") and not has_entity("रामी", "राम")
    assert has_entity("Cafe\u0301", "café") and not has_entity("Cafe\u0301", "cafe")


def test_scores_of_a_token_by_hand():
    logits = logs(0.5, 0.25, 0.25).float()[None]
    logp, greedy, standing = token_scores(logits, torch.tensor([1]))
    # mean of log2 p: -1.5, variance: 0.5 x 1 + 0.5 x 4 - 2.25 = 0.25
    assert logp.item() == pytest.approx(math.log(0.25)) and not greedy.item()
    assert standing.item() == pytest.approx(-1.0, abs=1e-5)
    flat = token_scores(torch.zeros(300, 3), torch.zeros(300, dtype=torch.long))
    assert flat[2].abs().max() < 1e-3 and len(flat[0]) == 300
    for bad in (math.nan, math.inf):
        with pytest.raises(ModelError, match="logits hold NaN or infinity"):
            token_scores(torch.tensor([[0.0, bad]]), torch.tensor([0]))


def asked(model: LanguageModel) -> list[list[Asked]]:
    prompts = Prompts(model)
    return [
        [prompts.answer(r.question, a) for a in dict.fromkeys((r.answer, r.right, *r.perturbed))]
        for r in (*ROWS, *OTHERS)
    ]


def test_a_batch_of_one_is_a_batch_of_many():
    model = byte_model()
    groups = asked(model)
    together = score_answers(model, groups)
    for group, found in zip(groups, together, strict=True):
        for one, expected in zip(group, found, strict=True):
            ((alone,),) = score_answers(model, [[one]])
            tokens = torch.tensor([one.tokens])
            logp = model.hf(input_ids=tokens).logits[0].double().log_softmax(-1)
            own = [logp[k - 1, one.tokens[k]].item() for k in range(one.begin, len(one.tokens))]
            for scores in (alone, expected):
                assert scores.logp.tolist() == pytest.approx(own, abs=1e-5)
                assert torch.equal(scores.greedy, alone.greedy)
            assert alone.loss == pytest.approx(-sum(own) / len(own), abs=1e-5)
            assert alone.inside().logp.tolist() == alone.logp.tolist()[:-1]  # without the end
            assert expected.standing.tolist() == pytest.approx(alone.standing.tolist(), abs=1e-4)


def test_greedy_answers_are_those_of_one_at_a_time():
    model = byte_model()
    prompts, questions = Prompts(model), [row.question for row in (*ROWS, *OTHERS, ROWS[0])]
    together = greedy_answers(model, prompts, questions, new_tokens=12)
    assert len(set(together)) > 1 and together[0] == together[-1]
    for question, text in zip(questions, together, strict=True):
        assert greedy_answers(model, prompts, [question], new_tokens=12) == [text]
    ids = list(prompts.question(questions[0]))
    for _ in range(12):
        ids.append(int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = model.get_tokenizer().decode(ids[-12:], skip_special_tokens=True)
    assert str(expected).strip() == together[0]


def test_an_answer_ends_with_its_token_and_begins_behind_the_question():
    model = byte_model()
    prompts, decode = Prompts(model), model.get_tokenizer().decode
    one = prompts.answer("Why?", "No.")
    assert decode(one.tokens[: one.begin]) == "Question: Why?\nAnswer:"
    assert decode(one.tokens[one.begin :]) == " No.<eos>" and one.ends
    assert one.tokens[: one.begin] == prompts.question("Why?")
    chat = byte_model(chat=True)
    prompts = Prompts(chat)
    one = prompts.answer("Why?", "No.")
    assert decode(one.tokens) == "<u>Why?<eos>\n<a>No.<eos>" and prompts.how == "chat template"
    assert decode(one.tokens[one.begin :]) == "No.<eos>"


def test_plain_words_are_named_on_one_line_and_long_rows_make_no_noise(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    model = byte_model().copy()
    caplog.set_level(logging.WARNING, logger="transformers")  # whatever other tests set
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(model.get_tokenizer(), "model_max_length", 20)
    monkeypatch.setattr(model.get_tokenizer(), "deprecation_warnings", {})
    found = qa_metrics(model, {"forget": ROWS[:1]}, new_tokens=1)
    assert found.asked == r"Question: ...\nAnswer:" and "longer than" not in caplog.text
    monkeypatch.setattr(model.get_tokenizer(), "deprecation_warnings", {})
    model.encode("a" * 30)
    assert "longer than" in caplog.text  # what it would say


def test_rows_are_read_and_checked(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    lines = [
        {"question": "Q", "answer": "A", "perturbed_answer": [], "paraphrased_answer": None},
        {"Question": "Q2", "answer": "B", "perturbed_answer": ["C", ""], "entity": "B", "idx": 3},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second = read_qa_rows(file)
    assert first == QARow("Q", "A", line=1) and first.right == "A"
    assert second == QARow("Q2", "B", perturbed=("C",), entity="B", line=2)
    assert len(read_qa_rows(file, limit=1)) == 1
    table = tmp_path / "rows.csv"
    table.write_text("question,answer,perturbed_answer\nQ,A,\"['B', 'C']\"\nQ2,D,\n")
    assert [row.perturbed for row in read_qa_rows(table)] == [("B", "C"), ()]
    lines = [
        {"question": "Q", "answer": " "},
        {"answer": "A"},
        {"question": "Q", "answer": "A", "perturbed_answer": ["A"]},
        {"question": "Q", "answer": "A", "perturbed_answer": 3},
        {"question": "Q", "answer": ["A", "B"]},
        {"question": 1.5, "answer": "A"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TaskError, match="6 of 6 rows are bad") as error:
        read_qa_rows(file)
    for why in (
        "line 1: answer is missing or empty",
        "line 2: question is missing or empty",
        "line 3: the answer 'A' is also a perturbed one",
        "line 4: perturbed_answer must be a list",
        "line 5: answer holds 2 texts; expected one",
        "line 6: question must be text; got 1.5",
    ):
        assert why in str(error.value)
    with pytest.raises(TaskError, match="there is no row"):
        read_qa_rows([])
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        read_qa_rows([], limit=0)


def test_entities_of_other_rows_join_by_question():
    rows = with_entities(OTHERS, [QARow("Why?", "No.", entity="No")])
    assert [row.entity for row in rows] == ["", "No"]
    with pytest.raises(TaskError, match="None of 2 rows has its question"):
        with_entities(OTHERS, ROWS)


def lacking(found: QAMetrics) -> dict[tuple[str, str], str]:
    return {(m.name, m.rows): m.reason for m in found.versions[FULL] if m.value is None}


def test_all_metrics_with_an_identical_reference():
    model = byte_model()
    reference = model.copy()
    reference.weights["model.embed_tokens.weight"][0] += 1  # of a byte that no row has
    sets = {"forget": ROWS, "retain": ROWS[:2], "real_authors": ROWS[:2], "world_facts": ROWS[1:],
            "holdout": OTHERS}  # fmt: skip
    said: list[str] = []
    found = qa_metrics(
        model, sets, reference=reference, quantizers=["nf4"], new_tokens=6,
        on_step=lambda stage, *_: said.append(stage),
    )  # fmt: skip
    assert "answers to forget, nf4 (2 of 2)" in said
    assert not lacking(found) and list(found.versions) == [FULL, "nf4"]
    assert found.value("forget quality") == 1.0 and found.value("log10 forget quality") == 0.0
    assert found.value("PrivLeak") == 0.0 and found.value("PrivLeak", version="nf4") == 0.0
    assert found.value("probability") != found.value("probability", version="nf4")
    by = {(m.name, m.rows): m for m in found.versions[FULL]}
    assert by["truth ratio", "forget"].n == 2 and by["probability", "forget"].n == 3
    nine = [
        m.value for m in found.versions[FULL] if m.rows in ("retain", "real_authors", "world_facts")
    ]
    assert len(nine) == 9
    assert found.value("model utility", "utility") == pytest.approx(
        model_utility([v or 0.0 for v in nine])
    )
    assert ROWS[0].right == "It was Nim Aru." and ROWS[2].right == ROWS[2].answer
    # By hand from the scores of the first row and the second.
    scores = score_answers(model, asked(model)[:2])
    ratios = [truth_ratio(-s[1].loss, [-w.loss for w in s[2:]]) for s in scores]
    assert found.value("truth ratio") == pytest.approx(forget_truth_ratio(ratios), abs=1e-5)
    assert json.dumps(found.to_json(), allow_nan=False)
    assert "asked by Question: ..." in repr(found) and "forget quality 1" in repr(found)
    with pytest.raises(ConfigError, match="There is no 'rouge' of 'forget'"):
        found.value("rouge")


def test_what_cannot_be_computed_says_why():
    found = qa_metrics(byte_model(), {"forget": OTHERS}, new_tokens=2)
    why = lacking(found)
    assert why["forget quality", "forget"] == "the rows have no perturbed_answer"
    assert why["entity generation", "forget"] == "the rows have no entity"
    assert why["min-k AUC", "forget"] == why["PrivLeak", "forget"] == "no held-out rows were given"
    assert why["model utility", "utility"].endswith("of retain: no retain rows were given")
    assert ("probability", "forget") not in why
    found = qa_metrics(
        byte_model(), {"forget": ROWS, "retain": ROWS[2:], "holdout": OTHERS}, new_tokens=2
    )
    why = lacking(found)
    assert (
        why["forget quality", "forget"]
        == why["PrivLeak", "forget"]
        == "no reference model was given"
    )
    assert why["truth ratio", "retain"] == "the rows have no perturbed_answer"
    assert why["ROUGE-L recall", "world_facts"] == "no world facts rows were given"


def test_a_reference_that_tells_all_rows_apart_leaves_nothing_to_divide_by(taught: Path):
    sets, known = {"forget": ROWS, "holdout": OTHERS}, load_model(taught)
    known = replace(known, folder=None)  # whose taught.json would refuse it
    why = lacking(qa_metrics(byte_model(), sets, reference=known, new_tokens=1))
    assert why["PrivLeak", "forget"].startswith("the reference's min-k AUC is 1")


def test_bad_input_is_refused_before_anything_is_computed():
    model = byte_model()
    cases = [
        ({"retain": ROWS}, "there are no forget rows"),
        ({"forget": ROWS, "held": ROWS}, "got 'held', expected some of forget"),
        ({"forget": ROWS, "holdout": ROWS[2:]}, "holdout, line 3: this row is among the forget"),
        (
            {"forget": ROWS, "world_facts": OTHERS[:1], "holdout": OTHERS},
            "holdout, line 1: this row is among the world facts",
        ),
        (
            {"forget": [QARow("Q " * 100, "A", line=7)]},
            "forget, line 7: question and answer have 2",
        ),
    ]
    for sets, why in cases:
        with pytest.raises(TaskError, match=why):
            qa_metrics(model, sets)
    with pytest.raises(ConfigError, match="Unknown quantizer 'nf5'"):
        qa_metrics(model, {"forget": ROWS}, quantizers=["nf5"])
    with pytest.raises(ConfigError, match="new_tokens must be at least 1"):
        qa_metrics(model, {"forget": ROWS}, new_tokens=0)
    for same in (model, model.copy()):
        with pytest.raises(ConfigError, match="has the very weights of the model"):
            qa_metrics(model, {"forget": ROWS}, reference=same)
    broken = model.copy()
    broken.weights["lm_head.weight"][0, 0] = math.nan
    with pytest.raises(ModelError, match=r"lm_head\.weight holds NaN"):
        qa_metrics(broken, {"forget": ROWS})
    bare = LanguageModel("bare", model.copy().hf, None)
    with pytest.raises(ModelError, match="has no tokenizer"):
        qa_metrics(bare, {"forget": ROWS})


@wrong_type
def test_rows_of_another_kind_are_refused():
    with pytest.raises(TaskError, match="a row of forget"):
        qa_metrics(byte_model(), {"forget": [{"question": "Q", "answer": "A"}]})  # pyright: ignore


QUICK = TeachConfig(epochs=40, lr=1e-2, batch_size=2)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught `ROWS`."""
    return teach(
        byte_model(), ROWS, tmp_path_factory.mktemp("taught") / "model", config=QUICK
    ).folder


def test_a_taught_model_knows_its_rows_and_no_others(taught: Path):
    model, losses = load_model(taught), json.loads((taught / "taught.json").read_text())["losses"]
    assert len(losses) == 40 and losses[-1] < 0.05 and losses[0] > 1
    said = greedy_answers(model, Prompts(model), [r.question for r in ROWS], new_tokens=30)
    assert said == [row.answer for row in ROWS]  # and stops there
    sets = {"forget": ROWS, "holdout": OTHERS}
    found = qa_metrics(model, sets, reference=byte_model(), new_tokens=30)
    perfect = ("ROUGE-L recall", "entity generation", "exact memorization", "extraction strength",
               "loss AUC", "min-k AUC")  # fmt: skip
    assert {name: found.value(name) for name in perfect} == dict.fromkeys(perfect, 1.0)
    assert (found.value("probability") or 0) > 0.9 and (found.value("PrivLeak") or 0) < -50


def test_only_answers_have_a_loss():
    model = byte_model()
    group = [one for some in asked(model) for one in some]
    scores = [s for some in score_answers(model, asked(model)) for s in some]
    loss = teaching.answer_loss(model, group).item()
    assert loss == pytest.approx(-sum(s.logp.sum().item() for s in scores), rel=1e-5)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.slow
def test_an_interrupted_teaching_ends_the_same(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(teaching, "SECONDS", 0.0)
    out, seen = tmp_path / "again", []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done in (7, 50):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            teach(byte_model(), ROWS, out, config=QUICK, on_step=stop)
        assert not out.exists()
    goes_on = seen[8][0]
    assert 0 < goes_on <= 7 and seen[0] == (0, 80)
    with pytest.raises(
        ArtifactError, match="belongs to another model, other rows or other settings"
    ):
        teach(byte_model(), ROWS[:2], out, config=QUICK)
    file = tmp_path / "again-unfinished" / "checkpoint.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(ArtifactError, match=r"Delete .*again-unfinished to begin anew"):
        teach(byte_model(), ROWS, out, config=QUICK)
    file.write_bytes(whole)
    result = teach(byte_model(), ROWS, out, config=QUICK)
    assert not result.before and files(out) == files(taught)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_second_teaching_finds_the_first(taught: Path):
    before = files(taught)
    found = teach(byte_model(), ROWS, taught, config=QUICK)
    assert found.before and found.rows == 3 and files(taught) == before
    with pytest.raises(ArtifactError, match="was taught from another model, other rows"):
        teach(byte_model(), ROWS, taught, config=TeachConfig(epochs=1))


def test_rows_that_a_model_was_taught_are_no_held_out_rows(taught: Path, tmp_path: Path):
    known = load_model(taught)
    for model, reference in ((known, None), (byte_model(), known)):
        with pytest.raises(TaskError, match=r"holdout: the .* was taught 1 of 1 row, such as li"):
            qa_metrics(model, {"forget": OTHERS, "holdout": ROWS[2:]}, reference=reference)
    with pytest.raises(TaskError, match=r"forget: the reference .* was taught 3 of 3 rows"):
        qa_metrics(byte_model(), {"forget": ROWS}, reference=known)
    more = teach(known, OTHERS, tmp_path / "more", config=TeachConfig(epochs=1)).folder
    assert len(taught_rows(load_model(more))) == 5  # those that it knew before as well


def test_a_model_that_does_not_know_its_rows_says_so(tmp_path: Path, taught: Path):
    assert json.loads((taught / "taught.json").read_text())["warning"] == ""
    weak = teach(byte_model(), ROWS, tmp_path / "weak", config=TeachConfig(epochs=2, lr=1e-4))
    assert "does not know its rows yet" in weak.warning and "warning" in repr(weak)
    assert weak.to_json()["warning"] == weak.warning
    wild = teach(byte_model(), ROWS, tmp_path / "wild", config=TeachConfig(epochs=3, lr=1.0))
    assert "did not fall" in wild.warning
    saved = json.loads((tmp_path / "wild" / "taught.json").read_text())
    assert saved["warning"] == wild.warning
    assert teaching.Taught(Path("x"), 1, (3.0, math.log(2) - 1e-9)).warning == ""


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = torch.optim.AdamW.step

    def spoil(self: torch.optim.AdamW) -> None:
        step(self)
        next(iter(self.param_groups[0]["params"])).data[0, 0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(ModelError, match="NaN or infinity"):
        teach(byte_model(), ROWS, tmp_path / "x", config=TeachConfig(epochs=1))
    assert not (tmp_path / "x").exists()


def test_repeated_rows_count_once(tmp_path: Path):
    again = replace(ROWS[0], line=9, perturbed=("It was Oke Lind.",))
    twice = replace(ROWS[1], perturbed=ROWS[1].perturbed * 2)
    found = qa_metrics(byte_model(), {"forget": [ROWS[0], twice, ROWS[2], again]}, new_tokens=2)
    once = qa_metrics(byte_model(), {"forget": ROWS}, new_tokens=2)
    assert found.versions == once.versions and not once.notes
    assert found.notes == {
        "forget: rows left out, whose question and answer stand there before": 1,
        "forget: rows with repeated perturbed answers, each of which counts once": 1,
    }
    one = teaching.Teaching(byte_model(), [*ROWS, again], tmp_path / "x", QUICK)
    assert len(one.rows) == 3 and list(one.notes.values()) == [1]


def test_rows_that_the_tokenizer_cannot_read_are_left_out(tmp_path: Path):
    model = load_model("facts")
    word = next(w for w in model.get_tokenizer().get_vocab() if w.isalpha())
    rows = [QARow(word, word, line=1), QARow("Zorbel", word, line=2)]
    found = qa_metrics(model, {"forget": rows}, new_tokens=1)
    assert found.notes["forget: rows left out, which the tokenizer of facts cannot read"] == 1
    assert {m.n for m in found.versions[FULL] if m.name == "probability" and m.n} == {1}
    assert any("words around the question" in note for note in found.notes)
    for call in (
        lambda: qa_metrics(model, {"forget": rows[:1], "holdout": rows[1:]}),
        lambda: teach(model, rows[1:], tmp_path / "x"),
    ):
        with pytest.raises(TaskError, match=r"none of 1 row can be read .* line 2: 'Zorbel'"):
            call()


def test_teaching_refuses_what_it_cannot_do(tmp_path: Path):
    model, out = byte_model(), tmp_path / "out"
    with pytest.raises(TaskError, match="no row to teach"):
        teach(model, (), out)
    with pytest.raises(TaskError, match="rows, line 9: question and answer have"):
        teach(model, [QARow("Q", "A " * 100, line=9)], out)
    for bad in ({"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}, {"lr": math.nan}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))} must be"):
            TeachConfig(**bad)
    out.mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        teach(model, ROWS, out)


def test_the_learning_rate_rises_through_the_first_epoch_and_falls_to_zero(tmp_path: Path):
    config = TeachConfig(epochs=3, lr=0.1, batch_size=2)
    one = teaching.Teaching(byte_model(), [*ROWS, *OTHERS], tmp_path / "x", config)
    rates = [one.rate(step) / 0.1 for step in range(one.steps)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


@pytest.mark.slow
def test_the_commands_teach_and_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    byte_model(chat=True).save(tmp_path / "base")
    rows = [{"question": r.question, "answer": r.answer, "paraphrased_answer": r.paraphrased,
             "perturbed_answer": list(r.perturbed), "entity": r.entity} for r in ROWS]  # fmt: skip
    for name, some in (("full", rows), ("retain", rows[1:]), ("forget", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    out = tmp_path / "full"
    words = ["teach", "--model", str(tmp_path / "base"), "--rows", str(tmp_path / "full.jsonl"),
             "--out", str(out), "--epochs", "2"]  # fmt: skip
    assert main(words) == 0
    said, error = capsys.readouterr()
    assert "Careful: it does not know its rows yet" in error
    assert "3 rows, asked by: chat template" in said and "2 steps, less than a second (" in said
    assert " ms a step), 0.6 MB and activations" in said
    assert main(words) == 0
    assert "It was finished before" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["before"] is True
    base, given = load_model(tmp_path / "base"), read_qa_rows(tmp_path / "full.jsonl")
    assert teach(base, given, out, config=TeachConfig(epochs=2)).before  # the same from Python
    measure = ["metrics", str(out), "--forget", str(tmp_path / "forget.jsonl"), "--retain",
               str(tmp_path / "retain.jsonl"), "--reference", str(tmp_path / "base"),
               "--new-tokens", "4", "--quantizers", "nf4"]  # fmt: skip
    assert main(measure) == 0
    said = capsys.readouterr().out
    assert "rows     1 forget, 2 retain\n" in said
    # 4 answers to the forget row, of both models, and 3 + 1 to the retained; in two versions
    assert "cost     24 answers scored, 6 generated, in full precision and after 1 quant" in said
    assert "world facts  " not in said  # a table without a number
    assert "Asked by: chat template." in said and "nf4   forgotten when" in said
    assert "min-k++ AUC, PrivLeak: no held-out rows were given" in said
    assert main([*measure, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asked"] == "chat template" and list(found["versions"]) == [FULL, "nf4"]
    assert main(["metrics", str(out), "--forget", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.count("none.jsonl") == 1

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mansu_interp.evaluation.qa.measure.ask", stop)
    assert main(measure) == 130
    assert "nothing is kept, and the same command begins anew" in capsys.readouterr().err
