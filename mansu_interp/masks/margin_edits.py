"""Margin edits: what lowers a quantity in quantized models beyond full precision (ours).

Of an edit d = v - o a quantizer makes Q(v) - Q(o): up to half a cell more or less, and where v and
o are chosen for it, in every quantizer of a set alike. With g the slope of a quantity at full
precision, such an edit takes g . (d - (Q(v) - Q(o))) of the quantity from every quantized model,
measured from full precision: the quantization margin. Upwards and downwards in equal parts, sum of
g . d = 0, the edits leave full precision where it is. What quantized models lose of a quantity that
is to be retained, with the slope k, is the sum of k . (d - (Q(v) - Q(o))): edits that take as much
from it as they give leave it where it is in them. Of all weights that nobody edited yet those are
taken whose worst-off quantizer gains most, until the sum of these gains, a first-order bound for
every quantizer, reaches what is wanted.

The same choice, of what falls in full precision and in every quantizer alike, takes all of them
down together: the final margin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..quantizers.base import Cells
from .floor import Floor
from .rounding import candidate_values

HALVINGS = 30
"""Of the bracket of a multiplier, which settles it far below what one edit changes."""
SWEEPS = 4
"""In each of which both multipliers are settled, the one by the other's last."""
CAP = 4.0
"""Of the multiplier of a shift; a gain is less than half of what its edit changes."""
LOSS_CAP = 8.0
"""Cap of the multiplier of a loss, in units of total gain / total loss: where everything that gains
loses as well, less is edited."""
POOL = 64
"""Elements looked at per edit that may be made; those that gain most."""


@dataclass(frozen=True)
class CandidateEdits:
    """Edits that some elements could make; an element makes one at most."""

    values: Float[Tensor, "options n"]
    gain: Float[Tensor, "options n"]
    """By how much the edit lowers the worst-off quantizer below full precision, or the worst-off
    model, first order; 0 where it is no edit."""
    shift: Float[Tensor, "options n"]
    """What it changes at full precision that is to stay there, first order."""
    loss: Float[Tensor, "options n"]
    """What the quantized models lose by it of what is to be retained, beyond full precision, or all
    models; their mean, first order."""
    weight: Float[Tensor, " n"]
    """In (0, 1], by which a gain is weighed: less where more is to be retained."""


def candidate_edits(
    floor: Floor,
    grids: Sequence[Cells],
    *,
    quantized: Sequence[Float[Tensor, " n"]],
    original: Float[Tensor, " n"],
    slope: Float[Tensor, " n"],
    retained: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
    together: bool = False,
) -> CandidateEdits:
    """The edits that the floor allows next to some values, upwards and downwards.

    Arguments:
        floor: of these elements.
        grids: their cells in every quantizer; one that leaves them alone would gain nothing.
        quantized: the values in every quantizer.
        original: the values, which are not edited.
        slope: of the quantity per unit of each.
        retained: the slope of what is to be retained.
        weight: of each (`CandidateEdits.weight`).
        together: whether full precision is to fall with the quantized models, not to stay.
    """
    sides = []
    for nearest in (floor.up, floor.down):
        value = torch.where(nearest.isnan(), original, nearest)
        sides.append(candidate_values(floor, grids, wanted=value, value=value))
    values = torch.cat(sides)
    edit = values - original
    follows = torch.stack(
        [grid.value(grid.encode(values)) - own for grid, own in zip(grids, quantized, strict=True)]
    )
    if together:
        fall, shift = -torch.cat([edit[None], follows]), torch.zeros_like(edit)
    else:
        fall, shift = edit - follows, edit * slope
    gain = torch.where(edit != 0, (fall * slope).amin(0), 0.0)
    return CandidateEdits(values, gain, shift, fall.mean(0) * retained, weight)


@dataclass(frozen=True)
class MarginEdits:
    """The edits chosen of some `CandidateEdits`."""

    elements: Int[Tensor, " m"]
    """Which of the candidates' elements."""
    values: Float[Tensor, " m"]
    """Their new values."""
    gain: float
    """The sum of their gains: what each quantizer is lowered by at least, first order."""
    shift: float
    """What full precision changes by, first order: as near 0 as one edit allows."""
    loss: float
    """What the quantized models lose of what is to be retained, first order: about 0, or less."""


def choose_edits(some: CandidateEdits, wanted: float, most: int) -> MarginEdits:
    """As few edits as give a gain, or as many as may be, that leave full precision where it is and
    take nothing from what is to be retained.

    1. Take the `POOL` x ``most`` elements of largest gain.
    2. A unit of shift and a unit of loss each cost a multiplier; the worth of an edit is its gain
       less both costs. The edits of most worth are taken until their gains reach ``wanted``.
    3. In `SWEEPS` rounds bisect the multiplier of the loss, then that of the shift, until what it
       prices sums to 0.
    4. Take the edits at the multipliers found.

    Arguments:
        some: what there is to choose from.
        wanted: sum of the gains.
        most: edits at most.
    """
    best = (some.gain.amax(0) * some.weight).topk(min(POOL * most, some.gain.shape[1]))
    pool = best.indices[best.values > 0]
    some = CandidateEdits(*(getattr(some, f.name)[..., pool] for f in fields(CandidateEdits)))
    shift, loss = 0.0, 0.0
    rate = float(some.gain.abs().sum() / some.loss.abs().sum().clamp_min(1e-30))
    for _ in range(SWEEPS):
        loss = bisect(
            lambda m, s=shift: _edits_at(some, s, m, wanted, most).loss, 0.0, LOSS_CAP * rate
        )
        shift = bisect(lambda m, k=loss: _edits_at(some, m, k, wanted, most).shift, -CAP, CAP)
    found = _edits_at(some, shift, loss, wanted, most)
    return replace(found, elements=pool[found.elements])


def bisect(over: Callable[[float], float], low: float, high: float) -> float:
    """The multiplier at which what falls with it comes to 0; ``low`` if it is less there."""
    if over(low) <= 0:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) > 0 else (low, middle)
    return high


def _edits_at(
    some: CandidateEdits, shift: float, loss: float, wanted: float, most: int
) -> MarginEdits:
    """The edits of most worth at the multipliers of shift and loss."""
    worth, row = (some.gain - shift * some.shift - loss * some.loss).max(0)
    gain, moved, lost, value = (
        x.gather(0, row[None])[0] for x in (some.gain, some.shift, some.loss, some.values)
    )
    score = torch.where(gain > 0, worth * some.weight, 0.0)
    best = score.topk(min(most, len(score)))
    order = best.indices[best.values > 0]
    i = order[: int((gain[order].cumsum(0) < wanted).sum()) + 1]
    return MarginEdits(i, value[i], *(float(x[i].sum()) for x in (gain, moved, lost)))
