"""CAD: the divergence by hand, every verdict, and a model against its own copy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import Divergence, compare, divergence, judge
from mansu_interp.circuits.config import AttributionConfig
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
    mass, projection, alignment, outside = divergence(before, after, edges)
    assert mass == pytest.approx(2 / 7)
    assert projection == pytest.approx(8 / 25)
    assert alignment == pytest.approx(8 / (5 * 2))
    assert outside == pytest.approx(1.5 / 8)
    assert divergence(before, before, edges) == pytest.approx((1, 1, 1, 1 / 8))
    assert divergence(before, -before, edges)[1:3] == pytest.approx((-1, -1))
    assert divergence(before, 0 * after, edges) == (0, 0, 0, 0)
    with pytest.raises(CircuitError, match="no attribution on this circuit"):
        divergence(0 * before, after, edges)


def of(projection: float, alignment: float, outside: float = 0.1) -> Divergence:
    return Divergence(0.2, projection, alignment, outside, 0.1)


@pytest.mark.parametrize(
    ("verdict", "edited", "quantized"),
    [
        ("unchanged", of(0.95, 0.99), None),
        ("suppressed", of(0.1, 0.8), None),
        ("suppressed", of(-0.3, -0.9), None),  # sign-flipped: the circuit still computes it
        ("erased", of(0.02, 0.1), None),
        ("erased", of(0.02, 0.1), of(0.05, 0.15)),
        ("relocated", of(0.02, 0.1, 0.9), None),
        ("recovered", of(0.02, 0.1), of(0.5, 0.9)),
        ("undecided", of(0.1, 0.35), None),
        ("undecided", of(0.3, 0.1), None),
    ],
)
def test_verdicts(verdict: str, edited: Divergence, quantized: Divergence | None):
    said, sentence = judge(edited, quantized)
    assert said == verdict
    assert sentence.endswith(".") and sentence[0].isupper()


def test_a_twin_that_looks_alike_vetoes_suppressed():
    edited = of(0.1, 0.8)
    assert judge(edited, None, of(0.02, 0.1))[0] == "suppressed"
    said, sentence = judge(edited, None, of(0.02, 0.6))
    assert said == "undecided"
    assert "never taught" in sentence


def circuit_of(model: LanguageModel, pairs: PairSet) -> Circuit:
    scores = attribute(model, pairs, FEW).scores
    return Circuit(model.graph, scores, strongest(model.graph, scores, 60))


def test_a_copy_is_unchanged(tiny_model: TinyModel, pairs: PairSet):
    model, seen = tiny_model(2), []
    cad = compare(
        circuit_of(model, pairs),
        model,
        {"copy": model.copy()},
        pairs,
        FEW,
        lambda name, done, total: seen.append((name, done, total)),
    )
    d = cad.models["copy"]
    assert cad.verdict == "unchanged"
    assert (d.mass, d.projection, d.alignment, d.metric) == pytest.approx((1, 1, 1, 1))
    assert seen == [("original", 5, 5), ("copy", 5, 5)]
    assert cad.to_json()["models"]["copy"]["projection"] == d.projection
    assert cad.to_json()["confidence"] is None


def test_a_silenced_output_scales_the_graph(tiny_model: TinyModel, pairs: PairSet):
    """A tenth of the unembedding gives a tenth of every score, along the same edges: suppressed."""
    model, quiet = tiny_model(2), tiny_model(2).copy()
    quiet.weights["lm_head.weight"] *= 0.1
    cad = compare(circuit_of(model, pairs), model, {"quiet": quiet, "again": model}, pairs, FEW)
    d = cad.models["quiet"]
    assert (d.mass, d.projection, d.alignment) == pytest.approx((0.1, 0.1, 1.0), abs=1e-3)
    assert cad.verdict == "recovered"  # the second model stands for the quantized one
    only = compare(circuit_of(model, pairs), model, {"quiet": quiet}, pairs, FEW)
    assert only.verdict == "suppressed"


def test_what_cannot_be_compared(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    circuit = circuit_of(model, pairs)
    with pytest.raises(CircuitError, match="at least one model besides the original"):
        compare(circuit, model, {}, pairs)
    with pytest.raises(CircuitError, match="other has another architecture than the circuit"):
        compare(circuit, model, {"other": tiny_model(4)}, pairs, FEW)


def test_the_reference_is_compared_but_not_judged(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    cad = compare(circuit_of(model, pairs), model, {"same": model}, pairs, FEW, reference=model)
    assert list(cad.models) == ["same", "never taught"]
    assert cad.verdict == "unchanged"
