"""Settings of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..unlearning.config import METHODS, Method


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
    """Folder for trials, table and pages; what is already there is not run again."""

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
