"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..losses.answers import above_rivals
from ..losses.gradients import gradient
from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet, answer_tokens, by_phrasing, chunks, collate
from ..utils.distributed import sum_number
from .probes import CHUNK


def answer_advantage(
    logits: Float[Tensor, "batch vocab"], pairs: Sequence[Pair], among: dict[str, Tensor]
) -> Float[Tensor, " batch"]:
    """log p(answer among its relation's answers) + log n, in nats."""
    above = above_rivals(logits, pairs, among, lambda some: some.logsumexp(1))
    sizes = [math.log(len(among[p.relation])) for p in pairs]
    return above + torch.tensor(sizes, device=above.device)


def model_advantage(
    model: LanguageModel, pairs: Sequence[Pair], among: dict[str, Tensor]
) -> Float[Tensor, " batch"]:
    """`answer_advantage` of what a model says."""
    batch = collate(pairs, model.device)
    return answer_advantage(model.last_logits(batch.clean, batch.last), pairs, among)


@dataclass(frozen=True)
class Transfer:
    """Whether what raises half A's answers raises half B's."""

    transfer: float
    """Cosine of the two halves' margin gradients."""
    by_weight: dict[str, float]
    """Each weight's share; they add up to ``transfer``."""
    margin: float
    """Mean ranking margin over both halves (nats)."""


def gradient_transfer(model: LanguageModel, half_a: PairSet, half_b: PairSet) -> Transfer:
    """The first-order answer to "what would relearning half A bring half B?" (see the module)."""
    names, level = list(model.weights), 0.0

    def of(pairs: PairSet) -> list[Tensor]:
        among = answer_tokens(pairs, model.device)

        def mean(part: list[Pair]) -> Tensor:
            nonlocal level
            value = model_advantage(model, part, among).sum() / len(pairs)
            level += value.item() / 2
            return value

        parts = [c for g in by_phrasing(pairs) for c in chunks(g, CHUNK)]
        return gradient(model, names, [lambda p=p: mean(p) for p in parts])

    a, b = of(half_a), of(half_b)
    level = sum_number(level)
    size = math.sqrt(sum(float((g * g).sum()) for g in a) * sum(float((g * g).sum()) for g in b))
    shares = [float((x * y).sum()) / max(size, 1e-30) for x, y in zip(a, b, strict=True)]
    return Transfer(sum(shares), dict(zip(names, shares, strict=True)), level)
