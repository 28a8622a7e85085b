"""KL minimisation (Maini et al. 2024, TOFU, arXiv 2401.06121): ascend, stay near the original."""

from __future__ import annotations

from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..methods import KL
from ..training import answer_loss, retain_loss, retain_target
from .dense import Objective


def kl(model: LanguageModel, task: Task, config: KL, seed: int = 0) -> Objective:
    """Loss = -NLL(forget) + retain_weight x KL(original || student) on retain prompts.

    The KL is taken where the answer's tokens are predicted, not at every token of the prompt.
    """
    return Objective(
        lambda student, pairs: -answer_loss(student, pairs),
        lambda student, pairs: retain_loss(student, retain_target(model, pairs)),
        config.retain_weight,
    )
