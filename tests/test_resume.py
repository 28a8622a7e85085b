"""A killed loop goes on from its checkpoint, and determinism within a stated tolerance."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.discover import discover
from mansu_interp.errors import ArtifactError
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import circuit_mask, random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning import checkpoint
from mansu_interp.unlearning.history import StepRecord
from mansu_interp.unlearning.methods import Mansu, MethodConfig, get_method
from mansu_interp.unlearning.unlearn import unlearn

STEPS = Mansu(steps=5, lr=0.1, batch_size=8, adversarial_steps=1, probe_weight=0.5)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def mask(facts: LanguageModel) -> Mask:
    return random_mask(facts, 0.002)


@pytest.mark.parametrize("method", ["mansu", "mansu-no-floor", "npo", "sure", "task-vector"])
def test_a_killed_loop_ends_the_same(
    facts: LanguageModel,
    capitals: Task,
    mask: Mask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    config: MethodConfig = get_method(method)(steps=5, batch_size=8)
    if isinstance(config, Mansu):
        config = type(config)(**{**vars(STEPS), "survive": ("nf4", "fp4")})
        config = replace(config, quantization_margin=0.01)
    file, steps = tmp_path / "checkpoint.safetensors", []
    whole = unlearn(facts, capitals, mask, config)

    def die(done: int, *_: object) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        unlearn(facts, capitals, mask, config, on_step=die, resume=file)
    again = unlearn(
        facts, capitals, mask, config, on_step=lambda done, *_: steps.append(done), resume=file
    )
    assert steps[:2] == [4, 5]
    assert again.history == whole.history and again.stopped_at == 5
    for name, weight in whole.model.weights.items():
        assert torch.equal(weight, again.model.weights[name]), name
    with pytest.raises(ArtifactError, match="run of another model, task, mask, configuration or"):
        unlearn(facts, capitals, mask, config, seed=1, resume=file)


def test_a_record_is_json_and_back():
    record = StepRecord(0.5, 0.25, probe=1.5, edited=3)
    assert record.to_json() == {"forget": 0.5, "retain": 0.25, "probe": 1.5, "edited": 3}
    assert StepRecord.from_json(record.to_json()) == record
    assert math.isnan(StepRecord.from_json({"forget": None}).forget)
    with pytest.raises(ValueError, match="unknown 'attacked'"):
        StepRecord.from_json({"forget": 0.5, "attacked": 1.0})
    with pytest.raises(ValueError, match="no forget loss"):
        StepRecord.from_json({"retain": 0.5})


SCORES, OVERLAP, LOSSES = 1e-5, 0.999, 1e-5
"""Tolerance over batch sizes and thread counts: scores relative to the largest, share of a mask's
parameters, and losses relative to their size (docs/faults.md)."""


@pytest.mark.slow
def test_another_batch_size_stays_within_the_tolerance(facts: LanguageModel, capitals: Task):
    config = CircuitConfig(pairs=8, ig_steps=1, top=200, faithfulness_pairs=4)
    found = []
    for size in (2, 8, 2):
        circuit = discover(facts, capitals.forget, config=replace(config, batch_size=size))
        mask = circuit_mask(circuit, facts, budget=0.002, retain=[capitals.retain], n_pairs=8)
        result = unlearn(
            facts, capitals, mask, replace(STEPS, steps=1, adversarial_steps=0, probe_weight=0.0)
        )
        chosen = {(k, int(i)) for k, index in mask.indices.items() for i in index}
        found.append((circuit.scores, chosen, result.history[0]))
    (scores, chosen, losses), other, again = found
    assert 0 < abs(other[0] - scores).max() <= SCORES * abs(scores).max()
    assert len(other[1] & chosen) >= OVERLAP * len(chosen)
    for key, value in losses.to_json().items():
        assert other[2].to_json()[key] == pytest.approx(value, rel=LOSSES, abs=1e-7), key
    # The same batches: the same bytes.
    assert (again[0] == scores).all() and again[1:] == (chosen, losses)


def test_another_thread_count_stays_within_the_tolerance(facts: LanguageModel, capitals: Task):
    config = CircuitConfig(pairs=2, ig_steps=1)
    scores, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            scores.append(attribute(facts, capitals.forget.sample(2, 0), config=config).scores)
    finally:
        torch.set_num_threads(threads)
    assert abs(scores[1] - scores[0]).max() <= SCORES * abs(scores[0]).max()
