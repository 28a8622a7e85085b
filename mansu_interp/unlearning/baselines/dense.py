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
from ..checkpoint import Checkpoint
from ..history import History, StepRecord
from ..methods import DenseConfig
from ..training import OnStep, Sampler, Unlearned, forgetting_level, may_stop

Loss = Callable[[LanguageModel, Sequence[Pair]], Tensor]
"""Mean loss of a student over some pairs."""


@dataclass(frozen=True)
class Objective:
    """What makes one dense method: it minimises ``forget + retain_weight x retain``."""

    forget: Loss
    """On forget pairs; lower is more forgotten."""
    retain: Loss | None = None
    """On retain and retain-unscored pairs; None: nothing is retained on purpose."""
    retain_weight: float = 1.0
    """Weight of the retain loss."""
    rows: dict[str, Bool[Tensor, "out 1"]] | None = None
    """Which rows of which weights may move; None: every weight."""
    outcome: Callable[[LanguageModel], LanguageModel] | None = None
    """The model that a trained student stands for; None: the student itself."""


class _DenseLoop:
    """The student of one run, and its optimiser."""

    def __init__(self, model: LanguageModel, objective: Objective, lr: float) -> None:
        self.objective = objective
        self.student = model.copy()
        self.rows = objective.rows or {}
        self.trained = {n: self.student.weights[n] for n in (self.rows or self.student.weights)}
        self.weights = list(self.trained.values())
        self.optimiser = torch.optim.AdamW(self.weights, lr=lr, weight_decay=0.0)

    def outcome(self) -> LanguageModel:
        """The model that the student stands for now."""
        return self.objective.outcome(self.student) if self.objective.outcome else self.student

    def descend(self, loss: Loss, batch: list[list[Pair]], weight: float) -> float:
        """Add the gradient of a weighted loss; returns the loss, a mean over the batch."""
        total = 0.0
        for part in shard(batch):
            value = loss(self.student, part) * (len(part) / sum(map(len, batch)))
            (weight * value).backward()
            total += value.item()
        return sum_number(total)

    def step(
        self, forget: list[list[Pair]], retain: list[list[Pair]] | None
    ) -> tuple[float, float | None]:
        """One step of AdamW on a forget and a retain batch; returns both losses."""
        objective, weights = self.objective, self.weights
        for w in weights:
            w.requires_grad_(True)
        forgotten, retained = self.descend(objective.forget, forget, 1.0), None
        if objective.retain and retain is not None:
            retained = self.descend(objective.retain, retain, objective.retain_weight)
        if world_size() > 1:
            for w in weights:
                w.grad = sum_over_processes(torch.zeros_like(w) if w.grad is None else w.grad)
        for name, movable in self.rows.items():
            grad = self.student.weights[name].grad
            if grad is not None:
                grad.mul_(movable)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for w in weights:
            w.requires_grad_(False)
        return forgotten, retained


def train_dense(
    model: LanguageModel,
    task: Task,
    config: DenseConfig,
    objective: Objective,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    checkpoint: Checkpoint | None = None,
) -> Unlearned:
    """Minimise an objective with AdamW, gradients clipped at norm 1, no weight decay.

    Every few steps the four-way accuracy on the forget facts' dev phrasings (never the unseen ones)
    decides whether ``config.stop_at`` is reached.

    Arguments:
        model: the original; it is not changed.
        task: what to forget and what to retain.
        config: steps, batch size, learning rate and forgetting level.
        objective: what is minimised.
        seed: order of batches.
        on_step: called after each step.
        checkpoint: where a killed loop goes on.
    """
    loop = _DenseLoop(model, objective, config.lr)
    sampler = Sampler(task, config.batch_size, seed)
    checkpoint = checkpoint or Checkpoint()
    history = checkpoint.load()

    def draw() -> tuple[list[list[Pair]], list[list[Pair]] | None]:
        return sampler.forget(), sampler.retain() if objective.retain else None

    for _ in history:  # the draws of the steps that are done
        draw()
    if history:
        _resume(checkpoint, loop.trained, loop.optimiser, len(history))
    for done in range(len(history), config.steps):
        forgotten, retained = loop.step(*draw())
        choice = forgetting_level(lambda: [loop.outcome()], task, config.stop_at, done)
        history.append(StepRecord(forgotten, retained, choice=choice))
        if on_step:
            on_step(done + 1, config.steps, history[-1])
        if may_stop(choice, config.stop_at):
            break
        if checkpoint.is_due():
            _save(checkpoint, loop.trained, loop.optimiser, history)
    return Unlearned(loop.outcome(), history, len(history))


MOMENTS = ("exp_avg", "exp_avg_sq")


def _save(
    checkpoint: Checkpoint,
    trained: dict[str, Tensor],
    optimiser: torch.optim.AdamW,
    history: History,
) -> None:
    """Write the loop's weights, and the moments of those that ever had a gradient."""
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
    """Restore the weights and moments of a killed loop."""
    for name, w in trained.items():
        checkpoint.restore(f"{name}|weight", w)
        if f"{name}|{MOMENTS[0]}" in checkpoint.tensors:
            moments = {key: torch.zeros_like(w) for key in MOMENTS}
            for key, moment in moments.items():
                checkpoint.restore(f"{name}|{key}", moment)
            optimiser.state[w] = {"step": torch.tensor(float(done)), **moments}
