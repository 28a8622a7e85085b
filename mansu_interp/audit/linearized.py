"""Linearized relearning: what a few closed-form steps on half A bring back of half B.

Fine-tuning on half A moves half B through the model's tangent kernel. With a_A the advantages of
half A's answers (log p(answer among the half's answers) + log n, nats; see `transfer`), J_A their
Jacobian by the weights of the linear layers and of an untied embedding (`moved_names`) and
K = J_A J_A^T, one damped Gauss-Newton step

    delta = J_A^T (K + damping mean(diag K))^-1 (log n - a_A)

makes every answer of half A certain, to first order. The algorithm, on a copy of the model:

1. Compute K and a_A (`tangent_kernel`).
2. Solve for the step, and take all of it, a half or a quarter, whichever leaves half A closest to
   certainty.
3. Ask for half A and half B.
4. Repeat until half A is learnt (`LEARNT`), each step from where the one before ended, at most
   `STEPS` times.

There is no learning rate and no randomness. Facts learned one by one do not move with others; facts
that something common hides do, including those trained against the first order of the attack. Ours;
the kernel is the neural tangent kernel (Jacot et al. 2018, arXiv 1806.07572), summed from inputs
and output gradients of each layer, so that no gradient of a single prompt is ever held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..losses.gradients import gradient
from ..models.language_model import LanguageModel
from ..models.layout import output_embeddings
from ..tasks.pairs import Pair, PairSet, answer_tokens, by_phrasing, chunks, collate
from .probes import CHUNK, last_logits, ranked
from .transfer import answer_advantage, model_advantage

DAMPING = 0.1
"""Of the kernel, as a share of its mean diagonal."""
MAX_HELD = 1 << 29
"""Numbers (of inputs and output gradients) in memory at once, 4 bytes each."""
ROWS = 16
"""Prompts whose share of the kernel is summed at once."""
STEPS = 16
"""The most steps that are taken; most models need two to six."""
LEARNT = 0.95
"""Share of half A that ranks first of four, at which it is learnt."""
LENGTHS = (1.0, 0.5, 0.25)
"""Shares of a step that are tried."""


@dataclass(frozen=True)
class LinearizedRelearning:
    """Which prompts' answers rank where among four after each step, in the order of
    ``parts(CHUNK)``."""

    half_a: Bool[Tensor, "steps relearned"]
    """Of those that are relearned, first: whether the steps work at all."""
    half_b: Bool[Tensor, "steps asked"]
    """Of the others, first."""
    ranked_last: Bool[Tensor, "steps asked"]
    """Of the others, last."""
    model: LanguageModel
    """The copy after the last step."""


def moved_names(model: LanguageModel) -> list[str]:
    """Names of the weights that the steps move: the linear layers', and the embedding's, whose rows
    are where some edits hide facts; one that is tied to the unembedding stays."""
    tied = output_embeddings(model.hf).get_parameter("weight") is (
        model.hf.get_input_embeddings().weight
    )
    return [*model.linear_names, *([] if tied else [model.embedding_name])]


def _flows(
    model: LanguageModel, names: Sequence[str], pairs: Sequence[Pair], among: dict[str, Tensor]
) -> tuple[Float[Tensor, " batch"], list[Tensor], list[Tensor]]:
    """Advantages of some pairs' answers, each layer's inputs (of the embedding: tokens), and the
    advantages' gradients by its outputs, ``[tokens, width]``: prompt after prompt, without
    padding."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        # Something must ask for gradients: weights do not.
        embedding = model.hf.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
        stack.callback(hook.remove)
        for name in names:

            def keep(
                _m: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name
            ) -> None:
                inputs[name], outputs[name] = args[0].detach(), out

            module = model.hf.get_submodule(name.removesuffix(".weight"))
            stack.callback(module.register_forward_hook(keep).remove)
        batch = collate(pairs, model.device)
        found = answer_advantage(last_logits(model, batch), pairs, among)
    grads = torch.autograd.grad(found.sum(), [outputs[n] for n in names])
    real = torch.arange(batch.clean.shape[1], device=model.device) <= batch.last[:, None]
    return found.detach(), [inputs[n][real] for n in names], [g[real] for g in grads]


def _groups(model: LanguageModel, tokens: int) -> Iterator[list[str]]:
    """Layers whose inputs and output gradients over so many tokens fit into memory together."""
    group, in_memory = [], 0
    for name in moved_names(model):
        embedded = name == model.embedding_name
        size = tokens * (model.d_model if embedded else sum(model.weights[name].shape))
        if group and in_memory + size > MAX_HELD:
            yield group
            group, in_memory = [], 0
        group.append(name)
        in_memory += size
    yield group


