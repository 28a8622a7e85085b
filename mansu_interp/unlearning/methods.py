"""The methods and their settings: one dataclass each, registered under its name.

Knows nothing of torch, so that ``mansu --help`` is quick. What a method does is in `mansu` and, one
file each, in `baselines`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import ConfigError
from ..utils.ranges import check_range, entrance
from ..utils.renamed import METHODS as RENAMED
from ..utils.shipped import quantizer_names
from .registry import (
    METHODS,
    DenseConfig,
    MethodConfig,
    PreferenceConfig,
    RetainingConfig,
    method,
)


@entrance(ConfigError)
def get_method(name: str) -> type[MethodConfig]:
    """The settings of a method.

    Raises:
        ConfigError: no such method, or one that has another name now.
    """
    if name in METHODS:
        return METHODS[name]
    if name in RENAMED:
        raise ConfigError(f"The method {name!r} is now called {RENAMED[name]!r}.")
    raise ConfigError(f"Unknown method {name!r}; available: {', '.join(METHODS)}.")


@method("mansu", needs=("circuit", "mask", "references"))
@dataclass(frozen=True)
class Mansu(MethodConfig):
    """Sparse edits inside a mask, which survive quantization by construction."""

    lr: float = 0.03
    """Step size, in units of each quantizer block's absmax."""
    forget_loss: Literal["counterfactual", "ga"] = "counterfactual"
    """Towards what a model would predict that never knew the answer, or gradient ascent."""
    ranking_weight: float = 2.0
    """Weight of the distance between the answer's log-probability and its target among the
    relation's answers."""
    training_margin: float = 0.0
    """Nats by which that target lies below the mean of the relation's answers. At 0 the answer
    ranks in the middle; a large margin ranks it last, which gives it away as well."""
    final_margin: float | None = None
    """Nats by which the answers are to lie below that mean at the end. Training ends a little above
    its target: further edits are made until full precision and the models of train_through are
    there, and the other quantized models fall as far. None: no such edits."""
    quantization_margin: float = 0.0
    """Nats by which the quantized models' answers are to lie below full precision's at the end, so
    that the scatter of rounding is not read as recovery: those of the format that scatters them
    most; the others by as much less as they scatter less. 0: no such edits."""
    margin_budget: float = 0.125
    """Share of the edits, in (0, 1), that training leaves for the two margins, which are approached
    as nearly as so many edits allow."""
    retain_weight: float = 2.0
    """Weight of the retain loss."""
    hinge_weight: float = 1.0
    """Weight, within the retain loss, of the hinge on retain answers that the original ranks
    first."""
    projection: float = 1.0
    """Strength of the null-space projection; 0 = none."""
    survive: tuple[str, ...] = ("nf4",)
    """Quantizers that every edit survives by construction (`mansu list` names them), or engines for
    all that can be survived there: llama.cpp, transformers, vllm, all. Separated by spaces or
    commas. Steps take turns in full precision and after each of them."""
    train_through: tuple[str, ...] = ()
    """Fitted quantizers that take turns as well, such as q4_k_m, iq4_nl or gptq-g128, or engines
    for all of theirs but AWQ. Nothing is promised there; what survives is in the report."""
    offset_rate: float = 1.0
    """With several quantizers: rate of each quantized model's own offsets from the shared latent
    weights, which decide among the values that the floor allows; 1 = as fast as those move on its
    turns, 0 = none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of losses and gradients; edits, floor and scores are always exact. bf16 is about
    twice as fast on CUDA and on processors with AVX-512, and is fp32 elsewhere."""
    adversarial_steps: int = 0
    """Adversarial relearning: the gradient is also taken after up to so many relearning steps on a
    random half of the forget subjects; 0 = none."""
    adversarial_lr: float = 3e-3
    """Typical learning rate of that relearning (Adam's)."""
    adversarial_weight: float = 3.0
    """Weight of the gradient at the relearned point beside that at the model itself."""
    probe_weight: float = 0.0
    """Weight of the probe penalty: of the gradient against what a linear probe, fitted each step on
    a random half of the forget subjects, reads of the other half; 0 = none."""
    stop_at: float | None = None
    """Stop when four-way forget accuracy on the dev phrasings is at most this, in full precision
    and after every quantizer of survive and train_through."""

    floored: ClassVar[bool] = True
    """Whether every edit leaves its quantizer cell."""
    lacks: ClassVar[tuple[str, ...]] = ()
    """Settings of MANSU that are always 0, in ablations."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "survive", names := quantizer_names(self.survive, "exact"))
        through = quantizer_names(self.train_through, "through")
        object.__setattr__(self, "train_through", through)
        super().__post_init__()
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"survive names one or more different quantizers; got {', '.join(names) or 'none'}."
            )
        if len(set(through)) < len(through):
            raise ConfigError(
                f"train_through names different quantizers; got {', '.join(through)}."
            )
        models = 1 + len(names) + len(through)
        if through and self.steps < models:
            raise ConfigError(
                f"Full precision and the quantizers of survive and train_through are {models} "
                f"models that take turns, one a step; got {self.steps} steps. Give as many."
            )
        if through and not self.floored:
            raise ConfigError(
                f"{self.method} trains the full-precision model alone; got train_through "
                f"{', '.join(through)}. Leave it out."
            )
        for name in self.lacks:
            if getattr(self, name) != 0:
                raise ConfigError(
                    f"{name} is always 0 in {self.method}; got {getattr(self, name)}. Leave it out."
                )
        check_range(self, "adversarial_lr", above=0)
        check_range(self, "margin_budget", above=0, below=1)
        check_range(self, "training_margin")
        check_range(
            self, "ranking_weight", "final_margin", "quantization_margin", "retain_weight",
            "hinge_weight", "projection", "offset_rate", "adversarial_steps", "adversarial_weight",
            "probe_weight", at_least=0,
        )  # fmt: skip

    @property
    def promised(self) -> tuple[str, ...]:
        """The quantizers of ``survive``; none without the floor."""
        return self.survive if self.floored else ()

    @property
    def trained_through(self) -> tuple[str, ...]:
        """The quantizers of ``train_through``."""
        return self.train_through


@method("mansu-random-mask", needs=("mask", "references"))
@dataclass(frozen=True)
class MansuRandomMask(Mansu):
    """MANSU inside as many weights drawn at random: an ablation."""


@method("mansu-whole-model", needs=("mask", "references"))
@dataclass(frozen=True)
class MansuWholeModel(Mansu):
    """MANSU inside a mask chosen from the whole model instead of a circuit: an ablation."""


@method("mansu-no-projection", needs=("circuit", "mask", "references"))
@dataclass(frozen=True)
class MansuNoProjection(Mansu):
    """MANSU without the null-space projection: an ablation."""

    projection: float = 0.0
    """Always 0."""

    lacks: ClassVar[tuple[str, ...]] = ("projection",)


@method("mansu-no-offsets", needs=("circuit", "mask", "references"))
@dataclass(frozen=True)
class MansuNoOffsets(Mansu):
    """MANSU whose quantized models all follow the shared latent weights: an ablation."""

    offset_rate: float = 0.0
    """Always 0."""

    lacks: ClassVar[tuple[str, ...]] = ("offset_rate",)


@method("mansu-no-floor", needs=("circuit", "mask", "references"))
@dataclass(frozen=True)
class MansuNoFloor(Mansu):
    """MANSU's steps on the full-precision model alone, written as they are: an ablation."""

    floored: ClassVar[bool] = False


