"""WGA (Wang et al. 2025, arXiv 2502.19301): gradient ascent weighed by what is still known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...losses.answers import token_nll
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, pack_answers
from ...tasks.task import Task
from ..methods import WGA
from ..training import answer_loss
from .dense import Objective


def wga(model: LanguageModel, task: Task, config: WGA, seed: int = 0) -> Objective:
    """Loss = -p^b NLL(forget) + retain_weight x NLL(retain), the weight p^b without gradient.

    p is an answer token's probability, each token weighed by its own; b is
    ``config.beta``.
    """

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        packed = pack_answers(pairs, student.device)
        losses = token_nll(student, packed)
        weighed = (-losses).exp().detach() ** config.beta * losses
        return -packed.sums(weighed).mean()

    return Objective(forget, answer_loss, config.retain_weight)
