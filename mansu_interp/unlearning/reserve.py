"""The reserve: after the last step, every quantized model comes to say less of the answers (ours).

What is fitted on the training's phrasings holds on others but for a scatter, to which rounding
adds: prompt by prompt answers go up and down, and every prompt that goes up reads as recovery. So
the quantized models are parted from full precision, by `parting`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..masks import DAMPING
from ..models import LanguageModel
from ..nullspace import gradient
from ..objectives import CounterfactualTargets, excess, log_probs
from ..pairs import Pair, PairSet
from ..parting import Levers, chosen, levers
from .snapper import Latent, Snapper, taken

PAIRS = 480
"""Forget prompts, evenly over the phrasings, on which answers are measured."""
BATCH = 16
ROUNDS = 3
"""Each sees how far the models lie apart after the one before it."""
NEAR = 0.9
"""Share of the reserve at which no further round is made."""
SHARE = 0.125
"""Of the budget: what training leaves over for this."""
POOL = 8
"""Elements looked at per edit that may be made; those of the steepest slope per cell."""


def part(
    snapper: Snapper, pairs: PairSet, targets: CounterfactualTargets, reserve: float, most: int
) -> dict[str, float]:
    """Edit more weights of the mask, until in every quantized model the mean `excess` of the
    answers lies a reserve below full precision's, or as many are edited as may be.

    Arguments:
        snapper: after its last `Snapper.write`; its models are changed in place.
        pairs: whose answers; `PAIRS` of them count.
        targets: against which the excess is taken, for all models alike.
        reserve: nats.
        most: edits at most.

    Returns:
        ``apart``, the least distance reached (nats), and ``parting``, how many edits it took.
    """
    parts = list(pairs.parts(BATCH))

    def mean_excess(model: LanguageModel, part: Sequence[Pair]) -> torch.Tensor:
        found = excess(log_probs(model, part), targets.log(part), part, targets.answers)
        return found.sum() / len(pairs)

    @torch.no_grad()
    def apart() -> float:
        full, *others = (float(sum(mean_excess(m, part) for part in parts)) for m in snapper.models)
        return full - max(others)

    made = 0
    for _ in range(ROUNDS):
        reached = apart()
        if reached >= NEAR * reserve or made >= most:
            break
        losses = [lambda p=p: mean_excess(snapper.model, p) for p in parts]
        slopes = dict(
            zip(snapper.names, gradient(snapper.model, snapper.names, losses), strict=True)
        )
        found = _edit(snapper, slopes, reserve - reached, most - made)
        made += found
        if not found:
            break
    return {"apart": apart(), "parting": float(made)}


@torch.no_grad()
def _edit(snapper: Snapper, slopes: dict[str, torch.Tensor], wanted: float, most: int) -> int:
    """Edits that part the models by so many nats, first order; returns how many."""
    where: list[tuple[Latent, torch.Tensor]] = []
    some: list[Levers] = []
    for x in snapper.latents:
        grids = [g for g in x.grids if g]
        if len(grids) < len(snapper.quantized):
            continue  # one of them would not part
        slope = taken(slopes, x.indices)
        free = taken(snapper.model.weights, x.indices) == x.original
        steep = torch.where(free, (slope * x.scale).abs(), -1.0)
        best = steep.topk(min(POOL * most, len(steep))).indices
        i = best[free[best]]
        kept = x.projection[i]  # lambda / (lambda + F)
        some.append(
            levers(
                x.floor[i],
                [g[i] for g in grids],
                [q[i] for q in x.quantized],
                x.original[i],
                slope[i],
                DAMPING * kept / (DAMPING * kept + 1 - kept),
            )
        )
        where.append((x, i))
    if not some:
        return 0
    found = chosen(some, wanted, most).chosen
    for (x, i), (k, value) in zip(where, found, strict=True):
        at = i[k]
        for model, grid in zip(snapper.models, (None, *x.grids), strict=True):
            now = taken(model.weights, x.indices)
            now[at] = grid[at].value(grid[at].encode(value)) if grid else value
            x.put(now, model)
    return sum(len(k) for k, _ in found)
