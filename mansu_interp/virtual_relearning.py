"""Virtual relearning: what one closed-form step on half A brings of half B.

Fine-tuning on half A moves half B through the model's tangent kernel. With m_A the ranking margins
of half A's prompts (log p(answer among the half's answers) + log n, nats), J_A their Jacobian by
the weights of the linear layers and K = J_A J_A^T, one damped Gauss-Newton step

    delta = J_A^T (K + damping mean(diag K))^-1 (log n - m_A)

makes every answer of half A certain, to first order; no rate, no number of steps, no randomness.
Half B is then asked twice: by its own first-order change, J_B delta, and of a copy that took the
whole step. Facts written one by one do not move with others; facts that something common hides do.
Ours; the kernel is the neural tangent kernel (Jacot et al. 2018, arXiv 1806.07572), summed from
inputs and output gradients of each layer, so that no gradient of a single prompt is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .evidence import CHUNK, last_logits, margins, ranking_margins
from .models import LanguageModel
from .nullspace import gradient
from .pairs import Pair, PairSet, answer_tokens, by_phrasing, chunks, collate
from .scoring import ranked_first

DAMPING = 0.01
HELD = 1 << 29
"""Numbers (of inputs and output gradients) held at once, 4 bytes each."""
ROWS = 16
"""Prompts whose share of the kernel is summed at once."""
SMALL = 0.01
"""Length of the step that gives the first-order change, at most this share of the whole one."""


@dataclass(frozen=True)
class VirtualRelearning:
    """Which of half B's prompts are right in four-way choice, in the order of ``parts(CHUNK)``."""

    linear: Bool[Tensor, " prompts"]
    """By the first-order change of their logits."""
    stepped: Bool[Tensor, " prompts"]
    """By a copy of the model that took the whole step."""


def _flows(
    model: LanguageModel, names: Sequence[str], pairs: Sequence[Pair], among: dict[str, Tensor]
) -> tuple[Float[Tensor, " batch"], list[Tensor], list[Tensor]]:
    """Ranking margins of some pairs, and each layer's inputs and the margins' gradients by its
    outputs, ``[tokens, width]``: prompt after prompt, without padding."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        # Something must ask for gradients: weights do not.
        embedding = model.hf.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
        stack.callback(hook.remove)
        for name in names:

            def keep(_m: Any, args: Any, out: Tensor, name: str = name) -> None:
                inputs[name], outputs[name] = args[0].detach(), out

            module = model.hf.get_submodule(name.removesuffix(".weight"))
            stack.callback(module.register_forward_hook(keep).remove)
        batch = collate(pairs)
        found = ranking_margins(last_logits(model, batch), pairs, among)
    grads = torch.autograd.grad(found.sum(), [outputs[n] for n in names])
    real = torch.arange(batch.clean.shape[1]) <= batch.last[:, None]
    return found.detach(), [inputs[n][real] for n in names], [g[real] for g in grads]


def _groups(model: LanguageModel, tokens: int) -> Iterator[list[str]]:
    """Layers whose inputs and output gradients over so many tokens may be held together."""
    group, held = [], 0
    for name in model.linear_names:
        size = tokens * sum(model.weights[name].shape)
        if group and held + size > HELD:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def tangent_kernel(
    model: LanguageModel, pairs: Sequence[Pair], among: dict[str, Tensor]
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Inner products of the gradients of pairs' ranking margins by the linear layers' weights
    (nats^2 per unit of weight^2), and the margins (nats).

    Arguments:
        model: whose layers.
        pairs: the prompts.
        among: each relation's answers (`pairs.answer_tokens`).
    """
    # Prompts of one length fit a batch without padding.
    order = sorted(range(len(pairs)), key=lambda k: len(pairs[k].clean))
    ordered = [pairs[k] for k in order]
    lengths = torch.tensor([len(p.clean) for p in ordered])
    owner = torch.repeat_interleave(torch.eye(len(pairs)), lengths, 0)  # [tokens, prompts]
    starts = [0, *lengths.cumsum(0).tolist()]
    upper, levels = torch.zeros(len(pairs), len(pairs)), torch.zeros(len(pairs))
    for names in _groups(model, len(owner)):
        parts = [ordered[k : k + CHUNK] for k in range(0, len(pairs), CHUNK)]
        found = [_flows(model, names, part, among) for part in parts]
        levels = torch.cat([level for level, _, _ in found])
        for layer in range(len(names)):
            x = torch.cat([inputs[layer] for _, inputs, _ in found])
            g = torch.cat([grads[layer] for _, _, grads in found])
            for k in range(0, len(pairs), ROWS):
                # <x_i^T g_i, x_j^T g_j> = sum over tokens of (x_i . x_j) (g_i . g_j)
                rows, rest = slice(starts[k], starts[min(k + ROWS, len(pairs))]), starts[k]
                some = (x[rows] @ x[rest:].T) * (g[rows] @ g[rest:].T)
                upper[k : k + ROWS, k:] += owner[rows, k : k + ROWS].T @ some @ owner[rest:, k:]
    kernel = upper.triu() + upper.triu(1).T
    back = torch.tensor(order).argsort()
    return kernel[back][:, back], levels[back]


def virtual_relearning(
    model: LanguageModel, half_a: PairSet, half_b: PairSet, damping: float = DAMPING
) -> VirtualRelearning:
    """What one closed-form step on half A brings of half B (see the module).

    Arguments:
        model: the edited model; it is not changed.
        half_a: the prompts that are relearnt.
        half_b: the prompts that are asked, with distractors among the half's own answers
            (`relearning.rivals_within`).
        damping: of the kernel, as a share of its mean diagonal.
    """
    pairs, among = list(half_a), answer_tokens(half_a)
    kernel, levels = tangent_kernel(model, pairs, among)
    want = torch.tensor([math.log(len(among[p.relation])) for p in pairs]) - levels
    damped = kernel + max(damping * float(kernel.diagonal().mean()), 1e-30) * torch.eye(len(pairs))
    share = dict(zip(pairs, torch.linalg.solve(damped, want), strict=True))

    def weighed(part: list[Pair]) -> Tensor:
        return margins(model, part, among) @ torch.stack([share[p] for p in part])

    parts = [c for g in by_phrasing(pairs) for c in chunks(g, CHUNK)]
    delta = gradient(model, model.linear_names, [lambda p=p: weighed(p) for p in parts])
    size = math.sqrt(sum(float((d * d).sum()) for d in delta))
    small = min(SMALL, SMALL / max(size, 1e-30))
    moved, batches = model.copy(), list(half_b.batches(CHUNK))

    @torch.no_grad()
    def at(step: float) -> list[Float[Tensor, "batch vocab"]]:
        for name, d in zip(model.linear_names, delta, strict=True):
            moved.weights[name].copy_(model.weights[name]).add_(d, alpha=step)
        return [last_logits(moved, batch) for batch in batches]

    before, up, down, whole = at(0.0), at(small), at(-small), at(1.0)
    linear = [
        ranked_first(b + (u - d) / (2 * small), batch.choices)
        for b, u, d, batch in zip(before, up, down, batches, strict=True)
    ]
    stepped = [ranked_first(w, batch.choices) for w, batch in zip(whole, batches, strict=True)]
    return VirtualRelearning(torch.cat(linear), torch.cat(stepped))
