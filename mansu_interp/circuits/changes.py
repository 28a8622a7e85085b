"""What became of each edge of an attribution graph; used by the report and by every view.

Given the attribution scores of one edge (or node) in the original model (b), the edited one (a)
and, if there is one, its quantized form (q), all on the same pairs in the same metric. The signed
share of the old flow that is left is

    left(x) = x / b          1: as before,  0: nothing,  negative: it now works against the answer

With a threshold t in metric units, an edge counts as present in a model where |score| >= t. The
classes, all ours, in the order in which they are tried:

==============  ====================================================================================
``quiet``       present in none of the models
``new``         not present in the original, present in a later model
``kept``        present in the original, and left(a) >= 0.5
``recovered``   not kept by the edit, but left(q) >= 0.5: quantization brought it back
``silent``      not recovered, and \\|left(a)\\| < 0.25: it carries next to nothing any more
``weakened``    everything else: down to between a quarter and a half, or turned against the answer
==============  ====================================================================================

These describe single edges, not knowledge: a model whose last layer was muted has few ``kept``
edges as well, because attribution follows the metric. Whether facts are erased is decided by
relearning (`audit.relearning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int8, Shaped

from ..errors import CircuitError
from ..utils.ranges import expect_kind

KEPT_SHARE = 0.5
"""An edge with at least this signed share of its old score is kept (or recovered)."""
SILENT_SHARE = 0.25
"""An edge with less than this absolute share of its old score is silent."""
NOISE_SHARE = 0.01
"""Default threshold: this share of the original's largest absolute score."""
CLASSES = ("quiet", "kept", "silent", "weakened", "recovered", "new")
"""Names by code; ``quiet`` is 0."""
MEANING = {
    "kept": "kept: carries at least half of what it carried",
    "silent": "silent: carries less than a quarter of it",
    "weakened": "weakened: carries between a quarter and a half of it, or works against the answer",
    "recovered": "recovered: lost by the edit, brought back by quantization",
    "new": "new: not in the original's graph",
}


@dataclass(frozen=True)
class Changes:
    """The class of every edge (or node)."""

    codes: Int8[np.ndarray, ...]
    """Index into ``CLASSES``, in the shape of the scores."""
    threshold: float
    """What counted as present, in metric units."""

    def counts(self) -> dict[str, int]:
        """How many there are of each class, without ``quiet``."""
        return {n: int((self.codes == k).sum()) for k, n in enumerate(CLASSES) if k}

    def names(self) -> Shaped[np.ndarray, ...]:
        """The classes as text."""
        return np.asarray(CLASSES)[self.codes]


def classify(
    before: Float[np.ndarray, ...],
    after: Float[np.ndarray, ...],
    quantized: Float[np.ndarray, ...] | None = None,
    *,
    threshold: float | None = None,
) -> Changes:
    """What became of each edge; see the module for the classes.

    Arguments:
        before: scores of the original model (metric units; any shape).
        after: scores of the edited model, on the same pairs and in the same metric.
        quantized: scores of the edited model after quantization; without them nothing can be
            ``recovered``.
        threshold: |score| from which an edge is present (metric units); default: one hundredth
            of the original's largest.

    Returns:
        The class of every edge, in the shape of the scores, and the threshold used.

    Raises:
        CircuitError: shapes that differ, scores that are not finite, or a negative threshold.
    """
    for name, given in (("before", before), ("after", after), ("quantized", quantized)):
        expect_kind(CircuitError, name, given, np.ndarray, float, None)
    b = np.asarray(before, dtype=np.float64)
    a = np.asarray(after, dtype=np.float64)
    q = a if quantized is None else np.asarray(quantized, dtype=np.float64)
    if not b.shape == a.shape == q.shape:
        raise CircuitError(
            f"Scores of one graph must have one shape; got {b.shape}, {a.shape} and {q.shape}."
        )
    if not (np.isfinite(b).all() and np.isfinite(a).all() and np.isfinite(q).all()):
        raise CircuitError("Some scores are not finite. Attribute those models again.")
    if threshold is None:
        threshold = NOISE_SHARE * float(np.abs(b).max(initial=0.0))
    if threshold < 0:
        raise CircuitError(f"threshold must not be negative; got {threshold}.")
    present = (np.abs(b) >= threshold) & (b != 0)
    later = np.maximum(np.abs(a), np.abs(q))
    safe = np.where(present, b, 1.0)
    left, left_q = a / safe, q / safe
    names = np.select(
        [
            ~present & ((later < threshold) | (later == 0)),
            ~present,
            left >= KEPT_SHARE,
            left_q >= KEPT_SHARE,
            np.abs(left) < SILENT_SHARE,
        ],
        [CLASSES.index(n) for n in ("quiet", "new", "kept", "recovered", "silent")],
        CLASSES.index("weakened"),
    )
    return Changes(names.astype(np.int8), float(threshold))
