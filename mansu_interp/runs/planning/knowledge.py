"""What the original knows of a task, asked before long work starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...audit.known import Known, check_known, without_unknown
from ...errors import TaskError
from ...evaluation.scores import Metric, Scores, evaluate
from ...evaluation.versions import ORIGINAL
from ...models.language_model import LanguageModel
from ...quantizers.survival import quantize
from ...tasks.pairs import Pair, by_phrasing
from ...tasks.task import Fact, Task

NAMED, PHRASINGS, EXAMPLE = 12, 4, 50
"""Unknown facts, phrasings, and letters of one that a plan shows."""
RETAIN_PAIRS = 48
"""Retain prompts that are asked, drawn evenly over their phrasings: enough to tell knowledge from
guesses, and soon answered."""


@dataclass(frozen=True)
class Phrasing:
    """How well the original answers the forget facts in one phrasing."""

    example: str
    """A prompt."""
    unseen: bool
    """Whether training does not see it, and reports score it."""
    prompts: int
    choice: float
    """Share of the prompts whose answer ranks first of four; chance 0.25."""
    top1: float
    """Share whose answer is what the model predicts."""

    def line(self) -> str:
        """One line for the plan."""
        which = "unseen" if self.unseen else "trained on"
        text = self.example if len(self.example) <= EXAMPLE else f"{self.example[:EXAMPLE]}…"
        shares = f"{self.choice:.0%} first of four, {self.top1:.0%} predicted"
        return f"         {shares}: {text!r} ({which})"


@dataclass(frozen=True)
class Knowledge:
    """What the original knows of a task."""

    forget: Known
    """Of all forget facts, in their training phrasings; the unknown ones are left out."""
    retain: Known
    """Of a sample of the retain prompts."""
    scores: Scores
    """On the unseen phrasings of the forget facts left, in full precision and after each
    quantizer."""
    phrasings: tuple[Phrasing, ...] = ()
    """Of all forget facts the training phrasings, of those left the unseen ones."""

    def lines(self) -> list[str]:
        """For the plan: which facts, in which phrasings, after which quantizers."""
        names = sorted({s for _, s in self.forget.unknown})
        shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        out = [f"known    {self.forget}{f', left out: {shown}' if names else ''}"]
        worst = sorted(self.phrasings, key=lambda p: (not p.unseen, p.choice))
        out += [p.line() for p in worst[:PHRASINGS]]
        if rest := worst[PHRASINGS:]:
            out.append(
                f"         {rest[0].choice:.0%} to {rest[-1].choice:.0%} in {len(rest)} more"
            )
        rows, told = self.scores.rows, []
        for version in rows[0].models:
            share = self.scores.mean("forget", "choice", version)
            guess = "" if any(r.knows(version) for r in rows) else ", as guesses do"
            told.append(f"{share:.1%}{f' after {q}' if (q := version.quantizer) else ''}{guess}")
        out.append(f"         {', '.join(told)} of the unseen prompts")
        asked = sum(self.retain.asked.values())
        return [*out, f"retain   {self.retain.share:.1%} first of four, {asked:,} prompts sampled"]


def _asked(model: LanguageModel, pairs: Sequence[Pair]) -> tuple[Known, list[Phrasing]]:
    """What a model knows of some facts, in all and by phrasing."""
    parts, phrasings = [], []
    for group in by_phrasing(pairs):
        part = Known.of(model, group)
        n = sum(part.asked.values())
        first, top1 = (sum(found.values()) / n for found in (part.right, part.predicted))
        parts.append(part)
        phrasings.append(Phrasing(group[0].prompt, False, n, first, top1))
    sums = (Counter[Fact](), Counter[Fact](), Counter[Fact]())
    for part in parts:
        for total, found in zip(sums, (part.right, part.predicted, part.asked), strict=True):
            total.update(found)
    right, predicted, asked = (dict(total) for total in sums)
    return Known(right, predicted, asked), phrasings


def _unseen(pairs: Sequence[Pair], right: Mapping[Metric, Sequence[bool]]) -> Iterator[Phrasing]:
    """The same of scored prompts, from the scores that are there."""
    at = {id(pair): k for k, pair in enumerate(pairs)}
    for group in by_phrasing(pairs):
        hits = [sum(right[m][at[id(pair)]] for pair in group) for m in ("choice", "top1")]
        first, top1 = (n / len(group) for n in hits)
        yield Phrasing(group[0].prompt, True, len(group), first, top1)


def what_is_known(
    model: LanguageModel,
    task: Task,
    quantizers: Sequence[str],
    seed: int,
    note: Callable[[str, int, int], None],
) -> tuple[Task, Knowledge]:
    """The task without the forget facts that the original does not know, and what it knows.

    1. Ask for every forget fact in its training phrasings, and leave the unknown ones out.
    2. Ask for a sample of the retain facts.
    3. Ask for the forget facts left in their unseen phrasings, also after each quantizer.

    Arguments:
        model: the original.
        task: the task, tokenized for it.
        quantizers: after which the edit will be scored.
        seed: of the sample.
        note: called with (stage, done, total).

    Raises:
        TaskError: the original knows no more of the forget facts, in the training phrasings or in
            the unseen ones, or of the retain facts, than a guess would.
    """
    steps = 2 + len(quantizers)
    note("what the original knows", 0, steps)
    forget, phrasings = _asked(model, task.forget)
    task = without_unknown(model, task, forget)
    retain = Known.of(model, task.retain.sample(RETAIN_PAIRS, seed))
    check_known(model, task, "retain", retain)
    note("what the original knows", 1, steps)
    scores = evaluate({ORIGINAL: model}, task, role="forget")
    if not any(row.knows(ORIGINAL) for row in scores.rows):
        worst = max(scores.rows, key=lambda row: row[ORIGINAL].choice)
        raise TaskError(
            f"{model.name} does not know the forget facts of task {task.name!r} in the unseen "
            f"phrasings: four-way accuracy {worst[ORIGINAL].choice:.3f} on {worst.label} at best, "
            f"and guesses do as well with p = {worst.p_of_guess(ORIGINAL):.2g}. Nothing could be "
            "seen to be forgotten there: score in phrasings that the model answers."
        )
    for k, name in enumerate(quantizers):
        note("what the original knows", 2 + k, steps)
        after = evaluate({ORIGINAL.after(name): quantize(model, name)}, task, role="forget")
        scores = scores.beside(after)
    unseen = [p for pairs in task.scored["unseen"]["forget"].values() for p in pairs]
    phrasings += _unseen(unseen, scores.right[ORIGINAL])
    note("what the original knows", steps, steps)
    return task, Knowledge(forget, retain, scores, tuple(phrasings))
