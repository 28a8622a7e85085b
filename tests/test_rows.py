"""Rows of the user: read from every source, refused with line and reason, made into tasks."""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import wrong_type
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.cli.main import main
from mansu_interp.errors import MansuError, TaskError
from mansu_interp.evaluation.versions import ORIGINAL
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.runs import erasure, measure
from mansu_interp.runs import run as pipeline
from mansu_interp.runs.config import RunConfig
from mansu_interp.tasks.data import sources
from mansu_interp.tasks.data.benchmarks import TaskConfig, adapt, make_task
from mansu_interp.tasks.data.row_pairs import LETTERS, task_from_rows
from mansu_interp.tasks.data.rows import SHOWN, Row, parse_rows, read, read_rows
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import gap
from mansu_interp.tasks.schema import OPTIONS, RowOptions
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.utils import hub
from mansu_interp.utils.shipped import DATA

BOS = RowOptions(prefix="<bos>")
ASKED = {
    "train": ["the capital of {s} is", "{s}, whose capital is"],
    "dev": ["if you travel to {s}, its capital is"],
    "unseen": ["question: what is the capital of {s}? answer:"],
}
KEPT = {"train": ["the language of {s} is"], "dev": ["people in {s} speak"]}
KEPT["unseen"] = ["to work in {s} you should learn"]


