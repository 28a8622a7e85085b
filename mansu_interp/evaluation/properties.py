"""The four properties: forgetting, retention, survival of quantization, structural erasure.

All scores are on the task's ``unseen`` phrasings, against chance, and against the original *after
the same quantizer*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..audit.relearning import CHANCE, TOLERANCE, Relearning
from .scores import EDITED, ORIGINAL, QUANTIZER, Flips, Scores

FORGET_TARGET = CHANCE + 0.10

RETAIN_TARGET = 0.03

NEIGHBOUR_TARGET = 0.05

PERPLEXITY_TARGET = 0.05


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _recovery(scores: Scores, quantizers: Sequence[str]) -> tuple[float, str, str]:
    """The largest rise of forget accuracy to above chance, or its smallest fall; the quantizer, and
    a sentence about all of them."""
    chance = {"choice": CHANCE, "top1": scores.chance_top1("forget")}
    gaps: dict[str, dict[str, float]] = {q: {} for q in quantizers}
    counted: dict[str, dict[str, float]] = {q: {} for q in quantizers}
    for key, guess in chance.items():
        before = scores.mean("forget", key, EDITED)
        for q in quantizers:
            after = scores.mean("forget", key, f"{EDITED} {q}")
            gap = round(after - before, 9)  # the same mean, summed otherwise, is no recovery
            gaps[q][key], counted[q][key] = gap, gap if after > guess else min(gap, 0.0)
    worst = max(gaps, key=lambda q: (max(counted[q].values()), gaps[q]["choice"]))
    by = {k: [f"{g[k]:+.3f}" for g in gaps.values()] for k in chance}
    said = (
        f"{_and(quantizers)} changed four-way forget accuracy by {_and(by['choice'])} and top-1 "
        f"by {_and(by['top1'])}."
    )
    if counted != gaps:
        said += (
            f" What ends at or below chance ({CHANCE:.2f} and {chance['top1']:.3f}) is a guess, "
            "and nothing that came back."
        )
    if f"{EDITED} {worst}" in scores.first:
        flips = Flips.between(scores.first[EDITED], scores.first[f"{EDITED} {worst}"])
        under = f"Under {worst}, on" if len(gaps) > 1 else "On"
        said += (
            f" {under} {flips.back} prompts the answer came back to the first rank, on "
            f"{flips.gone} it went (p = {flips.p:.2f} by chance)."
        )
    return max(counted[worst].values()), worst, said


def properties(
    scores: Scores,
    quantizers: Sequence[str] = (QUANTIZER,),
    relearning: Relearning | None = None,
) -> list[dict[str, Any]]:
    """The four properties with targets, margins (positive = met) and a sentence each.

    ``scores`` must hold the models original, unlearned and both with every quantizer's name
    appended; the worst of them decides. Erasure is decided by the relearning attack on the unlearned
    model alone: without one it is open.
    """
    pairs = [(EDITED, ORIGINAL), *((f"{EDITED} {q}", f"{ORIGINAL} {q}") for q in quantizers)]
    known = scores.worst("forget", "choice", ORIGINAL)
    forget = max(scores.worst("forget", "choice", m) for m, _ in pairs)
    retain = max(scores.largest_fall("retain", m, o) for m, o in pairs)
    near = max(scores.largest_fall("neighbour", m, o) for m, o in pairs)
    drift = 0.0
    if scores.perplexity:
        drift = max(scores.perplexity[m] / scores.perplexity[o] - 1 for m, o in pairs)
    gap, back_under, recovery = _recovery(scores, quantizers)
    kept = retain <= RETAIN_TARGET and near <= NEIGHBOUR_TARGET and drift <= PERPLEXITY_TARGET
    sentence = f"No retain score fell by more than {retain:.3f} at the same precision"
    if any(r["role"] == "neighbour" for r in scores.rows):
        sentence += f"; the near neighbour, never trained on, by {near:.3f}"
    if scores.perplexity:
        sentence += f"; perplexity by {drift:+.1%}"

    def row(
        name: str, passed: bool | None, value: float, target: float, unit: str, sentence: str
    ) -> dict[str, Any]:
        return {
            "name": name,
            "passed": passed,
            "value": value,
            "target": target,
            "margin": target - value,
            "unit": unit,
            "sentence": sentence,
        }

    if relearning:
        steps = relearning.marks[-1]
        back, avoided = relearning.up_to(steps), relearning.up_to(steps, "last")
        erasure = row(
            "structural erasure",
            max(back, avoided) <= CHANCE + TOLERANCE,
            max(back, avoided),
            CHANCE + TOLERANCE,
            "half B's answers that rank first, or last, of four, after relearning half A",
            f"At most {steps} steps of relearning one half of the facts raise four-way accuracy on "
            f"the other from {relearning.at(0):.3f} to {back:.3f}; its answers rank last of four "
            f"in {avoided:.3f} at most. Chance is {CHANCE:.2f} for both.",
        )
    else:
        erasure = {
            "name": "structural erasure",
            "passed": None,
            "value": None,
            "target": CHANCE + TOLERANCE,
            "margin": None,
            "unit": "not tested",
            "sentence": "Not tested: relearning was left out (--relearn-steps 0).",
        }
    return [
        row(
            "meaningful forgetting",
            forget <= FORGET_TARGET,
            forget,
            FORGET_TARGET,
            "four-way accuracy, worst unseen set",
            f"On phrasings never trained on, four-way accuracy fell from {known:.3f} to "
            f"{forget:.3f} at worst, before and after {_and(quantizers)}; chance is {CHANCE:.2f}.",
        ),
        row(
            "retain preservation",
            kept,
            retain,
            RETAIN_TARGET,
            "largest fall of a retain score",
            sentence + ".",
        ),
        row(
            "no recovery under quantization",
            gap <= 0,
            gap,
            0.0,
            f"{back_under} minus full precision, forget accuracy",
            recovery,
        ),
        erasure,
    ]


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One sentence over the four properties; ``passed`` is None if none fails but one is open."""
    met = [r["name"] for r in rows if r["passed"]]
    missed = [r["name"] for r in rows if r["passed"] is False]
    open_ = [r["name"] for r in rows if r["passed"] is None]
    sentence = f"{len(met)} of {len(rows)} properties hold"
    if missed:
        sentence += "; not met: " + ", ".join(missed)
    if open_:
        sentence += "; undecided: " + ", ".join(open_)
    passed = False if missed else None if open_ else True
    return {"passed": passed, "sentence": sentence + "."}
