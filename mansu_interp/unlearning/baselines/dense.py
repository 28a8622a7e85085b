"""The shared loop of dense baselines: AdamW on every weight, stopped at a forgetting level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ...utils.distributed import shard, sum_number, sum_over_processes, world_size
from ..checkpoint import Checkpoint, History
from ..config import UnlearnConfig
from ..training import OnStep, Sampler, Unlearned, reached

Loss = Callable[[LanguageModel, Sequence[Pair]], Tensor]
"""Mean loss of a student over some pairs."""


@dataclass(frozen=True)
class Objective:
    """What makes one dense method: it minimises ``forget + retain_weight x retain``."""

    forget: Loss
    """On forget pairs; lower is more forgotten."""
    retain: Loss | None = None
    """On retain and retain_unscored pairs; None: nothing is retained on purpose."""
    rows: dict[str, Bool[Tensor, "out 1"]] | None = None
    """Which rows of which weights may move; None: every weight."""
    outcome: Callable[[LanguageModel], LanguageModel] | None = None
    """The model that a trained student stands for; None: the student itself."""


def train_dense(
    model: LanguageModel,
    task: Task,
    config: UnlearnConfig,
    objective: Objective,
    on_step: OnStep | None = None,
    checkpoint: Checkpoint | None = None,
) -> Unlearned:
    """Minimise an objective with AdamW, gradients clipped at norm 1, no weight decay.

    Every few steps the four-way accuracy on the forget facts' dev phrasings (never the unseen ones)
    decides whether ``config.stop_at`` is reached. With a ``checkpoint`` that a killed loop kept, this
    one goes on there.
    """
    student = model.copy()
    outcome = objective.outcome or (lambda trained: trained)
    rows = objective.rows or {}
    trained = {n: student.weights[n] for n in (rows or student.weights)}
    weights = list(trained.values())
    optimiser = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    sampler = Sampler(task, config)
    checkpoint = checkpoint or Checkpoint()
    history = checkpoint.load()
    for _ in history:  # the draws of the steps that are done
        sampler.forget()
        if objective.retain:
            sampler.retain()
    if history:
        _resume(checkpoint, trained, optimiser, len(history))

    def descend(loss: Loss, batch: list[list[Pair]], weight: float) -> float:
        total = 0.0
        for part in shard(batch):
            value = loss(student, part) * (len(part) / sum(map(len, batch)))
            (weight * value).backward()
            total += value.item()
        return sum_number(total)

    for done in range(len(history), config.steps):
        for w in weights:
            w.requires_grad_(True)
        record = {"forget": descend(objective.forget, sampler.forget(), 1.0)}
        if objective.retain:
            record["retain"] = descend(objective.retain, sampler.retain(), config.retain_weight)
        if world_size() > 1:
            for w in weights:
                w.grad = sum_over_processes(torch.zeros_like(w) if w.grad is None else w.grad)
        for name, keep in rows.items():
            grad = student.weights[name].grad
            if grad is not None:
                grad.mul_(keep)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for w in weights:
            w.requires_grad_(False)
        stop = reached(lambda: [outcome(student)], task, config, done, record)
        history.append(record)
        if on_step:
            on_step(done + 1, config.steps, record)
        if stop:
            break
        if checkpoint.is_due():
            _keep(checkpoint, trained, optimiser, history)
    return Unlearned(outcome(student), history, len(history))


MOMENTS = ("exp_avg", "exp_avg_sq")


def _keep(
    checkpoint: Checkpoint,
    trained: dict[str, Tensor],
    optimiser: torch.optim.AdamW,
    history: History,
) -> None:
    """Write down where the loop is: weights, and the moments of those that ever had a gradient."""
    parts = {f"{n}|weight": w.contiguous() for n, w in trained.items()}
    for name, w in trained.items():
        for key in MOMENTS:
            if key in optimiser.state[w]:
                parts[f"{name}|{key}"] = optimiser.state[w][key].contiguous()
    checkpoint.save(history, parts)


@torch.no_grad()
def _resume(
    checkpoint: Checkpoint, trained: dict[str, Tensor], optimiser: torch.optim.AdamW, done: int
) -> None:
    """Go back to where a killed loop was."""
    for name, w in trained.items():
        checkpoint.restore(f"{name}|weight", w)
        if f"{name}|{MOMENTS[0]}" in checkpoint.tensors:
            moments = {key: torch.zeros_like(w) for key in MOMENTS}
            for key, moment in moments.items():
                checkpoint.restore(f"{name}|{key}", moment)
            optimiser.state[w] = {"step": torch.tensor(float(done)), **moments}
