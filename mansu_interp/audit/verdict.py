"""The verdict on an edit and CAD itself, from what was found of half B (steps 6 to 9 of
`audit.cad`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tasks.pairs import PairSet
from ..utils.words import number_of
from .known import CHANCE, Asked, FactRanks, beyond_chance
from .linearized import LinearizedRelearning
from .relearning import ERASED_LEVEL, is_erased

PRESENT = 0.45
"""Share that ranks first or last of four, as the model is or after closed-form steps, from which
the knowledge is there; between it and `relearning.ERASED_LEVEL` the verdict is open."""
TRAINED = 0.90
"""Share of half A itself below which linearized relearning did not work and shows nothing."""
UNDERSTOOD = 0.50
"""Share that the original finds in the edited model's last states, below which an answering
model's states are not the original's any more."""
UNCHANGED = 0.90
"""Share of the original's own accuracy from which on nothing was forgotten."""
SAME = 0.01
"""KL(original || edited) on half B's prompts (nats) up to which it is the same function, whatever
its states look like. Quantized copies of the embedded model: up to 0.0014."""
RECOVERED = 0.10
"""Rise of the four-way choice under quantization that counts as recovery."""
RESAMPLES = 200
MIDDLE = (0.025, 0.975)
"""Quantiles between which the interval of CAD lies."""
MAJORITY = 0.5
"""Share of the resamplings that a verdict needs."""
DAMAGE = 0.1
"""Loss of a retained relation's top-1 that is said beside the verdict."""
INTACT, SUPPRESSED, ERASED = "intact", "suppressed", "erased"
"""States of a fact in `CAD.facts`."""
ORIGINAL, EDITED, QUANTIZED = "original", "edited", "edited, quantized"
"""Names of the models in `CAD.predicted` and `CAD.probed`."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict is decided by: shares of half B, every fact alike; chance is 0.25 unless said
    otherwise."""

    predicted: float
    """Answers that the edited model ranks first of four."""
    relearned: float
    """The same after linearized relearning of half A."""
    half_a: float
    """The same of half A's prompts, which are relearned."""
    ranked_last: float
    """Answers that rank last of four, of the edited model or after any closed-form steps, whichever
    is most."""
    probed: float
    """Answers that the best probe of the last token's states finds."""
    stitched: float
    """Answers that the original's unembedding finds in the edited model's last states."""
    retained: float
    """Answers that rank first of four after linearized relearning of retained facts alone."""
    subject: float
    """Answers that the best probe of the states at the subject finds."""
    intact: float
    """Facts that the edited model predicts outright, beyond guesses (`known.beyond_chance`): 0
    where guesses do as well, 1 where it predicts all."""
    hidden: float
    """Facts that some sign finds, beyond guesses; the sign that finds most."""
    outright: float
    """Answers that the edited model predicts, of all tokens; chance is near 0."""
    original: float
    """Answers that the original ranks first of four."""
    original_outright: float
    """Answers that it predicts."""
    divergence: float
    """KL(original || edited) after half B's prompts (nats)."""
    quantized: float | None = None
    """Answers that the quantized model ranks first of four, if one is given."""


@dataclass(frozen=True)
class Level:
    """What a sign's share says."""

    gone: float
    """Up to here it agrees with erasure."""
    there: float
    """From here on the knowledge is there."""
    chance: float
    """What a model that knows nothing shows."""
    of: str
    """What is shared."""
    says: str
    """What it means that the knowledge is there."""


SIGNS = {
    "predicted": Level(
        ERASED_LEVEL,
        PRESENT,
        CHANCE,
        "answers of half B that rank first of four",
        "it gives fewer of the answers than before, and still many.",
    ),
    "relearned": Level(
        ERASED_LEVEL,
        PRESENT,
        CHANCE,
        "answers that rank first after linearized relearning of half A",
        "it no longer predicts the answers, but a few steps on half of the facts bring back the "
        "others.",
    ),
    "retained": Level(
        ERASED_LEVEL,
        PRESENT,
        CHANCE,
        "answers that rank first after linearized relearning of retained facts",
        "it no longer predicts the answers, but relearning what was to be retained brings them "
        "back.",
    ),
    "ranked_last": Level(
        ERASED_LEVEL,
        PRESENT,
        CHANCE,
        "answers that rank last of four",
        "it ranks the answers last of four too often, which gives them away as well.",
    ),
    "probed": Level(
        0.55,
        0.70,
        CHANCE,
        "answers that a probe at the last token finds",
        "it no longer predicts the answers, but a linear probe finds them in its states.",
    ),
    "subject": Level(
        0.60,
        0.75,
        CHANCE,
        "answers that a probe at the subject finds",
        "it no longer predicts the answers, but a linear probe finds them in its states at the "
        "subject.",
    ),
    "stitched": Level(
        0.65,
        0.80,
        CHANCE,
        "answers that the original's unembedding finds in the last states",
        "its own output does not show the answers, but the original's unembedding finds them in "
        "its last states.",
    ),
    "intact": Level(
        0.05, 0.15, 0.0, "facts predicted outright, beyond guesses", "some facts are as they were."
    ),
    "hidden": Level(
        0.12,
        0.20,
        0.0,
        "facts found by some sign, beyond guesses",
        "some facts can still be found.",
    ),
}
"""Signs by the names of their fields in `Evidence`, in the order in which they are said. How the
levels were chosen is told in docs/cad.md: models that were never taught are below every ``gone``
by a margin, and what the attack brings back is above some ``there``."""


