"""Edits that part what quantizers make of a model from the model itself (ours).

Of an edit d = v - o a quantizer makes Q(v) - Q(o): up to half a cell more or less, and where v and
o are chosen for it, in every quantizer of a set alike. With g the slope of a quantity at full
precision, such an edit takes g . (d - (Q(v) - Q(o))) of the quantity from every quantized model,
measured from full precision. Upwards and downwards in equal parts, sum of g . d = 0, the edits
leave full precision where it is. Of all weights that nobody edited yet those are taken whose
worst-off quantizer gains most, until the sum of these gains, that is a first-order bound for every
quantizer, reaches what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .floor import Floor
from .landing import places
from .quantizers import Cells

HALVINGS = 30
"""Of the bracket of the price, which settles it far below what one edit changes."""


@dataclass(frozen=True)
class Levers:
    """Edits that some elements of one weight could make; an element makes one at most."""

    values: Float[Tensor, "options n"]
    gain: Float[Tensor, "options n"]
    """How far the edit parts the worst-off quantizer from full precision, first order; 0 where it
    is none."""
    shift: Float[Tensor, "options n"]
    """What it changes at full precision, first order."""
    weight: Float[Tensor, " n"]
    """In (0, 1], by which a gain is weighed: less where more is to be kept."""


def levers(
    floor: Floor,
    grids: Sequence[Cells],
    quantized: Sequence[Float[Tensor, " n"]],
    original: Float[Tensor, " n"],
    slope: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
) -> Levers:
    """The edits that the floor allows next to some values, upwards and downwards.

    Arguments:
        floor: of these elements.
        grids: their cells in every quantizer; one that left them alone would not part.
        quantized: the values in every quantizer.
        original: the values, which are not edited.
        slope: of the quantity per unit of each.
        weight: of each (`Levers.weight`).
    """
    sides = []
    for nearest in (floor.up, floor.down):
        value = torch.where(nearest.isnan(), original, nearest)
        sides.append(places(floor, grids, value, value))
    values = torch.cat(sides)
    edit = values - original
    parted = [
        (edit - (grid.value(grid.encode(values)) - own)) * slope
        for grid, own in zip(grids, quantized, strict=True)
    ]
    gain = torch.where(edit != 0, torch.stack(parted).amin(0), 0.0)
    return Levers(values, gain, edit * slope, weight)


@dataclass(frozen=True)
class Parting:
    """The edits chosen of some `Levers`."""

    chosen: list[tuple[Int[Tensor, " m"], Float[Tensor, " m"]]]
    """Per `Levers`: which elements, and their new values."""
    gain: float
    """The sum of their gains: what each quantizer is parted by at least, first order."""
    shift: float
    """What full precision changes by, first order: as near 0 as one edit allows."""


def chosen(some: Sequence[Levers], wanted: float, most: int) -> Parting:
    """As few edits as give a gain, leaving full precision where it is; or as many as may be.

    Arguments:
        some: what there is to choose from.
        wanted: sum of the gains.
        most: edits at most.
    """
    low, price, high = -1.0, 0.0, 1.0  # a gain is less than half of what its edit changes
    found = _at_price(some, price, wanted, most)
    for _ in range(1, HALVINGS):
        low, high = (price, high) if found.shift > 0 else (low, price)
        price = (low + high) / 2
        found = _at_price(some, price, wanted, most)
    return found


def _at_price(some: Sequence[Levers], price: float, wanted: float, most: int) -> Parting:
    """The edits of most worth where a unit of shift costs so much."""
    scores, rows = zip(
        *((x.gain * x.weight - price * x.shift * x.weight).max(0) for x in some), strict=True
    )
    gains, shifts = (
        torch.cat([getattr(x, key).gather(0, r[None])[0] for x, r in zip(some, rows, strict=True)])
        for key in ("gain", "shift")
    )
    score = torch.where(gains > 0, torch.cat(scores), 0.0)
    best = score.topk(min(most, len(score)))
    order = best.indices[best.values > 0]
    enough = int((gains[order].cumsum(0) < wanted).sum()) + 1
    order = order[:enough]
    taken = torch.zeros_like(score, dtype=torch.bool)
    taken[order] = True
    parts = taken.split([x.values.shape[1] for x in some])
    picked = []
    for x, r, t in zip(some, rows, parts, strict=True):
        i = t.nonzero()[:, 0]
        picked.append((i, x.values[r[i], i]))
    return Parting(picked, float(gains[order].sum()), float(shifts[order].sum()))
