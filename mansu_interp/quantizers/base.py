"""What all quantizers share: cells on a grid per element, and the interface.

A *cell* is the set of values that a quantizer maps to one code. Every element of a weight belongs
to a group (a block, a part of a row, or a row), whose scale and offset are set by its extremes.
Codes are counted from the lowest level upwards, whatever bits the library stores for them, so that
a higher code is a higher value.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..models.language_model import LanguageModel
from ..utils.libraries import library


@dataclass(frozen=True)
class Cells:
    """Where every element of one weight lies; ``value = level x scale + offset``."""

    codes: Int[Tensor, " n"]
    """Rank of the element's level, 0 = lowest."""
    scale: Float[Tensor, " n"]
    """Value of one grid unit in the element's group."""
    sets_scale: Bool[Tensor, " n"]
    """True where the element sets its group's scale or offset: touching it would re-code others."""
    levels: Float[Tensor, " k"]
    """Levels in grid units, ascending; the same for all groups."""
    offset: Float[Tensor, " n"]
    """Value of grid unit 0."""
    lowest: Float[Tensor, " n"]
    """Extreme value of the group: at or below it an edited element would set the scale."""
    highest: Float[Tensor, " n"]
    """Likewise from above."""

    @property
    def boundaries(self) -> Float[Tensor, " {len(self.levels)-1}"]:
        """Boundaries between the cells in grid units: the midpoints of the levels."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    @property
    def span(self) -> Float[Tensor, " n"]:
        """Half the range of the group's levels (absmax, where the levels are symmetric)."""
        return self.scale * float(self.levels[-1] - self.levels[0]) / 2

    @property
    def width(self) -> Float[Tensor, " n"]:
        """Mean width of a cell."""
        return 2 * self.span / (len(self.levels) - 1)

    def __getitem__(self, index: Int[Tensor, " m"]) -> Cells:
        """The cells of some elements."""
        return replace(self, **{k: v[index] for k, v in self._by_element().items()})

    def _by_element(self) -> dict[str, Tensor]:
        """The fields that hold a number for each element."""
        all_of_them = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "levels"}
        return {name: x for name, x in all_of_them.items() if isinstance(x, Tensor)}

    @classmethod
    def join(cls, some: Sequence[Cells]) -> Cells:
        """The cells of several weights, one after another, in the same quantizer."""
        parts = [c._by_element() for c in some]
        return replace(some[0], **{n: torch.cat([p[n] for p in parts]) for n in parts[0]})

    def encode(self, values: Float[Tensor, "*several n"]) -> Int[Tensor, "*several n"]:
        """Codes that other values would get, group scales unchanged.

        Within a rounding error of a boundary the library may say otherwise.
        """
        return torch.bucketize(self._units(values), self.boundaries)

    def leaves(
        self, values: Float[Tensor, " n"], up: Bool[Tensor, " n"] | Bool[Tensor, ""]
    ) -> Bool[Tensor, " n"]:
        """Whether other values get a higher code than the elements' own (where not ``up``: a lower
        one), as `encode` would say, without looking for the code."""
        units = self._units(values)
        above, below = self._edges[self.codes + 1], self._edges[self.codes]
        return torch.where(up, units > above, units <= below)

    def _units(self, values: Float[Tensor, "*several n"]) -> Float[Tensor, "*several n"]:
        """Values in grid units."""
        return (values - self.offset) / torch.where(self.scale > 0, self.scale, 1.0)

    @property
    def _edges(self) -> Float[Tensor, " {len(self.levels)+1}"]:
        """`boundaries` between infinite ends: entries ``code`` and ``code + 1`` bound a cell."""
        inf = self.boundaries.new_tensor([float("inf")])
        return torch.cat([-inf, self.boundaries, inf])

    def value(self, codes: Int[Tensor, "*several n"]) -> Float[Tensor, "*several n"]:
        """The values of levels, before the library rounds its scale for storage."""
        return self.levels[codes.clamp(0, len(self.levels) - 1)] * self.scale + self.offset

    def edge(self, codes: Int[Tensor, "*several n"]) -> Float[Tensor, "*several n"]:
        """The boundary above each code, infinite above the last and below the first."""
        return self._edges[(codes + 1).clamp(0, len(self.levels))] * self.scale + self.offset


