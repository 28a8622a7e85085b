"""Accuracy of several models on the sets of a task, side by side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..audit.known import CHANCE, beyond_guesses, p_of_guess
from ..errors import ModelError, TaskError
from ..losses.accuracy import Accuracy, accuracy, perplexity
from ..models.language_model import LanguageModel
from ..tasks.pairs import PairSet, Tokens
from ..tasks.task import Task
from ..utils.ranges import entrance, expect_values
from ..utils.records import Keep, make_anew
from ..utils.words import Shown, p_value
from .versions import ModelVersion

Metric = Literal["top1", "choice"]
METRICS: tuple[Metric, ...] = ("top1", "choice")
"""The model's most likely token is the answer's; the answer ranks first of four."""
WORDS: dict[Metric, str] = {"top1": "top-1", "choice": "four-way"}
"""The same in sentences."""


def sign_test(above: int, below: int) -> float:
    """Two-sided p of a split at least so uneven, if either side were as likely."""
    n, least = above + below, min(above, below)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


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

    def __str__(self) -> str:
        return f"{self.back} back, {self.gone} gone, {p_value(self.p)}"

    @classmethod
    def between(cls, before: Sequence[bool], after: Sequence[bool]) -> Flips:
        """Count what changed, prompt by prompt."""
        back = sum(b > a for a, b in zip(before, after, strict=True))
        gone = sum(b < a for a, b in zip(before, after, strict=True))
        return cls(back, gone, sign_test(back, gone))


@dataclass(frozen=True)
class Score:
    """Accuracy of one model on one set."""

    model: ModelVersion
    top1: float
    """Share of prompts whose most likely next token is the answer's first."""
    choice: float
    """Share of prompts on which the answer outranks three other answers."""
    last: float | None = None
    """Share of prompts on which all three outrank the answer; chance is 0.25. None: not measured
    (files of older versions)."""

    def value(self, metric: Metric) -> float:
        """top1 or choice."""
        return self.top1 if metric == "top1" else self.choice


@dataclass(frozen=True)
class ScoreRow:
    """Accuracies of all models on one set."""

    role: str
    """forget, neighbour or retain."""
    label: str
    n: int
    """Prompts."""
    chance: float
    """Four-way choice of a guess."""
    chance_top1: float
    """Top-1 of a guess among the answers of a prompt's relation."""
    scores: tuple[Score, ...]
    """One per model."""
    facts: int = 0
    """Different facts that the prompts ask for; 0: not known (files of older versions)."""

    def p_of_guess(self, model: ModelVersion) -> float:
        """Probability that guesses choose as well among four as a model does (`p_of_guess`)."""
        return p_of_guess(self[model].choice, self.facts or self.n, self.n)

    def knows(self, model: ModelVersion) -> bool:
        """Whether a model chooses better than guesses would."""
        score = self[model]
        return beyond_guesses(score.choice, score.top1, self.facts or self.n, self.n)

    def __getitem__(self, model: ModelVersion) -> Score:
        """A model's score.

        Raises:
            KeyError: it was not scored.
        """
        for score in self.scores:
            if score.model == model:
                return score
        raise KeyError(f"{model} was not scored; known: {', '.join(map(str, self.models))}.")

    @property
    def models(self) -> tuple[ModelVersion, ...]:
        """Who was scored, in that order."""
        return tuple(s.model for s in self.scores)


@dataclass(frozen=True)
class Perplexity:
    """exp of a model's mean loss per token of running text."""

    model: ModelVersion
    value: float | None
    """None: not finite."""


