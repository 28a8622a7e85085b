"""GGUF's Q4_0, Q4_1 and Q8_0, as the ``gguf`` package implements llama.cpp's reference.

Groups of 32 along a row. Q4_0: the element of largest absolute value (the first, of several) gets
code -8, with its sign in the scale d = max / -8. Q4_1: d = (max - min) / 15 from min. Q8_0:
d = absmax / 127. Codes use the float32 scale; the stored scale is rounded to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..utils.libraries import library
from .base import Cells, Quantizer, affine, divided, grouped

GROUP = 32


@dataclass(frozen=True)
class Gguf(Quantizer):
    """One of the formats above."""

    name: str = "q4_0"

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups of 32."""
        return weight.shape[-1] % GROUP == 0

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`."""
        x = grouped(weight, GROUP)
        absmax = x.abs().amax(1, keepdim=True)
        if self.name == "q4_1":
            low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
            d = divided(high - low, 15.0)
            codes = torch.floor((x - low) * _inverse(d) + 0.5).clamp(0, 15)
            sets = (x == low) | (x == high)
            return affine(
                codes,
                scale=d,
                offset=low,
                levels=torch.arange(16.0),
                sets=sets,
                lowest=low,
                highest=high,
            )
        sets = x.abs() == absmax
        if self.name == "q8_0":
            d = divided(absmax, 127.0)
            scaled = x * _inverse(d)
            whole = scaled.abs().floor()
            codes = scaled.sign() * (whole + torch.floor(2 * (scaled.abs() - whole))) + 127
            levels = torch.arange(-127.0, 128.0)
            return affine(
                codes,
                scale=d,
                offset=d * 0,
                levels=levels,
                sets=sets,
                lowest=-absmax,
                highest=absmax,
            )
        d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
        raw = torch.trunc(x * _inverse(d) + 8.5).clamp(0, 15)
        # With d < 0 the codes descend; counted from the lowest value their levels are -7..8.
        codes = torch.where(d < 0, 15 - raw, raw)
        offset = torch.where(d < 0, d.abs(), 0.0)
        return affine(
            codes,
            scale=d.abs(),
            offset=offset,
            levels=torch.arange(-8.0, 8.0),
            sets=sets,
            lowest=-absmax,
            highest=absmax,
        )

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        gguf = library("gguf", "gguf")
        kind = getattr(gguf.GGMLQuantizationType, self.name.upper())
        packed = gguf.quantize(weight.detach().float().contiguous().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(packed, kind).copy())


def _inverse(d: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.where(d == 0, 0.0, 1 / torch.where(d == 0, 1.0, d))
