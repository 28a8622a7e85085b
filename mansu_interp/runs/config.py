"""Settings of a run, and of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..circuits.config import AttributionConfig, CircuitConfig
from ..errors import ConfigError
from ..evaluation.versions import QUANTIZER
from ..unlearning.methods import Mansu, MethodConfig
from ..utils.ranges import check_kinds, check_range, check_seeds
from ..utils.shipped import quantizer_names


@dataclass(frozen=True)
class RunConfig:
    """One whole job: discover, mask, unlearn, quantize, compare, report."""

    model: str = "facts"
    """Embedded model, Hugging Face folder, or hub name (owner/name)."""
    task: str | None = None
    """Shipped task or path of a task file; default: countries for embedded models, else
    world-capitals."""
    out: Path = Path("runs/latest")
    """Folder for everything the run writes."""
    budget: float = 0.005
    """Share of all parameters that may be edited, in (0, 1]."""
    damage_damping: float = 100.0
    """Median retain damages below which damage hardly counts in the choice of parameters; smaller
    is more cautious and forgets less."""
    retain_gradient_weight: float = 1.0
    """Weight of the retain answers' gradient against the forget gradient in the choice of
    parameters; 0 ignores what retain and forget answers share."""
    frozen_layers: float = 0.0
    """Share of the layers, counted from the input, in which nothing is edited."""
    subject_rows: bool = False
    """Edit the forget subjects' own rows of the embedding, too, within the same budget: what can be
    read there comes back by relearning, whatever is done to the layers."""
    by_layer: bool = False
    """Choose parameters with gradients and Fisher information of one layer at a time: the same mask
    with less memory and more passes."""
    seed: int = 0
    """Seed of every draw."""
    score_pairs: int = 200
    """Prompts per scored set, drawn evenly over its unseen phrasings."""
    quantizers: tuple[str, ...] = ()
    """Quantizers to score besides nf4 and those that every edit survives, or engines (llama.cpp,
    transformers, vllm, all)."""
    leaks: Literal["auto", "yes", "no", "quantized"] = "auto"
    """Ask for the forgotten facts in other words, forms and languages (docs/leaks.md). auto: of
    models above ten million parameters; quantized: after every quantizer of the run, too."""
    leak_prompts: bool = False
    """Unlearn in the train part of the leak test's templates, too; what is reported is the unseen
    part (docs/leaks.md)."""
    relearn_steps: int = 20
    """Steps of the relearning attack that tests erasure, on half of the forget facts; 0 = none."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which weights are held and layers compute; edits, losses and sums are float32 in either.
    auto: bfloat16 of a checkpoint that is stored in it and has ten million parameters or more,
    where the device is quick at it (GPUs, processors with AVX-512); else float32."""
    threads: int | None = None
    """CPU threads; default: one for models below ten million parameters, which do not gain from
    more, else torch's own choice."""
    circuit: CircuitConfig = field(default_factory=CircuitConfig)
    """How the circuit is discovered."""
    unlearn: MethodConfig = field(default_factory=Mansu)
    """The method that edits the model, and its settings."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantizers", quantizer_names(self.quantizers))
        check_kinds(self)
        check_seeds(self, "seed")
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"The budget is a share of all parameters in (0, 1]; got {self.budget}."
            )
        check_range(self, "damage_damping", "retain_gradient_weight", "relearn_steps", at_least=0)
        check_range(self, "frozen_layers", at_least=0, below=1)
        check_range(self, "score_pairs", "threads", at_least=1)
        if not isinstance(self.unlearn, MethodConfig) or not self.unlearn.method:
            raise ConfigError(
                "unlearn must be the settings of a method, such as Mansu(); got "
                f"{self.unlearn!r:.80}."
            )


def deployed(config: RunConfig) -> list[str]:
    """Quantizers that the properties are held to: nf4 and the set that the edit is to survive."""
    return list(dict.fromkeys((QUANTIZER, *config.unlearn.promised)))


def scored(config: RunConfig) -> list[str]:
    """Quantizers after which everything is scored: those, and what is measured beside them."""
    beside = (*config.unlearn.trained_through, *config.quantizers)
    return list(dict.fromkeys((*deployed(config), *beside)))


@dataclass(frozen=True)
class PlanConfig:
    """What scoring the edges of a model, and a run, would take, from its configuration alone."""

    model: str = "facts"
    """Embedded model, config.json, Hugging Face folder, or hub name (its config.json is read)."""
    tokens: int = 15
    """Tokens of the longest prompt."""
    budget: float = 0.005
    """Share of all parameters that a run may edit, in (0, 1]."""
    survive: tuple[str, ...] = Mansu().survive
    """Quantizers that a run's edits survive."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which weights would be held, as in mansu run, on this machine."""
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    """How edges would be scored."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "survive", quantizer_names(self.survive, "exact"))
        check_kinds(self)
        check_range(self, "tokens", at_least=1)
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"The budget is a share of all parameters in (0, 1]; got {self.budget}."
            )