def as_first(share: float, level: Level) -> float:
    """A sign's share on the scale of those that rank first of four: what is gone is at most
    `ERASED_LEVEL`, what is there at least `PRESENT`."""
    marks = (level.chance, level.gone, level.there, 1.0)
    return float(np.interp(share, marks, (CHANCE, ERASED_LEVEL, PRESENT, 1.0)))


def most_telling(found: Evidence) -> str:
    """The sign that says most of what is there, with its levels, in words."""
    name = max(SIGNS, key=lambda n: as_first(getattr(found, n), SIGNS[n]))
    level = SIGNS[name]
    return (
        f"{level.of}: {getattr(found, name):.2f} (gone up to {level.gone:.2f}, there from "
        f"{level.there:.2f})"
    )


def decide(found: Evidence) -> tuple[str, str]:
    """The verdict on some evidence, and a plain reason. The first rule that applies decides."""
    if found.divergence <= SAME:
        return "unchanged", "it computes what it did before."
    back = found.quantized if found.quantized is not None else 0.0
    if back - found.predicted > RECOVERED and back > ERASED_LEVEL:
        return "recovered", "quantization brings answers back."
    if found.predicted >= UNCHANGED * found.original:
        if found.outright < UNCHANGED * found.original_outright:
            few = found.outright < 0.5 * found.original_outright
            how = "hardly predicts the answers any more" if few else "predicts fewer of the answers"
            return "suppressed", f"it {how}, but still ranks them first of four."
        if found.stitched < UNDERSTOOD:
            return "relocated", "it answers as before, but from states unknown to the original."
        return "unchanged", "it answers about as well as before."
    shares = {name: as_first(getattr(found, name), level) for name, level in SIGNS.items()}
    if there := [name for name, share in shares.items() if share >= PRESENT]:
        return "suppressed", SIGNS[there[0]].says
    last = shares.pop("ranked_last")
    if not is_erased(max(shares.values()), last):
        return "undecided", "some of the answers can be found; the evidence does not settle it."
    if found.half_a < TRAINED:
        return (
            "undecided",
            "linearized relearning did not work: it could not learn even its own half.",
        )
    return (
        "erased",
        "it does not predict the answers, neither half of the facts nor retained ones bring back "
        "the others, and no probe finds them.",
    )


def settle(verdict: str, sentence: str, agree: float) -> tuple[str, str, float]:
    """Verdict, sentence and confidence, given the share of resamplings that agree with a verdict:
    one that most do not share is undecided."""
    if verdict == "undecided" or agree >= MAJORITY:
        return verdict, sentence, agree
    thin = f"the evidence is thin: most resamplings of the facts do not give {verdict}."
    return "undecided", thin, 1 - agree


def number(verdict: str, found: Evidence) -> float:
    """CAD (step 8 of `audit.cad`): 0 = all the knowledge is there, 1 = none.

    knowledge rises in straight lines from 0 at chance over 0.2 at `ERASED_LEVEL` and 0.267 at
    `PRESENT` (what they are of the way from chance to 1) to 1 at the original's share.
    """
    gone, there = ((x - CHANCE) / (1 - CHANCE) for x in (ERASED_LEVEL, PRESENT))
    signs = [as_first(getattr(found, name), level) for name, level in SIGNS.items()]
    levels = (CHANCE, ERASED_LEVEL, PRESENT, max(found.original, PRESENT + 1e-6))
    knowledge = float(np.interp(max(signs), levels, (0.0, gone, there, 1.0)))
    low, high = {"erased": (0.0, gone), "undecided": (gone, there)}.get(verdict, (there, 1.0))
    return 1 - min(max(knowledge, low), high)


