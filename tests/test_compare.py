"""Comparing attribution graphs: the numbers by hand, and a model against its own copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, replace

import numpy as np
import pytest

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.changes import CLASSES, MEANING, classify
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import REFERENCE, compare, divergence
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.faithfulness import strongest
from mansu_interp.circuits.search.meta import CircuitMeta
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


# What became of an edge: every class by hand, at its borders, and what is refused.

# before, after, quantized -> class, with threshold 0.1
CASES = [
    (1.0, 1.0, 1.0, "kept"),
    (1.0, 0.5, 0.0, "kept"),  # exactly half; what quantization does to a kept edge is no class
    (1.0, 3.0, 3.0, "kept"),
    (-1.0, -0.8, -0.8, "kept"),  # an opposing edge that still opposes
    (1.0, 0.0, 0.0, "silent"),
    (1.0, 0.2499, 0.2499, "silent"),
    (1.0, -0.2499, 0.0, "silent"),
    (1.0, 0.25, 0.25, "weakened"),  # exactly a quarter
    (1.0, 0.4999, 0.4999, "weakened"),
    (1.0, -1.0, -1.0, "weakened"),  # reversed: still flows, against the answer
    (-1.0, 0.6, 0.6, "weakened"),
    (1.0, 0.0, 0.5, "recovered"),
    (1.0, 0.4, 0.9, "recovered"),
    (1.0, -0.9, 1.0, "recovered"),
    (-1.0, 0.0, -0.5, "recovered"),
    (1.0, 0.0, -1.0, "silent"),  # the wrong sign brings nothing back
    (1.0, 0.0, 0.4999, "silent"),
    (0.0, 0.1, 0.0, "new"),
    (0.0999, 0.0, -0.1, "new"),
    (0.0, 0.0, 0.0, "quiet"),
    (0.0999, 0.0999, 0.0999, "quiet"),
    (0.1, 0.0, 0.0, "silent"),  # exactly at the threshold: present
]


@pytest.mark.parametrize(("before", "after", "quantized", "name"), CASES)
def test_each_class_by_hand(before: float, after: float, quantized: float, name: str):
    found = classify(np.array([before]), np.array([after]), np.array([quantized]), threshold=0.1)
    assert found.names().tolist() == [name]


def test_matrices_counts_and_default_threshold():
    b, a, q = (np.array([[row[k] for row in CASES]] * 2) for k in range(3))
    found = classify(b, a, q, threshold=0.1)
    assert found.codes.shape == b.shape
    wanted = {n: 2 * sum(row[3] == n for row in CASES) for n in CLASSES[1:6]}
    assert found.counts() == wanted and set(CLASSES[1:]) == set(MEANING)
    assert classify(np.array([2.0, -5.0]), np.zeros(2)).threshold == pytest.approx(0.05)


# after, relearned, never taught after the same -> class, of an edge that carried 1.0
RELEARNED = [
    (1.0, 0.0, 0.0, "kept"),
    (0.0, 0.5, 0.0, "suppressed"),
    (0.4999, 1.2, 0.0, "suppressed"),
    (0.0, 0.4999, 0.0, "erased"),
    (0.0, -1.0, 0.0, "erased"),
    (0.0, 0.6, 0.6, "erased"),  # no more than relearning brings about in any model
    (0.0, 0.6, 0.59, "suppressed"),
    (0.6, 0.0, 0.7, "erased"),
]


@pytest.mark.parametrize(("after", "relearned", "never_taught", "name"), RELEARNED)
def test_relearning_tells_suppressed_from_erased(
    after: float, relearned: float, never_taught: float, name: str
):
    found = classify(
        np.array([1.0, 0.0]),
        np.array([after, 0.0]),
        relearned=np.array([relearned, 9.0]),
        never_taught=np.array([never_taught, 0.0]),
        threshold=0.1,
    )
    assert found.names().tolist() == [name, "quiet"]  # relearning makes edges that are not new ones
    assert set(found.counts()) == set(CLASSES[1:]) - {"silent", "weakened"}


def test_without_a_quantized_model_nothing_is_recovered():
    b, a = np.array([1.0, 1.0]), np.array([0.0, 0.9])
    assert classify(b, a).names().tolist() == ["silent", "kept"]


def test_all_zero_and_zero_threshold_are_quiet():
    zero = np.zeros(3)
    assert classify(zero, zero, zero).names().tolist() == ["quiet"] * 3
    assert classify(zero, zero, threshold=0.0).counts()["new"] == 0


def test_a_common_scale_changes_nothing():
    rng = np.random.default_rng(0)
    b, a, q = rng.normal(size=(3, 200))
    assert (classify(b, a, q).codes == classify(7 * b, 7 * a, 7 * q).codes).all()
    assert (classify(b, a, q).codes == classify(-b, -a, -q).codes).all()


@pytest.mark.parametrize(
    ("after", "threshold", "message"),
    [
        (np.zeros(3), 0.1, r"must have one shape, \(2,\) as before; got \{'after': \(3,\)\}"),
        (np.array([0.0, np.nan]), 0.1, "not finite"),
        (np.zeros(2), -1.0, "must not be negative; got -1.0"),
    ],
)
def test_refused(after: np.ndarray, threshold: float, message: str):
    with pytest.raises(CircuitError, match=message):
        classify(np.zeros(2), after, threshold=threshold)
