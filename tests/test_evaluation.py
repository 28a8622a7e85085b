"""The four properties, by hand."""

from __future__ import annotations

from typing import Any

from mansu_interp.cad import CAD, Divergence
from mansu_interp.evaluation import Scores, properties


def test_a_rounding_error_is_no_recovery():
    """Accuracies that are the same but for the order in which they were summed."""

    def row(choice: float, after: float) -> dict[str, Any]:
        models = {"original": 1.0, "original nf4": 1.0, "unlearned": choice, "unlearned nf4": after}
        each = {m: {"choice": v, "top1": 0.0} for m, v in models.items()}
        return {"role": "forget", "label": "x", "n": 9, "chance": 0.25, "models": each}

    cad = CAD("undecided", "No graph.", {"unlearned": Divergence(0, 0, 0.5, 0, 0)})
    for after, passed in ((0.3 + 6e-17, True), (0.1 + 0.2, True), (0.301, False)):
        gap = properties(Scores([row(0.3, after)], None), cad)[2]
        assert gap["passed"] is passed, after
