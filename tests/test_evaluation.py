"""The four properties, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mansu_interp.audit.relearning import Point, Relearning
from mansu_interp.circuits.compare import CAD, Divergence
from mansu_interp.evaluation.properties import properties
from mansu_interp.evaluation.scores import Flips, Scores, evaluate
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.load import load_task

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


def test_a_rise_to_chance_is_no_recovery():
    """In four-way choice and in top-1, each against its own chance; a fall is a fall."""
    for key, before, after, passed, value in (
        ("choice", 0.1, 0.25, True, 0.0),
        ("choice", 0.1, 0.26, False, 0.16),
        ("choice", 0.2, 0.1, True, 0.0),  # top-1, which moves nowhere, is the larger
        ("top1", 0.0, 0.02, True, 0.0),
        ("top1", 0.0, 0.021, False, 0.021),
        ("top1", 0.02, 0.01, True, 0.0),
    ):
        one = row(0.25, 0.25) | {"chance_top1": 0.02}
        one["models"]["unlearned"][key] = before
        one["models"]["unlearned nf4"][key] = after
        gap = properties(Scores([one], None), NO_GRAPH)[2]
        assert (gap["passed"], gap["value"]) == (passed, pytest.approx(value)), (key, after)
        assert ("(0.25 and 0.020) is a guess" in gap["sentence"]) == (passed and after > before)


def test_without_the_chance_of_top1_every_rise_of_it_counts():
    """Scores of older versions do not have it."""
    one = row(0.25, 0.25)
    one["models"]["unlearned nf4"]["top1"] = 0.001
    assert properties(Scores([one], None), NO_GRAPH)[2]["passed"] is False


def test_chance_of_top1_is_that_of_a_guess_among_a_relations_answers(
    facts: LanguageModel,
):
    """Over all sets that ask for it, forgotten or kept."""
    countries = load_task("countries", facts)
    asked = [p for by in countries.scored["unseen"].values() for s in by.values() for p in s]
    answers = {p.answer_text for p in asked if p.relation == "language"}
    rows = evaluate({"fp": facts}, countries, role="forget").rows
    (found,) = [r for r in rows if r["label"] == "language"]
    assert len(answers) > found["n"]
    assert found["chance_top1"] == pytest.approx(1 / len(answers))


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


def test_the_worst_quantizer_of_a_set_decides():
    """Forgetting, retention and the gap alike; each edit against the original at its precision."""

    def models(**scores: float) -> dict[str, dict[str, float]]:
        return {m.replace("_", " "): {"choice": v, "top1": 0.0} for m, v in scores.items()}

    forget = models(
        original=1.0, original_nf4=0.9, original_fp4=0.8,
        unlearned=0.3, unlearned_nf4=0.2, unlearned_fp4=0.34,
    )  # fmt: skip
    retain = models(
        original=1.0, original_nf4=0.9, original_fp4=0.8,
        unlearned=0.99, unlearned_nf4=0.97, unlearned_fp4=0.75,  # a gain is no loss
    )  # fmt: skip
    rows = [
        {"role": role, "label": "x", "n": 9, "chance": 0.25, "models": by}
        for role, by in (("forget", forget), ("retain", retain))
    ]
    first = dict.fromkeys(("unlearned", "unlearned nf4"), (False, True))
    scores = Scores(rows, None, {**first, "unlearned fp4": (True, True)})
    alone = properties(scores, NO_GRAPH, ["nf4"])
    both = properties(scores, NO_GRAPH, ["nf4", "fp4"])
    assert [r["passed"] for r in alone[:3]] == [True, True, True]
    assert [r["passed"] for r in both[:3]] == [True, False, False]
    assert [r["value"] for r in both[:3]] == pytest.approx([0.34, 0.05, 0.04])
    assert both[2]["unit"].startswith("fp4 minus full precision")
    assert "nf4 and fp4 changed four-way" in both[2]["sentence"]
    assert "by -0.100 and +0.040" in both[2]["sentence"]
    assert "Under fp4, on 1 prompts" in both[2]["sentence"]


def test_scores_stand_beside_each_other():
    one, two = (
        Scores(
            [{"role": "forget", "label": "x", "n": 9, "models": {m: {"choice": 0.5}}}],
            {m: 2.0},
            {m: (True,)},
        )
        for m in ("original", "unlearned")
    )
    both = one.beside(two)
    assert list(both.rows[0]["models"]) == ["original", "unlearned"]
    assert both.perplexity == {"original": 2.0, "unlearned": 2.0}
    assert set(both.first) == {"original", "unlearned"}
    assert list(one.rows[0]["models"]) == ["original"]


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
