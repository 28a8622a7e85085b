"""Quantized weights held as codes, which give the de-quantized values back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from .base import Cells, Quantizer, as_units, in_parts

GROUPS = (256, 128, 64, 32, 16)
"""Group sizes that are looked for, the largest first."""
BYTES = 2**16
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
    def of(
        cls,
        quantizer: Quantizer,
        weight: Float[Tensor, "out in"],
        wanted: Float[Tensor, "out in"] | None = None,
    ) -> Packed | None:
        """What a quantizer makes of a weight; None where no way of computing with the codes, scales
        and offsets of its cells gives the library's own values back: ``wanted``, if they are known
        already."""
        wanted = quantizer.round_trip(weight) if wanted is None else wanted
        units = as_units(weight, [quantizer])
        found = [_Part.of(quantizer.cells(rows)) for _, rows in in_parts(units)]
        known = [p for p in found if p is not None]
        if len(known) < len(found):
            return None
        size = min(p.size for p in known)
        codes = torch.cat([p.codes for p in known])
        scale, offset = (
            torch.cat([getattr(p, of).repeat_interleave(p.size // size) for p in known])[:, None]
            for of in ("scale", "offset")
        )
        back = torch.empty_like(wanted)
        for parameters in _ways(scale, offset):
            found = cls(codes, known[0].table, *parameters)
            found.unpack(back)
            if torch.equal(back, wanted):
                return found
        return None

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device) for n, t in held.items() if t is not None})

    def unpack(self, into: Float[Tensor, "out in"]) -> None:
        """Write the de-quantized weight into a contiguous tensor of its shape, as its dtype rounds
        it."""
        groups = into.view(len(self.scale), -1)
        each = self.table.element_size() // 4  # codes a byte
        step = max(1, BYTES * each // groups.shape[1])
        size = groups.shape[1] // each
        for at in range(0, len(groups), step):
            some = slice(at, at + step)
            bytes_ = self.codes[at * size : (at + step) * size]
            levels = self.table[bytes_.int()].view(torch.float32).view_as(groups[some])
            if self.zero is not None:
                levels.sub_(self.zero[some])
            levels.mul_(self.scale[some])
            if self.offset is not None:
                levels.add_(self.offset[some])
            groups[some].copy_(levels)


@dataclass(frozen=True)
class _Part:
    """Some rows of a weight; fields as in `Packed`."""

    size: int
    """Of its groups."""
    codes: UInt8[Tensor, " bytes"]
    table: Int[Tensor, " kinds"]
    scale: Float[Tensor, " groups"]
    offset: Float[Tensor, " groups"]

    @classmethod
    def of(cls, cells: Cells) -> _Part | None:
        """From cells; None where they have more than 256 levels, or groups of no size that is
        looked for."""
        scale, offset, levels = cells.scale, cells.offset, cells.levels
        size = next((s for s in GROUPS if _alike(scale, s) and _alike(offset, s)), 0)
        if not size or len(levels) > 256:
            return None
        codes = cells.codes.to(torch.uint8)
        if len(levels) > 16:
            table = levels.view(torch.int32)
        else:
            padded = torch.nn.functional.pad(levels, (0, 16 - len(levels)))
            both = torch.stack([padded.repeat(16), padded.repeat_interleave(16)], 1)
            codes, table = codes[::2] | codes[1::2] << 4, both.view(torch.int64).flatten()
        return cls(size, codes, table, scale[::size].clone(), offset[::size].clone())


def _alike(values: Float[Tensor, " n"], size: int) -> bool:
    """Whether groups of that size have one value each."""
    if len(values) % size:
        return False
    groups = values.view(-1, size)
    return all(bool((g == g[:, :1]).all()) for g in (groups[:8], groups))  # most sizes fail soon


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
