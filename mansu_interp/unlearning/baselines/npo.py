"""NPO (Zhang et al. 2024, arXiv 2404.05868): a preference loss whose pull fades as p falls.

``npo-sam`` (Fan et al. 2025, arXiv 2502.05374) takes its gradient where relearning would lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...losses.answers import nll
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ..methods import NPO, NPOSAM
from ..registry import DenseConfig
from ..training import retain_loss, retain_target
from .dense import DenseLoop, Objective, put_back


def npo(model: LanguageModel, task: Task, config: NPO, seed: int = 0) -> Objective:
    """Loss = -(2/b) log sigmoid(b (NLL - NLL_ref)) + retain_weight x KL to the original.

    NLL of the answer, a sum over its tokens; b is ``config.beta``.
    """
    beta = config.beta

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad():
            reference = nll(model, pairs)
        return -(2 / beta) * logsigmoid(beta * (nll(student, pairs) - reference)).mean()

    return Objective(
        forget,
        lambda student, pairs: retain_loss(student, retain_target(model, pairs)),
        config.retain_weight,
    )


class SharpnessAware(DenseLoop):
    """Takes the forget gradient at w + rho g / ||g||, where g is the forget gradient at w."""

    def __init__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int = 0,
        *, rho: float,
    ) -> None:  # fmt: skip
        super().__init__(model, objective, config, seed)
        self.rho = rho

    def forget_gradient(self, batch: list[list[Pair]], done: int) -> float:
        """See `DenseLoop.forget_gradient`; the loss is that at w."""
        found = super().forget_gradient(batch, done)
        self.sum_gradients()
        slopes = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights]
        norm = torch.stack([g.norm() for g in slopes]).norm()
        with put_back(self.weights):
            with torch.no_grad():
                for w, g in zip(self.weights, slopes, strict=True):
                    if norm > 0:
                        w.add_(g * (self.rho / norm))
                    w.grad = None
            super().forget_gradient(batch, done)
        return found


def npo_sam(model: LanguageModel, task: Task, config: NPOSAM, seed: int = 0) -> Objective:
    """Loss of `npo`, its forget part by sharpness-aware minimisation.

    Minimises max over ||e|| <= rho of forget(w + e), plus retain_weight x retain(w). To first order
    the maximum lies at e = rho g / ||g||, g = grad forget(w), the norm over all weights: a step
    towards relearning. The gradient is taken there and applied at w. rho
    is ``config.rho``, the authors' default 0.01.
    """
    return replace(npo(model, task, config, seed), loop=partial(SharpnessAware, rho=config.rho))
