"""The shared loop of baselines: AdamW on every weight, stopped at a forgetting level.

A method that does more than minimise two losses has a `DenseLoop` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ...utils.distributed import shard, sum_number, sum_over_processes, world_size
from ..checkpoint import Checkpoint
from ..history import History, StepRecord
from ..methods import DenseConfig
from ..training import OnLook, OnStep, Sampler, Unlearned, forgetting_level, may_stop

Loss = Callable[[LanguageModel, Sequence[Pair]], Tensor]
"""Mean loss of a student over some pairs."""


@runtime_checkable
class MakeLoop(Protocol):
    """Makes the loop of a run."""

    def __call__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int, /
    ) -> DenseLoop:
        """See `DenseLoop`."""
        ...


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
    loop: MakeLoop | None = None
    """What does the steps; None: `DenseLoop`."""
    reads_text: bool = False
    """Whether a step looks at running text, too."""


class DrawnBatch(NamedTuple):
    """What one step looks at: pairs in chunks, and windows of running text."""

    forget: list[list[Pair]]
    retain: list[list[Pair]] | None
    """None: the method retains nothing on purpose."""
    text: Int[Tensor, "rows pos"] | None
    """None: the method reads none, or the task has none."""


class DenseLoop:
    """The student of one run, and its optimiser; a method overrides what it does otherwise.

    Arguments:
        model: the original; it is not changed.
        objective: what is minimised.
        config: step size and forgetting level.
        seed: of the method's own draws.
    """

    def __init__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int = 0
    ) -> None:
        self.objective, self.config, self.seed = objective, config, seed
        self.student = model.trainable_copy()
        self.rows = objective.rows or {}
        self.weights = [self.student.weights[n] for n in (self.rows or self.student.weights)]
        self.trained = self.parameters()
        self.optimiser = self.make_optimiser(config.lr)

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser moves, by name: the weights themselves."""
        return {n: self.student.weights[n] for n in (self.rows or self.student.weights)}

    def make_optimiser(self, lr: float) -> torch.optim.AdamW:
        """AdamW without weight decay."""
        return torch.optim.AdamW(list(self.trained.values()), lr=lr, weight_decay=0.0)

    def outcome(self) -> LanguageModel:
        """The model that the student stands for now."""
        return self.objective.outcome(self.student) if self.objective.outcome else self.student

    def draw(self, sampler: Sampler) -> DrawnBatch:
        """The next step's batch."""
        forget = sampler.forget()
        retain = sampler.retain() if self.objective.retain else None
        return DrawnBatch(forget, retain, sampler.text() if self.objective.reads_text else None)

    def descend(self, loss: Loss, batch: list[list[Pair]], weight: float) -> float:
        """Add the gradient of a weighted loss; returns the loss, a mean over the batch. Of weight
        0 the loss alone is computed."""
        total = 0.0
        for part in shard(batch):
            with torch.set_grad_enabled(weight != 0):
                value = loss(self.student, part) * (len(part) / sum(map(len, batch)))
            if weight:
                (weight * value).backward()
            total += value.item()
        return sum_number(total)

    def sum_gradients(self) -> None:
        """Sum the gradients over all processes."""
        if world_size() > 1:
            for w in self.weights:
                w.grad = sum_over_processes(torch.zeros_like(w) if w.grad is None else w.grad)

    def begin(self, history: History) -> None:
        """Called before each step, with the record of those before it."""

    def forget_gradient(self, batch: list[list[Pair]], done: int) -> float:
        """Add the gradient of the forget loss, after ``done`` steps; returns the loss."""
        return self.descend(self.objective.forget, batch, 1.0)

    def step(self, batch: DrawnBatch, done: int) -> tuple[float, float | None]:
        """One step of AdamW after ``done`` others; returns the forget and the retain loss."""
        objective = self.objective
        for w in self.weights:
            w.requires_grad_(True)
        forgotten, retained = self.forget_gradient(batch.forget, done), None
        if objective.retain and batch.retain is not None:
            retained = self.descend(objective.retain, batch.retain, objective.retain_weight)
        self.finish()
        return forgotten, retained

    @torch.no_grad()
    def finish(self) -> None:
        """Move by the gradients that were added, and clear them."""
        self.sum_gradients()
        for name, movable in self.rows.items():
            grad = self.student.weights[name].grad
            if grad is not None:
                grad.mul_(movable)
        self.move()
        for w in self.weights:
            w.requires_grad_(False).grad = None

    def move(self) -> None:
        """One step of the optimiser, gradients clipped at norm 1."""
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimiser.step()

    @property
    def may_end(self) -> bool:
        """Whether what the student stands for now is what the method makes."""
        return True

    def ends(self, choice: float | None) -> bool:
        """Whether the run may stop at a forgetting level (see `forgetting_level`)."""
        return may_stop(choice, self.config.stop_at)

    def optimised(self, history: History) -> int:
        """Steps of the present optimiser."""
        return len(history)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: what is trained, and the moments of what ever had a gradient."""
        parts = {f"{n}|weight": w.contiguous() for n, w in self.trained.items()}
        for name, w in self.trained.items():
            for key in MOMENTS:
                if key in self.optimiser.state[w]:
                    parts[f"{name}|{key}"] = self.optimiser.state[w][key].contiguous()
        return parts

    @torch.no_grad()
    def resume(self, checkpoint: Checkpoint, history: History) -> None:
        """Restore what is trained, and its moments, of a killed loop."""
        for name, w in self.trained.items():
            checkpoint.restore(f"{name}|weight", w)
            if f"{name}|{MOMENTS[0]}" in checkpoint.tensors:
                moments = {key: torch.zeros_like(w) for key in MOMENTS}
                for key, moment in moments.items():
                    checkpoint.restore(f"{name}|{key}", moment)
                steps = torch.tensor(float(self.optimised(history)))
                self.optimiser.state[w] = {"step": steps, **moments}


MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def put_back(weights: Sequence[Tensor]) -> Iterator[None]:
    """Weights that may be moved while the context lasts, and then are what they were."""
    start = [w.detach().clone() for w in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for w, was in zip(weights, start, strict=True):
                w.copy_(was)


def train_dense(
    model: LanguageModel,
    task: Task,
    config: DenseConfig,
    objective: Objective,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    on_look: OnLook | None = None,
    checkpoint: Checkpoint | None = None,
) -> Unlearned:
    """Minimise an objective with AdamW, gradients clipped at norm 1, no weight decay; or as its
    own loop does.

    Every few steps the four-way accuracy on the forget facts' dev phrasings (never the unseen ones)
    decides whether ``config.stop_at`` is reached.

    Arguments:
        model: the original; it is not changed.
        task: what to forget and what to retain.
        config: steps, batch size, learning rate and forgetting level.
        objective: what is minimised.
        seed: order of batches.
        on_step: called after each step.
        on_look: see `unlearn`.
        checkpoint: where a killed loop goes on.
    """
    loop = (objective.loop or DenseLoop)(model, objective, config, seed)
    sampler = Sampler(task, config.batch_size, seed)
    checkpoint = checkpoint or Checkpoint()
    history = checkpoint.load()
    for _ in history:  # the draws of the steps that are done
        loop.draw(sampler)
    if history:
        loop.resume(checkpoint, history)
    for done in range(len(history), config.steps):
        loop.begin(history)
        forgotten, retained = loop.step(loop.draw(sampler), done)
        choice = forgetting_level(
            lambda: [loop.outcome()],
            task,
            config.stop_at,
            done,
            on_look if loop.may_end else None,
        )
        history.append(StepRecord(forgotten, retained, choice=choice))
        if on_step:
            on_step(done + 1, config.steps, history[-1])
        if loop.ends(choice):
            break
        if checkpoint.is_due():
            checkpoint.save(history, loop.tensors())
    return Unlearned(loop.outcome(), history, len(history))
