"""What the original knows of a task, before any long work: the rest cannot be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..audit.known import Known, check_known, known_forget
from ..errors import TaskError
from ..evaluation.scores import Scores, evaluate
from ..evaluation.versions import ORIGINAL
from ..models.language_model import LanguageModel
from ..quantizers.survival import quantize
from ..tasks.task import Task

RETAIN_PAIRS = 400
"""Retain prompts that are asked, drawn evenly over their phrasings."""


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

    def line(self) -> str:
        """One line for the plan."""
        out = f"{self.forget}{', left out' if self.forget.unknown else ''}"
        rows, told = self.scores.rows, []
        for version in rows[0].models:
            share = self.scores.mean("forget", "choice", version)
            guess = "" if any(r.knows(version) for r in rows) else ", as guesses do"
            after = f" after {version.quantizer}" if version.quantizer else ""
            told.append(f"{share:.3f}{after}{guess}")
        out += f"; unseen phrasings, four-way: {', '.join(told)}"
        return f"{out}. Retain: {self.retain}"


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
    task, forget = known_forget(model, task)
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
    note("what the original knows", steps, steps)
    return task, Knowledge(forget, retain, scores)