@method("ga")
@dataclass(frozen=True)
class GA(DenseConfig):
    """Gradient ascent on the forget answers; nothing is retained on purpose."""


@method("graddiff")
@dataclass(frozen=True)
class GradDiff(RetainingConfig):
    """Gradient ascent on forget answers, descent on retain answers."""


@method("kl", needs=("references",))
@dataclass(frozen=True)
class KL(RetainingConfig):
    """Gradient ascent on forget answers, near to the original on retain prompts."""


@method("npo", needs=("references",))
@dataclass(frozen=True)
class NPO(PreferenceConfig):
    """Negative preference optimisation."""


@method("simnpo")
@dataclass(frozen=True)
class SimNPO(PreferenceConfig):
    """NPO without a reference, normalised by length."""

    beta: float = 4.5
    """Inverse temperature."""
    delta: float = 0.0
    """Reward margin, in nats per token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "delta")


@method("dpo", needs=("references",))
@dataclass(frozen=True)
class DPO(PreferenceConfig):
    """Direct preference optimisation towards the counterfactual answer."""


@method("idkdpo", needs=("references",))
@dataclass(frozen=True)
class IdkDPO(DPO):
    """Direct preference optimisation towards an admission of ignorance."""


@method("rmu", needs=("references",))
@dataclass(frozen=True)
class RMU(RetainingConfig):
    """Misdirects one layer's output on forget prompts."""

    layer: int | None = None
    """Layer whose output is misdirected, from 0; default: at 7/32 of the depth."""
    scale: float = 20.0
    """Length of the random target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "layer", at_least=0)
        check_range(self, "scale")


@method("undial", needs=("references",))
@dataclass(frozen=True)
class UNDIAL(RetainingConfig):
    """Distils from the original with the answer's logit lowered."""

    beta: float = 10.0
    """What is taken off the original's logit of the answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta")


@method("wga")
@dataclass(frozen=True)
class WGA(RetainingConfig):
    """Gradient ascent weighed by the answer's probability."""

    beta: float = 1.0
    """Power of that probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta")


@method("satimp")
@dataclass(frozen=True)
class SatImp(RetainingConfig):
    """Gradient ascent weighed by saturation and importance, p^beta1 (1 - p)^beta2."""

    beta1: float = 5.0
    """Power of the answer's probability p."""
    beta2: float = 1.0
    """Power of 1 - p."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta1", "beta2")


@method("task-vector")
@dataclass(frozen=True)
class TaskVector(DenseConfig):
    """Learns the facts harder, and takes the difference off."""

    scale: float = 1.0
    """How many times the difference is taken off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "scale")


