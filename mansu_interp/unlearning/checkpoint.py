"""Checkpoints of a long loop, so that one that was killed goes on there and ends the same.

Nothing random is stored: batches are drawn from a seed, and are drawn again up to the step reached.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import ArtifactError, ResourceError
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..tasks.task import Task
from ..utils.distributed import rank
from ..utils.files import expect, writing
from ..utils.tensors import read_tensors, tensors_sha256, write_tensors
from .history import History, StepRecord
from .methods import MethodConfig

SCHEMA = 3
SECONDS = 60.0
"""Between two checkpoints of a loop."""
META = {"made_of": str, "history": [{...: (float, None)}], "power": float}


def made_of(
    model: LanguageModel, task: Task, mask: Mask | None, config: MethodConfig, seed: int
) -> str:
    """A hash of everything that decides what a loop does."""
    digest = hashlib.sha256((model.sha256 or tensors_sha256(model.weights)).encode())
    digest.update((tensors_sha256(mask.indices) if mask else "").encode())
    digest.update(f"{task.sha256} {config.method} {config} {seed}".encode())
    return digest.hexdigest()


@dataclass
class Checkpoint:
    """How far a loop has come, in one file."""

    path: Path | None = None
    """The file; None: nothing is written."""
    made_of: str = ""
    """What the loop works on (see `made_of`)."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What was found in the file."""
    power: float = 0.0
    """See `LatentWeights.power`."""
    saved: float = field(default_factory=time.monotonic)
    """When it was written last."""

    def load(self) -> History:
        """The record of the steps that are done; none if there is no file.

        Raises:
            ArtifactError: the file is damaged, or of another loop.
        """
        if self.path is None:
            return []
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return []
        self.tensors, meta = read_tensors(self.path, "checkpoint", SCHEMA)
        try:
            expect(meta, META, "its header")
            history = [StepRecord.from_json(record) for record in meta["history"]]
        except ValueError as error:
            raise ArtifactError(f"{self.path} is not a readable checkpoint: {error}.") from error
        if meta["made_of"] != self.made_of:
            raise ArtifactError(
                f"{self.path} was written by a run of another model, task, mask, configuration or "
                "seed. Delete it to begin this stage anew."
            )
        self.power = meta["power"]
        return history

    def restore(self, name: str, into: Tensor) -> None:
        """Copy a tensor of the file into one of the loop's.

        Raises:
            ArtifactError: it is missing or of another shape.
        """
        found = self.tensors.get(name)
        if found is None or found.shape != into.shape or found.dtype != into.dtype:
            raise ArtifactError(f"{self.path} lacks {name}. Delete it to begin this stage anew.")
        into.copy_(found)

    def is_due(self) -> bool:
        """Whether it is time to write the checkpoint again."""
        return self.path is not None and time.monotonic() - self.saved >= SECONDS

    def save(self, history: History, tensors: dict[str, Tensor], power: float = 0.0) -> None:
        """Write the file, whole or not at all; of several processes the first one does.

        Raises:
            ResourceError: the disk is full, or the folder was removed meanwhile.
        """
        if self.path is not None and rank() == 0:
            if not self.path.parent.is_dir():
                raise ResourceError(f"{self.path.parent} was removed while it was in use.")
            meta = {
                "made_of": self.made_of,
                "history": [record.to_json() for record in history],
                "power": power,
            }
            write_tensors(self.path, "checkpoint", SCHEMA, tensors, meta)
            self.saved = time.monotonic()
