"""The latent weights of MANSU, and the edits that they become in a full-precision model and in what
each quantizer makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...losses.fisher import projection
from ...losses.gradients import Weights
from ...masks.floor import Floor, floor
from ...masks.mask import Mask
from ...masks.rounding import candidates, joint_rounding
from ...models.language_model import LanguageModel
from ...quantizers.base import Cells
from ..checkpoint import Checkpoint
from ..history import History
from .students import Students, put

BETA1, BETA2, EPS = 0.9, 0.98, 1e-8
BETA_OWN = 0.8
"""Momentum of a quantized model's own offsets, which have a gradient on its turns alone."""


@dataclass
class LatentGroup:
    """The editable elements of the weights that the same quantizers touch, weight after weight: a
    few long tensors take far fewer operations than many short ones."""

    indices: dict[str, Int[Tensor, " m"]]
    """Flat positions in each weight."""
    original: Float[Tensor, " n"]
    """Their values before the edit."""
    quantized: list[Float[Tensor, " n"]]
    """What each exact quantizer makes of those."""
    fitted: list[Float[Tensor, " n"]]
    """What each fitted quantizer makes of those, if nothing is edited."""
    grids: list[Cells | None]
    """Each exact quantizer's cells; None where it leaves these weights as they are."""
    floor: Floor
    """The values that an edit may take."""
    scale: Float[Tensor, " n"]
    """Absmax of the block, the unit of position and offsets."""
    position: Float[Tensor, " n"]
    """The latent weights."""
    projection: Float[Tensor, " n"]
    """Factor of every step, lambda / (lambda + F)."""
    mean: Float[Tensor, " n"]
    """Momentum of the position."""
    offsets: list[Float[Tensor, " n"]]
    """Each exact quantized model's own offset from the position; empty where none has any."""
    offset_momenta: list[Float[Tensor, " n"]]
    """Momentum of the offsets."""

    def split(self, values: Float[Tensor, " n"]) -> tuple[Tensor, ...]:
        """Some values of all elements, by weight."""
        return values.split([len(i) for i in self.indices.values()])


def gather(weights: Mapping[str, Tensor], indices: dict[str, Tensor]) -> Float[Tensor, " n"]:
    """The elements at some positions, weight after weight, in float32."""
    return torch.cat([weights[name].flatten()[index].float() for name, index in indices.items()])


