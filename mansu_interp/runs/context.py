"""What the stages of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..evaluation.leaks.training import with_leak_prompts
from ..models.language_model import LanguageModel
from ..models.provenance import Provenance
from ..tasks.task import Task
from ..utils.distributed import first_says, rank
from .config import RunConfig
from .folder import Clock, RunFolder

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total); total 0 = unknown."""


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
    folder: RunFolder
    """Its files; only the process that writes uses it."""

    @cached_property
    def unlearned(self) -> Task:
        """The task that the edit is made for: its forget set as the settings widen it."""
        if not self.config.leak_prompts:
            return self.task
        return with_leak_prompts(self.model, self.task, self.config.seed)

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.config.out

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
