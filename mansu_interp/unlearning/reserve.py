"""The reserve: after the last step, every quantized model comes to say less of the answers (ours).

What is fitted on the training's phrasings holds on others but for a scatter, to which rounding
adds: prompt by prompt answers go up and down, and every prompt that goes up reads as recovery. So
the quantized models are parted from full precision, by `parting`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..nullspace import gradient
from ..objectives import CounterfactualTargets, model_excess
from ..pairs import PairSet
from ..parting import Levers, chosen, levers
from .snapper import Latent, Snapper, taken

PAIRS = 480
"""Forget prompts, evenly over the phrasings, on which answers are measured."""
BATCH = 16
ROUNDS = 4
"""Each goes by what is lacking after the one before it, so that few prompts are left out."""
NEAR = 0.1
"""Share of the reserve that may be lacking at the end."""
DAMPING = 10.0
"""Medians of the retain Fisher below which it hardly counts in the choice of edits."""
POOL = 8
"""Elements looked at per edit that may be made; those of the steepest slope per cell."""


def part(
    snapper: Snapper,
    pairs: PairSet,
    targets: CounterfactualTargets,
    reserve: float,
    most: int,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Edit more weights of the mask, until in every quantized model the mean `excess` of the
    answers lies a reserve below full precision's, or as many are edited as may be.

    In each round a prompt counts by what it lacks of the reserve, on average over the quantized
    models, so that few are left out.

    Arguments:
        snapper: after its last `Snapper.write`; its models are changed in place.
        pairs: the prompts.
        targets: against which the excess is taken, for all models alike.
        reserve: nats.
        most: edits at most.
        on_round: called with the number of rounds done.

    Returns:
        ``apart``, the mean distance of the nearest quantized model (nats), and ``parting``, how
        many edits were made.
    """
    parts = list(pairs.parts(BATCH))

    @torch.no_grad()
    def apart() -> Float[Tensor, "quantized pairs"]:
        full, *others = (
            torch.cat([model_excess(m, p, targets) for p in parts]) for m in snapper.models
        )
        return full - torch.stack(others)

    made, distance = 0, apart()
    for left in range(ROUNDS, 0, -1):
        short = reserve - float(distance.mean(1).min())
        if short <= NEAR * reserve:
            break
        lacking = (reserve - distance).clamp_min(0).mean(0)
        weights = lacking / lacking.sum()
        losses = [
            lambda p=p, w=w: (w * model_excess(snapper.model, p, targets)).sum()
            for p, w in zip(parts, weights.split([len(p) for p in parts]), strict=True)
        ]
        slopes = gradient(snapper.model, snapper.names, losses)
        by_name = dict(zip(snapper.names, slopes, strict=True))
        made += _edit(snapper, by_name, short / left, (most - made) // left)
        distance = apart()
        if on_round:
            on_round(ROUNDS - left + 1)
    return {"apart": float(distance.mean(1).min()), "parting": float(made)}


@torch.no_grad()
def _edit(snapper: Snapper, slopes: dict[str, Tensor], wanted: float, most: int) -> int:
    """Edits that part the models by so many nats, first order; returns how many."""
    where: list[tuple[Latent, Tensor]] = []
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
        now = taken(snapper.model.weights, x.indices)
        now[i[k]] = value
        snapper.settle(x, now, now != x.original)
    return sum(len(k) for k, _ in found)