class LatentWeights:
    """The edits of a mask, applied alike to a full-precision model and its quantized ones.

    Arguments:
        students: full precision and what each quantizer makes of it; changed in place.
        mask: the editable weights.
        fisher: diagonal Fisher information of what must stay, of the mask's elements; None: no
            projection.
        strength: of the projection.
        offset_rate: see `Mansu.offset_rate`.
    """

    def __init__(
        self,
        students: Students,
        mask: Mask,
        *,
        fisher: Weights | None = None,
        strength: float = 0.0,
        offset_rate: float = 0.0,
    ) -> None:
        self.students, model, survive = students, students.full, students.quantizers
        self.offset_rate = offset_rate * len(self.models)
        exact = len(survive) if len(self.models) > 1 else 0
        offsets = exact if offset_rate and exact > 1 else 0
        self.power = 0.0
        """Running mean of the squared gradient, over the whole mask."""
        self.limit = mask.limit
        """Edits at most."""
        indices = {n: i.to(model.device) for n, i in mask.indices.items()}
        typical = float(torch.cat([fisher[n] for n in indices]).median()) if fisher else 0.0
        alike: dict[tuple[bool, ...], dict[str, Tensor]] = {}
        for name, index in indices.items():
            touched = (q.touches(model.weights[name]) for q in survive)
            alike.setdefault((name in model.linear_names, *touched), {})[name] = index
        self.groups: list[LatentGroup] = []
        for (linear, *touched), those in alike.items():
            weights = {n: model.weights[n] for n in those}
            where = Floor.join(
                [floor(weights[n], survive, model.saved_dtype, index=i) for n, i in those.items()]
            )
            original, scale = gather(weights, those), where.span
            own = iter(where.own)  # of the quantizers that touch these weights, in their order
            grids = [next(own) if linear and touches else None for touches in touched]
            self.groups.append(
                LatentGroup(
                    indices=those,
                    original=original,
                    quantized=[],
                    fitted=[],
                    grids=grids,
                    floor=where,
                    scale=scale,
                    position=original / scale.clamp_min(1e-30),
                    projection=projection(torch.cat([fisher[n] for n in those]), strength, typical)
                    if fisher
                    else torch.ones_like(original),
                    mean=torch.zeros_like(original),
                    offsets=[torch.zeros_like(original) for _ in range(offsets)],
                    offset_momenta=[torch.zeros_like(original) for _ in range(offsets)],
                )
            )

        for side in range(1, len(students)):
            made = students.unedited(side).weights
            for x in self.groups:
                values = x.quantized if side <= len(survive) else x.fitted
                values.append(gather(made, x.indices))

    @property
    def model(self) -> LanguageModel:
        """The edited model, in full precision."""
        return self.students.full

    @property
    def models(self) -> Sequence[LanguageModel]:
        """The edited model and what each quantizer makes of it (see `Students`)."""
        return self.students

    @property
    def indices(self) -> dict[str, Tensor]:
        """The editable elements, by weight."""
        return {name: index for x in self.groups for name, index in x.indices.items()}

    @contextmanager
    def unedited(self, side: int) -> Iterator[LanguageModel]:
        """One of the `models` as it was before all edits, while the context lasts."""
        model = self.students.unedited(side) if side else self.model
        edited = [gather(model.weights, x.indices) for x in self.groups]
        for x in self.groups:
            put(model, x.indices, [x.original, *x.quantized, *x.fitted][side])
        try:
            yield model
        finally:
            for x, values in zip(self.groups, edited, strict=True):
                put(model, x.indices, values)

    def _state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        found: dict[str, Tensor] = {}
        for k, x in enumerate(self.groups):
            found |= {f"{k}|position": x.position, f"{k}|mean": x.mean}
            for q, (own, mean) in enumerate(zip(x.offsets, x.offset_momenta, strict=True)):
                found |= {f"{k}|offsets {q}": own, f"{k}|offset_momenta {q}": mean}
        return found

    @torch.no_grad()
    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a killed loop, and write its weights."""
        for name, tensor in self._state().items():
            checkpoint.restore(name, tensor)
        self.power = checkpoint.power
        self.write()

    def save(self, checkpoint: Checkpoint, history: History, more: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, with other tensors beside these."""
        checkpoint.save(history, self._state() | dict(more), self.power)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float, t: int, side: int = 0) -> None:
        """One projected step on the latent positions, by the gradients at `indices`; ``t`` counts
        from 1, and ``side`` is the model that they are of (0: full precision), in turns.

        Momentum is divided by one running RMS over the whole mask, not by each weight's own as in
        Adam: a weight whose gradient is mostly noise then never reaches another cell.
        """
        by_name = dict(zip(self.indices, gradients, strict=True))
        scaled = [torch.cat([by_name[n] for n in x.indices]) * x.scale for x in self.groups]
        squares = [
            s.sum() for x, g in zip(self.groups, scaled, strict=True) for s in x.split(g * g)
        ]
        power = sum(torch.stack(squares).tolist()) / sum(len(g) for g in scaled)
        self.power = BETA2 * self.power + (1 - BETA2) * power
        rms = (self.power / (1 - BETA2**t)) ** 0.5 + EPS
        for group, g in zip(self.groups, scaled, strict=True):
            group.mean.lerp_(g, 1 - BETA1)
            direction = group.mean / (1 - BETA1**t) / rms
            group.position.sub_(lr * direction * group.projection).clamp_(-1, 1)
            if 0 < side <= len(group.offsets):
                mean, turn = group.offset_momenta[side - 1], (t - 1) // len(self.models) + 1
                own = mean.lerp_(g, 1 - BETA_OWN) / (1 - BETA_OWN**turn) / rms
                step = lr * self.offset_rate * own * group.projection
                group.offsets[side - 1].sub_(step).clamp_(-1, 1)

    def _bar(self, travelled: Float[Tensor, " n"], least: float) -> float:
        """The distance beyond which a weight is edited, so that the farthest fill the budget;
        ``least`` where all of them fit."""
        if len(travelled) <= self.limit:
            return least
        return float(travelled.kthvalue(len(travelled) - self.limit).values)

    @torch.no_grad()
    def write(self) -> int:
        """Round the latent weights to what the floor allows, and put them into all models; returns
        how many weights are edited.

        See `Floor.land` for one quantizer, and `joint_rounding` for a set of them.
        """
        plans = []
        for x in self.groups:
            wanted = x.position * x.scale
            out = x.floor.leaves(wanted).nonzero()[:, 0]  # a weight in its cell lands nowhere
            value, moved = x.original.clone(), torch.zeros_like(wanted, dtype=torch.bool)
            value[out], moved[out] = x.floor[out].land(wanted[out])
            distance = (x.position - x.original / x.scale.clamp_min(1e-30)).abs()
            plans.append((moved, value, distance))
        # Of all that crossed a boundary, the farthest travelled fill the budget.
        bar = self._bar(torch.cat([d[m] for m, _, d in plans]), 0.0)
        made = [moved & (distance > bar) for moved, _, distance in plans]
        values = [value for _, value, _ in plans]
        if len(self.students.quantizers) > 1:
            values = self._rounded_jointly(values, made)
        for k, (value, m) in enumerate(zip(values, made, strict=True)):
            self.write_edits(k, value, m)
        return sum(int(m.sum()) for m in made)

    def write_edits(self, k: int, value: Float[Tensor, " n"], made: Bool[Tensor, " n"]) -> None:
        """Put the values of some edits of a group, and what each exact quantizer makes of them,
        into the models; all its other elements are put back to the original."""
        x, some = self.groups[k], made.nonzero()[:, 0]
        edits = value[some]
        self.students.write(0, k, x.indices, x.original.index_put((some,), edits))
        for side, (own, grid) in enumerate(zip(x.quantized, x.grids, strict=True), 1):
            level = edits
            if grid:
                cells = grid[some]
                level = cells.value(cells.encode(edits))
            self.students.write(side, k, x.indices, own.index_put((some,), level))

    def _rounded_jointly(self, values: list[Tensor], made: list[Tensor]) -> list[Tensor]:
        """The values, those of the edits rounded jointly for the whole set of quantizers."""
        where, some = [], []
        for x, value, m in zip(self.groups, values, made, strict=True):
            if any(x.grids) and m.any():
                i = m.nonzero()[:, 0]
                grids = [g[i] if g else None for g in x.grids]
                own = [q[i] for q in x.quantized]
                wanted = (x.position * x.scale)[i]
                offsets = [(a * x.scale)[i] for a in x.offsets]
                some.append(
                    candidates(
                        x.floor[i],
                        grids,
                        quantized=own,
                        original=x.original[i],
                        wanted=wanted,
                        value=value[i],
                        offsets=offsets,
                    )
                )
                where.append((value, i))
        for (value, i), rounded in zip(where, joint_rounding(some) if some else [], strict=True):
            value[i] = rounded
        return values


class LatentWeightsWithoutFloor(LatentWeights):
    """The same steps without the floor: an ablation that ignores the quantizers."""

    @property
    def models(self) -> list[LanguageModel]:
        """The edited model alone."""
        return [self.model]

    @torch.no_grad()
    def write(self) -> int:
        """Put the positions, rounded to the checkpoint's dtype, into the full-precision model."""
        values = [(x.position * x.scale).to(self.model.saved_dtype).float() for x in self.groups]
        moved = [
            (x.position * x.scale - x.original).abs() / x.scale.clamp_min(1e-30)
            for x in self.groups
        ]
        bar, edited = self._bar(torch.cat(moved), -1.0), 0
        for x, value, distance in zip(self.groups, values, moved, strict=True):
            made = (distance > bar) & (value != x.original)
            put(self.model, x.indices, torch.where(made, value, x.original))
            edited += int(made.sum())
        return edited
