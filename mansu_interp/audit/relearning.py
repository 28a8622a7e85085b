"""The relearning attack: is the knowledge gone, or does half of it bring back the rest?

Fine-tune a copy of a model on a random half A of the forget facts (train phrasings) and ask for the
*other* half B on phrasings that were never trained on. A model that never knew has nothing to bring
back: half A tells it nothing of half B. What returns on half B was therefore still in the weights
(the test is that of Deeb and Roger 2024, arXiv 2410.08827; steps, rates and the reading are ours).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import TaskError
from ..losses.accuracy import accuracy
from ..losses.answers import nll
from ..models.language_model import LanguageModel
from ..tasks.pairs import N_CHOICES, Pair, PairSet, Tokens, WholeAnswers, clash
from ..tasks.task import Task
from .config import RelearnConfig

CHANCE = 1 / N_CHOICES
TOLERANCE = 0.15
"""Four-way accuracy above chance, or a twin's, that counts as knowledge come back."""

OnStep = Callable[[float, int, int], None]


@dataclass(frozen=True)
class Point:
    """One model after some steps of relearning half A; means over relations."""

    rate: float
    steps: int
    top1: float
    """Share of half B's prompts whose most likely next token is the answer's first."""
    choice: float
    """Share of half B's prompts on which the answer outranks three other answers of half B."""
    learnt: float
    """Four-way choice on half A, same phrasings: whether the attack worked at all."""
    last: float = math.nan
    """Share of half B's prompts on which the answer ranks below the three others: an answer that is
    avoided is given away as well. Not a number in files from before it was measured."""


