"""NPO (Zhang et al. 2024, arXiv 2404.05868): a preference loss whose pull fades as p falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...losses.answers import nll
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ..methods import NPO
from ..training import retain_loss, retain_target
from .dense import Objective


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
