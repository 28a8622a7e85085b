"""Settings of the relearning attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..utils.ranges import check_kinds, check_range, check_seeds


@dataclass(frozen=True)
class RelearnConfig:
    """How hard a relearning attack tries."""

    steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Fine-tuning steps after which the other half is asked for, ascending."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates; each attacks a fresh copy, and the one that brings back most counts."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """adam, or sgd with momentum 0.9 (which wants rates some hundred times as large)."""
    batch_size: int = 48
    """Prompts per step."""
    seed: int = 0
    """Which half of the subjects is relearned, and the order of batches."""

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ConfigError(f"steps must be positive and ascending; got {self.steps}.")
        if not self.rates or min(self.rates) <= 0 or self.batch_size < 1:
            raise ConfigError(
                "rates must be positive and batch_size at least 1; got "
                f"{self.rates}, {self.batch_size}."
            )
        check_range(self, "rates")
        check_seeds(self, "seed")


SUITE = RelearnConfig(steps=(5, 20, 80, 200), rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
"""Of the attack suite; `RelearnConfig()` is the quick attack."""
