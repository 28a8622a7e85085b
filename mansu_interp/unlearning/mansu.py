"""MANSU: sparse, discrete edits inside a circuit that survive quantization by construction.

Every editable weight has a latent position in units of its block's absmax. While the position lies
in the weight's own cell of any quantizer of the set ``survive``, the weight keeps its exact
original value; once it has left them all, it lands where `floor` allows. So a weight moves at least
one whole cell or not at all, and the quantized model receives the same edit. Gradients pass the
snap straight through (ours; the idea of a per-parameter magnitude floor is arXiv 2605.15138's).
Steps take turns, the full-precision model first and then each quantized one, so that all forget and
all retain; each is compared with the original at its own precision. Of several quantized models
each gathers, on its turns, how it would like its own values to differ; `landing` weighs these
wishes where there is a choice (ours). The momentum direction is multiplied by the null-space
projection lambda / (lambda + F).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import UnlearnConfig
from ..distributed import sum_number
from ..floor import Floor, floor, quantizer_set
from ..landing import balanced, options
from ..masks import Mask
from ..models import LanguageModel
from ..nullspace import Weights, fisher_diagonal, gradient, projection
from ..objectives import CounterfactualTargets, counterfactual_loss, nll
from ..pairs import Pair, PairSet, Task
from ..quantizers import Cells, Quantizer, quantize
from ..scoring import known
from .common import OnStep, Sampler, Unlearned, arithmetic, reached, retain_loss, text_kl
from .harden import Attacker
from .readout import Reader
from .state import History, Place

BETA1, BETA2, EPS = 0.9, 0.98, 1e-8
BETA_OWN = 0.8
"""Momentum of a quantized model's own wishes, which sees every few steps alone."""
FISHER_PAIRS = 48


@dataclass
class _Latent:
    """The editable elements of the weights that the same quantizers touch, weight after weight: a
    few long tensors take far fewer operations than many short ones."""

    indices: dict[str, Int[Tensor, " m"]]
    """Flat positions in each weight."""
    original: Float[Tensor, " n"]
    quantized: list[Float[Tensor, " n"]]
    grids: list[Cells | None]
    floor: Floor
    scale: Float[Tensor, " n"]
    position: Float[Tensor, " n"]
    projection: Float[Tensor, " n"]
    mean: Float[Tensor, " n"]
    apart: list[Float[Tensor, " n"]]
    """How far from the shared position each quantized model would like its own values to be; empty
    where none has wishes of its own."""
    apart_mean: list[Float[Tensor, " n"]]

    def split(self, values: Float[Tensor, " n"]) -> tuple[Tensor, ...]:
        """Some values of all elements, by weight."""
        return values.split([len(i) for i in self.indices.values()])

    def put(self, values: Float[Tensor, " n"], model: LanguageModel) -> None:
        """Write values into a model's weights."""
        for (name, index), part in zip(self.indices.items(), self.split(values), strict=True):
            model.weights[name].view(-1)[index] = part


def _taken(weights: Mapping[str, Tensor], indices: dict[str, Tensor]) -> Float[Tensor, " n"]:
    """The elements at some positions, weight after weight."""
    return torch.cat([weights[name].flatten()[index] for name, index in indices.items()])


