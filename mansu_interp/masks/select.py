"""From a circuit to a mask: which single parameters may be edited (ours).

1. Components of the circuit name regions of weights (`components`).
2. Two gradients (of the forget loss, and of retained answers) and a diagonal Fisher are taken
   there.
3. Each parameter's gain and damage are those of the step that the magnitude floor will impose: one
   whole quantizer cell against the forget gradient.
4. The best gain per damage fills the pool of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypedDict

import torch
from jaxtyping import Int
from torch import Tensor

from ..circuits.circuit import Circuit
from ..errors import CircuitError, MaskError
from ..losses.accuracy import answered_correctly
from ..losses.answers import answer_gradient
from ..losses.counterfactual import forget_gradient
from ..losses.fisher import fisher_diagonal
from ..losses.gradients import ByLayer, Elements, ReadOnce, WeightMap, Weights, take
from ..models.graph import Node
from ..models.language_model import LanguageModel
from ..quantizers.base import Quantizer
from ..tasks.pairs import PairSet
from ..utils.ranges import check_range, entrance
from .components import embedding_rows, region
from .floor import Set, floor, floor_step, quantizer_set
from .mask import Mask
from .pool import Pool, Regions, positions, sampled_rows, typical_damage_of

POOL = 6
"""Candidates per parameter of the budget: which of them are edited is settled while unlearning."""
DAMAGE_DAMPING = 100.0
"""Median damages below which damage hardly counts in the choice of parameters."""
MASK_PAIRS = 192
"""Pairs behind each gradient of a mask."""


@entrance(MaskError)
def circuit_mask(
    circuit: Circuit,
    model: LanguageModel,
    *,
    budget: float = 0.005,
    retain: Sequence[PairSet] = (),
    forget: PairSet | None = None,
    seed: int = 0,
    n_pairs: int = MASK_PAIRS,
    damage_damping: float = DAMAGE_DAMPING,
    retain_gradient_weight: float = 1.0,
    frozen_layers: float = 0.0,
    survive: Sequence[str] = ("nf4",),
    by_layer: bool = False,
    subject_rows: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Mask:
    """The parameters behind a circuit that forget most per retain damage (see the module).

    Arguments:
        circuit: from `discover`, or read from a file.
        model: the model it was discovered on.
        budget: share of all the model's parameters, in (0, 1].
        retain: what must stay (`Task.retain_sets`), sets of equal weight; empty: gain alone counts.
        forget: pairs for the forget gradient; default: those of the discovery.
        seed: which pairs are drawn.
        n_pairs: how many pairs each gradient and the Fisher use.
        damage_damping: see `choose_parameters`.
        retain_gradient_weight: see `choose_parameters`.
        frozen_layers: share of the layers, from the input on, in which nothing may be edited.
        survive: quantizers that every edit must survive.
        by_layer: gradients and Fisher of a layer at a time: the same mask, less memory, more time.
        subject_rows: all of the forget subjects' own rows of the embedding are candidates, too.
        on_step: called with (weights done, weights in all) while they are chosen.

    Raises:
        MaskError: budget out of range, or nothing to edit.
        CircuitError: no forget pairs known, or another checkpoint.
    """
    model.check_editable()
    given = SimpleNamespace(
        damage_damping=damage_damping,
        retain_gradient_weight=retain_gradient_weight,
        n_pairs=n_pairs,
    )
    check_range(given, "damage_damping", "retain_gradient_weight", at_least=0, at_most=1e30)
    check_range(given, "n_pairs", at_least=1)
    pairs = _forget_pairs(circuit, model, forget)
    components, regions = _regions(circuit, model, frozen_layers)
    if not 0 < budget <= 1 or not regions:
        return choose_parameters(model, regions, budget, {})  # raises the right error
    own = {model.embedding_name: embedding_rows(model, pairs, survive)} if subject_rows else None
    losses = _Losses.of(model, pairs, retain, n_pairs, seed)
    found = losses.known(regions, quantizer_set(survive), by_layer=by_layer)
    mask = choose_parameters(
        model,
        regions,
        budget,
        **found,
        survive=survive,
        damage_damping=damage_damping,
        retain_gradient_weight=retain_gradient_weight,
        besides=own,
        on_step=on_step,
    )
    mask.meta.update(components=[n.id for n, _ in components], provenance=circuit.meta.provenance)
    return mask


def _forget_pairs(circuit: Circuit, model: LanguageModel, forget: PairSet | None) -> PairSet:
    """The pairs whose answers must go.

    Raises:
        CircuitError: none are known, or the circuit is of another checkpoint.
    """
    circuit.check_fits(model)
    pairs = forget or circuit.pairs
    if pairs is None:
        raise CircuitError(
            "A circuit read from a file needs its pairs to make a mask: give forget=, such as "
            "read_prompts(path, model) or load_task(name, model).forget."
        )
    return pairs


def _regions(
    circuit: Circuit, model: LanguageModel, frozen_layers: float
) -> tuple[list[tuple[Node, bool]], Regions]:
    """Step 1: the circuit's components outside the frozen layers, and where their weights lie."""
    first = frozen_layers * circuit.graph.architecture.n_layers
    components = [c for c in circuit.components() if c[0].layer >= first or c[0].layer < 0]
    return components, region(model, components)


