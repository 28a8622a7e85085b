"""Settings of attribution and discovery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..utils.ranges import check_kinds, check_range


@dataclass(frozen=True)
class AttributionConfig:
    """How edges are scored."""

    method: Literal["eap-ig", "eap"] = "eap-ig"
    """eap-ig averages the gradient over the path from corrupt to clean; eap takes one point."""
    ig_steps: int = 5
    """Points on the path (eap-ig)."""
    at: Literal["corrupt", "clean"] = "corrupt"
    """Where eap takes its gradient."""
    metric: Literal["logit_diff", "log_prob", "choice_margin", "kl"] = "logit_diff"
    """What is attributed."""
    pairs: int = 96
    """Pairs used, drawn evenly over phrasings."""
    batch_size: int = 16
    """Pairs per forward pass; changes memory and speed, not scores."""
    memory_gb: float | None = None
    """Memory (GB) that attribution may take beyond the model's own passes; fewer pairs are taken
    per pass if need be."""

    def __post_init__(self) -> None:
        check_kinds(self)
        if min(self.ig_steps, self.pairs, self.batch_size) < 1:
            raise ConfigError(
                "ig_steps, pairs and batch_size must be at least 1; got "
                f"{self.ig_steps}, {self.pairs}, {self.batch_size}."
            )
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ConfigError(f"memory_gb must be positive; got {self.memory_gb}.")
        check_range(self, "memory_gb")

    def path(self) -> list[float]:
        """Positions on the line, 0 = corrupt, 1 = clean; each has equal weight."""
        if self.method == "eap":
            return [0.0 if self.at == "corrupt" else 1.0]
        return [(k + 0.5) / self.ig_steps for k in range(self.ig_steps)]


@dataclass(frozen=True)
class CircuitConfig(AttributionConfig):
    """How the circuit is discovered."""

    faithfulness: float = 0.85
    """The circuit is the fewest edges that reach this ablate-outside faithfulness."""
    top: int | None = None
    """Take so many edges instead of searching for the fewest."""
    threshold: float | None = None
    """Take the edges whose absolute score is at least this instead of searching for the fewest."""
    ablation: Literal["corrupt", "mean", "zero"] = "corrupt"
    """What edges outside the circuit carry while faithfulness is measured."""
    faithfulness_pairs: int = 32
    """Forget pairs on which faithfulness is measured during the search."""
    removal_tries: int = 0
    """Circuits that may be tried to leave out further edges of the fewest, by exact ablation, while
    faithfulness stays at its target; 0 = the ranking alone, as with top and threshold."""
    retain_discount: float = 1.0
    """Discount on edges that the retain set needs: edges are ranked by
    |forget| - retain_discount x |retain|, at least a tenth of |forget| (0 = forget alone)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not 0 < self.faithfulness <= 1
            or self.faithfulness_pairs < 1
            or self.retain_discount < 0
        ):
            raise ConfigError(
                "faithfulness must lie in (0, 1], faithfulness_pairs be at least 1 and "
                f"retain_discount not negative; got {self.faithfulness}, "
                f"{self.faithfulness_pairs}, {self.retain_discount}."
            )
        check_range(self, "retain_discount", "threshold")
        check_range(self, "removal_tries", at_least=0)
        if self.top is not None and self.threshold is not None:
            raise ConfigError("Give top or threshold, not both.")
        if (self.top is not None and self.top < 1) or (self.threshold or 0) < 0:
            raise ConfigError(
                f"top must be at least 1 and threshold not negative; got {self.top}, "
                f"{self.threshold}."
            )


Format = Literal[
    "eap-ig", "transformer-lens", "neuronpedia", "node-link", "graphml", "gexf", "native"
]
"""What a circuit can be written as; see `write_circuit`."""
