"""INT4 and NVFP4 in groups along a row, as torchao does them.

INT4 by rounding to nearest, through torchao's quantization primitives:

- ``sym``: scale = absmax / 7.5, levels -8..7;
- ``asym``: scale = (max - min) / 15 with 0 in the range, an integer zero point;
- ``tinygemm``: scale = (max - min) / 15, the minimum on level 0: the rule behind torchao's
  ``Int4WeightOnlyConfig``, whose packed tensors need an accelerator; these primitives do not.

NVFP4 with two levels of scales: `E2M1` times a scale of each 16 elements in 8 bits (E4M3), times
one of the tensor, which takes its absmax to 6 x 448. With one level the scale of the tensor is 1,
and groups whose absmax is below 6 x 2 ** -6 share the smallest scale: torchao makes no subnormal
ones. Weights alone: engines that round activations to four bits as well round more.

The weight is widened to float32 first. Given one in bfloat16, torchao computes INT4 in that, and so
does compressed-tensors: `Int4.elsewhere`, where an edit has to survive as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ..utils.libraries import library
from ..utils.tensors import dtype_name
from .base import (
    E2M1,
    E2M1_LEVELS,
    Cells,
    NarrowCells,
    Quantizer,
    affine,
    divided,
    e2m1_codes,
    grouped,
    narrowed,
)

TINY = torch.finfo(torch.float32).smallest_normal


@dataclass(frozen=True)
class Int4(Quantizer):
    """One of the rules above at one group size."""

    rule: str = "asym"
    group: int = 128
    needs = (("torchao", "torchao"),)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in `get_quantizer`."""
        stem = {"asym": "int4", "sym": "int4-sym", "tinygemm": "torchao-int4"}[self.rule]
        return f"{stem}-g{self.group}"

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups."""
        return weight.shape[-1] % self.group == 0

    def splits(self, n: int, width: int) -> bool:
        """See `Quantizer.splits`."""
        return n % self.group == 0

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`."""
        x = grouped(weight, self.group)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if self.rule == "sym":
            absmax = x.abs().amax(1, keepdim=True)
            scale = divided(absmax, 7.5).clamp(min=TINY)
            codes = (torch.round(x * (1.0 / scale)) + 8).clamp(0, 15)
            return affine(
                codes,
                scale=scale,
                offset=scale * 0,
                levels=torch.arange(-8.0, 8.0),
                sets=x.abs() == absmax,
                lowest=-absmax,
                highest=absmax,
            )
        sets = (x == low) | (x == high)
        if self.rule == "tinygemm":
            scale = divided(high - low, 15.0).clamp(min=TINY)
            zero = low + scale * 8
            codes = torch.round((x - (zero - scale * 8)) / scale).clamp(0, 15)
            return affine(
                codes,
                scale=scale,
                offset=low,
                levels=torch.arange(16.0),
                sets=sets,
                lowest=low,
                highest=high,
            )
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = divided(high - low, 15.0).clamp(min=TINY)
        zero = (-torch.round(low / scale)).clamp(0, 15)
        codes = (torch.round(x * (1.0 / scale)) + zero).clamp(0, 15)
        sets = (x == low) | (x == high)
        return affine(
            codes,
            scale=scale,
            offset=-zero * scale,
            levels=torch.arange(16.0),
            sets=sets,
            lowest=low,
            highest=high,
        )

    def elsewhere(
        self, weight: Float[Tensor, "out in"], dtype: torch.dtype
    ) -> dict[str, NarrowCells]:
        """See `Quantizer.elsewhere`: torchao's, and of symmetric ones also compressed-tensors'
        (W4A16), which divides where torchao multiplies, both in a narrow dtype."""
        if dtype == torch.float32:
            return {}
        where = f"in {dtype_name(dtype)}"
        wide, x = self.cells(weight), grouped(weight, self.group).to(dtype)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        tiny = torch.finfo(dtype).smallest_normal
        if self.rule == "sym":
            scale = divided(torch.maximum(-low, high), 7.5)
            zero = torch.full_like(scale, 8.0)
            held = torch.where(scale > 0, scale, torch.finfo(dtype).eps)
            by_torchao = narrowed(wide, x, scale=scale.clamp(min=tiny), zero=zero, multiplies=True)
            return {
                where: by_torchao,
                f"{where}, compressed-tensors": narrowed(wide, x, scale=held, zero=zero),
            }
        if self.rule == "tinygemm":
            scale = divided(high - low, 15.0).clamp(min=tiny)
            lowest = (low + scale * 8) - scale * 8  # rounded twice: what it keeps is the middle
            return {where: narrowed(wide, x, scale=scale, origin=lowest)}
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = divided(high - low, 15.0).clamp(min=tiny)
        zero = (-torch.round(low / scale)).clamp(0, 15)
        return {where: narrowed(wide, x, scale=scale, zero=zero, multiplies=True)}

    def library_codes(
        self, weight: Float[Tensor, "out in"]
    ) -> tuple[Integer[Tensor, "out in"], Float[Tensor, "out in"]]:
        """Codes and restored values by torchao."""
        ao = library("torchao.quantization.quant_primitives", "torchao")
        x = weight.detach().float().contiguous()
        block, kinds = (1, self.group), ao.MappingType
        low, high = (-8, 7) if self.rule == "sym" else (0, 15)
        dtype = torch.int8 if self.rule == "sym" else torch.uint8
        if self.rule == "tinygemm":
            params = ao._choose_qparams_affine_tinygemm(
                x, kinds.ASYMMETRIC, block, dtype, low, high
            )
            quantize, restore = ao._quantize_affine_tinygemm, ao._dequantize_affine_tinygemm
        else:
            kind = kinds.SYMMETRIC if self.rule == "sym" else kinds.ASYMMETRIC
            params = ao.choose_qparams_affine(
                x, kind, block, dtype, low, high, zero_point_dtype=torch.int32
            )
            quantize, restore = ao.quantize_affine, ao.dequantize_affine
        codes = quantize(x, block, *params, dtype, low, high)
        return codes, restore(codes, block, *params, dtype, low, high, output_dtype=torch.float32)

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        return self.library_codes(weight)[1]


