"""The magnitude floor for a set of quantizers (ours, after the idea of arXiv 2605.15138).

An edited weight must leave its cell in every quantizer of the set, and change no group's scale in
any of them. Upwards its new value is therefore at least the farthest of the next levels above,
which is beyond its own cell by half a cell of the coarsest quantizer and by more of the others;
downwards likewise. For one quantizer that is the neighbouring level, which the quantized model has
too. A weight whose wanted value is farther away is rounded to a level of the quantizer whose cells
are widest there: that one would change the edit most, and now does not; the others change it by
half a finer cell at most. With several quantizers `rounding` chooses anew among the levels of all.

Every condition is checked on the values as the checkpoint stores them, and again with original and
edit both rounded to bfloat16 and to float16: the guarantee also holds between the two checkpoints
saved again in either. Where another library has other cells of the same format, or computes in the
checkpoint's dtype rather than in float32, those are one more quantizer to survive
(`Quantizer.elsewhere`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError
from ..quantizers.base import Cells, Quantizer, as_units, in_parts
from ..quantizers.registry import QUANTIZERS, get_quantizer

Set = Sequence[Quantizer | str] | Quantizer | str
NARROW = (torch.bfloat16, torch.float16)
"""Dtypes that a checkpoint may be saved in later."""
ROUNDING = 2.0**-7
"""Share of a group's extreme by which an edit stays below it: four times what bfloat16 rounds."""

WHOLE = ("own", "dtype")
"""Fields of `Floor` that are not one tensor over the elements."""


def quantizer_set(survive: Set) -> list[Quantizer]:
    """The quantizers of a set, by name or as they are, in one order, whatever the order in which
    they were named.

    Raises:
        ConfigError: none given, unknown, or one that no edit can be sure to survive.
    """
    given = [survive] if isinstance(survive, (str, Quantizer)) else list(survive)
    found = [get_quantizer(q) if isinstance(q, str) else q for q in given]
    if not found:
        raise ConfigError("survive names no quantizer; give at least one, such as nf4.")
    for q in found:
        if not q.promises:
            raise ConfigError(
                f"No edit can be made to survive {q.name} by construction: its groups depend on "
                "every element. Leave it out of survive; name it under quantizers to measure it, "
                "or under train_through to let training take turns with it, without a promise."
            )
    places = {name: k for k, name in enumerate(QUANTIZERS)}
    return sorted(found, key=lambda q: (places.get(q.name, len(places)), q.name))