@dataclass(frozen=True)
class NarrowCells(Cells):
    """Cells of a library that computes in the dtype of the checkpoint: a scale, and what comes out
    of a division by it, are rounded to that, so that values near a boundary may fall to the other
    side of it. ``code = round((value - origin) / scale) + zero``, each operation in ``dtype``."""

    dtype: torch.dtype
    origin: Float[Tensor, " n"]
    zero: Float[Tensor, " n"]
    multiplies: bool
    """Whether the library multiplies by the reciprocal of the scale, which is rounded as well."""

    def encode(self, values: Float[Tensor, "*several n"]) -> Int[Tensor, "*several n"]:
        """As the library does."""
        x, by = values.to(self.dtype) - self.origin.to(self.dtype), self.scale.to(self.dtype)
        units = (x * (1.0 / by) if self.multiplies else x / by).round().float() + self.zero
        return units.clamp(0, len(self.levels) - 1).long()

    def leaves(
        self, values: Float[Tensor, " n"], up: Bool[Tensor, " n"] | Bool[Tensor, ""]
    ) -> Bool[Tensor, " n"]:
        """See `Cells.leaves`."""
        code = self.encode(values)
        return torch.where(up, code > self.codes, code < self.codes)


class Quantizer(ABC):
    """A post-training quantizer of weights in the deployed ``[out, in]`` layout."""

    name: str
    promises: bool = True
    """Whether an edit can be made so that no other code changes: false where a group's parameters
    depend on every element (HQQ) or on activations."""
    rescales: bool = False
    """Whether scales move between layers, so that single weights no longer compare with the
    original's."""

    needs: tuple[tuple[str, str], ...] = ()
    """Optional packages, each with the extra that installs it."""

    def check_installed(self) -> None:
        """Before long work.

        Raises:
            ConfigError: a package is missing; names the line that installs it.
        """
        for package, extra in self.needs:
            library(package, extra, f"The quantizer {self.name}")

    @abstractmethod
    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """Codes, grid and scale setters of a weight, code for code those of the library."""

    def elsewhere(self, weight: Float[Tensor, "out in"], dtype: torch.dtype) -> Mapping[str, Cells]:
        """Cells of the same format as other libraries have them, or the same one that computes in
        the checkpoint's dtype, by a few words for where; empty if all have those of `cells`.

        Arguments:
            weight: its values, as the checkpoint stores them.
            dtype: of the checkpoint.
        """
        return {}

    @abstractmethod
    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Quantize and de-quantize with the library itself; float32, on the CPU alone."""

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Whether the library quantizes a linear layer of this shape, or leaves it alone."""
        return True

    def splits(self, n: int, width: int) -> bool:
        """Whether every ``n`` elements of a weight, row after row of ``width``, can be quantized as
        a row of their own: whether groups end where they do."""
        return n == width

    def fit(
        self, model: LanguageModel, calibration: Sequence[Sequence[int]]
    ) -> dict[str, Quantizer]:
        """What quantizes each weight of a model, by name: itself, unless it calibrates."""
        return {n: self for n in model.linear_names if self.touches(model.weights[n])}


PART = 2**17
"""Elements that are looked at together where parts of a weight can be: the many short-lived tensors
then stay small."""


def as_units(
    weight: Float[Tensor, "out in"], quantizers: Sequence[Quantizer]
) -> Float[Tensor, "units rows size"]:
    """A weight as the smallest units that some quantizers treat as they do the whole, in its
    order: rows of a few elements, or all of it, the one unit, where there are none."""
    n, width = weight.numel(), weight.shape[1]
    for size in (32, 64, 128, 256, 512, width):
        if n % size == 0 and all(q.splits(size, width) for q in quantizers):
            return weight.reshape(-1, 1, size)
    return weight[None]


