"""Edge attribution patching: EAP and EAP-IG on a TransformerLens bridge.

The score of an edge u -> v is, with the denoising sign,

    s(u -> v) = mean over pairs of  sum_pos < a_u(clean) - a_u(corrupt),  d metric / d in_v >

where ``a_u`` is what u adds to the residual stream and ``in_v`` the residual that v reads, before
its norm. Positive: restoring the clean value along this edge raises the metric. EAP (Nanda 2023;
Syed et al. 2023, arXiv 2310.10348) takes the gradient at one run, corrupt by default. EAP-IG
(Hanna et al. 2024, arXiv 2403.17806) averages it over points on the straight line between the
corrupt and the clean input embeddings; the midpoint rule is ours.

Neither split q/k/v inputs nor per-head results are needed: the model runs once with plain hooks;
gradients at the q, k, v and MLP inputs are pulled back per head through the projection and the
norm by a vector-Jacobian product, and head writers are expanded from ``z`` block by block.
Sums are taken in float32 over pairs and divided once, so scores do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .config import AttributionConfig
from .errors import CircuitError
from .graph import Graph
from .models import LanguageModel
from .tasks import Batch, PairSet

Metric = Callable[[Float[Tensor, "batch vocab"], Batch], Float[Tensor, " batch"]]
BLOCK_BYTES = 256 << 20
"""Working memory for the score product; token positions are taken in blocks that fit."""


def logit_diff(logits: Float[Tensor, "batch vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the counterfactual answer."""
    rows = torch.arange(len(batch))
    return logits[rows, batch.answer] - logits[rows, batch.counterfactual]


