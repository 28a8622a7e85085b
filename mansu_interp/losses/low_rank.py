"""Low-rank adapters of weights (LoRA, Hu et al. 2021, arXiv 2106.09685), with alpha = 2r."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.language_model import LanguageModel

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
