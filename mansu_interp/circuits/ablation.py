"""Exact ablation of all edges outside a circuit, and whether a model can be rebuilt exactly.

1. Run the ablated prompts once and record what every writer adds there (`rebuilt.Base`).
2. For a circuit, run the clean prompts and rebuild each reader's residual input from the writers so
   far: the ablated stream, plus what the writers with an edge to this reader add beyond their
   ablated value (`rebuilt.Rebuilt.read`). A reader without an edge reads the ablated stream, whose
   projection is the same for all.
3. Put the norm and the projection of that input in the place of the model's own
   (`Rebuilder.run`), reader by reader; what the component then writes is what the next readers
   get. Several circuits run in one pass, as further rows of the batch.

Nothing is approximated: the full circuit gives the clean run, the empty one the ablated run. Before
a model is attributed or ablated, `check_exact` tries just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from .search.rebuilt import Base, Rebuilt, ablated_streams

ABLATIONS = ("corrupt", "mean", "zero")
"""What an edge outside the circuit may carry."""
TOKENS = 1024
"""Tokens per pass, at most, where several circuits are tried at once."""

Edges = Bool[np.ndarray, "writers readers"]


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
        """What passes the hook points of all writers in the corrupt run of a batch, at the
        positions of the clean prompts."""
        recorder = Recorder()
        with self.stream.hooked(recorder.on(self.stream.writers())):
            self.stream.logits(batch.corrupt, batch.corrupt_last)
        return {n: batch.as_clean(recorder[n]) for n in self.stream.writers()}

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
            base = Base(batch, widen(seen[stream.input]), heads, mlps, clean)
        else:
            width = batch.clean.shape[1]
            if means is None:
                none = torch.zeros(1, 1, 1, 1, device=stream.model.device)
                values = [none[0], *(v for _ in range(stream.n_layers) for v in (none, none[0]))]
            else:
                values = [m[..., :width, :] for m in means]
            heads = [lambda v=v: v for v in values[1::2]]
            base = Base(batch, values[0], heads, values[2::2], clean)
        base.streams = list(ablated_streams(stream, base))
        return base

    @torch.no_grad()
    def means(self, pairs: PairSet, batch_size: int) -> list[Tensor]:
        """Mean write over the corrupt prompts at each position (of the clean ones), in the order
        of `Stream.writers`: ``[1, pos, d_model]``, for heads ``[heads, 1, pos, d_model]``."""
        longest = max(len(p.clean) for p in pairs)
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
        return self.run(base, Rebuilt(base, edges[None] & self.graph.exists))[0]

    def run(self, base: Base, state: Rebuilt) -> Float[Tensor, "circuits batch vocab"]:
        """The same of several circuits in one pass."""
        stream, n = self.stream, len(state.keep)
        hooks: list[tuple[str, Hook]] = [(stream.input, self._input(state))]
        for i in range(stream.n_layers):
            column = i * self.graph.readers_per_layer
            for reading in stream.readings(i):
                hooks.append(
                    (stream.projected(i, reading.kind), self._projection(state, i, column, reading))
                )
                column += len(reading.weight)
            hooks.append((stream.z(i), self._heads(state, i)))
            hooks.append((stream.mlp_in(i), self._mlp_in(state, i, column)))
            hooks.append((stream.mlp_out(i), self._mlp_out(state, i)))
        hooks.append((stream.final, self._final(state)))
        tokens, last = base.batch.clean, base.batch.last
        with stream.hooked(hooks):
            return stream.logits(tokens.repeat(n, 1), last.repeat(n)).unflatten(0, (n, -1))

    def _input(self, state: Rebuilt) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> None:
            state.write(widen(value)[None], state.base.input[None])

        return hook_fn

    def _projection(self, state: Rebuilt, layer: int, column: int, reading: Reading) -> Hook:
        name, stream = self.stream.projected(layer, reading.kind), 2 * layer
        heads = list(range(len(reading.weight)))
        live = [h for h in heads if state.reads[column + h]]

        def project(inputs: Tensor, rows: list[int]) -> Tensor:
            normed = self.stream.norm(layer, mlp=False)(inputs)
            pattern = "heads ... pos d, heads c d -> ... pos heads c"
            out = einsum(normed, reading.weight[rows], pattern)
            return out if reading.bias is None else out + reading.bias[rows]

        def hook_fn(value: Tensor, hook: object) -> Tensor:
            known = state.base.projected
            if name not in known:
                ablated = state.base.streams[stream]
                known[name] = project(ablated.expand(len(heads), *ablated.shape), heads).detach()
            out = known[name].expand(*state.shape, value.shape[1], -1, -1)
            if live:
                found = project(state.read([column + h for h in live], stream), live)
                out = out.index_copy(-2, torch.tensor(live, device=value.device), found)
            return out.reshape(value.shape).to(value.dtype)

        return hook_fn

    def _heads(self, state: Rebuilt, layer: int) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> None:
            n = self.stream.n_heads
            if any(state.writes[len(state.changes) :][:n]):
                state.write(self.stream.head_writes(layer, value), state.base.heads[layer]())
            else:
                state.changes += [None] * n

        return hook_fn

    def _mlp_in(self, state: Rebuilt, layer: int, column: int) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> Tensor:
            written = len(state.changes) - (self.stream.n_heads if self.stream.parallel else 0)
            inputs = state.read([column], 2 * layer + 1, written)[0]
            return self.stream.norm(layer, mlp=True)(inputs).reshape(value.shape).to(value.dtype)

        return hook_fn

    def _mlp_out(self, state: Rebuilt, layer: int) -> Hook:
        def hook_fn(value: Tensor, hook: object) -> None:
            write = self.stream.mlp_write(layer, value)
            state.write(write[None], state.base.mlps[layer][None])

        return hook_fn

    def _final(self, state: Rebuilt) -> Hook:
        column = len(self.graph.readers) - 1
        return lambda value, hook: state.read([column], -1)[0].reshape(value.shape).to(value.dtype)


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
        return self.many([edges])[0]

    @torch.no_grad()
    def many(self, circuits: Sequence[Edges]) -> list[float]:
        """The same of several circuits, some of them in each pass; values differ from those of
        single calls by rounding."""
        for edges in circuits:
            self._check_edges(edges)
        total = torch.zeros(len(circuits), dtype=torch.float64)
        for base in self.bases:
            size = max(1, TOKENS // base.batch.clean.numel())
            for at in range(0, len(circuits), size):
                keep = np.stack(circuits[at : at + size]) & self.graph.exists
                for k, logits in enumerate(self.run(base, Rebuilt(base, keep))):
                    total[at + k] += self.metric(logits, base.batch, base.clean_logits).sum().item()
        return (sum_over_processes(total) / self.n_pairs).tolist()

    def gradient(self, edges: Edges) -> Float[np.ndarray, "writers readers"]:
        """Derivative of the mean metric by the weight of every edge, at this circuit.

        An edge has weight 1 inside the circuit and 0 outside. Its derivative is the change that its
        writer makes here, times the gradient at its reader's input: exact at the circuit, from one
        backward pass, and a first-order estimate of what adding or removing the edge does.

        Returns:
            In metric units; positive: the edge supports the answer. 0 where no edge exists.
        """
        self._check_edges(edges)
        total = torch.zeros(edges.shape, dtype=torch.float64)
        for base in self.bases:
            state = Rebuilt(base, edges[None] & self.graph.exists, probe=True)
            with torch.enable_grad():
                logits = self.run(base, state)[0]
                value = self.metric(logits, base.batch, base.clean_logits).sum()
                total += state.derivatives(value)
        return (sum_over_processes(total) / self.n_pairs).numpy() * self.graph.exists

    def _check_edges(self, edges: Edges) -> None:
        expect_kind(CircuitError, "edges", edges, np.ndarray)
        if edges.shape != self.graph.exists.shape or edges.dtype != bool:
            raise CircuitError(
                f"edges: got {edges.dtype} of shape {list(edges.shape)}, expected booleans of "
                f"shape {list(self.graph.exists.shape)}, such as circuit.edges of this model."
            )

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
    3. With all edges the rebuilt run must give the clean logits; with none the corrupt ones, and
       what the first heads, before any router, write there.

    Arguments:
        rebuilder: of the model.
        pairs: of which the longest is taken, with as many tokens in both prompts.
    """
    stream = rebuilder.stream
    name, tolerance = stream.model.name, TOLERANCE.get(stream.dtype, 0.2)
    longest = max(pairs, key=lambda p: len(p.clean))
    tokens = {t for p in pairs for t in (*p.clean, *p.corrupt, *p.choices, p.counterfactual)}
    positions = max(len(longest.clean), *(len(p.corrupt) for p in pairs))
    check_tokens(name, stream.model.sizes, min(tokens), max(tokens), positions)
    batch = collate([replace(longest, corrupt=longest.aligned)], stream.model.device)

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
    most, z, seen = ROUTED if stream.model.routed else tolerance, stream.z(0), Recorder()
    for kept, run, edges, logits in (
        ("all edges", "clean", exists, real[0]),
        ("no edge", "corrupt", np.zeros_like(exists), real[1]),
    ):
        what = f"rebuilt with {kept}, the {run} run differs in its logits"
        with stream.hooked(seen.on([z])):
            compare(what, rebuilder.logits(base, edges), logits, most)
    what = "rebuilt with no edge, heads read something beside q, k and v: the first differ"
    compare(what, stream.head_writes(0, seen[z]), base.heads[0](), tolerance)


def _check_sums(stream: Stream, batch: Batch, tolerance: float) -> None:
    """Raise CircuitError unless the writes add up to the stream at each place where it is read."""
    layers = range(stream.n_layers)
    reads = [n for i in layers for n in (stream.before_attention(i), stream.before_mlp(i))]
    recorder = Recorder()
    names = list(dict.fromkeys([*stream.writers(), *reads, stream.final]))
    with stream.hooked(recorder.on(names)):
        stream.logits(batch.clean, batch.last)
    total = widen(recorder[stream.input])
    # Each sum is rounded in proportion to what the stream is then: where a large write is taken
    # back later, what it rounded away stays.
    largest = total.norm(dim=-1).clamp_min(1e-12)

    def compare(at: str, where: str) -> None:
        nonlocal largest
        seen = widen(recorder[at])
        largest = torch.maximum(largest, seen.norm(dim=-1))
        off = float(((total - seen).norm(dim=-1) / largest).max())
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
        total = total + (heads if bias is None else heads + bias)
        if not stream.parallel:
            compare(stream.before_mlp(i), f"after the attention of layer {i}")
        total = total + stream.mlp_write(i, recorder[stream.mlp_out(i)])
    compare(stream.final, "before the final norm")
