"""HQQ (Badri & Shaji 2023) at 4 bits, groups of 64 along a row, as the ``hqq`` package does it.

Its zero point is optimised over every element of a group, so any edit may re-code its neighbours:
no promise is possible, and what survives is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..utils.libraries import library, quiet
from .base import Cells, Quantizer, affine, grouped

GROUP = 64


@dataclass(frozen=True)
class Hqq(Quantizer):
    """HQQ with the package's own defaults for 4 bits."""

    name: str = "hqq"
    promises: bool = False

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups of 64."""
        return weight.shape[-1] % GROUP == 0

    def _quantize(
        self, weight: Float[Tensor, "out in"]
    ) -> tuple[Shaped[Tensor, "*_shape"], dict[str, object]]:
        quantizer = library("hqq.core.quantize", "hqq").Quantizer
        with quiet():
            return quantizer.quantize(
                weight.detach().float().contiguous(),
                nbits=4,
                group_size=GROUP,
                round_zero=True,
                axis=1,
                bitpack=False,
                device="cpu",
            )

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`; every element counts as one that sets its group's parameters."""
        codes, meta = self._quantize(weight)
        codes = codes.view(-1, GROUP)
        scale, zero = (torch.as_tensor(meta[k]).float().view(-1, 1) for k in ("scale", "zero"))
        x = grouped(weight, GROUP)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        every = torch.ones_like(x, dtype=torch.bool)
        return affine(
            codes,
            scale=scale,
            offset=-zero * scale,
            levels=torch.arange(16.0),
            sets=every,
            lowest=low,
            highest=high,
        )

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        codes, meta = self._quantize(weight)
        quantizer = library("hqq.core.quantize", "hqq").Quantizer
        return quantizer.dequantize(codes, meta).float().view_as(weight)
