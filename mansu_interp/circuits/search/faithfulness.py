"""Exact ablate-outside faithfulness, its curve and areas, and the fewest edges for a target.

Every edge outside the circuit carries its ablated value, every edge inside the value computed
in the ablated run itself. Each reader's residual input is rebuilt exactly, then normed and
projected per head, so nothing is approximated. Faithfulness is
(metric(circuit) - metric(empty)) / (metric(full) - metric(empty)): 0 for the empty circuit,
1 for the full one (the ratio of means over pairs, as in the MIB benchmark, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import CircuitError
from ...models.graph import Graph
from ...models.hooked import AnyModel, as_model
from ...tasks.pairs import Pair, PairSet
from ...utils.ranges import entrance
from ...utils.words import Shown
from ..ablation import Ablation, Edges
from ..metrics import Metric

if TYPE_CHECKING:
    import pandas

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which a curve is measured, as in the MIB benchmark."""


@entrance(CircuitError)
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


def check_ranking(graph: Graph, scores: Float[np.ndarray, "writers readers"]) -> None:
    """Raise CircuitError unless every edge has a score, and nothing else is ranked."""
    if np.shape(scores) != graph.exists.shape:
        raise CircuitError(
            f"scores: got shape {list(np.shape(scores))}, expected {list(graph.exists.shape)}, "
            "such as attribute(...).scores of this model."
        )
    if missing := int(np.isnan(scores[graph.exists]).sum()):
        raise CircuitError(
            f"scores: {missing:,} of {graph.n_edges:,} edges are NaN, so they have no rank. Patch "
            "all edges, or give numpy.nan_to_num(scores) to rank these last."
        )


def strongest(graph: Graph, scores: Float[np.ndarray, "writers readers"], n: int) -> Edges:
    """The ``n`` edges of largest absolute score, less what is not on an input -> logits path."""
    if not 1 <= n <= graph.n_edges:
        raise CircuitError(f"Asked for {n} edges; this graph has {graph.n_edges}, at least 1.")
    check_ranking(graph, scores)
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


@dataclass(frozen=True, repr=False)
class Curve(Shown):
    """Faithfulness against circuit size."""

    fractions: tuple[float, ...]
    """Shares of all edges that were asked for."""
    edges: tuple[int, ...]
    """Edges left of them after dropping what is on no input -> logits path."""
    faithfulness: tuple[float, ...]

    def told(self) -> dict[str, object]:
        """For its short form."""
        points = ", ".join(
            f"{n:,}: {f:.3f}" for n, f in zip(self.edges, self.faithfulness, strict=True)
        )
        return {"cpr": self.cpr, "cmd": self.cmd, "faithfulness by edges": points}

    @property
    def cpr(self) -> float:
        """Area under the curve over the share of edges (MIB's CPR; higher is better)."""
        return _area(self.fractions, np.array(self.faithfulness))

    @property
    def cmd(self) -> float:
        """Area between the curve and 1 (MIB's CMD; 0 is best)."""
        return _area(self.fractions, np.abs(1 - np.array(self.faithfulness)))


def completeness(ablation: Ablation, edges: Edges) -> float:
    """Faithfulness of all edges but a circuit's: what of the metric is left without the circuit.

    Completeness as in Marks et al. 2024 (arXiv 2403.19647), the faithfulness of the complement.
    Near 0 the circuit is necessary. Near 1 it is not missed, though it may be sufficient by itself:
    other paths back it up. May lie outside [0, 1].
    """
    return ablation.faithfulness(ablation.graph.exists & ~edges)


def random_completeness(ablation: Ablation, n: int, *, seed: int = 0, draws: int = 8) -> float:
    """Mean `completeness` of ``n`` edges drawn at random from all: the chance level.

    Arguments:
        ablation: model, pairs, metric and kind of ablation.
        n: edges in each draw.
        seed: of the draws.
        draws: how many.
    """
    exists, rng = ablation.graph.exists, np.random.default_rng(abs(seed))
    left = []
    for _ in range(draws):
        lost = rng.choice(np.flatnonzero(exists), n, replace=False)
        left.append(exists.copy())
        left[-1].flat[lost] = False
    full, empty = ablation.ends
    return float((np.mean(ablation.many(left)) - empty) / (full - empty))


