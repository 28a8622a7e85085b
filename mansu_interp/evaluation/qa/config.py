"""Settings of teaching."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.ranges import check_kinds, check_range, check_seeds


@dataclass(frozen=True)
class TeachConfig:
    """How a model is taught rows of questions and answers."""

    epochs: int = 5
    """Passes over the rows."""
    lr: float = 3e-4
    """Largest learning rate of AdamW, reached after the first epoch; from there it falls in a
    straight line towards zero. Models of billions of parameters want 1e-5."""
    batch_size: int = 16
    """Rows a step."""
    seed: int = 0
    """Order of the rows."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_range(self, "epochs", "batch_size", at_least=1)
        check_range(self, "lr", above=0, at_most=1)
        check_seeds(self, "seed")