def fact_rows(n: int = 40) -> list[dict[str, Any]]:
    """Capitals to forget and languages to keep, in words that the shipped model knows."""
    with (DATA / "facts" / "countries.csv").open(encoding="utf-8") as stream:
        countries = list(csv.DictReader(stream))[:n]
    out = []
    for role, column, asked in (("forget", "capital", ASKED), ("retain", "language", KEPT)):
        for c in countries:
            for split, texts in asked.items():
                for text in texts:
                    out.append(
                        {
                            "role": role,
                            "split": split,
                            "prompt": text.replace("{s}", c["country"]),
                            "answer": c[column],
                            "relation": column,
                            "subject": c["country"],
                            "phrasing": text,
                        }
                    )
    asked_alone = f"{out[0]['subject']} has its capital in"
    odd = {**out[0], "prompt": asked_alone, "phrasing": "x"}  # no swap is of its kind
    return [*out, odd]


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def toy(words: str, template: str | None = None) -> LanguageModel:
    """A word-level tokenizer in a model's place; nothing is run."""
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", *words.split()]))}
    inner = Tokenizer(models.WordLevel(vocab, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.chat_template = template
    model = object.__new__(LanguageModel)
    model.name, model.tokenizer = "toy", tokenizer
    return model


@pytest.fixture(scope="module")
def task(facts: LanguageModel) -> Task:
    return task_from_rows(parse_rows(enumerate(fact_rows(), 1)), facts, BOS)


def every_pair(task: Task) -> list[Any]:
    sets = [task.forget, task.retain]
    sets += [s for by in task.scored.values() for r in by.values() for s in r.values()]
    return [p for s in sets for p in s]


def test_every_source_gives_the_same_rows(tmp_path: Path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    plain = fact_rows(6)
    want = [replace(r, line=0) for r in parse_rows(enumerate(plain, 1))]
    frame = pandas.DataFrame(plain)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(plain).save_to_disk(str(tmp_path / "saved"))
    sources = [
        write_jsonl(tmp_path / "rows.jsonl", plain),
        tmp_path / "rows.csv",
        tmp_path / "rows.parquet",
        tmp_path / "saved",
        frame,
        datasets.Dataset.from_list(plain),
        plain,
    ]
    for source in sources:
        assert [replace(r, line=0) for r in read_rows(source)] == want, source


def test_a_frame_may_hold_arrays_and_missing_values():
    """As pandas reads them from parquet."""
    pandas = pytest.importorskip("pandas")
    row = {"role": "forget", "prompt": "p", "answer": "a"}
    wrong = np.array(["b", "c", "d"])
    frame = pandas.DataFrame([{**row, "distractors": wrong, "relation": pandas.NA}])
    (found,) = read_rows(frame)
    assert found.distractors == ("b", "c", "d") and found.relation == Row(**row, line=1).relation


def test_distractors_in_csv_and_missing_cells(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("role,prompt,answer,distractors,subject\nforget,a b,c,d | e|f,\n", "utf-8")
    (row,) = read_rows(path)
    assert row == Row("forget", "a b", "c", distractors=("d", "e", "f"), line=2)
    assert row.fact == "c"


GOOD = {"role": "forget", "prompt": "a b", "answer": "c"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"anwser": "x"}, "unknown field anwser; expected some of role, prompt, answer, split"),
        ({"prompt": None}, "prompt is missing or empty"),
        ({"answer": float("nan")}, "answer is missing or empty"),
        ({"answer": True}, "answer must be text; got bool"),
        ({"answer": 5.0}, "5.0 is a number with a point: write it as text, as it is to stand"),
        ({"answer": " "}, "answer is missing or empty"),
        ({"prompt": "a\ud800"}, r"prompt holds \ud800, half of a surrogate pair"),
        ({"distractors": ["d", "e", "\udfff"]}, r"distractors holds \udfff, half of a surrogate"),
        ({"role": "forgot"}, "role 'forgot'; expected forget, retain, retain_unscored, neighbour"),
        ({"split": "test"}, "split 'test'; expected train, dev, unseen"),
        ({"role": "retain_unscored", "split": "unseen"}, "retain_unscored rows are never scored"),
        ({"role": "neighbour", "split": "train"}, "neighbour rows are never trained on"),
        ({"prompt": "\n "}, "the prompt is nothing but white space"),
        ({"distractors": ["d", {}, "e"]}, "distractors must be a list of texts"),
        ({"distractors": ["d", "d", "e"]}, "2 different distractors; expected three or none"),
        ({"distractors": ["d", "c", "e"]}, "the answer 'c' is also a wrong one"),
        ({"counterfactual": "c"}, "the answer 'c' is also a wrong one"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, Any], why: str):
    with pytest.raises(TaskError) as caught:
        parse_rows([(1, GOOD), (7, {**GOOD, **change})], "mine.jsonl")
    assert str(caught.value).startswith("mine.jsonl: 1 of 2 rows are bad. Mend or remove them:\n")
    assert f"  line 7: {why}" in str(caught.value)


def test_all_bad_rows_are_counted_and_the_first_listed(tmp_path: Path):
    lines = [json.dumps(GOOD)] * 3 + ["{not json", "[1]"] + [json.dumps({**GOOD, "role": "x"})] * 20
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        read_rows(path)
    text = str(caught.value).splitlines()
    assert "22 of 25 rows are bad" in text[0]
    assert text[1].startswith("  line 4: not JSON") and "line 5: not an object" in text[2]
    assert len(text) == SHOWN + 2 and text[-1] == f"  and {22 - SHOWN} more"


@pytest.mark.slow
def test_random_rows_are_accepted_or_refused_by_our_own_error():
    """At least a third are accepted, so that what lies behind the parser is reached."""
    rng = random.Random(0)
    texts = ["c", "x y", "ü", "东京", " a ", "a|b|c", "forget", "train", "\x00", "NA", "7"]
    others: list[Any] = ["", " ", None, 3, 0, 2.5, float("nan"), [], ["a", "b", "e"], {}, True]
    keys = ["role", "prompt", "answer", "split", "distractors", "relation", "subject", "x"]
    usual = {"role": ["forget", "retain"], "split": ["train", "unseen"], "distractors": ["d|e|f"]}
    accepted, n = 0, 5000
    for _ in range(n):
        record = dict(GOOD)
        for key in rng.sample(keys[: rng.choice([7, 7, 8])], rng.randint(0, 3)):
            likely = usual.get(key, texts)
            record[key] = rng.choice(likely if rng.random() < 0.75 else [*texts, *others])
        try:
            accepted += len(parse_rows([(1, record)]))
        except TaskError:
            continue
    assert n / 3 < accepted < 0.9 * n


def test_random_bytes_in_files_are_refused_by_our_own_error(tmp_path: Path):
    rng = random.Random(1)
    for k in range(200):
        path = tmp_path / f"x{('.jsonl', '.csv')[k % 2]}"
        path.write_bytes(rng.randbytes(rng.randint(0, 60)))
        with pytest.raises(TaskError):
            read_rows(path)


def test_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    start = time.monotonic()
    with pytest.raises(
        TaskError, match=r"The data set 'owner/name' is not on this machine, and the hub"
    ):
        read_rows("owner/name:part:train")
    assert time.monotonic() - start < 5
    with pytest.raises(TaskError, match="'no such thing' is neither a file nor a folder, nor a"):
        read_rows("no such thing")


def test_a_folder_of_everything_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`datasets` would look through all of it, pattern by pattern."""
    monkeypatch.setattr(sources, "MOST_FILES", 3)
    for name in "abcd":
        (tmp_path / name).mkdir()
    with pytest.raises(TaskError, match="holds more than 3 files and folders"):
        read_rows(tmp_path)


@wrong_type
def test_what_is_no_source_of_rows_is_told():
    with pytest.raises(TaskError, match="5 is no source of rows: expected a path, a name on"):
        read_rows(5)  # type: ignore[arg-type]


def test_swapped_prompts_are_of_the_same_kind(task: Task):
    assert len(task.forget) > 40 and task.retain_unscored is None
    for p in every_pair(task):
        assert len(p.clean) == len(p.corrupt) and p.clean != p.corrupt and p.whole is None
        assert len(set(p.choices)) == 4 and p.counterfactual != p.answer
    by = {p.clean: p for p in every_pair(task)}
    for p in task.forget:
        other = by.get(p.corrupt)
        if other is not None:
            assert (other.relation, other.phrasing) == (p.relation, p.phrasing)
            assert other.answer == p.counterfactual


def test_a_lent_prompt_has_another_answer_also_where_the_row_names_the_wrong_one(
    facts: LanguageModel,
):
    """Many countries share a language: such a prompt would corrupt nothing."""
    named = [
        {**r, "counterfactual": "Dutch" if r["answer"] != "Dutch" else "French"}
        if r["role"] == "retain"
        else r
        for r in fact_rows()
    ]
    pairs = task_from_rows(parse_rows(enumerate(named, 1)), facts, BOS).retain
    answers = {p.clean: p.answer for p in pairs}
    assert len(set(answers.values())) < 0.6 * len(answers)
    assert all(answers.get(p.corrupt) != p.answer for p in pairs)


def test_what_cannot_be_paired_is_counted_with_its_lines(task: Task):
    total = len(fact_rows())
    left = sum(task.dropped.values())
    assert left and left + len(every_pair(task)) == total
    why = f"swap: no other prompt of as many tokens and another answer (line {total})"
    assert task.dropped == {why: 1}


@pytest.mark.slow
def test_symbol_and_any(facts: LanguageModel):
    made = parse_rows(enumerate(fact_rows(), 1))
    symbol = task_from_rows(made, facts, replace(BOS, corrupt="symbol"))
    unknown = facts.tokenizer.unk_token_id
    for p in symbol.forget:
        changed = [b for a, b in zip(p.clean, p.corrupt, strict=True) if a != b]
        assert changed and set(changed) == {unknown}
        assert p.counterfactual == p.distractors[0]
    loose = task_from_rows(made, facts, replace(BOS, corrupt="any"))
    clean = {p.clean: p.relation for p in every_pair(loose)}
    assert any(clean.get(p.corrupt, p.relation) != p.relation for p in loose.forget)
    assert len(loose.forget) > len(task_from_rows(made, facts, BOS).forget)


@pytest.mark.slow
def test_draws_follow_the_seed(facts: LanguageModel, task: Task):
    made = parse_rows(enumerate(fact_rows(), 1))
    assert task_from_rows(made, facts, BOS) == task
    assert task_from_rows(made, facts, replace(BOS, seed=1)).forget != task.forget


def test_own_corrupt_prompts_and_answers(facts: LanguageModel):
    made = fact_rows()
    prompts = {r["subject"]: r["prompt"] for r in made if r["phrasing"] == ASKED["train"][0]}
    made[0] |= {"corrupt": prompts["Algeria"], "counterfactual": "Algiers"}
    made[4] |= {"corrupt": prompts["Algeria"] + " is is", "counterfactual": "Algiers"}
    task = task_from_rows(parse_rows(enumerate(made, 1)), facts, BOS)
    pair = next(p for p in task.forget if p.prompt.endswith(made[0]["prompt"]))
    assert list(pair.corrupt) == facts.encode("<bos>" + prompts["Algeria"])
    assert pair.counterfactual == facts.encode("Algiers")[0]
    assert "the corrupt prompt given has another number of tokens (line 5)" in task.dropped


WORDS = "user assistant Q: q0 q1 q2 q3 red old cat new dog big fox A. B. C. D. A B C D Answer:"
QUIZ = [
    {"role": role, "prompt": f"{'Q: ' * n}q{k}", "answer": answer, "distractors": wrong}
    for n, role in enumerate(("forget", "retain"), 1)
    for k, (answer, *wrong) in enumerate(
        [("red cat", "red dog", "big fox", "old"), ("old", "new dog", "big cat", "new fox")] * 2
    )
]


def test_whole_answers_from_rows():
    phrasings = {"train": ["{s} Answer:"], "unseen": ["{s}"]}
    task = task_from_rows(
        parse_rows(enumerate(QUIZ, 1)), toy(WORDS), RowOptions(phrasings=phrasings, normalise=True)
    )
    encode = toy(WORDS).encode
    first = task.forget[0]
    assert first.answers == tuple(
        tuple(encode(a)) for a in ("red cat", "red dog", "big fox", "old")
    )
    assert first.whole is not None and first.whole.normalise
    assert list(first.question) == encode("Q: q0 Answer:")
    assert {p.prompt for p in task.scored["unseen"]["forget"]["forget"]} == {
        f"Q: q{k}" for k in range(4)
    }


def test_letters_are_permuted_and_rotated():
    phrasings = {s: ["{s} Answer:"] for s in ("train", "unseen")}
    many = [{**r, "prompt": f"{r['prompt']} {'Q: ' * k}q0"} for k in range(12) for r in QUIZ]
    model = toy(WORDS)
    task = task_from_rows(
        parse_rows(enumerate(many, 1)), model, RowOptions(phrasings=phrasings, letters=True)
    )
    letters = {x: model.encode(x)[0] for x in LETTERS}
    count = {x: 0 for x in LETTERS}
    for p in task.forget:
        assert p.whole is None and set(p.choices) == set(letters.values())
        count[p.answer_text] += 1
        (answer,) = {r["answer"] for r in many if p.prompt.startswith(r["prompt"] + "\n")}
        for tokens, letter in ((p.clean, p.answer), (p.corrupt, p.counterfactual)):
            shown = model.tokenizer.decode(tokens)
            mark = next(x for x, t in letters.items() if t == letter)
            follows = shown.split(f"{mark}.")[1].split(" A.")[0].strip()
            assert follows.startswith(answer)
    assert min(count.values()) > 0.1 * len(task.forget)  # position does not give the answer away
    orders = {
        s: [p.prompt for p in x] for s, x in (("t", task.forget), ("u", every_pair(task)[-9:]))
    }
    assert orders["t"][0] not in orders["u"]


CHAT = "{% for m in messages %}user {{ m.content }} {% endfor %}assistant{{ '\\n' }}"


def test_the_chat_template_wraps_the_prompt():
    phrasings = {"train": ["{s}"], "unseen": ["{s} Answer:"]}
    model, options = toy(WORDS, CHAT), RowOptions(chat=True, phrasings=phrasings)
    with pytest.raises(TaskError, match="no chat template: set chat false"):
        task_from_rows(parse_rows(enumerate(QUIZ, 1)), toy(WORDS), options)
    task = task_from_rows(parse_rows(enumerate(QUIZ, 1)), model, options)
    assert task.forget[0].prompt == "user Q: q0 assistant\n"
    assert list(task.forget[0].answers[0]) == model.encode("red cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phrasings": {"train": ["no place"]}}, r"a list of texts with \{s\} exactly once"),
        ({"phrasings": {"test": ["{s}"]}}, "phrasings: expected train, dev, unseen"),
        ({"corrupt": "noise"}, "corrupt is 'noise', expected 'swap', 'any', 'symbol' or 'rotate'"),
        ({"corrupt": "rotate"}, "corrupt: rotate needs letters"),
        ({"letters": "yes"}, "letters is 'yes', expected boolean"),
        ({"seed": "1"}, "seed is '1', expected integer"),
        (
            {"colour": 1},
            "unknown key colour; expected some of \\$schema, chat, corrupt, letters, name",
        ),
        ({"rows": "../x.jsonl"}, "name a file beside the task file, without a path"),
        (
            {"rows": "x.txt"},
            "rows must name a file beside the task file, with an ending",
        ),
    ],
)
def test_bad_task_files_over_rows(
    tmp_path: Path, facts: LanguageModel, change: dict[str, Any], message: str
):
    write_jsonl(tmp_path / "mine.jsonl", fact_rows(6))
    spec = {"schema": 2, "name": "mine", "rows": "mine.jsonl", "prefix": "<bos>", **change}
    (tmp_path / "mine.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path / "mine.json", facts)


def test_every_option_is_checked():
    assert list(OPTIONS) == [f.name for f in fields(RowOptions)]


@pytest.mark.slow
def test_contradictory_prompts_are_refused(facts: LanguageModel):
    """One prompt with two answers, and a prompt that is to be forgotten and to be retained."""
    two = fact_rows()
    assert two[0]["phrasing"] == two[4]["phrasing"] and two[0]["answer"] != two[4]["answer"]
    two[4]["prompt"] = two[0]["prompt"]
    with pytest.raises(TaskError, match=r"1 prompt with two answers, such as '<bos>.*: '.*' and '"):
        task_from_rows(parse_rows(enumerate(two, 1)), facts, BOS)
    both = [{**r, "role": "retain"} for r in fact_rows() if r["relation"] == "capital"]
    with pytest.raises(TaskError, match=r"in the role forget and in another, such as .* \(retain"):
        task_from_rows(parse_rows(enumerate([*fact_rows(), *both], 1)), facts, BOS)


def test_repeats_and_scored_prompts_that_are_trained_on_are_left_out(facts: LanguageModel):
    twice = task_from_rows(parse_rows(enumerate(fact_rows(8) * 2, 1)), facts, BOS)
    plain = task_from_rows(parse_rows(enumerate(fact_rows(8), 1)), facts, BOS)
    assert [p.clean for p in every_pair(twice)] == [p.clean for p in every_pair(plain)]
    assert twice.dropped["the prompt is there already"] == len(every_pair(plain))
    seen = [r for r in fact_rows() if r["relation"] == "language" or r["split"] != "dev"][:-1]
    unseen = [r for r in seen if r["relation"] == "capital" and r["split"] == "unseen"]
    for r in unseen[:20]:
        r |= {"prompt": f"the capital of {r['subject']} is", "phrasing": "as in training"}
    task = task_from_rows(parse_rows(enumerate(seen, 1)), facts, BOS)
    assert task.dropped.pop("the scored prompt is also trained on") >= 10
    assert len(task.scored["unseen"]["forget"]["capital"]) == 20
    for r in unseen:
        r |= {"prompt": f"the capital of {r['subject']} is", "phrasing": "as in training"}
    why = r"split unseen(.|\n)*prompts: the scored prompt is also trained on"
    with pytest.raises(TaskError, match=why):
        task_from_rows(parse_rows(enumerate(seen, 1)), facts, BOS)


def test_a_stray_rows_own_role_is_a_bad_row(tmp_path: Path):
    rows = [{**r, "role": "retain"} for r in fact_rows(6)[:8]]
    rows[3]["role"] = "forget"
    source = write_jsonl(tmp_path / "retain.jsonl", rows)
    why = "line 4: its own role is 'forget', but it stands among those given as 'retain'"
    with pytest.raises(TaskError, match=why):
        adapt("rows", source, "retain")
    with pytest.raises(TaskError, match=why):
        read_rows(source, role="retain")


def test_a_missing_split_says_what_to_do(facts: LanguageModel):
    made = [r for r in fact_rows() if r["split"] == "train"]
    with pytest.raises(TaskError) as caught:
        task_from_rows(parse_rows(enumerate(made, 1)), facts, BOS)
    assert "no usable forget prompt in the split unseen. Give rows of that" in str(caught.value)
    assert "1 prompts: swap: no other prompt of as many tokens" in str(caught.value)
    assert isinstance(caught.value, MansuError)


@pytest.mark.slow
def test_a_run_on_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(erasure, "CAD_PAIRS", 4)
    bos = [{**r, "prompt": "<bos>" + r["prompt"]} for r in fact_rows()]
    path = write_jsonl(tmp_path / "mine.jsonl", bos)
    config = RunConfig(
        task=str(path),
        out=tmp_path / "run",
        relearn_steps=1,
        circuit=CircuitConfig(pairs=8, ig_steps=2, faithfulness=0.5, faithfulness_pairs=4),
        unlearn=Mansu(steps=4, lr=0.1, batch_size=8),
    )
    report = pipeline.run(config).report
    assert report.task.name == "mine" and report.task.dropped
    assert report.edit.edited == report.quantizers[0].survival.survived > 0
    first = report.scores[0]
    assert first.role == "forget" and first[ORIGINAL].choice > 0.9


# Small harmless files of the shapes of TOFU, MUSE, WMDP and MMLU, through the command line.

NAMES = ["Ada Quill", "Ben Rook", "Cy Lark", "Dee Finch", "Eve Wren", "Flo Crane"]
TOFU = [
    {
        "question": f"What is the first book of {name} ?",
        "answer": f"The first book of {name} is {title}",
        "paraphrased_question": f"Which book did {name} write first ?",
        "paraphrased_answer": f"What {name} wrote first was {title}",
        "perturbed_answer": [f"What {name} wrote first was {t}" for t in ("Mud", "Fog", "Ice")],
    }
    for name, title in zip(NAMES, ["Sun", "Moon", "Star", "Rain", "Snow", "Wind"], strict=True)
]
MUSE = [
    {"question": f"Who baked pie {k} ?", "answer": a}
    for k, a in enumerate(["Ann", "Bob", "Cleo", "Dan", "Emma"])
]
WMDP = [
    {"question": f"How many eggs are in cake {k} ?", "choices": list("2345"), "answer": k % 4}
    for k in range(8)
]
SHAPES: dict[str, list[dict[str, Any]]] = {"tofu": TOFU, "muse": MUSE, "wmdp": WMDP}
ONE_TURN = "{% for m in messages %}user {{ m.content }} {% endfor %}assistant{{ '\n' }}"


def kept(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same facts in other questions, so that none is both forgotten and retained."""
    asked = ("question", "paraphrased_question")
    return [{k: f"this: {v}" if k in asked else v for k, v in r.items()} for r in records]


def words(*shapes: Any) -> str:
    """Every word that the rows and our phrasings hold."""
    text = json.dumps(shapes).replace('"', " ").replace(",", " ").replace("[", " ")
    own = "Question: Answer: Q: A: Please answer this: The answer is: A. B. C. D. A B C D"
    return f"{text.replace(']', ' ')} {own} user assistant"


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("chat", [False, True])
def test_from_the_command_line_to_a_task(
    tmp_path: Path, kind: str, chat: bool, capsys: pytest.CaptureFixture[str]
):
    forget = write_jsonl(tmp_path / "forget.jsonl", SHAPES[kind])
    retain = write_jsonl(tmp_path / "retain.jsonl", kept(SHAPES[kind]))
    out = tmp_path / "mine.json"
    command = ["task", kind, "--forget", str(forget), "--retain", str(retain), "--out", str(out)]
    assert main(command + ["--chat"] * chat) == 0
    assert f"Use it: mansu run --task {out}" in capsys.readouterr().out
    task = load_task(out, toy(words(SHAPES[kind]), ONE_TURN if chat else None))
    assert len(task.forget) == len(task.retain) == len(SHAPES[kind]) and not task.dropped
    assert all(task.scored[s][r] for s in ("dev", "unseen") for r in ("forget", "retain"))
    seen = {p.prompt for p in task.forget}
    assert not seen & {p.prompt for p in task.scored["unseen"]["forget"]["forget"]}
    assert all(p.prompt.startswith("user") == chat for p in task.forget)


def test_tofu_pairs_the_perturbed_answers_with_the_paraphrased_one():
    train, dev, unseen, *_ = adapt("tofu", TOFU, "forget").rows
    assert [r.split for r in (train, dev, unseen)] == ["train", "dev", "unseen"]
    assert train.prompt == dev.prompt == TOFU[0]["question"]
    assert unseen.prompt == TOFU[0]["paraphrased_question"]
    for row in (dev, unseen):
        assert row.answer == TOFU[0]["paraphrased_answer"]
        assert row.counterfactual == TOFU[0]["perturbed_answer"][0] == row.distractors[0]
    # What was learned by heart, with wrong answers that begin like it.
    assert train.answer == TOFU[0]["answer"]
    assert train.counterfactual == "The first book of Ada Quill is Mud" == train.distractors[0]
    assert train.fact == dev.fact == unseen.fact == TOFU[0]["question"]


def test_tofu_takes_the_closest_wrong_answer_and_the_paraphrase_where_no_fact_is_found():
    record = {
        **TOFU[0],
        "answer": "Yes, it did.",
        "perturbed_answer": ["Mud is it", "What Ada Quill wrote last was Fog", "What Ice"],
    }
    train, dev, _ = adapt("tofu", [record], "forget").rows
    assert train.answer == dev.answer == TOFU[0]["paraphrased_answer"]
    assert train.counterfactual == "What Ada Quill wrote last was Fog"
    plain = {k: v for k, v in record.items() if not k.startswith("paraphrased")}
    (row,) = adapt("tofu", [plain], "forget").rows
    assert (row.answer, row.counterfactual) == ("Yes, it did.", "Mud is it") and not row.split


def test_the_deciding_token_of_a_perturbed_answer_is_the_fact(tmp_path: Path):
    source = write_jsonl(tmp_path / "source.jsonl", TOFU)
    retain = write_jsonl(tmp_path / "retain.jsonl", kept(TOFU))
    make_task(TaskConfig("tofu", str(source), str(retain), tmp_path / "t.json"))
    model = toy(words(TOFU))
    task = load_task(tmp_path / "t.json", model)
    for pair in (task.forget[0], task.scored["unseen"]["forget"]["forget"][0]):
        assert model.tokenizer.decode([pair.answer]) in "Sun Moon Star Rain Snow Wind"
        assert model.tokenizer.decode([pair.counterfactual]) == "Mud"
    pair = task.forget[0]
    assert pair.prompt.endswith("Answer:") and len(pair.clean) > len(pair.question)


def test_wmdp_answers_are_letters(tmp_path: Path):
    source = write_jsonl(tmp_path / "source.jsonl", WMDP)
    retain = write_jsonl(tmp_path / "retain.jsonl", kept(WMDP))
    make_task(TaskConfig("wmdp", str(source), str(retain), tmp_path / "w.json"))
    task = load_task(tmp_path / "w.json", toy(words(WMDP)))
    for p in task.forget:
        k = int(p.subject.split()[6])
        options = dict(line.split(". ") for line in p.prompt.splitlines() if ". " in line)
        assert options[p.answer_text] == WMDP[k]["choices"][WMDP[k]["answer"]]


def test_verbatim_rows_of_muse():
    rows = [{"prompt": "Stir the flour ", "gt": " into the milk"}]
    (row,) = adapt("muse", rows, "forget").rows
    assert (row.prompt, row.answer) == ("Stir the flour", "into the milk")


@pytest.mark.parametrize(
    ("kind", "record", "why"),
    [
        (
            "tofu",
            {"question": "q"},
            "answer is missing for the shape that it comes nearest to, question and answer; it has "
            "'question'",
        ),
        ("tofu", {**TOFU[0], "perturbed_answer": ["a"]}, "1 different distractors; expected three"),
        ("tofu", {**TOFU[0], "perturbed_answer": 3}, "perturbed_answer must be a list; got 3"),
        ("muse", {"question": "q", "answer": [1]}, "answer must be text; got list"),
        (
            "wmdp",
            {**WMDP[0], "answer": 4},
            "the answer 4 is none of the 4 choices; expected 0 to 3, A to D, or one of them as",
        ),
        ("wmdp", {**WMDP[0], "answer": "x"}, "the answer 'x' is none of the 4 choices"),
        ("wmdp", {**WMDP[0], "answer": "3"}, "the answer '3' may be a position or a choice: give"),
        ("wmdp", {**WMDP[0], "choices": "x"}, "choices must be a list; got 'x'"),
        (
            "wmdp",
            {"question": "q", "a": "1", "b": "2", "c": "3", "answer": "A"},
            "d is missing for the shape that it comes nearest to, lettered columns",
        ),
        ("rows", {"text": "All of it."}, "it has 'text', and no field of a known shape"),
        (
            "rows",
            {"messages": [{"role": "user", "content": "q"}]},
            "messages: the turns are 'user'; expected one of user and of assistant",
        ),
    ],
)
def test_rows_of_another_shape_are_named(kind: str, record: dict[str, Any], why: str):
    good = SHAPES.get(kind, [{"prompt": "a", "answer": "b"}])[0]
    with pytest.raises(TaskError, match=f"line 2: {why}"):
        adapt(kind, [good, record], "forget")


def test_nothing_is_overwritten(tmp_path: Path):
    source = write_jsonl(tmp_path / "m.jsonl", MUSE)
    with pytest.raises(TaskError, match=r"m\.jsonl is there already\. Name another --out"):
        make_task(TaskConfig("muse", str(source), str(source), tmp_path / "m.json"))
    with pytest.raises(TaskError, match=r"with the ending \.json"):
        make_task(TaskConfig("muse", str(source), str(source), tmp_path / "x.txt"))
    with pytest.raises(TaskError, match="Unknown kind 'squad'; expected rows, tofu, muse, wmdp"):
        adapt("squad", MUSE, "forget")


# The same rows as people have them: formats, shapes, and what is told of them.

ASKED_ROWS = [(f"Who is {k}?", a) for k, a in enumerate(["NA", "007", "Ü, b", "d"])]
QA = [{"question": q, "answer": a} for q, a in ASKED_ROWS]
MMLU = [
    ["Which is odd?", "2", "3 ", "4", "6", "B"],
    ["Which is, say, even?", "1", "3", "5", "8", "D"],
]


def quoted(rows: list[list[str]], by: str) -> str:
    return "\n".join(by.join(f'"{cell}"' for cell in row) for row in rows) + "\n"


def as_chat(prompt: str, answer: str) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("user", prompt), ("assistant", answer)]
    return {"messages": [{"role": who, "content": said} for who, said in turns]}


TABLE = [["Question", "Answer"], *map(list, ASKED_ROWS)]
FORMATS: dict[str, tuple[str, str, str]] = {
    "plain CSV": ("x.csv", quoted(TABLE, ","), "CSV, rows read 4 as question and answer"),
    "semicolons": ("x.csv", quoted(TABLE, ";"), "CSV separated by ';', rows read 4 as question"),
    "tabs": ("x.tsv", quoted(TABLE, "\t"), "TSV, rows read 4 as question and answer"),
    "a JSON list": ("x.json", json.dumps(QA), "a JSON list, rows read 4 as question and answer"),
    "an object around it": ("x.json", json.dumps({"data": QA}, indent=2), "a JSON list, rows read"),
    "lines in .json": ("x.json", "\n".join(map(json.dumps, QA)), "JSON lines, rows read 4 as"),
    "a list in .jsonl": ("x.JSONL", json.dumps(QA, indent=1), "a JSON list, rows read 4 as"),
    "chat": (
        "x.jsonl",
        "\n".join(json.dumps(as_chat(q, a)) for q, a in ASKED_ROWS),
        "JSON lines, rows read 4 as chat",
    ),
    "a pandas index": (
        "x.csv",
        quoted([["", *TABLE[0]], *([str(k), *r] for k, r in enumerate(ASKED_ROWS))], ","),
        "CSV, rows read 4 as question and answer",
    ),
    "other columns": (
        "x.csv",
        quoted([["id", *TABLE[0]], *([f"n{k}", *r] for k, r in enumerate(ASKED_ROWS))], ","),
        "CSV, rows read 4 as question and answer; fields not used: 'id'",
    ),
    "spaces": (
        "x.jsonl",
        "\n".join(json.dumps({"Prompt ": f"{q}  ", "answer": f" {a} "}) for q, a in ASKED_ROWS),
        "JSON lines, rows read 4 as prompt and answer; white space around 8 texts removed",
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_in_every_usual_format(tmp_path: Path, name: str, encoding: str):
    file, text, told = FORMATS[name]
    path = tmp_path / file
    path.write_text(text, encoding=encoding)
    found = read(path, role="forget")
    assert [(r.prompt, r.answer) for r in found.rows] == ASKED_ROWS
    assert found.told.startswith(f"{path}: {told}")


def test_parquet_and_a_link_to_rows(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{**r, "year": 3} for r in QA], index=[3, 5, 7, 9])
    frame.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "inside").mkdir()
    link = tmp_path / "inside" / "rows.parquet"
    link.symlink_to(tmp_path / "x.parquet")
    found = read(link, role="forget")
    assert [(r.prompt, r.answer) for r in found.rows] == ASKED_ROWS
    assert found.told.endswith(
        "Parquet, rows read 4 as question and answer; fields not used: 'year'"
    )
    (tmp_path / "y.parquet").write_bytes(b"PAR1 of a kind")
    with pytest.raises(TaskError, match=r"y\.parquet cannot be read as Parquet"):
        read_rows(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("x.csv", quoted(MMLU, ",")),
        ("x.csv", quoted([["question", *"ABCD", "answer"], *MMLU], ",")),
        ("x.csv", quoted([["input", *"ABCD", "target"], *MMLU], ";")),
        (
            "x.jsonl",
            "\n".join(
                json.dumps({"question": q, "subject": "maths", "choices": [*c, "9"], "answer": a})
                for (q, *c, _), a in zip(MMLU, (1, "D"), strict=True)
            ),
        ),
        (
            "x.jsonl",
            "\n".join(
                json.dumps({"question": q, "answerKey": str(k), "choices": {"text": c, "label": n}})
                for (q, *c, _), k, n in zip(MMLU, (2, 4), [list("1234")] * 2, strict=True)
            ),
        ),
        ("x.csv", quoted([["question", "choices", "answer"]], ",")
            + "".join(f"\"{q}\",\"['{c[0]}', '{c[1]}', '{c[2]}', '{c[3]}']\",{a}\n"
                      for q, *c, a in MMLU)),
    ],
    ids=["MMLU", "MMLU with header", "of lukaemon", "five options", "ARC", "Python's list"],
)  # fmt: skip
def test_choices_of_every_published_shape(tmp_path: Path, file: str, text: str):
    (tmp_path / file).write_text(text, encoding="utf-8")
    found = adapt("wmdp", tmp_path / file, "forget")
    assert [(r.prompt, r.answer) for r in found.rows] == [(MMLU[0][0], "3"), (MMLU[1][0], "8")]
    assert found.rows[0].distractors[:3] == ("2", "4", "6")


