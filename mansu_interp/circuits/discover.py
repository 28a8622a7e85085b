"""Discovery: attribution, a ranking, and the smallest circuit that reaches a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from jaxtyping import Bool, Float

from ..errors import CircuitError
from ..models.hooked import AnyModel, HookedModel, as_model
from ..models.language_model import LanguageModel
from ..models.provenance import provenance
from ..tasks.pairs import PairSet
from .ablation import Ablation
from .attribution import attribute, pairs_per_batch
from .circuit import Circuit
from .config import CircuitConfig
from .faithfulness import minimal_edges, strongest


def selective_scores(
    forget: Float[np.ndarray, "w r"], retain: Float[np.ndarray, "w r"], discount: float
) -> Float[np.ndarray, "w r"]:
    """Forget scores shrunk where the retain set needs the edge as much; signs are kept."""
    size = np.abs(forget)
    return np.sign(forget) * np.maximum(size - discount * np.abs(retain), 0.1 * size)


def discover(
    model: AnyModel,
    forget: PairSet,
    config: CircuitConfig | None = None,
    retain: PairSet | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Circuit:
    """Find the smallest circuit that carries the forget answers.

    Arguments:
        model: from `load_model`, or a HookedTransformer of TransformerLens 3.9.
        forget: the pairs whose answers must go.
        config: attribution, faithfulness target and selectivity.
        retain: pairs that must stay; makes the circuit selective.
        on_step: called with (stage, done, total).

    Raises:
        CircuitError: a model that cannot be attributed, or settings out of range.
    """
    config, model = config or CircuitConfig(), as_model(model)
    for name, pairs in (("forget", forget), ("retain", retain)):
        if not (isinstance(pairs, PairSet) or (name == "retain" and pairs is None)):
            raise CircuitError(
                f"{name} must be a PairSet (task.{name}, or one of your own); got "
                f"{type(pairs).__name__}."
            )
    note = on_step or (lambda *_: None)
    chosen = forget.sample(config.pairs, config.seed)
    found = attribute(
        model, chosen, config, on_batch=lambda d, n: note("attribution of forget pairs", d, n)
    )
    ranking = found.scores
    if retain is not None and config.retain_discount:
        kept = attribute(
            model,
            retain.sample(config.pairs, config.seed),
            config,
            on_batch=lambda d, n: note("attribution of retain pairs", d, n),
        )
        ranking = selective_scores(found.scores, kept.scores, config.retain_discount)
    edges, curve, final = _select(model, chosen, config, ranking, note)
    longest = max(len(p.clean) for p in chosen)
    size, gb = pairs_per_batch(model.graph, model.d_model, longest, config)
    meta = {
        "model": model.name,
        "model_sha256": model.sha256,
        "settings": asdict(config),
        "provenance": provenance(model, config.seed, asdict(config)),
        "pairs_per_batch": size,
        "gb_per_pair": round(gb, 4),
        "faithfulness": final,
        "curve": curve,
        "metric_clean": found.clean,
        "metric_corrupt": found.corrupt,
    }
    return Circuit(found.graph, found.scores, edges, meta, chosen)


def _select(
    model: LanguageModel | HookedModel,
    pairs: PairSet,
    config: CircuitConfig,
    ranking: Float[np.ndarray, "w r"],
    note: Callable[[str, int, int], None],
) -> tuple[Bool[np.ndarray, "w r"], list[tuple[int, float]], float]:
    """The circuit of a ranking, its measured curve, and its faithfulness."""
    sample = pairs.sample(config.faithfulness_pairs, config.seed)
    ablation = Ablation(model, sample, config.metric, config.ablation, config.batch_size)
    tried = 0

    def faithful(edges: Bool[np.ndarray, "w r"]) -> float:
        nonlocal tried
        tried += 1
        note("faithfulness of circuits", tried, 0)
        return ablation.faithfulness(edges)

    if config.top is None and config.threshold is None:
        edges, curve = minimal_edges(model.graph, ranking, faithful, config.faithfulness)
        return edges, curve, faithful(edges)
    n = config.top
    if n is None:
        n = int((model.graph.exists & (np.abs(ranking) >= (config.threshold or 0))).sum())
        if n == 0:
            raise CircuitError(
                f"No edge reaches the threshold {config.threshold}; the strongest has "
                f"{float(np.abs(ranking).max()):.4g}."
            )
    edges = strongest(model.graph, ranking, n)
    final = faithful(edges)
    return edges, [(n, final)], final