class Snapper:
    """The edits of a mask, applied alike to a full-precision model and its quantized twins."""

    def __init__(
        self,
        model: LanguageModel,
        quantized: list[LanguageModel],
        mask: Mask,
        survive: list[Quantizer],
        fisher: Weights | None,
        strength: float,
        steer: float = 0.0,
    ) -> None:
        self.model, self.quantized = model, quantized
        self.steer = steer * len(self.models)
        apart = len(self.models) - 1 if steer and len(self.models) > 2 else 0
        self.power = 0.0
        self.limit = mask.limit
        indices = {n: i.to(model.device) for n, i in mask.indices.items()}
        typical = float(_taken(fisher, indices).median()) if fisher else 0.0
        alike: dict[tuple[bool, ...], dict[str, Tensor]] = {}
        for name, index in indices.items():
            touched = (q.touches(model.weights[name]) for q in survive)
            alike.setdefault((name in model.linear_names, *touched), {})[name] = index
        self.latents: list[_Latent] = []
        for (linear, *touched), those in alike.items():
            weights = {n: model.weights[n] for n in those}
            where = Floor.join(
                [floor(weights[n], survive, model.saved_dtype, i) for n, i in those.items()]
            )
            original, scale = _taken(weights, those), where.span
            self.latents.append(
                _Latent(
                    those,
                    original,
                    [_taken(q.weights, those) for q in quantized],
                    [
                        Cells.join([q.cells(weights[n])[i] for n, i in those.items()])
                        if linear and touches
                        else None
                        for q, touches in zip(survive, touched, strict=True)
                    ],
                    where,
                    scale,
                    original / scale.clamp_min(1e-30),
                    projection(_taken(fisher, those), strength, typical)
                    if fisher
                    else torch.ones_like(original),
                    torch.zeros_like(original),
                    [torch.zeros_like(original) for _ in range(apart)],
                    [torch.zeros_like(original) for _ in range(apart)],
                )
            )

    @property
    def models(self) -> list[LanguageModel]:
        """The edited model and what each quantizer makes of it."""
        return [self.model, *self.quantized]

    @property
    def names(self) -> list[str]:
        """Weights that carry an edit."""
        return [name for x in self.latents for name in x.indices]

    def _state(self) -> dict[str, Tensor]:
        """What a loop that goes on needs."""
        found: dict[str, Tensor] = {}
        for k, x in enumerate(self.latents):
            found |= {f"{k}|position": x.position, f"{k}|mean": x.mean}
            for q, (own, mean) in enumerate(zip(x.apart, x.apart_mean, strict=True)):
                found |= {f"{k}|apart {q}": own, f"{k}|apart_mean {q}": mean}
        return found

    @torch.no_grad()
    def resume(self, place: Place) -> None:
        """Go back to where a killed loop was, weights included."""
        for name, tensor in self._state().items():
            place.fill(name, tensor)
        self.power = place.power
        self.write()

    def keep(self, place: Place, history: History) -> None:
        """Write down where the loop is."""
        place.save(history, self._state(), self.power)

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float, t: int, side: int = 0) -> None:
        """One projected step on the latent positions; ``t`` counts from 1, and ``side`` is the
        model that the gradients are of (0: full precision), in turns.

        Momentum is divided by one running RMS over the whole mask, not by each weight's own as in
        Adam: a weight whose gradient is mostly noise then never reaches another cell.
        """
        by_name = dict(zip(self.names, gradients, strict=True))
        scaled = [_taken(by_name, x.indices) * x.scale for x in self.latents]
        squares = [
            s.sum() for x, g in zip(self.latents, scaled, strict=True) for s in x.split(g * g)
        ]
        power = sum(torch.stack(squares).tolist()) / sum(len(g) for g in scaled)
        self.power = BETA2 * self.power + (1 - BETA2) * power
        rms = (self.power / (1 - BETA2**t)) ** 0.5 + EPS
        for latent, g in zip(self.latents, scaled, strict=True):
            latent.mean.lerp_(g, 1 - BETA1)
            direction = latent.mean / (1 - BETA1**t) / rms
            latent.position.sub_(lr * direction * latent.projection).clamp_(-1, 1)
            if side and latent.apart:
                mean, turn = latent.apart_mean[side - 1], (t - 1) // len(self.models) + 1
                own = mean.lerp_(g, 1 - BETA_OWN) / (1 - BETA_OWN**turn) / rms
                step = lr * self.steer * own * latent.projection
                latent.apart[side - 1].sub_(step).clamp_(-1, 1)

    def _bar(self, travelled: Float[Tensor, " n"], least: float) -> float:
        """The distance beyond which a weight is edited, so that the farthest fill the budget;
        ``least`` where all of them fit."""
        if len(travelled) <= self.limit:
            return least
        return float(travelled.kthvalue(len(travelled) - self.limit).values)

    @torch.no_grad()
    def write(self) -> int:
        """Put the snapped weights into all models; returns how many weights are edited.

        See `Floor.land` for where a weight ends, and `landing` for a set of quantizers.
        """
        plans = []
        for x in self.latents:
            value, moved = x.floor.land(x.position * x.scale)
            distance = (x.position - x.original / x.scale.clamp_min(1e-30)).abs()
            plans.append((moved, value, distance))
        # Of all that crossed a boundary, the farthest travelled fill the budget.
        bar = self._bar(torch.cat([d[m] for m, _, d in plans]), 0.0)
        made = [moved & (distance > bar) for moved, _, distance in plans]
        values = [value for _, value, _ in plans]
        if len(self.quantized) > 1:
            values = self._balanced(values, made)
        for x, value, m in zip(self.latents, values, made, strict=True):
            x.put(torch.where(m, value, x.original), self.model)
            for twin, own, grid in zip(self.quantized, x.quantized, x.grids, strict=True):
                level = grid.value(grid.encode(value)) if grid else value
                x.put(torch.where(m, level, own), twin)
        return sum(int(m.sum()) for m in made)

    def _balanced(self, values: list[Tensor], made: list[Tensor]) -> list[Tensor]:
        """The values with those of the edits that are made balanced over the set."""
        where, some = [], []
        for x, value, m in zip(self.latents, values, made, strict=True):
            if any(x.grids) and m.any():
                i = m.nonzero()[:, 0]
                grids = [g[i] if g else None for g in x.grids]
                own = [q[i] for q in x.quantized]
                wanted = (x.position * x.scale)[i]
                apart = [(a * x.scale)[i] for a in x.apart]
                some.append(options(x.floor[i], grids, own, x.original[i], wanted, value[i], apart))
                where.append((value, i))
        for (value, i), landed in zip(where, balanced(some) if some else [], strict=True):
            value[i] = landed
        return values


