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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..circuits.circuit import Circuit
from ..errors import CircuitError, MaskError
from ..losses.accuracy import answered_correctly
from ..losses.answers import answer_gradient
from ..losses.counterfactual import forget_gradient
from ..losses.fisher import fisher_diagonal
from ..losses.gradients import ByLayer, ReadOnce, WeightMap, Weights, take
from ..models.graph import Node
from ..models.language_model import LanguageModel
from ..quantizers.base import Quantizer
from ..tasks.pairs import PairSet
from ..utils.ranges import check_range, entrance
from .components import embedding_rows, region
from .floor import Set, floor, floor_step, quantizer_set
from .mask import Mask

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
    how = {"n_pairs": n_pairs, "seed": seed}
    found = _gradients(model, list(regions), pairs, retain, by_layer=by_layer, **how)
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
        raise CircuitError("A circuit read from a file needs forget=... to make a mask.")
    return pairs


def _regions(
    circuit: Circuit, model: LanguageModel, frozen_layers: float
) -> tuple[list[tuple[Node, bool]], dict[str, Bool[Tensor, "_out _in"]]]:
    """Step 1: the circuit's components outside the frozen layers, and where their weights lie."""
    first = frozen_layers * circuit.graph.architecture.n_layers
    components = [c for c in circuit.components() if c[0].layer >= first or c[0].layer < 0]
    return components, region(model, components)


class _Gradients(TypedDict):
    """What is known of some weights, as `choose_parameters` takes it."""

    forget_gradient: WeightMap
    retain_fisher: WeightMap | None
    retain_gradient: WeightMap | None


def _gradients(
    model: LanguageModel,
    names: list[str],
    forget: PairSet,
    retain: Sequence[PairSet],
    n_pairs: int,
    seed: int,
    by_layer: bool,
) -> _Gradients:
    """Step 2: gradients and Fisher of the named weights, each on ``n_pairs`` pairs.

    The Fisher is that of all retained answers together. Of their gradients every set counts alike,
    with the pairs that the model answers correctly.
    """

    def per_weight(compute: Callable[[list[str]], Weights]) -> WeightMap:
        return ByLayer(names, compute) if by_layer else ReadOnce(compute(names))

    chosen = forget.sample(n_pairs, seed)
    g = per_weight(lambda some: forget_gradient(model, some, chosen))
    if not retain:
        return _Gradients(forget_gradient=g, retain_fisher=None, retain_gradient=None)
    everything = PairSet("retain", tuple(p for pairs in retain for p in pairs))
    sample = everything.sample(n_pairs, seed)
    fisher = per_weight(lambda some: fisher_diagonal(model, some, sample, seed=seed))
    held = [answered_correctly(model, pairs.sample(n_pairs, seed)) for pairs in retain]
    held = [pairs for pairs in held if pairs]

    def retained(some: list[str]) -> Weights:
        total = answer_gradient(model, some, held[0])
        for pairs in held[1:]:
            for name, g in answer_gradient(model, some, pairs).items():
                total[name] += g
        return total

    return _Gradients(
        forget_gradient=g,
        retain_fisher=fisher,
        retain_gradient=per_weight(retained) if held else None,
    )


def choose_parameters(
    model: LanguageModel,
    regions: dict[str, Bool[Tensor, "_out _in"]],
    budget: float,
    forget_gradient: WeightMap,
    *,
    retain_fisher: WeightMap | None = None,
    retain_gradient: WeightMap | None = None,
    survive: Set = "nf4",
    damage_damping: float = DAMAGE_DAMPING,
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
    2. score = gain / (damage + ``damage_damping`` x median damage).
    3. The best scores fill the pool of `POOL` times the budget; what gains nothing stays out.

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
        besides: flat positions in other weights that are candidates whatever their score.
        on_step: called with (weights done, weights in all).

    Raises:
        MaskError: budget out of range, or no candidate can move.
    """
    _check_budget(budget)
    quantizers = quantizer_set(survive)
    found: dict[str, _Candidates] = {}
    for name, inside in regions.items():
        g = take(forget_gradient, name)
        step = floor_step(model.weights[name], g, quantizers, model.saved_dtype)
        slope = (
            g
            if retain_gradient is None
            else g + retain_gradient_weight * take(retain_gradient, name)
        )
        fisher = None if retain_fisher is None else take(retain_fisher, name)
        found[name] = _Candidates.of(inside, g, step, slope, fisher)
        if on_step:
            on_step(len(found), len(regions))
    best = _best(found, damage_damping, POOL * _limit(model, budget))
    indices = {**best, **(besides or {})}
    refused = sum(c.refused for c in found.values())
    wanted = sum(c.wanted for c in found.values())
    return _mask(model, indices, budget, quantizers, refused=refused, candidates=wanted)


@dataclass(frozen=True)
class _Candidates:
    """The parameters of one weight that may be edited."""

    index: Int[Tensor, " n"]
    """Flat positions of those that gain by the floor's step, ascending; in 32 bits where they fit,
    since a large model has billions."""
    gain: Float[Tensor, " n"]
    """What the step gains (nats), above 0."""
    damage: Float[Tensor, " n"] | None
    """What it damages (nats); None: that is not counted."""
    damages: Float[Tensor, " m"] | None
    """The damage of all that can take the step, whatever it gains."""
    wanted: int
    """Parameters that the forget gradient would move."""
    refused: int
    """Of these that cannot take the step."""

    @classmethod
    def of(
        cls,
        inside: Bool[Tensor, "out in"],
        forget: Float[Tensor, "out in"],
        step: Float[Tensor, "out in"],
        slope: Float[Tensor, "out in"],
        fisher: Float[Tensor, "out in"] | None,
    ) -> _Candidates:
        """Step 1 of `choose_parameters` for one weight.

        Arguments:
            inside: True for the candidates.
            forget: gradient of the forget loss.
            step: the floor's, 0 where it allows none.
            slope: the gradient by which the gain is measured.
            fisher: diagonal Fisher of what must stay.
        """
        wanted = inside & (forget != 0)
        index = (inside & (step != 0)).flatten().nonzero()[:, 0]
        d = step.flatten()[index]
        gain = -slope.flatten()[index] * d
        gains = gain > 0
        damages = None if fisher is None else 0.5 * fisher.flatten()[index] * d * d
        small = step.numel() < 2**31
        return cls(
            index[gains].int() if small else index[gains],
            gain=gain[gains],
            damage=None if damages is None else damages[gains],
            damages=damages,
            wanted=int(wanted.sum()),
            refused=int((wanted & (step == 0)).sum()),
        )


def _best(
    found: dict[str, _Candidates], damage_damping: float, n: int
) -> dict[str, Int[Tensor, " _n"]]:
    """Steps 2 and 3: flat positions of the best candidates, by weight, at most ``n`` in all.

    Raises:
        MaskError: none gains anything.
    """
    if not any(len(c.gain) for c in found.values()):
        raise MaskError("No parameter of the circuit can move by a whole cell towards forgetting.")
    damages = [c.damages for c in found.values() if c.damages is not None]
    typical = float(torch.cat(damages).median().clamp_min(1e-30)) if damages else 0.0
    score = torch.cat(
        [
            c.gain
            if c.damage is None
            else c.gain / (c.damage + damage_damping * typical).clamp_min(1e-30)
            for c in found.values()
        ]
    )
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.topk(min(n, len(score))).indices] = True
    parts = chosen.split([len(c.index) for c in found.values()])
    return {
        name: c.index[picked].long().cpu()
        for (name, c), picked in zip(found.items(), parts, strict=True)
        if picked.any()
    }


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
