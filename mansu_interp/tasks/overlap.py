"""Prompts that stand where they must not: asked twice, seen before they are scored, contradicted.

Every task passes through `distinct`, whatever it was made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import TaskError
from .pairs import Pair, Tokens

SEEN = "the scored prompt is also trained on"
REPEATED = "the prompt is there already"


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
