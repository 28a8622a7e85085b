"""What the stages of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..circuits.config import CircuitConfig
from ..models.language_model import LanguageModel
from ..models.provenance import Provenance
from ..tasks.task import Task
from ..unlearning.config import BASELINES
from ..utils.distributed import first_says, rank
from .config import RunConfig
from .folder import Clock

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total); total 0 = unknown."""


def needs(method: str) -> frozenset[str]:
    """What a method asks for besides a task: ``circuit``, ``mask``, or nothing."""
    return frozenset() if method in BASELINES else frozenset({"circuit", "mask"})


@dataclass(frozen=True)
class RunContext:
    """Settings, inputs and helpers of a run."""

    config: RunConfig
    model: LanguageModel
    """The original."""
    task: Task
    provenance: Provenance
    """What the run is made from; stands in every artefact."""
    note: OnProgress
    clock: Clock

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.config.out

    @cached_property
    def circuit_config(self) -> CircuitConfig:
        """How attribution is done, with the run's seed."""
        return replace(self.config.circuit, seed=self.config.seed)

    @property
    def needs(self) -> frozenset[str]:
        """What the run's method asks for."""
        return needs(self.config.unlearn.method)

    @property
    def writes(self) -> bool:
        """Whether this process writes the artefacts: the first one does."""
        return rank() == 0

    def missing(self, file: Path) -> bool:
        """Whether an artefact is still to be made; the same for all processes."""
        return first_says(not file.exists())

    def wait(self) -> None:
        """Wait until the first process has written."""
        first_says(True)