class _Gain(TypedDict):
    forget_gradient: WeightMap


class _Known(_Gain, total=False):
    """What is known of some weights, as `choose_parameters` takes it."""

    retain_fisher: WeightMap
    retain_gradient: WeightMap
    typical_damage: float


@dataclass(frozen=True)
class _Losses:
    """What the gradients and the Fisher of a mask are taken of.

    The Fisher is that of all retained answers together. Of their gradients every set counts alike,
    with the pairs that the model answers correctly.
    """

    model: LanguageModel
    chosen: PairSet
    """Forget pairs."""
    sample: PairSet | None
    """Retain pairs of all sets."""
    held: list[PairSet]
    """Those of each set that the model answers correctly, where there are any."""
    seed: int

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        forget: PairSet,
        retain: Sequence[PairSet],
        n_pairs: int,
        seed: int,
    ) -> _Losses:
        """Draw ``n_pairs`` pairs for each."""
        chosen = forget.sample(n_pairs, seed)
        if not retain:
            return cls(model, chosen, None, [], seed)
        everything = PairSet("retain", tuple(p for pairs in retain for p in pairs))
        held = [answered_correctly(model, pairs.sample(n_pairs, seed)) for pairs in retain]
        sample = everything.sample(n_pairs, seed)
        return cls(model, chosen, sample, [p for p in held if p], seed)

    def forget_gradient(self, of: Elements) -> Weights:
        """At some weights or positions."""
        return forget_gradient(self.model, of, self.chosen)

    def fisher(self, of: Elements) -> Weights:
        """At some weights or positions."""
        assert self.sample is not None
        return fisher_diagonal(self.model, of, self.sample, seed=self.seed)

    def known(self, regions: Regions, quantizers: Sequence[Quantizer], *, by_layer: bool) -> _Known:
        """Step 2, of the regions' weights."""
        names = list(regions)

        def per_weight(compute: Callable[[list[str]], Weights]) -> WeightMap:
            return ByLayer(names, compute) if by_layer else ReadOnce(compute(names))

        found = _Known(forget_gradient=per_weight(self.forget_gradient))
        if self.sample is None:
            return found
        found["retain_fisher"] = per_weight(self.fisher)
        if by_layer:  # one pass over the rows that it is told by, in place of one a layer
            rows = sampled_rows(regions)
            at = {n: positions(r, regions[n].shape[1]) for n, r in rows.items()}
            found["typical_damage"] = typical_damage_of(
                self.model, regions, quantizers, rows, self.forget_gradient(at), self.fisher(at)
            )
        if self.held:
            found["retain_gradient"] = per_weight(
                lambda some: answer_gradient(self.model, some, *self.held)
            )
        return found


