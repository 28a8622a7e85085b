"""What an edit may not change: the diagonal Fisher and the null-space projection.

With F the diagonal Fisher of the retain set, a direction g becomes lambda / (lambda + F_i) g_i
inside the mask and 0 elsewhere: the null space of diag(F) as lambda -> 0 (ours, after
the idea of arXiv 2605.15138).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.language_model import LanguageModel
from ..models.layout import output_embeddings
from ..models.stream import widen
from ..tasks.pairs import Batch, PairSet
from ..utils.distributed import rank, sum_over_processes, world_size
from .gradients import Elements, Weights, gradient, local_gradient


def fisher_diagonal(
    model: LanguageModel,
    of: Elements,
    pairs: PairSet,
    batch_size: int = 4,
    seed: int = 0,
) -> Weights:
    """Diagonal Fisher information of the next-token distribution on some prompts.

    Labels are drawn from the model's own distribution (the true Fisher, not the empirical one).
    With ``batch_size`` > 1 the square of a batch's summed gradient stands for the sum of squares:
    the cross terms vanish in expectation because labels are drawn independently. Processes of a
    ``torch.distributed`` group share the batches, and draw the labels that one process would draw.

    Arguments:
        model: whose weights and predictions.
        of: names of weights, or positions in them, as in `gradient`.
        pairs: whose clean prompts.
        batch_size: prompts per backward pass.
        seed: of the labels.

    Returns:
        Mean squared score per weight (nats^2 per unit of weight^2), per prompt.
    """
    generator = torch.Generator().manual_seed(seed)

    def nll(batch: Batch) -> Tensor:
        logp = model.last_logits(batch.clean, batch.last).log_softmax(-1)
        # Drawn on the CPU: the same labels wherever the model computes.
        label = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
        return -logp.gather(1, label).sum()

    vocabulary = len(output_embeddings(model.hf).get_parameter("weight"))

    def own() -> Iterator[Callable[[], Tensor]]:
        for k, batch in enumerate(pairs.batches(batch_size, model.device)):
            if k % world_size() == rank():
                yield lambda b=batch: nll(b)
            else:  # another's: draw as many random numbers as its labels take
                torch.multinomial(torch.ones(len(batch), vocabulary), 1, generator=generator)

    total = local_gradient(model, of, own(), squared=True)
    return {n: sum_over_processes(t) / len(pairs) for n, t in zip(of, total, strict=True)}


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


@dataclass(frozen=True)
class RetainBound:
    """The second-order estimate of what an edit d costs on retained answers, in nats per answer.

    dL <= |g_r . d| + 1/2 sum_i F_i d_i^2. Off-diagonal curvature and higher orders are what it
    leaves out, so it bounds nothing by itself: ``remainder`` tells what they came to.
    """

    first: float
    """|g_r . d|."""
    second: float
    """1/2 sum F_i d_i^2, F the diagonal Fisher at the original."""
    measured: float
    """Loss of the edited model minus loss of the original."""

    @property
    def bound(self) -> float:
        """The estimate."""
        return self.first + self.second

    @property
    def remainder(self) -> float:
        """Measured minus estimate; positive where the estimate was not a bound."""
        return self.measured - self.bound


def retain_bound(
    model: LanguageModel, edited: LanguageModel, pairs: PairSet, seed: int = 0
) -> RetainBound:
    """The bound for an edit, next to the measured change of the retain loss.

    Arguments:
        model: the original.
        edited: after the edit.
        pairs: retained answers; the loss is the mean negative log-likelihood of the answer.
        seed: of the labels that the Fisher draws.
    """
    names = [n for n, w in model.weights.items() if not torch.equal(w, edited.weights[n])]

    def loss(of: LanguageModel, batch: Batch) -> Tensor:
        logp = of.last_logits(batch.clean, batch.last).log_softmax(-1)
        return -logp.gather(1, batch.answer[:, None]).sum() / len(pairs)

    batches = list(pairs.batches(16, model.device))
    with torch.no_grad():
        change = sum(float(loss(edited, b) - loss(model, b)) for b in batches)
    if not names:
        return RetainBound(0.0, 0.0, change)
    slopes = gradient(model, names, [lambda b=b: loss(model, b) for b in batches])
    fisher = fisher_diagonal(model, names, pairs, seed=seed)
    first = second = 0.0
    for name, g in zip(names, slopes, strict=True):
        d = widen(edited.weights[name]) - model.weights[name]
        first += float((g.double() * d).sum())
        second += 0.5 * float((fisher[name].double() * d * d).sum())
    return RetainBound(abs(first), second, change)
