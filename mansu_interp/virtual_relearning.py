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

from .evidence import CHUNK, last_logits, ranking_margins
from .models import LanguageModel
from .nullspace import gradient
from .pairs import Pair, PairSet, answer_tokens, by_phrasing, chunks, collate
from .scoring import ranked_first

DAMPING = 0.01
HELD = 1 << 28
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


def _outputs_of(
    model: LanguageModel, names: Sequence[str], pairs: Sequence[Pair], among: dict[str, Tensor]
) -> tuple[Float[Tensor, " batch"], list[Tensor], list[Tensor]]:
    """Ranking margins of some pairs, and each layer's inputs and gradients of the margins by its
    outputs, ``[batch, pos, width]``."""
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
        found = ranking_margins(last_logits(model, collate(pairs)), pairs, among)
    grads = torch.autograd.grad(found.sum(), [outputs[n] for n in names])
    return found.detach(), [inputs[n] for n in names], list(grads)


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
    n, length = len(pairs), max(len(p.clean) for p in pairs)
    kernel, margins = torch.zeros(n, n), torch.zeros(n)
    # Prompts of one length fit a batch without padding.
    order = sorted(range(n), key=lambda k: len(pairs[k].clean))
    for names in _groups(model, n * length):
        held: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in names]
        for part in (order[k : k + CHUNK] for k in range(0, n, CHUNK)):
            found, inputs, grads = _outputs_of(model, names, [pairs[k] for k in part], among)
            margins[part] = found
            for (xs, gs), x, g in zip(held, inputs, grads, strict=True):
                pad = (0, 0, 0, length - x.shape[1])
                xs.append(torch.nn.functional.pad(x, pad))
                gs.append(torch.nn.functional.pad(g, pad))
        for xs, gs in held:
            x, g = torch.cat(xs), torch.cat(gs)
            for k in range(0, n, ROWS):
                # <x_i^T g_i, x_j^T g_j> = sum over positions of (x_i . x_j) (g_i . g_j)
                some = (x[k : k + ROWS].flatten(0, 1) @ x.flatten(0, 1).T) * (
                    g[k : k + ROWS].flatten(0, 1) @ g.flatten(0, 1).T
                )
                rows = torch.tensor(order[k : k + ROWS])
                kernel[rows[:, None], torch.tensor(order)] += some.view(
                    len(rows), length, n, length
                ).sum((1, 3))
    return kernel, margins


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
    kernel, margins = tangent_kernel(model, pairs, among)
    want = torch.tensor([math.log(len(among[p.relation])) for p in pairs]) - margins
    damped = kernel + max(damping * float(kernel.diagonal().mean()), 1e-30) * torch.eye(len(pairs))
    share = dict(zip(pairs, torch.linalg.solve(damped, want), strict=True))

    def weighed(part: list[Pair]) -> Tensor:
        alpha = torch.stack([share[p] for p in part])
        return ranking_margins(last_logits(model, collate(part)), part, among) @ alpha

    parts = [c for g in by_phrasing(pairs) for c in chunks(g, CHUNK)]
    delta = gradient(model, model.linear_names, [lambda p=p: weighed(p) for p in parts])
    size = math.sqrt(sum(float((d * d).sum()) for d in delta))
    small = min(SMALL, SMALL / max(size, 1e-30))
    moved = model.copy()

    @torch.no_grad()
    def at(step: float) -> list[Float[Tensor, "batch vocab"]]:
        for name, d in zip(model.linear_names, delta, strict=True):
            moved.weights[name].copy_(model.weights[name]).add_(d, alpha=step)
        return [last_logits(moved, collate(p)) for p in half_b.parts(CHUNK)]

    choices = [collate(p).choices for p in half_b.parts(CHUNK)]
    before, up, down, whole = at(0.0), at(small), at(-small), at(1.0)
    linear = [
        ranked_first(b + (u - d) / (2 * small), c)
        for b, u, d, c in zip(before, up, down, choices, strict=True)
    ]
    stepped = [ranked_first(w, c) for w, c in zip(whole, choices, strict=True)]
    return VirtualRelearning(torch.cat(linear), torch.cat(stepped))
