"""Task vector (Ilharco et al. 2023, arXiv 2212.04089): learn the facts harder, take that off."""

from __future__ import annotations

import torch

from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..methods import TaskVector
from ..training import answer_loss
from .dense import Objective


def task_vector(model: LanguageModel, task: Task, config: TaskVector, seed: int = 0) -> Objective:
    """Weights = original - scale x (tuned - original); tuned: loss NLL(forget), nothing retained.

    The forgetting level is looked for in the negated model at every look; the scale is
    ``config.scale``.
    """

    @torch.no_grad()
    def negated(tuned: LanguageModel) -> LanguageModel:
        out = model.trainable_copy()
        for name, weight in out.weights.items():
            weight.sub_(config.scale * (tuned.weights[name] - weight))
        return out

    return Objective(answer_loss, outcome=negated)