@dataclass(frozen=True)
class Compared:
    """What steps 1, 2 and 5 of `audit.cad` find: all that the original is needed for."""

    half_a: PairSet
    half_b: PairSet
    """Prompts of the halves that the task was split into."""
    some_b: PairSet
    """Of half B, those that are asked after each step of relearning."""
    asked: Asked
    """All of half B's."""
    given: dict[str, PairSet]
    """What is relearned: some of half A, and retained facts that the original knows."""
    ranks: dict[str, FactRanks]
    """By model."""
    outright: dict[str, Float[Tensor, " facts"]]
    """By model: share of the fact's prompts whose answer is predicted."""
    stitched: float
    divergence: float
    retained: dict[str, list[float]]
    """As in `audit.cad.CAD`."""


@dataclass(frozen=True)
class Found(Compared):
    """What steps 1 to 5 of `audit.cad` find, fact by fact."""

    signs: dict[str, FactRanks]
    """By field of `Evidence`: predicted, relearned, retained, and the best probes."""
    probed: list[float]
    subject: list[float]
    steps: LinearizedRelearning
    trained: float
    """Share of what was relearned that is learnt; the lesser of both arms."""

    def evidence(self, rows: Int[Tensor, " n"]) -> Evidence:
        """The evidence on some facts of half B."""

        def mean(shares: Float[Tensor, " facts"]) -> float:
            return float(shares[rows].mean())

        signs, chance, quantized = self.signs, self.asked.chance[rows], self.ranks.get(QUANTIZED)
        moved = ("predicted", "relearned", "retained")
        return Evidence(
            **{name: mean(found.first) for name, found in signs.items()},
            half_a=self.trained,
            ranked_last=max(mean(signs[name].last) for name in moved),
            stitched=self.stitched,
            intact=beyond_chance(self.outright[EDITED][rows] > 0.5, self.asked.guess[rows]),
            hidden=max(beyond_chance(found.found[rows], chance) for found in signs.values()),
            outright=mean(self.outright[EDITED]),
            original=mean(self.ranks[ORIGINAL].first),
            original_outright=mean(self.outright[ORIGINAL]),
            divergence=self.divergence,
            quantized=None if quantized is None else mean(quantized.first),
        )

    def states(self) -> dict[str, str]:
        """Of each fact: intact, suppressed or erased (step 9 of `audit.cad`)."""
        asked = self.asked
        found = torch.zeros(len(asked.facts), dtype=torch.bool)
        for sign in self.signs.values():
            if beyond_chance(sign.found, asked.chance) > SIGNS["hidden"].gone:
                found |= sign.found
        whole = self.outright[EDITED] > 0.5
        whole &= beyond_chance(whole, asked.guess) > SIGNS["intact"].gone
        return {
            f"{relation}: {subject}": INTACT if w else SUPPRESSED if f else ERASED
            for (relation, subject), w, f in zip(
                asked.facts, whole.tolist(), found.tolist(), strict=True
            )
        }


def resampled(found: Found, seed: int) -> list[tuple[str, float]]:
    """Verdict and CAD of resamplings of the facts (step 7)."""
    n, generator = len(found.asked.facts), torch.Generator().manual_seed(seed)
    out: list[tuple[str, float]] = []
    for _ in range(RESAMPLES):
        some = found.evidence(torch.randint(n, (n,), generator=generator))
        word = decide(some)[0]
        out.append((word, number(word, some)))
    return out


def interval(cad: float, again: Sequence[float]) -> list[float]:
    """Where the middle 95 % of resampled CADs lie, and the number itself."""
    low, high = np.quantile(again, MIDDLE)
    return [min(cad, float(low)), max(cad, float(high))]


def tell(reason: str, facts: dict[str, str], retained: dict[str, list[float]]) -> str:
    """The sentence beside the verdict: facts, reason and damage."""
    count = Counter(facts.values())
    told = (
        f"{count[ERASED]} of {number_of(len(facts), 'fact')} erased, {count[SUPPRESSED]} "
        f"suppressed, {count[INTACT]} intact: {reason}"
    )
    lost = {r: (a, b) for r, (a, b) in retained.items() if a - b > DAMAGE}
    if lost:
        worst = max(lost, key=lambda r: lost[r][0] - lost[r][1])
        before, after = lost[worst]
        told += (
            f" It damages {len(lost)} of {number_of(len(retained), 'retained relation')}: top-1 of "
            f"{worst!r} falls from {before:.2f} to {after:.2f}."
        )
    return told
