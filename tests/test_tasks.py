"""Tasks: the shipped ones, batches and samples, and every kind of bad input."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pairs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mansu_interp.errors import MansuError, ModelError, TaskError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks import synthetic
from mansu_interp.tasks.data.prompts import read_prompts
from mansu_interp.tasks.fact_pairs import _mentions
from mansu_interp.tasks.files import embedded_tasks
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet, collate
from mansu_interp.tasks.schema import RowOptions, RowTask, json_schema
from mansu_interp.tasks.synthetic import synthetic_pairs
from mansu_interp.tasks.task import Task
from mansu_interp.utils.renamed import TASK_KEYS
from mansu_interp.utils.shipped import DATA


def test_unknown_task_names_what_ships(facts: LanguageModel):
    with pytest.raises(TaskError) as caught:
        load_task("capital", facts)
    message = str(caught.value)
    assert message.startswith("Unknown task 'capital'. Shipped: ")
    for name in embedded_tasks():
        assert name in message
    assert "Or give the path of a task file" in message
    assert isinstance(caught.value, MansuError)


@pytest.mark.parametrize("name", ["capitals", "countries"])
def test_shipped_tasks_keep_their_promises(facts: LanguageModel, name: str):
    task = load_task(name, facts)
    sets: list[PairSet] = [task.forget, task.retain]
    for by in task.scored.values():
        for s in by.values():
            sets += s.values()
    for pairs in sets:
        for p in pairs:
            assert len(p.clean) == len(p.corrupt) and p.clean != p.corrupt
            assert len(set(p.choices)) == 4
            assert p.answer != p.counterfactual
            assert facts.tokenizer.unk_token_id not in p.clean + p.corrupt + p.choices
    seen = {(p.relation, p.phrasing) for s in (task.forget, task.retain) for p in s}
    unseen = {
        (p.relation, p.phrasing) for by in task.scored["unseen"].values() for s in by.values()
        for p in s
    }  # fmt: skip
    assert unseen and not seen & unseen
    asked = {(p.relation, p.subject) for p in task.forget}
    assert not asked & {(p.relation, p.subject) for p in task.retain}


def test_the_same_facts_are_drawn_every_time(facts: LanguageModel, capitals: Task):
    again = load_task("capitals", facts)
    assert again.forget == capitals.forget and again.retain == capitals.retain


def test_only_whole_words_give_a_fact_away():
    assert not _mentions("Name the symbol of {s}", "N")
    assert _mentions("Chad: N'Djamena. {s}:", "N'Djamena") and _mentions("N, {s}", "N")
    assert not _mentions("the capital of {s} is", "s is the")


def test_prompts_have_tokens():
    pair = make_pairs((5,)).pairs[0]
    told = r"the clean prompt has 5 tokens and the corrupt one 0\. Give prompts of at least one"
    with pytest.raises(TaskError, match=told):
        replace(pair, corrupt=())
    with pytest.raises(TaskError, match="the clean prompt has 0 tokens"):
        replace(pair, clean=())


def test_answer_must_differ_at_its_first_token():
    pair = make_pairs((5,)).pairs[0]
    for change in (
        {"distractors": (pair.answer, *pair.distractors[1:])},
        {"counterfactual": pair.answer},
    ):
        with pytest.raises(
            TaskError, match=r"answer 'answer 0' shares its first token with a distractor or the"
        ):
            replace(pair, **change)


def test_empty_sets():
    with pytest.raises(TaskError, match="The set 'forget' is empty: no fact is left to ask about"):
        PairSet("forget", ())


def test_collate_pads_on_the_right():
    pairs = make_pairs((3, 5))
    batch = collate(pairs.pairs)
    assert batch.clean.shape == batch.corrupt.shape == (2, 5)
    assert batch.clean[0].tolist() == [*pairs[0].clean, 0, 0]
    assert batch.last.tolist() == [2, 4]
    assert batch.choices[:, 0].tolist() == batch.answer.tolist()
    assert len(batch) == 2


def test_padding_changes_no_logit(tiny_model):
    pairs, model = make_pairs((3, 7)), tiny_model(2)
    with torch.no_grad():
        both = collate(pairs.pairs)
        alone = collate(pairs.pairs[:1])
        a = model.last_logits(both.clean, both.last)[0]
        assert torch.allclose(a, model.last_logits(alone.clean, alone.last)[0], atol=1e-5)


def test_batches_hold_every_pair_once():
    pairs = make_pairs((3, 5, 4, 5, 3, 6, 7))
    batches = list(pairs.batches(3))
    assert [len(b) for b in batches] == [3, 3, 1]
    rows = sorted(
        tuple(r[: n + 1].tolist()) for b in batches for r, n in zip(b.clean, b.last, strict=True)
    )
    assert rows == sorted(p.clean for p in pairs)


def test_a_phrasing_that_fills_batches_has_its_own(capitals: Task):
    size = 32
    batches = list(capitals.forget.batches(size))
    prompts = {p.clean: p.phrasing for p in capitals.forget}
    for batch in batches:
        rows = zip(batch.clean, batch.last, strict=True)
        assert len({prompts[tuple(r[: n + 1].tolist())] for r, n in rows}) == 1
    assert sum(map(len, batches)) == len(capitals.forget)


def test_sample_is_even_over_phrasings_and_seeded(capitals: Task):
    sample = capitals.forget.sample(20, 3)
    counts: dict[str, int] = {}
    for p in sample:
        counts[p.phrasing] = counts.get(p.phrasing, 0) + 1
    assert set(counts.values()) == {5} and len(counts) == 4
    assert sample == capitals.forget.sample(20, 3) != capitals.forget.sample(20, 4)
    assert len(capitals.forget.sample(10**6, 0)) == len(capitals.forget)
    assert len({(p.subject, p.phrasing) for p in sample}) == 20


def spec() -> dict[str, Any]:
    """A small valid task over a shipped table."""
    relations = json.loads((DATA / "tasks" / "capitals.json").read_text())["relations"]
    return {
        "schema": 2,
        "name": "small",
        "prefix": "<bos>",
        "relations": {k: relations[k] for k in ("capital", "continent")},
        "forget": {"relations": ["capital"], "subjects": ["France", "Spain"]},
        "retain": ["continent"],
    }


def write(folder: Path, value: Any) -> Path:
    path = folder / "task.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_own_task_file(tmp_path: Path, facts: LanguageModel):
    value = spec()
    subjects = [p.subject for p in load_task("capitals", facts).forget[:3]]
    value["forget"]["subjects"] = subjects
    task = load_task(write(tmp_path, value), facts)
    assert {p.subject for p in task.forget} == set(subjects)
    assert task.title == "small" and task.retain_unscored is None and task.text == {}


def bad(key: str) -> tuple[Any, str]:
    value = spec()
    if key == "json":
        return "{not json", "is not valid JSON"
    if key == "list":
        return [1], "line 1: not an object with fields"
    if key == "missing":
        del value["forget"], value["name"]
        return value, r"lacks forget, name \(docs"
    if key == "schema":
        value["schema"] = 1
        return value, "is malformed: it has schema 1; expected 2 "
    if key == "newer schema":
        value["schema"] = 3
        return value, "has schema 3; expected 2"
    if key == "old key":
        value |= {"schema": 1, "guard": [], "twins": []}
        return value, (
            "it is of an older version: guard is now retain_unscored, twins is now "
            "reference_models, and its schema 2"
        )
    if key == "typo":
        value["relations"]["capital"]["phrasings"]["tain"] = []
        return value, "the file.relations.capital.phrasings has the unknown key tain"
    if key == "type":
        value["relations"]["capital"]["phrasings"]["train"] = ["{s} is", 3]
        return value, r"the file.relations.capital.phrasings.train\[1\] is 3, expected string"
    if key == "escape":
        value["relations"]["capital"]["table"] = "../../etc/passwd"
        return value, "'../../etc/passwd': name a file beside the task file, without a path"
    if key == "absolute":
        value["relations"]["capital"]["table"] = "/etc/passwd"
        return value, "'/etc/passwd': name a file beside the task file, without a path"
    if key == "table":
        value["relations"]["capital"]["table"] = "no.csv"
        return value, "The file 'no.csv' is neither beside the task file nor shipped"
    if key == "columns":
        value["relations"]["capital"]["answer"] = "mayor"
        return value, "Relation 'capital': countries.csv lacks the columns"
    if key == "relation":
        value["retain"] = ["continent", "river"]
        return value, "Task 'small' names unknown relations: river"
    if key == "empty forget":
        value["forget"]["relations"] = []
        return value, "Task 'small' has an empty forget set: name a relation"
    if key == "no subject":
        value["forget"]["subjects"] = ["atlantis"]
        return value, "Task 'small' has an empty forget set: no subject is in a table"
    value["forget"]["subjects"] = None
    value["relations"]["capital"]["phrasings"]["train"] = ["the capital is"]
    return value, r"Relation 'capital': 'the capital is' needs \{s\} exactly once"


@pytest.mark.parametrize(
    "key",
    [
        "json",
        "list",
        "missing",
        "schema",
        "newer schema",
        "old key",
        "typo",
        "type",
        "escape",
        "absolute",
        "table",
        "columns",
        "relation",
        "empty forget",
        "no subject",
        "phrasing",
    ],
)
def test_bad_task_files(tmp_path: Path, facts: LanguageModel, key: str):
    value, message = bad(key)
    with pytest.raises(TaskError, match=message):
        load_task(write(tmp_path, value), facts)


def test_the_shipped_json_schema_is_that_of_the_models():
    """Made by scripts/make_docs.py."""
    shipped = json.loads((DATA / "task.schema.json").read_text(encoding="utf-8"))
    assert shipped == json_schema()
    table, row = (shipped["$defs"][kind] for kind in ("TableTask", "RowTask"))
    assert table["properties"]["retain_unscored"]["description"].startswith("Relations whose")
    assert {"rows", "schema", "name"} == set(row["required"])
    assert not TASK_KEYS.keys() & (table["properties"].keys() | row["properties"].keys())


def test_a_task_over_rows_has_every_option_with_its_default():
    options = RowOptions()
    own = RowTask(schema=2, name="x", rows="x.jsonl")
    assert all(getattr(own, f.name) == getattr(options, f.name) for f in fields(RowOptions))


def test_a_table_that_the_tokenizer_does_not_know(tmp_path: Path, facts: LanguageModel):
    (tmp_path / "own.csv").write_text("country,capital\nx,Quuxville\n", encoding="utf-8")
    value = spec()
    value["relations"]["capital"]["table"] = "own.csv"
    with pytest.raises(TaskError, match="The tokenizer of facts does not know 'Quuxville'"):
        load_task(write(tmp_path, value), facts)


def test_too_few_answers_for_a_choice(tmp_path: Path, facts: LanguageModel, capitals: Task):
    rows = [f"{p.subject},{p.answer_text}" for p in capitals.forget[:3]]
    (tmp_path / "own.csv").write_text("\n".join(["country,capital", *rows]), encoding="utf-8")
    value = spec()
    value["relations"]["capital"]["table"] = "own.csv"
    value["forget"]["subjects"] = None
    with pytest.raises(TaskError, match="too few different answers for 4-way choice"):
        load_task(write(tmp_path, value), facts)


@pytest.mark.slow
def test_repeated_and_contradictory_rows_of_tables(facts: LanguageModel, tmp_path: Path):
    """The same guard as for rows: a table's own subjects may repeat, or answer twice."""
    spec = json.loads((DATA / "tasks" / "capitals.json").read_text(encoding="utf-8"))
    spec |= {"text": None, "reference_models": []}
    spec["relations"]["capital"]["table"] = "own.csv"
    (tmp_path / "t.json").write_text(json.dumps(spec))
    table = (DATA / "facts" / "countries.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "own.csv").write_text("\n".join([*table, table[1]]), encoding="utf-8")
    task = load_task(tmp_path / "t.json", facts)
    assert task.dropped["the prompt is there already"] == 6  # in six phrasings of three splits
    assert len(task.forget) == len({p.clean for p in task.forget})
    other = table[1].replace(task.forget[0].answer_text, task.forget[4].answer_text)
    (tmp_path / "own.csv").write_text("\n".join([*table, other]), encoding="utf-8")
    with pytest.raises(TaskError, match="has 6 prompts with two answers, such as '<bos>the capit"):
        load_task(tmp_path / "t.json", facts)
    spec["retain"], spec["relations"]["again"] = ["again"], spec["relations"]["capital"]
    (tmp_path / "own.csv").write_text("\n".join(table), encoding="utf-8")
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(TaskError, match=r"in the role forget and in another, such as .*\(retain"):
        load_task(tmp_path / "t.json", facts)


def test_facts_are_left_out_of_every_split(capitals: Task):
    gone = {p.fact for p in capitals.forget[:3]}
    task = capitals.without(gone, "why")
    left = {p.fact for p in task.forget}
    assert left == {p.fact for p in capitals.forget} - gone
    for split in ("dev", "unseen"):
        (scored,) = task.scored[split]["forget"].values()
        assert {p.fact for p in scored} <= left
        assert task.scored[split]["retain"] == capitals.scored[split]["retain"]
    assert task.dropped["why"] == len(capitals.forget) - len(task.forget)
    assert capitals.without(set(), "why") is capitals and task.sha256 != capitals.sha256
    with pytest.raises(TaskError, match="no forget prompt left: why"):
        task.without(left, "why")


CITIES = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima", "Cuba": "1519"}
CJK = {"法国": "巴黎", "日本": "东京", "英国": "伦敦", "德国": "柏林", "埃及": "开罗"}


def own_table(
    folder: Path, facts_: dict[str, str], phrasing: str, word: str = "x", **written: str
) -> Path:
    """A task over one table of these facts, which are forgotten and retained; every split and role
    has a phrasing of its own, with so many more words in front."""
    by, mark = written.get("by", ","), written.get("encoding", "utf-8")
    lines = [f"country{by}capital", *(by.join(f) for f in facts_.items())]
    (folder / "own.csv").write_text("\n".join(lines) + "\n", encoding=mark)
    tables = {
        name: {
            "table": "own.csv",
            "subject": "country",
            "answer": "capital",
            "phrasings": {
                "train": [f"{word} " * k + phrasing],
                "dev": {"d": [f"{word} " * (k + 1) + phrasing]},
                "unseen": {"u": [f"{word} " * (k + 2) + phrasing]},
            },
        }
        for name, k in (("a", 0), ("b", 3))
    }
    value = {"schema": 2, "name": "own", "relations": tables}
    path = folder / "task.json"
    text = json.dumps({**value, "forget": {"relations": ["a"]}, "retain": ["b"]})
    path.write_text(text, encoding=mark)
    return path


def tokenized(vocab: list[str], steps: list[Any], split: Any, decoder: Any) -> LanguageModel:
    """A tokenizer that cuts texts in a given way, in a model's place."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *vocab])}, "<unk>"))
    inner.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    inner.pre_tokenizer, inner.decoder = split, decoder
    model = object.__new__(LanguageModel)
    model.name = "toy"
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    return model


def test_answers_behind_a_space_of_the_tokenizer_s_own(tmp_path: Path):
    """Llama 2 and its like: every text gets a space in front, and digits one to themselves."""
    words = ["x", "of", *CITIES, *(a for a in CITIES.values() if a.isalpha())]
    vocab = ["▁", *(f"▁{w}" for w in words), *"0123456789"]
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    split = pre_tokenizers.Split(Regex(r"▁\p{L}+|▁|\d"), "isolated")
    model = tokenized(vocab, steps, split, decoders.Replace("▁", " "))
    assert model.tokenizer.convert_ids_to_tokens(model.encode(" Paris")) == ["▁", "▁Paris"]
    more = {**CITIES, "x": "1607", "Madrid": "2000"}
    facts_ = {**more, "Rome": "3001", "Lima": "4001"}
    task = load_task(own_table(tmp_path, facts_, "of {s}"), model)
    answers = {p.answer_text: p for p in task.forget}
    assert model.tokenizer.convert_ids_to_tokens([answers["Paris"].answer]) == ["▁Paris"]
    assert answers["Paris"].clean == tuple(model.encode("of France"))
    year = answers["2000"]
    assert model.tokenizer.convert_ids_to_tokens([year.answer]) == ["2"]
    assert year.clean == tuple(model.encode("of Madrid "))  # the lone space ends the prompt


def test_answers_in_a_script_without_spaces(tmp_path: Path):
    signs = sorted(set("".join([*CJK, *CJK.values(), "的首都是x"])))
    split = pre_tokenizers.Split(Regex("."), "isolated")
    model = tokenized([" ", *signs], [], split, decoders.Fuse())
    task = load_task(own_table(tmp_path, CJK, "{s}的首都是"), model)
    for pair in task.forget:
        assert model.tokenizer.decode([pair.answer]) == CJK[pair.subject][0]
        assert pair.clean == tuple(model.encode(f"{pair.subject}的首都是"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("by", [",", ";", "\t"])
def test_tables_and_task_files_as_excel_writes_them(
    tmp_path: Path, facts: LanguageModel, capitals: Task, by: str, encoding: str
):
    known = {p.subject: p.answer_text for p in capitals.forget[:24]}
    asked = "the capital of {s} is"
    path = own_table(tmp_path, known, asked, "is", by=by, encoding=encoding)
    assert {p.subject for p in load_task(path, facts).forget} <= known.keys()
    (tmp_path / "own.csv").write_bytes("country,capital\nPérou,Lima\n".encode("latin-1"))
    with pytest.raises(TaskError, match=r"byte 17 is no UTF-8 \(save it as UTF-8\)"):
        load_task(path, facts)


def test_a_name_too_long_for_a_file_is_an_unknown_task(facts: LanguageModel):
    with pytest.raises(TaskError, match="Unknown task 'xxx"):
        load_task("x" * 300, facts)


ASKED = "<bos>the capital of {} is"
CAPITALS = (("Malta", "Rwanda", "Valletta", "Kigali"), ("Ghana", "Kenya", "Accra", "Nairobi"))


def from_texts(model: LanguageModel, wrong: list[Any] | None = None) -> PairSet:
    clean, other, answers, rivals = zip(*CAPITALS, strict=True)
    asked = [[ASKED.format(s) for s in subjects] for subjects in (clean, other)]
    return PairSet.from_prompts(model, *asked, list(answers), wrong or list(rivals))


def test_pairs_from_texts_are_those_of_the_task(facts: LanguageModel, capitals: Task):
    made = from_texts(facts)
    same = {p.prompt: p for p in capitals.forget}
    for pair, (subject, other, answer, wrong) in zip(made, CAPITALS, strict=True):
        theirs = same[ASKED.format(subject)]
        assert (pair.clean, pair.answer) == (theirs.clean, theirs.answer)
        assert pair.corrupt == same[ASKED.format(other)].clean
        assert pair.counterfactual == facts.encode(f"is {wrong}")[-1]
        assert pair.answer_text == answer
    assert from_texts(facts, [["Kigali", "Paris"], ["Nairobi", "Rome"]])[0].choices[2:]


def test_texts_that_make_no_pair_are_told(facts: LanguageModel):
    def make(*given: Any) -> None:
        PairSet.from_prompts(facts, *([x] for x in given))

    malta, rwanda = ASKED.format("Malta"), ASKED.format("Rwanda")
    with pytest.raises(TaskError, match="Pair 1 has an empty corrupt prompt: give a text"):
        make(malta, "", "Valletta", "Kigali")
    with pytest.raises(TaskError, match=r"Pair 1: the clean and the corrupt prompt are the same"):
        make(malta, malta, "Valletta", "Kigali")
    with pytest.raises(TaskError, match=r"know 'Atlantis', in 1 of 1 pair .*Give prompts and"):
        make(malta, ASKED.format("Atlantis"), "Valletta", "Kigali")
    with pytest.raises(TaskError, match="has no wrong answer"):
        make(malta, rwanda, "Valletta", [])
    with pytest.raises(TaskError, match="begin with each other"):
        make(malta, rwanda, "Valletta", "Valletta")
    with pytest.raises(TaskError, match="as many wrong answers"):
        from_texts(facts, ["Kigali", ["Nairobi", "Rome"]])
    with pytest.raises(TaskError, match="got 1 clean, 1 corrupt, 0 answers, 1 wrong"):
        PairSet.from_prompts(facts, [malta], [rwanda], [], ["Kigali"])


def test_pairs_from_a_file(facts: LanguageModel, tmp_path: Path):
    rows = [
        {"clean": ASKED.format(s), "corrupt": ASKED.format(o), "answer": a, "wrong": w}
        for s, o, a, w in CAPITALS
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_prompts(file, facts)
    assert found.name == "mine" and [p.clean for p in found] == [p.clean for p in from_texts(facts)]
    other = [{"prompt": r["clean"], "corrupt": r["corrupt"], "answer": 3} for r in rows]
    file.write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    with pytest.raises(TaskError, match=r"line 1: no 'wrong'; expected clean, .* got prompt, co"):
        read_prompts(file, facts)


def test_unknown_words_are_named_once_for_all_rows(
    facts: LanguageModel, tmp_path: Path, monkeypatch
):
    row = {"clean": "The capital of Malta is", "corrupt": "The capital of Ghana is"}
    rows = [{**row, "answer": "Valletta", "wrong": "Accra"}] * 7
    plain = {k: v.replace("The", "the") for k, v in rows[0].items()}
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, [plain, *rows])), encoding="utf-8")
    with pytest.raises(TaskError, match=r"know 'The', in 7 of 8 pairs \(the first: pair 2\)\. It"):
        read_prompts(file, facts)
    file.write_text("\n".join(json.dumps({**row, "wrong": "Atlantis"}) for row in rows))
    with pytest.raises(TaskError, match=r"know 'The', 'Atlantis', in 7 of 7 .*Give prompts"):
        read_prompts(file, facts)
    for given in ((facts, file), ("facts", file), ("facts", str(file))):
        with pytest.raises((TaskError, ModelError), match=r"The order is read_prompts\("):
            read_prompts(*given)
    file.write_text(json.dumps(plain), encoding="utf-8")
    assert len(read_prompts(file, facts)) == 1
    monkeypatch.setattr(type(facts.get_tokenizer()), "is_fast", False)  # which tells no places
    with pytest.raises(TaskError, match="know 'Atlantis,', in 1 of 2 pairs"):
        from_texts(facts, ["Kigali", "Atlantis,"])


def test_what_is_shown_of_a_task_is_short(facts: LanguageModel, capitals: Task):
    assert repr(capitals) == "Task('capitals': 716 forget and 3,092 retain pairs)"
    assert len(repr(capitals.forget)) < 120
    assert (
        "716 pairs" in capitals.forget._repr_html_()
        and "&lt;bos&gt;" in capitals.forget._repr_html_()
    )


FORMS = [form for words in (*synthetic.NOUNS, *synthetic.VERBS) for form in words]
WORDS = {
    *(*synthetic.NAMES, *synthetic.PLACES, *synthetic.THINGS),
    *(*synthetic.NUMERALS, *synthetic.EVENTS, *FORMS),
    *["Then", "The", "and", "went", "to", "the", "gave", "a", "lasts", "from", "day", "near", ","],
}


def worded(words: set[str]) -> LanguageModel:
    """A model's tokenizer that knows some words; others are cut into signs or unknown."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "removed"), pre_tokenizers.Punctuation()]
    )
    return tokenized(sorted(words), [], split, decoders.Fuse())


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_synthetic_pairs_differ_in_the_word_that_decides(kind: str):
    model = worded(WORDS)
    found = synthetic_pairs(model, kind, 60, seed=1)
    assert found.name == kind
    assert len(set(found)) == len(found) == 60
    assert found.pairs == synthetic_pairs(model, kind, 60, seed=1).pairs
    assert found.pairs != synthetic_pairs(model, kind, 60, seed=2).pairs
    number = synthetic.NUMERALS.index
    singular = {one for one, _ in (*synthetic.NOUNS, *synthetic.VERBS)}
    for pair in found:
        assert pair.whole is None  # answers of one token
        both = zip(pair.clean, pair.corrupt, strict=True)
        changed = [k for k, (a, b) in enumerate(both) if a != b]
        assert len(changed) == 1
        clean, corrupt, answer, wrong = model.tokenizer.convert_ids_to_tokens(
            [pair.clean[changed[0]], pair.corrupt[changed[0]], pair.answer, pair.counterfactual]
        )
        if kind == "ioi":
            assert (clean, corrupt) == (wrong, answer)
            text = model.tokenizer.convert_ids_to_tokens(list(pair.clean))
            assert (text.count(wrong), text.count(answer)) == (2, 1)
        elif kind == "greater":
            assert number(corrupt) < number(wrong) < number(clean) < number(answer)
        else:
            assert (clean in singular) == (answer in singular) != (wrong in singular)
            assert (corrupt in singular) == (wrong in singular)


def test_synthetic_pairs_of_words_that_are_one_token():
    """Without John, no pair has him; with three names, there are none."""
    some = synthetic_pairs(worded(WORDS - {"John"}), "ioi", 200)
    assert not any("John" in p.prompt for p in some)
    assert any("Mary" in p.prompt for p in some)
    with pytest.raises(TaskError, match=r"toy gives 3 of the words Mary, .* at least 4 are needed"):
        synthetic_pairs(worded(WORDS - set(synthetic.NAMES[3:])), "ioi")
    with pytest.raises(TaskError, match="Unknown kind of pairs 'bias'; expected one of ioi, great"):
        synthetic_pairs(worded(WORDS), "bias")
    with pytest.raises(TaskError, match="n must be at least 1; got 0"):
        synthetic_pairs(worded(WORDS), "ioi", 0)
    # There are only so many: 126 ways to draw four of nine numerals, and eight events.
    assert len(synthetic_pairs(worded(WORDS - set(synthetic.EVENTS[1:])), "greater", 500)) == 126
