"""DurableUn-SAF (Khan and Sohel 2026, arXiv 2605.02196): ascend through INT4 rounding as well."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ..methods import DurableUn
from ..registry import DenseConfig
from ..training import answer_loss
from .dense import DenseLoop, Objective, put_back

LEVELS = (-8, 7)
"""Codes of signed INT4."""


def int4(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """A weight rounded to symmetric INT4, a row at a time: scale = absmax / 7, codes -8..7.

    The scale makes codes -7..7: nothing is clipped, so that the straight-through gradient is the
    identity everywhere.
    """
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-8) / LEVELS[1]
    return (weight / scale).round().clamp(*LEVELS) * scale


def ramp(done: int, steps: int, warmup: float) -> float:
    """Share of the weight of the rounded model's loss after ``done`` of ``steps`` steps: 0 during
    the warm-up, then linear to 1 half-way to the end."""
    start = round(warmup * steps)
    return min(1.0, 2 * max(0, done + 1 - start) / max(1, steps - start))


class StraightThrough(DenseLoop):
    """Adds the forget gradient at the rounded weights, as if it were that at the weights."""

    def __init__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int = 0,
        *, quantized_weight: float, warmup: float,
    ) -> None:  # fmt: skip
        super().__init__(model, objective, config, seed)
        self.quantized_weight, self.warmup = quantized_weight, warmup

    def forget_gradient(self, batch: list[list[Pair]], done: int) -> float:
        """See `DenseLoop.forget_gradient`; the loss is that of the weights as they are."""
        found = super().forget_gradient(batch, done)
        weight = self.quantized_weight * ramp(done, self.config.steps, self.warmup)
        if weight:
            linear = [self.student.weights[n] for n in self.student.linear_names]
            with put_back(linear):
                with torch.no_grad():
                    for w in linear:
                        w.copy_(int4(w))
                self.descend(self.objective.forget, batch, weight)
        return found


def durableun(model: LanguageModel, task: Task, config: DurableUn, seed: int = 0) -> Objective:
    """Loss = -NLL(forget; w) - a NLL(forget; Q(w)) + retain_weight x NLL(retain; w).

    Q is `int4` on every linear weight; its gradient is passed straight through. a is
    ``config.quantized_weight`` times `ramp`. From the authors' public code, whose defaults are
    taken. They train adapters on a 4-bit base with a cosine schedule; here every weight is trained
    at a constant step size, as by the other baselines. Their *sharpness-aware* means the rounding:
    there is no ascent step.
    """
    return Objective(
        lambda student, pairs: -answer_loss(student, pairs),
        answer_loss,
        config.retain_weight,
        loop=partial(
            StraightThrough, quantized_weight=config.quantized_weight, warmup=config.warmup
        ),
    )
