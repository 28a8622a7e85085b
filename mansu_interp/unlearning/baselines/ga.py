"""Gradient ascent (Jang et al. 2023, arXiv 2210.01504): ascend on forget, retain nothing."""

from __future__ import annotations

from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..methods import GA
from ..training import answer_loss
from .dense import Objective


def ga(model: LanguageModel, task: Task, config: GA, seed: int = 0) -> Objective:
    """Loss = -NLL(forget), summed over the answer's tokens."""
    return Objective(lambda student, pairs: -answer_loss(student, pairs))
