"""UNDIAL (Dong et al. 2024, arXiv 2402.10052): distil from itself, the answer's logit lowered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import UnlearnConfig
from ..models import LanguageModel
from ..objectives import log_probs
from ..tasks import Pair, Task
from .common import answer_loss
from .dense import Objective


def undial(model: LanguageModel, task: Task, config: UnlearnConfig) -> Objective:
    """Loss = CE(student, softmax(teacher - b onehot(answer))) + retain_weight x NLL(retain).

    The cross-entropy is taken where the one answer token is predicted; b is
    ``config.baseline.undial_beta``. The authors add no retain loss by default.
    """

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad():
            lowered = log_probs(model, pairs)  # logits up to a constant that softmax ignores
            lowered[range(len(pairs)), [p.answer for p in pairs]] -= config.baseline.undial_beta
        return -(lowered.softmax(-1) * log_probs(student, pairs)).sum(-1).mean()

    return Objective(forget, answer_loss)
