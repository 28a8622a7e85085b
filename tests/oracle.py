"""TransformerLens' own attribution patching as an oracle: its positions summed, in our ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
    faithfulness,
)

from mansu_interp.circuits.metrics import logit_diff
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import Pair, collate

WRITERS = {"embed": "input", "attn_head_out": "a{l}.h{h}", "mlp_out": "m{l}"}
READERS = {
    "q_input": "a{l}.h{h}<q>",
    "k_input": "a{l}.h{h}<k>",
    "v_input": "a{l}.h{h}<v>",
    "mlp_in": "m{l}",
    "logits": "logits",
}


def _id(names: dict[str, str], node: Any) -> str:
    return names[node.kind].format(l=node.layer, h=node.head)


def _inputs(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, Any]:
    batch = collate([pair])
    return (
        batch.clean,
        batch.corrupt,
        lambda logits: logit_diff(logits[:, -1], batch, logits[:, -1])[0],
    )


def by_position(model: LanguageModel, pair: Pair) -> dict[tuple[Any, Any], float]:
    """Scores of one pair, as TransformerLens gives them: one an edge and position."""
    config = EdgeAttributionConfig(granularity="edge", ig_steps=1)
    embedding = model.hf.get_input_embeddings().weight
    embedding.requires_grad_(True)  # the oracle needs something to take gradients through
    try:
        return attribution_patch(model.bridge, *_inputs(pair), config=config).edge_scores
    finally:
        embedding.requires_grad_(False)


def summed(
    model: LanguageModel, scores: dict[tuple[Any, Any], float]
) -> Float[np.ndarray, "writers readers"]:
    """The same, summed over positions."""
    out = np.zeros(model.graph.exists.shape)
    for (writer, reader), score in scores.items():
        out[model.graph.edge(_id(WRITERS, writer), _id(READERS, reader))] += float(score)
    return out


def edge_scores(model: LanguageModel, pair: Pair) -> Float[np.ndarray, "writers readers"]:
    """Scores of one pair."""
    return summed(model, by_position(model, pair))


def recovered(
    model: LanguageModel, pair: Pair, edges: Bool[np.ndarray, "writers readers"]
) -> tuple[float, float, float]:
    """Ablate-outside faithfulness of one pair, its clean and its corrupt metric."""
    kept = [
        (w, r)
        for w, r in by_position(model, pair)
        if edges[model.graph.edge(_id(WRITERS, w), _id(READERS, r))]
    ]
    result = faithfulness(model.bridge, *_inputs(pair), kept)
    return result.recovered, result.full_metric, result.corrupt_metric