class Continuous(Snapper):
    """The same steps without the floor: an ablation. It knows of no quantizer."""

    @property
    def models(self) -> list[LanguageModel]:
        """The edited model alone."""
        return [self.model]

    @torch.no_grad()
    def write(self) -> int:
        """Put the positions, rounded to the checkpoint's dtype, into the full-precision model."""
        values = [(x.position * x.scale).to(self.model.saved_dtype).float() for x in self.latents]
        moved = [
            (x.position * x.scale - x.original).abs() / x.scale.clamp_min(1e-30)
            for x in self.latents
        ]
        bar, edited = self._bar(torch.cat(moved), -1.0), 0
        for x, value, distance in zip(self.latents, values, moved, strict=True):
            made = (distance > bar) & (value != x.original)
            x.put(torch.where(made, value, x.original), self.model)
            edited += int(made.sum())
        return edited


def learning_rate(peak: float, done: int, steps: int) -> float:
    """Warm-up over 5 steps, flat until 60 %, then linear to a twentieth."""
    if done < 5:
        return peak * (done + 1) / 5
    tail = steps * 0.4
    return peak * min(1.0, (steps - done) / tail * 0.95 + 0.05)


def mansu(
    model: LanguageModel,
    task: Task,
    mask: Mask,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
    floored: bool = True,
    place: Place | None = None,
) -> Unlearned:
    """Unlearn inside a mask (see the module's text).

    Without ``floored`` (an ablation) positions are written as they are and nothing is known of the
    quantizer: the same mask, budget, losses and step rule, on the full-precision model alone.

    With a ``place`` that a killed loop kept, this one goes on there.

    The result's history holds, per step, ``forget`` and ``retain`` losses (nats) and ``edited``.
    """
    survive = quantizer_set(config.survive)
    teachers = [model, *(quantize(model, q) for q in survive)]
    students = [model.copy(), *(quantize(model, q) for q in survive)]
    # A guard that the model does not know holds nothing: keep those whose answer it ranks first.
    guard = known(model, task.guard) if task.guard else None
    task = replace(task, guard=guard or task.guard)
    fisher = None
    if config.projection:
        keep = PairSet("retain", tuple(p for pairs in task.kept for p in pairs))
        fisher = fisher_diagonal(
            model, list(mask.indices), keep.sample(FISHER_PAIRS, config.seed), seed=config.seed
        )
    targets = [CounterfactualTargets(t, task.forget, config.seed) for t in teachers]
    kind = Snapper if floored else Continuous
    snapper = kind(
        students[0], students[1:], mask, survive, fisher, config.projection, config.steer
    )
    sampler = Sampler(task, config)
    attacker = Attacker(task, config) if config.attack else None
    reader = Reader(task, config) if config.probe_weight else None
    place = place or Place()
    history = place.load()
    for done in range(len(history)):  # the draws of the steps that are done
        sampler.batch(done, len(students))
        if attacker:
            attacker.draw()
        if reader:
            reader.draw()
    if history:
        snapper.resume(place)
    for done in range(len(history), config.steps):
        side = done % len(students) if floored else 0
        student, teacher = students[side], teachers[side]
        apart = config.reserve / 2 if len(survive) > 1 else 0.0
        margin = config.margin + (apart if side else -apart)
        losses = {"forget": 0.0, "retain": 0.0}

        def weighed(kind: str, weight: float, loss: Callable[[], Tensor]) -> Tensor:
            with arithmetic(student, config):  # noqa: B023
                value = loss() * weight
            losses[kind] += value.item()  # noqa: B023
            return value * (config.retain_weight if kind == "retain" else 1.0)

        def down(pairs: list[Pair]) -> Tensor:
            if config.forget_loss == "ga":
                return -nll(student, pairs).mean()  # noqa: B023
            target = targets[side]  # noqa: B023
            return counterfactual_loss(student, pairs, target, config.push, margin)  # noqa: B023

        forget, keep, text = sampler.batch(done, len(students))
        parts = [
            partial(weighed, "forget", len(p) / sum(map(len, forget)), partial(down, p))
            for p in forget
        ]
        parts += [
            partial(
                weighed,
                "retain",
                len(p) / sum(map(len, keep)),
                partial(retain_loss, student, teacher, p, config.hold),
            )
            for p in keep
        ]
        if text is not None:
            parts.append(partial(weighed, "retain", 1.0, partial(text_kl, student, teacher, text)))
        gradients = gradient(student, snapper.names, parts)
        losses = {kind: sum_number(value) for kind, value in losses.items()}
        if attacker:
            extra, losses["attacked"] = attacker.gradient(
                student, snapper.names, targets[side], margin
            )
            for g, e in zip(gradients, extra, strict=True):
                g.add_(e, alpha=config.attack_weight)
        if reader:
            extra, losses["read"] = reader.gradient(student, snapper.names)
            for g, e in zip(gradients, extra, strict=True):
                g.add_(e, alpha=config.probe_weight)
        snapper.step(gradients, learning_rate(config.lr, done, config.steps), done + 1, side)
        losses["edited"] = snapper.write()
        stop = reached(lambda: snapper.models, task, config, done, losses)
        history.append(losses)
        if on_step:
            on_step(done + 1, config.steps, losses)
        if stop:
            break
        if place.due():
            snapper.keep(place, history)
    return Unlearned(students[0], history, len(history))