def tangent_kernel(
    model: LanguageModel, pairs: Sequence[Pair], among: dict[str, Tensor]
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Inner products of the gradients of the answers' advantages by the weights that move.

    Arguments:
        model: whose layers.
        pairs: the prompts.
        among: each relation's answers (`tasks.pairs.answer_tokens`).

    Returns:
        The kernel (nats^2 per unit of weight^2), and the advantages (nats), in the order of pairs.
    """
    # Prompts of one length fit a batch without padding.
    order = sorted(range(len(pairs)), key=lambda k: len(pairs[k].clean))
    ordered = [pairs[k] for k in order]
    lengths = torch.tensor([len(p.clean) for p in ordered])
    owner = torch.repeat_interleave(torch.eye(len(pairs)), lengths, 0)  # [tokens, prompts]
    starts = [0, *lengths.cumsum(0).tolist()]
    owner = owner.to(model.device)
    upper = owner.new_zeros(len(pairs), len(pairs))
    advantages = owner.new_zeros(len(pairs))
    for names in _groups(model, len(owner)):
        parts = [ordered[k : k + CHUNK] for k in range(0, len(pairs), CHUNK)]
        found = [_flows(model, names, part, among) for part in parts]
        advantages = torch.cat([advantage for advantage, _, _ in found])
        for layer in range(len(names)):
            x = torch.cat([inputs[layer] for _, inputs, _ in found])
            g = torch.cat([grads[layer] for _, _, grads in found])
            for k in range(0, len(pairs), ROWS):
                # <x_i^T g_i, x_j^T g_j> = sum over tokens of (x_i . x_j) (g_i . g_j)
                rows, rest = slice(starts[k], starts[min(k + ROWS, len(pairs))]), starts[k]
                if x.is_floating_point():
                    inner = x[rows] @ x[rest:].T
                else:  # tokens: rows of the embedding meet where they are the same
                    inner = (x[rows, None] == x[None, rest:]).float()
                some = inner * (g[rows] @ g[rest:].T)
                upper[k : k + ROWS, k:] += owner[rows, k : k + ROWS].T @ some @ owner[rest:, k:]
    kernel = upper.triu() + upper.triu(1).T
    back = torch.tensor(order, device=model.device).argsort()
    return kernel[back][:, back], advantages[back]


def gauss_newton_step(model: LanguageModel, half_a: PairSet, damping: float) -> None:
    """One damped Gauss-Newton step on half A, in place (see the module)."""
    pairs, among = list(half_a), answer_tokens(half_a, model.device)
    parts = [c for g in by_phrasing(pairs) for c in chunks(g, CHUNK)]

    def missing(
        part: Sequence[Pair], advantages: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """By how much advantages fall short of certainty (nats)."""
        certain = [math.log(len(among[p.relation])) for p in part]
        return torch.tensor(certain, device=model.device) - advantages

    kernel, advantages = tangent_kernel(model, pairs, among)
    identity = torch.eye(len(pairs), device=model.device)
    damped = kernel + max(damping * float(kernel.diagonal().mean()), 1e-30) * identity
    share = dict(zip(pairs, torch.linalg.solve(damped, missing(pairs, advantages)), strict=True))

    def weighed(part: list[Pair]) -> Float[Tensor, ""]:
        return model_advantage(model, part, among) @ torch.stack([share[p] for p in part])

    names = moved_names(model)
    delta = gradient(model, names, [lambda p=p: weighed(p) for p in parts])
    start = [model.weights[name].clone() for name in names]

    def go(length: float) -> None:
        for name, w, d in zip(names, start, delta, strict=True):
            model.weights[name].copy_(w).add_(d, alpha=length)

    @torch.no_grad()
    def lacking(length: float) -> float:
        """The mean square of what half A falls short of after so much of the step."""
        go(length)
        short = torch.cat([missing(part, model_advantage(model, part, among)) for part in parts])
        return float(short.square().mean())

    go(min(LENGTHS, key=lacking))


def linearized_relearning(
    model: LanguageModel,
    half_a: PairSet,
    half_b: PairSet,
    *,
    damping: float = DAMPING,
    steps: int = STEPS,
    on_step: Callable[[int, int], None] | None = None,
) -> LinearizedRelearning:
    """What closed-form steps on half A bring back of half B (see the module).

    Arguments:
        model: the edited model; it is not changed.
        half_a: the prompts that are relearned.
        half_b: the prompts that are asked, with distractors among the half's own answers
            (`relearning.rivals_within`).
        damping: of the kernel, as a share of its mean diagonal.
        steps: the most that are taken, at least one; fewer where half A is learnt before.
        on_step: called with (steps done, steps in all).
    """
    moved = model.copy()
    first_a, first_b, last_b = [], [], []
    for done in range(1, steps + 1):
        gauss_newton_step(moved, half_a, damping)
        first_a.append(ranked(moved, half_a)[0])
        first, last = ranked(moved, half_b)
        first_b.append(first)
        last_b.append(last)
        if on_step:
            on_step(done, steps)
        if first_a[-1].float().mean() >= LEARNT:
            break
    return LinearizedRelearning(
        torch.stack(first_a), torch.stack(first_b), torch.stack(last_b), moved
    )
