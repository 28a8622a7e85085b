"""Small harmless files of the shapes of TOFU, MUSE, WMDP and MMLU, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rows import toy, write_jsonl

from mansu_interp.cli.main import main
from mansu_interp.errors import TaskError
from mansu_interp.tasks.benchmarks import TaskConfig, adapt, make_task
from mansu_interp.tasks.load import load_task

NAMES = ["Ada Quill", "Ben Rook", "Cy Lark", "Dee Finch", "Eve Wren", "Flo Crane"]
TOFU = [
    {
        "question": f"What is the first book of {name} ?",
        "answer": f"The first book of {name} is {title}",
        "paraphrased_question": f"Which book did {name} write first ?",
        "perturbed_answer": [f"The first book of {name} is {t}" for t in ("Mud", "Fog", "Ice")],
    }
    for name, title in zip(NAMES, ["Sun", "Moon", "Star", "Rain", "Snow", "Wind"], strict=True)
]
MUSE = [
    {"question": f"Who baked pie {k} ?", "answer": a}
    for k, a in enumerate(["Ann", "Bob", "Cleo", "Dan", "Emma"])
]
QUIZ = [
    {"question": f"How many eggs are in cake {k} ?", "choices": list("2345"), "answer": k % 4}
    for k in range(8)
]
SHAPES: dict[str, list[dict[str, Any]]] = {"tofu": TOFU, "muse": MUSE, "wmdp": QUIZ}
CHAT = "{% for m in messages %}user {{ m.content }} {% endfor %}assistant{{ '\n' }}"


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
    retain = write_jsonl(tmp_path / "retain.jsonl", SHAPES[kind])
    out = tmp_path / "mine.json"
    command = ["task", kind, "--forget", str(forget), "--retain", str(retain), "--out", str(out)]
    assert main(command + ["--chat"] * chat) == 0
    assert f"Use it: mansu run --task {out}" in capsys.readouterr().out
    task = load_task(out, toy(words(SHAPES[kind]), CHAT if chat else None))
    assert len(task.forget) == len(task.retain) == len(SHAPES[kind]) and not task.dropped
    assert all(task.scored[s][r] for s in ("dev", "unseen") for r in ("forget", "retain"))
    seen = {p.prompt for p in task.forget}
    assert not seen & {p.prompt for p in task.scored["unseen"]["forget"]["forget"]}
    assert all(p.prompt.startswith("user") == chat for p in task.forget)


def test_tofu_keeps_its_wrong_answers_and_paraphrases(tmp_path: Path):
    first, other, *_ = adapt("tofu", TOFU, "forget")
    assert (first.prompt, first.answer) == (TOFU[0]["question"], TOFU[0]["answer"])
    assert first.counterfactual == TOFU[0]["perturbed_answer"][0] == first.distractors[0]
    assert (other.prompt, other.split) == (TOFU[0]["paraphrased_question"], "unseen")
    assert first.fact == other.fact == TOFU[0]["question"]


def test_the_deciding_token_of_a_perturbed_answer_is_the_fact(tmp_path: Path):
    source = write_jsonl(tmp_path / "source.jsonl", TOFU)
    make_task(TaskConfig("tofu", str(source), str(source), tmp_path / "t.json"))
    model = toy(words(TOFU))
    pair = load_task(tmp_path / "t.json", model).forget[0]
    assert model.tokenizer.decode([pair.answer]) == "Sun"
    assert model.tokenizer.decode([pair.counterfactual]) == "Mud"
    assert pair.prompt.endswith("Answer:") and len(pair.clean) > len(pair.question)


def test_wmdp_answers_are_letters(tmp_path: Path):
    source = write_jsonl(tmp_path / "source.jsonl", QUIZ)
    make_task(TaskConfig("wmdp", str(source), str(source), tmp_path / "w.json"))
    task = load_task(tmp_path / "w.json", toy(words(QUIZ)))
    for p in task.forget:
        k = int(p.subject.split()[6])
        options = dict(line.split(". ") for line in p.prompt.splitlines() if ". " in line)
        assert options[p.answer_text] == QUIZ[k]["choices"][QUIZ[k]["answer"]]


def test_verbatim_rows_of_muse():
    (row,) = adapt("muse", [{"prompt": "Stir the flour ", "gt": " into the milk"}], "forget")
    assert (row.prompt, row.answer) == ("Stir the flour", "into the milk")


@pytest.mark.parametrize(
    ("kind", "record", "why"),
    [
        ("tofu", {"question": "q"}, "answer is missing; it has question"),
        ("tofu", {**TOFU[0], "perturbed_answer": ["a"]}, "1 different distractors; expected three"),
        ("muse", {"question": "q", "answer": 3}, "answer must be text; got int"),
        ("wmdp", {**QUIZ[0], "answer": 4}, "4 choices and answer 4; expected four and 0 to 3"),
        ("wmdp", {**QUIZ[0], "choices": ["1", "2"]}, "2 choices and answer 0"),
        ("wmdp", {**QUIZ[0], "answer": "x"}, "invalid literal"),
    ],
)
def test_rows_of_another_shape_are_named(kind: str, record: dict[str, Any], why: str):
    with pytest.raises(TaskError, match=f"line 2: {why}"):
        adapt(kind, [SHAPES[kind][0], record], "forget")


def test_nothing_is_overwritten(tmp_path: Path):
    source = write_jsonl(tmp_path / "m.jsonl", MUSE)
    with pytest.raises(TaskError, match=r"m\.jsonl is there already\. Name another --out"):
        make_task(TaskConfig("muse", str(source), str(source), tmp_path / "m.json"))
    with pytest.raises(TaskError, match=r"with the ending \.json"):
        make_task(TaskConfig("muse", str(source), str(source), tmp_path / "x.txt"))
    with pytest.raises(TaskError, match="Unknown kind 'squad'; expected tofu, muse, wmdp, rows"):
        adapt("squad", MUSE, "forget")