def in_parts(
    units: Float[Tensor, "units rows size"],
) -> Iterator[tuple[slice, Float[Tensor, "some size"]]]:
    """Units of `as_units` in parts of about `PART` elements: which, and their rows."""
    step = max(1, PART // units[0].numel())
    for at in range(0, len(units), step):
        some = slice(at, at + step)
        yield some, units[some].flatten(0, 1)


def grouped(weight: Float[Tensor, "out in"], size: int) -> Float[Tensor, "groups size"]:
    """Rows of a weight cut into groups."""
    return rearrange(
        weight.detach().float().contiguous(), "out (groups size) -> (out groups) size", size=size
    )


def divided(x: Float[Tensor, "*any"], by: float) -> Float[Tensor, "*any"]:
    """``x / by``, the same on every device: CUDA multiplies by the reciprocal of a plain number,
    which sends some values to another code."""
    return x / x.new_tensor(by)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float with two bits of exponent and one of mantissa (OCP Microscaling
Formats 1.0, 2023). With both signs and one zero they make 15 levels."""
E2M1_LEVELS = torch.tensor([-m for m in E2M1[:0:-1]] + list(E2M1))


def e2m1_codes(
    x: Float[Tensor, "groups size"], scale: Float[Tensor, "groups 1"] | float, *, even: bool = False
) -> Int[Tensor, "groups size"]:
    """Ranks among `E2M1_LEVELS` of the levels that are nearest to ``x / scale``.

    Arguments:
        x: values.
        scale: of a group; where it is 0 every value gets the code of 0.
        even: whether a tie goes to the level whose last bit is 0; else it goes towards 0.
    """
    size, code = x.abs(), torch.zeros_like(x, dtype=torch.int64)
    for k, (low, high) in enumerate(itertools.pairwise(E2M1)):
        # Exact: scales are powers of two, or have four significant bits.
        middle = (low + high) / 2 * scale
        code += (size >= middle) if even and k % 2 else (size > middle)
    zero = len(E2M1) - 1
    return zero + torch.where(x < 0, -code, code) * (torch.as_tensor(scale, device=x.device) > 0)


def affine(
    codes: Shaped[Tensor, "groups size"],
    *,
    scale: Float[Tensor, "groups 1"],
    offset: Float[Tensor, "groups 1"],
    levels: Float[Tensor, " k"],
    sets: Bool[Tensor, "groups size"],
    lowest: Float[Tensor, "groups 1"],
    highest: Float[Tensor, "groups 1"],
) -> Cells:
    """Cells from codes by group and one set of parameters per group (fields of `Cells`).

    Arguments:
        codes: whole numbers, as integers or floats.
        scale: value of one grid unit.
        offset: value of grid unit 0.
        levels: in grid units, ascending.
        sets: which elements set their group's scale or offset.
        lowest: extreme value of the group from below.
        highest: likewise from above.
    """

    return Cells(
        codes=codes.long().flatten(),
        scale=_each(scale, codes),
        sets_scale=sets.flatten(),
        levels=levels.to(codes.device),
        offset=_each(offset, codes),
        lowest=_each(lowest, codes),
        highest=_each(highest, codes),
    )


def narrowed(
    cells: Cells,
    x: Float[Tensor, "groups size"],
    *,
    scale: Float[Tensor, "groups 1"],
    origin: Float[Tensor, "groups 1"] | None = None,
    zero: Float[Tensor, "groups 1"] | None = None,
    multiplies: bool = False,
) -> NarrowCells:
    """Cells of a library that computes in the dtype of ``x``, by group.

    Arguments:
        cells: the same in float32: which elements set a scale, and a group's extremes, do not
            depend on how it is computed.
        x: the values.
        scale: see `NarrowCells`, like the others; a missing one is 0.
    """
    grid, start, zeros = (
        _each(torch.zeros_like(scale) if p is None else p, x) for p in (scale, origin, zero)
    )
    same = {f.name: getattr(cells, f.name) for f in fields(cells)}
    same |= {"scale": grid, "offset": start - zeros * grid}
    found = NarrowCells(**same, dtype=x.dtype, origin=start, zero=zeros, multiplies=multiplies)
    return replace(found, codes=found.encode(x.flatten().float()))


def _each(
    parameter: Float[Tensor, "groups 1"], elements: Shaped[Tensor, "groups size"]
) -> Float[Tensor, " n"]:
    """A group's parameter for each of its elements, in float32."""
    return parameter.float().expand_as(elements).flatten()


def mxfp4(x: Float[Tensor, "groups size"], rounds_up: float = 8.0) -> Cells:
    """Cells of MXFP4, the scale of a group a power of two: llama.cpp's and torchao's.

    Arguments:
        x: groups of 32.
        rounds_up: units from which on an absmax has the next power for scale. compressed-tensors
            has 7, and sends ties to the even level.
    """
    absmax = x.abs().amax(1, keepdim=True)
    # The library's float32 logarithm, rounded alike on every device. Just below a power of two it
    # rounds up to the next exponent.
    exponent = absmax.clamp(min=2.0**-120).double().log2().float().floor().int() - 2
    scale = torch.where(absmax > 0, ((exponent + 127) << 23).view(torch.float32), 0.0)
    other = rounds_up < 8
    if other:
        scale = torch.where(absmax >= rounds_up * scale, 2 * scale, scale)
    return affine(
        e2m1_codes(x, scale, even=other),
        scale=scale,
        offset=scale * 0,
        levels=E2M1_LEVELS,
        sets=x.abs() == absmax,
        lowest=-rounds_up * scale,
        highest=rounds_up * scale,
    )
