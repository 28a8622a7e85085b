"""Exact ablation of all edges outside a circuit, and whether a model can be rebuilt exactly.

1. Run the ablated prompts once and record what every writer adds there (`Base`).
2. For a circuit, run the clean prompts and rebuild each reader's residual input from the writers so
   far: the ablated stream, plus what the writers with an edge to this reader add beyond their
   ablated value (`_Rebuilt.read`).
3. Put the norm and the projection of that input in the place of the model's own
   (`Rebuilder.logits`), reader by reader; what the component then writes is what the next readers
   get.

Nothing is approximated: the full circuit gives the clean run, the empty one the ablated run. Before
a model is attributed or ablated, `check_exact` tries just that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import CircuitError
from ..models.hook_points import Hook, Recorder
from ..models.hooked import AnyModel, open_stream
from ..models.hugging_face import check_tokens
from ..models.stream import Reading, Stream, widen
from ..tasks.pairs import Batch, PairSet, collate
from ..utils.distributed import shard, sum_over_processes
from ..utils.ranges import entrance, expect_kind
from .metrics import Metric, get_metric

ABLATIONS = ("corrupt", "mean", "zero")
"""What an edge outside the circuit may carry."""

Edges = Bool[np.ndarray, "writers readers"]


@dataclass
class Base:
    """What the writers add in the ablated run, for one batch."""

    batch: Batch
    input: Float[Tensor, "#batch #pos d_model"]
    heads: list[Callable[[], Tensor]]
    """By layer: ``[heads, batch, pos, d_model]``, made when asked for."""
    mlps: list[Float[Tensor, "#batch #pos d_model"]]
    clean_logits: Float[Tensor, "batch vocab"]


class Rebuilder:
    """Runs of a model in which every reader's input is rebuilt from the writers.

    Arguments:
        model: a `LanguageModel` or HookedTransformer.

    Raises:
        CircuitError: see `Stream`.
    """

    def __init__(self, model: AnyModel) -> None:
        self.stream = open_stream(model)
        self.graph = self.stream.graph

    @torch.no_grad()
    def writes(self, batch: Batch) -> dict[str, Tensor]:
        """What passes the hook points of all writers in the corrupt run of a batch."""
        recorder = Recorder()
        with self.stream.hooked(recorder.on(self.stream.writers())):
            self.stream.logits(batch.corrupt, batch.last)
        return {n: recorder[n] for n in self.stream.writers()}

    @torch.no_grad()
    def base(self, batch: Batch, ablation: str, means: list[Tensor] | None) -> Base:
        """What the writers add in a batch's ablated run.

        Arguments:
            batch: clean and corrupt prompts.
            ablation: ``corrupt``, ``mean`` or ``zero``.
            means: with ``mean``, the mean writes by position.
        """
        stream = self.stream
        clean = stream.logits(batch.clean, batch.last)
        if ablation == "corrupt":
            seen = self.writes(batch)
            heads = [
                lambda i=i: stream.head_writes(i, seen[stream.z(i)]) for i in range(stream.n_layers)
            ]
            mlps = [stream.mlp_write(i, seen[stream.mlp_out(i)]) for i in range(stream.n_layers)]
            return Base(batch, widen(seen[stream.input]), heads, mlps, clean)
        width = batch.clean.shape[1]
        if means is None:
            none = torch.zeros(1, 1, 1, 1, device=stream.model.device)
            values = [none[0], *(v for _ in range(stream.n_layers) for v in (none, none[0]))]
        else:
            values = [m[..., :width, :] for m in means]
        return Base(
            batch,
            values[0],
            [lambda v=v: v for v in values[1::2]],
            values[2::2],
            clean,
        )

    @torch.no_grad()
    def means(self, pairs: PairSet, batch_size: int) -> list[Tensor]:
        """Mean write at each position over the corrupt prompts that reach it, in the order of
        `Stream.writers`: ``[1, pos, d_model]``, for heads ``[heads, 1, pos, d_model]``."""
        longest = max(len(p.corrupt) for p in pairs)
        total: dict[str, Tensor] = {}
        count = torch.zeros(longest, device=self.stream.model.device)
        writes_at: dict[str, Callable[[Tensor], Tensor]] = {self.stream.input: widen}
        for i in range(self.stream.n_layers):
            writes_at[self.stream.z(i)] = partial(self.stream.head_writes, i)
            writes_at[self.stream.mlp_out(i)] = partial(self.stream.mlp_write, i)
        for batch in pairs.batches(batch_size, count.device):
            real = batch.real
            count[: real.shape[1]] += real.sum(0)
            for name, seen in self.writes(batch).items():
                weighed = widen(writes_at[name](seen)) * real[..., None]
                summed = weighed.sum(-3, keepdim=True)
                if name not in total:
                    total[name] = summed.new_zeros(*summed.shape[:-2], longest, summed.shape[-1])
                total[name][..., : summed.shape[-2], :] += summed
        names = self.stream.writers()
        return [total[n] / count[:, None].clamp_min(1) for n in names]

    @torch.no_grad()
    def logits(self, base: Base, edges: Edges) -> Float[Tensor, "batch vocab"]:
        """Last-position logits of the clean run of one batch with every edge outside ablated."""
        stream, graph = self.stream, self.graph
        keep = torch.from_numpy(edges & graph.exists).to(stream.model.device)
        state = _Rebuilt(keep, len(graph.writers))
        hooks: list[tuple[str, Hook]] = [(stream.input, self._input(state, base))]
        for i in range(stream.n_layers):
            column = i * graph.readers_per_layer
            for reading in stream.readings(i):
                hooks.append(
                    (stream.projected(i, reading.kind), self._projection(state, i, column, reading))
                )
                column += len(reading.weight)
            hooks.append((stream.z(i), self._heads(state, base, i)))
            hooks.append((stream.mlp_in(i), self._mlp_in(state, i, column)))
            hooks.append((stream.mlp_out(i), self._mlp_out(state, base, i)))
        hooks.append((stream.final, lambda value, hook: state.read(-1, 1)[0].to(value.dtype)))
        with stream.hooked(hooks):
            return stream.logits(base.batch.clean, base.batch.last)

    def _input(self, state: _Rebuilt, base: Base) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> None:
            state.start(widen(value), base.input)

        return hook_fn

    def _projection(self, state: _Rebuilt, layer: int, column: int, reading: Reading) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> Tensor:
            inputs = state.read(column, len(reading.weight))
            normed = self.stream.norm(layer, mlp=False)(inputs)
            pattern = "heads batch pos d, heads c d -> batch pos heads c"
            out = einsum(normed, reading.weight, pattern)
            if reading.bias is not None:
                out = out + reading.bias
            return out.reshape(value.shape).to(value.dtype)

        return hook_fn

    def _heads(self, state: _Rebuilt, base: Base, layer: int) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> None:
            state.before_heads = state.base
            state.write(self.stream.head_writes(layer, value), base.heads[layer]())
            bias = self.stream.output_bias(layer)
            if bias is not None:
                state.base = state.base + bias

        return hook_fn

    def _mlp_in(self, state: _Rebuilt, layer: int, column: int) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> Tensor:
            parallel = self.stream.parallel
            written = state.written - (self.stream.n_heads if parallel else 0)
            base = state.before_heads if parallel else state.base
            inputs = state.read(column, 1, written, base)[0]
            return self.stream.norm(layer, mlp=True)(inputs).to(value.dtype)

        return hook_fn

    def _mlp_out(self, state: _Rebuilt, base: Base, layer: int) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> None:
            state.write(self.stream.mlp_write(layer, value)[None], base.mlps[layer][None])

        return hook_fn


class Ablation(Rebuilder):
    """A model in which all edges outside a circuit are ablated, on fixed pairs.

    What does not depend on the circuit is computed once, so that many circuits are cheap to try. An
    instance is a function of the circuit's edges: the mean metric over the pairs.

    Arguments:
        model: a `LanguageModel` or HookedTransformer.
        pairs: clean and corrupt prompts.
        metric: name, or a function as in `attribute`.
        ablation: what an edge outside carries: ``corrupt`` (its value in the corrupt run),
            ``mean`` (its mean over the corrupt prompts at the same position) or ``zero``.
        batch_size: pairs per forward pass; changes memory and speed, not the result.

    Raises:
        CircuitError: unknown ablation, a model that cannot be rebuilt exactly, or a metric that is
            the same for the full and the empty circuit.
    """

    @entrance(CircuitError)
    def __init__(
        self,
        model: AnyModel,
        pairs: PairSet,
        *,
        metric: Metric | str = "logit_diff",
        ablation: str = "corrupt",
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise CircuitError(f"batch_size must be at least 1; got {batch_size}.")
        if ablation not in ABLATIONS:
            raise CircuitError(
                f"Unknown ablation {ablation!r}; expected one of {', '.join(ABLATIONS)}."
            )
        super().__init__(model)
        check_exact(self, pairs)
        self.metric = get_metric(metric)
        self.n_pairs = len(pairs)
        mine = shard(pairs.pairs)
        device = self.stream.model.device
        batches = list(PairSet(pairs.name, mine).batches(batch_size, device)) if mine else []
        means = self.means(pairs, batch_size) if ablation == "mean" else None
        self.bases = [self.base(b, ablation, means) for b in batches]
        self._ends: tuple[float, float] | None = None

    def __call__(self, edges: Edges) -> float:
        """Mean metric over the pairs, with everything outside ``edges`` ablated."""
        expect_kind(CircuitError, "edges", edges, np.ndarray)
        if edges.shape != self.graph.exists.shape or edges.dtype != bool:
            raise CircuitError(
                f"edges: got {edges.dtype} of shape {list(edges.shape)}, expected booleans of "
                f"shape {list(self.graph.exists.shape)}, such as circuit.edges of this model."
            )
        total = torch.zeros(1, dtype=torch.float64)
        for base in self.bases:
            logits = self.logits(base, edges)
            total += self.metric(logits, base.batch, base.clean_logits).sum().item()
        return float(sum_over_processes(total)) / self.n_pairs

    @property
    def ends(self) -> tuple[float, float]:
        """Metric of the full and of the empty circuit."""
        if self._ends is None:
            exists = self.graph.exists
            full, empty = self(exists), self(np.zeros_like(exists))
            if not abs(full - empty) > 1e-6:
                raise CircuitError(
                    f"The metric is {full:.4g} with the full circuit and {empty:.4g} with none: "
                    "nothing to explain. Clean and corrupt prompts must differ in the answer."
                )
            self._ends = full, empty
        return self._ends

    @entrance(CircuitError)
    def faithfulness(self, edges: Edges) -> float:
        """0 for the empty circuit, 1 for the full one; may lie outside [0, 1]."""
        full, empty = self.ends
        return (self(edges) - empty) / (full - empty)


# Relative to the size of what is compared. Runs in half precision differ by its rounding alone.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
ROUTED = 0.1
"""The same for logits of a mixture of experts: a rebuilt input that differs in its last bit may be
sent to another expert."""


@torch.no_grad()
def check_exact(rebuilder: Rebuilder, pairs: PairSet) -> None:
    """Raise CircuitError unless a model is rebuilt exactly; one pair is run some times for it.

    1. The hooked copy must give the model's own logits.
    2. At each reader, the writes so far must add up to the stream.
    3. With all edges the rebuilt clean run must give the clean logits, with none the corrupt ones.

    Arguments:
        rebuilder: of the model.
        pairs: of which the longest is taken.
    """
    stream = rebuilder.stream
    name, tolerance = stream.model.name, TOLERANCE.get(stream.dtype, 0.2)
    longest = max(pairs, key=lambda p: len(p.clean))
    tokens = {t for p in pairs for t in (*p.clean, *p.corrupt, *p.choices, p.counterfactual)}
    check_tokens(name, stream.model.sizes, min(tokens), max(tokens), len(longest.clean))
    batch = collate([longest], stream.model.device)

    def compare(what: str, found: Tensor, real: Tensor, most: float) -> None:
        if not real.isfinite().all():
            raise CircuitError(f"{name}: the model's logits are not finite on these prompts.")
        off = float((found - real).norm() / (real - real.mean()).norm().clamp_min(1e-12))
        if not off <= most:
            raise CircuitError(
                f"{name}: {what} by {off:.2g} of their size; at most {most:g} is rounding. "
                "What this architecture computes is not known in full, so attribution would be "
                "wrong: it is refused."
            )

    both = torch.cat([batch.clean, batch.corrupt]), torch.cat([batch.last, batch.last])
    real = stream.own_logits(*both).split(1)
    base = rebuilder.base(batch, "corrupt", None)
    exists, hooked = stream.graph.exists, base.clean_logits
    compare("TransformerLens' copy of it differs in its logits", hooked, real[0], tolerance)
    _check_sums(stream, batch, tolerance)
    most = ROUTED if stream.model.routed else tolerance
    for kept, run, edges, logits in (
        ("all edges", "clean", exists, real[0]),
        ("no edge", "corrupt", np.zeros_like(exists), real[1]),
    ):
        what = f"rebuilt with {kept}, the {run} run differs in its logits"
        compare(what, rebuilder.logits(base, edges), logits, most)


def _check_sums(stream: Stream, batch: Batch, tolerance: float) -> None:
    """Raise CircuitError unless the writes add up to the stream at each place where it is read."""
    layers = range(stream.n_layers)
    reads = [n for i in layers for n in (stream.before_attention(i), stream.before_mlp(i))]
    recorder = Recorder()
    names = list(dict.fromkeys([*stream.writers(), *reads, stream.final]))
    with stream.hooked(recorder.on(names)):
        stream.logits(batch.clean, batch.last)
    total = widen(recorder[stream.input])

    def compare(at: str, where: str) -> None:
        seen = widen(recorder[at])
        off = float(((total - seen).norm(dim=-1) / seen.norm(dim=-1).clamp_min(1e-12)).max())
        if not off <= tolerance / 5:
            raise CircuitError(
                f"{stream.model.name}: {where}, the stream differs by {off:.2g} of its size from "
                "the sum of what the embedding, heads and MLPs were seen to add. Something else "
                "adds to it or scales it, so attribution would be wrong: it is refused."
            )

    for i in layers:
        compare(stream.before_attention(i), f"before layer {i}")
        heads = stream.head_writes(i, recorder[stream.z(i)]).sum(0)
        bias = stream.output_bias(i)
        heads = heads if bias is None else heads + bias
        total = total + heads
        if not stream.parallel:
            compare(stream.before_mlp(i), f"after the attention of layer {i}")
        total = total + stream.mlp_write(i, recorder[stream.mlp_out(i)])
    compare(stream.final, "before the final norm")


class _Rebuilt:
    """The stream as it is being rebuilt: what each writer adds now beyond its ablated value."""

    def __init__(self, keep: Bool[Tensor, "writers readers"], n_writers: int) -> None:
        self.keep, self.n_writers, self.written = keep, n_writers, 0
        self.base = self.before_heads = torch.empty(0)

    def start(self, value: Float[Tensor, "batch pos d"], base: Tensor) -> None:
        """The input writes first."""
        self.change = value.new_empty(self.n_writers, *value.shape)
        self.base = torch.zeros_like(value)
        self.write(value[None], base[None])

    def write(self, values: Float[Tensor, "n batch pos d"], base: Tensor) -> None:
        """Some writers write; the ablated stream goes on with their ablated value."""
        self.change[self.written : self.written + len(values)] = values - base
        self.written += len(values)
        self.base = self.base + base.sum(0)

    def read(
        self, column: int, n: int, written: int | None = None, base: Tensor | None = None
    ) -> Float[Tensor, "n batch pos d"]:
        """What ``n`` readers from a column on see."""
        if not self.written:
            raise CircuitError(
                "A reader runs before the embedding writes: one module is used in two places. This "
                "architecture is not supported."
            )
        at = slice(column, column + n) if column >= 0 else slice(-1, None)
        weights = self.keep[: self.written if written is None else written, at]
        live = weights.any(1).nonzero()[:, 0]
        base = self.base if base is None else base
        pattern = "writers n, writers batch pos d -> n batch pos d"
        change = self.change[live]
        return base + einsum(weights[live].to(change.dtype), change, pattern)