NVFP4_GROUP = 16
E4M3_MAX, E4M3_TINY = 448.0, 2.0**-6
"""Largest and smallest scale of a group, in units of the tensor's."""


@dataclass(frozen=True)
class Nvfp4(Quantizer):
    """NVFP4 of a weight."""

    one_level: bool = False
    """Whether the tensor has no scale of its own."""
    needs = (("torchao", "torchao"),)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in `get_quantizer`."""
        return "nvfp4-1" if self.one_level else "nvfp4"

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups of 16."""
        return weight.shape[-1] % NVFP4_GROUP == 0

    def splits(self, n: int, width: int) -> bool:
        """See `Quantizer.splits`: of two levels one is the whole tensor's."""
        return self.one_level and n % NVFP4_GROUP == 0

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`. The element that sets the tensor's scale sets its group's, too."""
        x = grouped(weight, NVFP4_GROUP)
        absmax = x.abs().amax(1, keepdim=True)
        whole = x.new_ones(()) if self.one_level else _of_tensor(x)
        share = (divided(absmax, E2M1[-1]) / whole).clamp(E4M3_TINY, E4M3_MAX)
        share = share.to(torch.float8_e4m3fn).float()
        inside = (x * (1.0 / whole / share)).clamp(-E2M1[-1], E2M1[-1])
        return affine(
            e2m1_codes(inside, 1.0, even=True),
            scale=share * whole,
            offset=share * 0,
            levels=E2M1_LEVELS,
            sets=x.abs() == absmax,
            lowest=-absmax,
            highest=absmax,
        )

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        tensor = library("torchao.prototype.mx_formats.nvfp4_tensor", "torchao").NVFP4Tensor
        x = weight.detach().float().contiguous()
        whole = None if self.one_level else _of_tensor(x)
        return tensor.to_nvfp4(x, per_tensor_scale=whole).dequantize()


def _of_tensor(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The scale of a whole tensor; of zeros any will do."""
    return divided(x.abs().amax(), E2M1[-1] * E4M3_MAX).clamp(min=TINY)
