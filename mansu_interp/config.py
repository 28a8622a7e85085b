"""Every setting, once: these dataclasses are the Python API, the command line and config.json.

Knows nothing of torch, so that ``mansu --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .errors import ConfigError


def _names(given: Iterable[str]) -> tuple[str, ...]:
    """Names separated by spaces or commas."""
    return tuple(n for part in given for n in part.replace(",", " ").split())


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
    """Memory that attribution may take beyond the model's own passes; fewer pairs per pass are
    taken if need be."""

    def __post_init__(self) -> None:
        if min(self.ig_steps, self.pairs, self.batch_size) < 1:
            raise ConfigError(
                "ig_steps, pairs and batch_size must be at least 1; got "
                f"{self.ig_steps}, {self.pairs}, {self.batch_size}."
            )
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ConfigError(f"memory_gb must be positive; got {self.memory_gb}.")
        if self.method not in ("eap", "eap-ig") or self.at not in ("corrupt", "clean"):
            raise ConfigError(
                f"Unknown method {self.method!r} at {self.at!r}; expected eap or eap-ig, at "
                "corrupt or clean."
            )

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
    selective: float = 1.0
    """Discount on edges that the retain set needs: edges are ranked by
    |forget| - selective x |retain|, never below a tenth of |forget| (0 = forget alone)."""
    seed: int = 0
    """Which pairs are drawn (a run sets this to its own seed)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.faithfulness <= 1 or self.faithfulness_pairs < 1 or self.selective < 0:
            raise ConfigError(
                "faithfulness must lie in (0, 1], faithfulness_pairs be at least 1 and selective "
                f"not negative; got {self.faithfulness}, {self.faithfulness_pairs}, "
                f"{self.selective}."
            )
        if self.top is not None and self.threshold is not None:
            raise ConfigError("Give top or threshold, not both.")
        if (self.top is not None and self.top < 1) or (self.threshold or 0) < 0:
            raise ConfigError(
                f"top must be at least 1 and threshold not negative; got {self.top}, "
                f"{self.threshold}."
            )


@dataclass(frozen=True)
class UnlearnConfig:
    """How the model is edited."""

    method: Literal["mansu", "graddiff", "npo"] = "mansu"
    """mansu edits inside the mask; graddiff and npo are dense baselines."""
    steps: int = 250
    """Optimiser steps (dense methods: at most)."""
    lr: float = 0.03
    """Step size: in units of each block's absmax for mansu, of weights for dense methods."""
    batch_size: int = 48
    """Forget pairs per step; as many retain pairs beside them."""
    forget_loss: Literal["counterfactual", "ga"] = "counterfactual"
    """mansu: towards what a model that never knew would say, or gradient ascent."""
    push: float = 1.0
    """mansu: weight of the distance between the answer's log-probability and its target."""
    margin: float = 0.5
    """mansu: nats by which that target lies below what the model says of other subjects; negative:
    above, which puts the answer level with rivals that differ among themselves."""
    retain_weight: float = 2.0
    """Weight of the retain loss: KL to the original (graddiff: NLL of the answer)."""
    hold: float = 1.0
    """mansu: weight, within the retain loss, of the hinge that holds known retain answers."""
    projection: float = 1.0
    """mansu: strength of the null-space projection; 0 = none."""
    survive: tuple[str, ...] = ("nf4",)
    """mansu: quantizers that every edit survives by construction (`mansu list` names them); steps
    alternate between full precision and each of them in turn. Separated by spaces or commas."""
    stop_at: float | None = None
    """Dense methods: stop when four-way forget accuracy on the dev phrasings is at most this."""
    seed: int = 0
    """Order of batches (a run sets this to its own seed)."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.batch_size < 1:
            raise ConfigError(
                "steps and batch_size must be at least 1 and lr positive; got "
                f"{self.steps}, {self.batch_size}, {self.lr}."
            )
        names = _names(self.survive)
        object.__setattr__(self, "survive", names)
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"survive names one or more different quantizers; got {', '.join(names) or 'none'}."
            )
        if self.forget_loss not in ("counterfactual", "ga"):
            raise ConfigError(
                f"Unknown forget_loss {self.forget_loss!r}; expected counterfactual or ga."
            )
        if min(self.push, self.retain_weight, self.hold, self.projection) < 0:
            raise ConfigError("push, retain_weight, hold and projection must not be negative.")


@dataclass(frozen=True)
class PlanConfig:
    """What scoring the edges of a model would take, from its configuration alone."""

    model: str = "facts"
    """Embedded model, config.json, Hugging Face folder, or hub name (its config.json is read)."""
    tokens: int = 15
    """Tokens of the longest prompt."""
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    """How edges would be scored."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1; got {self.tokens}.")


@dataclass(frozen=True)
class VerifyConfig:
    """What `mansu verify` compares."""

    original: Positional[str]
    """The checkpoint before the edit: embedded model, Hugging Face folder, or hub name."""
    edited: Positional[str]
    """The checkpoint after it."""
    survive: tuple[str, ...] = ()
    """The quantizers that every edit must survive; default: those of the ledger, or nf4."""
    ledger: Path | None = None
    """ledger.safetensors of the run; it must agree with both checkpoints."""
    mask: Path | None = None
    """mask.safetensors of the run; no edit may lie outside it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "survive", _names(self.survive))


@dataclass(frozen=True)
class RunConfig:
    """One whole job: discover, mask, unlearn, quantize, compare, report."""

    model: str = "facts"
    """Embedded model, Hugging Face folder, or hub name (owner/name)."""
    task: str | None = None
    """Shipped task or path of a task file; default: capitals for embedded models, else
    world-capitals."""
    out: Path = Path("runs/latest")
    """Folder for everything the run writes."""
    budget: float = 0.005
    """Share of all parameters that may be edited, in (0, 1]."""
    damping: float = 100.0
    """Median retain damages below which damage hardly counts in the choice of parameters; smaller
    is more cautious and forgets less."""
    hold: float = 1.0
    """Weight of the retain answers' gradient against the forget gradient in the choice of
    parameters; 0 ignores what retain and forget answers share."""
    depth: float = 0.0
    """Share of the layers, counted from the input, in which nothing is edited."""
    by_layer: bool = False
    """Choose parameters holding gradients and Fisher of one layer at a time: the same mask with
    less memory and more passes."""
    seed: int = 0
    """Seed of every draw."""
    score_pairs: int = 200
    """Prompts per scored set, drawn evenly over its unseen phrasings."""
    quantizers: tuple[str, ...] = ()
    """Quantizers to score besides nf4 and those of unlearn.survive."""
    threads: int | None = None
    """CPU threads; default: torch's own choice."""
    circuit: CircuitConfig = field(default_factory=CircuitConfig)
    """How the circuit is discovered."""
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    """How the model is edited."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantizers", _names(self.quantizers))
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"The budget is a share of all parameters in (0, 1]; got {self.budget}."
            )
        if self.damping < 0 or self.hold < 0 or not 0 <= self.depth < 1:
            raise ConfigError(
                "damping and hold must not be negative and depth lie in [0, 1); got "
                f"{self.damping}, {self.hold}, {self.depth}."
            )
        if self.score_pairs < 1 or (self.threads is not None and self.threads < 1):
            raise ConfigError(
                f"score_pairs and threads must be at least 1; got {self.score_pairs}, "
                f"{self.threads}."
            )
