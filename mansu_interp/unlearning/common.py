"""What all unlearning methods share: settings, batches, the retain loss and the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UnlearnConfig
from ..models import LanguageModel
from ..objectives import divergence
from ..tasks import Pair, Task, collate

OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass
class Unlearned:
    """What an unlearning method returns."""

    model: LanguageModel
    """The edited copy."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Losses per step (nats)."""
    stopped_at: int = 0
    """Steps taken."""


class Sampler:
    """Seeded batches of forget pairs, retain and guard pairs, and running text."""

    TEXT_TOKENS = 64
    TEXT_ROWS = 2

    def __init__(self, task: Task, config: UnlearnConfig) -> None:
        self.task, self.size = task, config.batch_size
        self.rng = random.Random(config.seed)
        self.queue: list[Pair] = []
        self.by_relation: list[list[Pair]] = []
        for pairs in (task.retain, task.guard):
            groups: dict[str, list[Pair]] = {}
            for pair in pairs or ():
                groups.setdefault(pair.relation, []).append(pair)
            self.by_relation += groups.values()

    def forget(self) -> list[Pair]:
        """The next forget batch; every pair comes once before any comes again."""
        while len(self.queue) < self.size:
            self.queue += self.rng.sample(self.task.forget.pairs, len(self.task.forget))
        batch, self.queue = self.queue[: self.size], self.queue[self.size :]
        return batch

    def retain(self) -> list[Pair]:
        """Retain and guard pairs, every relation alike."""
        return [self.rng.choice(self.rng.choice(self.by_relation)) for _ in range(self.size)]

    def text(self) -> Tensor | None:
        """A few windows of running text, or None if the task has none."""
        paragraphs = [t for t in self.task.text.get("train", ()) if len(t) >= self.TEXT_TOKENS]
        if not paragraphs:
            return None
        rows = self.rng.sample(paragraphs, min(self.TEXT_ROWS, len(paragraphs)))
        return torch.tensor([r[: self.TEXT_TOKENS] for r in rows])


def retain_kl(
    student: LanguageModel,
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    text: Tensor | None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats on retain prompts, plus that on running text."""
    batch = collate(pairs)
    with torch.no_grad():
        want = teacher.last_logits(batch.clean, batch.last)
    loss = divergence(student.last_logits(batch.clean, batch.last), want)
    if text is not None:
        with torch.no_grad():
            want = teacher.all_logits(text)
        loss = loss + divergence(student.all_logits(text), want)
    return loss
