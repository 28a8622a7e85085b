"""Prompt pairs that are made for any tokenizer: behaviours of which circuits are studied.

=============  =================================================================================
``ioi``        indirect object: "Then Mary and John went to the shop, and John gave a book to" ->
               Mary, not John. Corrupt: the other name is repeated, so that the answer is John
               (after Wang et al. 2022, arXiv 2211.00593).
``greater``    greater than: "The sale lasts from day six to day" -> nine, not two. Corrupt: it
               begins on a day before both (after Hanna et al. 2023, arXiv 2305.00586, whose years
               are here numerals, since tokenizers cut years in different places).
``agreement``  subject and verb: "The dog near the cars" -> is, not are. Corrupt: the subject has
               the other number (after Finlayson et al. 2021, arXiv 2106.06087).
=============  =================================================================================

Templates and words are ours. Only words that the tokenizer gives one token are taken, so that both
prompts of a pair have as many and differ in one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..errors import TaskError
from ..models.language_model import LanguageModel
from ..utils.ranges import entrance
from .pairs import PairSet

NAMES = (
    "Mary", "John", "Anna", "Paul", "Laura", "Peter", "Sarah", "David", "Emma", "James", "Alice",
    "Robert", "Julia", "Thomas", "Kate", "Mark", "Helen", "Daniel", "Lucy", "Simon",
)  # fmt: skip
PLACES = ("shop", "park", "school", "office", "station", "garden", "beach", "library")
THINGS = ("book", "letter", "key", "ball", "ring", "cake", "map", "drink")
NUMERALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EVENTS = ("sale", "war", "trip", "course", "strike", "festival", "show", "match")
NOUNS = (
    ("dog", "dogs"), ("car", "cars"), ("book", "books"), ("house", "houses"), ("boy", "boys"),
    ("girl", "girls"), ("tree", "trees"), ("king", "kings"), ("doctor", "doctors"),
    ("picture", "pictures"), ("student", "students"), ("window", "windows"),
)  # fmt: skip
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))

Texts = tuple[str, str, str, str]
"""Clean prompt, corrupt prompt, answer, wrong answer."""
Draw = Callable[[random.Random], Texts]
Single = Callable[[Sequence[str], int], list[str]]
"""The words of one token; raises where there are too few."""


def _ioi(single: Single) -> Draw:
    names, places, things = single(NAMES, 4), single(PLACES, 1), single(THINGS, 1)

    def draw(rng: random.Random) -> Texts:
        first, second = rng.sample(names, 2)
        place, thing = rng.choice(places), rng.choice(things)
        indirect, giver = (first, second) if rng.random() < 0.5 else (second, first)
        start = f"Then {first} and {second} went to the {place}, and"
        clean, corrupt = (f"{start} {name} gave a {thing} to" for name in (giver, indirect))
        return clean, corrupt, indirect, giver

    return draw


def _greater(single: Single) -> Draw:
    days, events = single(NUMERALS, 4), single(EVENTS, 1)
    days = [d for d in NUMERALS if d in days]

    def draw(rng: random.Random) -> Texts:
        before, wrong, start, answer = sorted(rng.sample(range(len(days)), 4))
        event = rng.choice(events)
        clean, corrupt = (
            f"The {event} lasts from day {days[day]} to day" for day in (start, before)
        )
        return clean, corrupt, days[answer], days[wrong]

    return draw


def _agreement(single: Single) -> Draw:
    known = set(single([form for noun in NOUNS for form in noun], 6))
    nouns = [noun for noun in NOUNS if known.issuperset(noun)]
    forms = set(single([form for verb in VERBS for form in verb], 2))
    verbs = [verb for verb in VERBS if forms.issuperset(verb)]
    if len(nouns) < 3 or not verbs:
        raise TaskError(
            "agreement: the tokenizer gives too few nouns or verbs one token in both numbers. Give "
            "pairs of your own."
        )

    def draw(rng: random.Random) -> Texts:
        subject, other = rng.sample(nouns, 2)
        verb, number, beside = rng.choice(verbs), rng.randrange(2), rng.randrange(2)
        clean, corrupt = (
            f"The {subject[k]} near the {other[beside]}" for k in (number, 1 - number)
        )
        return clean, corrupt, verb[number], verb[1 - number]

    return draw


KINDS: dict[str, Callable[[Single], Draw]] = {
    "ioi": _ioi,
    "greater": _greater,
    "agreement": _agreement,
}


@entrance(TaskError)
def synthetic_pairs(model: LanguageModel, kind: str, n: int = 100, seed: int = 0) -> PairSet:
    """Prompt pairs of a behaviour that is studied on many models.

    Whether the model shows it is not asked: `attribute` says so by its clean and corrupt metric.

    Arguments:
        model: whose tokenizer is used.
        kind: ``ioi``, ``greater`` or ``agreement``.
        n: how many different pairs; fewer where the words do not give so many.
        seed: which ones.

    Raises:
        TaskError: another kind, n below 1, or a tokenizer that gives too few of the words one
            token.
    """
    if kind not in KINDS:
        raise TaskError(f"Unknown kind of pairs {kind!r}; expected one of {', '.join(KINDS)}.")
    if n < 1:
        raise TaskError(f"n must be at least 1; got {n}.")
    unknown = model.get_tokenizer().unk_token_id

    def single(words: Sequence[str], least: int) -> list[str]:
        found = []
        for word in words:
            before, both = (model.encode(text) for text in ("the", f"the {word}"))
            if list(both[:-1]) == list(before) and both[-1] != unknown:
                found.append(word)
        if len(found) < least:
            raise TaskError(
                f"{kind}: the tokenizer of {model.name} gives {len(found)} of the words "
                f"{', '.join(words[:3])}, ... one token; at least {least} are needed. Give pairs "
                "of your own."
            )
        return found

    draw, rng = KINDS[kind](single), random.Random(seed)
    drawn: dict[Texts, None] = {}
    for _ in range(20 * n):
        drawn.setdefault(draw(rng))
        if len(drawn) == n:
            break
    clean, corrupt, answers, wrong = zip(*drawn, strict=True)
    return PairSet.from_prompts(
        model, list(clean), list(corrupt), list(answers), list(wrong), name=kind
    )
