"""Fine-tuning of every weight, of which memory holds one gradient at a time."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair
from .answers import nll
from .resting import activation_bytes, resting_activations, to_device, to_host

WIDE = 4
"""Bytes of a number in float32, in which a copy is trained."""


STEP = 2**25
"""Elements of a weight that take a step together: an optimiser makes some tensors as large."""


class Optimisers(dict[Tensor, list[torch.optim.Optimizer]]):
    """The optimisers of each weight: one of every `STEP` elements."""

    rest = False
    """Whether moments, and what a forward pass keeps, rest in the host's memory (`resting`)."""


def make_optimisers(name: str, model: LanguageModel, rate: float) -> Optimisers:
    """The attacker's optimiser, for each weight of a model apart, and for parts of large ones."""
    weights = model.weights.values()
    return Optimisers({w: [make_optimiser(name, [p], rate) for p in _parts(w)] for w in weights})


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of a weight's elements, some at a time."""
    return weight.detach().view(-1).split(STEP)


def room(model: LanguageModel, tokens: float, longest: float) -> float:
    """Bytes that fine-tuning takes besides the copy that is trained: two moments, one weight's
    gradient and step, and what a forward pass keeps.

    Arguments:
        model: its weights are not read.
        tokens: of a batch.
        longest: of a prompt.
    """
    largest = max(w.numel() for w in model.weights.values())
    kept = activation_bytes(model, longest, WIDE) * tokens
    return WIDE * (2 * model.n_parameters + largest + 2 * min(largest, STEP)) + kept


def descend(model: LanguageModel, optimisers: Optimisers, pairs: list[Pair]) -> None:
    """One step of fine-tuning on the answers of some pairs, in place; each weight takes it as soon
    as its gradient is whole, so that memory holds one gradient at a time."""

    def moments(optimiser: torch.optim.Optimizer) -> list[Tensor]:
        state = [t for each in optimiser.state.values() for t in each.values()]
        return [t for t in state if t.ndim] if optimisers.rest else []

    def take(w: Tensor) -> None:
        assert w.grad is not None
        whole, w.grad = w.grad.reshape(-1), None
        for optimiser, part, grad in zip(optimisers[w], _parts(w), whole.split(STEP), strict=True):
            (own,) = optimiser.param_groups[0]["params"]
            own.data, own.grad = part, grad
            to_device(moments(optimiser), w.device)
            optimiser.step()
            own.grad = None
            to_host(moments(optimiser))

    hooks = []
    try:
        for w in optimisers:
            hooks.append(w.requires_grad_(True).register_post_accumulate_grad_hook(take))
        with resting_activations(model) if optimisers.rest else nullcontext():
            nll(model, pairs).mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for w in optimisers:
            w.requires_grad_(False)


def make_optimiser(name: str, weights: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """The attacker's optimiser: ``adam``, or ``sgd`` with momentum 0.9."""
    if name == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