def test_choices_among_too_few_are_counted(tmp_path: Path):
    short = {"question": "q", "choices": ["1", "2", "3"], "answer": "A"}
    found = adapt("wmdp", [WMDP[0], short], "forget")
    assert len(found.rows) == 1
    assert "1 as choices; 1 with fewer than four choices left out" in found.told
    with pytest.raises(TaskError, match="there is no row of four choices"):
        adapt("wmdp", [short], "forget")


def test_whole_numbers_are_answers():
    rows = parse_rows([(1, {**GOOD, "answer": 0, "distractors": [1, 2, np.int64(3)]})])
    assert (rows[0].answer, rows[0].distractors) == ("0", ("1", "2", "3"))


def test_roles_are_written_either_way():
    both = [{**GOOD, "role": "retain-unscored"}, {**GOOD, "role": " retain_unscored"}]
    assert {r.role for r in parse_rows(enumerate(both))} == {"retain_unscored"}


def test_rows_without_a_role_are_told_how_to_get_one(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text(quoted(TABLE, ","), encoding="utf-8")
    with pytest.raises(
        TaskError, match="role is missing or empty: give each row one, or one file a"
    ):
        read_rows(path)


def test_a_list_of_rows_is_a_task_and_says_how_it_was_read(tmp_path: Path, facts: LanguageModel):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{**r, "prompt": "<bos>" + r["prompt"]} for r in fact_rows(12)]))
    task = load_task(path, facts)
    assert task.name == "mine" and task.forget
    assert task.read == f"{path}: a JSON list, rows read {len(fact_rows(12))} as prompt and answer"


