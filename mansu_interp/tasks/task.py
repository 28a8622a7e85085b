"""A task: what to forget and what to retain, tokenized for one model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from .pairs import PairSet, Tokens

CALIBRATION_TEXTS, CALIBRATION_PROMPTS = 32, 512


@dataclass(frozen=True)
class Task:
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

    def __repr__(self) -> str:
        sizes = f"{len(self.forget):,} forget and {len(self.retain):,} retain pairs"
        return f"Task({self.name!r}: {sizes})"

    @property
    def retain_sets(self) -> list[PairSet]:
        """What must stay: the retain pairs, and the retain_unscored pairs if there are any."""
        return [self.retain, *([self.retain_unscored] if self.retain_unscored else [])]

    @property
    def held_out(self) -> PairSet:
        """The forget facts in every unseen phrasing."""
        unseen = self.scored["unseen"]["forget"].values()
        return PairSet("held out", tuple(p for pairs in unseen for p in pairs))

    @cached_property
    def sha256(self) -> str:
        """Hash of all prompts, answers and texts, as tokens."""
        parts = (self.forget, self.retain, self.retain_unscored, self.scored, self.text)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def calibration(self) -> list[Tokens]:
        """Token rows for calibrated quantizers: running text and retain prompts, as somebody who
        knows nothing of the forget facts would take them."""
        prompts = self.retain.sample(CALIBRATION_PROMPTS, 0)
        return [*self.text.get("train", ())[:CALIBRATION_TEXTS], *(p.clean for p in prompts)]
