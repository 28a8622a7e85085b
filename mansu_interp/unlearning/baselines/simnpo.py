"""SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference, normalised by length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from ...losses.answers import token_nll
from ...models.language_model import LanguageModel
from ...tasks.answers import pack_answers
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ..config import UnlearnConfig
from ..training import answer_loss
from .dense import Objective


def simnpo(model: LanguageModel, task: Task, config: UnlearnConfig) -> Objective:
    """Loss = -(2/b) log sigmoid(b (NLL / length - d)) + retain_weight x NLL(retain).

    The length is in answer tokens; b and d are ``config.baseline.simnpo_beta`` and ``_delta``.
    """
    beta, delta = config.baseline.simnpo_beta, config.baseline.simnpo_delta

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        packed = pack_answers(pairs, student.device)
        per_token = packed.sums(token_nll(student, packed)) / packed.lengths
        return -(2 / beta) * logsigmoid(beta * (per_token - delta)).mean()

    return Objective(forget, answer_loss)
