"""The shared loop of dense baselines: AdamW on every weight, stopped at a forgetting level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import UnlearnConfig
from ..models import LanguageModel
from ..scoring import choice_accuracy
from ..tasks import Pair, Task
from .common import OnStep, Sampler, Unlearned

CHECK_EVERY = 2


Loss = Callable[[LanguageModel, Sequence[Pair]], Tensor]


def train_dense(
    model: LanguageModel,
    task: Task,
    config: UnlearnConfig,
    forget: Loss,
    retain: Loss,
    on_step: OnStep | None,
) -> Unlearned:
    """Minimise ``forget + retain_weight x retain`` over all weights.

    Every few steps the four-way accuracy on the forget facts' dev phrasings (never the unseen ones)
    decides whether ``config.stop_at`` is reached.
    """
    student = model.copy()
    weights = list(student.weights.values())
    optimiser = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    sampler = Sampler(task, config)
    check = list(task.scored["dev"]["forget"].values()) or [task.forget]
    history: list[dict[str, float]] = []

    def descend(loss: Loss, batch: list[list[Pair]], weight: float) -> float:
        total = 0.0
        for part in batch:
            value = loss(student, part) * (len(part) / sum(map(len, batch)))
            (weight * value).backward()
            total += value.item()
        return total

    for done in range(config.steps):
        for w in weights:
            w.requires_grad_(True)
        record = {
            "forget": descend(forget, sampler.forget(), 1.0),
            "retain": descend(retain, sampler.retain(), config.retain_weight),
        }
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for w in weights:
            w.requires_grad_(False)
        if config.stop_at is not None and (done + 1) % CHECK_EVERY == 0:
            record["choice"] = sum(choice_accuracy(student, s) for s in check) / len(check)
        history.append(record)
        if on_step:
            on_step(done + 1, config.steps, record)
        if record.get("choice", 2.0) <= (config.stop_at if config.stop_at is not None else -1):
            break
    return Unlearned(student, history, len(history))
