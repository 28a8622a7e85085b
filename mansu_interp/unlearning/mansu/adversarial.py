"""Adversarial relearning: each step also unlearns what relearning would bring back.

1. Begin an attack: copy the model, to relearn a random half A of the forget subjects there at a
   random rate.
2. In each step the attack goes `STRIDE` relearning steps further. What the step before has changed
   in the model is changed in the attacked copy, too, so that one attack serves many steps, and each
   sees another depth of it.
3. Take the gradient of a forget loss on the other half B *at the relearned point*, and apply it to
   the model before the relearning: first order, as in Reptile and TAR (arXiv 2408.00761).
4. After ``adversarial_steps`` relearning steps another attack begins, on the next of the models
   that take turns.

The loss, the ranking among half B's answers, and the attack that is kept up are ours (see
`ranking_loss`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ...audit.relearning import batches, halves, of_subjects
from ...losses.answers import nll
from ...losses.counterfactual import CounterfactualTargets, model_answer_excess
from ...losses.descent import descend, make_optimisers
from ...losses.gradients import Positions
from ...models.language_model import LanguageModel
from ...models.load import is_small
from ...tasks.pairs import Pair, answer_tokens
from ...tasks.task import Task
from ...utils.distributed import cores, world_size
from ..methods import Mansu
from ..training import arithmetic, mean_gradient

SPREAD = 3.0
"""The rate is drawn log-uniformly within this factor of `Mansu.adversarial_lr`."""
STRIDE = 6
"""Relearning steps between two gradients of one attack; with two, successive gradients are too much
alike (research/erasure.md)."""


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


@dataclass
class Attack:
    """A relearning attack under way."""

    copy: LanguageModel
    """What has relearned half A so far."""
    of: Positions
    """Those elements of the weights that unlearning edits."""
    before: dict[str, Tensor]
    """Their values in the attacked model when they were last looked at."""
    descend: Callable[[list[Pair]], None]
    """Takes a step of relearning some pairs in the copy."""
    supply: Iterator[list[Pair]]
    """Batches of half A."""
    unseen: list[Pair]
    """Half B."""
    among: dict[str, Tensor]
    """Its answers, among which each ranks."""

    @torch.no_grad()
    def follow(self, student: LanguageModel) -> None:
        """Change in the copy what was changed in the attacked model since."""
        for name, old in self.before.items():
            new = student.weights[name].flatten()[self.of[name]].float()
            self.copy.weights[name].view(-1)[self.of[name]] += new - old
            old.copy_(new)


Found = tuple[list[Tensor], float]
"""A gradient at some elements of the weights, and the loss there (nats)."""


def two_at_once(model: LanguageModel) -> bool:
    """Whether two passes through a model are quicker side by side, in a thread each: it is small,
    and a second core is there."""
    return is_small(model) and world_size() == 1 and cores() > 1


def descent(copy: LanguageModel, rate: float) -> Callable[[list[Pair]], None]:
    """The attacker's steps, by Adam. A small model takes each in one call for all weights; of
    another each weight takes it by itself (`descend`), for memory."""
    if not is_small(copy):
        return partial(descend, copy, make_optimisers("adam", copy, rate))
    weights = list(copy.weights.values())
    adam = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)

    def step(pairs: list[Pair]) -> None:
        for w in weights:
            w.requires_grad_(True)
        nll(copy, pairs).mean().backward()
        adam.step()
        for w in weights:
            w.requires_grad_(False).grad = None

    return step


class AdversarialRelearning:
    """Seeded relearning attacks on copies of a model, and the gradients that resist them.

    Arguments:
        task: whose forget subjects are split in halves.
        config: steps, rate, batch size and margin.
        seed: of the draws, which depend on it and on the step alone.
    """

    def __init__(self, task: Task, config: Mansu, seed: int = 0) -> None:
        self.task, self.config, self.seed = task, config, seed
        self.attack: Attack | None = None
        self.thread = ThreadPoolExecutor(1, "attack", torch.set_num_threads, (1,))

    @property
    def length(self) -> int:
        """Steps of unlearning that one attack serves."""
        return max(1, -(-self.config.adversarial_steps // STRIDE))

    def between(self, done: int) -> bool:
        """Whether no attack is under way after so many steps."""
        return done % self.length == 0

    def begin(self, student: LanguageModel, of: Positions, index: int) -> Attack:
        """The attack of some number on a model."""
        config, rng = self.config, random.Random(f"attack {self.seed} {index}")
        first, second = halves(self.task.forget, rng.getrandbits(32))
        rate = config.adversarial_lr * SPREAD ** rng.uniform(-1, 1)
        train = of_subjects(self.task.forget, first).pairs
        copy, unseen = student.trainable_copy(), list(of_subjects(self.task.forget, second))
        return Attack(
            copy=copy,
            of=of,
            before={n: student.weights[n].flatten()[i].float() for n, i in of.items()},
            descend=descent(copy, rate),
            supply=batches(train, config.batch_size, rng.getrandbits(32)),
            unseen=unseen,
            among=answer_tokens(unseen, copy.device),
        )

    def gradient(
        self,
        students: Sequence[LanguageModel],
        of: Positions,
        targets: Sequence[CounterfactualTargets],
        done: int,
    ) -> Callable[[], Found]:
        """Begin to compute the gradient at a relearned point; the call of what comes back ends it.

        In between the models may be computed with, but their weights may not change. Where it is
        quicker, a thread of its own does the work meanwhile (`two_at_once`), with the same result.

        Arguments:
            students: models of which the first are attacked in turns.
            of: the elements that unlearning edits, by weight.
            targets: what each of these should predict.
            done: steps of unlearning before this one; each is asked for once, in order.
        """
        index, begun = divmod(done, self.length)
        side = index % len(targets)
        if self.attack is None or not begun:
            self.attack = None  # freed before the next one is made
            self.attack = self.begin(students[side], of, index)
        self.attack.follow(students[side])
        further = min(STRIDE, self.config.adversarial_steps - begun * STRIDE)
        found = partial(self.relearn, self.attack, targets[side], further, done)
        return self.thread.submit(found).result if two_at_once(students[side]) else found

    def relearn(
        self, attack: Attack, targets: CounterfactualTargets, further: int, done: int
    ) -> Found:
        """Take an attack some steps further, and the gradient of the forget loss there."""
        config = self.config
        for _ in range(further):
            with arithmetic(attack.copy, config.precision):
                attack.descend(next(attack.supply))
        some = min(config.batch_size, len(attack.unseen))
        chosen = random.Random(f"chosen {self.seed} {done}").sample(attack.unseen, some)

        def loss(part: list[Pair]) -> Tensor:
            with arithmetic(attack.copy, config.precision):
                return ranking_loss(
                    attack.copy, part, targets, attack.among, config.training_margin
                )

        return mean_gradient(attack.copy, attack.of, chosen, loss)
