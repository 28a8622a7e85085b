"""LoRA unlearning (Abitante et al. 2026, arXiv 2602.13151): unlearn in low-rank adapters.

We read the abstract: a frozen base, unlearning losses in trained adapters, 4-bit quantization after
that. Rank, scale and which matrices are adapted we could not read: they are ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...errors import ConfigError
from ...losses.low_rank import Adapters
from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..checkpoint import Checkpoint
from ..history import History
from ..methods import LoRA
from ..registry import DenseConfig
from .dense import DenseLoop, Objective
from .npo import npo


def check_rank(model: LanguageModel, rank: int) -> None:
    """Raise ConfigError unless every linear weight of a model takes adapters of a rank."""
    if not model.linear_names:
        raise ConfigError(
            f"{model.name} has no linear layer to adapt: choose a method without adapters, such as "
            "npo."
        )
    for name in model.linear_names:
        shape = tuple(model.weights[name].shape)
        if rank > min(shape):
            raise ConfigError(
                f"rank is at most the shorter side of every linear weight; got {rank}, and {name} "
                f"is {shape}. Take {min(shape)} or less."
            )


class LowRank(DenseLoop):
    """Trains adapters; the student's weights are always the merged ones."""

    def __init__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int = 0,
        *, rank: int,
    ) -> None:  # fmt: skip
        self.rank = rank
        super().__init__(model, objective, config, seed)
        self.weights = [self.student.weights[n] for n in self.adapters.names]

    def parameters(self) -> dict[str, Tensor]:
        """The adapters, by the names of their weights."""
        self.adapters = Adapters(self.student, self.student.linear_names, self.rank, self.seed)
        both = {"A": self.adapters.down, "B": self.adapters.up}
        return {f"{n}|{part}": t[n] for n in self.adapters.names for part, t in both.items()}

    def move(self) -> None:
        """See `DenseLoop.move`."""
        for name, w in zip(self.adapters.names, self.weights, strict=True):
            self.adapters.gradients(name, torch.zeros_like(w) if w.grad is None else w.grad)
        super().move()
        self.adapters.write()

    def resume(self, checkpoint: Checkpoint, history: History) -> None:
        """See `DenseLoop.resume`."""
        super().resume(checkpoint, history)
        self.adapters.write()


def lora(model: LanguageModel, task: Task, config: LoRA, seed: int = 0) -> Objective:
    """Loss of `npo`, minimised in W + 2 BA for every linear weight W; A and B are trained.

    The edit of a weight has rank ``config.rank`` at most; embeddings, norms and biases stay. The
    authors combine adapters with gradient ascent and NPO, with either retain loss; NPO and its KL
    are taken here, so that ``npo`` differs by the adapters alone. ``seed`` draws A.

    Raises:
        ConfigError: no linear layer, or one smaller than the rank.
    """
    check_rank(model, config.rank)
    return replace(npo(model, task, config, seed), loop=partial(LowRank, rank=config.rank))
