"""Settings of attribution and discovery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import CircuitError, ConfigError
from ..models.graph import Graph
from ..utils.ranges import check_kinds, check_range

PULLED = 8
"""Tensors of the size of a layer's readers' gradients that are alive at once."""


@dataclass(frozen=True)
class AttributionConfig:
    """How edges are scored."""

    method: Literal["eap-ig", "eap", "eap-ig-activations"] = "eap-ig"
    """eap-ig averages the gradient over the path from the corrupt to the clean input embedding; eap
    takes one point; eap-ig-activations moves what one layer's heads or MLP put out instead, one
    after the other, which takes twice as many passes as there are layers for each point."""
    ig_steps: int = 5
    """Points on the path (eap-ig, eap-ig-activations)."""
    at: Literal["corrupt", "clean", "both"] = "corrupt"
    """Where eap takes its gradient; both: the mean of the two."""
    rules: Literal["gradient", "gim", "relp"] = "gradient"
    """What goes backward: the gradient, or what GIM or RelP put in its place at norms, attention
    and products."""
    ablation: Literal["corrupt", "mean", "zero"] = "corrupt"
    """What an ablated edge carries: its value in the corrupt run, its mean over the corrupt prompts
    at the same position, or zero. Scores are of the change from there to the clean value; in a
    search, edges outside the circuit carry it."""
    metric: Literal["logit_diff", "log_prob", "choice_margin", "kl"] = "logit_diff"
    """What is attributed."""
    pairs: int = 96
    """Pairs used, drawn evenly over phrasings."""
    batch_size: int = 16
    """Pairs per forward pass; changes memory and speed, not scores."""
    memory_gb: float | None = None
    """Memory (GB) that attribution may take beyond the model's own passes; fewer pairs are taken
    per pass if need be and, where one is too much, the differences of a few layers at a time."""

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
        if self.at != "corrupt" and self.method != "eap":
            raise ConfigError(
                f"at is where eap takes its gradient; got at={self.at} with {self.method}, which "
                "takes it all along the path. Give method eap, or leave at out."
            )

    def components(self, n_layers: int) -> int:
        """How many components a path moves, each in passes of its own."""
        return 2 * n_layers + 1 if self.method == "eap-ig-activations" else 1

    def path(self) -> list[float]:
        """Positions on the line, 0 = corrupt, 1 = clean; each has equal weight."""
        if self.method == "eap":
            return {"corrupt": [0.0], "clean": [1.0], "both": [0.0, 1.0]}[self.at]
        return [(k + 0.5) / self.ig_steps for k in range(self.ig_steps)]


def _upwards(gb: float) -> str:
    """Two digits, which are enough."""
    unit = 10.0 ** (math.floor(math.log10(gb)) - 1)
    return f"{math.ceil(gb / unit) * unit:.2g}"


class Fit(NamedTuple):
    """What fits into `AttributionConfig.memory_gb`."""

    pairs: int
    """Pairs per pass."""
    gb: float
    """What one of them needs (GB)."""
    layers: int
    """Layers whose writers' differences are held at a time."""


def fit_memory(graph: Graph, d_model: int, positions: int, config: AttributionConfig) -> Fit:
    """How many pairs fit into ``config.memory_gb`` and, where not even one does, how many layers of
    one.

    Counted is what attribution adds to the forward and backward passes, in vectors (d_model,
    float32) a position: the writers' differences, and `PULLED` times a layer's readers while their
    gradients are pulled back; by layers, the differences of those layers alone, and what both runs
    passed at all hook points.

    Raises:
        CircuitError: not even one layer of one pair fits.
    """
    a, unit = graph.architecture, positions * d_model * 4 / 1e9
    pulled = PULLED * graph.readers_per_layer
    one = (len(graph.writers) + pulled) * unit
    if config.memory_gb is None:
        return Fit(config.batch_size, one, a.n_layers)
    if (pairs := int(config.memory_gb / one)) >= 1:
        return Fit(min(config.batch_size, pairs), one, a.n_layers)
    rest = 2 * (2 * a.n_layers + 1) + pulled
    layers = int((config.memory_gb / unit - rest - 1) / (a.n_heads + 1))
    layers = min(layers, a.n_layers - 1)
    needs = (rest + 1 + max(layers, 1) * (a.n_heads + 1)) * unit
    if layers < 1:
        raise CircuitError(
            f"One pair of {positions} tokens needs {_upwards(min(one, needs))} GB beyond the "
            f"model's own passes, even by layers; memory_gb is {config.memory_gb}. Give more, or "
            "shorter prompts."
        )
    return Fit(1, needs, layers)


@dataclass(frozen=True)
class CircuitConfig(AttributionConfig):
    """How the circuit is discovered."""

    faithfulness: float = 0.85
    """The circuit is the fewest edges that reach this ablate-outside faithfulness."""
    top: int | None = None
    """Take so many edges instead of searching for the fewest."""
    threshold: float | None = None
    """Take the edges whose absolute score, less the discount of what the retain pairs need, is at
    least this instead of searching for the fewest."""
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
