"""Exact ablate-outside faithfulness, its curve and areas, and the smallest circuit for a target.

Every edge outside the circuit carries its ablated value, every edge inside the value computed
in the ablated run itself. Each reader's residual input is rebuilt exactly, then normed and
projected per head, so nothing is approximated. Faithfulness is
(metric(circuit) - metric(empty)) / (metric(full) - metric(empty)): 0 for the empty circuit,
1 for the full one (the ratio of means over pairs, as in the MIB benchmark, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..errors import CircuitError
from ..models.graph import Graph
from ..models.hooked import AnyModel
from ..tasks.pairs import PairSet
from ..utils.ranges import expect_kind
from .ablation import Ablation, Edges
from .metrics import Metric

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which a curve is measured, as in the MIB benchmark."""


def circuit_metric(
    model: AnyModel,
    pairs: PairSet,
    edges: Edges,
    *,
    metric: Metric | str = "logit_diff",
    ablation: str = "corrupt",
    batch_size: int = 16,
) -> float:
    """Mean metric of a circuit with everything outside it ablated (see `Ablation`)."""
    return Ablation(model, pairs, metric=metric, ablation=ablation, batch_size=batch_size)(edges)


def strongest(graph: Graph, scores: Float[np.ndarray, "writers readers"], n: int) -> Edges:
    """The ``n`` edges of largest absolute score, less what is not on an input -> logits path."""
    if not 1 <= n <= graph.n_edges:
        raise CircuitError(f"Asked for {n} edges; this graph has {graph.n_edges}, at least 1.")
    size = np.where(graph.exists, np.abs(scores), -1.0).ravel()
    chosen = np.zeros(size.shape, dtype=bool)
    chosen[np.argsort(-size, kind="stable")[:n]] = True
    return graph.prune(chosen.reshape(scores.shape))


def minimal_edges(
    graph: Graph,
    scores: Float[np.ndarray, "writers readers"],
    faithfulness: Callable[[Edges], float],
    *,
    target: float = 0.85,
    tolerance: float = 0.05,
) -> tuple[Edges, list[tuple[int, float]]]:
    """The fewest top-scored edges whose faithfulness reaches ``target``, found by search.

    Doubles the number of edges until the target is reached, then bisects to within
    ``tolerance`` of the count. Faithfulness need not grow with every edge; the curve that was
    measured is returned.

    Arguments:
        graph: all edges of the model.
        scores: ranking of the edges, by absolute value.
        faithfulness: of a circuit; 0 for the empty one, 1 for the full one.
        target: in (0, 1].
        tolerance: share of the count to which it is searched.

    Returns:
        The circuit, and (edges asked for, faithfulness) of every evaluation, sorted.

    Raises:
        CircuitError: target not in (0, 1].
    """
    if not 0 < target <= 1:
        raise CircuitError(f"The faithfulness target must lie in (0, 1]; got {target}.")
    curve: dict[int, float] = {}

    def reaches(n: int) -> bool:
        curve[n] = faithfulness(strongest(graph, scores, n))
        return bool(curve[n] >= target)

    low, high = 0, min(graph.n_edges, max(16, graph.n_edges // 256))
    while not reaches(high) and high < graph.n_edges:
        low, high = high, min(graph.n_edges, high * 2)
    while high - low > max(1, tolerance * high):
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    return strongest(graph, scores, high), sorted(curve.items())


@dataclass(frozen=True)
class Curve:
    """Faithfulness against circuit size."""

    fractions: tuple[float, ...]
    """Shares of all edges that were asked for."""
    edges: tuple[int, ...]
    """Edges left of them after dropping what is on no input -> logits path."""
    faithfulness: tuple[float, ...]

    @property
    def cpr(self) -> float:
        """Area under the curve over the share of edges (MIB's CPR; higher is better)."""
        return _area(self.fractions, np.array(self.faithfulness))

    @property
    def cmd(self) -> float:
        """Area between the curve and 1 (MIB's CMD; 0 is best)."""
        return _area(self.fractions, np.abs(1 - np.array(self.faithfulness)))


def _area(x: Sequence[float], y: Float[np.ndarray, " n"]) -> float:
    """Trapezoid rule."""
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def faithfulness_curve(
    ablation: Ablation,
    scores: Float[np.ndarray, "writers readers"],
    *,
    fractions: Sequence[float] = FRACTIONS,
    on_step: Callable[[int, int], None] | None = None,
) -> Curve:
    """Faithfulness of the top-scored edges at several shares of all edges.

    Arguments:
        ablation: model, pairs, metric and kind of ablation.
        scores: ranking of the edges, by absolute value.
        fractions: ascending shares in (0, 1].
        on_step: called with (circuits done, circuits in all).

    Raises:
        CircuitError: fractions out of order or range.
    """
    expect_kind(CircuitError, "ablation", ablation, Ablation)
    expect_kind(CircuitError, "scores", scores, np.ndarray)
    graph = ablation.graph
    if list(fractions) != sorted(set(fractions)) or not 0 < fractions[0] <= fractions[-1] <= 1:
        raise CircuitError(f"Fractions must ascend within (0, 1]; got {tuple(fractions)}.")
    sizes, values = [], []
    for done, share in enumerate(fractions):
        edges = strongest(graph, scores, max(1, round(share * graph.n_edges)))
        sizes.append(int(edges.sum()))
        values.append(ablation.faithfulness(edges))
        if on_step:
            on_step(done + 1, len(fractions))
    return Curve(tuple(fractions), tuple(sizes), tuple(values))
