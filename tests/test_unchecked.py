"""Arguments of a wrong type meet the package's own errors where no annotation is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checked import wrong_type
from conftest import make_pairs, make_tiny

import mansu_interp as mansu
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.errors import MansuError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.task import Task

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
def test_wrong_types_are_told_by_the_package():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "wrong_type"],
        cwd=TESTS,
        env={**os.environ, "MANSU_UNCHECKED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


def circuit_of(model: LanguageModel) -> Circuit:
    graph = model.graph
    return Circuit(graph, graph.exists.astype("float32"), graph.exists)


PAIRS, MODEL = make_pairs((4, 5)), make_tiny()
SLIPS: dict[str, tuple[Callable[[LanguageModel, Task], object], str]] = {
    "one model for many": (
        lambda m, t: mansu.compare(circuit_of(MODEL), MODEL, MODEL, PAIRS),
        r'models: got a LanguageModel, expected a Mapping\. Did you mean \{"unlearned": model\}\?',
    ),
    "a model without its version": (
        mansu.evaluate,
        "models: got a LanguageModel, expected a Mapping",
    ),
    "a name for a version": (
        lambda m, t: mansu.evaluate({"original": m}, t),
        r"a key of models: got 'original', expected a ModelVersion\. Did you mean ModelVersion",
    ),
    "an unknown split": (
        lambda m, t: mansu.evaluate({mansu.ModelVersion("a"): m}, t, split="test"),
        "split: got 'test', expected dev or unseen",
    ),
    "a circuit for a mask": (
        lambda m, t: mansu.unlearn(m, t, circuit_of(m)),
        r"mask: got a Circuit, expected a Mask\. Did you mean circuit_mask\(circuit, model\)\?",
    ),
    "a task's name for a task": (
        lambda m, t: mansu.unlearn(m, "capitals"),
        r"task: got 'capitals', expected a Task\. Did you mean load_task\(name, model\)\?",
    ),
    "a list of pairs": (
        lambda m, t: mansu.attribute(MODEL, list(PAIRS)),
        r'pairs: got a list, expected a PairSet\. Did you mean PairSet\("mine", tuple\(pairs\)\)',
    ),
    "pairs as tuples": (
        lambda m, t: mansu.attribute(MODEL, (("a", "b"),)),
        "pairs: got a tuple, expected a PairSet",
    ),
    "a file for pairs": (
        lambda m, t: mansu.attribute(MODEL, Path("mine.jsonl")),
        r"pairs: got a PosixPath, .* Did you mean read_prompts\(path, model\)\?",
    ),
    "a file's name for pairs": (
        lambda m, t: mansu.discover(MODEL, "mine.jsonl"),
        r"forget: got 'mine.jsonl', .* Did you mean read_prompts\(path, model\), or load_task",
    ),
    "a task for pairs": (
        mansu.discover,
        r"forget: got a Task, expected a PairSet\. Did you mean task\.forget",
    ),
    "an unknown name for a model": (
        lambda m, t: mansu.discover("fact", t.forget),
        r"Unknown model 'fact'\. Shipped: ",
    ),
    "a task for a model": (
        lambda m, t: mansu.discover(t, t.forget),
        r"model: got a Task, expected a LanguageModel",
    ),
    "a dictionary for settings": (
        lambda m, t: mansu.attribute(MODEL, PAIRS, config={"ig_steps": 3}),
        r"config: got a dict, expected an AttributionConfig\. Did you mean AttributionConfig",
    ),
    "a circuit for its edges": (
        lambda m, t: mansu.circuit_metric(MODEL, PAIRS, circuit_of(MODEL)),
        r"edges: got a Circuit, expected an ndarray\. Did you mean circuit\.edges",
    ),
    "a circuit for its scores": (
        lambda m, t: mansu.faithfulness_curve(mansu.Ablation(MODEL, PAIRS), circuit_of(MODEL)),
        "scores: got a Circuit, expected an ndarray",
    ),
    "scores for a circuit": (
        lambda m, t: mansu.circuit_mask(mansu.attribute(MODEL, PAIRS), MODEL),
        "circuit: got an Attribution, expected a Circuit",
    ),
    "one set for many": (
        lambda m, t: mansu.circuit_mask(circuit_of(MODEL), MODEL, retain=PAIRS),
        r"retain: got a PairSet, expected a Sequence of PairSet\. Did you mean \[pairs\]",
    ),
    "attributions for scores": (
        lambda m, t: mansu.classify(mansu.attribute(MODEL, PAIRS), mansu.attribute(MODEL, PAIRS)),
        r"before: got an Attribution, expected an ndarray\. Did you mean its \.scores",
    ),
    "pairs for a task": (
        lambda m, t: mansu.relearn(m, t.forget),
        "task: got a PairSet, expected a Task",
    ),
    "a result for a model": (
        lambda m, t: mansu.judge_erasure(m, mansu.Unlearned(m, []), t),
        r"edited: got an Unlearned, expected a LanguageModel\. Did you mean its \.model\?",
    ),
    "a model's name to quantize": (
        lambda m, t: mansu.quantize("fact"),
        r"Unknown model 'fact'\. Shipped: ",
    ),
    "arguments exchanged": (
        lambda m, t: mansu.load_task(m, "capitals"),
        "name: got a LanguageModel, expected a str",
    ),
    "a loaded model to load": (
        lambda m, t: mansu.load_model(m),
        "name: got a LanguageModel, expected a str or a Path",
    ),
    "a model of transformers for its texts": (
        lambda m, t: mansu.load_task("capitals", m.hf),
        r"has no tokenizer, which texts need: give \(model, tokenizer\) in place of the model",
    ),
    "a tokenizer before its model": (
        lambda m, t: mansu.load_task("capitals", (m.tokenizer, m.hf)),
        "model: got a tuple, expected a LanguageModel",
    ),
    "scores to draw": (
        lambda m, t: mansu.circuit_view(mansu.attribute(MODEL, PAIRS)),
        "circuit: got an Attribution, expected a Circuit",
    ),
    "a task to draw on": (
        lambda m, t: mansu.attribution_view(mansu.attribute(MODEL, PAIRS), model=MODEL, pairs=t),
        r"pairs: got a Task, expected a Sequence of Pair\. Did you mean task\.forget",
    ),
    "a mask's path": (lambda m, t: mansu.unlearn(m, t, "m.safetensors"), "Did you mean Mask.load"),
    "settings of a run as words": (lambda m, t: mansu.run("capitals"), "expected a RunConfig"),
}


@wrong_type
@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_told_at_the_entrance(slip: str, facts: LanguageModel, capitals: Task):
    call, told = SLIPS[slip]
    with pytest.raises(MansuError, match=told):
        call(facts, capitals)
