"""Which model a score belongs to."""

from __future__ import annotations

from dataclasses import dataclass

QUANTIZER = "nf4"
"""Every run is scored after it, beside those that its edit is to survive."""


@dataclass(frozen=True)
class ModelVersion:
    """A model in full precision, or after a quantizer: the key of everything that is scored."""

    name: str
    """original, unlearned, or never taught."""
    quantizer: str | None = None
    """None: full precision."""

    def after(self, quantizer: str | None) -> ModelVersion:
        """The same model after a quantizer; None: in full precision."""
        return ModelVersion(self.name, quantizer)

    def __str__(self) -> str:
        return self.name if self.quantizer is None else f"{self.name} {self.quantizer}"


ORIGINAL = ModelVersion("original")
"""The model before unlearning."""
EDITED = ModelVersion("unlearned")
"""The model after it."""
NEVER_TAUGHT = ModelVersion("never taught")
"""The reference model: trained without the forget facts."""
RELEARNED = ModelVersion("unlearned, half relearned")
"""The edited model after relearning half of the forget facts."""
NEVER_TAUGHT_RELEARNED = ModelVersion("never taught, half relearned")
"""The reference model after the same."""
