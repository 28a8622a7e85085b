"""Joint rounding: values with which all of an edit is left in every quantized model (ours).

A quantizer makes Q(v) - Q(o) of an edit d = v - o. It may shorten or lengthen a single edit by half
a cell; what counts is the sum: kept = <Q(v) - Q(o), d> / <d, d> over all edits, 1 if the quantized
model moves as far as the edited one. Answers lie many nats above their rivals before unlearning and
level with them after, so that one percent of the edit is a tenth of a nat of the knowledge. Between
the levels that the quantizers of the set have around a wanted value the choice is free; it is made
for all edits together, by Lagrange multipliers: the least squared distance from what was wanted,
subject to kept = 1 for every quantizer.

The same freedom serves per-quantizer offsets (`Mansu.offset_rate`): the weights that nobody
edits are rounded, too, each quantizer's otherwise, and the knowledge that this restores can only be
removed in that quantizer's model. Where a quantized model's own value should lie an offset away
from the shared one, its level there counts, and kept = 1 is meant of the value plus its offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..quantizers.base import Cells
from .floor import ROUNDING, Floor

ROUNDS = 20
"""Steps of dual ascent; the best of them counts."""
RATE = 0.5
"""Change of a multiplier per unit of kept - 1; both are without dimension."""


@dataclass(frozen=True)
class Candidates:
    """Values that some elements of one weight may get, and what the set makes of each."""

    values: Float[Tensor, "options n"]
    """The first row is `Floor.land`'s."""
    distance: Float[Tensor, "options n"]
    """Squared, from what was wanted; with offsets also that of the quantized models' values."""
    surplus: Float[Tensor, "options quantizers n"]
    """(Q(v) - Q(o) - d) d: what each quantizer adds to the edit, along it; less its offset."""
    power: Float[Tensor, "options n"]
    """d squared."""

    def repeated(self, options: int) -> Candidates:
        """As many options, the first one as often as is lacking."""
        lack = (0,) * (options - len(self.values))
        return Candidates(
            *(torch.cat([x, x[list(lack)]]) if lack else x for x in vars(self).values())
        )


def candidates(
    floor: Floor,
    grids: Sequence[Cells | None],
    *,
    quantized: Sequence[Float[Tensor, " n"]],
    original: Float[Tensor, " n"],
    wanted: Float[Tensor, " n"],
    value: Float[Tensor, " n"],
    offsets: Sequence[Float[Tensor, " n"]] = (),
) -> Candidates:
    """The nearest level of every quantizer, where the floor admits it; with offsets more values
    around it (`_values_around`).

    Arguments:
        floor: of these elements; all of them move (`Floor.land`).
        grids: their cells in every quantizer, None where one leaves the weight alone.
        quantized: the original's value in every quantizer.
        original: the values before.
        wanted: the values that training gave them.
        value: `Floor.land` of these; stands in for what is not admitted.
        offsets: by how much more each quantized model's own values should move; default: nothing.
    """
    values = candidate_values(floor, grids, wanted=wanted, value=value, around=bool(offsets))
    edit = values - original
    distance, surplus = (values - wanted).square(), []
    for k, (grid, own) in enumerate(zip(grids, quantized, strict=True)):
        if grid is None:
            surplus.append(torch.zeros_like(edit))
            continue
        level = grid.value(grid.encode(values))
        if offsets:
            level = level - offsets[k]
            distance = distance + (level - wanted).square()
        surplus.append((level - own - edit) * edit)
    return Candidates(values, distance, torch.stack(surplus, 1), edit.square())


def candidate_values(
    floor: Floor,
    grids: Sequence[Cells | None],
    *,
    wanted: Float[Tensor, " n"],
    value: Float[Tensor, " n"],
    around: bool = True,
) -> Float[Tensor, "options n"]:
    """Values as stored around the wanted ones, where the floor admits them; first, and in place of
    what it does not admit, ``value``.

    Arguments:
        floor: of these elements.
        grids: their cells in every quantizer, None where one leaves the weight alone.
        wanted: the values that training gave them.
        value: a value that the floor admits.
        around: more than the nearest level of every quantizer: see `_values_around`.
    """
    some = [p for grid in grids if grid for p in _values_around(grid, wanted, around)]
    stored = torch.stack(some).to(floor.dtype).float()
    return torch.cat([value[None], torch.where(floor.admits(stored, wanted), stored, value)])


def _values_around(
    grid: Cells, wanted: Float[Tensor, " n"], more: bool
) -> list[Float[Tensor, " n"]]:
    """The nearest level; with ``more``, the next on the other side, and both sides of both
    boundaries of the cell, where one quantizer's code can change with no other's."""
    code = grid.encode(wanted)
    level = grid.value(code)
    if not more:
        return [level]
    found = [level, grid.value(torch.where(level > wanted, code - 1, code + 1))]
    for edge in (grid.edge(code - 1), grid.edge(code)):
        aside = ROUNDING * edge.abs() + grid.width / 64
        found += [edge - aside, edge + aside]
    return found


def joint_rounding(some: Sequence[Candidates]) -> list[Float[Tensor, " _n"]]:
    """Values for all elements together, such that as nearly all of the edit is left in every
    quantized model as their options allow; the same options give the same values.

    1. Start with multipliers of 0, one per quantizer.
    2. Each element takes its cheapest option: squared distance plus multipliers times surplus.
    3. kept - 1 of each quantizer, times `RATE`, is added to its multiplier.
    4. Of `ROUNDS` repetitions the one with the least max |kept - 1| counts.
    """
    # Where one of the quantizers leaves a weight alone, there are fewer options.
    most = max(len(x.values) for x in some)
    some = [x.repeated(most) for x in some]
    distance = torch.cat([x.distance for x in some], 1)
    surplus = torch.cat([x.surplus for x in some], 2)
    power = torch.cat([x.power for x in some], 1)
    multipliers = surplus.new_zeros(surplus.shape[1])
    best, least = distance.argmin(0), torch.inf
    for _ in range(ROUNDS):
        cost = distance + einsum(multipliers, surplus, "quantizer, option quantizer n -> option n")
        chosen = cost.argmin(0)
        taken = surplus.gather(0, chosen[None, None].expand(1, surplus.shape[1], -1))[0].sum(1)
        beyond = taken / power.gather(0, chosen[None]).sum()  # kept - 1, per quantizer
        if (worst := float(beyond.abs().max())) < least:
            best, least = chosen, worst
        multipliers = multipliers + RATE * beyond
    parts = best.split([x.values.shape[1] for x in some])
    return [x.values.gather(0, k[None])[0] for x, k in zip(some, parts, strict=True)]
