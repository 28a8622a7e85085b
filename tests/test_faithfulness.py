"""Ablate-outside faithfulness: its two ends, the oracle, and the search for a small circuit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import reference
import torch

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.faithfulness import (
    Curve,
    circuit_metric,
    faithfulness_curve,
    minimal_edges,
    strongest,
)
from mansu_interp.circuits.metrics import logit_diff
from mansu_interp.errors import CircuitError
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet

TinyModel = Callable[[int], LanguageModel]
KV = pytest.mark.parametrize("kv_heads", [4, 2])


@KV
def test_full_circuit_is_the_clean_run_and_empty_the_corrupt_run(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    graph = model.graph
    ablation = Ablation(model, pairs, batch_size=3)
    assert sum(len(base.batch) for base in ablation.bases) == len(pairs)
    for base in ablation.bases:
        batch = base.batch
        clean = model.last_logits(batch.clean, batch.last)
        corrupt = model.last_logits(batch.corrupt, batch.last)
        assert (clean - corrupt).abs().max() > 0.1
        full = ablation.logits(base, graph.exists)
        empty = ablation.logits(base, np.zeros_like(graph.exists))
        assert torch.allclose(full, clean, atol=1e-4)
        assert torch.allclose(empty, corrupt, atol=1e-4)


def test_a_random_circuit_agrees_with_transformer_lens(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    rng = np.random.default_rng(1)
    edges = model.graph.prune((rng.random(model.graph.exists.shape) < 0.4) & model.graph.exists)
    assert 20 < edges.sum() < 0.6 * model.graph.n_edges
    values = []
    for pair in pairs.pairs[:3]:
        recovered, clean, corrupt = oracle.recovered(model, pair, edges)
        values.append(corrupt + recovered * (clean - corrupt))
        one = circuit_metric(model, PairSet("one", (pair,)), edges)
        assert one == pytest.approx(values[-1], abs=1e-4)
        assert abs(recovered - 1) > 0.01  # the circuit is not trivial
    several = circuit_metric(model, PairSet("three", pairs.pairs[:3]), edges, batch_size=2)
    assert several == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_random_circuits_agree_with_the_definition_written_out(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    rng = np.random.default_rng(2)
    for density in (0.2, 0.6, 0.95):
        edges = (rng.random(model.graph.exists.shape) < density) & model.graph.exists
        expected = [reference.ablated(model, p, edges) for p in pairs]
        found = circuit_metric(model, pairs, edges, batch_size=3)
        assert found == pytest.approx(np.mean(expected), abs=1e-4)


def test_single_edges_patched_agree_with_the_definition_written_out(
    tiny_model: TinyModel, pairs: PairSet
):
    model, one = tiny_model(2), PairSet("one", pairs.pairs[2:3])
    ablation = Ablation(model, one)
    whole = ablation(model.graph.exists)
    effects = []
    for i, j in np.argwhere(model.graph.exists)[::7]:
        edges = model.graph.exists.copy()
        edges[i, j] = False
        expected = reference.ablated(model, one.pairs[0], edges)
        assert ablation(edges) == pytest.approx(expected, abs=1e-4)
        effects.append(abs(expected - whole))
    assert max(effects) > 0.05


def test_a_metric_that_explains_nothing_is_refused(tiny_model: TinyModel, pairs: PairSet):
    ablation = Ablation(tiny_model(2), pairs, metric=lambda logits, b, c: logits[:, 0] * 0 + 3)
    with pytest.raises(CircuitError, match="3 with the full circuit and 3 with none"):
        ablation.faithfulness(ablation.graph.exists)
    with pytest.raises(CircuitError, match="Unknown ablation 'noise'; expected one of corrupt"):
        Ablation(tiny_model(2), pairs, ablation="noise")


def test_the_curve_and_its_areas(tiny_model: TinyModel, pairs: PairSet):
    curve = Curve((0.0, 0.5, 1.0), (0, 5, 10), (0.0, 1.2, 1.0))
    assert curve.cpr == pytest.approx(0.25 * 1.2 + 0.25 * 2.2)
    assert curve.cmd == pytest.approx(0.25 * (1 + 0.2) + 0.25 * 0.2)
    ablation = Ablation(tiny_model(2), pairs)
    scores = attribute(tiny_model(2), pairs).scores
    done: list[tuple[int, int]] = []
    found = faithfulness_curve(
        ablation, scores, fractions=(0.1, 1.0), on_step=lambda *x: done.append(x)
    )
    assert found.faithfulness[1] == pytest.approx(1.0, abs=1e-4)
    n = round(0.1 * ablation.graph.n_edges)
    assert found.faithfulness[0] == ablation.faithfulness(strongest(ablation.graph, scores, n))
    assert found.edges == (strongest(ablation.graph, scores, n).sum(), ablation.graph.n_edges)
    assert done == [(1, 2), (2, 2)]
    for wrong in ((0.5, 0.1), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(CircuitError, match="must ascend within"):
            faithfulness_curve(ablation, scores, fractions=wrong)


def test_a_dangling_edge_changes_nothing(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    edges = strongest(model.graph, attribute(model, pairs).scores, 60)
    more = edges.copy()
    more[model.graph.edge("input", "m1")] = True
    more[model.graph.writer_index["m1"]] = False  # m1 is fed but never read
    without = more.copy()
    without[model.graph.edge("input", "m1")] = False
    assert circuit_metric(model, pairs, more) == pytest.approx(
        circuit_metric(model, pairs, without), abs=1e-5
    )
    assert not model.graph.prune(more)[model.graph.edge("input", "m1")]


def test_metric_by_name_or_function(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    a = circuit_metric(model, pairs, model.graph.exists)
    b = circuit_metric(model, pairs, model.graph.exists, metric=logit_diff, batch_size=1)
    clean = attribute(model, pairs, config=AttributionConfig(method="eap")).clean
    assert a == pytest.approx(clean, abs=1e-4)
    assert b == pytest.approx(clean, abs=1e-4)


GRAPH = Graph(Architecture(3, 4, 4))


def ranked(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(GRAPH.exists.shape) * GRAPH.exists


def test_strongest_takes_the_largest_and_prunes():
    scores = np.zeros(GRAPH.exists.shape)
    for edge, score in {
        ("input", "m0"): 1.0,
        ("m0", "logits"): -3.0,
        ("a0.h0", "logits"): 2.0,  # nothing feeds this head
        ("input", "logits"): 0.5,
    }.items():
        scores[GRAPH.edge(*edge)] = score
    kept = strongest(GRAPH, scores, 3)
    assert {tuple(e) for e in np.argwhere(kept)} == {
        GRAPH.edge("input", "m0"),
        GRAPH.edge("m0", "logits"),
    }
    assert strongest(GRAPH, scores, GRAPH.n_edges).sum() == GRAPH.n_edges
    for n in (0, GRAPH.n_edges + 1):
        with pytest.raises(CircuitError, match=f"Asked for {n} edges; this graph has"):
            strongest(GRAPH, scores, n)


@pytest.mark.parametrize("needed", [1, 7, 40, 131, GRAPH.n_edges])
def test_minimal_edges_finds_the_count_it_takes(needed: int):
    """Faithfulness grows with the number of the ``needed`` strongest edges in the circuit."""
    scores = np.abs(ranked()) + GRAPH.exists * 1.0
    scores[GRAPH.edge("input", "logits")] = 100.0  # so that a single edge is a path
    order = np.sort(scores[GRAPH.exists])[::-1]
    important = (scores >= order[needed - 1]) & GRAPH.exists
    whole = GRAPH.prune(important).sum()

    def faithfulness(edges: np.ndarray) -> float:
        return float((edges & important).sum() / whole)

    edges, curve = minimal_edges(GRAPH, scores, faithfulness, target=1.0, tolerance=0.0)
    assert faithfulness(edges) >= 1.0
    counts = [n for n, _ in curve]
    assert counts == sorted(set(counts))
    # The fewest: it reaches the target, and the count just below, which was tried, does not.
    asked = min(n for n, f in curve if f >= 1.0)
    assert asked <= needed
    assert (edges == strongest(GRAPH, scores, asked)).all()
    assert asked == 1 or faithfulness(strongest(GRAPH, scores, asked - 1)) < 1.0
    assert dict(curve)[asked] == faithfulness(edges)


def test_minimal_edges_stops_within_the_tolerance():
    scores = np.abs(ranked(1)) + GRAPH.exists * 1.0

    def measure(target: float, tolerance: float) -> tuple[int, int]:
        tries: list[int] = []

        def faithfulness(edges: np.ndarray) -> float:
            tries.append(int(edges.sum()))
            return edges.sum() / GRAPH.n_edges

        edges, _ = minimal_edges(GRAPH, scores, faithfulness, target=target, tolerance=tolerance)
        return int(edges.sum()), len(tries)

    exact, loose = measure(0.5, 0.0), measure(0.5, 0.2)
    assert loose[1] < exact[1]
    assert exact[0] <= loose[0] <= 1.3 * exact[0]


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01])
def test_target_out_of_range(target: float):
    with pytest.raises(CircuitError, match=r"must lie in \(0, 1\]; got"):
        minimal_edges(GRAPH, ranked(), lambda e: 1.0, target=target)
