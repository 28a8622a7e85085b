"""The probe penalty: each step also unlearns what a linear probe reads from the states. Ours.

1. Fit probes on the states of a random half A of the forget subjects, at the last token and at the
   subject's (`fit_probe`).
2. Take the gradient of what they read of the other half B from the model's own states, the probes
   held fixed.

Fine-tuning finds what the model can still use; a probe also finds what the states hold unused.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...audit.probes import answer_rows, fit_probe, last_states
from ...audit.relearning import halves, of_subjects
from ...losses.gradients import Elements
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, PairSet, answer_tokens
from ...tasks.task import Task
from ..training import mean_gradient


def z_scores(
    read: Float[Tensor, "batch d_model"],
    pairs: Sequence[Pair],
    rows: Float[Tensor, "vocab d_model"],
    among: dict[str, Tensor],
) -> Float[Tensor, " batch"]:
    """Standard deviations by which the right answer's score lies above the mean of its relation's
    answers."""
    found = torch.zeros(len(pairs), device=read.device)
    own = (rows[[p.answer for p in pairs]] * read).sum(1)
    for relation, tokens in among.items():
        of = torch.tensor([k for k, p in enumerate(pairs) if p.relation == relation])
        of = of.to(read.device)
        scores = read[of] @ rows[tokens].T
        spread = scores.std(1, correction=0) + 1e-6
        found = found.index_put((of,), (own[of] - scores.mean(1)) / spread)
    return found


@dataclass(frozen=True)
class Reading:
    """The draws of one probe."""

    train: PairSet
    """The half that the probe is fitted on."""
    unseen: list[Pair]
    """The other half."""
    chosen: list[Pair]
    """Those of it that give the gradient."""


class ProbePenalty:
    """Seeded probes of a model, and the gradients against them.

    Arguments:
        task: whose forget subjects are split in halves.
        batch_size: prompts that give each gradient.
        seed: of the draws.
    """

    def __init__(self, task: Task, batch_size: int, seed: int = 0) -> None:
        self.task, self.batch_size = task, batch_size
        self.rng = random.Random(f"probe {seed}")

    def draw(self) -> Reading:
        """The next split."""
        first, second = halves(self.task.forget, self.rng.getrandbits(32))
        unseen = list(of_subjects(self.task.forget, second))
        chosen = self.rng.sample(unseen, min(self.batch_size, len(unseen)))
        return Reading(of_subjects(self.task.forget, first), unseen, chosen)

    def gradient(self, student: LanguageModel, of: Elements) -> tuple[list[Tensor], float]:
        """Gradient of what a probe reads at some elements of the weights, and its value: the mean
        over prompts, stages and both positions of max(0, `z_scores`)."""
        drawn = self.draw()
        rows, probes = answer_rows(student), fit_probe(student, drawn.train, subject=True)
        among = answer_tokens(drawn.unseen, student.device)

        def loss(part: list[Pair]) -> Tensor:
            read = [
                z_scores(probe(x), part, rows, among).relu().mean()
                for probe, x in zip(probes, last_states(student, part, True), strict=True)
            ]
            return torch.stack(read).mean()

        return mean_gradient(student, of, drawn.chosen, loss)
