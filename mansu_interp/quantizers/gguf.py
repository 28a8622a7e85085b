"""GGUF's formats of fixed grids, as the ``gguf`` package implements llama.cpp's reference.

Groups of 32 along a row. Codes use the float32 scale; Q formats store it rounded to float16.

- Q4_0, Q5_0: the element of largest absolute value (the first, of several) gets code -8 or -16,
  with its sign in the scale d = max / -8 or max / -16;
- Q4_1, Q5_1: d = (max - min) / 15 or / 31, from min;
- Q8_0: d = absmax / 127;
- MXFP4: `E2M1` times a power of two, 2 ** (floor(log2(absmax)) - 2). Beyond 6 units it saturates,
  and until 8 units no element changes the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..utils.libraries import library
from .base import E2M1_LEVELS, Cells, Quantizer, affine, divided, e2m1_codes, grouped

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
        if self.name in ("q4_0", "q5_0"):
            return _from_extreme(x, 8 if self.name == "q4_0" else 16)
        if self.name in ("q4_1", "q5_1"):
            return _from_range(x, 15 if self.name == "q4_1" else 31)
        return _eight_bits(x) if self.name == "q8_0" else _mxfp4(x)

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        gguf = library("gguf", "gguf")
        kind = getattr(gguf.GGMLQuantizationType, self.name.upper())
        packed = gguf.quantize(weight.detach().float().contiguous().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(packed, kind).copy())


def _from_extreme(x: Float[Tensor, "groups size"], half: int) -> Cells:
    """Q4_0 and Q5_0: the extreme of a group on the lowest of ``2 * half`` levels."""
    absmax = x.abs().amax(1, keepdim=True)
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -half
    raw = torch.trunc(x * _inverse(d) + (half + 0.5)).clamp(0, 2 * half - 1)
    # With d < 0 the codes descend; counted from the lowest value their levels are 1-half..half.
    return affine(
        torch.where(d < 0, 2 * half - 1 - raw, raw),
        scale=d.abs(),
        offset=torch.where(d < 0, d.abs(), 0.0),
        levels=torch.arange(-float(half), half),
        sets=x.abs() == absmax,
        lowest=-absmax,
        highest=absmax,
    )


def _from_range(x: Float[Tensor, "groups size"], steps: int) -> Cells:
    """Q4_1 and Q5_1."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    d = divided(high - low, float(steps))
    return affine(
        torch.floor((x - low) * _inverse(d) + 0.5).clamp(0, steps),
        scale=d,
        offset=low,
        levels=torch.arange(steps + 1.0),
        sets=(x == low) | (x == high),
        lowest=low,
        highest=high,
    )


def _eight_bits(x: Float[Tensor, "groups size"]) -> Cells:
    absmax = x.abs().amax(1, keepdim=True)
    d = divided(absmax, 127.0)
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    return affine(
        scaled.sign() * (whole + torch.floor(2 * (scaled.abs() - whole))) + 127,
        scale=d,
        offset=d * 0,
        levels=torch.arange(-127.0, 128.0),
        sets=x.abs() == absmax,
        lowest=-absmax,
        highest=absmax,
    )


def _mxfp4(x: Float[Tensor, "groups size"]) -> Cells:
    absmax = x.abs().amax(1, keepdim=True)
    # The library's float32 logarithm, rounded alike on every device. Just below a power of two it
    # rounds up to the next exponent.
    exponent = absmax.clamp(min=2.0**-120).double().log2().float().floor().int() - 2
    scale = torch.where(absmax > 0, ((exponent + 127) << 23).view(torch.float32), 0.0)
    return affine(
        e2m1_codes(x, scale),
        scale=scale,
        offset=scale * 0,
        levels=E2M1_LEVELS,
        sets=x.abs() == absmax,
        lowest=-8 * scale,
        highest=8 * scale,
    )


def _inverse(d: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.where(d == 0, 0.0, 1 / torch.where(d == 0, 1.0, d))
