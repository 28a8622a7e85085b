"""Hardening against relearning: the attack inside the loop.

Each step copies the model, relearns a random half A of the forget subjects there for a random
number of steps at a random rate, and takes the gradient of the forget loss on the other half B *at
the relearned point*; first order, as in Reptile and TAR (arXiv 2408.00761): that gradient is
applied to the model before the attack. What is pushed down is thus not what the model says, but
what half A would bring back. The loss, the ranking among half B's answers, is ours (see
`ranking_loss`).
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
from ..config import UnlearnConfig
from ..training import arithmetic, mean_gradient

SPREAD = 3.0
"""The attack's rate is drawn log-uniformly within this factor of `UnlearnConfig.adversarial_lr`."""


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
    """What is drawn of one attack."""

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
    """Seeded relearning attacks on copies of a model, and the gradients that resist them."""

    def __init__(self, task: Task, config: UnlearnConfig) -> None:
        self.task, self.config = task, config
        self.rng = random.Random(f"attack {config.seed}")

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

    def attacked(self, student: LanguageModel, attack: Attack) -> LanguageModel:
        """A relearned copy."""
        victim = student.copy()
        weights = list(victim.weights.values())
        optimiser = make_optimiser("adam", weights, attack.rate)
        supply = batches(attack.train.pairs, self.config.batch_size, attack.seed)
        for _ in range(attack.steps):
            with arithmetic(victim, self.config):
                descend(victim, optimiser, weights, next(supply))
        return victim

    def gradient(
        self,
        student: LanguageModel,
        names: Sequence[str],
        targets: CounterfactualTargets,
    ) -> tuple[list[Tensor], float]:
        """Gradient at a relearned point with respect to some weights, and the loss there (nats)."""
        attack = self.draw()
        victim = self.attacked(student, attack)
        among = answer_tokens(attack.unseen, student.device)

        def loss(part: list[Pair]) -> Tensor:
            with arithmetic(victim, self.config):
                return ranking_loss(victim, part, targets, among, self.config.training_margin)

        return mean_gradient(victim, names, attack.chosen, loss)
