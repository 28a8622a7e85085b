"""What became of each edge of an attribution graph; used by the report and by every view.

Given the attribution scores of one edge (or node) in the original model (b), the edited one (a)
and, if they are given, its quantized form (q) and the edited one after relearning half of the facts
(r), all on the same pairs in the same metric, prompts of the other half. The signed share of the
old flow that is left is

    left(x) = x / b          1: as before,  0: nothing,  negative: it now works against the answer

With a threshold t in metric units, an edge counts as present in a model where |score| >= t. The
classes, all ours, in the order in which they are tried:

==============  ====================================================================================
``quiet``       present in none of the models
``new``         not present in the original, present in a later model
``kept``        present in the original, and left(a) >= 0.5
``recovered``   not kept by the edit, but left(q) >= 0.5: quantization brought it back
``suppressed``  with r: neither, but left(r) >= 0.5: half of the facts brought it back
``erased``      with r: everything else
``silent``      without r: not recovered, and \\|left(a)\\| < 0.25: next to nothing is left
``weakened``    without r: everything else, between a quarter and a half, or against the answer
==============  ====================================================================================

Attribution follows the metric, so the graph of a model that no longer answers is nearly empty
whatever it still knows: alone it cannot tell the two apart, and without r no edge is called
suppressed or erased. After half of the facts were relearned, the graph on the other half's prompts
shows what came back with them. Some of it comes back in any model, since relations share structure:
where the scores of a reference model that was never taught are given, treated alike (n), an edge is
kept, recovered or suppressed only if it carries more than there, left > left(n). Whether the facts
themselves are erased is decided by the answers (`audit.relearning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int8, Shaped

from ..errors import CircuitError
from ..utils.ranges import entrance
from ..utils.words import Shown

Floats = Float[np.ndarray, "..."]
Codes = Int8[np.ndarray, "..."]
Flags = Bool[np.ndarray, "..."]
Names = Shaped[np.ndarray, "..."]

KEPT_SHARE = 0.5
"""An edge with at least this signed share of its old score is kept (or recovered)."""
SILENT_SHARE = 0.25
"""An edge with less than this absolute share of its old score is silent."""
NOISE_SHARE = 0.01
"""Default threshold: this share of the original's largest absolute score."""
CLASSES = ("quiet", "kept", "silent", "weakened", "recovered", "new", "suppressed", "erased")
"""Names by code; ``quiet`` is 0."""
MEANING = {
    "kept": "kept: carries at least half of what it carried",
    "silent": "silent: carries less than a quarter of it",
    "weakened": "weakened: carries between a quarter and a half of it, or works against the answer",
    "recovered": "recovered: lost by the edit, brought back by quantization",
    "new": "new: not in the original's graph",
    "suppressed": "suppressed: silent, but relearning half of the facts brings it back",
    "erased": "erased: relearning half of the facts does not bring it back",
}


@dataclass(frozen=True, repr=False)
class Changes(Shown):
    """The class of every edge (or node)."""

    codes: Codes
    """Index into ``CLASSES``, in the shape of the scores."""
    threshold: float
    """What counted as present, in metric units."""

    relearned: bool = False
    """Whether there were scores after relearning, which tell suppressed from erased."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        return {**self.counts(), "threshold": self.threshold}

    def counts(self) -> dict[str, int]:
        """How many there are of each class, without ``quiet`` and those that cannot be."""
        never = ("silent", "weakened") if self.relearned else ("suppressed", "erased")
        names = [n for n in CLASSES[1:] if n not in never]
        return {n: int((self.codes == CLASSES.index(n)).sum()) for n in names}

    def names(self) -> Names:
        """The classes as text."""
        return np.asarray(CLASSES)[self.codes]


@entrance(CircuitError)
def classify(
    before: Floats,
    after: Floats,
    quantized: Floats | None = None,
    *,
    relearned: Floats | None = None,
    never_taught: Floats | None = None,
    threshold: float | None = None,
) -> Changes:
    """What became of each edge; see the module for the classes.

    Arguments:
        before: scores of the original model (metric units; any shape).
        after: scores of the edited model, on the same pairs and in the same metric.
        quantized: scores of the edited model after quantization; without them nothing can be
            ``recovered``.
        relearned: scores of the edited model after relearning half of the facts, on prompts of the
            other half, as all scores then are.
        never_taught: the same of a model that was never taught them.
        threshold: |score| from which an edge is present (metric units); default: one hundredth
            of the original's largest.

    Returns:
        The class of every edge, in the shape of the scores, and the threshold used.

    Raises:
        CircuitError: shapes that differ, scores that are not finite, or a negative threshold.
    """
    found = _checked(
        before=before,
        after=after,
        quantized=quantized,
        relearned=relearned,
        never_taught=never_taught,
    )
    if threshold is None:
        threshold = NOISE_SHARE * float(np.abs(found["before"]).max(initial=0.0))
    if threshold < 0:
        raise CircuitError(f"threshold must not be negative; got {threshold}.")
    return Changes(_codes(found, threshold), float(threshold), relearned is not None)


def _checked(**given: object) -> dict[str, Floats]:
    """The scores that were given, by name.

    Raises:
        CircuitError: shapes that differ, or scores that are not finite.
    """
    found = {k: np.asarray(v, dtype=np.float64) for k, v in given.items() if v is not None}
    shape = found["before"].shape
    if shapes := {k: v.shape for k, v in found.items() if v.shape != shape}:
        raise CircuitError(
            f"Scores of one graph must have one shape, {shape} as before; got {shapes}."
        )
    if not all(np.isfinite(v).all() for v in found.values()):
        raise CircuitError("Some scores are not finite. Attribute those models again.")
    return found


def _codes(found: dict[str, Floats], threshold: float) -> Codes:
    """The class of every edge, by the table of the module."""
    b, a = found["before"], found["after"]
    present = (np.abs(b) >= threshold) & (b != 0)
    later = np.maximum(np.abs(a), np.abs(found.get("quantized", a)))
    left = {k: v / np.where(present, b, 1.0) for k, v in found.items()}
    beyond = left.get("never_taught", np.full_like(b, -np.inf))

    def carries(name: str) -> Flags:
        share = left.get(name)
        return np.zeros_like(present) if share is None else (share >= KEPT_SHARE) & (share > beyond)

    rules = {
        "quiet": ~present & ((later < threshold) | (later == 0)),
        "new": ~present,
        "kept": carries("after"),
        "recovered": carries("quantized"),
        "suppressed": carries("relearned"),
        "erased": np.full_like(present, "relearned" in found),
        "silent": np.abs(left["after"]) < SILENT_SHARE,
    }
    codes = np.select(
        [*rules.values()], [CLASSES.index(n) for n in rules], CLASSES.index("weakened")
    )
    return codes.astype(np.int8)
