"""NPO (Zhang et al. 2024, arXiv 2404.05868): a preference loss whose pull fades as p falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import UnlearnConfig
from ..masks import Mask
from ..models import LanguageModel
from ..objectives import nll
from ..tasks import Pair, Task
from .common import OnStep, Unlearned, retain_loss
from .dense import train_dense

BETA = 0.1


def npo(
    model: LanguageModel,
    task: Task,
    mask: Mask | None,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
) -> Unlearned:
    """Loss = -(2/beta) log sigmoid(beta (NLL - NLL_ref)) + retain_weight x KL to the original."""

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad():
            reference = nll(model, pairs)
        gap = nll(student, pairs) - reference
        return -(2 / BETA) * torch.nn.functional.logsigmoid(BETA * gap).mean()

    def retain(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        return retain_loss(student, model, pairs)

    return train_dense(model, task, config, forget, retain, on_step)
