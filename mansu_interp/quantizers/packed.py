"""Quantized weights held as codes, which give the de-quantized values back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from .base import Cells, Quantizer

GROUPS = (256, 128, 64, 32, 16)
"""Group sizes that are looked for, the largest first."""
PART = 2**16
"""Bytes of codes that are unpacked at once: what that takes stays in the processor's cache."""

Group = Float[Tensor, "groups 1"]


@dataclass(frozen=True)
class Packed:
    """One quantized weight: ``value = (level - zero) x scale + offset``."""

    codes: UInt8[Tensor, " bytes"]
    """Two a byte, the first in the low bits; one a byte where there are more than 16."""
    table: Int[Tensor, " kinds"]
    """The levels that each byte stands for, in grid units: float32, two of them side by side as 64
    bits, one as 32."""
    scale: Group
    zero: Group | None
    """Grid unit of the value 0; None where that is 0 everywhere."""
    offset: Group | None
    """None where it is 0 everywhere."""

    @classmethod
    def of(cls, quantizer: Quantizer, weight: Float[Tensor, "out in"]) -> Packed | None:
        """What a quantizer makes of a weight; None where no way of computing with the codes, scales
        and offsets of its cells gives the library's own values back."""
        cells, wanted = quantizer.cells(weight), quantizer.round_trip(weight)
        size = next((s for s in GROUPS if _alike(cells.scale, s) and _alike(cells.offset, s)), 0)
        if not size or len(cells.levels) > 256 or len(cells.codes) % 2:
            return None
        (codes, table), back = _bytes(cells), torch.empty_like(wanted)
        scale, offset = (x.view(-1, size)[:, :1] for x in (cells.scale, cells.offset))
        for parameters in _ways(scale, offset):
            found = cls(codes, table, *parameters)
            found.unpack(back)
            if torch.equal(back, wanted):
                return found
        return None

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device) for n, t in held.items() if t is not None})

    def unpack(self, into: Float[Tensor, "out in"]) -> None:
        """Write the de-quantized weight into a contiguous tensor of its shape."""
        groups = into.view(len(self.scale), -1)
        each = self.table.element_size() // 4  # codes a byte
        step = max(1, PART * each // groups.shape[1])
        size = groups.shape[1] // each
        for at in range(0, len(groups), step):
            some = slice(at, at + step)
            bytes_ = self.codes[at * size : (at + step) * size]
            levels = self.table[bytes_.int()].view(torch.float32).view_as(groups[some])
            if self.zero is not None:
                levels.sub_(self.zero[some])
            torch.mul(levels, self.scale[some], out=groups[some])
            if self.offset is not None:
                groups[some].add_(self.offset[some])


def _alike(values: Float[Tensor, " n"], size: int) -> bool:
    """Whether groups of that size have one value each."""
    if len(values) % size:
        return False
    groups = values.view(-1, size)
    return all(bool((g == g[:, :1]).all()) for g in (groups[:8], groups))  # most sizes fail soon


def _bytes(cells: Cells) -> tuple[UInt8[Tensor, " bytes"], Int[Tensor, " kinds"]]:
    """Codes as bytes, and the levels that each byte stands for."""
    codes, levels = cells.codes.to(torch.uint8), cells.levels
    if len(levels) > 16:
        return codes, levels.view(torch.int32)
    padded = torch.nn.functional.pad(levels, (0, 16 - len(levels)))
    first, second = padded.repeat(16), padded.repeat_interleave(16)
    table = torch.stack([first, second], 1).view(torch.int64).flatten()
    return codes[::2] | codes[1::2] << 4, table


def _ways(scale: Group, offset: Group) -> Iterator[tuple[Group, Group | None, Group | None]]:
    """Scale, zero and offset as libraries store them: with offset or integer zero, in float32 or
    float16."""
    if not offset.any():
        for kind in (torch.float32, torch.float16):
            yield scale.to(kind).float().clone(), None, None
        return
    zero = torch.where(scale > 0, -offset / scale, 0.0).round()
    for kind in (torch.float32, torch.float16):
        rounded = scale.to(kind).float().clone()
        yield rounded, zero, None
        yield rounded, None, offset.to(kind).float().clone()