def _area(x: Sequence[float], y: Float[np.ndarray, " n"]) -> float:
    """Trapezoid rule."""
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


@entrance(CircuitError)
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
        CircuitError: fractions out of order or range, or edges without a score.
    """
    graph, ends = ablation.graph, (*fractions[:1], *fractions[-1:])
    if not ends or list(fractions) != sorted(set(fractions)) or not 0 < ends[0] <= ends[-1] <= 1:
        raise CircuitError(f"Fractions must ascend within (0, 1]; got {tuple(fractions)}.")
    sizes, values = [], []
    for done, share in enumerate(fractions):
        edges = strongest(graph, scores, max(1, round(share * graph.n_edges)))
        sizes.append(int(edges.sum()))
        values.append(ablation.faithfulness(edges))
        if on_step:
            on_step(done + 1, len(fractions))
    return Curve(tuple(fractions), tuple(sizes), tuple(values))


@dataclass(frozen=True)
class Ablated:
    """What a model predicts when everything outside a circuit is ablated."""

    pairs: tuple[Pair, ...]
    """In the order of the rows below."""
    logits: Float[Tensor, "pairs vocab"]
    """At the last position, within the circuit alone."""
    values: Float[Tensor, " pairs"]
    """The metric of each pair within the circuit alone."""
    whole: Float[Tensor, " pairs"]
    """The same of the whole model."""
    predicted: tuple[str, ...]
    """Most likely next token within the circuit alone; its id where there is no tokenizer."""
    predicted_whole: tuple[str, ...]
    """The same of the whole model."""

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: prompt, answer, metrics and predictions of circuit and model."""
        import pandas

        return pandas.DataFrame(
            {
                "prompt": [p.prompt for p in self.pairs],
                "answer": [p.answer_text for p in self.pairs],
                "metric in circuit": self.values.tolist(),
                "metric in model": self.whole.tolist(),
                "predicted in circuit": self.predicted,
                "predicted in model": self.predicted_whole,
            }
        )

    def __repr__(self) -> str:
        inside, whole = float(self.values.mean()), float(self.whole.mean())
        return f"Ablated({len(self.pairs)} pairs; metric {inside:.3g} in the circuit, {whole:.3g})"

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False, float_format="{:.3f}".format)


@torch.no_grad()
def ablate(
    model: AnyModel,
    edges: Edges,
    pairs: PairSet,
    *,
    metric: Metric | str = "logit_diff",
    ablation: str = "corrupt",
    batch_size: int = 16,
) -> Ablated:
    """Run the clean prompts with every edge outside a circuit ablated; see `Circuit.ablate`."""
    found = Ablation(model, pairs, metric=metric, ablation=ablation, batch_size=batch_size)
    exists, tokenizer = found.graph.exists, getattr(as_model(model), "tokenizer", None)
    inside = [found.logits(base, edges) for base in found.bases]
    whole = [found.logits(base, exists) for base in found.bases]

    def values(logits: list[Tensor]) -> Tensor:
        each = zip(found.bases, logits, strict=True)
        return torch.cat([found.metric(x, b.batch, b.clean_logits) for b, x in each]).cpu()

    def tokens(logits: list[Tensor]) -> tuple[str, ...]:
        top = torch.cat(logits).argmax(-1).tolist()
        return tuple(tokenizer.decode([t]) if tokenizer is not None else str(t) for t in top)

    return Ablated(
        tuple(p for part in pairs.parts(batch_size) for p in part),
        logits=torch.cat(inside).cpu(),
        values=values(inside),
        whole=values(whole),
        predicted=tokens(inside),
        predicted_whole=tokens(whole),
    )
