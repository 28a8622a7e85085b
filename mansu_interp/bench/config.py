"""Settings of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..unlearning.methods import METHODS, get_method
from ..utils.ranges import check_range, check_seeds
from ..utils.shipped import quantizer_names

LEVELS = (0.3,)


@dataclass(frozen=True)
class BenchConfig:
    """Models x tasks x methods x quantizers x seeds, all methods at the same forgetting, or at
    the same disruption."""

    models: tuple[str, ...] = ("facts",)
    """As --model of a run."""
    tasks: tuple[str, ...] = ("capitals",)
    """As --task of a run."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What is compared; `mansu list` names the methods."""
    quantizers: tuple[str, ...] = ("nf4",)
    """What each checkpoint goes through once saved and loaded again; an engine stands for all its
    formats, as in a run."""
    survive: tuple[str, ...] = ("nf4",)
    """What the edits of mansu and its variants are made to survive."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first one chooses the step size, which the others take over."""
    levels: tuple[float, ...] = LEVELS
    """Four-way forget accuracies on the dev phrasings at which every method stops."""
    disruption: float | None = None
    """Disruption budget instead of the levels: mean KL to the original, in nats a token of text
    that is not trained on, such as 0.01. No method stops early; the last measured step within it
    counts."""
    strengths: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Step sizes, which every method tries, as multiples of its usual one: of mansu and its
    variants the task's, of each baseline its default."""
    steps: int = 250
    """Steps that each try may take at most."""
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
        object.__setattr__(self, "quantizers", quantizer_names(self.quantizers))
        object.__setattr__(self, "survive", quantizer_names(self.survive, "exact"))
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
        for name in self.methods:
            get_method(name)
        check_seeds(self, "seeds")
        check_range(self, "strengths", above=0)
        check_range(self, "steps", "jobs", at_least=1)
        check_range(self, "levels", "relearn_steps", at_least=0)
        check_range(self, "disruption", above=0)
        if self.disruption is not None and self.levels != LEVELS:
            raise ConfigError(
                f"Nothing stops at a level with a disruption budget; got levels {self.levels} and "
                f"{self.disruption:g}. Leave one of them out."
            )

    @property
    def stops(self) -> tuple[float | None, ...]:
        """The levels; None alone with a disruption budget."""
        return self.levels if self.disruption is None else (None,)
