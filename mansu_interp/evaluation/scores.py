"""Accuracy of several models on the sets of a task, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..audit.relearning import CHANCE
from ..losses.accuracy import accuracy, perplexity
from ..models.language_model import LanguageModel
from ..tasks.pairs import PairSet
from ..tasks.task import Task

QUANTIZER = "nf4"
"""Every run is scored after it, beside those that its edit is to survive."""

ORIGINAL, EDITED = "original", "unlearned"
"""Names of the models that are compared; a quantizer's name is appended."""


@dataclass(frozen=True)
class Flips:
    """Prompts on which two models differ: has something come back, or is it chance?"""

    back: int
    """Prompts whose answer ranks first of four in the second model alone."""
    gone: int
    """In the first model alone."""
    p: float
    """Probability of a split at least so uneven if either way were as likely (two-sided sign test,
    which takes the prompts for independent; those that ask for one fact are not)."""

    @classmethod
    def between(cls, before: Sequence[bool], after: Sequence[bool]) -> Flips:
        """Count what changed, prompt by prompt."""
        back = sum(b > a for a, b in zip(before, after, strict=True))
        gone = sum(b < a for a, b in zip(before, after, strict=True))
        n = back + gone
        tail = sum(math.comb(n, k) for k in range(min(back, gone) + 1)) / 2**n
        return cls(back, gone, min(1.0, 2 * tail))


@dataclass(frozen=True)
class Scores:
    """Accuracies of several models on one task."""

    rows: list[dict[str, Any]]
    """One per (role, label): ``n``, ``chance`` of choice, ``chance_top1`` and ``models`` -> top1,
    choice."""
    perplexity: dict[str, float] | None
    """Per model, on unseen running text; None if the task has none."""
    first: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    """Per model, on which forget prompts the answer ranks first of four."""

    def beside(self, other: Scores) -> Scores:
        """The same sets' scores, with those of another's models."""
        rows = [
            {**mine, "models": mine["models"] | theirs["models"]}
            for mine, theirs in zip(self.rows, other.rows, strict=True)
        ]
        found = {**(self.perplexity or {}), **(other.perplexity or {})}
        return Scores(rows, found or None, self.first | other.first)

    def worst(self, role: str, key: str, model: str) -> float:
        """The largest score of a model over the sets of a role."""
        return max(r["models"][model][key] for r in self.rows if r["role"] == role)

    def mean(self, role: str, key: str, model: str) -> float:
        """The mean score of a model over the sets of a role."""
        values = [r["models"][model][key] for r in self.rows if r["role"] == role]
        return sum(values) / len(values)

    def chance_top1(self, role: str) -> float:
        """Of a guess among a relation's answers, mean over the sets of a role; 0 in scores of older
        versions, which do not have it."""
        values = [r.get("chance_top1", 0.0) for r in self.rows if r["role"] == role]
        return sum(values) / len(values)

    def largest_fall(self, role: str, model: str, reference: str) -> float:
        """The most that top-1 or choice of a set fell below a reference's; 0 without sets, and
        where all gained."""
        falls = [
            r["models"][reference][k] - r["models"][model][k]
            for r in self.rows
            if r["role"] == role
            for k in ("top1", "choice")
        ]
        return max(0.0, *falls) if falls else 0.0


def evaluate(
    models: Mapping[str, LanguageModel],
    task: Task,
    split: str = "unseen",
    on_step: Callable[[str, int, int], None] | None = None,
    role: str | None = None,
) -> Scores:
    """Score models on every set of a split.

    Arguments:
        models: name -> model, e.g. original, original nf4, unlearned, unlearned nf4.
        task: the task, tokenized for these models.
        split: ``unseen`` for reports, ``dev`` while choosing settings.
        on_step: called with (what, sets done, sets in all).
        role: score its sets alone, and no perplexity.
    """
    every = [(of, label, s) for of, by in task.scored[split].items() for label, s in by.items()]
    guess = _guess([s for *_, s in every])
    sets = [x for x in every if role in (None, x[0])]
    rows: list[dict[str, Any]] = [
        {
            "role": of,
            "label": label,
            "n": len(s),
            "chance": CHANCE,
            "chance_top1": sum(guess[p.relation] for p in s) / len(s),
            "models": {},
        }
        for of, label, s in sets
    ]
    first: dict[str, tuple[bool, ...]] = dict.fromkeys(models, ())
    total = len(sets) * len(models)
    for m, (name, model) in enumerate(models.items()):
        for k, (of, _, pairs) in enumerate(sets):
            result = accuracy(model, pairs)
            if of == "forget":
                first[name] += result.first
            rows[k]["models"][name] = {"top1": result.top1, "choice": result.choice}
            if on_step:
                on_step(f"scores of {name}", m * len(sets) + k + 1, total)
    text = task.text.get(split) or task.text.get("unseen") if role is None else None
    values = {n: perplexity(m, text) for n, m in models.items()} if text else None
    return Scores(rows, values, first)


def _guess(sets: Sequence[PairSet]) -> dict[str, float]:
    """Relation -> how often one of its answers, drawn evenly, is right; 0 where it has only one,
    of which saying it says nothing."""
    answers: dict[str, set[str]] = {}
    for pair in (p for pairs in sets for p in pairs):
        answers.setdefault(pair.relation, set()).add(pair.answer_text)
    return {k: 1 / len(a) if len(a) > 1 else 0.0 for k, a in answers.items()}
