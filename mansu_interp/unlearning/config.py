"""Settings of unlearning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ..errors import ConfigError
from ..utils.shipped import split_names

Method = Literal[
    "mansu", "mansu-random-mask", "mansu-whole-model", "mansu-no-projection", "mansu-no-offsets",
    "mansu-no-floor", "ga", "graddiff", "kl", "npo", "simnpo", "dpo", "idkdpo", "rmu", "undial",
    "wga", "satimp", "task-vector", "sure",
]  # fmt: skip
"""MANSU; MANSU without its circuit (random mask, mask over the whole model), without projection,
without steering and without floor; and baselines that train all weights."""

METHODS: tuple[Method, ...] = get_args(Method)

BASELINES = tuple(m for m in METHODS if not m.startswith("mansu"))


@dataclass(frozen=True)
class BaselineConfig:
    """What single baselines have beside a learning rate; defaults are those usual for each."""

    npo_beta: float = 0.1
    """npo: inverse temperature beta."""
    simnpo_beta: float = 4.5
    """simnpo: inverse temperature beta."""
    simnpo_delta: float = 0.0
    """simnpo: reward margin delta (nats per token)."""
    dpo_beta: float = 0.1
    """dpo, idkdpo: inverse temperature beta."""
    rmu_layer: int | None = None
    """rmu: layer whose output is misdirected, from 0; default: at 7/32 of the depth."""
    rmu_scale: float = 20.0
    """rmu: length c of the random target."""
    undial_beta: float = 10.0
    """undial: what is taken off the teacher's logit of the answer."""
    wga_beta: float = 1.0
    """wga: power of the answer's probability that weighs its loss."""
    satimp_beta1: float = 5.0
    """satimp: power of p in the weight p^beta1 (1 - p)^beta2."""
    satimp_beta2: float = 1.0
    """satimp: power of 1 - p in that weight."""
    task_vector_scale: float = 1.0
    """task-vector: how many times the forget-tuned difference is taken off."""
    sure_percentile: float = 90.0
    """sure: rows of weights below this percentile of forget gradient stay as they are."""

    def __post_init__(self) -> None:
        betas = (self.npo_beta, self.simnpo_beta, self.dpo_beta)
        if min(betas) <= 0 or not 0 <= self.sure_percentile < 100:
            raise ConfigError(
                "npo_beta, simnpo_beta and dpo_beta must be positive and sure_percentile lie in "
                f"[0, 100); got {betas} and {self.sure_percentile}."
            )


@dataclass(frozen=True)
class UnlearnConfig:
    """How the model is edited."""

    method: Method = "mansu"
    """mansu edits inside the mask, its variants lack one part each; the others are baselines that
    train all weights."""
    steps: int = 250
    """Optimiser steps (dense methods: at most)."""
    lr: float = 0.03
    """Step size: in units of each block's absmax for mansu, of weights for dense methods."""
    batch_size: int = 48
    """Forget pairs per step; as many retain pairs beside them."""
    forget_loss: Literal["counterfactual", "ga"] = "counterfactual"
    """mansu: towards what a model that never knew would say, or gradient ascent."""
    ranking_weight: float = 2.0
    """mansu: weight of how far the answer's log-probability is from its target among the relation's
    answers."""
    training_margin: float = 0.0
    """mansu: nats by which that target lies below the mean of the relation's answers; 0 puts the
    answer in their midst, much more has it avoided, which gives it away as well."""
    final_margin: float | None = None
    """mansu: nats below the mean of the relation's answers at which full precision's are to stand
    at the end (training ends above its target): more is edited after the last step until they do,
    and every quantized model falls as far. 0: in their midst; None: nothing more is edited."""
    quantization_margin: float = 0.0
    """mansu: nats by which every quantized model's answers are to lie below full precision's at the
    end, so that the scatter that rounding adds is not read as recovery; 0 = none."""
    margin_budget: float = 0.125
    """mansu: share of the budget, in (0, 1), that training leaves over for final_margin and the quantization_margin;
    they are reached as nearly as so many edits allow."""
    retain_weight: float = 2.0
    """Weight of the retain loss, which each method has its own of (ga, task-vector: none)."""
    hinge_weight: float = 1.0
    """mansu: weight, within the retain loss, of the hinge that holds known retain answers."""
    projection: float = 1.0
    """mansu: strength of the null-space projection; 0 = none."""
    survive: tuple[str, ...] = ("nf4",)
    """mansu: quantizers that every edit survives by construction (`mansu list` names them); steps
    take turns in full precision and after each of them. Separated by spaces or commas."""
    offset_rate: float = 1.0
    """mansu, several quantizers: how fast each quantized model's own wishes grow, which decide
    among the places that the floor leaves; 1 = on its turns as fast as the edit itself, 0 = none:
    the quantized models follow the full-precision one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """mansu: arithmetic of the losses, attacks and gradients; edits, floor and scores are always
    exact. bf16 is about twice as fast on CUDA and on processors with AVX-512; on others it would be
    far slower, and is fp32."""
    adversarial_steps: int = 0
    """mansu: harden against relearning: at most so many relearning steps of a random half of the
    forget subjects come before each gradient on the other half; 0 = none."""
    adversarial_lr: float = 3e-3
    """mansu: typical learning rate of those attacks."""
    adversarial_weight: float = 3.0
    """mansu: weight of the gradient at the relearned point beside that at the model itself."""
    probe_weight: float = 0.0
    """mansu: weight of the gradient against what a linear probe, fitted each step on a random half
    of the forget subjects, reads of the other half; 0 = none."""
    stop_at: float | None = None
    """Stop when four-way forget accuracy on the dev phrasings is at most this (mansu: in full
    precision and after every quantizer of survive)."""
    seed: int = 0
    """Order of batches (a run sets this to its own seed)."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """What single baselines have beside a learning rate."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.batch_size < 1:
            raise ConfigError(
                "steps and batch_size must be at least 1 and lr positive; got "
                f"{self.steps}, {self.batch_size}, {self.lr}."
            )
        names = split_names(self.survive)
        object.__setattr__(self, "survive", names)
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"survive names one or more different quantizers; got {', '.join(names) or 'none'}."
            )
        if self.forget_loss not in ("counterfactual", "ga"):
            raise ConfigError(
                f"Unknown forget_loss {self.forget_loss!r}; expected counterfactual or ga."
            )
        if self.adversarial_steps < 0 or self.adversarial_lr <= 0 or self.adversarial_weight < 0:
            raise ConfigError(
                "attack and adversarial_weight must not be negative and adversarial_lr be positive; got "
                f"{self.adversarial_steps}, {self.adversarial_weight}, {self.adversarial_lr}."
            )
        if not 0 < self.margin_budget < 1:
            raise ConfigError(f"margin_budget must lie in (0, 1); got {self.margin_budget}.")
        weights = (
            self.ranking_weight, self.final_margin or 0.0, self.quantization_margin, self.retain_weight, self.hinge_weight,
            self.projection, self.probe_weight, self.offset_rate,
        )  # fmt: skip
        if not all(w >= 0 for w in weights):  # NaN is not, either
            raise ConfigError(
                "ranking_weight, final_margin, quantization_margin, retain_weight, hinge_weight, projection, probe_weight and offset_rate "
                "must not be negative."
            )
