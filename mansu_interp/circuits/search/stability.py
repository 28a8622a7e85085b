"""Is a circuit stable: its scores and edges when other facts and phrasings had been drawn.

1. Draw with replacement as many facts as there are and, where a fact is asked in several phrasings,
   as many phrasings; a pair weighs the product of how often its fact and its phrasing were drawn
   (`Resamples`). Pairs of one fact, or of one phrasing, are not independent, so they are drawn
   together: the bootstrap of crossed factors (Owen 2007, "The pigeonhole bootstrap"), which errs on
   the wide side; with one phrasing it is the ordinary bootstrap over facts (Efron 1979).
2. Attribution runs once. The weights are known beforehand, so each batch's scores are added to the
   sums of every resample as they come: memory is resamples x edges.
3. Choose a circuit from each resample, as many of the strongest edges as it takes for one of the
   size of the whole one, pruned, and compare the two (`measure_stability`).

What varies is the sample of pairs alone, not the model, the metric or the size of the circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import CircuitError
from ...tasks.pairs import Pair
from ...utils.distributed import sum_over_processes
from ...utils.files import Json
from ...utils.words import Shown
from ..scores import MAX_SCORE

INTERVAL = (2.5, 97.5)
"""Percentiles of the resamples between which an edge's interval lies."""
TRIES = 100
"""Draws in a row that may miss every pair before the pairs are refused."""


class Resamples:
    """Bootstrap means of edge scores, added up batch by batch (`attribute`'s ``on_pairs``).

    Arguments:
        pairs: all that will come.
        n: resamples.
        seed: of the draws.

    Raises:
        CircuitError: fewer than two facts, or fewer than two resamples.
    """

    def __init__(self, pairs: Sequence[Pair], n: int, seed: int) -> None:
        facts = list(dict.fromkeys(p.fact for p in pairs))
        phrasings = list(dict.fromkeys(_phrasing(p) for p in pairs))
        if n < 2 or len(facts) < 2:
            raise CircuitError(
                f"Resampling needs at least two resamples and two facts; got {n} and {len(facts)}."
            )
        self.n = n
        self.drawn = "facts"
        """What is drawn with replacement."""
        if len(phrasings) > 1 and len({(p.fact, _phrasing(p)) for p in pairs}) > len(facts):
            self.drawn = "facts and phrasings"
        draws = np.random.default_rng(abs(seed))
        keys = [(p.fact, _phrasing(p)) for p in pairs]
        row, column = ({x: k for k, x in enumerate(names)} for names in (facts, phrasings))
        rows = np.array([row[fact] for fact, _ in keys])
        columns = np.array([column[phrasing] for _, phrasing in keys])
        found = np.stack([self._draw(draws, rows, columns) for _ in range(n)])
        self._weights = dict(zip(keys, found.T, strict=True))
        self._sums: Float[Tensor, "n writers readers"] | None = None

    def _draw(
        self,
        draws: np.random.Generator,
        rows: np.ndarray,
        columns: np.ndarray,
    ) -> Float[np.ndarray, " pairs"]:
        """Weights of the pairs in one resample; they add up to 1."""

        def times(numbers: np.ndarray) -> np.ndarray:
            many = int(numbers.max()) + 1
            return np.bincount(draws.integers(0, many, many), minlength=many)[numbers]

        for _ in range(TRIES):
            weight = times(rows).astype(float)
            if self.drawn != "facts":
                weight *= times(columns)
            if weight.any():
                return weight / weight.sum()
        raise CircuitError(
            "Facts and phrasings drawn with replacement hardly ever meet in a pair: every fact is "
            "asked in other phrasings. Give pairs that ask several facts in the same phrasings."
        )

    def weights(self, pairs: Sequence[Pair]) -> Float[np.ndarray, "resamples pairs"]:
        """Weight of each pair in each resample; over all pairs they add up to 1."""
        return np.stack([self._weights[p.fact, _phrasing(p)] for p in pairs], axis=1)

    def __call__(
        self, pairs: Sequence[Pair], scores: Float[Tensor, "batch writers readers"]
    ) -> None:
        """Add the scores of some pairs, in metric units."""
        if self._sums is None:
            self._sums = torch.zeros(self.n, *scores.shape[1:], device=scores.device)
        weights = torch.from_numpy(self.weights(pairs)).to(scores)
        self._sums.flatten(1).addmm_(weights, scores.flatten(1))

    def means(self) -> Float[np.ndarray, "resamples writers readers"]:
        """Mean scores of each resample, in metric units, once all pairs have come.

        Raises:
            CircuitError: none has.
        """
        if self._sums is None:
            raise CircuitError("No pair was scored, so there is nothing to resample.")
        sums, self._sums = sum_over_processes(self._sums).cpu().numpy(), None
        return sums


def _phrasing(pair: Pair) -> tuple[str, str]:
    """Phrasings belong to a relation."""
    return pair.relation, pair.phrasing


