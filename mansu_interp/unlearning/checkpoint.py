"""Checkpoints of a long loop, so that one that was killed goes on there and ends the same.

Nothing random is stored: batches are drawn from a seed, and are drawn again up to the step reached.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..tasks.task import Task
from ..utils import tensors as utils
from ..utils.tensors import tensors_sha256
from .history import History, StepRecord
from .methods import MethodConfig


def made_of(
    model: LanguageModel, task: Task, mask: Mask | None, config: MethodConfig, seed: int
) -> str:
    """A hash of everything that decides what a loop does."""
    digest = hashlib.sha256((model.sha256 or tensors_sha256(model.weights)).encode())
    digest.update((tensors_sha256(mask.indices) if mask else "").encode())
    digest.update(f"{task.sha256} {config.method} {config} {seed}".encode())
    return digest.hexdigest()


@dataclass
class Checkpoint(utils.Checkpoint):
    """How far an unlearning loop has come, in one file."""

    SCHEMA = 4
    META: ClassVar[dict[str, object]] = {"history": [{...: (float, None)}], "power": float}
    OF = "model, task, mask, configuration or seed"

    power: float = 0.0
    """See `LatentWeights.power`."""

    def load(self) -> History:
        """The record of the steps that are done; none if there is no file.

        Raises:
            ArtifactError: the file is damaged, or of another loop.
        """
        meta = self.read()
        if meta is None:
            return []
        try:
            history = [StepRecord.from_json(record) for record in meta["history"]]
        except ValueError as error:
            raise self.unreadable(error) from error
        self.power = meta["power"]
        return history

    def save(self, history: History, tensors: dict[str, Tensor], power: float = 0.0) -> None:
        """Write the file, whole or not at all; of several processes the first one does.

        Raises:
            ResourceError: the disk is full, or the folder was removed meanwhile.
        """
        records = [record.to_json() for record in history]
        self.write(tensors, {"history": records, "power": power})
