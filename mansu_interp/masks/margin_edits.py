"""Margin edits: what lowers a quantity in quantized models beyond full precision (ours).

Of an edit d = v - o a quantizer makes Q(v) - Q(o): up to half a cell more or less, and where v and
o are chosen for it, in every quantizer of a set alike. With g the slope of a quantity at full
precision, such an edit takes g . (d - (Q(v) - Q(o))) of the quantity from every quantized model,
measured from full precision: the quantization margin. Upwards and downwards in equal parts, sum of
g . d = 0, the edits leave full precision where it is. What quantized models lose of a quantity that
is to be retained, with the slope k, is the sum of k . (d - (Q(v) - Q(o))): edits that take as much
from it as they give leave it where it is in them. Of all weights that nobody edited yet those are
taken that give most, until every quantizer has what is wanted of it. One edit need not lower all of
them: few would where formats are many, and the finest of them, whose cells are narrow, would hardly
move at all. It is the sums that count, each quantizer's by a multiplier of its own.

The same choice, of what falls in full precision and in every quantizer, takes all of them down
together: the final margin.
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
ROUGHLY = (8192, 10, 3)
"""Elements looked at, halvings and sweeps while the multipliers of the models still move."""
CAP = 4.0
"""Of the multiplier of a shift; a gain is less than half of what its edit changes."""
FEW = 2048
"""Edits among which those that are taken are sought first."""
TURNS = 12
"""Of the multipliers of the models, which are settled around the other two."""
RATE = 0.5
"""Of these turns: e-folds of a multiplier for what its model has too much, in shares of what is
wanted, scaled by what an edit moves the model by."""
LOSS_CAP = 8.0
"""Cap of the multiplier of a loss, in units of total gain / total loss: where everything that gains
loses as well, less is edited."""
POOL = 64
"""Elements looked at per edit that may be made; those that gain most."""


@dataclass(frozen=True)
class CandidateEdits:
    """Edits that some elements could make; an element makes one at most."""

    values: Float[Tensor, "options n"]
    gain: Float[Tensor, "models options n"]
    """By how much the edit lowers each quantized model below full precision, or each model, first
    order; 0 where it is no edit."""
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
        values = candidate_values(floor, grids, wanted=value, value=value)
        edit = values - original
        follows = torch.stack(
            [
                grid.value(grid.encode(values)) - own
                for grid, own in zip(grids, quantized, strict=True)
            ]
        )
        if together:
            fall, shift = -torch.cat([edit[None], follows]), torch.zeros_like(edit)
        else:
            fall, shift = edit - follows, edit * slope
        gain = torch.where(edit != 0, fall * slope, 0.0)
        side = (values, gain, shift, fall.mean(0) * retained)
        sides.append(side if len(grids) == 1 else _of_use(*side))
    values, gain, shift, loss = (torch.cat(x, -2) for x in zip(*sides, strict=True))
    return CandidateEdits(values, gain, shift, loss, weight)


def _of_use(
    values: Float[Tensor, "options n"],
    gain: Float[Tensor, "models options n"],
    shift: Float[Tensor, "options n"],
    loss: Float[Tensor, "options n"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the options of each element those best for one of the models, for all on average and for
    the one that gains least: their number grows with the quantizers, and most are of no use."""
    best = torch.cat([gain, gain.mean(0, keepdim=True), gain.amin(0, keepdim=True)]).argmax(1)
    return (
        values.gather(0, best),
        gain.gather(1, best.expand(len(gain), *best.shape)),
        shift.gather(0, best),
        loss.gather(0, best),
    )


@dataclass(frozen=True)
class MarginEdits:
    """The edits chosen of some `CandidateEdits`."""

    elements: Int[Tensor, " m"]
    """Which of the candidates' elements."""
    values: Float[Tensor, " m"]
    """Their new values."""
    gain: Float[Tensor, " models"]
    """The sums of their gains: what each model is lowered by, first order."""
    shift: float
    """What full precision changes by, first order: as near 0 as one edit allows."""
    loss: float
    """What the quantized models lose of what is to be retained, first order: about 0, or less."""


