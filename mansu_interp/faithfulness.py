"""Exact ablate-outside faithfulness, and the smallest circuit that reaches a target.

Every edge outside the circuit carries its corrupt-run value, every edge inside the value computed
in the ablated run itself. Each reader's residual input is rebuilt exactly, then normed and
projected per head, so nothing is approximated. Faithfulness is
(metric(circuit) - metric(corrupt)) / (metric(clean) - metric(corrupt)): 0 for the empty circuit,
1 for the full one (the ratio of means over pairs, as in the MIB benchmark, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .attribution import METRICS, Metric, Recorder, Stream, final_logits, hooked
from .errors import CircuitError
from .graph import Graph
from .models import LanguageModel
from .tasks import Batch, PairSet


@torch.no_grad()
def run_circuit(
    stream: Stream, batch: Batch, edges: Bool[np.ndarray, "writers readers"]
) -> Float[Tensor, "batch vocab"]:
    """Last-position logits of the clean run with every edge outside ``edges`` corrupted."""
    graph = stream.graph
    keep = torch.from_numpy(edges & graph.exists).float()
    names = stream.hook_names()
    recorder = Recorder()
    n_layers = len(stream.blocks)
    reads = [f"blocks.{i}.hook_in" for i in range(n_layers)]
    middles = (
        [] if graph.architecture.parallel else [f"blocks.{i}.ln2.hook_in" for i in range(n_layers)]
    )
    with hooked(stream.bridge, recorder.on([*reads, *middles, *names, "ln_final.hook_in"])):
        final_logits(stream.bridge, batch.corrupt, batch.last)
    corrupt = {k: v.float() for k, v in recorder.seen.items()}
    # What each writer adds now beyond its corrupt write, in writer order.
    change = torch.empty(len(graph.writers), *corrupt[stream.input_hook].shape)
    written = 0

    def write(values: Float[Tensor, "n batch pos d"]) -> None:
        nonlocal written
        change[written : written + len(values)] = values
        written += len(values)

    def read(column: int, n: int, base: Tensor) -> Float[Tensor, "n batch pos d"]:
        weights = keep[:written, column : column + n]
        live = weights.any(1).nonzero()[:, 0]
        return base + torch.einsum("un,ubpd->nbpd", weights[live], change[live])

    def at_input(value: Tensor, hook: Any) -> None:
        write((value.float() - corrupt[stream.input_hook])[None])

    def at_projection(layer: int, offset: int, n: int, c: str) -> Callable[[Tensor, Any], Tensor]:
        column = layer * graph.readers_per_layer + offset

        def hook_fn(value: Tensor, hook: Any) -> Tensor:
            inputs = read(column, n, corrupt[f"blocks.{layer}.hook_in"])
            normed = stream.norm(layer, mlp=False)(inputs)
            weight, bias = next((w, b) for k, _, w, b in stream.projections(layer) if k == c)
            out = torch.einsum("nbpd,ncd->bpnc", normed, weight.unflatten(0, (n, -1)))
            if bias is not None:
                out = out + bias.unflatten(0, (n, -1))
            return out.reshape(value.shape).to(value.dtype)

        return hook_fn

    def at_z(layer: int) -> Callable[[Tensor, Any], None]:
        name = f"blocks.{layer}.attn.o.hook_in"

        def hook_fn(value: Tensor, hook: Any) -> None:
            write(stream.head_writes(layer, value.float() - corrupt[name]))

        return hook_fn

    def at_mlp_in(layer: int) -> Callable[[Tensor, Any], Tensor]:
        column = (layer + 1) * graph.readers_per_layer - 1
        base = corrupt[f"blocks.{layer}." + ("hook_in" if not middles else "ln2.hook_in")]

        def hook_fn(value: Tensor, hook: Any) -> Tensor:
            return stream.norm(layer, mlp=True)(read(column, 1, base)[0]).to(value.dtype)

        return hook_fn

    def at_mlp_out(layer: int) -> Callable[[Tensor, Any], None]:
        def hook_fn(value: Tensor, hook: Any) -> None:
            write((value.float() - corrupt[stream.mlp(layer)])[None])

        return hook_fn

    def at_logits(value: Tensor, hook: Any) -> Tensor:
        return read(len(graph.readers) - 1, 1, corrupt["ln_final.hook_in"])[0].to(value.dtype)

    hooks: list[tuple[str, Any]] = [(stream.input_hook, at_input)]
    for i in range(n_layers):
        offset = 0
        for c, n, _, _ in stream.projections(i):
            hooks.append((f"blocks.{i}.attn.{c}.hook_out", at_projection(i, offset, n, c)))
            offset += n
        hooks.append((f"blocks.{i}.attn.o.hook_in", at_z(i)))
        hooks.append((f"blocks.{i}.mlp.hook_in", at_mlp_in(i)))
        hooks.append((stream.mlp(i), at_mlp_out(i)))
    hooks.append(("ln_final.hook_in", at_logits))
    with hooked(stream.bridge, hooks):
        return final_logits(stream.bridge, batch.clean, batch.last)


def circuit_metric(
    model: LanguageModel,
    pairs: PairSet,
    edges: Bool[np.ndarray, "writers readers"],
    metric: Metric | str = "logit_diff",
    batch_size: int = 16,
) -> float:
    """Mean metric of a circuit with everything outside it corrupted."""
    function = METRICS[metric] if isinstance(metric, str) else metric
    stream = Stream(model)
    total = sum(
        function(run_circuit(stream, batch, edges), batch).sum().item()
        for batch in pairs.batches(batch_size)
    )
    return total / len(pairs)


def strongest(
    graph: Graph, scores: Float[np.ndarray, "writers readers"], n: int
) -> Bool[np.ndarray, "writers readers"]:
    """The ``n`` edges of largest absolute score, less what is not on an input -> logits path."""
    if not 1 <= n <= graph.n_edges:
        raise CircuitError(f"Asked for {n} edges; this graph has {graph.n_edges}, at least 1.")
    size = np.where(graph.exists, np.abs(scores), -1.0).ravel()
    chosen = np.zeros(size.shape, dtype=bool)
    chosen[np.argsort(-size, kind="stable")[:n]] = True
    return graph.prune(chosen.reshape(scores.shape))


def minimal_edges(
    graph: Graph,
    scores: Float[np.ndarray, "writers readers"],
    faithfulness: Callable[[Bool[np.ndarray, "writers readers"]], float],
    target: float = 0.85,
    tolerance: float = 0.05,
) -> tuple[Bool[np.ndarray, "writers readers"], list[tuple[int, float]]]:
    """The fewest top-scored edges whose faithfulness reaches ``target``, found by search.

    Doubles the number of edges until the target is reached, then bisects to within
    ``tolerance`` of the count. Faithfulness need not grow at every single step; the curve that
    was really measured is returned.

    Returns:
        The circuit, and (edges asked for, faithfulness) of every evaluation, sorted.

    Raises:
        CircuitError: target not in (0, 1].
    """
    if not 0 < target <= 1:
        raise CircuitError(f"The faithfulness target must lie in (0, 1]; got {target}.")
    curve: dict[int, float] = {}

    def reaches(n: int) -> bool:
        curve[n] = faithfulness(strongest(graph, scores, n))
        return curve[n] >= target

    low, high = 0, min(graph.n_edges, max(16, graph.n_edges // 256))
    while not reaches(high) and high < graph.n_edges:
        low, high = high, min(graph.n_edges, high * 2)
    while high - low > max(1, tolerance * high):
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    return strongest(graph, scores, high), sorted(curve.items())
