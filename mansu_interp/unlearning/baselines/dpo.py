"""DPO (Rafailov et al. 2023, arXiv 2305.18290) for unlearning: prefer another answer.

``dpo`` prefers the counterfactual answer, ``idkdpo`` (Maini et al. 2024, TOFU, arXiv 2401.06121) an
admission of ignorance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...errors import ConfigError
from ...losses.answers import log_probs, nll, token_nll
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, Tokens, pack_behind
from ...tasks.task import Task
from ..methods import DPO, IdkDPO
from ..training import answer_loss
from .dense import Objective

IDK = ("I don't know", "?")
"""Admissions of ignorance; the first whose first token the tokenizer knows is taken."""


def _preferring(model: LanguageModel, config: DPO, winner: Callable[[Pair], Tokens]) -> Objective:
    beta = config.beta

    def ratio(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        """log p(win) - log p(lose) per pair."""
        if any(p.whole for p in pairs):
            packed = pack_behind(
                [p.question for p in pairs], [winner(p) for p in pairs], student.device
            )
            return nll(student, pairs) - packed.sums(token_nll(student, packed))
        # One token each: one forward pass gives both.
        logp, rows = log_probs(student, pairs), range(len(pairs))
        return logp[rows, [winner(p)[0] for p in pairs]] - logp[rows, [p.answer for p in pairs]]

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad():
            reference = ratio(model, pairs)
        return -(2 / beta) * logsigmoid(beta * (ratio(student, pairs) - reference)).mean()

    return Objective(forget, answer_loss, config.retain_weight)


def dpo(model: LanguageModel, task: Task, config: DPO, seed: int = 0) -> Objective:
    """Loss = -(2/b) log sigmoid(b (win ratio - lose ratio)) + retain_weight x NLL(retain).

    A ratio is log p / p_original of a whole answer: the counterfactual one (win) and the one to
    forget (lose); b is ``config.beta``.
    """
    return _preferring(model, config, lambda pair: pair.rival)


def idkdpo(model: LanguageModel, task: Task, config: IdkDPO, seed: int = 0) -> Objective:
    """`dpo` whose winning answer is the first token of `IDK`.

    Raises:
        ConfigError: the tokenizer knows none of them.
    """
    for text in IDK:
        ids = model.encode(" " + text)
        if ids and ids[0] != model.get_tokenizer().unk_token_id:
            return _preferring(model, config, lambda _, token=ids[0]: (token,))
    raise ConfigError(
        f"idkdpo: the tokenizer of {model.name} knows no first token of {IDK}. Use dpo."
    )
