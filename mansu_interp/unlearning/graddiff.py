"""GradDiff (Liu et al. 2022, arXiv 2203.12817): ascend on forget, descend on retain."""

from __future__ import annotations

from ..config import UnlearnConfig
from ..masks import Mask
from ..models import LanguageModel
from ..objectives import nll
from ..tasks import Task
from .common import OnStep, Unlearned
from .dense import train_dense


def graddiff(
    model: LanguageModel,
    task: Task,
    mask: Mask | None,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
) -> Unlearned:
    """Loss = -NLL(forget) + retain_weight x NLL(retain), on all weights; the mask is not used."""

    return train_dense(
        model,
        task,
        config,
        lambda student, pairs: -nll(student, pairs).mean(),
        lambda student, pairs: nll(student, pairs).mean(),
        on_step,
    )
