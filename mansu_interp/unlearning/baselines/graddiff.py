"""GradDiff (Liu et al. 2022, arXiv 2203.12817): ascend on forget, descend on retain."""

from __future__ import annotations

from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..methods import GradDiff
from ..training import answer_loss
from .dense import Objective


def graddiff(model: LanguageModel, task: Task, config: GradDiff, seed: int = 0) -> Objective:
    """Loss = -NLL(forget) + retain_weight x NLL(retain), summed over the answer's tokens."""
    return Objective(
        lambda student, pairs: -answer_loss(student, pairs), answer_loss, config.retain_weight
    )
