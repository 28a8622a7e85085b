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

from ..models import LanguageModel
from ..nullspace import Weights, gradient
from ..objectives import CounterfactualTargets, above_rivals, log_probs, model_excess
from ..pairs import Pair, PairSet, answer_tokens
from ..parting import chosen, levers
from .snapper import Snapper, taken

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
"""Elements of a weight looked at per edit that may be made; those of the steepest slope per
cell."""
Level = Callable[[LanguageModel, list[Pair]], Float[Tensor, " batch"]]
"""How high the answers of some pairs stand in a model (nats)."""


def part(
    snapper: Snapper,
    pairs: PairSet,
    targets: CounterfactualTargets,
    kept: PairSet,
    reserve: float,
    most: int,
    on_round: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Edit more weights of the mask, until in every quantized model the mean `excess` of the
    answers lies a reserve below full precision's, or as many are edited as may be.

    In each round a prompt counts by what the quantized model that lacks most lacks of the reserve,
    so that few are left out. What the edits do to retained answers is no more than in full
    precision, on average over prompts and quantized models.

    Arguments:
        snapper: after its last `Snapper.write`; its models are changed in place.
        pairs: the prompts.
        targets: against which the excess is taken, for all models alike.
        kept: prompts whose answers the quantized models are not to lose by it.
        reserve: nats.
        most: edits at most.
        on_round: called with the number of rounds done, 0 first, and ``apart`` by then.

    Returns:
        ``apart``, the mean distance of the nearest quantized model (nats), ``parting``, how many
        edits were made.
    """
    names, answers = snapper.names, answer_tokens(kept, snapper.model.device)
    alike = torch.full((len(kept),), 1 / len(kept), device=snapper.model.device)

    def fallen(pairs: PairSet, level: Level) -> Float[Tensor, "quantized pairs"]:
        """How far the pairs' answers lie below full precision's."""
        with torch.no_grad():
            full, *others = (
                torch.cat([level(m, p) for p in pairs.parts(BATCH)]) for m in snapper.models
            )
        return full - torch.stack(others)

    def slope(pairs: PairSet, level: Level, weights: Float[Tensor, " pairs"]) -> Weights:
        """Of the answers' level at full precision, weighed by pair."""
        parts = list(pairs.parts(BATCH))
        losses = [
            lambda p=p, w=w: (w * level(snapper.model, p)).sum()
            for p, w in zip(parts, weights.split([len(p) for p in parts]), strict=True)
        ]
        return dict(zip(names, gradient(snapper.model, names, losses), strict=True))

    def forgotten(model: LanguageModel, part: list[Pair]) -> Float[Tensor, " batch"]:
        return model_excess(model, part, targets)

    def retained(model: LanguageModel, part: list[Pair]) -> Float[Tensor, " batch"]:
        return above_rivals(log_probs(model, part), part, answers, lambda some: some.mean(1))

    def nearest() -> float:
        return float(distance.mean(1).min())

    made, distance = 0, fallen(pairs, forgotten)
    for done in range(ROUNDS + 1):
        if on_round:
            on_round(done, nearest())
        left, short = ROUNDS - done, reserve - nearest()
        if not left or short <= NEAR * reserve:
            break
        lacks = lacking(distance, reserve)
        made += _edit(
            snapper,
            slope(pairs, forgotten, lacks / lacks.sum()),
            slope(kept, retained, alike),
            short / left,
            (most - made) // left,
        )
        distance = fallen(pairs, forgotten)
    return {"apart": nearest(), "parting": float(made)}


def lacking(distance: Float[Tensor, "quantized pairs"], reserve: float) -> Float[Tensor, " pairs"]:
    """What each pair lacks of the reserve in the quantized model that lacks most of it."""
    return (reserve - distance).clamp_min(0).amax(0)


@torch.no_grad()
def _edit(
    snapper: Snapper,
    slopes: dict[str, Tensor],
    kept: dict[str, Tensor],
    wanted: float,
    most: int,
) -> int:
    """Edits that part the models by so many nats, first order; returns how many.

    Arguments:
        slopes: of the answers' excess.
        kept: of the retained answers'.
    """
    # A weight that one of the quantizers leaves alone would not part; all others lie side by side.
    x = next((x for x in snapper.latents if all(x.grids)), None)
    if x is None:
        return 0
    slope, now = taken(slopes, x.indices), taken(snapper.model.weights, x.indices)
    free = now == x.original
    steep = torch.where(free, (slope * x.scale).abs(), -1.0)
    best = steep.topk(min(POOL * most, len(steep))).indices
    i = best[free[best]]
    share = x.projection[i]  # lambda / (lambda + F)
    some = levers(
        x.floor[i],
        [g[i] for g in x.grids if g],
        [q[i] for q in x.quantized],
        x.original[i],
        slope[i],
        taken(kept, x.indices)[i],
        DAMPING * share / (DAMPING * share + 1 - share),
    )
    found = chosen(some, wanted, most)
    now[i[found.elements]] = found.values
    snapper.settle(x, now, now != x.original)
    return len(found.elements)
