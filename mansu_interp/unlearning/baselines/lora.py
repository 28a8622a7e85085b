"""LoRA unlearning (Abitante et al. 2026, arXiv 2602.13151): unlearn in low-rank adapters.

We read the abstract: a frozen base, unlearning losses in trained adapters, 4-bit quantization after
that. Rank, scale and which matrices are adapted we could not read: they are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ..checkpoint import Checkpoint
from ..history import History
from ..methods import LoRA
from ..registry import DenseConfig
from .dense import DenseLoop, Objective
from .npo import npo

SCALE = 2.0
"""alpha / rank."""


class Adapters:
    """W + 2 BA in place of some linear weights W of a model, written into it.

    A [rank, in] starts Gaussian with variance 1 / in, B [out, rank] at zero. The gradients of both
    follow from that of the sum.

    Arguments:
        model: whose weights are adapted, in place.
        names: of those.
        rank: of the adapters.
        seed: of A.
    """

    def __init__(self, model: LanguageModel, names: Sequence[str], rank: int, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.model, self.names = model, names
        self.start = {n: model.weights[n].detach().clone() for n in names}
        self.down: dict[str, Float[Tensor, "rank in"]] = {}
        self.up: dict[str, Float[Tensor, "out rank"]] = {}
        for name, w in self.start.items():
            drawn = torch.randn(rank, w.shape[1], generator=draws) / w.shape[1] ** 0.5
            self.down[name], self.up[name] = drawn.to(w), w.new_zeros(w.shape[0], rank)

    @torch.no_grad()
    def gradients(self, name: str, slope: Float[Tensor, "out in"]) -> None:
        """Set the gradients of one weight's A and B from its own."""
        down, up = self.down[name], self.up[name]
        down.grad, up.grad = SCALE * up.T @ slope, SCALE * slope @ down.T

    @torch.no_grad()
    def write(self) -> None:
        """Write the sums into the model."""
        for name in self.names:
            moved = self.start[name] + SCALE * self.up[name] @ self.down[name]
            self.model.weights[name].copy_(moved)


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
