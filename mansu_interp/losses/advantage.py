"""Answer advantages, and their gradients: would raising half A's answers raise half B's, too?

The *advantage* of an answer over the others of its relation is

    log p(answer among the n answers) + log n        in nats

0: the model ranks it like any other; log n: it is certain; negative: it ranks it lower. With g_A
and g_B the gradients of the two halves' mean advantages by all weights,

    transfer = <g_A, g_B> / (|g_A| |g_B|)

says whether raising half A's advantages raises half B's (ours). In a model that was never taught,
each fact is learned by itself: near 0. Where something common hides the facts, removing it helps
both halves: towards 1. The terms of the sum, weight by weight, say where it would come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet, answer_tokens, collate
from ..utils.distributed import sum_number
from .answers import above_rivals
from .gradients import CHUNK, by_layer, gradient, passes


def answer_advantage(
    logits: Float[Tensor, "batch vocab"], pairs: Sequence[Pair], among: dict[str, Tensor]
) -> Float[Tensor, " batch"]:
    """log p(answer among its relation's answers) + log n, in nats (see the module).

    Arguments:
        logits: of the token that follows each prompt.
        pairs: the prompts.
        among: each relation's answers (`tasks.pairs.answer_tokens`).
    """
    above = above_rivals(logits, pairs, among, lambda some: some.logsumexp(1))
    sizes = [math.log(len(among[p.relation])) for p in pairs]
    return above + torch.tensor(sizes, device=above.device)


def model_advantage(
    model: LanguageModel, pairs: Sequence[Pair], among: dict[str, Tensor]
) -> Float[Tensor, " batch"]:
    """`answer_advantage` of a model's own logits (nats)."""
    batch = collate(pairs, model.device)
    return answer_advantage(model.last_logits(batch.clean, batch.last), pairs, among)


@dataclass(frozen=True)
class Transfer:
    """Whether what raises half A's answers raises half B's."""

    transfer: float
    """Cosine of the gradients of the two halves' mean advantages."""
    by_weight: dict[str, float]
    """Each weight's share; they add up to ``transfer``."""
    advantage: float
    """Mean advantage over both halves (nats)."""


def gradient_transfer(model: LanguageModel, half_a: PairSet, half_b: PairSet) -> Transfer:
    """What relearning half A would bring back of half B, to first order (see the module).

    Arguments:
        model: the edited model; it is not changed.
        half_a: prompts of the half that would be relearned.
        half_b: prompts of the other half.
    """
    among = [answer_tokens(half, model.device) for half in (half_a, half_b)]
    parts = [passes(half, CHUNK, model.d_model) for half in (half_a, half_b)]
    advantage = 0.0

    def mean(k: int, part: list[Pair]) -> Tensor:
        """What some pairs of a half add to its mean advantage."""
        nonlocal advantage
        value = model_advantage(model, part, among[k]).sum() / sum(map(len, parts[k]))
        advantage += value.item() / 2
        return value

    products: dict[str, float] = {}
    squares = [0.0, 0.0]
    layers = list(by_layer(list(model.weights)).values())
    half = len(layers) // 2
    # One half of the layers after the other, so that one copy of the weights is held, not two.
    for some in (layers[:half], layers[half:]):
        names, advantage = [n for layer in some for n in layer], 0.0
        a, b = (
            gradient(model, names, [partial(mean, k, part) for part in parts[k]]) for k in (0, 1)
        )
        for name, x, y in zip(names, a, b, strict=True):
            products[name] = float((x * y).sum())
            squares = [
                total + float((g * g).sum()) for total, g in zip(squares, (x, y), strict=True)
            ]
        del a, b, x, y
    size = max(math.sqrt(squares[0] * squares[1]), 1e-30)
    shares = {name: products[name] / size for name in model.weights}
    return Transfer(sum(shares.values()), shares, sum_number(advantage))