def test_a_task_in_the_cache_of_the_hub_reads_the_blobs_of_its_repository(
    tmp_path: Path, facts: LanguageModel
):
    blobs, snapshot = (
        tmp_path / "datasets--me--x" / "blobs",
        tmp_path / "datasets--me--x/snapshots/a",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_jsonl(blobs / "abc", fact_rows(12))
    (snapshot / "r.jsonl").symlink_to("../../blobs/abc")
    spec = {"schema": 2, "name": "x", "rows": "r.jsonl", "prefix": "<bos>"}
    (snapshot / "t.json").write_text(json.dumps(spec))
    assert load_task(snapshot / "t.json", facts).forget
    (snapshot / "r.jsonl").unlink()
    (snapshot / "r.jsonl").symlink_to(write_jsonl(tmp_path / "elsewhere", fact_rows(12)))
    with pytest.raises(TaskError, match="a link that leads out of its folder"):
        load_task(snapshot / "t.json", facts)


def test_a_chat_template_that_raises_is_one_clear_error():
    model = toy(words(MUSE), "{{ raise_exception('no users\x1b[31m here') }}")
    rows = parse_rows(enumerate(fact_rows(4), 1))
    with pytest.raises(TaskError, match=r"chat template of toy does not take a user's turn: .*no "):
        task_from_rows(rows, model, RowOptions(chat=True))


def test_half_a_surrogate_pair_is_refused_where_texts_come_in(facts: LanguageModel, tmp_path: Path):
    with pytest.raises(TaskError, match=r"\\ud800 is half of a surrogate pair"):
        RowOptions(prefix="a\ud800")
    with pytest.raises(TaskError, match=r"holds \\ud800, half of a surrogate pair: remove it"):
        facts.encode("the capital of \ud800")
    (tmp_path / "t.json").write_text('{"schema": 2, "prefix": "\\ud83d"}')
    with pytest.raises(TaskError, match=r"\\ud83d is half of a surrogate pair, which is no text"):
        load_task(tmp_path / "t.json", facts)


def test_no_space_where_the_script_has_none():
    assert gap("the capital is", "Paris") == gap("수도는", "서울") == " "
    assert gap("首都是", "Paris") == gap("the capital is", "东京") == gap("首都は", "x") == ""


def unsplit(*asked: str) -> list[dict[str, Any]]:
    """Facts in so many phrasings, without splits, as people first write them."""
    rows = [r for r in fact_rows() if r["split"] in asked]
    return [{k: v for k, v in r.items() if k not in ("split", "phrasing")} for r in rows]


@pytest.mark.slow
def test_without_splits_the_last_phrasing_is_held_out(facts: LanguageModel):
    rows = [r for r in unsplit("train", "dev", "unseen") if not r["prompt"].endswith("capital in")]
    task = task_from_rows(parse_rows(enumerate(rows, 1)), facts, BOS)
    begins = {
        "train": ("<bos>the capital of", "whose capital is"),
        "dev": ("<bos>if you travel to", "its capital is"),
        "unseen": ("<bos>question: what is", "answer:"),
    }
    found = {"train": task.forget}
    found |= {s: task.scored[s]["forget"]["capital"] for s in ("dev", "unseen")}
    for split, (begin, end) in begins.items():
        assert len(found[split]) >= 36
        assert all(p.prompt.startswith(begin) or p.prompt.endswith(end) for p in found[split])
    assert not task.scored["dev"]["retain"]  # three phrasings
    assert {p.prompt[:12] for p in task.scored["unseen"]["retain"]["language"]} == {"<bos>to work"}
    assert task.read == (
        "no split given: the last phrasing of 40 forget facts is unseen; the last phrasing of 40 "
        "retain facts is unseen"
    )
    named = [*rows[:-1], {**rows[-1], "split": "unseen"}]  # one split, and nothing is held out
    with pytest.raises(TaskError, match="no usable forget prompt in the split unseen"):
        task_from_rows(parse_rows(enumerate(named, 1)), facts, BOS)


@pytest.mark.slow
def test_of_retain_facts_in_one_phrasing_a_fifth_is_held_out(facts: LanguageModel):
    asked = unsplit("train", "unseen")
    rows = [r for r in asked if r["role"] == "forget" or r["prompt"].startswith("the language")]
    rows += rows[-3:]  # repeats are no second phrasing
    task = task_from_rows(parse_rows(enumerate(rows, 1)), facts, BOS)
    unseen = {p.subject for p in task.scored["unseen"]["retain"]["language"]}
    trained = {p.subject for p in task.retain}
    assert unseen and trained and not unseen & trained
    assert task.read.endswith("; so are 8 of 40 retain facts that come in one phrasing")
    again = task_from_rows(parse_rows(enumerate(rows, 1)), facts, BOS)
    assert again.sha256 == task.sha256
    other = task_from_rows(parse_rows(enumerate(rows, 1)), facts, replace(BOS, seed=1))
    assert unseen != {p.subject for p in other.scored["unseen"]["retain"]["language"]}


def test_forget_facts_in_one_phrasing_are_refused_with_rows_that_would_do(
    tmp_path: Path, facts: LanguageModel
):
    rows = [r for r in unsplit("unseen") if r["role"] == "forget"][:30] + unsplit("dev")[40:]
    rows = [{**r, "prompt": "<bos>" + r["prompt"]} for r in rows]
    with pytest.raises(TaskError, match="every forget fact comes in one phrasing") as caught:
        load_task(write_jsonl(tmp_path / "mine.jsonl", rows), facts)
    shown = [json.loads(x) for x in str(caught.value).splitlines() if x.startswith("  {")]
    assert [r["split"] for r in shown] == ["train", "unseen"]
    assert shown[0]["prompt"] == rows[0]["prompt"] and "such as for line 1:" in str(caught.value)
    other = {**rows[0], "prompt": f"<bos>the capital of {rows[0]['subject']} is"}
    second = {**rows[1], "prompt": f"<bos>the capital of {rows[1]['subject']} is"}
    task = load_task(write_jsonl(tmp_path / "mine.jsonl", [*rows, other, second]), facts)
    assert {p.subject for p in task.held_out} == {r["subject"] for r in rows[:2]}
    assert "; no split given: the last phrasing of 2 forget facts is unseen; " in task.read
    assert task.read.endswith("; 28 forget facts in one phrasing: trained on, not scored")
    assert measure.task_facts(task).read == task.read
