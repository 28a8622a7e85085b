"""Edge attribution patching: EAP and EAP-IG on a TransformerLens model.

The score of an edge u -> v is, with the denoising sign,

    s(u -> v) = mean over pairs of  sum_pos < a_u(clean) - a_u(corrupt),  d metric / d in_v >

where ``a_u`` is what u adds to the residual stream and ``in_v`` the residual that v reads, before
its norm; with mean or zero ablation, that value stands in the place of ``a_u(corrupt)``. Positive:
restoring the clean value along this edge raises the metric. Negative: it lowers it, as edges do
that work against the answer. EAP (Nanda 2023; Syed et al. 2023, arXiv 2310.10348) takes the
gradient at one run, corrupt by default, or the mean of both ("clean-corrupted" in the code of Hanna
et al.). EAP-IG (Hanna et al. 2024, arXiv 2403.17806) averages it over points on the straight line
between the corrupt and the clean input embeddings; the midpoint rule is ours. Its variant for
activations moves one component's output at a time in the clean run, and scores that component's
edges there; that code, unlike this, also adds up the scores of all others. Where the gradient is
taken does not depend on the ablation. The algorithm, batch by batch:

1. Run the clean and the corrupt prompts, and take the difference of what each writer adds, at each
   real token; what the heads write is expanded from ``z`` (`patching.difference`).
2. For each point on the path, run from that input (EAP's is one of the two runs before) and take
   the metric's gradient, or what a rule puts in its place (`rules`), at the q, k and v projections,
   the MLP inputs and the final stream.
3. Pull the gradients back per head through projection and norm, to each reader's own residual
   input, by a vector-Jacobian product (`_pull_back`); q, k and v inputs need not be split in the
   model.
4. Multiply differences with gradients, sum over tokens, and add up (`_add_scores`); where memory is
   short, the differences of a few layers at a time.

Each batch is summed on the device, in float32, and moved to the CPU once. The sums over all batches
(`scores.Sums`) are divided once by the number of pairs, so that scores do not depend on the batch
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import CircuitError
from ..models.hook_points import Hook, Recorder
from ..models.hooked import AnyModel
from ..models.stream import Stream, widen
from ..tasks.pairs import Batch, PairSet, collate
from ..utils.distributed import shard, sum_over_processes, world_size
from ..utils.ranges import entrance
from .ablation import Rebuilder, check_exact
from .config import AttributionConfig, fit_memory
from .metrics import Logits, Metric, caveat, get_metric
from .patching import difference, difference_inside, layers_writers
from .rules import Rules, straight
from .scores import Attribution, OnPairs, Sums, Unfinished


@dataclass(frozen=True)
class _Runs:
    """One batch after its clean and its corrupt run; tokens are the real ones of all pairs."""

    batch: Batch
    real: Bool[Tensor, "batch pos"]
    """True at real tokens, False at padding."""
    clean_logits: Logits
    writes: dict[range, Callable[[], Float[Tensor, "writers tokens d_model"]]]
    """By a run of writers, what each adds in the clean run beyond its ablated value."""
    inside: dict[str, Float[Tensor, "tokens _"]]
    """By hook point, the same of z and the neurons; empty unless they are asked for."""

    def flat(self, value: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "tokens ..."]:
        """The values at real tokens."""
        return widen(value.detach())[self.real]


def _pull_back(
    norm: Callable[[Tensor], Tensor],
    x: Float[Tensor, "tokens d_model"],
    g: Float[Tensor, "readers tokens d_model"],
) -> Float[Tensor, "readers tokens d_model"]:
    """Gradient at each reader's own residual input from the gradient at its norm's output."""
    with torch.enable_grad():
        wide = x.expand(len(g), *x.shape).detach().requires_grad_(True)
        return torch.autograd.grad(norm(wide), wide, g)[0]


@dataclass
class _Run:
    """One forward pass."""

    recorder: Recorder
    logits: Logits

    def seen(self, names: list[str]) -> dict[str, Tensor]:
        """What was recorded at some hook points."""
        return {n: self.recorder[n].detach() for n in names}


def _run(
    rules: Rules,
    tokens: Int[Tensor, "batch pos"],
    last: Int[Tensor, " batch"],
    names: list[str],
    moved: tuple[str, Tensor] | None = None,
    *,
    grad: bool,
) -> _Run:
    """A forward pass that is recorded; with ``grad``, from its input as a leaf, by the rules; with
    ``moved``, a hook point passes on another value than its own."""
    stream, recorder = rules.stream, Recorder()

    def leaf(value: Tensor, hook: object) -> Tensor:
        return value.detach().requires_grad_(True)

    def move(value: Tensor, hook: object) -> Tensor:
        assert moved is not None
        return straight(moved[1], value)

    first: list[tuple[str, Hook]] = [(stream.input, leaf)] if grad else []
    replaced, weighed = rules.hooks() if grad else ([], [])
    if moved is not None:
        replaced = [*replaced, (moved[0], move)]
    hooks = [*first, *replaced, *recorder.on(names), *weighed]
    with torch.set_grad_enabled(grad), stream.hooked(hooks):
        return _Run(recorder, stream.logits(tokens, last))


def _asked(stream: Stream, inside: list[str]) -> list[str]:
    """Hook points at which the metric's gradient is taken."""
    layers = range(stream.n_layers)
    asked = [stream.projected(i, c) for i in layers for c in "qkv"]
    return asked + [stream.mlp_in(i) for i in layers] + [stream.final] + inside


