"""SatImp (Yang et al. 2025, arXiv 2505.11953): ascent weighed by saturation and importance."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...losses.answers import token_nll
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, pack_answers
from ...tasks.task import Task
from ..methods import SatImp
from ..training import answer_loss
from .dense import Objective


def satimp(model: LanguageModel, task: Task, config: SatImp, seed: int = 0) -> Objective:
    """Loss = -p^b1 (1 - p)^b2 NLL(forget) + retain_weight x NLL(retain), weights without gradient.

    p is an answer token's probability, each token weighed by its own; b1 and b2 are
    ``config.beta1`` and ``config.beta2``.
    """
    powers = config.beta1, config.beta2

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        packed = pack_answers(pairs, student.device)
        losses = token_nll(student, packed)
        p = (-losses).exp().detach()
        return -packed.sums(p ** powers[0] * (1 - p) ** powers[1] * losses).mean()

    return Objective(forget, answer_loss, config.retain_weight)
