"""WGA (Wang et al. 2025, arXiv 2502.19301): gradient ascent weighed by what is still known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config import UnlearnConfig
from ..models import LanguageModel
from ..objectives import nll
from ..tasks import Pair, Task
from .common import answer_loss
from .dense import Objective


def wga(model: LanguageModel, task: Task, config: UnlearnConfig) -> Objective:
    """Loss = -p^b NLL(forget) + retain_weight x NLL(retain), the weight p^b without gradient.

    p is the answer token's probability; b is ``config.baseline.wga_beta``.
    """

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        losses = nll(student, pairs)
        return -((-losses).exp().detach() ** config.baseline.wga_beta * losses).mean()

    return Objective(forget, answer_loss)
