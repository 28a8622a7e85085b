"""The four properties, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mansu_interp.cad import CAD, Divergence
from mansu_interp.evaluation import Flips, Scores, properties
from mansu_interp.relearning import Point, Relearning

NO_GRAPH = CAD("undecided", "No graph.", {"unlearned": Divergence(0, 0, 0.5, 0, 0)})


def row(choice: float, after: float) -> dict[str, Any]:
    models = {"original": 1.0, "original nf4": 1.0, "unlearned": choice, "unlearned nf4": after}
    each = {m: {"choice": v, "top1": 0.0} for m, v in models.items()}
    return {"role": "forget", "label": "x", "n": 9, "chance": 0.25, "models": each}


def test_a_rounding_error_is_no_recovery():
    """Accuracies that are the same but for the order in which they were summed."""
    for after, passed in ((0.3 + 6e-17, True), (0.1 + 0.2, True), (0.301, False)):
        gap = properties(Scores([row(0.3, after)], None), NO_GRAPH)[2]
        assert gap["passed"] is passed, after


@pytest.mark.parametrize(
    ("first", "last", "passed"), [(0.4, 0.4, True), (0.41, 0.2, False), (0.2, 0.41, False)]
)
def test_what_comes_back_and_what_is_avoided_both_count(first: float, last: float, passed: bool):
    """Whichever learning rate is worse, before the attack or after it."""
    points = [Point(0.1, 0, 0.0, 0.25, 1.0, last), Point(0.1, 20, 0.0, first, 1.0, 0.3)]
    found = Relearning(points, (9, 9))
    erasure = properties(Scores([row(0.3, 0.3)], None), NO_GRAPH, relearning=found)[3]
    assert erasure["passed"] is passed
    assert erasure["value"] == max(first, last)


@pytest.mark.parametrize(
    ("back", "gone", "p"), [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (1, 3, 0.625), (6, 0, 0.03125)]
)
def test_flips_by_hand(back: int, gone: int, p: float):
    """2 x (1 + 4) / 16 for one against three."""
    before = [True] * gone + [False] * back + [True, False]
    after = [False] * gone + [True] * back + [True, False]
    assert Flips.between(before, after) == Flips(back, gone, p)


def test_the_sentence_tells_what_is_behind_a_gap():
    first = {"unlearned": (True, False, False), "unlearned nf4": (False, True, True)}
    gap = properties(Scores([row(0.3, 0.6)], None, first), NO_GRAPH)[2]
    assert (
        "On 2 prompts the answer came back to the first rank, on 1 it went (p = 1.00"
        in gap["sentence"]
    )
