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

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..circuits.circuit import Circuit
from ..errors import CircuitError, MaskError
from ..losses.accuracy import answered_correctly
from ..losses.answers import answer_gradient
from ..losses.counterfactual import forget_gradient
from ..losses.fisher import fisher_diagonal
from ..losses.gradients import ByLayer, WeightMap, Weights
from ..models.language_model import LanguageModel
from ..tasks.pairs import PairSet
from .components import embedding_rows, region
from .floor import Set, floor, floor_step, quantizer_set
from .mask import Mask

POOL = 6
"""Candidates per parameter of the budget: which of them are edited is settled while unlearning."""
DAMAGE_DAMPING = 100.0
"""Median damages below which damage hardly counts in the choice of parameters."""
MASK_PAIRS = 192
"""Pairs behind each gradient of a mask."""


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
    """The parameters behind a circuit that forget most per retain damage.

    Arguments:
        circuit: from `discover`, or read from a file.
        model: the model it was discovered on.
        budget: share of all the model's parameters, in (0, 1].
        retain: what must stay (`Task.retain_sets`), each set with equal weight; without it
            parameters are chosen by forget gain alone.
        forget: pairs for the forget gradient; default: those of the discovery.
        seed: which pairs are drawn.
        n_pairs: how many pairs each gradient and the Fisher use.
        damage_damping: see `choose_parameters`.
        retain_gradient_weight: weight of the retain answers' gradient; see `choose_parameters`.
        frozen_layers: share of the layers, from the input on, in which nothing may be edited.
        survive: quantizers that every edit must survive.
        by_layer: hold gradients and Fisher of one layer at a time: the same mask with
            less memory and as many more passes as there are layers.
        subject_rows: the forget subjects' own rows of the embedding may be edited, too. Every
            element of them is a candidate: what they hold shows once the layers change.
        on_step: called with (weights done, weights in all) while they are chosen.

    Raises:
        MaskError: budget out of range, or nothing to edit.
        CircuitError: no forget pairs known, or another checkpoint.
    """
    circuit.check_fits(model)
    pairs = forget or circuit.pairs
    if pairs is None:
        raise CircuitError("A circuit read from a file needs forget=... to make a mask.")
    first = frozen_layers * circuit.graph.architecture.n_layers
    components = [c for c in circuit.components() if c[0].layer >= first or c[0].layer < 0]
    regions = region(model, components)
    names = list(regions)
    if not 0 < budget <= 1 or not names:
        return choose_parameters(model, regions, budget, {})  # raises the right error
    chosen = pairs.sample(n_pairs, seed)

    def per_weight(compute: Callable[[list[str]], Weights]) -> WeightMap:
        return ByLayer(names, compute) if by_layer else compute(names)

    g = per_weight(lambda some: forget_gradient(model, some, chosen))
    fisher = retain_gradient = None
    if retain:
        everything = PairSet("retain", tuple(p for pairs in retain for p in pairs))
        sample = everything.sample(n_pairs, seed)
        fisher = per_weight(lambda some: fisher_diagonal(model, some, sample, seed=seed))
        held = [answered_correctly(model, pairs.sample(n_pairs, seed)) for pairs in retain]
        held = [pairs for pairs in held if pairs]

        def retained(some: list[str]) -> Weights:
            parts = [answer_gradient(model, some, pairs) for pairs in held]
            return {n: sum((p[n] for p in parts[1:]), parts[0][n]) for n in some}

        retain_gradient = per_weight(retained) if held else None
    own = {model.embedding_name: embedding_rows(model, pairs, survive)} if subject_rows else None
    mask = choose_parameters(
        model,
        regions,
        budget,
        g,
        retain_fisher=fisher,
        retain_gradient=retain_gradient,
        survive=survive,
        damage_damping=damage_damping,
        retain_gradient_weight=retain_gradient_weight,
        besides=own,
        on_step=on_step,
    )
    mask.meta["components"] = [n.id for n, _ in components]
    mask.meta["provenance"] = circuit.meta.provenance
    return mask


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

    For the floor's step d of each single weight, with w = ``retain_gradient_weight``,

        gain = -(g_forget + w g_retain) . d,    damage = 1/2 F d^2,
        score = gain / (damage + ``damage_damping`` x median damage).

    The retain gradient counts with its sign: a step that lowers an answer of the forget set and its
    near neighbours' alike gains nothing.

    Arguments:
        model: the model to edit.
        regions: candidate weights, from `region`.
        budget: share of all the model's parameters that may be edited, in (0, 1].
        forget_gradient: gradient of the forget loss per candidate weight; like the two below a
            dictionary, or a `ByLayer`, which holds one layer at a time.
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
    if not 0 < budget <= 1:
        raise MaskError(f"The budget is a share of all parameters in (0, 1]; got {budget}.")
    quantizers = quantizer_set(survive)
    refused = candidates = 0
    gains, damages, places = [], [], []
    for name, inside in regions.items():
        weight, g = model.weights[name], forget_gradient[name]
        step = floor_step(weight, g, quantizers, model.saved_dtype)
        wanted = inside & (g != 0)
        candidates += int(wanted.sum())
        refused += int((wanted & (step == 0)).sum())
        usable = (inside & (step != 0)).flatten().nonzero()[:, 0]
        d = step.flatten()[usable]
        if retain_gradient is not None:
            g = g + retain_gradient_weight * retain_gradient[name]
        gains.append(-g.flatten()[usable] * d)
        if retain_fisher is not None:
            damages.append(0.5 * retain_fisher[name].flatten()[usable] * d * d)
        places.append((name, usable))
        if on_step:
            on_step(len(places), len(regions))
    gain = torch.cat(gains) if gains else torch.zeros(0)
    if not len(gain) or not (gain > 0).any():
        raise MaskError("No parameter of the circuit can move by a whole cell towards forgetting.")
    score = gain
    if damages:
        damage = torch.cat(damages)
        score = gain / (damage + damage_damping * damage.median().clamp_min(1e-30)).clamp_min(1e-30)
    limit = max(1, int(budget * model.n_parameters))
    n = min(POOL * limit, int((gain > 0).sum()))
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.topk(n).indices] = True
    indices: dict[str, Tensor] = {}
    for (name, usable), picked in zip(
        places, chosen.split([len(u) for _, u in places]), strict=True
    ):
        if picked.any():
            indices[name] = usable[picked].cpu()
    indices |= besides or {}
    return Mask(
        indices,
        {
            "model": model.name,
            "model_sha256": model.sha256,
            "budget": budget,
            "limit": min(limit, sum(map(len, indices.values()))),
            "survive": [q.name for q in quantizers],
            "refused": refused,
            "candidates": candidates,
        },
    )


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
    if not 0 < budget <= 1:
        raise MaskError(f"The budget is a share of all parameters in (0, 1]; got {budget}.")
    quantizers = quantizer_set(survive)
    generator = torch.Generator().manual_seed(seed)
    floors = [floor(model.weights[n], quantizers, model.saved_dtype) for n in model.linear_names]
    movable = torch.cat([~(f.up.isnan() & f.down.isnan()).cpu() for f in floors])
    limit = max(1, int(budget * model.n_parameters))
    order = torch.randperm(len(movable), generator=generator)
    chosen = torch.zeros_like(movable)
    chosen[order[movable[order]][: POOL * limit]] = True
    parts = chosen.split([model.weights[n].numel() for n in model.linear_names])
    indices = {n: part.nonzero()[:, 0] for n, part in zip(model.linear_names, parts, strict=True)}
    return Mask(
        {n: index for n, index in indices.items() if len(index)},
        {
            "model": model.name,
            "model_sha256": model.sha256,
            "budget": budget,
            "limit": min(limit, int(chosen.sum())),
            "survive": [q.name for q in quantizers],
        },
    )
