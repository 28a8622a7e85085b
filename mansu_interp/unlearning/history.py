"""What a method's steps came to: the record behind ``history.json``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import ArtifactError
from ..utils.files import Json, expect, read_json


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. Losses are means over the step's batch, in nats; None: there is none."""

    forget: float
    """Forget loss."""
    retain: float | None = None
    """Retain loss, before its weight."""
    adversarial: float | None = None
    """Ranking loss at the relearned point."""
    probe: float | None = None
    """What the probe reads of the other half: a mean of positive z-scores."""
    edited: float | None = None
    """Weights that differ from the original."""
    choice: float | None = None
    """Four-way forget accuracy on the dev phrasings, where the forgetting level was looked at: the
    first model's above the level, or the highest."""
    above_target: float | None = None
    """After the last step: nats by which the mean answer excess is above the final margin."""
    final_margin_edits: float | None = None
    """After the last step: edits made for the final margin."""
    quantization_margin_reached: float | None = None
    """After the last step: the quantization margin (nats) less what the quantized model lacks that
    lacks most of its own."""
    quantization_margin_edits: float | None = None
    """After the last step: edits made for the quantization margin."""

    def to_json(self) -> dict[str, float | None]:
        """The record as plain JSON values, without what there is none of."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, found: dict[str, Json]) -> StepRecord:
        """A record as `to_json` gave it; a loss that was not finite is null in JSON, and NaN here.

        Raises:
            ValueError: something is missing, or unknown.
        """
        if odd := sorted(found.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"a step's record has an unknown {odd[0][:80]!r}")
        if "forget" not in found:
            raise ValueError("a step's record has no forget loss")
        given: dict[str, Json] = {k: math.nan if v is None else v for k, v in found.items()}
        return cls(**given)


History = list[StepRecord]
"""A record per step."""


def read_history(path: Path) -> History:
    """The record in a ``history.json``.

    Raises:
        ArtifactError: missing, damaged, or the record of no step.
    """
    found = read_json(path)
    try:
        expect(found, [{...: (float, None)}], "it")
        if not found:
            raise ValueError("it holds no step")
        return [StepRecord.from_json(step) for step in found]
    except ValueError as error:
        raise ArtifactError(f"{path} is no record of unlearning: {error}.") from error
