"""INT4 weights as optimum-quanto's ``qint4`` has them: min and max of groups along a row.

scale = (max - min) / 15, code = round((x - min) / scale), value = scale x code + min. Groups are of
128 elements; where rows do not divide into them, of 96, 64 or 32; where they divide into none, or
have at most 128 elements, a row is one group. The weight is widened to float32 first; given one in
bfloat16, the package computes in that: `Quanto.elsewhere`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..utils.libraries import library
from ..utils.tensors import dtype_name
from .base import Cells, NarrowCells, Quantizer, affine, divided, grouped, narrowed

SIZES = (128, 96, 64, 32)


@dataclass(frozen=True)
class Quanto(Quantizer):
    """``qint4`` of a linear layer."""

    name: str = "quanto-int4"
    needs = (("optimum.quanto", "quanto"),)

    def splits(self, n: int, width: int) -> bool:
        """See `Quantizer.splits`."""
        return n == width or (n % group_of(width) == 0 and group_of(n) == group_of(width))

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Not a single group, in which the package divides by 0."""
        return weight.numel() > group_of(weight.shape[-1])

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`."""
        x = grouped(weight, group_of(weight.shape[-1]))
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        scale = divided(high - low, 15.0)
        codes = torch.round((x - low) / torch.where(scale > 0, scale, 1.0)).clamp(0, 15)
        return affine(
            codes,
            scale=scale,
            offset=low,
            levels=torch.arange(16.0),
            sets=(x == low) | (x == high),
            lowest=low,
            highest=high,
        )

    def elsewhere(
        self, weight: Float[Tensor, "out in"], dtype: torch.dtype
    ) -> dict[str, NarrowCells]:
        """See `Quantizer.elsewhere`."""
        if dtype == torch.float32:
            return {}
        x = grouped(weight, group_of(weight.shape[-1])).to(dtype)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        found = narrowed(self.cells(weight), x, scale=divided(high - low, 15.0), origin=low)
        return {f"in {dtype_name(dtype)}": found}

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`. Codes are not packed into bytes and back, for which the
        package compiles an extension of its own."""
        quanto = library("optimum.quanto", "quanto")
        x, group = weight.detach().float().contiguous(), group_of(weight.shape[-1])
        scale, shift = quanto.MaxOptimizer()(x, quanto.qint4, axis=0, group_size=group)
        codes = torch.ops.quanto.quantize_affine(
            x, bits=4, axis=0, group_size=group, scale=scale, shift=shift
        )
        return (scale * codes - shift).view_as(x)


def group_of(width: int) -> int:
    """Elements of a group in rows of some width."""
    return next((size for size in SIZES if width % size == 0), width)
