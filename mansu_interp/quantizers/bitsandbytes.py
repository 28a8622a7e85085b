"""NF4, FP4 and INT8 as bitsandbytes implements them.

4 bits (Dettmers et al. 2023, arXiv 2305.14314): flat row-major blocks over the ``[out, in]``
weight, scaled by the block's largest absolute value (absmax), 16 levels, boundaries at the
midpoints. Double quantization stores the scales in 8 bits; the codes do not depend on it.
INT8 (Dettmers et al. 2022, arXiv 2208.07339): the weight is rounded to float16, then each row to
the integers -127..127 by its absmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from ..utils.libraries import quiet
from .base import Cells, Quantizer, affine, divided


@lru_cache
def _functional() -> ModuleType:
    with quiet():
        from bitsandbytes import functional
    return functional


@lru_cache
def _levels(kind: str) -> Float[Tensor, " 16"]:
    return torch.as_tensor(_functional().get_4bit_type(kind, device="cpu").data).float()


@dataclass(frozen=True)
class FourBit(Quantizer):
    """NF4 or FP4."""

    kind: str = "nf4"
    blocksize: int = 64
    double: bool = False
    """Whether the scales are quantized as well."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in `get_quantizer`."""
        size = "" if self.blocksize == 64 else f"-{self.blocksize}"
        return self.kind + size + ("-dq" if self.double else "")

    @property
    def levels(self) -> Float[Tensor, " k"]:
        """The values of the codes, in units of absmax, ascending; FP4's two zeros count as one."""
        return _levels(self.kind).unique()

    @property
    def boundaries(self) -> Float[Tensor, " {len(self.levels)-1}"]:
        """Boundaries between the cells, in units of absmax."""
        levels = self.levels
        return (levels[1:] + levels[:-1]) / 2

    def splits(self, n: int, width: int) -> bool:
        """See `Quantizer.splits`: blocks go on from row to row."""
        return n % self.blocksize == 0

    def cells(self, weight: Float[Tensor, "*_shape"]) -> Cells:
        """See `Quantizer.cells`; any shape."""
        flat = weight.detach().float().flatten()
        n, size = len(flat), self.blocksize
        blocks = torch.cat([flat, flat.new_zeros(-n % size)]).view(-1, size)
        absmax = blocks.abs().amax(1, keepdim=True)
        floor = absmax.clamp(min=1e-38)
        scaled = blocks * (1 / floor)
        if n % size:  # the library divides in the last, partial block
            scaled[-1] = blocks[-1] / floor[-1]
        codes = torch.bucketize(scaled.clamp(-1, 1), self.boundaries.to(scaled.device))
        sets = blocks.abs() == absmax
        whole = affine(
            codes,
            scale=absmax,
            offset=absmax * 0,
            levels=self.levels,
            sets=sets,
            lowest=-absmax,
            highest=absmax,
        )
        return whole[torch.arange(n, device=flat.device)] if n % size else whole

    def round_trip(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """See `Quantizer.round_trip`.

        The weight goes in flat: the library's CPU kernel restores blocks that span rows with
        the wrong scale otherwise, unlike its quantizer and its GPU kernel.
        """
        packed, state = _functional().quantize_4bit(
            weight.detach().float().flatten(),
            quant_type=self.kind,
            blocksize=self.blocksize,
            compress_statistics=self.double,
        )
        return _functional().dequantize_4bit(packed, state).view_as(weight)


def NF4(blocksize: int = 64, double: bool = False) -> FourBit:
    """4-bit NormalFloat."""
    return FourBit("nf4", blocksize, double)


@dataclass(frozen=True)
class Int8(Quantizer):
    """LLM.int8() weights."""

    name: str = "int8"

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`."""
        half = weight.detach().half()
        absmax = half.abs().amax(1, keepdim=True).float()
        safe = torch.where(absmax > 0, absmax, 1.0)
        codes = torch.round(half * (127.0 / safe)) + 127
        levels = torch.arange(-127.0, 128.0)
        sets = half.abs().float() == absmax
        return affine(
            codes,
            scale=divided(absmax, 127.0),
            offset=absmax * 0,
            levels=levels,
            sets=sets,
            lowest=-absmax,
            highest=absmax,
        )

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        codes, absmax, _ = _functional().int8_vectorwise_quant(weight.detach().half().contiguous())
        # An all-zero row is 0 x inf before the cast to int8: its scale of 0 restores zeros.
        return _functional().int8_vectorwise_dequant(codes, absmax)
