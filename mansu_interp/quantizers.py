"""Post-training quantizers: their cells, their real round trip, and what survives them.

A *cell* is the set of values that a quantizer maps to one code. An edit survives when it changes
the code, and is free of collateral when no other code changes. NF4 (Dettmers et al. 2023, arXiv
2305.14314): flat row-major blocks of 64 over the ``[out, in]`` weight, scaled by the block's
largest absolute value (absmax), 16 levels, boundaries at the midpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import ConfigError
from .models import LanguageModel, quiet


@lru_cache
def _bitsandbytes() -> Any:
    with quiet():
        from bitsandbytes import functional
    return functional


@dataclass(frozen=True)
class Cells:
    """Where every element of one weight lies."""

    codes: Int[Tensor, " n"]
    scale: Float[Tensor, " n"]
    """absmax of the element's block."""
    sets_scale: Bool[Tensor, " n"]
    """True where the element is its block's absmax: touching it would re-code the whole block."""


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat as bitsandbytes implements it."""

    blocksize: int = 64
    name: str = "nf4"

    @property
    def levels(self) -> Float[Tensor, 16]:
        """The 16 values of a code, in units of absmax, ascending."""
        return _nf4_levels()

    @property
    def boundaries(self) -> Float[Tensor, 15]:
        """Cell boundaries, in units of absmax."""
        levels = self.levels
        return (levels[1:] + levels[:-1]) / 2

    def cells(self, weight: Float[Tensor, ...]) -> Cells:
        """Codes and scales of a weight, bit for bit those of bitsandbytes."""
        flat = weight.detach().float().flatten()
        pad = -len(flat) % self.blocksize
        blocks = torch.cat([flat, flat.new_zeros(pad)]).view(-1, self.blocksize)
        absmax = blocks.abs().amax(1, keepdim=True)
        scaled = blocks * torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
        codes = torch.bucketize(scaled, self.boundaries)
        n = len(flat)
        return Cells(
            codes.flatten()[:n],
            absmax.expand_as(blocks).flatten()[:n],
            (blocks.abs() == absmax).flatten()[:n],
        )

    def round_trip(self, weight: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Quantize and de-quantize with bitsandbytes itself."""
        functional = _bitsandbytes()
        packed, state = functional.quantize_4bit(
            weight.detach().float().contiguous(), quant_type="nf4", blocksize=self.blocksize
        )
        return functional.dequantize_4bit(packed, state)


@lru_cache
def _nf4_levels() -> Float[Tensor, 16]:
    return torch.as_tensor(_bitsandbytes().get_4bit_type("nf4", device="cpu").data).float()


QUANTIZERS = {"nf4": NF4()}


def get_quantizer(name: str) -> NF4:
    """A quantizer by name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in QUANTIZERS:
        raise ConfigError(f"Unknown quantizer {name!r}; available: {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]


@torch.no_grad()
def quantize(model: LanguageModel, quantizer: NF4 | str = "nf4") -> LanguageModel:
    """A copy whose linear weights went through a quantizer and back.

    De-quantized weights sit in a plain model, so that every analysis runs on it unchanged.
    """
    quantizer = get_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    copy = model.copy()
    for name in copy.linear_names:
        copy.weights[name].copy_(quantizer.round_trip(copy.weights[name]))
    return copy


@dataclass(frozen=True)
class Survival:
    """What one quantizer makes of an edit."""

    edited: int
    """Weights whose value differs."""
    survived: int
    """Edited weights whose code changed."""
    collateral: int
    """Unedited weights whose code changed."""
    update_over_bin: float
    """RMS of the edit over the RMS of the local bin width (mean gap 2/15 x absmax)."""
    projection: float
    """<dQ, d> / <d, d>: the share of the edit that the quantized model keeps, 1 = all."""
    noise_over_signal: float = 0.0
    """||dQ - d|| / ||d||: what rounding adds to the edit, over the edit."""


@torch.no_grad()
def survival(before: LanguageModel, after: LanguageModel, quantizer: NF4) -> Survival:
    """Compare two checkpoints code by code, over every quantized weight."""
    edited = survived = collateral = 0
    update = bins = kept = norm = noise = 0.0
    for name in before.linear_names:
        a, b = before.weights[name], after.weights[name]
        moved = (a != b).flatten()
        if not moved.any():
            continue
        cells_a, cells_b = quantizer.cells(a), quantizer.cells(b)
        changed = cells_a.codes != cells_b.codes
        edited += int(moved.sum())
        survived += int((changed & moved).sum())
        collateral += int((changed & ~moved).sum())
        d = (b - a).flatten()[moved].double()
        dq = (quantizer.round_trip(b) - quantizer.round_trip(a)).flatten()[moved].double()
        update += float(d @ d)
        bins += float((cells_a.scale[moved].double() * 2 / 15).square().sum())
        kept += float(dq @ d)
        norm += float(d @ d)
        noise += float((dq - d).square().sum())
    if not edited:
        return Survival(0, 0, 0, 0.0, 0.0)
    return Survival(
        edited, survived, collateral, (update / bins) ** 0.5, kept / norm, (noise / norm) ** 0.5
    )
