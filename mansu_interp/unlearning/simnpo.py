"""SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference, normalised by length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..config import UnlearnConfig
from ..models import LanguageModel
from ..objectives import token_nll
from ..pairs import Pair, Task, lay_answers
from .common import answer_loss
from .dense import Objective


def simnpo(model: LanguageModel, task: Task, config: UnlearnConfig) -> Objective:
    """Loss = -(2/b) log sigmoid(b (NLL / length - d)) + retain_weight x NLL(retain).

    The length is in answer tokens; b and d are ``config.baseline.simnpo_beta`` and ``_delta``.
    """
    beta, delta = config.baseline.simnpo_beta, config.baseline.simnpo_delta

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        laid = lay_answers(pairs, student.device)
        per_token = laid.sums(token_nll(student, laid)) / laid.lengths
        return -(2 / beta) * logsigmoid(beta * (per_token - delta)).mean()

    return Objective(forget, answer_loss)
