"""Keeping what must be kept: the diagonal Fisher and the projection.

With F the diagonal Fisher of the retain set, a direction g becomes lambda / (lambda + F_i) g_i
inside the mask and 0 elsewhere: the null space of diag(F) as lambda -> 0 (ours, after
the idea of arXiv 2605.15138).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .models import LanguageModel
from .tasks import Batch, PairSet

Weights = dict[str, Float[Tensor, "out in"]]


def gradient(
    model: LanguageModel, names: Sequence[str], losses: Iterable[Callable[[], Tensor]]
) -> list[Float[Tensor, "out in"]]:
    """Gradient of a sum of losses with respect to some weights, leaving no trace on the model.

    Each loss is computed and differentiated before the next, so memory holds one at a time.
    """
    wanted = [model.weights[n] for n in names]
    total: list[Tensor] = []
    for weight in wanted:
        weight.requires_grad_(True)
    try:
        for loss in losses:
            part = torch.autograd.grad(loss(), wanted)
            total = [t.add_(g) for t, g in zip(total, part, strict=True)] if total else list(part)
    finally:
        for weight in wanted:
            weight.requires_grad_(False)
    return total


def fisher_diagonal(
    model: LanguageModel,
    names: Sequence[str],
    pairs: PairSet,
    batch_size: int = 4,
    seed: int = 0,
) -> Weights:
    """Diagonal Fisher information of the next-token distribution on some prompts.

    Labels are drawn from the model's own distribution (the true Fisher, not the empirical one).
    With ``batch_size`` > 1 the square of a batch's summed gradient stands for the sum of squares:
    the cross terms vanish in expectation because labels are drawn independently.

    Returns:
        Mean squared score per weight (nats^2 per unit of weight^2), per prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    total = {n: torch.zeros_like(model.weights[n]) for n in names}

    def nll(batch: Batch) -> Tensor:
        logp = model.last_logits(batch.clean, batch.last).log_softmax(-1)
        label = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        return -logp.gather(1, label).sum()

    for batch in pairs.batches(batch_size):
        for name, g in zip(names, gradient(model, names, [lambda b=batch: nll(b)]), strict=True):
            total[name].addcmul_(g, g)
    return {n: t / len(pairs) for n, t in total.items()}


def projection(fisher: Float[Tensor, " n"], strength: float, scale: float) -> Float[Tensor, " n"]:
    """Factor lambda / (lambda + F_i) in (0, 1], with lambda = ``scale`` / ``strength``.

    Arguments:
        fisher: diagonal Fisher of the weights.
        strength: 0 = no projection; larger = closer to the exact null space.
        scale: a typical Fisher value (the median over the mask), so that ``strength`` has no units.
    """
    if strength == 0:
        return torch.ones_like(fisher)
    lam = max(scale, 1e-30) / strength
    return lam / (lam + fisher)