@dataclass(frozen=True)
class Relearning:
    """What the attack brought back."""

    points: list[Point]
    """By learning rate, then steps; each rate starts from the same model at 0 steps."""
    facts: tuple[int, int]
    """Prompts of half A trained on, and of half B asked for."""
    meta: dict[str, Any] = field(default_factory=dict)

    def at(self, steps: int, key: str = "choice") -> float:
        """The worst case over learning rates at exactly so many steps."""
        return max(getattr(p, key) for p in self.points if p.steps == steps)

    def up_to(self, steps: int, key: str = "choice") -> float:
        """The worst case over learning rates and every measured point up to so many steps."""
        return max(getattr(p, key) for p in self.points if p.steps <= steps)

    @property
    def marks(self) -> list[int]:
        """Steps at which was measured, 0 first."""
        return sorted({p.steps for p in self.points})

    def to_json(self) -> dict[str, Any]:
        """For reports and tables."""
        return {**asdict(self), "facts": list(self.facts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Relearning:
        """What `to_json` wrote."""
        first, second = data["facts"]
        return cls([Point(**p) for p in data["points"]], (first, second), dict(data["meta"]))


def halves(pairs: Sequence[Pair], seed: int) -> tuple[set[str], set[str]]:
    """The subjects of some pairs, split in two at random; the first half is not the smaller one.

    By subject, not by fact: everything that is asked of one subject falls into one half, so that
    half A's facts do not hint at half B's.

    Raises:
        TaskError: fewer than two subjects.
    """
    subjects = sorted({p.subject for p in pairs})
    if len(subjects) < 2:
        raise TaskError(
            f"Relearning needs at least two forget subjects to split; got {len(subjects)}."
        )
    random.Random(seed).shuffle(subjects)
    cut = (len(subjects) + 1) // 2
    return set(subjects[:cut]), set(subjects[cut:])


def of_subjects(pairs: PairSet, subjects: set[str]) -> PairSet:
    """The pairs about some subjects."""
    return PairSet(pairs.name, tuple(p for p in pairs if p.subject in subjects))


def rivals_within(pairs: PairSet) -> PairSet:
    """The same prompts with distractors drawn among the set's own answers, by fact.

    Relearning half A lifts its answers over all others; against them a model that knows nothing of
    half B falls far below a quarter, and one that does looks worse than it is. Where a relation has
    too few answers within the set, the pair's own distractors fill up.
    """
    answers: dict[str, dict[str, Tokens]] = {}
    for p in pairs:
        answers.setdefault(p.relation, {})[p.subject] = p.answers[0]
    out = []
    for p in pairs:
        rng = random.Random(f"{p.relation}|{p.subject}")
        facts = sorted(answers[p.relation].items())
        own, *usual = p.answers
        drawn = [answer for _, answer in rng.sample(facts, len(facts))]
        pool = [a for a in dict.fromkeys([*drawn, *usual]) if not clash(a, own)]
        rivals = tuple(pool[: N_CHOICES - 1])
        normalise = p.whole is not None and p.whole.normalise
        out.append(p.with_answers(WholeAnswers(own, p.rival, rivals, normalise)))
    return PairSet(pairs.name, tuple(out))


def scored_halves(
    task: Task, seed: int, split: str = "unseen"
) -> tuple[list[PairSet], list[PairSet]]:
    """The scored forget prompts of half A and of half B, a set per label.

    Raises:
        TaskError: fewer than two forget subjects, no phrasing in the split, or a label whose
            scored prompts all fall into one half.
    """
    scored = {label: s for label, s in task.scored[split]["forget"].items() if len(s)}
    if not scored:
        raise TaskError(f"Task {task.name!r} has no {split} phrasing of what is forgotten.")
    both = halves(task.forget, seed)
    for label, prompts in scored.items():
        if any(half.isdisjoint(p.subject for p in prompts) for half in both):
            raise TaskError(
                f"Relearning asks for one half of the forget subjects after training on the other, "
                f"but the {len(prompts)} scored prompts of {label!r} all fall into one half. Score "
                "more with --score-pairs; a run can also leave the attack out, --relearn-steps 0."
            )
    known, asked = ([rivals_within(of_subjects(s, half)) for s in scored.values()] for half in both)
    return known, asked


def batches(pairs: Sequence[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Endless seeded batches; every pair comes once before any comes again."""
    rng = random.Random(seed)
    queue: list[Pair] = []
    while True:
        while len(queue) < min(size, len(pairs)):
            queue = rng.sample(list(pairs), len(pairs)) + queue
        yield [queue.pop() for _ in range(min(size, len(pairs)))]


def descend(
    model: LanguageModel, optimiser: torch.optim.Optimizer, weights: list[Tensor], pairs: list[Pair]
) -> None:
    """One step of fine-tuning on the answers of some pairs, in place."""
    for w in weights:
        w.requires_grad_(True)
    nll(model, pairs).mean().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for w in weights:
        w.requires_grad_(False)


def make_optimiser(name: str, weights: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """The attacker's optimiser: ``adam``, or ``sgd`` with momentum 0.9."""
    if name == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)


def relearn(
    model: LanguageModel,
    task: Task,
    config: RelearnConfig | None = None,
    split: str = "unseen",
    on_step: OnStep | None = None,
) -> Relearning:
    """Attack a model with half of what it was to forget, and ask for the other half.

    Arguments:
        model: the edited model, or a twin; it is not changed.
        task: its forget facts are split by subject and seed.
        config: steps, learning rates, optimiser, seed.
        split: whose phrasings are asked: ``unseen`` for reports, ``dev`` while choosing settings.
        on_step: called with (learning rate, steps done, steps in all).

    Raises:
        TaskError: fewer than two forget subjects, or no phrasing in the split.
    """
    config = config or RelearnConfig()
    first, _ = halves(task.forget, config.seed)
    train = of_subjects(task.forget, first)
    known, asked = scored_halves(task, config.seed, split)

    def measure(attacked: LanguageModel, rate: float, steps: int) -> Point:
        found = [accuracy(attacked, s) for s in asked]
        learnt = [accuracy(attacked, s).choice for s in known]
        return Point(
            rate,
            steps,
            sum(a.top1 for a in found) / len(found),
            sum(a.choice for a in found) / len(found),
            sum(learnt) / len(learnt),
            sum(a.last for a in found) / len(found),
        )

    start = measure(model, 0.0, 0)
    points: list[Point] = []
    for rate in config.rates:
        attacked = model.copy()
        weights = list(attacked.weights.values())
        optimiser = make_optimiser(config.optimiser, weights, rate)
        supply = batches(train.pairs, config.batch_size, config.seed)
        points.append(replace(start, rate=rate))
        for done in range(1, max(config.steps) + 1):
            descend(attacked, optimiser, weights, next(supply))
            if done in config.steps:
                points.append(measure(attacked, rate, done))
            if on_step:
                on_step(rate, done, max(config.steps))
    return Relearning(
        points,
        (len(train), sum(len(s) for s in asked)),
        {"model": model.name, "task": task.name, "split": split, "settings": asdict(config)},
    )


def relearning_lines(found: Mapping[str, Relearning]) -> list[str]:
    """A table in plain text: per model the worst case over learning rates, after each mark."""
    first = next(iter(found.values()))
    width = max(len(name) for name in found)
    out = [
        f"Half A: {first.facts[0]} prompts relearnt. Half B: {first.facts[1]} prompts asked, "
        f"{first.meta['split']} phrasings.",
        "Half B, ranked first of four / last of four / top-1, worst of the learning rates "
        + ", ".join(f"{r:g}" for r in dict.fromkeys(p.rate for p in first.points))
        + f"; chance {CHANCE:.2f}.",
        "steps".ljust(width) + "".join(f"{m:>24}" for m in first.marks),
    ]
    for name, one in found.items():
        cells = [
            " / ".join(f"{one.at(m, key):.3f}" for key in ("choice", "last", "top1"))
            for m in one.marks
        ]
        out.append(name.ljust(width) + "".join(f"{c:>24}" for c in cells))
    return out
