"""Every setting, once: these dataclasses are the Python API, the command line and config.json.

Commands beside run and bench have theirs in `commands`. Knows nothing of torch, so that
``mansu --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from .errors import ConfigError


def split_names(given: Iterable[str]) -> tuple[str, ...]:
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


Method = Literal[
    "mansu", "mansu-random", "mansu-whole", "mansu-unprojected", "mansu-unsteered",
    "mansu-unsnapped", "ga", "graddiff", "kl", "npo", "simnpo", "dpo", "idkdpo", "rmu", "undial",
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
    push: float = 2.0
    """mansu: weight of how far the answer's log-probability is from its target among the relation's
    answers."""
    margin: float = 0.0
    """mansu: nats by which that target lies below the mean of the relation's answers; 0 puts the
    answer in their midst, much more has it avoided, which gives it away as well."""
    deepen: float | None = None
    """mansu: nats below the mean of the relation's answers at which full precision's are to stand
    at the end (training ends above its target): more is edited after the last step until they do,
    and every quantized model falls as far. 0: in their midst; None: nothing more is edited."""
    reserve: float = 0.0
    """mansu: nats by which every quantized model's answers are to lie below full precision's at the
    end, so that the scatter that rounding adds is not read as recovery; 0 = none."""
    reserve_share: float = 0.125
    """mansu: share of the budget, in (0, 1), that training leaves over for deepen and the reserve;
    they are reached as nearly as so many edits allow."""
    retain_weight: float = 2.0
    """Weight of the retain loss, which each method has its own of (ga, task-vector: none)."""
    hold: float = 1.0
    """mansu: weight, within the retain loss, of the hinge that holds known retain answers."""
    projection: float = 1.0
    """mansu: strength of the null-space projection; 0 = none."""
    survive: tuple[str, ...] = ("nf4",)
    """mansu: quantizers that every edit survives by construction (`mansu list` names them); steps
    take turns in full precision and after each of them. Separated by spaces or commas."""
    steer: float = 1.0
    """mansu, several quantizers: how fast each quantized model's own wishes grow, which decide
    among the places that the floor leaves; 1 = on its turns as fast as the edit itself, 0 = none:
    the quantized models follow the full-precision one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """mansu: arithmetic of the losses, attacks and gradients; edits, floor and scores are always
    exact. bf16 is about twice as fast on CUDA and on processors with AVX-512; on others it would be
    far slower, and is fp32."""
    attack: int = 0
    """mansu: harden against relearning: at most so many relearning steps of a random half of the
    forget subjects come before each gradient on the other half; 0 = none."""
    attack_rate: float = 3e-3
    """mansu: typical learning rate of those attacks."""
    attack_weight: float = 3.0
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
        if self.attack < 0 or self.attack_rate <= 0 or self.attack_weight < 0:
            raise ConfigError(
                "attack and attack_weight must not be negative and attack_rate be positive; got "
                f"{self.attack}, {self.attack_weight}, {self.attack_rate}."
            )
        if not 0 < self.reserve_share < 1:
            raise ConfigError(f"reserve_share must lie in (0, 1); got {self.reserve_share}.")
        weights = (
            self.push, self.deepen or 0.0, self.reserve, self.retain_weight, self.hold,
            self.projection, self.probe_weight, self.steer,
        )  # fmt: skip
        if not all(w >= 0 for w in weights):  # NaN is not, either
            raise ConfigError(
                "push, deepen, reserve, retain_weight, hold, projection, probe_weight and steer "
                "must not be negative."
            )


