"""UNDIAL (Dong et al. 2024, arXiv 2402.10052): distil from itself, the answer's logit lowered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, pack_answers
from ...tasks.task import Task
from ..methods import UNDIAL
from ..training import answer_loss
from .dense import Objective


def undial(model: LanguageModel, task: Task, config: UNDIAL, seed: int = 0) -> Objective:
    """Loss = CE(student, softmax(teacher - b onehot(answer))) + retain_weight x NLL(retain).

    The cross-entropy is a mean over the positions that predict an answer token; b is
    ``config.beta``. The authors add no retain loss by default.
    """

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        packed = pack_answers(pairs, student.device)
        where = packed.tokens, packed.row, packed.position
        with torch.no_grad():
            # Logits up to a constant that softmax ignores.
            lowered = model.logits_at(*where).log_softmax(-1)
            lowered[torch.arange(len(packed.target)), packed.target] -= config.beta
        logp = student.logits_at(*where).log_softmax(-1)
        return -(lowered.softmax(-1) * logp).sum(-1).mean()

    return Objective(forget, answer_loss, config.retain_weight)