@dataclass(frozen=True)
class Fall:
    """By how much a score fell, and which."""

    by: float
    label: str = ""
    """Of the set; empty: none fell."""
    metric: Metric = "choice"
    model: ModelVersion | None = None
    """Whose score it is."""

    def __str__(self) -> str:
        at = f", {self.model.quantizer}" if self.model and self.model.quantizer else ""
        return f"{self.label} ({WORDS[self.metric]}{at}) fell by {self.by:.3f}"


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """Accuracies of several models on one task."""

    rows: tuple[ScoreRow, ...]
    """One per (role, label)."""
    perplexity: tuple[Perplexity, ...] = ()
    """One per model, on unseen running text; empty if the task has none."""
    right: dict[ModelVersion, dict[Metric, tuple[bool, ...]]] = field(default_factory=dict)
    """Per model, on which forget prompts it is right."""
    counted: dict[tuple[ModelVersion, Metric], Flips] = field(default_factory=dict)
    """Per model, how it differs from the same model in full precision, where the prompts themselves
    are not at hand any more."""

    def told(self) -> dict[str, object]:
        """For its short form: four-way accuracy and top-1."""
        roles = dict.fromkeys(row.role for row in self.rows)
        versions = dict.fromkeys(v for row in self.rows for v in row.models)
        return {
            f"{version}, {role}": f"{self.mean(role, 'choice', version):.3f} four-way, "
            f"{self.mean(role, 'top1', version):.3f} top-1"
            for role in roles
            for version in versions
            if all(version in row.models for row in self.of_role(role))
        }

    def beside(self, other: Scores) -> Scores:
        """The same sets' scores, with those of another's models (which replace the same ones)."""
        rows = tuple(
            replace(mine, scores=_merged(mine.scores, theirs.scores))
            for mine, theirs in zip(self.rows, other.rows, strict=True)
        )
        return Scores(
            rows,
            _merged(self.perplexity, other.perplexity),
            self.right | other.right,
            self.counted | other.counted,
        )

    def flips(self, before: ModelVersion, after: ModelVersion, metric: Metric) -> Flips | None:
        """On which forget prompts two models differ; None where that is not known."""
        if before in self.right and after in self.right:
            return Flips.between(self.right[before][metric], self.right[after][metric])
        return self.counted.get((after, metric)) if before == after.after(None) else None

    def of_role(self, role: str) -> list[ScoreRow]:
        """The rows of forget, neighbour or retain."""
        return [r for r in self.rows if r.role == role]

    def worst(self, role: str, metric: Metric, model: ModelVersion) -> float:
        """The largest score of a model over the sets of a role."""
        return max(r[model].value(metric) for r in self.of_role(role))

    def mean(self, role: str, metric: Metric, model: ModelVersion) -> float:
        """The mean score of a model over the sets of a role."""
        values = [r[model].value(metric) for r in self.of_role(role)]
        return sum(values) / len(values)

    def mean_last(self, role: str, model: ModelVersion) -> float | None:
        """The mean share ranked last of a model over the sets of a role; None: not measured."""
        values = [r[model].last for r in self.of_role(role)]
        known = [v for v in values if v is not None]
        return sum(known) / len(values) if known and len(known) == len(values) else None

    def chance_top1(self, role: str) -> float:
        """Of a guess among a relation's answers, mean over the sets of a role."""
        values = [r.chance_top1 for r in self.of_role(role)]
        return sum(values) / len(values)

    def largest_fall(self, role: str, pairs: Sequence[tuple[ModelVersion, ModelVersion]]) -> Fall:
        """The most that top-1 or choice of a set fell below a reference's; by 0 without sets, and
        where all gained.

        Arguments:
            role: whose sets.
            pairs: model and reference.
        """
        falls = [
            Fall(r[reference].value(metric) - r[model].value(metric), r.label, metric, model)
            for model, reference in pairs
            for r in self.of_role(role)
            for metric in METRICS
        ]
        worst = max(falls, key=lambda fall: fall.by, default=None)
        return worst if worst and worst.by > 0 else Fall(0.0)

    def perplexity_rise(self, model: ModelVersion, reference: ModelVersion) -> float:
        """Perplexity of a model over a reference's, minus 1; infinite where it is not finite."""
        values = {p.model: p.value for p in self.perplexity}
        after, before = values[model], values[reference]
        return after / before - 1 if after is not None and before else math.inf


def _merged(mine: tuple, theirs: tuple) -> tuple:
    """Records by their model, the later one for the same model."""
    return tuple({record.model: record for record in (*mine, *theirs)}.values())


@entrance(ModelError)
def evaluate(
    models: Mapping[ModelVersion, LanguageModel],
    task: Task,
    split: str = "unseen",
    on_step: Callable[[str, int, int], None] | None = None,
    role: str | None = None,
    keep: Keep = make_anew,
) -> Scores:
    """Score models on every set of a split.

    Arguments:
        models: by version, such as ``ModelVersion("unlearned", "nf4")``.
        task: the task, tokenized for these models.
        split: ``unseen`` for reports, ``dev`` while choosing settings.
        on_step: called with (what, sets done, sets in all).
        role: score its sets alone, and no perplexity.
        keep: called for every score of a model on a set, so that none need be made twice.
    """
    expect_values(ModelError, "models", models, LanguageModel, ModelVersion)
    if split not in task.scored:
        raise TaskError(f"split: got {split!r:.60}, expected {' or '.join(task.scored)}.")
    every = [(of, label, s) for of, by in task.scored[split].items() for label, s in by.items()]
    guess = _guess([s for *_, s in every])
    sets = [x for x in every if role in (None, x[0])]
    found: list[list[Score]] = [[] for _ in sets]
    right: dict[ModelVersion, dict[Metric, tuple[bool, ...]]] = {
        version: dict.fromkeys(METRICS, ()) for version in models
    }
    total = len(sets) * len(models)
    for m, (version, model) in enumerate(models.items()):
        model.check_finite()  # fused attention can make numbers of NaN
        for k, (of, label, pairs) in enumerate(sets):
            key = f"{version} on {split} {of}: {label}"
            result = keep(key, Accuracy, functools.partial(accuracy, model, pairs))
            if of == "forget":
                right[version]["top1"] += result.predicted
                right[version]["choice"] += result.first
            found[k].append(Score(version, result.top1, result.choice, result.last))
            if on_step:
                on_step(f"scores of {version}", m * len(sets) + k + 1, total)
    rows = tuple(
        ScoreRow(
            role=of,
            label=label,
            n=len(s),
            chance=CHANCE,
            chance_top1=sum(guess[p.relation] for p in s) / len(s),
            scores=tuple(found[k]),
            facts=len({p.fact for p in s}),
        )
        for k, (of, label, s) in enumerate(sets)
    )
    text = task.text.get(split) or task.text.get("unseen") if role is None else None
    values = []
    for m, (version, model) in enumerate(models.items() if text else ()):
        if on_step:
            on_step("perplexity", m, len(models))
        made = functools.partial(_perplexity, version, model, text or ())
        values.append(keep(f"perplexity of {version}, {split}", Perplexity, made))
    return Scores(rows, tuple(values), right)


def _perplexity(version: ModelVersion, model: LanguageModel, text: Sequence[Tokens]) -> Perplexity:
    value = perplexity(model, text)
    return Perplexity(version, value if math.isfinite(value) else None)


def _guess(sets: Sequence[PairSet]) -> dict[str, float]:
    """Relation -> how often one of its answers, drawn evenly, is right; 0 where it has only one,
    of which predicting it shows nothing."""
    answers: dict[str, set[str]] = {}
    for pair in (p for pairs in sets for p in pairs):
        answers.setdefault(pair.relation, set()).add(pair.answer_text)
    return {k: 1 / len(a) if len(a) > 1 else 0.0 for k, a in answers.items()}