@dataclass(frozen=True)
class RelearnConfig:
    """How hard a relearning attack tries."""

    steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Fine-tuning steps after which the other half is asked for, ascending."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates; each attacks a fresh copy, and the worst of them counts."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """adam, or sgd with momentum 0.9 (which wants rates some hundred times as large)."""
    batch_size: int = 48
    """Prompts per step."""
    seed: int = 0
    """Which half of the subjects is relearnt, and the order of batches."""

    def __post_init__(self) -> None:
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ConfigError(f"steps must be positive and ascending; got {self.steps}.")
        if not self.rates or min(self.rates) <= 0 or self.batch_size < 1:
            raise ConfigError(
                "rates must be positive and batch_size at least 1; got "
                f"{self.rates}, {self.batch_size}."
            )
        if self.optimiser not in ("adam", "sgd"):
            raise ConfigError(f"Unknown optimiser {self.optimiser!r}; expected adam or sgd.")


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
    subject_rows: bool = False
    """Edit the forget subjects' own rows of the embedding, too, within the same budget: what can be
    read there comes back by relearning, whatever is done to the layers."""
    by_layer: bool = False
    """Choose parameters holding gradients and Fisher of one layer at a time: the same mask with
    less memory and more passes."""
    seed: int = 0
    """Seed of every draw."""
    score_pairs: int = 200
    """Prompts per scored set, drawn evenly over its unseen phrasings."""
    quantizers: tuple[str, ...] = ()
    """Quantizers to score besides nf4 and those of unlearn.survive."""
    relearn_steps: int = 20
    """Steps of the relearning attack that tests erasure, on half of the forget facts; 0 = none."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""
    threads: int | None = None
    """CPU threads; default: torch's own choice."""
    circuit: CircuitConfig = field(default_factory=CircuitConfig)
    """How the circuit is discovered."""
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    """How the model is edited."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantizers", split_names(self.quantizers))
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"The budget is a share of all parameters in (0, 1]; got {self.budget}."
            )
        if self.relearn_steps < 0:
            raise ConfigError(f"relearn_steps must not be negative; got {self.relearn_steps}.")
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


@dataclass(frozen=True)
class BenchConfig:
    """Models x tasks x methods x quantizers x seeds, each method stopped at the same forgetting."""

    models: tuple[str, ...] = ("facts",)
    """As --model of a run."""
    tasks: tuple[str, ...] = ("capitals",)
    """As --task of a run."""
    methods: tuple[Method, ...] = METHODS
    """What is compared."""
    quantizers: tuple[str, ...] = ("nf4",)
    """What each checkpoint goes through once saved and loaded again."""
    survive: tuple[str, ...] = ("nf4",)
    """What the edits of mansu and its variants are made to survive."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first one chooses the step size, which the others take over."""
    levels: tuple[float, ...] = (0.3,)
    """Four-way forget accuracies on the dev phrasings at which every method stops."""
    strengths: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Step sizes that each method may try, as multiples of its usual one."""
    steps: int = 250
    """Steps that each try may take at most."""
    lr: float = 1e-4
    """Usual step size of the baselines; that of mansu and its variants comes with the task."""
    relearn_steps: int = 20
    """Steps of the relearning attack on every winner, on half of the forget facts; 0 = none."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""
    jobs: int = 1
    """Processes that work side by side, each with one thread; more than 1 needs Dask."""
    scheduler: str | None = None
    """Work on a running Dask cluster instead: address, or path of its scheduler file."""
    table_only: bool = False
    """Train and measure nothing: write the table of what is finished."""
    out: Path = Path("runs/bench")
    """Folder for cells, table and pages; what is already there is not run again."""

    def __post_init__(self) -> None:
        for name in (
            "models",
            "tasks",
            "methods",
            "quantizers",
            "survive",
            "seeds",
            "levels",
            "strengths",
        ):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} needs one or more different values; got {values}.")
        if unknown := [m for m in self.methods if m not in METHODS]:
            raise ConfigError(f"Unknown method {unknown[0]!r}; available: {', '.join(METHODS)}.")
        if min(self.strengths) <= 0 or self.lr <= 0 or min(self.steps, self.jobs) < 1:
            raise ConfigError(
                "strengths and lr must be positive, steps and jobs at least 1; got "
                f"{self.strengths}, {self.lr}, {self.steps}, {self.jobs}."
            )
        if self.relearn_steps < 0:
            raise ConfigError(f"relearn_steps must not be negative; got {self.relearn_steps}.")
