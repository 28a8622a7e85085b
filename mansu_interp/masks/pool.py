"""The pool of candidates: the best by gain per damage, while one weight after another is looked at,
and the damage by which gains are damped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..losses.gradients import WeightMap
from ..models.language_model import LanguageModel
from ..quantizers.base import Quantizer
from .floor import floor_step

SAMPLE = 2**20
"""Parameters by which the typical damage is told."""
Regions = dict[str, Bool[Tensor, "_out _in"]]
"""True for the candidates of each weight."""


class Pool:
    """The best candidates so far, of equal ones the first: at most ``n``."""

    def __init__(self, n: int) -> None:
        self.n, self.names = n, list[str]()
        self.score, self.weight, self.index = torch.empty(0), torch.empty(0), torch.empty(0)

    def add(self, name: str, score: Float[Tensor, " some"], index: Int[Tensor, " some"]) -> None:
        """Look at some candidates of one more weight, at flat positions in it, ascending."""
        of = torch.full_like(index, len(self.names))
        if self.names:
            score = torch.cat([self.score, score])
            of, index = torch.cat([self.weight, of]), torch.cat([self.index, index])
        self.names.append(name)
        if len(score) > self.n:
            last = score.kthvalue(len(score) - self.n + 1).values
            chosen = score > last
            ties = (score == last).nonzero()[:, 0]
            chosen[ties[: self.n - int(chosen.sum())]] = True
            score, of, index = score[chosen], of[chosen], index[chosen]
        self.score, self.weight, self.index = score, of, index

    def indices(self) -> dict[str, Int[Tensor, " _n"]]:
        """Their positions, by weight."""
        found = {n: self.index[self.weight == k].cpu() for k, n in enumerate(self.names)}
        return {n: index for n, index in found.items() if len(index)}


def sampled_rows(regions: Regions) -> dict[str, Int[Tensor, " _rows"]]:
    """The rows of each weight by which the typical damage is told: all of regions of at most
    `SAMPLE` parameters, and of larger ones as many as hold about that."""
    share = SAMPLE / max(1, sum(int(inside.sum()) for inside in regions.values()))
    draws = torch.Generator().manual_seed(0)
    return {
        name: torch.randperm(len(inside), generator=draws)[: max(1, round(share * len(inside)))]
        .sort()
        .values.to(inside.device)
        for name, inside in regions.items()
    }


def positions(rows: Int[Tensor, " rows"], width: int) -> Int[Tensor, " rows*{width}"]:
    """Flat positions of the elements of some rows."""
    return (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()


def typical_damage_of(
    model: LanguageModel,
    regions: Regions,
    quantizers: Sequence[Quantizer],
    rows: Mapping[str, Int[Tensor, " _rows"]],
    gradients: WeightMap,
    fishers: WeightMap,
) -> float:
    """The median damage (nats) of the floor's step, of all that can take it in some rows.

    Arguments:
        model: the model to edit.
        regions: which parameters are candidates.
        quantizers: whose cells define the step. Where a group spans rows, it is cut as if the rows
            were all that there is.
        rows: of each weight.
        gradients: forget gradient of the elements of those rows.
        fishers: their diagonal Fisher.
    """
    damages = []
    for name, chosen in rows.items():
        weight = model.weights[name][chosen]
        g, fisher = (x[name].view_as(weight) for x in (gradients, fishers))
        d = floor_step(weight, g, quantizers, model.saved_dtype)
        some = regions[name][chosen] & (d != 0)
        damages.append(0.5 * fisher[some] * d[some] * d[some])
    every = torch.cat(damages)
    return float(every.median().clamp_min(1e-30)) if len(every) else 0.0
