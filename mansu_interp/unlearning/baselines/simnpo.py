"""SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference, normalised by length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from ...losses.answers import token_nll
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, pack_answers
from ...tasks.task import Task
from ..methods import SimNPO
from ..training import answer_loss
from .dense import Objective


def simnpo(model: LanguageModel, task: Task, config: SimNPO, seed: int = 0) -> Objective:
    """Loss = -(2/b) log sigmoid(b (NLL / length - d)) + retain_weight x NLL(retain).

    The length is in answer tokens; b and d are ``config.beta`` and ``config.delta``.
    """
    beta, delta = config.beta, config.delta

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        packed = pack_answers(pairs, student.device)
        per_token = packed.sums(token_nll(student, packed)) / packed.lengths
        return -(2 / beta) * logsigmoid(beta * (per_token - delta)).mean()

    return Objective(forget, answer_loss, config.retain_weight)