def _watched(stream: Stream, inside: list[str]) -> list[str]:
    """Hook points that a run with gradients records: the streams that are read, and `_asked`."""
    layers = range(stream.n_layers)
    reads = [n for i in layers for n in (stream.before_attention(i), stream.before_mlp(i))]
    return list(dict.fromkeys([*reads, *_asked(stream, inside)]))


def _gradients(stream: Stream, runs: _Runs, run: _Run, metric: Metric) -> dict[str, Tensor]:
    """The metric's gradient in one run, by hook point."""
    recorder, asked = run.recorder, _asked(stream, list(runs.inside))
    with torch.enable_grad():
        value = metric(run.logits, runs.batch, runs.clean_logits).sum()
    if not value.requires_grad:
        raise CircuitError("The metric has no gradient: compute it from the logits, in torch.")
    found = torch.autograd.grad(value, [recorder[n] for n in asked])
    return dict(zip(asked, found, strict=True))


def _add_scores(
    rules: Rules,
    runs: _Runs,
    recorder: Recorder,
    grads: dict[str, Tensor],
    weight: float,
    sums: Sums,
    rows: range,
    held: range,
) -> None:
    """Add the scores of some writers, of those that are held, with the gradient in one run, times a
    weight."""
    stream, graph = rules.stream, rules.stream.graph
    every = runs.writes[held]()
    position = runs.real.nonzero()[:, 1].cpu()

    def add(column: int, g: Float[Tensor, "readers tokens d_model"], n_writers: int) -> None:
        if n_writers <= rows.start:
            return
        at = slice(rows.start, min(rows.stop, n_writers))
        writes = every[at.start - held.start : at.stop - held.start]
        flat_writes = rearrange(writes, "writers tokens d -> writers (tokens d)")
        flat_g = rearrange(g, "readers tokens d -> readers (tokens d)")
        sums.batch[at, column : column + len(g)].addmm_(flat_writes, flat_g.T, alpha=weight)
        if sums.each is not None:
            sizes = runs.real.sum(1).tolist()
            for one, w, r in zip(sums.each, writes.split(sizes, 1), g.split(sizes, 1), strict=True):
                here = one[at, column : column + len(g)]
                here.addmm_(w.flatten(1), r.flatten(1).T, alpha=weight)
        if sums.by_position is not None:
            pattern = "writers tokens d, readers tokens d -> tokens writers readers"
            by_token = weight * einsum(writes, g, pattern).cpu()
            at_columns = sums.by_position[:, at, column : column + len(g)]
            at_columns.index_add_(0, position, by_token)

    for i in range(stream.n_layers):
        if graph.writers_before(i, mlp=True) <= rows.start:
            continue
        x = runs.flat(recorder[stream.before_attention(i)])
        parts = []
        for r in stream.readings(i):
            of_heads = runs.flat(grads[stream.projected(i, r.kind)]).flatten(1)
            of_heads = rearrange(
                of_heads, "tokens (heads c) -> tokens heads c", heads=len(r.weight)
            )
            parts.append(einsum(of_heads, r.weight, "tokens heads c, heads c d -> heads tokens d"))
        pulled = torch.cat(parts)
        column = i * graph.readers_per_layer
        add(column, _pull_back(rules.norm(i, mlp=False), x, pulled), graph.writers_before(i))
        x = runs.flat(recorder[stream.before_mlp(i)])
        g = _pull_back(rules.norm(i, mlp=True), x, runs.flat(grads[stream.mlp_in(i)])[None])
        add(column + len(pulled), g, graph.writers_before(i, mlp=True))
    add(len(graph.readers) - 1, runs.flat(grads[stream.final])[None], len(graph.writers))


