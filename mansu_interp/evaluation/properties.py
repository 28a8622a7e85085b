"""The four properties: forgetting, retention, survival of quantization, structural erasure.

All scores are on the task's ``unseen`` phrasings, against chance, and against the original *after
the same quantizer*; the worst quantizer decides. Whether the original knew a set, whether its
answers went, and whether they came back are exact tests at p = `ALPHA`: of a set that the original
answers no better than guesses would, nothing can be forgotten, brought back or erased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..audit.known import ALPHA, CHANCE, p_of_guess
from ..audit.relearning import TOLERANCE, Relearning
from ..utils.words import number_of, p_value
from .scores import METRICS, WORDS, Flips, Metric, ScoreRow, Scores
from .versions import EDITED, ORIGINAL, QUANTIZER

FORGET_TARGET = CHANCE + 0.10
"""Four-way accuracy of the worst forget set, at most."""
RETAIN_TARGET = 0.03
"""Fall of a retain score, at most."""
NEIGHBOUR_TARGET = 0.05
"""Fall of a neighbour's score, at most."""
PERPLEXITY_TARGET = 0.05
"""Rise of perplexity as a share, at most."""
ERASURE_TARGET = CHANCE + TOLERANCE
"""Four-way accuracy, or share ranked last, on half B after relearning half A, at most."""
NOT_KNOWN = "the original does not know the forget facts"
"""Why a property is not tested where there was nothing to forget; the numbers follow."""
NOT_TESTED = "relearning was left out (--relearn-steps 0)"


@dataclass(frozen=True)
class Property:
    """One of the four properties of an edit, held to its target."""

    name: str
    passed: bool | None
    """None: not tested, or there is nothing to test."""
    value: float | None
    target: float
    headroom: float | None
    """target - value: how far the value is on the right side of its target; negative: missed."""
    unit: str
    """What the value measures."""
    sentence: str
    """In words; begins with the reason where the property is not met."""
    reason: str = ""
    """Why it is not met, or not tested; empty where it is met."""


@dataclass(frozen=True)
class Verdict:
    """All properties together."""

    passed: bool | None
    """None: none is missed, but one is not tested."""
    sentence: str


@dataclass(frozen=True)
class _Limit:
    """A number with the most that it may be, and the words for it."""

    value: float
    most: float
    words: str
    """What happened, in the past tense, with the value."""
    unit: str
    """What the value measures."""
    percent: bool = False

    @property
    def reason(self) -> str:
        """Words where the limit is passed; else empty."""
        limit = f"{self.most:.1%}" if self.percent else f"{self.most:.3f}"
        return "" if self.value <= self.most else f"{self.words}, more than {limit}"


def _judged(name: str, limits: Sequence[_Limit], sentence: str, also: str = "") -> Property:
    """A property that is met if every limit is kept; shown are value and target of the first that
    is not, or else of the first.

    Arguments:
        name: of the property.
        limits: what it is held to.
        sentence: what was measured.
        also: another reason why it is not met.
    """
    shown = next((limit for limit in limits if limit.reason), limits[0])
    reason = _and([*(limit.reason for limit in limits if limit.reason), *([also] if also else [])])
    told = f"Not met: {reason}. {sentence}" if reason else sentence
    headroom = shown.most - shown.value
    return Property(
        name,
        not reason,
        value=shown.value,
        target=shown.most,
        headroom=headroom,
        unit=shown.unit,
        sentence=told,
        reason=reason,
    )


