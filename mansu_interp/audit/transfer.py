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

import torch
from jaxtyping import Float
from torch import Tensor

from ..losses.answers import above_rivals
from ..losses.gradients import gradient, passes
from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet, answer_tokens, collate
from ..utils.distributed import sum_number
from .probes import CHUNK


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
    names, advantage = list(model.weights), 0.0

    def of(pairs: PairSet) -> list[Tensor]:
        among = answer_tokens(pairs, model.device)

        def mean(part: list[Pair]) -> Tensor:
            nonlocal advantage
            value = model_advantage(model, part, among).sum() / len(pairs)
            advantage += value.item() / 2
            return value

        parts = passes(pairs, CHUNK, model.d_model)
        return gradient(model, names, [lambda p=p: mean(p) for p in parts])

    a, b = of(half_a), of(half_b)
    advantage = sum_number(advantage)
    size = math.sqrt(sum(float((g * g).sum()) for g in a) * sum(float((g * g).sum()) for g in b))
    shares = [float((x * y).sum()) / max(size, 1e-30) for x, y in zip(a, b, strict=True)]
    return Transfer(sum(shares), dict(zip(names, shares, strict=True)), advantage)