def choose_edits(some: CandidateEdits, wanted: Float[Tensor, " models"], most: int) -> MarginEdits:
    """As few edits as give every model what is wanted of it, or as many as may be, that leave full
    precision where it is and take nothing from what is to be retained.

    1. A unit of gain counts by the multiplier of its model; they sum to 1.
    2. Take the `POOL` x ``most`` elements of largest gain.
    3. A unit of shift and a unit of loss each cost a multiplier; the worth of an edit is its gain
       less both costs. The edits of most worth are taken until every model's gains reach what is
       wanted. In `SWEEPS` rounds bisect the multiplier of the loss, then that of the shift, until
       what it prices sums to 0.
    4. In `TURNS` turns, in which the other two are settled `ROUGHLY`, lower the multipliers of the
       models that got too much. Go by the turn that lacks least; among those that lack nothing, by
       that of fewest edits.

    Arguments:
        some: what there is to choose from.
        wanted: of each model, above 0 of one at least.
        most: edits at most.
    """
    whole = float(wanted.max())
    wanted = wanted.clamp_min(0.0)
    # An edit moves a model little whose cells are narrow; what that lacks counts for more.
    size = some.gain.abs().mean((1, 2)).clamp_min(1e-30)
    unit = whole * size / size.max()
    # Those of which nothing is wanted are not to rise: they, too, have a multiplier.
    models = wanted + (wanted < whole) * 0.1 * whole
    models = best = models / models.sum()
    least: tuple[float, int] | None = None
    for _ in range(TURNS if len(wanted) > 1 else 0):
        found = _choose(some, models, wanted, most, *ROUGHLY)
        rank = float((wanted - found.gain).max().clamp_min(0)), len(found.elements)
        if least is None or rank < least:
            best, least = models, rank
        models = models * (RATE * (wanted - found.gain) / unit).clamp(-1.0, 1.0).exp()
        models = models / models.sum()
    return _choose(some, best, wanted, most, POOL * most, HALVINGS, SWEEPS)


def _choose(
    some: CandidateEdits,
    models: Float[Tensor, " models"],
    wanted: Float[Tensor, " models"],
    most: int,
    looked_at: int,
    halvings: int,
    sweeps: int,
) -> MarginEdits:
    """`choose_edits` at given multipliers of the models."""
    counted = (some.gain * models[:, None, None]).sum(0)
    best = (counted.amax(0) * some.weight).topk(min(looked_at, counted.shape[1]))
    pool = best.indices[best.values > 0]
    some = CandidateEdits(*(getattr(some, f.name)[..., pool] for f in fields(CandidateEdits)))
    counted = counted[:, pool]
    shift, loss = 0.0, 0.0

    def at(shift: float, loss: float) -> MarginEdits:
        return _edits_at(some, counted, shift, loss, wanted, most)

    rate = float(counted.abs().sum() / some.loss.abs().sum().clamp_min(1e-30))
    for _ in range(sweeps):
        loss = bisect(lambda m, s=shift: at(s, m).loss, 0.0, LOSS_CAP * rate, halvings)
        shift = bisect(lambda m, k=loss: at(m, k).shift, -CAP, CAP, halvings)
    found = at(shift, loss)
    return replace(found, elements=pool[found.elements])


def bisect(over: Callable[[float], float], low: float, high: float, halvings: int) -> float:
    """The multiplier at which what falls with it comes to 0; ``low`` if it is less there."""
    if over(low) <= 0:
        return low
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) > 0 else (low, middle)
    return high


def _edits_at(
    some: CandidateEdits,
    counted: Float[Tensor, "options n"],
    shift: float,
    loss: float,
    wanted: Float[Tensor, " models"],
    most: int,
) -> MarginEdits:
    """The edits of most worth at the multipliers of shift and loss."""
    worth, row = (counted - shift * some.shift - loss * some.loss).max(0)
    gain = counted.gather(0, row[None])[0]
    score = torch.where(gain > 0, worth * some.weight, 0.0)
    limit = min(most, len(score))
    for take in (min(FEW, limit), limit):  # mostly few are enough, and to sort all takes long
        best = score.topk(take)
        i = best.indices[best.values > 0]
        lacks = (wanted[:, None] - some.gain[:, row[i], i].cumsum(1)).amax(0).clamp_min(0.0)
        if (lacks == 0).any():
            break
    if len(i):
        i = i[: int(lacks.argmin()) + 1]  # what is taken beyond the least lack is in vain
    side = row[i]
    moved, lost, value = (x[side, i] for x in (some.shift, some.loss, some.values))
    gained = some.gain[:, side, i].sum(1)
    return MarginEdits(i, value, gained, float(moved.sum()), float(lost.sum()))
