"""Leaving edges out of a circuit while it stays faithful, by exact ablation.

A ranking judges each edge by itself, in the whole model. Once a circuit is there, an edge may be of
no use in it, or two that oppose each other may go together. The algorithm (ours; exact ablation of
single edges is that of ACDC, Conmy et al. 2023, arXiv 2304.14997, which goes through the edges
once, in one order):

1. Estimate what each edge of the circuit does there, by `Ablation.gradient` (one backward pass for
   all). Leave out the least useful quarter, eighth, ... at once, whichever is the most that stays
   at the target, and estimate again; until not even the smallest share can go.
2. Leave out every single edge in turn, exactly, all from the same circuit. Of those that can go,
   best first, drop all, or half, or a quarter, ... at once, whichever is the most that stays at the
   target; at least the one without which most of the metric is left. Until no single edge can go.
3. Go back to what was found with as many edges from outside, those that matter most to first order,
   and go on at 1: from there another circuit may be reached. The smaller of the two counts.
4. Leave out several at once, which only together can go: all edges of one writer or reader, pairs
   of edges, and pairs in exchange for one edge from outside. Tried are the pairs that cost least by
   themselves, and the edges that promise most by their gradient. If something can go, go on at 2.
5. Some times: add a random half of twice as many edges from outside, and go on at 1; what is then
   smaller goes through 4 as well.

What comes out is the smallest circuit *found*, of which no single edge can be left out. A smaller
one may exist; only trying all sets of edges could rule it out.

What the search may cost is a number of circuits, not a time: the same settings and seed give the
same circuit on a fast and on a slow machine. A search that ended for want of circuits to try says
so (`Removal.irreducible`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..ablation import Ablation, Edges

Edge = tuple[int, int]
"""Row of its writer, column of its reader."""
GRADIENT_COST = 4
"""Circuits that one gradient counts as: it takes as long as three alone, or eight in one pass."""
SHARES = (4, 8, 16, 32)
"""One edge in so many is left out at once."""
ADDED = 16
"""Edges outside the circuit that are tried in exchanges."""
EXCHANGES = 64
"""Pairs, and exchanges of one edge for a pair, that are tried each time."""
RESTARTS = 5
"""Times that edges are added to what was found, and the search goes on from there."""


@dataclass(frozen=True)
class Removal:
    """What is left of a circuit."""

    edges: Edges
    """The smallest circuit found."""
    faithfulness: float
    """Its own."""
    tried: int
    """Circuits that were ablated, a gradient counting as `GRADIENT_COST`."""
    irreducible: bool
    """Whether no single edge can be left out. False: the number of circuits was used up before that
    was known."""


def _listed(edges: Edges) -> list[Edge]:
    """Edges one by one."""
    return [(i, j) for i, j in np.argwhere(edges).tolist()]


class _Spent(Exception):
    """No more circuits may be tried."""


class _Search:
    """The circuit as it shrinks, and what is left of the circuits that may be tried."""

    def __init__(
        self,
        ablation: Ablation,
        edges: Edges,
        target: float,
        tries: int,
        note: Callable[[int, int], None],
    ) -> None:
        self.ablation, self.graph = ablation, ablation.graph
        self.full, self.empty = ablation.ends
        self.target, self.tries, self.note = target, tries, note
        self.tried = 0
        self.best: tuple[Edges, float] | None = None
        """The smallest circuit of which no single edge can go, and its faithfulness."""
        self.costs: dict[Edge, float] = {}
        """What is lost without each of its edges, in faithfulness."""
        self.go_to(edges)

    def go_to(self, edges: Edges) -> None:
        """Go on from another circuit."""
        self.value = self.try_all([edges])[0]
        self.edges = edges

    def spend(self, n: int) -> None:
        if self.tried + n > self.tries:
            raise _Spent
        self.tried += n
        self.note(self.tried, self.tries)

    def try_all(self, circuits: Sequence[Edges]) -> list[float]:
        """Faithfulness of some circuits."""
        self.spend(len(circuits))
        values = self.ablation.many(circuits)
        return [(v - self.empty) / (self.full - self.empty) for v in values]

    def useful(self) -> Float[np.ndarray, "writers readers"]:
        """What each edge adds to faithfulness here, to first order."""
        self.spend(GRADIENT_COST)
        return self.ablation.gradient(self.edges) / (self.full - self.empty)

    def without(self, *lost: Edge, start: Edges | None = None) -> Edges:
        """The circuit, or another start, less some edges, and less what is then on no path."""
        edges = (self.edges if start is None else start).copy()
        for edge in lost:
            edges[edge] = False
        return self.graph.prune(edges)

    def take(self, circuits: Sequence[Edges], values: Sequence[float]) -> bool:
        """Go on with the smallest of some circuits that reach the target, if one is smaller; of
        equals with the most faithful, then the first."""
        here = int(self.edges.sum())
        found = [
            (int(c.sum()), -v, k)
            for k, (c, v) in enumerate(zip(circuits, values, strict=True))
            if v >= self.target and c.sum() < here
        ]
        if not found:
            return False
        best = min(found)[2]
        self.edges, self.value = circuits[best], values[best]
        return True


def remove_edges(
    ablation: Ablation,
    edges: Edges,
    *,
    target: float,
    tries: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Removal:
    """Leave edges out of a circuit while its faithfulness stays at the target.

    Arguments:
        ablation: model, pairs, metric and kind of ablation.
        edges: a circuit that reaches the target.
        target: faithfulness, 0 for the empty circuit, 1 for the full one.
        tries: circuits that may be tried, at least 1.
        on_step: called with (circuits tried, tries).
    """
    search = _Search(ablation, edges, target, tries, on_step or (lambda *_: None))
    rng, seen = np.random.default_rng(0), None
    try:
        for start in range(RESTARTS + 1):
            if start:
                _widen(search, rng if start > 1 else None)
            while _remove_shares(search):
                pass
            _remove_singles(search)
            while start and search.best is not seen:
                seen = search.best
                if _remove_several(search):
                    _remove_singles(search)
    except _Spent:
        pass
    left, value = search.best or (search.edges, search.value)
    return Removal(left, value, search.tried, search.best is not None)


def _widen(search: _Search, rng: np.random.Generator | None) -> None:
    """Steps 3 and 5: go to the best circuit with as many of the outside edges that matter most to
    first order, or with a random half of twice as many."""
    assert search.best
    search.edges = edges = search.best[0]
    useful = np.where(search.graph.exists & ~edges, np.abs(search.useful()), 0.0)
    order, n = np.argsort(-useful, axis=None, kind="stable"), int(edges.sum())
    more = edges.copy()
    more.flat[order[:n] if rng is None else order[: 2 * n][rng.random(2 * n) < 0.5]] = True
    search.go_to(search.graph.prune(more & search.graph.exists))


def _remove_shares(search: _Search) -> bool:
    """Step 1: leave out a share of the edges, if one can go."""
    useful = search.useful()
    order = sorted(_listed(search.edges), key=lambda edge: float(useful[edge]))
    sizes = sorted({len(order) // share for share in SHARES} - {0})
    circuits = [search.without(*order[:n]) for n in sizes]
    return bool(circuits) and search.take(circuits, search.try_all(circuits))


def _remove_singles(search: _Search) -> None:
    """Step 2: leave out single edges until none can go, and keep what is left if it is smallest."""
    while True:
        lost = _listed(search.edges)
        start, circuits = search.edges, [search.without(e) for e in lost]
        values = search.try_all(circuits)
        able = sorted((-v, k) for k, v in enumerate(values) if v >= search.target)
        if not able:
            break
        best = able[0][1]
        search.edges, search.value = circuits[best], values[best]
        sizes = [n for k in range(len(able).bit_length()) if (n := len(able) >> k) > 1]
        together = [search.without(*(lost[k] for _, k in able[:n]), start=start) for n in sizes]
        search.take(together, search.try_all(together))
    if search.best is None or start.sum() < search.best[0].sum():
        search.best = start, search.value
        search.costs = {e: search.value - v for e, v in zip(lost, values, strict=True)}


def _remove_several(search: _Search) -> bool:
    """Step 4: leave out several edges of the best circuit that only together can go, also in
    exchange for one."""
    assert search.best
    (search.edges, search.value), costs = search.best, search.costs
    nodes = [search.without(*((i, j) for i, j in costs if i == w)) for w in {i for i, _ in costs}]
    nodes += [search.without(*((i, j) for i, j in costs if j == r)) for r in {j for _, j in costs}]
    cheap = sorted(costs, key=lambda edge: costs[edge])[:ADDED]
    pairs = sorted((costs[a] + costs[b], a, b) for n, a in enumerate(cheap) for b in cheap[:n])
    circuits = nodes + [search.without(a, b) for _, a, b in pairs[:EXCHANGES]]
    if search.take(circuits, search.try_all(circuits)):
        return True
    useful = np.where(search.graph.exists & ~search.edges, search.useful(), 0.0)
    wider = []
    for at in np.argsort(-useful, axis=None, kind="stable")[:ADDED].tolist():
        if useful[edge := divmod(at, useful.shape[1])] > 0:
            wider.append(search.edges.copy())
            wider[-1][edge] = True
    gains = [value - search.value for value in search.try_all(wider)]
    loss = sorted((cost - g, k, a, b) for k, g in enumerate(gains) for cost, a, b in pairs)
    circuits = [search.without(a, b, start=wider[k]) for _, k, a, b in loss[:EXCHANGES]]
    return search.take(circuits, search.try_all(circuits))
