"""Which weights lie behind a component of a circuit.

A component maps to a slice of a weight in the deployed ``[out, in]`` layout:

===================  ===============================================================
``q``/``k``/``v``    the head's rows of the q/k/v projection
head output          the head's columns of the output projection
``mlp`` as reader    gate and up projection
``mlp`` as writer    down projection
``input``            the forget subjects' own rows of the embedding, if asked for
===================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..models.graph import Node
from ..models.language_model import LanguageModel
from ..models.layout import decoder_weights, head_slice, mlp_weights
from ..tasks.pairs import Pair
from .floor import Set, floor


def component_slices(
    model: LanguageModel, node: Node, writes: bool
) -> list[tuple[str, str, slice]]:
    """(weight name, ``rows`` or ``cols``, slice) behind a node.

    Arguments:
        model: a decoder whose weights `layout` knows.
        node: a reader, or with ``writes`` a writer.
        writes: for an MLP, its output (down) rather than its input (gate, up).

    Raises:
        ModelError: no weight of a known name, or a fused one of unknown order.
    """
    if node.kind in ("input", "logits"):
        return []  # see `embedding_rows`; the unembedding is never edited
    names, arch = decoder_weights(model.hf, model.linear_names), model.architecture
    if node.kind == "mlp":
        return [(n, "rows", slice(None)) for n in mlp_weights(names, node.layer, writes)]
    return [
        head_slice(
            model.hf,
            names,
            layer=node.layer,
            kind=node.kind,
            head=node.head,
            heads=arch.n_heads,
            kv_heads=arch.n_kv_heads,
        )
    ]


def region(
    model: LanguageModel, components: Iterable[tuple[Node, bool]]
) -> dict[str, Bool[Tensor, "_out _in"]]:
    """Where the weights of some components lie, as boolean tensors."""
    out: dict[str, Bool[Tensor, "_out _in"]] = {}
    for node, writes in components:
        for name, axis, where in component_slices(model, node, writes):
            mask = out.setdefault(name, torch.zeros_like(model.weights[name], dtype=torch.bool))
            if axis == "rows":
                mask[where] = True
            else:
                mask[:, where] = True
    return out


def subject_tokens(pairs: Iterable[Pair]) -> list[int]:
    """Tokens that tell the pairs' subjects from others: those of the clean prompts in whose place
    the corrupt ones have others."""
    return sorted({a for p in pairs for a, b in zip(p.clean, p.aligned, strict=True) if a != b})


def embedding_rows(
    model: LanguageModel, pairs: Iterable[Pair], survive: Set = "nf4"
) -> Int[Tensor, " n"]:
    """Flat positions, in the embedding, of the rows of `subject_tokens`, but for elements that the
    floor lets move neither way."""
    weight = model.weights[model.embedding_name]
    own, width = torch.tensor(subject_tokens(pairs)), weight.shape[1]
    index = (own[:, None] * width + torch.arange(width)).flatten()
    where = floor(weight, survive, model.saved_dtype, index=index.to(model.device))
    return index[~(where.up.isnan() & where.down.isnan()).cpu()]