@method("sure")
@dataclass(frozen=True)
class SURE(RetainingConfig):
    """GradDiff in the rows of weights that forgetting pulls most."""

    percentile: float = 90.0
    """Rows below this percentile of forget gradient stay as they are, in [0, 100)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "percentile", at_least=0, below=100)


@method("npo-sam", needs=("references",))
@dataclass(frozen=True)
class NPOSAM(NPO):
    """NPO whose forget gradient is taken where a small step towards relearning leads."""

    rho: float = 0.01
    """Length of that step over all weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "rho", above=0)


@method("repselect")
@dataclass(frozen=True)
class RepSelect(DenseConfig):
    """Follows one forget gradient of the MLPs, its top principal components collapsed."""

    lr: float = 1e-4
    """Root mean square by which a step moves the weights of the MLPs."""
    components: int | None = None
    """Principal components of each matrix's gradient that are collapsed; default: an eighth of its
    shorter side."""
    collapse: Literal["soft", "hard"] = "soft"
    """soft: each is divided by its singular value, in units of the smallest of them; hard: they are
    removed."""
    elicit_lr: float = 0.01
    """Learning rate of the low-rank relearning before the gradient is taken (SGD, one pass)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "components", at_least=1)
        check_range(self, "elicit_lr", at_least=0)


@method("undo")
@dataclass(frozen=True)
class UNDO(RetainingConfig):
    """Unlearns with GradDiff, noises the weights, distils from the unlearned model."""

    noise: float = 0.25
    """Share of every weight that the noise replaces, in [0, 1]."""
    noise_scale: float = 0.1
    """The noise over Xavier's uniform one, in [0, 1]."""
    unlearn_share: float = 0.5
    """Share of the steps that unlearn at most, in (0, 1); the others distil."""
    distil_lr: float = 9e-4
    """Learning rate of the distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "noise", "noise_scale", at_least=0, at_most=1)
        check_range(self, "unlearn_share", above=0, below=1)
        check_range(self, "distil_lr", above=0)
        if self.steps < 2:
            raise ConfigError(f"undo unlearns and distils: it needs 2 steps; got {self.steps}.")

    def at_strength(self, strength: float) -> UNDO:
        """The noise, too, at a multiple."""
        return replace(self, lr=self.lr * strength, noise=min(1.0, self.noise * strength))


@method("lora", needs=("references",))
@dataclass(frozen=True)
class LoRA(NPO):
    """NPO in low-rank adapters of all linear weights, merged."""

    lr: float = 1e-3
    """Learning rate of AdamW, of the adapters."""
    rank: int = 16
    """Of the adapters; no matrix may be smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "rank", at_least=1)


@method("durableun")
@dataclass(frozen=True)
class DurableUn(RetainingConfig):
    """GradDiff, on the model and on its weights rounded to INT4, straight through."""

    retain_weight: float = 3.0
    """Weight of the retain loss beside the forget loss."""
    quantized_weight: float = 3.0
    """Weight of the forget loss of the rounded model, reached half-way from its first step on."""
    warmup: float = 1 / 3
    """Share of the steps before that loss takes part, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "quantized_weight", at_least=0)
        check_range(self, "warmup", at_least=0, below=1)


BASELINES = tuple(name for name, kind in METHODS.items() if issubclass(kind, DenseConfig))
"""Names of the baselines, which need no mask."""
