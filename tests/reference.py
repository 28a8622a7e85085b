"""A Llama written out, slowly: every reader has a residual input of its own, without hooks.

The definitions of edge attribution and of ablate-outside faithfulness, term by term, for one
prompt pair without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import Pair

Writes = dict[str, Tensor]
Read = Callable[[str, Writes], Tensor]


def rms(x: Tensor, gain: Tensor, eps: float, rules: str = "gradient") -> Tensor:
    scale = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x / (scale if rules == "gradient" else scale.detach()) * gain


def part(x: Tensor, share: float) -> Tensor:
    """A value of whose gradient a share goes on."""
    return share * x + (1 - share) * x.detach()


def attend(scores: Tensor, rules: str) -> Tensor:
    """The pattern; GIM's gradient is written out: p (g - <p, g>) at temperature 2."""
    pattern = scores.softmax(-1)
    if rules == "gradient":
        return pattern
    if rules == "relp":
        return pattern.detach() + 0 * scores.masked_fill(scores.isinf(), 0)
    p = (scores / 2).softmax(-1).detach()
    moved = p * scores.masked_fill(scores.isinf(), 0)
    line = moved - p * moved.sum(-1, keepdim=True)
    return pattern.detach() + line - line.detach()


def gated(gate: Tensor, up: Tensor, rules: str) -> Tensor:
    """The neurons of a gated MLP."""
    if rules == "relp":  # silu(x) / x is the sigmoid
        return part(gate * gate.sigmoid().detach() * up, 0.5)
    value = torch.nn.functional.silu(gate) * up
    return part(value, 0.5) if rules == "gim" else value


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding with base 10,000 of ``[pos, d_head]``."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def run(
    model: LanguageModel, tokens: tuple[int, ...], read: Read, rules: str = "gradient"
) -> tuple[Writes, Tensor]:
    """What every writer adds, and the last logits; ``read`` makes each reader's input."""
    shares = {"q": 0.25, "k": 0.25, "v": 0.5} if rules == "gim" else {}
    c, w = model.config, {k.removeprefix("model."): v for k, v in model.weights.items()}
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    size = c.hidden_size // heads
    shared = f"a{{}}.{'h' if kv == heads else 'kv'}{{}}<{{}}>"
    writes: Writes = {"input": w["embed_tokens.weight"][list(tokens)]}
    causal = torch.ones(len(tokens), len(tokens)).tril().bool()
    for i in range(c.num_hidden_layers):
        layer = {k.split(".", 2)[2]: v for k, v in w.items() if k.startswith(f"layers.{i}.")}

        def project(kind: str, n: int, name: str, i: int = i, layer: Any = layer) -> Tensor:
            x = rms(read(name, writes), layer["input_layernorm.weight"], c.rms_norm_eps, rules)
            out = x @ layer[f"self_attn.{kind}_proj.weight"][n * size : (n + 1) * size].T
            return part(out, shares.get(kind, 1.0))

        keys = [rotate(project("k", g, shared.format(i, g, "k"))) for g in range(kv)]
        values = [project("v", g, shared.format(i, g, "v")) for g in range(kv)]
        out = {}
        for h in range(heads):
            q = rotate(project("q", h, f"a{i}.h{h}<q>"))
            group = h * kv // heads
            scores = (q @ keys[group].T / size**0.5).masked_fill(~causal, -torch.inf)
            z = attend(scores, rules) @ values[group]
            weight = layer["self_attn.o_proj.weight"][:, h * size : (h + 1) * size]
            out[f"a{i}.h{h}"] = z @ weight.T
        writes.update(out)
        gain = layer["post_attention_layernorm.weight"]
        x = rms(read(f"m{i}", writes), gain, c.rms_norm_eps, rules)
        gate, up = x @ layer["mlp.gate_proj.weight"].T, x @ layer["mlp.up_proj.weight"].T
        writes[f"m{i}"] = gated(gate, up, rules) @ layer["mlp.down_proj.weight"].T
    final = rms(read("logits", writes)[-1], w["norm.weight"], c.rms_norm_eps, rules)
    return writes, final @ model.weights["lm_head.weight"].T


def _sum(name: str, writes: Writes) -> Tensor:
    return torch.stack(list(writes.values())).sum(0)


def _metric(logits: Tensor, pair: Pair) -> Tensor:
    return logits[pair.answer] - logits[pair.counterfactual]


def edges(model: LanguageModel) -> Iterator[tuple[str, str, int, int]]:
    """Names and place of every edge."""
    graph = model.graph
    for i, j in np.argwhere(graph.exists):
        yield graph.writers[i].id, graph.readers[j].id, i, j


def eap(
    model: LanguageModel,
    pair: Pair,
    rules: str = "gradient",
    ablated: Writes | None = None,
) -> np.ndarray:
    """Every edge's score with the gradient at the corrupt run; ``ablated``: what edges carry
    instead, by default the corrupt value."""
    leaves: dict[str, Tensor] = {}

    def read(name: str, writes: Writes) -> Tensor:
        leaves[name] = torch.zeros_like(writes["input"]).requires_grad_(True)
        # What this reader's gradient is taken at is its own input, not what it reads from.
        return _sum(name, writes) + leaves[name]

    with torch.no_grad():
        clean, _ = run(model, pair.clean, _sum)
    corrupt, logits = run(model, pair.corrupt, read, rules)
    instead = corrupt if ablated is None else ablated
    slopes = dict(
        zip(leaves, torch.autograd.grad(_metric(logits, pair), list(leaves.values())), strict=True)
    )
    scores = np.zeros(model.graph.exists.shape)
    for writer, reader, i, j in edges(model):
        scores[i, j] = ((clean[writer] - instead[writer].detach()) * slopes[reader]).sum()
    return scores


@torch.no_grad()
def ablated(model: LanguageModel, pair: Pair, kept: np.ndarray) -> float:
    """The metric of the clean run when every edge outside ``kept`` carries its corrupt value."""
    corrupt, _ = run(model, pair.corrupt, _sum)
    graph = model.graph

    def read(name: str, writes: Writes) -> Tensor:
        column = graph.reader_index[name]
        return torch.stack(
            [
                write if kept[graph.writer_index[writer], column] else corrupt[writer]
                for writer, write in writes.items()
            ]
        ).sum(0)

    return float(_metric(run(model, pair.clean, read)[1], pair))