def _not_tested(name: str, target: float, reason: str) -> Property:
    """A property that nothing is known of."""
    sentence = f"Not tested: {reason}."
    return Property(
        name,
        None,
        value=None,
        target=target,
        headroom=None,
        unit="not tested",
        sentence=sentence,
        reason=reason,
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _not_judged(scores: Scores, quantizers: Sequence[str]) -> str:
    """Which formats were scored beside those that are held to the targets."""
    versions = (v for r in scores.rows for v in r.models if v.name == EDITED.name)
    names = dict.fromkeys(q for v in versions if (q := v.quantizer) and q not in quantizers)
    return f" Measured, and not judged here: {_and(list(names))}." if names else ""


def properties(
    scores: Scores,
    quantizers: Sequence[str] = (QUANTIZER,),
    relearning: Relearning | None = None,
) -> list[Property]:
    """The four properties, each with its target, its headroom and a sentence.

    1. Forgetting: the original knew the forget facts, and four-way accuracy fell to near chance.
    2. Retention: no retain or neighbour score fell much, nor did perplexity rise.
    3. Recovery: no quantizer brought answers back (`_recovery`).
    4. Erasure: relearning half of the facts does not bring back the other half.

    Where the original answers no forget set better than guesses, 1, 3 and 4 are not tested; 2 is
    not where that is so of all retain sets.

    Arguments:
        scores: of the models original and unlearned, in full precision and after every quantizer.
        quantizers: the worst of them decides; others that were scored do not count.
        relearning: the attack on the unlearned model, which alone decides erasure; None leaves it
            open.
    """
    names = ("meaningful forgetting", "no recovery under quantization", "structural erasure")
    if none := _not_known(scores.of_role("forget")):
        targets = (FORGET_TARGET, 0.0, ERASURE_TARGET)
        first, *others = (
            _not_tested(n, t, f"{NOT_KNOWN} ({none})") for n, t in zip(names, targets, strict=True)
        )
        return [first, _retention(scores, quantizers), *others]
    return [
        _forgetting(names[0], scores, quantizers),
        _retention(scores, quantizers),
        _recovery(names[1], scores, quantizers),
        _erasure(names[2], relearning),
    ]


def _not_known(rows: Sequence[ScoreRow]) -> str:
    """Why the original knows none of some sets; empty where it knows one."""
    if not rows or any(r.knows(ORIGINAL) for r in rows):
        return ""
    best = max(rows, key=lambda r: r[ORIGINAL].choice)
    return (
        f"{best[ORIGINAL].choice:.3f} four-way on {best.label} at best, where guesses do as well "
        f"with {p_value(best.p_of_guess(ORIGINAL))}"
    )


def _told_unknown(rows: Sequence[ScoreRow], quantizers: Sequence[str]) -> str:
    """The sets that the original does not know, in full precision or after a quantizer."""
    told = [
        f"{r.label}{f' after {q}' if q else ''} ({r[version].choice:.3f})"
        for r in rows
        for q in (None, *quantizers)
        if (version := ORIGINAL.after(q)) in r.models and not r.knows(version)
    ]
    return f" The original itself answers {_and(told)} no better than guesses." if told else ""


def _forgetting(name: str, scores: Scores, quantizers: Sequence[str]) -> Property:
    """Level and fall, on the sets that the original knows."""
    rows = scores.of_role("forget")
    known = [r for r in rows if r.knows(ORIGINAL)]
    before = max(r[ORIGINAL].choice for r in known)
    edited = [EDITED.after(q) for q in (None, *quantizers)]
    after, worst, version = max(
        ((r[v].choice, r, v) for r in known for v in edited), key=lambda found: found[0]
    )
    at = f"{worst.label}{f', {version.quantizer}' if version.quantizer else ''}"
    flips = scores.flips(ORIGINAL, EDITED, "choice")
    level = [r.label for r in known if r[EDITED].choice >= r[ORIGINAL].choice]
    none = f"{_and(level)} did not fall" if level else ""
    if flips and not (flips.p <= ALPHA and flips.gone > flips.back):
        none = f"the fall cannot be told from none ({flips})"
    sentence = (
        f"On phrasings never trained on, four-way accuracy went from {before:.3f} to "
        f"{after:.3f} at worst ({at}), before and after {_and(quantizers)}; chance is {CHANCE:.2f}."
    )
    last = [x for r in known if EDITED in r.models and (x := r[EDITED].last) is not None]
    if last:
        sentence += f" The answer ranks last of four in {max(last):.3f} at most."
    return _judged(
        name,
        [_Limit(after, FORGET_TARGET, f"{at} still has {after:.3f}",
                "four-way accuracy, worst unseen set")],
        sentence + _told_unknown(rows, quantizers) + _not_judged(scores, quantizers),
        none,
    )  # fmt: skip


def _retention(scores: Scores, quantizers: Sequence[str]) -> Property:
    """The largest falls of all sets, and what the original does not know."""
    name, rows = "retain preservation", scores.of_role("retain")
    if none := _not_known(rows):
        reason = f"the original does not know the retain facts ({none})"
        return _not_tested(name, RETAIN_TARGET, reason)
    pairs = [(EDITED.after(q), ORIGINAL.after(q)) for q in (None, *quantizers)]
    fall = scores.largest_fall("retain", pairs)
    unit = "largest fall of a retain score"
    limits = [_Limit(fall.by, RETAIN_TARGET, f"the retain score {fall}", unit)]
    sentence = f"No retain score fell by more than {fall.by:.3f} at the same precision"
    sentence += f", before and after {_and(quantizers)}"
    if scores.of_role("neighbour"):
        near = scores.largest_fall("neighbour", pairs)
        unit = "largest fall of a neighbour's score"
        limits.append(_Limit(near.by, NEIGHBOUR_TARGET, f"the near neighbour {near}", unit))
        sentence += f"; the near neighbour, never trained on, by {near.by:.3f}"
    if scores.perplexity:
        drift = max(scores.perplexity_rise(m, o) for m, o in pairs)
        words = f"perplexity rose {'without bound' if math.isinf(drift) else f'by {drift:.1%}'}"
        unit = "rise of perplexity as a share"
        limits.append(_Limit(drift, PERPLEXITY_TARGET, words, unit, percent=True))
        sentence += f"; perplexity by {drift:+.1%}"
    kept = [*rows, *scores.of_role("neighbour")]
    also = _told_unknown(kept, quantizers) + _not_judged(scores, quantizers)
    return _judged(name, limits, f"{sentence}.{also}")


@dataclass(frozen=True)
class _Gap:
    """What a quantizer does to mean forget accuracy."""

    quantizer: str
    metric: Metric
    value: float
    """After it minus before."""
    ends_at: float
    chance: float
    flips: Flips | None
    guess: bool
    """It ends where guesses would."""

    @property
    def none(self) -> bool:
        """A sign test cannot tell the gap from none."""
        return self.flips is not None and self.flips.p > ALPHA

    @property
    def counted(self) -> float:
        """A rise that is a guess, or cannot be told from none, counts as none."""
        return min(self.value, 0.0) if self.guess or self.none else self.value

    def __str__(self) -> str:
        told = f"{self.quantizer}, {WORDS[self.metric]} {self.value:+.3f}"
        if self.guess:
            return f"{told} to {self.ends_at:.3f}, where chance is {self.chance:.3f}"
        return f"{told} ({self.flips})"


def _gap(scores: Scores, quantizer: str, metric: Metric) -> _Gap:
    rows, after = scores.of_role("forget"), EDITED.after(quantizer)
    chance = CHANCE if metric == "choice" else scores.chance_top1("forget")
    level = scores.mean("forget", metric, after)
    # Rounded: the same mean, summed otherwise, is no recovery.
    value = round(level - scores.mean("forget", metric, EDITED), 9)
    facts, prompts = sum(r.facts or r.n for r in rows), sum(r.n for r in rows)
    guess = p_of_guess(level, facts, prompts, chance) > ALPHA
    flips = scores.flips(EDITED, after, metric)
    return _Gap(
        quantizer, metric, value=value, ends_at=level, chance=chance, flips=flips, guess=guess
    )


def _recovery(name: str, scores: Scores, quantizers: Sequence[str]) -> Property:
    """The largest rise of forget accuracy under a quantizer, or its smallest fall.

    A rise counts as none where it ends no higher than guesses would (an exact binomial test; choice
    and top-1 each have their own chance), and where a sign test over the prompts that changed
    (McNemar's, exact) cannot tell it from none. Where the prompts are too few for any split of them
    to be more than chance, a rise leaves the property open.
    """
    gaps = {(q, m): _gap(scores, q, m) for q in quantizers for m in METRICS}
    worst = max(gaps.values(), key=lambda g: (g.counted, g.value))
    by = {m: _and([f"{gaps[q, m].value:+.3f}" for q in quantizers]) for m in METRICS}
    sentence = (
        f"{_and(quantizers)} changed four-way forget accuracy by {by['choice']} and top-1 "
        f"by {by['top1']}."
    )
    if flips := gaps[worst.quantizer, "choice"].flips:
        under = f"Under {worst.quantizer}, on" if len(quantizers) > 1 else "On"
        sentence += (
            f" {under} {number_of(flips.back, 'prompt')} the answer came back to the first rank, "
            f"on {flips.gone} it went ({p_value(flips.p)} by chance)."
        )
    rises = [g for g in gaps.values() if g.value > 0]
    if guesses := [str(g) for g in rises if g.guess]:
        sentence += f" A rise that ends at chance is a guess: {_and(guesses)}."
    if nothing := [str(g) for g in rises if g.none and not g.guess]:
        sentence += f" A sign test cannot tell from none: {_and(nothing)}."
    sentence += _not_judged(scores, quantizers)
    prompts = sum(r.n for r in scores.of_role("forget"))
    if worst.counted <= 0 and nothing and 2 * 0.5**prompts > ALPHA:
        reason = f"{prompts} prompts are too few to tell a rise from none"
        return Property(
            name,
            None,
            value=worst.value,
            target=0.0,
            headroom=-worst.value,
            unit="not tested",
            sentence=f"Not tested: {reason}. {sentence}",
            reason=reason,
        )
    what = WORDS[worst.metric]
    words = f"{worst.quantizer} raised {what} forget accuracy by {worst.counted:.3f}"
    unit = f"{worst.quantizer} minus full precision, forget accuracy"
    return _judged(name, [_Limit(worst.counted, 0.0, words, unit)], sentence)


def _erasure(name: str, relearning: Relearning | None) -> Property:
    if relearning is None:
        return _not_tested(name, ERASURE_TARGET, NOT_TESTED)
    steps = relearning.marks[-1]
    back, last = relearning.up_to(steps), relearning.up_to(steps, "last")
    words = f"half of the facts brings back {back:.3f} of the other half"
    if last > back:
        words = f"{last:.3f} of the other half's answers rank last of four, which gives them away"
    return _judged(
        name,
        [
            _Limit(
                max(back, last), ERASURE_TARGET, words,
                "half B's answers that rank first, or last, of four, after relearning half A",
            )
        ],
        f"At most {steps} steps of relearning one half of the facts raise four-way accuracy on "
        f"the other from {relearning.at(0):.3f} to {back:.3f}; its answers rank last of four "
        f"in {last:.3f} at most. Chance is {CHANCE:.2f} for both.",
    )  # fmt: skip


def verdict(rows: Sequence[Property]) -> Verdict:
    """One sentence over the properties, with the reason of each that is not met."""

    def named(passed: bool | None) -> str:
        return "; ".join(f"{r.name} ({r.reason})" for r in rows if r.passed is passed)

    sentence = f"{sum(r.passed is True for r in rows)} of {len(rows)} properties hold."
    if missed := named(False):
        sentence += f" Not met: {missed}."
    if untested := named(None):
        sentence += f" Not tested: {untested}."
    return Verdict(False if missed else None if untested else True, sentence)
