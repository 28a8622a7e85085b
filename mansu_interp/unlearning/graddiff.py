"""GradDiff (Liu et al. 2022, arXiv 2203.12817): ascend on forget, descend on retain."""

from __future__ import annotations

from torch import Tensor

from ..config import UnlearnConfig
from ..masks import Mask
from ..models import LanguageModel
from ..tasks import Task
from .common import OnStep, Sampler, Unlearned
from .dense import nll, train_dense


def graddiff(
    model: LanguageModel,
    task: Task,
    mask: Mask | None,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
) -> Unlearned:
    """Loss = -NLL(forget) + retain_weight x NLL(retain), on all weights; the mask is not used."""

    def loss(student: LanguageModel, sampler: Sampler) -> tuple[Tensor, Tensor]:
        return -nll(student, sampler.forget()).mean(), nll(student, sampler.retain()).mean()

    return train_dense(model, task, config, loss, on_step)