def log_prob(logits: Float[Tensor, "batch vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Log-probability of the answer's first token (nats)."""
    return logits.log_softmax(-1)[torch.arange(len(batch)), batch.answer]


def choice_margin(logits: Float[Tensor, "batch vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Logit of the answer minus the log-sum-exp over the distractors (nats)."""
    choices = logits.gather(1, batch.choices)
    return choices[:, 0] - choices[:, 1:].logsumexp(1)


METRICS: dict[str, Metric] = {
    "logit_diff": logit_diff,
    "log_prob": log_prob,
    "choice_margin": choice_margin,
}


class Stream:
    """Reads and rebuilds the residual stream of one bridged model, layer by layer.

    Refuses what it cannot do exactly: blocks that normalise a component's output before adding it
    to the stream, and fused or normalised q/k/v projections.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.graph, self.bridge = model, model.graph, model.bridge
        arch = self.graph.architecture
        self.blocks = list(self.bridge.blocks)
        first = self.blocks[0]
        parts = [getattr(first.attn, c, None) for c in "qkvo"]
        if any(p is None for p in parts) or not hasattr(first, "ln1") or not hasattr(first, "mlp"):
            raise CircuitError(
                f"{model.name}: attribution needs blocks with ln1, separate q/k/v/o and an MLP; "
                f"{type(first).__name__} of this architecture has not."
            )
        if hasattr(first, "ln1_post") or hasattr(first, "ln2_post"):
            raise CircuitError(
                f"{model.name} normalises what attention and MLP write before it is added, so a "
                "head's write is not additive and edge scores would be wrong. Not supported yet."
            )
        self.n_heads, self.n_kv = arch.n_heads, arch.n_kv_heads
        self.d_head = first.attn.o.weight.shape[1] // self.n_heads
        # Absolute positions are added after the token embedding; interpolate their sum instead.
        self.input_hook = "blocks.0.hook_in"

    def hook_names(self) -> list[str]:
        """Hook points of the writers: per layer z and the MLP output."""
        return [
            n for i in range(len(self.blocks)) for n in (f"blocks.{i}.attn.o.hook_in", self.mlp(i))
        ]

    @staticmethod
    def mlp(layer: int) -> str:
        """Hook point of an MLP's output."""
        return f"blocks.{layer}.mlp.hook_out"

    def head_writes(
        self, layer: int, z: Float[Tensor, "*rows heads d_head"]
    ) -> Float[Tensor, "heads *rows d_model"]:
        """What each head adds to the stream (the output bias belongs to no head)."""
        weight = self.blocks[layer].attn.o.weight.detach().float()  # [d_model, heads * d_head]
        per_head = weight.unflatten(1, (self.n_heads, self.d_head))
        z = z.unflatten(-1, (self.n_heads, self.d_head)) if z.shape[-1] != self.d_head else z
        return torch.einsum("...hc,dhc->h...d", z.float(), per_head)

    def norm(self, layer: int, mlp: bool) -> Any:
        """The norm module in front of a layer's attention or MLP."""
        block = self.blocks[layer]
        norm = block.ln2 if mlp and hasattr(block, "ln2") else block.ln1
        return getattr(norm, "original_component", norm)

    def projections(self, layer: int) -> list[tuple[str, int, Tensor, Tensor | None]]:
        """(q/k/v, number of heads, weight [out, in], bias) of a layer."""
        attn = self.blocks[layer].attn
        out = []
        for c, n in (("q", self.n_heads), ("k", self.n_kv), ("v", self.n_kv)):
            linear = getattr(attn, c)
            out.append((c, n, linear.weight.detach().float(), getattr(linear, "bias", None)))
        return out

    def pull_back(
        self, norm: Any, x: Float[Tensor, "rows d"], g: Float[Tensor, "readers rows d"]
    ) -> Float[Tensor, "readers rows d"]:
        """Gradient at each reader's own residual input from the gradient at its norm's output."""
        with torch.enable_grad():
            wide = x.expand(len(g), *x.shape).detach().requires_grad_(True)
            return torch.autograd.grad(norm(wide), wide, g)[0]


@contextmanager
def hooked(bridge: Any, hooks: list[tuple[str, Any]]) -> Iterator[None]:
    """Run the body with forward hooks on a bridge, and take exactly these off again."""
    with bridge.hooks(fwd_hooks=hooks):
        yield


class Recorder:
    """Keeps the tensors that pass the named hooks."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        """Remember a value under its hook point's name, and pass it on."""
        self.seen[hook.name] = value
        return value  # hooks that reshape pass on a view only if it is returned

    def on(self, names: list[str]) -> list[tuple[str, Any]]:
        """Hook list for `hooked`."""
        return [(n, self) for n in names]


def final_logits(bridge: Any, tokens: Tensor, last: Tensor) -> Float[Tensor, "batch vocab"]:
    """Logits of a bridge at the last real position, in float32."""
    return bridge(tokens, return_type="logits")[torch.arange(len(last)), last].float()


def _scores_of_batch(
    stream: Stream, batch: Batch, config: AttributionConfig, metric: Metric
) -> tuple[Float[Tensor, "writers readers"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Summed edge scores of a batch, and its clean and corrupt metric per pair."""
    names = stream.hook_names()
    runs, values = [], []
    for tokens in (batch.clean, batch.corrupt):
        recorder = Recorder()
        with torch.no_grad(), hooked(stream.bridge, recorder.on([stream.input_hook, *names])):
            values.append(metric(final_logits(stream.bridge, tokens, batch.last), batch))
        runs.append({k: v.detach() for k, v in recorder.seen.items()})
    clean, corrupt = runs
    delta = {n: clean[n].float() - corrupt[n].float() for n in clean}
    total = torch.zeros(len(stream.graph.writers), len(stream.graph.readers))
    path = config.path()
    for alpha in path:
        at = corrupt[stream.input_hook] + alpha * delta[stream.input_hook].to(
            corrupt[stream.input_hook].dtype
        )
        total += _scores_at(stream, batch, at, delta, metric)
    return total / len(path), values[0], values[1]


def _scores_at(
    stream: Stream, batch: Batch, at: Tensor, delta: dict[str, Tensor], metric: Metric
) -> Float[Tensor, "writers readers"]:
    """Summed edge scores with the gradient at one input."""
    graph, n_layers = stream.graph, len(stream.blocks)
    start = at.detach().requires_grad_(True)
    recorder = Recorder()
    watched = [f"blocks.{i}.{n}" for i in range(n_layers) for n in ("hook_in", "ln2.hook_in")]
    if graph.architecture.parallel:
        watched = [n for n in watched if not n.endswith("ln2.hook_in")]
    watched += [
        f"blocks.{i}.{n}"
        for i in range(n_layers)
        for n in ("attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out", "mlp.hook_in")
    ]
    watched += ["ln_final.hook_in"]
    first = [(stream.input_hook, lambda value, hook: start)]
    with torch.enable_grad(), hooked(stream.bridge, first + recorder.on(watched)):
        logits = final_logits(stream.bridge, batch.clean, batch.last)
        value = metric(logits, batch).sum()
        seen = recorder.seen
        wanted = [n for n in watched if n.endswith(("hook_out", "mlp.hook_in", "final.hook_in"))]
        grads = dict(
            zip(wanted, torch.autograd.grad(value, [seen[n] for n in wanted]), strict=True)
        )
    rows = torch.arange(batch.clean.shape[1])[None] <= batch.last[:, None]  # real tokens only

    def flat(t: Tensor) -> Float[Tensor, "tokens ..."]:
        return t.detach().float()[rows]

    writes = [flat(delta[stream.input_hook])[None]]
    scores = torch.zeros(len(graph.writers), len(graph.readers))
    n_tokens = int(rows.sum())
    d_model = start.shape[-1]
    per_layer = graph.readers_per_layer

    def add(column: int, g: Tensor, n_writers: int) -> None:
        known = torch.cat(writes)[:n_writers]
        step = max(1, BLOCK_BYTES // (4 * d_model * (len(known) + len(g))))
        for t in range(0, n_tokens, step):
            left, right = known[:, t : t + step].flatten(1), g[:, t : t + step].flatten(1)
            scores[:n_writers, column : column + len(g)] += left @ right.T

    for i in range(n_layers):
        x = flat(seen[f"blocks.{i}.hook_in"])
        pulled = []
        for c, n, weight, _ in stream.projections(i):
            g = flat(grads[f"blocks.{i}.attn.{c}.hook_out"]).reshape(n_tokens, n, -1)
            pulled.append(torch.einsum("thc,hcd->htd", g, weight.unflatten(0, (n, -1))))
        g_attn = stream.pull_back(stream.norm(i, mlp=False), x, torch.cat(pulled))
        add(i * per_layer, g_attn, graph.writers_before(i))
        writes.append(stream.head_writes(i, flat(delta[f"blocks.{i}.attn.o.hook_in"])))
        middle = x if graph.architecture.parallel else flat(seen[f"blocks.{i}.ln2.hook_in"])
        g_mlp = flat(grads[f"blocks.{i}.mlp.hook_in"])[None]
        g_mlp = stream.pull_back(stream.norm(i, mlp=True), middle, g_mlp)
        add((i + 1) * per_layer - 1, g_mlp, graph.writers_before(i, mlp=True))
        writes.append(flat(delta[stream.mlp(i)])[None])
    add(n_layers * per_layer, flat(grads["ln_final.hook_in"])[None], len(graph.writers))
    return scores


@dataclass(frozen=True)
class Attribution:
    """Edge scores over a pair set."""

    graph: Graph
    scores: Float[np.ndarray, "writers readers"]
    """Mean over pairs, in units of the metric; 0 where no edge exists."""
    clean: float
    """Mean metric of the clean runs."""
    corrupt: float
    """Mean metric of the corrupt runs."""

    def node_scores(self) -> dict[str, float]:
        """Score of each writer: the sum of its outgoing edges, because its total gradient is the
        sum of its readers' gradients."""
        return dict(zip(self.graph.writer_index, self.scores.sum(1).tolist(), strict=True))


def attribute(
    model: LanguageModel,
    pairs: PairSet,
    config: AttributionConfig | None = None,
    metric: Metric | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Score every edge of a model on a set of pairs.

    Arguments:
        model: the model; its bridge is built on first use.
        pairs: all of them are used (see `PairSet.sample`).
        config: method, steps, metric and batch size.
        metric: any function of (last-position logits [batch, vocab], batch) -> [batch]; replaces
            ``config.metric``.
        on_batch: called with (pairs done, pairs in all).

    Returns:
        Mean scores; positive = the clean value along the edge raises the metric.

    Raises:
        CircuitError: the architecture cannot be attributed exactly.
    """
    config = config or AttributionConfig()
    function = metric or METRICS[config.metric]
    stream = Stream(model)
    total = torch.zeros(len(stream.graph.writers), len(stream.graph.readers), dtype=torch.float64)
    clean = corrupt = 0.0
    done = 0
    for batch in pairs.batches(config.batch_size):
        scores, c, r = _scores_of_batch(stream, batch, config, function)
        total += scores
        clean, corrupt, done = clean + c.sum().item(), corrupt + r.sum().item(), done + len(batch)
        if on_batch:
            on_batch(done, len(pairs))
    n = len(pairs)
    mean = (total / n).float().numpy() * stream.graph.exists
    return Attribution(stream.graph, mean, clean / n, corrupt / n)