def choose_parameters(
    model: LanguageModel,
    regions: Regions,
    budget: float,
    forget_gradient: WeightMap,
    *,
    retain_fisher: WeightMap | None = None,
    retain_gradient: WeightMap | None = None,
    survive: Set = "nf4",
    damage_damping: float = DAMAGE_DAMPING,
    typical_damage: float | None = None,
    retain_gradient_weight: float = 1.0,
    besides: Mapping[str, Int[Tensor, " _n"]] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Mask:
    """The parameters with the best forget gain per retain damage, up to a budget.

    1. The floor's step d of each single weight, against the forget gradient, has with
       w = ``retain_gradient_weight``

           gain = -(g_forget + w g_retain) . d,    damage = 1/2 F d^2.

       The retain gradient counts with its sign: a step that lowers an answer of the forget set and
       its near neighbours' alike gains nothing.
    2. score = gain / (damage + ``damage_damping`` x ``typical_damage``).
    3. The best scores fill the pool of `POOL` times the budget; what gains nothing stays out. Only
       the best so far are held while one weight after another is looked at.

    Arguments:
        model: the model to edit.
        regions: candidate weights, from `region`.
        budget: share of all the model's parameters that may be edited, in (0, 1].
        forget_gradient: gradient of the forget loss per candidate weight; like the two below a
            dictionary, a `ByLayer`, which holds one layer at a time, or a `ReadOnce`.
        retain_fisher: diagonal Fisher of what must stay; None: no damage is counted.
        retain_gradient: gradient of the loss of retained answers; None counts as 0.
        survive: the set of quantizers whose cells define the step.
        retain_gradient_weight: weight of the retain gradient.
        damage_damping: so that weights of no measured damage do not win on no gain.
        typical_damage: nats; default: the median damage over the rows of `sampled_rows`.
        besides: flat positions in other weights that are candidates whatever their score.
        on_step: called with (weights done, weights in all).

    Raises:
        MaskError: budget out of range, or no candidate can move.
    """
    _check_budget(budget)
    quantizers = quantizer_set(survive)
    if retain_fisher is None:
        typical_damage = 0.0
    elif typical_damage is None:
        rows = sampled_rows(regions)
        parts = ({n: m[n][r] for n, r in rows.items()} for m in (forget_gradient, retain_fisher))
        typical_damage = typical_damage_of(model, regions, quantizers, rows, *parts)
    pool, wanted, refused = Pool(POOL * _limit(model, budget)), 0, 0
    for done, (name, inside) in enumerate(regions.items(), 1):
        g = take(forget_gradient, name)
        step = floor_step(model.weights[name], g, quantizers, model.saved_dtype)
        moved = inside & (g != 0)
        wanted, refused = wanted + int(moved.sum()), refused + int((moved & (step == 0)).sum())
        index = (inside & (step != 0)).flatten().nonzero()[:, 0]
        d, slope = step.flatten()[index], g.flatten()[index]
        if retain_gradient is not None:
            slope = slope + retain_gradient_weight * take(retain_gradient, name).flatten()[index]
        score = -slope * d
        gains = score > 0
        if retain_fisher is not None:
            damage = 0.5 * take(retain_fisher, name).flatten()[index] * d * d
            score = score / (damage + damage_damping * typical_damage).clamp_min(1e-30)
        pool.add(name, score[gains], index[gains])
        if on_step:
            on_step(done, len(regions))
    if not len(pool.score):
        raise MaskError("No parameter of the circuit can move by a whole cell towards forgetting.")
    indices = {**pool.indices(), **(besides or {})}
    return _mask(model, indices, budget, quantizers, refused=refused, candidates=wanted)


def random_mask(model: LanguageModel, budget: float, seed: int = 0, survive: Set = "nf4") -> Mask:
    """As many candidates as `choose_parameters` takes, drawn from every linear weight: an ablation.

    Arguments:
        model: the model to edit.
        budget: share of all the model's parameters that may be edited, in (0, 1].
        seed: of the draw.
        survive: the set of quantizers; what the floor lets move neither way is left out.

    Raises:
        MaskError: budget out of range.
    """
    _check_budget(budget)
    quantizers = quantizer_set(survive)
    generator = torch.Generator().manual_seed(seed)
    floors = [floor(model.weights[n], quantizers, model.saved_dtype) for n in model.linear_names]
    movable = torch.cat([~(f.up.isnan() & f.down.isnan()).cpu() for f in floors])
    order = torch.randperm(len(movable), generator=generator)
    chosen = torch.zeros_like(movable)
    chosen[order[movable[order]][: POOL * _limit(model, budget)]] = True
    parts = chosen.split([model.weights[n].numel() for n in model.linear_names])
    indices = {n: part.nonzero()[:, 0] for n, part in zip(model.linear_names, parts, strict=True)}
    return _mask(model, {n: i for n, i in indices.items() if len(i)}, budget, quantizers)


def _check_budget(budget: float) -> None:
    """Raise MaskError unless a budget is a share."""
    if not 0 < budget <= 1:
        raise MaskError(f"The budget is a share of all parameters in (0, 1]; got {budget}.")


def _limit(model: LanguageModel, budget: float) -> int:
    """How many parameters of a model may be edited at once."""
    return max(1, int(budget * model.n_parameters))


def _mask(
    model: LanguageModel,
    indices: dict[str, Int[Tensor, " _n"]],
    budget: float,
    quantizers: Sequence[Quantizer],
    **counts: int,
) -> Mask:
    """A mask of some positions, with what it was made from."""
    return Mask(
        indices,
        {
            "model": model.name,
            "model_sha256": model.sha256,
            "budget": budget,
            "limit": min(_limit(model, budget), sum(map(len, indices.values()))),
            "survive": [q.name for q in quantizers],
            **counts,
        },
    )
