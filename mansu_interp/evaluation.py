"""The four properties: forgetting, retention, survival of quantization, structural erasure.

All scores are on the task's ``unseen`` phrasings, against chance, and against the original *after
the same quantizer*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cad import CAD
from .models import LanguageModel
from .pairs import PairSet, Task
from .relearning import CHANCE, TOLERANCE, Relearning
from .scoring import accuracy, perplexity

FORGET_TARGET = CHANCE + 0.10
RETAIN_TARGET = 0.03
NEIGHBOUR_TARGET = 0.05
PERPLEXITY_TARGET = 0.05
QUANTIZER = "nf4"
"""Every run is scored after it, beside those that its edit is to survive."""
ORIGINAL, EDITED = "original", "unlearned"
"""Names of the models that are compared; a quantizer's name is appended."""


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

    @classmethod
    def between(cls, before: Sequence[bool], after: Sequence[bool]) -> Flips:
        """Count what changed, prompt by prompt."""
        back = sum(b > a for a, b in zip(before, after, strict=True))
        gone = sum(b < a for a, b in zip(before, after, strict=True))
        n = back + gone
        tail = sum(math.comb(n, k) for k in range(min(back, gone) + 1)) / 2**n
        return cls(back, gone, min(1.0, 2 * tail))


@dataclass(frozen=True)
class Scores:
    """Accuracies of several models on one task."""

    rows: list[dict[str, Any]]
    """One per (role, label): ``n``, ``chance`` of choice, ``chance_top1`` and ``models`` -> top1,
    choice."""
    perplexity: dict[str, float] | None
    """Per model, on unseen running text; None if the task has none."""
    first: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    """Per model, on which forget prompts the answer ranks first of four."""

    def beside(self, other: Scores) -> Scores:
        """The same sets' scores, with those of another's models."""
        rows = [
            {**mine, "models": mine["models"] | theirs["models"]}
            for mine, theirs in zip(self.rows, other.rows, strict=True)
        ]
        found = {**(self.perplexity or {}), **(other.perplexity or {})}
        return Scores(rows, found or None, self.first | other.first)

    def worst(self, role: str, key: str, model: str) -> float:
        """The largest score of a model over the sets of a role."""
        return max(r["models"][model][key] for r in self.rows if r["role"] == role)

    def mean(self, role: str, key: str, model: str) -> float:
        """The mean score of a model over the sets of a role."""
        values = [r["models"][model][key] for r in self.rows if r["role"] == role]
        return sum(values) / len(values)

    def chance_top1(self, role: str) -> float:
        """Of a guess among a relation's answers, mean over the sets of a role; 0 in scores of older
        versions, which do not have it."""
        values = [r.get("chance_top1", 0.0) for r in self.rows if r["role"] == role]
        return sum(values) / len(values)

    def largest_fall(self, role: str, model: str, reference: str) -> float:
        """The most that top-1 or choice of a set fell below a reference's; 0 without sets, and
        where all gained."""
        falls = [
            r["models"][reference][k] - r["models"][model][k]
            for r in self.rows
            if r["role"] == role
            for k in ("top1", "choice")
        ]
        return max(0.0, *falls) if falls else 0.0


def evaluate(
    models: Mapping[str, LanguageModel],
    task: Task,
    split: str = "unseen",
    on_step: Callable[[str, int, int], None] | None = None,
    role: str | None = None,
) -> Scores:
    """Score models on every set of a split.

    Arguments:
        models: name -> model, e.g. original, original nf4, unlearned, unlearned nf4.
        task: the task, tokenized for these models.
        split: ``unseen`` for reports, ``dev`` while choosing settings.
        on_step: called with (what, sets done, sets in all).
        role: score its sets alone, and no perplexity.
    """
    every = [(of, label, s) for of, by in task.scored[split].items() for label, s in by.items()]
    guess = _guess([s for *_, s in every])
    sets = [x for x in every if role in (None, x[0])]
    rows: list[dict[str, Any]] = [
        {
            "role": of,
            "label": label,
            "n": len(s),
            "chance": CHANCE,
            "chance_top1": sum(guess[p.relation] for p in s) / len(s),
            "models": {},
        }
        for of, label, s in sets
    ]
    first: dict[str, tuple[bool, ...]] = dict.fromkeys(models, ())
    total = len(sets) * len(models)
    for m, (name, model) in enumerate(models.items()):
        for k, (of, _, pairs) in enumerate(sets):
            result = accuracy(model, pairs)
            if of == "forget":
                first[name] += result.first
            rows[k]["models"][name] = {"top1": result.top1, "choice": result.choice}
            if on_step:
                on_step(f"scores of {name}", m * len(sets) + k + 1, total)
    text = task.text.get(split) or task.text.get("unseen") if role is None else None
    values = {n: perplexity(m, text) for n, m in models.items()} if text else None
    return Scores(rows, values, first)


def _guess(sets: Sequence[PairSet]) -> dict[str, float]:
    """Relation -> how often one of its answers, drawn evenly, is right; 0 where it has only one,
    of which saying it says nothing."""
    answers: dict[str, set[str]] = {}
    for pair in (p for pairs in sets for p in pairs):
        answers.setdefault(pair.relation, set()).add(pair.answer_text)
    return {k: 1 / len(a) if len(a) > 1 else 0.0 for k, a in answers.items()}


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
    cad: CAD,
    quantizers: Sequence[str] = (QUANTIZER,),
    relearning: Relearning | None = None,
) -> list[dict[str, Any]]:
    """The four properties with targets, margins (positive = met) and a sentence each.

    ``scores`` must hold the models original, unlearned and both with every quantizer's name
    appended; the worst of them decides. Erasure is judged by the relearning attack on the unlearned
    model where there was one, otherwise by CAD's verdict.
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
    d = next(iter(cad.models.values()))

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
        erasure = row(
            "structural erasure",
            {"erased": True, "undecided": None}.get(cad.verdict, False),
            d.alignment,
            0.25,
            "alignment with the original circuit",
            f"CAD says {cad.verdict}: {cad.sentence[0].lower()}{cad.sentence[1:]}",
        )
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