@dataclass(frozen=True, repr=False)
class Stability(Shown):
    """How a circuit holds under resampling. Of one read from a file, arrays have the circuit's own
    edges alone, and 0 elsewhere."""

    resamples: int
    """How many."""
    drawn: str
    """What was drawn with replacement: ``facts``, or ``facts and phrasings``."""
    low: Float[np.ndarray, "writers readers"]
    """2.5th percentile of an edge's score over the resamples, in metric units."""
    high: Float[np.ndarray, "writers readers"]
    """97.5th percentile."""
    frequency: Float[np.ndarray, "writers readers"]
    """Share of the resamples whose circuit has the edge, 0 to 1."""
    same_sign: Float[np.ndarray, "writers readers"]
    """Share of the resamples in which the score has its sign, 0 to 1."""
    jaccard: float
    """Edges that a resample's circuit shares with the whole one, over those of either: the mean
    over resamples, 0 to 1."""
    chance: float
    """The same of random sets of edges as large."""
    rank_correlation: float
    """Spearman's correlation of all edges' scores with the whole ones, the mean over resamples."""

    EDGE: ClassVar = ("low", "high", "frequency", "same_sign")
    """Names of what each edge has."""
    WHOLE: ClassVar = {
        "resamples": int,
        "drawn": str,
        "jaccard": float,
        "chance": float,
        "rank_correlation": float,
    }
    """Names of what the circuit has as a whole, and what is checked of a file."""

    @property
    def over(self) -> str:
        """How many resamples of what."""
        return f"{self.resamples:,} resamples of {self.drawn}"

    @property
    def sentence(self) -> str:
        """The whole in one line."""
        return (
            f"stability over {self.over}: Jaccard "
            f"{self.jaccard:.2f} (chance {self.chance:.2f}), rank correlation "
            f"{self.rank_correlation:.2f}"
        )

    def of_edge(self, i: int, j: int) -> dict[str, float]:
        """What an edge, by row and column, has."""
        return {name: float(f"{getattr(self, name)[i, j]:.6g}") for name in self.EDGE}

    def told(self) -> dict[str, Json]:
        """What the circuit has as a whole, as JSON values."""
        return {name: getattr(self, name) for name in self.WHOLE}

    @classmethod
    def from_json(
        cls,
        whole: Mapping[str, Json],
        edges: Mapping[tuple[int, int], Mapping[str, Json]],
        shape: tuple[int, int],
    ) -> Stability:
        """What `told` and `of_edge` gave, checked by the reader of the file.

        Raises:
            ValueError: an edge without its numbers, or a share that is none.
        """
        low, high, frequency, same_sign = (np.zeros(shape, dtype=np.float32) for _ in cls.EDGE)
        arrays = dict(zip(cls.EDGE, (low, high, frequency, same_sign), strict=True))
        for at, values in edges.items():
            for name, array in arrays.items():
                if name not in values:
                    raise ValueError(f"an edge has no {name}, and the circuit has a stability")
                if name in ("frequency", "same_sign") and not 0 <= values[name] <= 1:
                    raise ValueError(f"{name} is {values[name]}, not a share from 0 to 1")
                if abs(values[name]) > MAX_SCORE:
                    raise ValueError(f"{name} is {values[name]:g}, which is no float32")
                array[at] = values[name]
        known = {name: whole[name] for name in cls.WHOLE}
        for name, least in (("jaccard", 0), ("chance", 0), ("rank_correlation", -1)):
            if not least <= known[name] <= 1:
                raise ValueError(f"{name} is {known[name]}, not from {least} to 1")
        if known["resamples"] < 1:
            raise ValueError(f"it has {known['resamples']} resamples")
        return cls(low=low, high=high, frequency=frequency, same_sign=same_sign, **known)


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 0, ascending; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[where]


def _correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Pearson's; of what does not vary, 0."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0


def measure_stability(
    scores: Float[np.ndarray, "writers readers"],
    resampled: Float[np.ndarray, "resamples writers readers"],
    rankings: Iterable[Float[np.ndarray, "writers readers"]],
    circuit: Bool[np.ndarray, "writers readers"],
    exists: Bool[np.ndarray, "writers readers"],
    choose: Callable[[np.ndarray], Bool[np.ndarray, "writers readers"]],
    drawn: str,
) -> Stability:
    """How scores and circuits of resamples agree with the whole ones.

    Arguments:
        scores: of all pairs, in metric units.
        resampled: the same of each resample.
        rankings: of each resample, by whose absolute values edges are chosen.
        circuit: with which the circuits of resamples are compared.
        exists: the graph's edges.
        choose: the edges that a ranking gives.
        drawn: what was drawn with replacement, in words.
    """
    whole, n, jaccard, chance = ranks(scores[exists]), int(exists.sum()), [], []
    frequency, correlation = np.zeros(scores.shape), []
    for own, ranking in zip(resampled, rankings, strict=True):
        edges = choose(ranking)
        frequency += edges
        both, sizes = int((edges & circuit).sum()), int(edges.sum() + circuit.sum())
        jaccard.append(both / (sizes - both) if sizes else 1.0)
        expected = int(edges.sum()) * int(circuit.sum()) / n  # of two random sets
        chance.append(expected / (sizes - expected) if sizes else 1.0)
        correlation.append(_correlation(ranks(own[exists]), whole))
    low, high = np.percentile(resampled, INTERVAL, axis=0)
    return Stability(
        resamples=len(resampled),
        drawn=drawn,
        low=low.astype(np.float32),
        high=high.astype(np.float32),
        frequency=(frequency / len(resampled)).astype(np.float32),
        same_sign=(np.sign(resampled) == np.sign(scores)).mean(0).astype(np.float32),
        jaccard=float(np.mean(jaccard)),
        chance=float(np.mean(chance)),
        rank_correlation=float(np.mean(correlation)),
    )
