"""Linearized relearning: what a few closed-form steps on half A bring back of half B.

Fine-tuning on half A moves half B through the model's tangent kernel. With a_A the advantages of
half A's answers (log p(answer among the half's answers) + log n, nats; see `losses.advantage`),
J_A their Jacobian by the weights of the linear layers and of an untied embedding (`moved_names`)
and K = J_A J_A^T, one damped Gauss-Newton step

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
and output gradients of each layer, a block at a time, so that no gradient of a single prompt is
ever held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..losses.advantage import answer_advantage, model_advantage
from ..losses.descent import WIDE
from ..losses.gradients import CHUNK, gradient, passes
from ..losses.resting import activation_bytes, free_bytes, resting, resting_activations
from ..models.language_model import LanguageModel
from ..models.layout import output_embeddings
from ..tasks.pairs import Batch, Pair, PairSet, answer_tokens, by_phrasing, collate
from .probes import Call, calls, last_logits, ranked, resumed, stages

DAMPING = 0.1
"""Of the kernel, as a share of its mean diagonal."""
ROWS = 16
"""Prompts whose share of the kernel is summed at once."""
STEPS = 16
"""The most steps that are taken; most models need two to six."""
LEARNT = 0.95
"""Share of half A that ranks first of four, at which it is learnt."""
LONGEST = 10.0
"""Mean tokens of the prompts that CAD asks, at most: where phrasings are long, the longest
are left out."""
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


def few_prompts(pairs: PairSet, n: int, seed: int) -> PairSet:
    """At most ``n`` prompts, drawn evenly over phrasings: over so many of them, the shortest first,
    that a prompt has at most `LONGEST` tokens on average; over one at least."""
    groups = sorted(by_phrasing(pairs), key=_length)
    kept, total = list(groups[0]), _length(groups[0])
    for k, group in enumerate(groups[1:], start=2):
        total += _length(group)
        if total / k > LONGEST:
            break
        kept += group
    chosen = set(kept)
    return PairSet(pairs.name, tuple(p for p in pairs if p in chosen)).sample(n, seed)


def _length(group: Sequence[Pair]) -> float:
    """Mean tokens of a prompt."""
    return sum(len(p.clean) for p in group) / len(group)


def moved_names(model: LanguageModel) -> list[str]:
    """Names of the weights that the steps move: the linear layers', and the embedding's, whose rows
    are where some edits hide facts; one that is tied to the unembedding stays."""
    tied = output_embeddings(model.hf).get_parameter("weight") is (
        model.hf.get_input_embeddings().weight
    )
    return [*model.linear_names, *([] if tied else [model.embedding_name])]


def step_room(model: LanguageModel, longest: float, pairs: int = CHUNK) -> float:
    """Bytes that the steps take besides the copy that is moved: a step of every weight, and what a
    forward pass keeps.

    Arguments:
        model: its weights are not read.
        longest: tokens of a prompt.
        pairs: that are computed together.
    """
    moved = sum(model.weights[n].numel() for n in moved_names(model))
    return WIDE * moved + activation_bytes(model, longest, WIDE) * pairs * longest


Flow = tuple[str, Shaped[Tensor, "tokens *input"], Float[Tensor, "tokens d_out"]]
"""A weight's name, its inputs (of the embedding: the tokens themselves) and gradients by its
outputs: prompt after prompt, without padding."""


def _flows(
    model: LanguageModel, parts: Sequence[Sequence[Pair]], among: dict[str, Tensor]
) -> tuple[Float[Tensor, " prompts"], Iterator[Flow]]:
    """Advantages of some pairs' answers, and each weight's flow, from the last layer to the first.

    Blocks are computed once more, one at a time, on their way back: what is held is what each block
    reads, and the flows of one.
    """
    batches = [collate(part, model.device) for part in parts]
    with torch.no_grad():
        made = [calls(model, batch) for batch in batches]
    found, slopes = [], []
    for part, batch, own in zip(parts, batches, made, strict=True):
        state = own.pop().read.requires_grad_(True)
        with resumed(model, len(own), own[0], state):
            advantage = answer_advantage(last_logits(model, batch), part, among)
        slopes.append(torch.autograd.grad(advantage.sum(), state)[0])
        found.append(advantage.detach())
    return torch.cat(found), _back(model, batches, made, slopes)


def _back(
    model: LanguageModel, batches: list[Batch], made: list[list[Call]], slopes: list[Tensor]
) -> Iterator[Flow]:
    """The flows, given the calls of the blocks and the gradients by what the last one writes."""
    names = moved_names(model)
    real = [batch.real for batch in batches]
    linear = {n: model.hf.get_submodule(n.removesuffix(".weight")) for n in names}
    for block in reversed(stages(model)[:-1]):
        inside = {id(module) for module in block.modules()}
        own = {name: module for name, module in linear.items() if id(module) in inside}
        kept: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in own}
        for k, rows in enumerate(real):
            call = made[k].pop()
            state = call.read.detach().requires_grad_(True)
            with _watched(own) as seen:
                out = call.of(state).repeat(block)
            wanted = [state, *(y for _, y in seen.values())]
            slopes[k], *grads = torch.autograd.grad(out, wanted, slopes[k])
            for (name, (x, _)), g in zip(seen.items(), grads, strict=True):
                # OPT's MLP reads the prompts of a batch as one row of tokens.
                kept[name].append(tuple(v.reshape(*rows.shape, -1)[rows] for v in (x, g)))
        for name, some in kept.items():
            yield name, torch.cat([x for x, _ in some]), torch.cat([g for _, g in some])
    if model.embedding_name in names:
        some = [_embedded(model, *each) for each in zip(batches, slopes, real, strict=True)]
        tokens, grads = zip(*some, strict=True)
        yield model.embedding_name, torch.cat(tokens), torch.cat(grads)


def _embedded(
    model: LanguageModel, batch: Batch, slope: Tensor, real: Bool[Tensor, "batch pos"]
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "tokens d_model"]]:
    """The embedding's flow, given the gradient by what the first block reads."""
    module = model.hf.get_input_embeddings()
    hook = module.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
    try:
        with _watched({"": module}) as seen, torch.enable_grad():
            first = calls(model, batch)[0].read
    finally:
        hook.remove()
    (grad,) = torch.autograd.grad(first, seen[""][1], slope)
    tokens = batch.clean[real]
    # Gemma's scales the rows itself; that of a padding token has no gradient.
    padding = getattr(module, "padding_idx", None)
    moves = (tokens != (-1 if padding is None else padding)) * getattr(module, "embed_scale", 1.0)
    return tokens, grad[real] * moves[:, None]