def _add_neurons(
    stream: Stream, runs: _Runs, grads: dict[str, Tensor], weight: float, sums: Sums
) -> None:
    """Add the scores of neurons and head dimensions with the gradient at one input."""
    for i in range(stream.n_layers):
        at = {"z": stream.z(i), "neurons": stream.neurons(i)}
        found = {k: (runs.inside[n] * runs.flat(grads[n]).flatten(1)).sum(0) for k, n in at.items()}
        heads = [f"a{i}.h{h}" for h in range(stream.n_heads)]
        by_head = dict(zip(heads, found["z"].chunk(stream.n_heads), strict=True))
        for node, part in {f"m{i}": found["neurons"], **by_head}.items():
            old = sums.neurons.get(node, torch.zeros(part.shape, dtype=torch.float64))
            sums.neurons[node] = old + weight * part.cpu()


def _moved(stream: Stream, config: AttributionConfig) -> list[tuple[str, range]]:
    """What a path moves: a component's hook point, and the writers whose scores are taken there."""
    every = range(len(stream.graph.writers))
    if config.method != "eap-ig-activations":
        return [(stream.input, every)]
    out, at = [(stream.input, range(1))], 1
    for i in range(stream.n_layers):
        mlp = at + stream.n_heads
        out += [(stream.z(i), range(at, mlp)), (stream.mlp_out(i), range(mlp, mlp + 1))]
        at = mlp + 1
    return out


def _add_batch(
    rules: Rules,
    batch: Batch,
    config: AttributionConfig,
    metric: Metric,
    neurons: bool,
    means: list[Tensor] | None,
    sums: Sums,
    at_once: int,
) -> Float[Tensor, "3 batch"]:
    """Add one batch to the sums, with the differences of so many layers at once; returns the clean
    and the corrupt metric of each pair, and 1 where the model ranks the answer first."""
    stream = rules.stream
    layers, path, moved = range(stream.n_layers), config.path(), _moved(stream, config)
    inside = [n for i in layers for n in (stream.z(i), stream.neurons(i))] if neurons else []
    names = list(dict.fromkeys([*stream.writers(), *inside]))
    # An end of the path whose gradient is asked for is run once; but the path has the clean
    # prompts' positions, which a corrupt run of other lengths has not.
    ends: dict[float, _Run] = {}
    here = {a for a in path if a == 1 or batch.of_clean is None}
    both = (1.0, batch.clean, batch.last), (0.0, batch.corrupt, batch.corrupt_last)
    for alpha, tokens, last in both:
        more = _watched(stream, inside) if alpha in here else []
        watched = list(dict.fromkeys([*names, *more]))
        ends[alpha] = _run(rules, tokens, last, watched, grad=alpha in here)
    logits = [run.logits.detach() for run in ends.values()]
    clean, corrupt = (run.seen(names) for run in ends.values())
    corrupt = {n: batch.as_clean(value) for n, value in corrupt.items()}
    real = batch.real
    values_inside = difference_inside(stream, clean, corrupt, real) if neurons else {}
    writes: dict[range, Callable[[], Tensor]] = {}
    if at_once < stream.n_layers:  # held as they passed, and expanded when they are asked for
        for first in layers[::at_once]:
            block = range(first, min(first + at_once, stream.n_layers))
            make = partial(difference, stream, clean, corrupt, real, config.ablation, means, block)
            writes[layers_writers(stream, block)] = make
    else:
        every = difference(stream, clean, corrupt, real, config.ablation, means)
        writes[range(len(every))] = lambda: every
    runs = _Runs(batch, real, logits[0], writes, values_inside)
    ways = {name: (corrupt[name], clean[name] - corrupt[name]) for name, _ in moved}
    del clean, corrupt  # the writes of both runs are not needed any more
    kept = {alpha: ends[alpha] for alpha in here if alpha in ends}
    ends.clear()
    for name, rows in moved:
        start, way = ways[name]
        for alpha in path:
            run = kept.pop(alpha, None)
            if run is None:
                at, watched = start + alpha * way, _watched(stream, inside)
                run = _run(rules, batch.clean, batch.last, watched, (name, at), grad=True)
            grads, weight = _gradients(stream, runs, run, metric), 1 / len(path)
            for held in writes:
                part = range(max(rows.start, held.start), min(rows.stop, held.stop))
                if part:
                    _add_scores(rules, runs, run.recorder, grads, weight, sums, part, held)
            if inside:
                _add_neurons(stream, runs, grads, weight, sums)
    values = [metric(x, batch, logits[0]) for x in logits]
    return torch.stack([*values, logits[0].argmax(-1) == batch.answer]).detach().cpu()


