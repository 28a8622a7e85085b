"""Discovery of a circuit.

1. Draw pairs, and score every edge on the forget pairs (`attribution.attribute`).
2. Score every edge on the retain pairs, and reduce the forget scores of edges that they need
   (`selective_scores`). This is the ranking; without retain pairs it is the forget scores.
3. Take the fewest top-ranked edges whose ablate-outside faithfulness reaches the target
   (`faithfulness.minimal_edges`), or as many as the settings say.
4. Of the fewest, leave out edges while exact ablation stays at the target (`removal.remove_edges`),
   if the settings ask for it.
5. Ablate the circuit alone, to see whether it is necessary (`faithfulness.completeness`).
6. With ``resamples``, say how scores and edges hold when other facts and phrasings are drawn
   (`stability`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from ...errors import CircuitError
from ...models.graph import Graph
from ...models.hooked import AnyModel, HookedModel, as_model
from ...models.language_model import LanguageModel
from ...models.provenance import provenance
from ...tasks.pairs import PairSet
from ...utils.ranges import entrance
from ...utils.tensors import make_folder
from ..ablation import Ablation
from ..attribution import attribute
from ..circuit import Circuit
from ..config import CircuitConfig, fit_memory
from ..scores import Attribution
from .faithfulness import completeness, minimal_edges, random_completeness, strongest
from .meta import CircuitMeta
from .removal import remove_edges
from .stability import Resamples, Stability, measure_stability

TRIES = 14
"""Circuits that the search usually tries, for the time left and for plans."""
UNFINISHED = "attribution-{}.safetensors"
"""What waits in the folder ``resume``, of forget or retain pairs."""
ROUTED = (
    "mixture of experts: each edge's score is exact, but a router jumps between experts, so that "
    "scores need not add up to the whole effect"
)
"""Said where the scores of such a model are shown."""


def selective_scores(
    forget: Float[np.ndarray, "writers readers"],
    retain: Float[np.ndarray, "writers readers"],
    discount: float,
) -> Float[np.ndarray, "writers readers"]:
    """Forget scores with their size reduced by ``discount`` times that of the retain scores, at
    least to a tenth; signs stay."""
    size = np.abs(forget)
    return np.sign(forget) * np.maximum(size - discount * np.abs(retain), 0.1 * size)


@entrance(CircuitError)
def discover(
    model: AnyModel,
    forget: PairSet,
    *,
    config: CircuitConfig | None = None,
    retain: PairSet | None = None,
    seed: int = 0,
    resamples: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
    resume: str | PathLike[str] | None = None,
) -> Circuit:
    """Find a small circuit that carries the forget answers.

    Arguments:
        model: from `load_model`, or a HookedTransformer of TransformerLens 3.9.
        forget: the pairs whose answers must go.
        config: attribution, faithfulness target and discount on edges that ``retain`` needs.
        retain: pairs whose answers must stay; edges that they need lose rank.
        seed: which pairs are drawn.
        resamples: draw facts and phrasings again so many times and say how the circuit holds
            (`Circuit.stability`), at least 2; attribution runs once. 0: do not.
        on_step: called with (stage, done, total).
        resume: a folder in which the sums of an attribution wait, so that a discovery that was
            killed goes on from there, to the same circuit. Without resamples alone.

    Returns:
        The circuit, with the forget scores of all edges (metric units; positive: supports the
        answer), and what it was discovered with in ``meta``.

    Raises:
        CircuitError: a model that cannot be attributed, settings out of range, or pairs of one
            fact that are to be resampled.
    """
    config, model = config or CircuitConfig(), as_model(model)
    if isinstance(resamples, bool) or resamples < 0 or resamples == 1:
        raise CircuitError(
            f"resamples must be 0, or at least 2: one resample has no interval; got {resamples}."
        )
    note = on_step or (lambda *_: None)
    folder = None if resume is None or resamples else Path(resume)
    if folder is not None:
        make_folder(folder)

    def score(which: str, pairs: PairSet, draws: Resamples | None) -> Attribution:
        stage = f"attribution of {which} pairs" if retain else "attribution of the pairs"
        return attribute(
            model,
            pairs,
            config=config,
            on_batch=lambda d, n: note(stage, d, n),
            on_pairs=draws,
            resume=None if folder is None else folder / UNFINISHED.format(which),
        )

    chosen = forget.sample(config.pairs, seed)
    draws, again = Resamples(chosen, resamples, seed) if resamples else None, None
    found = score("forget", chosen, draws)
    _check_known(model, found)
    ranking = found.scores
    if retain is not None and config.retain_discount:
        kept = retain.sample(config.pairs, seed)
        again = Resamples(kept, resamples, seed) if resamples else None
        retained = score("retain", kept, again)
        ranking = selective_scores(found.scores, retained.scores, config.retain_discount)
    selected = _select(model, chosen, config, ranking, note, seed)
    longest = max(len(p.clean) for p in chosen)
    size, gb, _ = fit_memory(model.graph, model.d_model, longest, config)
    meta = CircuitMeta(
        model=model.name,
        model_sha256=model.sha256,
        settings=config,
        provenance=provenance(model, seed, asdict(config)),
        pairs_per_batch=size,
        gb_per_pair=round(gb, 4),
        metric_clean=found.clean,
        metric_corrupt=found.corrupt,
        caveat="; ".join(filter(None, (ROUTED if model.routed else "", found.caveat))),
    )
    edges, discount = selected.edges, config.retain_discount
    stable = draws and _stability(found, ranking, edges, draws, again, discount)
    if folder is not None:
        for which in ("forget", "retain"):
            (folder / UNFINISHED.format(which)).unlink(missing_ok=True)
    return Circuit(found.graph, found.scores, edges, selected.describe(meta), chosen, stable)


def _stability(
    found: Attribution,
    ranking: Float[np.ndarray, "writers readers"],
    edges: Bool[np.ndarray, "writers readers"],
    draws: Resamples,
    again: Resamples | None,
    discount: float,
) -> Stability:
    """How the circuit holds when facts and phrasings are drawn again: beside as many edges of each
    resample's own ranking as it takes for one of the circuit's size here, which edges that were
    left out by removal may be among."""
    graph = found.graph
    enough = _fewest(graph, ranking, int(edges.sum()))
    resampled, retained = draws.means(), again and again.means()
    rankings = (
        own if retained is None else selective_scores(own, retained[k], discount)
        for k, own in enumerate(resampled)
    )
    return measure_stability(
        found.scores,
        resampled,
        rankings,
        edges,
        graph.exists,
        lambda scores: strongest(graph, scores, enough),
        draws.drawn,
    )


def _check_known(model: LanguageModel | HookedModel, found: Attribution) -> None:
    """Raise CircuitError where the clean prompts give no more of the metric than the corrupt
    ones."""
    if not found.clean > found.corrupt:
        raise CircuitError(
            f"{model.name} does not know these answers: the metric is {found.clean:.4g} on the "
            f"clean prompts and {found.corrupt:.4g} on the corrupt ones, so no circuit carries "
            "them. Give pairs that the model answers."
        )


def _fewest(graph: Graph, ranking: Float[np.ndarray, "writers readers"], size: int = 1) -> int:
    """How many top-ranked edges it takes until so many lie on paths from input to logits."""
    low, high = 0, graph.n_edges
    while high - low > 1:
        middle = (low + high) // 2
        enough = strongest(graph, ranking, middle).sum() >= size
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True)
class _Selected:
    """The edges of a circuit, and what was measured of them."""

    edges: Bool[np.ndarray, "writers readers"]
    faithfulness: float
    curve: list[tuple[int, float]]
    irreducible: bool | None = None
    completeness: float | None = None
    random_completeness: float | None = None

    def describe(self, meta: CircuitMeta) -> CircuitMeta:
        """What is known of a circuit, with this."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "edges"}
        return replace(meta, **known | {"curve": tuple(self.curve)})


