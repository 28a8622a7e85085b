"""SURE (Zhang et al. 2024, arXiv 2410.16454): unlearn in the weights that forgetting pulls most."""

from __future__ import annotations

import torch

from ...losses.answers import answer_gradient
from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..methods import SURE
from ..training import answer_loss
from .dense import Objective

PAIRS = 96
"""Forget pairs behind the saliency map."""


def sure(model: LanguageModel, task: Task, config: SURE, seed: int = 0) -> Objective:
    """GradDiff's loss, on the rows of linear weights with the largest forget gradient alone.

    A row's saliency is the norm of its gradient of NLL(forget) at the original; rows below the
    ``config.percentile``-th percentile of all rows stay as they are. ``seed`` draws the pairs. The
    authors use it with several losses and a larger learning rate; embeddings and norms stay here.
    """
    sample = task.forget.sample(PAIRS, seed)
    salience = {
        name: g.norm(dim=1, keepdim=True)
        for name, g in answer_gradient(model, model.linear_names, sample).items()
    }
    every = torch.cat([s.flatten() for s in salience.values()])
    bar = every.quantile(config.percentile / 100)
    rows = {name: s >= bar for name, s in salience.items()}
    return Objective(
        lambda student, pairs: -answer_loss(student, pairs),
        answer_loss,
        config.retain_weight,
        rows,
    )
