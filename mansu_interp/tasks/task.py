"""A task: what to forget and what to retain, tokenized for one model."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple

from ..errors import TaskError
from ..utils.words import Shown, number_of
from .pairs import Fact, Pair, PairSet, Tokens

CALIBRATION_TEXTS, CALIBRATION_PROMPTS = 32, 512
SEEN = "the scored prompt is also trained on"
REPEATED = "the prompt is there already"


@dataclass(frozen=True)
class FactTable:
    """A relation of a task as its table has it, for whoever asks it in other words."""

    subject: str
    """What its subjects are: the name of their column, such as "country"."""
    answer: str
    """The name of the column of answers."""
    description: str
    """What an answer is to its subject, such as "capital": "the capital of France"."""
    facts: tuple[tuple[str, str], ...]
    """Every subject with its answer."""


@dataclass(frozen=True, repr=False)
class Task(Shown):
    """What to forget and what to retain, tokenized for one model."""

    name: str
    title: str
    forget: PairSet
    """Forget facts in the ``train`` phrasings."""
    retain: PairSet
    """Retain facts in their ``train`` phrasings."""
    retain_unscored: PairSet | None
    """Prompts whose next-token distribution should stay, right or wrong (may be None)."""
    scored: dict[str, dict[str, dict[str, PairSet]]]
    """split (``dev``, ``unseen``) -> role (``forget``, ``retain``, ``neighbour``) -> label ->
    pairs."""
    text: dict[str, tuple[Tokens, ...]] = field(default_factory=dict)
    """``train`` and ``unseen`` running text, one token tuple a paragraph."""
    reference_models: tuple[str, ...] = ()
    """Embedded models that were never taught the forget facts, but everything else."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many (fact, phrasing) items were left out, by reason."""
    read: str = ""
    """How rows were read, and which are held out where none names a split, in one line; empty for
    fact tables."""
    prefix: str = ""
    """What stands before every prompt."""
    tables: dict[str, FactTable] = field(default_factory=dict)
    """Relation -> its table; empty for rows."""

    def __repr__(self) -> str:
        sizes = f"{len(self.forget):,} forget and {len(self.retain):,} retain pairs"
        return f"Task({self.name!r}: {sizes})"

    def told(self) -> dict[str, object]:
        """For its short form."""
        return {
            "": repr(self.name),
            "to forget": number_of(len(self.forget), "pair"),
            "to retain": number_of(sum(map(len, self.retain_sets)), "pair"),
            "title": self.title,
        }

    @property
    def retain_sets(self) -> list[PairSet]:
        """What must stay: the retain pairs, and the retain_unscored pairs if there are any."""
        return [self.retain, *([self.retain_unscored] if self.retain_unscored else [])]

    @property
    def held_out(self) -> PairSet:
        """The forget facts in every unseen phrasing."""
        unseen = self.scored["unseen"]["forget"].values()
        return PairSet("held out", tuple(p for pairs in unseen for p in pairs))

    def without(self, facts: Collection[Fact], reason: str) -> Task:
        """The same task without some forget facts, which are counted under a reason.

        Raises:
            TaskError: nothing would be left to train on, or to score.
        """
        if not facts:
            return self
        forget = self.forget.without(facts)
        scored = {split: dict(roles) for split, roles in self.scored.items()}
        for roles in scored.values():
            left = {label: s.without(facts) for label, s in roles.get("forget", {}).items()}
            roles["forget"] = {label: s for label, s in left.items() if s}
        if not forget or not scored.get("unseen", {}).get("forget"):
            raise TaskError(f"Task {self.name!r} has no forget prompt left: {reason}.")
        gone = len(self.forget) - len(forget)
        return replace(self, forget=forget, scored=scored, dropped={**self.dropped, reason: gone})

    @cached_property
    def sha256(self) -> str:
        """Hash of all prompts, answers and texts, as tokens."""
        parts = (self.forget, self.retain, self.retain_unscored, self.scored, self.text)
        return hashlib.sha256(spelled(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def calibration(self) -> list[Tokens]:
        """Token rows for calibrated quantizers: running text and retain prompts, as somebody who
        knows nothing of the forget facts would take them."""
        prompts = self.retain.sample(CALIBRATION_PROMPTS, 0)
        return [*self.text.get("train", ())[:CALIBRATION_TEXTS], *(p.clean for p in prompts)]


def spelled(value: object) -> str:
    """A value with every field of the records in it; their own ``repr`` is short."""
    if isinstance(value, (Pair, PairSet)):
        inside = ", ".join(f"{f.name}={spelled(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__name__}({inside})"
    if isinstance(value, tuple):
        return f"({', '.join(map(spelled, value))}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {spelled(v)}' for k, v in value.items())}}}"
    return repr(value)


class Statements:
    """Some facts, and which texts state one: those that name its subject and, beside it, its
    answer, as whole words, in any case."""

    def __init__(self, facts: Sequence[Pair]) -> None:
        self.answers: dict[str, set[str]] = {}
        for p in facts:
            self.answers.setdefault(p.subject.casefold(), set()).add(p.answer_text.casefold())
        self.answers.pop("", None)
        longest_first = sorted(self.answers, key=len, reverse=True)
        self.subjects = _words("|".join(map(re.escape, longest_first))) if self.answers else None

    def hold(self, pair: Pair) -> bool:
        """Whether a prompt with its answer states one of the facts."""
        text = f"{pair.prompt} {pair.answer_text}".casefold()
        for found in self.subjects.finditer(text) if self.subjects else ():
            beside = f"{text[: found.start()]} {text[found.end() :]}"
            if any(a in beside and _words(re.escape(a)).search(beside)
                   for a in self.answers.get(found[0], ())):  # fmt: skip
                return True
        return False

    def left(self, name: str, pairs: Sequence[Pair]) -> PairSet | None:
        """The pairs that state none of the facts, as a set of that name; None if there are none."""
        free = tuple(p for p in pairs if not self.hold(p))
        return PairSet(name, free) if free else None


def _words(pattern: str) -> re.Pattern[str]:
    """A pattern that begins and ends with words."""
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")


class Asked(NamedTuple):
    """Where a prompt is asked."""

    role: str
    """forget, retain, retain_unscored or neighbour."""
    split: str
    """train, dev or unseen."""
    label: str
    """Of the scored set."""


def distinct(
    name: str, asked: Mapping[Asked, Sequence[Pair]]
) -> tuple[dict[Asked, list[Pair]], dict[str, int]]:
    """The prompts of a task that are what they are called, and how many were left out by reason.

    1. One prompt has one answer, and is not both forgotten and asked in another role.
    2. A scored prompt is none that is trained on; those that are, are left out.
    3. A prompt stands once in a set; repeats are left out.

    Arguments:
        name: of the task.
        asked: its prompts.

    Raises:
        TaskError: prompts contradict each other.
    """
    _check(name, asked)
    trained = {p.question for at, pairs in asked.items() if at.split == "train" for p in pairs}
    left_out: Counter[str] = Counter()
    out: dict[Asked, list[Pair]] = {}
    for at, pairs in asked.items():
        found: dict[Tokens, Pair] = {}
        for pair in pairs:
            if at.split != "train" and pair.question in trained:
                left_out[SEEN] += 1
            elif pair.question in found:
                left_out[REPEATED] += 1
            else:
                found[pair.question] = pair
        out[at] = list(found.values())
    return out, dict(left_out)


def _check(name: str, asked: Mapping[Asked, Sequence[Pair]]) -> None:
    """Raise TaskError over prompts that contradict each other.

    Raises:
        TaskError: one prompt has two answers, or is both forgotten and asked in another role.
    """
    answers: dict[Tokens, dict[Tokens, Pair]] = {}
    roles: dict[Tokens, dict[str, Pair]] = {}
    for at, pairs in asked.items():
        for pair in pairs:
            answers.setdefault(pair.question, {})[pair.answers[0]] = pair
            roles.setdefault(pair.question, {})[at.role] = pair
    if two := [list(by.values()) for by in answers.values() if len(by) > 1]:
        first, second, *_ = two[0]
        raise TaskError(
            f"Task {name!r} has {len(two)} prompt{'s' * (len(two) > 1)} with two answers, such as "
            f"{first.prompt!r:.200}: {first.answer_text!r:.100} and {second.answer_text!r:.100}. A "
            "model predicts only one of them: leave the other out."
        )
    if both := [by for by in roles.values() if "forget" in by and len(by) > 1]:
        other = next(role for role in both[0] if role != "forget")
        raise TaskError(
            f"Task {name!r} asks {len(both)} prompt{'s' * (len(both) > 1)} in the role forget and "
            f"in another, such as {both[0]['forget'].prompt!r:.200} ({other}). What is forgotten "
            "cannot stay: leave it out of one of them."
        )