@contextmanager
def _watched(
    modules: Mapping[str, torch.nn.Module],
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What some modules are given, and what they return, while the body runs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def keep(
                _m: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name
            ) -> None:
                seen[name] = args[0].detach(), out

            stack.callback(module.register_forward_hook(keep).remove)
        yield seen


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
    parts = [ordered[k : k + CHUNK] for k in range(0, len(pairs), CHUNK)]
    advantages, flows = _flows(model, parts, among)
    for _, x, g in flows:
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


def gauss_newton_step(
    model: LanguageModel, half_a: PairSet, damping: float, rest: bool = False
) -> None:
    """One damped Gauss-Newton step on half A, in place (see the module); with ``rest`` what forward
    passes keep lies in the host's memory."""
    pairs, among = list(half_a), answer_tokens(half_a, model.device)
    parts = passes(pairs, CHUNK, model.d_model)

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
    with resting_activations(model) if rest else nullcontext():
        delta = gradient(model, names, [lambda p=p: weighed(p) for p in parts])
    gone = 0.0

    def go(length: float) -> None:
        nonlocal gone
        for name, d in zip(names, delta, strict=True):
            model.weights[name].add_(d, alpha=length - gone)
        gone = length

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
) -> tuple[LinearizedRelearning, LanguageModel]:
    """What closed-form steps on half A bring back of half B (see the module).

    Arguments:
        model: the edited model; it is not changed.
        half_a: the prompts that are relearned.
        half_b: the prompts that are asked, with distractors among the half's own answers
            (`relearning.rivals_within`).
        damping: of the kernel, as a share of its mean diagonal.
        steps: the most that are taken, at least one; fewer where half A is learnt before.
        on_step: called with (steps done, steps in all).

    Returns:
        What was found, and the copy after the last step.
    """
    moving = set(moved_names(model))
    moved = model.trainable_copy(sharing=[n for n in model.weights if n not in moving])
    need = step_room(model, max(len(p.clean) for p in half_a))
    first_a, first_b, last_b = [], [], []
    with resting([model], beside=moved, need=need):
        rest = free_bytes(moved.device) < need
        for done in range(1, steps + 1):
            gauss_newton_step(moved, half_a, damping, rest)
            first_a.append(ranked(moved, half_a)[0])
            first, last = ranked(moved, half_b)
            first_b.append(first)
            last_b.append(last)
            if on_step:
                on_step(done, steps)
            if first_a[-1].float().mean() >= LEARNT:
                break
    found = LinearizedRelearning(torch.stack(first_a), torch.stack(first_b), torch.stack(last_b))
    return found, moved
