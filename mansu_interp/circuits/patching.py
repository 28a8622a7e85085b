"""What a patched edge carries, and the exact effect of patching one edge at a time.

The exact effect is what scores estimate, with the same sign: positive where the clean value along
the edge raises the metric. Of an edge u -> v, with everything else as it is:

    noising      metric(clean run) - metric(clean run in which v reads u's ablated value)
    denoising    metric(corrupt run in which v reads u's clean value) - metric(corrupt run)

Patching one edge changes nothing before its reader, so what the reader gets is known beforehand:
the stream of the whole run, less or plus the difference of u's two values. Many edges share a
forward pass, each with copies of all prompts of its own:

1. Run clean and corrupt prompts once, and take the writers' differences (`difference`).
2. Repeat the prompts for each edge of a group, and put norm and projection of the patched stream
   in the place of the model's own at its reader (`_Group.hooks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import CircuitError
from ..models.graph import Graph
from ..models.hook_points import Hook, Recorder
from ..models.hooked import AnyModel
from ..models.stream import Stream, widen
from ..tasks.pairs import Batch, PairSet
from ..utils.distributed import shard, sum_over_processes
from ..utils.ranges import entrance
from .ablation import ABLATIONS, Edges, Rebuilder, check_exact
from .metrics import Logits, Metric, get_metric

Seen = dict[str, Tensor]
"""What passed some hook points."""


@torch.no_grad()
def difference(
    stream: Stream,
    clean: Seen,
    corrupt: Seen,
    rows: Bool[Tensor, "batch pos"],
    ablation: str = "corrupt",
    means: list[Tensor] | None = None,
    layers: range | None = None,
) -> Float[Tensor, "writers tokens d_model"]:
    """What each writer adds at some tokens in the clean run beyond its ablated value.

    Arguments:
        stream: of the model.
        clean: what passed the hook points of all writers in the clean run.
        corrupt: the same of the corrupt run.
        rows: True at the tokens that are taken.
        ablation: ``corrupt``, ``mean`` or ``zero``.
        means: with ``mean``, see `Rebuilder.means`.
        layers: whose writers are taken; default: all. The first brings the input with it.
    """
    layers = range(stream.n_layers) if layers is None else layers
    writers = layers_writers(stream, layers)

    def flat(run: Seen, name: str) -> Float[Tensor, "tokens ..."]:
        return widen(run[name])[rows]

    swap = ablation == "corrupt"
    first = flat(clean, stream.input)
    first = first - flat(corrupt, stream.input) if swap else first
    out = first.new_empty(len(writers), *first.shape)
    at = 0
    if writers.start == 0:
        out[0], at = first, 1
    for i in layers:
        heads, mlp = out[at : at + stream.n_heads], out[at + stream.n_heads]
        z, out_at = stream.z(i), stream.mlp_out(i)
        if not swap or hasattr(stream.blocks[i], "ln1_post"):  # then no share is linear in z
            heads.copy_(stream.head_writes(i, flat(clean, z)))
            if swap:
                heads -= stream.head_writes(i, flat(corrupt, z))
        else:
            heads.copy_(stream.head_writes(i, flat(clean, z) - flat(corrupt, z)))
        mlp_in = flat(clean, out_at)
        mlp.copy_(stream.mlp_write(i, mlp_in - flat(corrupt, out_at) if swap else mlp_in))
        at += stream.n_heads + 1
    if means is not None:
        position = rows.nonzero()[:, 1].to(out.device)
        every = torch.cat([rearrange(m, "... pos d -> (...) pos d") for m in means])
        out -= every[writers.start : writers.stop, position]
    return out


def layers_writers(stream: Stream, layers: range) -> range:
    """The writers of some layers; the first layer brings the input with it."""
    first, last = (1 + i * (stream.n_heads + 1) for i in (layers.start, layers.stop))
    return range(first if layers.start else 0, last)


def difference_inside(
    stream: Stream,
    clean: dict[str, Tensor],
    corrupt: dict[str, Tensor],
    rows: Bool[Tensor, "batch pos"],
) -> dict[str, Float[Tensor, "tokens _"]]:
    """Clean minus corrupt of z and the neurons at each real token, by hook point."""
    out = {}
    for i in range(stream.n_layers):
        if hasattr(stream.blocks[i], "ln1_post"):
            raise CircuitError(
                f"{stream.model.name} has norms behind its components, so that a neuron's share "
                "of the write is not defined. Score edges or nodes."
            )
        for n in (stream.z(i), stream.neurons(i)):
            out[n] = (widen(clean[n]) - widen(corrupt[n])).flatten(2)[rows]
    return out


@dataclass(frozen=True)
class _Clean:
    """One batch before anything is patched."""

    batch: Batch
    tokens: Tensor
    """Of the run into which edges are patched."""
    last: Tensor
    """Index of the last real token of each of its rows."""
    clean_logits: Logits
    whole: float
    """Summed metric of that run."""
    streams: Seen
    """What is read in that run, by hook point."""
    change: Float[Tensor, "writers batch pos d_model"]
    """What an edge carries once it is patched, less what it carries in that run."""


@torch.no_grad()
def _prepare(
    stream: Stream,
    batch: Batch,
    metric: Metric,
    denoise: bool,
    ablation: str,
    means: list[Tensor] | None,
) -> _Clean:
    """The runs of a batch that all its edges share."""
    layers = range(stream.n_layers)
    reads = [n for i in layers for n in (stream.before_attention(i), stream.before_mlp(i))]
    names = list(dict.fromkeys([*stream.writers(), *reads, stream.final]))
    seen, logits = [], []
    ends = [(batch.clean, batch.last), (batch.corrupt, batch.corrupt_last)]
    for tokens, last in ends:
        recorder = Recorder()
        with stream.hooked(recorder.on(names)):
            logits.append(stream.logits(tokens, last))
        seen.append({n: recorder[n] for n in names})
    tokens, last = ends[int(denoise)]
    clean, corrupt = seen
    if denoise:
        clean = {n: batch.as_corrupt(value) for n, value in clean.items()}
    else:
        corrupt = {n: batch.as_clean(value) for n, value in corrupt.items()}
    every = torch.ones_like(tokens, dtype=torch.bool)
    change = difference(stream, clean, corrupt, every, ablation, means)
    change = rearrange(change, "w (batch pos) d -> w batch pos d", batch=len(batch))
    return _Clean(
        batch=batch,
        tokens=tokens,
        last=last,
        clean_logits=logits[0],
        whole=metric(logits[int(denoise)], batch, logits[0]).sum().item(),
        streams={n: seen[int(denoise)][n] for n in (*reads, stream.final)},
        change=change if denoise else -change,
    )


@dataclass(frozen=True)
class _Group:
    """Some edges that are patched in one forward pass, each in prompts of its own."""

    stream: Stream
    base: _Clean
    edges: list[tuple[int, int]]
    """Row and column."""

    def patched(self, k: int, name: str) -> Float[Tensor, "batch pos d_model"]:
        """The stream that the reader of the k-th edge gets."""
        return widen(self.base.streams[name]) + self.base.change[self.edges[k][0]]

    def rows(self, k: int) -> slice:
        """The prompts of the k-th edge."""
        n = len(self.base.batch)
        return slice(k * n, (k + 1) * n)

    def hooks(self) -> list[tuple[str, Hook]]:
        """One for each place where an edge of the group is read."""
        places: dict[tuple[str, int], list[int]] = {}
        for k, (_, column) in enumerate(self.edges):
            reader = self.stream.graph.readers[column]
            places.setdefault((reader.kind, reader.layer), []).append(k)
        out: list[tuple[str, Hook]] = []
        for (kind, layer), those in places.items():
            if kind == "logits":
                out.append((self.stream.final, self._whole(those, lambda x: x, self.stream.final)))
            elif kind == "mlp":
                norm, name = self.stream.norm(layer, mlp=True), self.stream.before_mlp(layer)
                out.append((self.stream.mlp_in(layer), self._whole(those, norm, name)))
            else:
                out.append((self.stream.projected(layer, kind), self._head(those, kind, layer)))
        return out

    def _whole(self, those: list[int], norm: Callable[[Tensor], Tensor], name: str) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            for k in those:
                value[self.rows(k)] = norm(self.patched(k, name)).to(value.dtype)
            return value

        return hook_fn

    def _head(self, those: list[int], kind: str, layer: int) -> Hook:
        reading = next(r for r in self.stream.readings(layer) if r.kind == kind)
        norm, name = self.stream.norm(layer, mlp=False), self.stream.before_attention(layer)

        def hook_fn(value: Tensor, hook: object) -> Tensor:
            heads = value.reshape(*value.shape[:2], len(reading.weight), -1).clone()
            for k in those:
                h = self.stream.graph.readers[self.edges[k][1]].head
                normed = norm(self.patched(k, name))
                out = einsum(normed, reading.weight[h], "batch pos d, c d -> batch pos c")
                out = out if reading.bias is None else out + reading.bias[h]
                heads[self.rows(k), :, h] = out.to(value.dtype)
            return heads.reshape(value.shape)

        return hook_fn

    @torch.no_grad()
    def run(self, metric: Metric) -> list[float]:
        """The summed metric with each edge patched."""
        base, n = self.base, len(self.edges)
        with self.stream.hooked(self.hooks()):
            logits = self.stream.logits(base.tokens.repeat(n, 1), base.last.repeat(n))
        each = logits.split(len(base.batch))
        return [metric(x, base.batch, base.clean_logits).sum().item() for x in each]


def _places(graph: Graph, edges: Edges | Sequence[tuple[str, str]] | None) -> Edges:
    """The edges asked for as booleans."""
    if edges is None:
        return graph.exists
    if isinstance(edges, np.ndarray):
        if edges.shape != graph.exists.shape:
            raise CircuitError(
                f"edges: got shape {list(edges.shape)}, expected {list(graph.exists.shape)}, such "
                "as circuit.edges of this model."
            )
        chosen = edges & graph.exists
    else:
        chosen = np.zeros_like(graph.exists)
        for edge in edges:
            if not isinstance(edge, (tuple, list)) or len(edge) != 2:
                raise CircuitError(
                    f"edges: got {edge!r:.80}, expected ids of writer and reader, such as "
                    '("a0.h1", "m3").'
                )
            chosen[graph.edge(*edge)] = True
    if not chosen.any():
        raise CircuitError("No edge to patch: give at least one that exists in this model.")
    return chosen


@entrance(CircuitError)
def patch_edges(
    model: AnyModel,
    pairs: PairSet,
    edges: Edges | Sequence[tuple[str, str]] | None = None,
    *,
    direction: Literal["noising", "denoising"] = "noising",
    metric: Metric | str = "logit_diff",
    ablation: str = "corrupt",
    batch_size: int = 64,
    on_step: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "writers readers"]:
    """The exact effect of patching each edge alone: what `attribute` estimates.

    It takes about pairs x edges / ``batch_size`` forward passes; ``on_step`` is told their number
    before the first.

    Arguments:
        model: from `load_model`, or a HookedTransformer.
        pairs: all of them are used.
        edges: ids of writer and reader, such as ``("a0.h1", "m3")``, or booleans such as
            ``circuit.edges``; default: all edges.
        direction: ``noising`` ablates the edge in the clean run, ``denoising`` restores it in the
            corrupt run.
        metric: name, or a function as in `attribute`.
        ablation: what an ablated edge carries: ``corrupt``, ``mean`` or ``zero`` (see `Ablation`);
            the last two have no run to denoise.
        batch_size: prompts per forward pass, pairs times edges; changes memory and speed, not the
            result.
        on_step: called with (passes done, passes in all).

    Returns:
        Mean effects over the pairs in units of the metric, positive: the clean value along the edge
        raises it. NaN where nothing was patched: at edges that were not asked for, and where the
        graph has no edge. `numpy.nan_to_num` makes a ranking of it that has them last.

    Raises:
        CircuitError: an unknown edge, direction or ablation, or a model that cannot be rebuilt
            exactly.
    """
    if batch_size < 1:
        raise CircuitError(f"batch_size must be at least 1; got {batch_size}.")
    if ablation not in ABLATIONS:
        raise CircuitError(
            f"Unknown ablation {ablation!r}; expected one of {', '.join(ABLATIONS)}."
        )
    denoise = direction == "denoising"
    if denoise and ablation != "corrupt":
        raise CircuitError(
            "direction='denoising' restores edges in the corrupt run, so that "
            f"ablation={ablation!r} has no meaning; give ablation='corrupt'."
        )
    rebuilder, function = Rebuilder(model), get_metric(metric)
    stream = rebuilder.stream
    chosen = _places(stream.graph, edges)
    check_exact(rebuilder, pairs)
    means = rebuilder.means(pairs, batch_size) if ablation == "mean" else None
    places = [(int(i), int(j)) for j, i in np.argwhere(chosen.T)]  # a reader's edges together
    mine = shard(pairs.pairs)
    parts = list(PairSet(pairs.name, mine).batches(batch_size, stream.model.device)) if mine else []
    groups = [max(1, batch_size // len(batch)) for batch in parts]
    passes, done = sum(-(-len(places) // n) for n in groups), 0
    total = torch.zeros(chosen.shape, dtype=torch.float64)
    if on_step:
        on_step(0, passes)
    for batch, n in zip(parts, groups, strict=True):
        base = _prepare(stream, batch, function, denoise, ablation, means)
        for start in range(0, len(places), n):
            group = _Group(stream, base, places[start : start + n])
            for (i, j), value in zip(group.edges, group.run(function), strict=True):
                total[i, j] += value - base.whole if denoise else base.whole - value
            done += 1
            if on_step:
                on_step(done, passes)
    sum_over_processes(total)
    if not total.isfinite().all():
        raise CircuitError(f"{stream.model.name}: the metric is not finite on these prompts.")
    return np.where(chosen, total.numpy() / len(pairs), np.nan)
