"""Adversarial relearning: each step also unlearns what relearning would bring back.

1. Copy the model, and relearn a random half A of the forget subjects there, for a random number of
   steps at a random rate.
2. Take the gradient of a forget loss on the other half B *at the relearned point*, and apply it to
   the model before the relearning: first order, as in Reptile and TAR (arXiv 2408.00761).

The loss, the ranking among half B's answers, is ours (see `ranking_loss`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ...audit.relearning import batches, descend, halves, make_optimiser, of_subjects
from ...losses.counterfactual import CounterfactualTargets, model_answer_excess
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, PairSet, answer_tokens
from ...tasks.task import Task
from ..methods import Mansu
from ..training import arithmetic, mean_gradient

SPREAD = 3.0
"""The rate is drawn log-uniformly within this factor of `Mansu.adversarial_lr`."""


def ranking_loss(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    answers: dict[str, Tensor],
    margin: float,
) -> Float[Tensor, ""]:
    """Mean |`answer_excess` + margin| among half B's answers, in nats.

    Among half B's answers alone: relearning lifts half A's above all of them whether or not the
    model knows half B, and a loss that counted them would see forgetting where there is none.
    """
    return (model_answer_excess(model, pairs, targets, answers) + margin).abs().mean()


@dataclass(frozen=True)
class Attack:
    """The draws of one relearning attack."""

    train: PairSet
    """The half that is relearnt."""
    unseen: list[Pair]
    """The other half."""
    chosen: list[Pair]
    """Those of it that give the gradient."""
    steps: int
    rate: float
    seed: int
    """Of the order of batches."""


class AdversarialRelearning:
    """Seeded relearning attacks on copies of a model, and the gradients that resist them.

    Arguments:
        task: whose forget subjects are split in halves.
        config: steps, rate, batch size and margin.
        seed: of the draws.
    """

    def __init__(self, task: Task, config: Mansu, seed: int = 0) -> None:
        self.task, self.config = task, config
        self.rng = random.Random(f"attack {seed}")

    def draw(self) -> Attack:
        """The next attack."""
        rng, config = self.rng, self.config
        first, second = halves(self.task.forget, rng.getrandbits(32))
        steps = rng.randint(0, config.adversarial_steps)
        rate = config.adversarial_lr * SPREAD ** rng.uniform(-1, 1)
        seed = rng.getrandbits(32)
        unseen = list(of_subjects(self.task.forget, second))
        chosen = rng.sample(unseen, min(config.batch_size, len(unseen)))
        return Attack(of_subjects(self.task.forget, first), unseen, chosen, steps, rate, seed)

    def relearned(self, student: LanguageModel, attack: Attack) -> LanguageModel:
        """A copy that relearned half A."""
        copy = student.copy()
        weights = list(copy.weights.values())
        optimiser = make_optimiser("adam", weights, attack.rate)
        supply = batches(attack.train.pairs, self.config.batch_size, attack.seed)
        for _ in range(attack.steps):
            with arithmetic(copy, self.config.precision):
                descend(copy, optimiser, weights, next(supply))
        return copy

    def gradient(
        self,
        student: LanguageModel,
        names: Sequence[str],
        targets: CounterfactualTargets,
    ) -> tuple[list[Tensor], float]:
        """Gradient at a relearned point with respect to some weights, and the loss there (nats)."""
        attack = self.draw()
        copy = self.relearned(student, attack)
        among = answer_tokens(attack.unseen, student.device)

        def loss(part: list[Pair]) -> Tensor:
            with arithmetic(copy, self.config.precision):
                return ranking_loss(copy, part, targets, among, self.config.training_margin)

        return mean_gradient(copy, names, attack.chosen, loss)