@dataclass(frozen=True)
class Floor:
    """To which values the elements of one weight may be edited."""

    up: Float[Tensor, " n"]
    """Nearest admissible value above, as stored; NaN where there is none."""
    down: Float[Tensor, " n"]
    """Nearest admissible value below; NaN where there is none."""
    leave_up: Float[Tensor, " n"]
    """The highest upper boundary of the element's own cells."""
    leave_down: Float[Tensor, " n"]
    """The lowest lower boundary of its own cells."""
    lowest: Float[Tensor, " n"]
    """No edit may lie at or below this."""
    highest: Float[Tensor, " n"]
    """No edit may lie at or above this."""
    own: tuple[Cells, ...]
    """The cells of every quantizer of the set that touches this weight."""
    dtype: torch.dtype
    """Of the checkpoint."""

    @property
    def span(self) -> Float[Tensor, " n"]:
        """Half the range of the levels of the quantizer with the widest cells on average."""
        widest = torch.stack([g.width for g in self.own]).argmax(0)
        return torch.stack([g.span for g in self.own]).gather(0, widest[None])[0]

    def __getitem__(self, index: Int[Tensor, " m"]) -> Floor:
        """The floor of some elements."""
        parts = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in WHOLE}
        return replace(self, **parts, own=tuple(g[index] for g in self.own))

    @classmethod
    def join(cls, some: Sequence[Floor]) -> Floor:
        """The floors of several weights that the same quantizers touch, one after another."""
        names = [f.name for f in fields(cls) if f.name not in WHOLE]
        parts = {n: torch.cat([getattr(f, n) for f in some]) for n in names}
        own = tuple(Cells.join(each) for each in zip(*(f.own for f in some), strict=True))
        return replace(some[0], **parts, own=own)

    def admits(
        self, value: Float[Tensor, "*several n"], wanted: Float[Tensor, " n"]
    ) -> Bool[Tensor, "*several n"]:
        """Whether values, as stored, are edits that the floor allows towards the wanted ones."""
        far = torch.where(wanted > self.leave_up, value >= self.up, value <= self.down)
        return far & (value > self.lowest) & (value < self.highest)

    def leaves(self, wanted: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Whether wanted values lie outside the elements' own cells in every quantizer."""
        return (wanted > self.leave_up) | (wanted < self.leave_down)

    def land(self, wanted: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """The wanted values, rounded to what the floor admits.

        A weight moves once the wanted value lies outside its own cell in every quantizer: to the
        level around it whose cell is the widest of the set's, or to the nearest admissible value
        if that is farther.

        Returns:
            Values as stored, and which weights move; the values of the others mean nothing.
        """
        codes = [g.encode(wanted).clamp(1, len(g.levels) - 2) for g in self.own]
        both = list(zip(self.own, codes, strict=True))
        widths = torch.stack([g.edge(c) - g.edge(c - 1) for g, c in both])
        levels = torch.stack([g.value(c) for g, c in both])
        distance = (levels - wanted).abs()  # of equally wide cells the nearer level
        chosen = torch.where(widths == widths.amax(0), distance, torch.inf).argmin(0)
        level = levels.gather(0, chosen[None])[0].to(self.dtype).float()
        value = torch.where(wanted > self.leave_up, self.up, self.down)
        value = torch.where(self.admits(level, wanted), level, value)
        return value, self.leaves(wanted) & ~value.isnan()


@dataclass(frozen=True)
class _Grids:
    """The cells of some elements in every quantizer of the set, every library's of it and every
    dtype, and how far an edit may reach."""

    own: tuple[Cells, ...]
    """Those of the quantizers themselves, of the checkpoint as it is."""
    each: list[tuple[torch.dtype, Cells]]
    """All of them."""
    lowest: Float[Tensor, " n"]
    highest: Float[Tensor, " n"]
    fixed: Bool[Tensor, " n"]
    dtype: torch.dtype
    """Of the checkpoint."""

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "out in"],
        quantizers: Sequence[Quantizer],
        dtype: torch.dtype,
        narrow: Sequence[torch.dtype],
        index: Int[Tensor, " m"] | None = None,
    ) -> _Grids:
        each: list[tuple[torch.dtype, Cells]] = []
        for kind in dict.fromkeys((dtype, *narrow)):
            stored = weight.detach().to(kind).float()
            cells = [q.cells(stored) for q in quantizers]
            for q in quantizers:
                cells += q.elsewhere(stored, kind).values()
            each += [(kind, c if index is None else c[index]) for c in cells]
        lows = (g.lowest + ROUNDING * g.lowest.abs() for _, g in each)
        highs = (g.highest - ROUNDING * g.highest.abs() for _, g in each)
        fixed = (g.sets_scale | (g.scale <= 0) for _, g in each)
        return cls(
            tuple(c for _, c in each[: len(quantizers)]),
            each,
            reduce(torch.maximum, lows),
            reduce(torch.minimum, highs),
            reduce(torch.logical_or, fixed),
            dtype,
        )

    def nearest(self, up: bool | Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The nearest admissible value above each element, or below it; NaN where there is none."""
        above = torch.as_tensor(up, device=self.lowest.device)
        step = torch.where(above, 1, -1)
        levels = [g.value(g.codes + step) for _, g in self.each]
        target = torch.where(above, reduce(torch.maximum, levels), reduce(torch.minimum, levels))
        target = target.to(self.dtype).float()
        good = ~self.fixed & (target > self.lowest) & (target < self.highest)
        for kind, g in self.each:
            good &= g.leaves(target.to(kind).float(), above)
        return torch.where(good, target, torch.nan)


@torch.no_grad()
def floor(
    weight: Float[Tensor, "out in"],
    survive: Set,
    dtype: torch.dtype = torch.float32,
    *,
    index: Int[Tensor, " m"] | None = None,
    narrow: Sequence[torch.dtype] = NARROW,
) -> Floor:
    """The floor for a weight.

    Arguments:
        weight: as loaded.
        survive: the set; its order means nothing.
        dtype: of the checkpoint.
        index: flat positions of the elements wanted; default: all.
        narrow: dtypes that both checkpoints may be saved in later.

    Raises:
        ConfigError: see `quantizer_set`.
    """
    quantizers = _those_that_touch(weight, survive)
    if index is None:
        index = torch.arange(weight.numel(), device=weight.device)
    units = as_units(weight, quantizers)
    size, order, found = units[0].numel(), index.argsort(stable=True), []
    held = (index // size).unique()  # units in which nothing is asked for are not looked at
    within = torch.searchsorted(held, index[order] // size) * size + index[order] % size
    for some, rows in in_parts(units[held]):
        ends = torch.tensor([some.start, some.stop]).to(within) * size
        low, high = torch.searchsorted(within, ends).tolist()
        here = within[low:high] - some.start * size
        found.append(_floor(_Grids.of(rows, quantizers, dtype, narrow, here)))
    return Floor.join(found)[order.argsort()]


def _floor(grids: _Grids) -> Floor:
    """The floor of the elements of some grids."""
    return Floor(
        up=grids.nearest(True),
        down=grids.nearest(False),
        leave_up=reduce(torch.maximum, (g.edge(g.codes) for g in grids.own)),
        leave_down=reduce(torch.minimum, (g.edge(g.codes - 1) for g in grids.own)),
        lowest=grids.lowest,
        highest=grids.highest,
        own=grids.own,
        dtype=grids.dtype,
    )


def _those_that_touch(weight: Float[Tensor, "out in"], survive: Set) -> list[Quantizer]:
    """The quantizers of a set that touch a weight; where none does, one to take steps by."""
    return [q for q in quantizer_set(survive) if q.touches(weight)] or [get_quantizer("nf4")]


@torch.no_grad()
def floor_step(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    survive: Set,
    dtype: torch.dtype = torch.float32,
    *,
    narrow: Sequence[torch.dtype] = NARROW,
) -> Float[Tensor, "out in"]:
    """The smallest step against the gradient that the floor allows; 0 where it forbids any."""
    quantizers = _those_that_touch(weight, survive)
    units, slopes = (as_units(x, quantizers) for x in (weight, gradient))
    step = torch.empty_like(units, dtype=torch.float32)
    for some, rows in in_parts(units):
        slope = slopes[some].flatten()
        target = _Grids.of(rows, quantizers, dtype, narrow).nearest(slope <= 0)
        found = (target - rows.flatten()).nan_to_num(0.0)
        step[some] = torch.where(slope == 0, 0.0, found).view_as(step[some])
    return step.view_as(weight)
