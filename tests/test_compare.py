"""Comparing attribution graphs: the numbers by hand, and a model against its own copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, replace

import numpy as np
import pytest

from mansu_interp.circuits.attribution import Attribution, attribute
from mansu_interp.circuits.circuit import Circuit, CircuitMeta
from mansu_interp.circuits.compare import REFERENCE, compare, divergence
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.faithfulness import strongest
from mansu_interp.errors import CircuitError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet

TinyModel = Callable[[int], LanguageModel]
FEW = AttributionConfig(ig_steps=2)


def test_divergence_by_hand():
    before = np.array([[3.0, -4.0], [1.0, 0.0]])
    after = np.array([[0.0, -2.0], [0.5, -1.0]])
    edges = np.array([[True, True], [False, False]])
    found = divergence(before, after, edges)
    assert found.mass == pytest.approx(2 / 7)
    assert found.projected_share == pytest.approx(8 / 25)
    assert found.alignment == pytest.approx(8 / (5 * 2))
    assert found.outside == pytest.approx(1.5 / 8)
    assert math.isnan(found.metric)  # scores alone do not tell it
    assert astuple(divergence(before, before, edges))[:4] == pytest.approx((1, 1, 1, 1 / 8))
    reversed_ = divergence(before, -before, edges)
    assert (reversed_.projected_share, reversed_.alignment) == pytest.approx((-1, -1))
    assert astuple(divergence(before, 0 * after, edges))[:4] == (0, 0, 0, 0)
    with pytest.raises(CircuitError, match="no attribution on this circuit"):
        divergence(0 * before, after, edges)


def circuit_of(model: LanguageModel, pairs: PairSet) -> Circuit:
    scores = attribute(model, pairs, config=FEW).scores
    return Circuit(model.graph, scores, strongest(model.graph, scores, 60))


def test_a_copy_has_the_same_graph(tiny_model: TinyModel, pairs: PairSet):
    model, steps = tiny_model(2), []
    scores: dict[str, Attribution] = {}
    found = compare(
        circuit_of(model, pairs),
        model,
        {"copy": model.copy()},
        pairs,
        config=FEW,
        on_step=lambda name, done, total: steps.append((name, done, total)),
        on_scores=scores.__setitem__,
    )
    d = found.models["copy"]
    assert (d.mass, d.projected_share, d.alignment, d.metric) == pytest.approx((1, 1, 1, 1))
    assert steps == [("original", 5, 5), ("copy", 5, 5)]
    assert found.to_json() == {"models": {"copy": vars(d)}}
    assert list(scores) == ["original", "copy"]
    assert np.allclose(scores["copy"].scores, scores["original"].scores)


def test_a_silenced_output_scales_the_graph(tiny_model: TinyModel, pairs: PairSet):
    """A tenth of the unembedding gives a tenth of every score, along the same edges."""
    model, quiet = tiny_model(2), tiny_model(2).copy()
    quiet.weights["lm_head.weight"] *= 0.1
    models = {"quiet": quiet, "again": model}
    found = compare(circuit_of(model, pairs), model, models, pairs, config=FEW)
    d = found.models["quiet"]
    assert (d.mass, d.projected_share, d.alignment) == pytest.approx((0.1, 0.1, 1.0), abs=1e-3)
    assert d.metric == pytest.approx(0.1, abs=1e-3)
    assert found.models["again"].mass == pytest.approx(1)


def test_the_settings_of_the_discovery_are_the_default(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    circuit = circuit_of(model, pairs)
    settings = CircuitConfig(ig_steps=2, metric="kl")  # the metric is always logit_diff
    known = replace(circuit, meta=CircuitMeta(settings=settings))
    scores: list[np.ndarray] = []
    for one, config in ((known, None), (circuit, FEW)):
        compare(
            one,
            model,
            {"same": model},
            pairs,
            config=config,
            on_scores=lambda _, found: scores.append(found.scores),
        )
    assert np.array_equal(scores[0], scores[2])


def test_what_cannot_be_compared(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    circuit = circuit_of(model, pairs)
    with pytest.raises(CircuitError, match="at least one model besides the original"):
        compare(circuit, model, {}, pairs)
    with pytest.raises(CircuitError, match="other has another architecture than the circuit"):
        compare(circuit, model, {"other": tiny_model(4)}, pairs, config=FEW)


def test_the_reference_model_comes_last(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    found = compare(
        circuit_of(model, pairs), model, {"same": model}, pairs, config=FEW, reference=model
    )
    assert list(found.models) == ["same", REFERENCE]
    assert found.models[REFERENCE].mass == pytest.approx(1)