def _select(
    model: LanguageModel | HookedModel,
    pairs: PairSet,
    config: CircuitConfig,
    ranking: Float[np.ndarray, "writers readers"],
    note: Callable[[str, int, int], None],
    seed: int,
) -> _Selected:
    """The circuit of a ranking."""
    sample = pairs.sample(config.faithfulness_pairs, seed)
    ablation = Ablation(
        model,
        sample,
        metric=config.metric,
        ablation=config.ablation,
        batch_size=config.batch_size,
    )
    tried = 0

    def faithful(edges: Bool[np.ndarray, "writers readers"]) -> float:
        nonlocal tried
        tried += 1
        note("faithfulness of circuits", tried - 1, max(tried, TRIES))
        return ablation.faithfulness(edges)

    if config.top is None and config.threshold is None:
        edges, curve = minimal_edges(model.graph, ranking, faithful, target=config.faithfulness)
        found = _Selected(edges, faithful(edges), curve)
        if config.removal_tries:
            less = remove_edges(
                ablation,
                edges,
                target=config.faithfulness,
                tries=config.removal_tries,
                on_step=lambda done, n: note("leaving edges out", done, n),
            )
            found = replace(
                found,
                edges=less.edges,
                faithfulness=less.faithfulness,
                irreducible=less.irreducible,
            )
    else:
        n = _asked_for(model.graph, ranking, config)
        edges = strongest(model.graph, ranking, n)
        final = faithful(edges)
        found = _Selected(edges, final, [(n, final)])
    return replace(
        found,
        completeness=completeness(ablation, found.edges),
        random_completeness=random_completeness(ablation, int(found.edges.sum()), seed=seed),
    )


def _asked_for(
    graph: Graph, ranking: Float[np.ndarray, "writers readers"], config: CircuitConfig
) -> int:
    """How many edges the settings ask for, by number or threshold."""
    n = config.top
    if n is None:
        n = int((graph.exists & (np.abs(ranking) >= (config.threshold or 0))).sum())
        if n == 0:
            raise CircuitError(
                f"No edge reaches the threshold {config.threshold}: the strongest, less what the "
                "retain pairs take off it (retain_discount), has "
                f"{float(np.abs(ranking).max()):.4g}."
            )
    if not strongest(graph, ranking, n).any():
        raise CircuitError(
            f"None of the {n} strongest edges lies on a path from input to logits; the first "
            f"{_fewest(graph, ranking)} hold one. Ask for more, or let the search choose."
        )
    return n