@entrance(CircuitError)
def attribute(
    model: AnyModel,
    pairs: PairSet,
    *,
    config: AttributionConfig | None = None,
    metric: Metric | str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    positions: bool = False,
    neurons: bool = False,
    on_pairs: OnPairs | None = None,
    resume: str | PathLike[str] | None = None,
) -> Attribution:
    """Score every edge of a model on a set of pairs.

    Inside a ``torch.distributed`` process group, each process takes its share of the pairs and
    all return the same scores.

    Arguments:
        model: from `load_model` (its bridge is built on first use), or a HookedTransformer.
        pairs: all of them are used (see `PairSet.sample`).
        config: method, steps, metric, batch size and memory.
        metric: a name, or any function of (last-position logits [batch, vocab], batch, logits of
            the clean run) -> [batch]; replaces ``config.metric``.
        on_batch: called with (pairs done, pairs in all).
        positions: score every token position separately as well.
        neurons: score every MLP neuron and head dimension as well.
        on_pairs: called with the pairs of each batch and the scores of each of them.
        resume: a file, in a folder that is there, in which the sums wait: an attribution that was
            killed goes on from there, to the same scores, byte for byte; with other batches, from
            the start. It stays when all is done: delete it then. Not used by several processes.

    Returns:
        Mean scores; positive = the clean value along the edge raises the metric.

    Raises:
        CircuitError: the architecture cannot be attributed exactly, a model in training mode or
            with weights that are not finite, too little memory, or scores that are not finite.
        ArtifactError: what waits in ``resume`` is of another attribution, or damaged.
        ResourceError: its folder is not there.
    """
    config = config or AttributionConfig()
    if resume and (on_pairs or callable(metric)):
        raise CircuitError(
            "resume knows a metric by its name alone, and not what on_pairs did: leave out resume, "
            "or the function."
        )
    function = get_metric(metric or config.metric)
    rebuilder = Rebuilder(model)
    stream, longest = rebuilder.stream, max(len(p.clean) for p in pairs)
    # Before any pass: what cannot fit is refused at once.
    size, _, at_once = fit_memory(stream.graph, stream.model.d_model, longest, config)
    check_exact(rebuilder, pairs)
    rules = Rules(config.rules, stream)
    if neurons and (config.ablation != "corrupt" or config.method == "eap-ig-activations"):
        raise CircuitError(
            "Neurons are scored with ablation='corrupt' and method='eap' or 'eap-ig'; got "
            f"{config.ablation!r} and {config.method!r}."
        )
    if neurons and world_size() > len(pairs):  # raised by all of them, or the others would wait
        raise CircuitError("More processes than pairs: give every process a pair.")
    mine = shard(pairs.pairs)
    means = rebuilder.means(pairs, size) if config.ablation == "mean" else None
    facts = {fact: k for k, fact in enumerate(dict.fromkeys(p.fact for p in pairs))}
    sums = Sums.zeros(stream.graph, longest if positions else 0, len(facts))
    parts = list(PairSet(pairs.name, mine).parts(size)) if mine else []
    unfinished = Unfinished(Path(resume) if resume and world_size() == 1 else None, size=size)
    settings = replace(config, batch_size=1, memory_gb=None), metric, positions, neurons
    place = {
        "device": stream.model.device,
        "dtype": torch.promote_types(stream.dtype, torch.float32),
    }
    begun = unfinished.load(sums, stream.model, pairs, *settings)
    done = sum(map(len, parts[:begun]))
    for k, part in enumerate(parts[begun:], begun + 1):
        batch, shape = collate(part, stream.model.device), (len(part), *sums.scores.shape)
        sums.each = torch.zeros(shape, **place) if on_pairs else None
        sums.batch = torch.zeros(shape[1:], **place)
        values = _add_batch(rules, batch, config, function, neurons, means, sums, at_once)
        sums.scores += sums.batch.cpu()
        rows = torch.tensor([facts[p.fact] for p in part])
        sums.ends.index_add_(0, rows, torch.cat([values, torch.ones(1, len(part))]).T.double())
        if on_pairs and sums.each is not None:
            on_pairs(part, sums.each)
        done += len(part)
        if unfinished.is_due() or k == len(parts):
            unfinished.save(sums, k)
        if on_batch:
            on_batch(done, len(mine))
    for tensor in sums.tensors().values():
        sum_over_processes(tensor)
    return _mean(stream, sums, sum(not p.level for p in pairs))


def _mean(stream: Stream, sums: Sums, aligned: int) -> Attribution:
    """The sums over all pairs as means; ``aligned`` are of different lengths."""
    clean, corrupt, _, n = sums.ends.sum(0).tolist()
    exists = stream.graph.exists
    scores = (sums.scores / n).float().numpy() * exists
    if not np.isfinite([clean, corrupt]).all() or not np.isfinite(scores).all():
        raise CircuitError(
            f"{stream.model.name}: the metric or some scores are not finite on these prompts."
        )
    return Attribution(
        graph=stream.graph,
        scores=scores,
        clean=clean / n,
        corrupt=corrupt / n,
        by_position=None if sums.by_position is None else (sums.by_position / n).numpy() * exists,
        neurons={k: (v / n).float().numpy() for k, v in sums.neurons.items()},
        caveat=caveat(sums.ends, aligned),
    )
