"""NPO (Zhang et al. 2024, arXiv 2404.05868): a preference loss whose pull fades as p falls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import UnlearnConfig
from ..masks import Mask
from ..models import LanguageModel
from ..tasks import Task
from .common import OnStep, Sampler, Unlearned, retain_kl
from .dense import nll, train_dense

BETA = 0.1


def npo(
    model: LanguageModel,
    task: Task,
    mask: Mask | None,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
) -> Unlearned:
    """Loss = -(2/beta) log sigmoid(beta (NLL - NLL_ref)) + retain_weight x KL to the original."""

    def loss(student: LanguageModel, sampler: Sampler) -> tuple[Tensor, Tensor]:
        forget = sampler.forget()
        with torch.no_grad():
            reference = nll(model, forget)
        gap = nll(student, forget) - reference
        down = -(2 / BETA) * torch.nn.functional.logsigmoid(BETA * gap).mean()
        return down, retain_kl(student, model, sampler.retain(), None)

    return train_dense(model, task, config, loss, on_step)
