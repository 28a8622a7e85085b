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


class Optimisers(dict[Tensor, torch.optim.Optimizer]):
    """An optimiser for each weight."""

    rest = False
    """Whether moments, and what a forward pass keeps, rest in the host's memory (`resting`)."""


def make_optimisers(name: str, model: LanguageModel, rate: float) -> Optimisers:
    """The attacker's optimiser, for each weight of a model apart."""
    return Optimisers({w: make_optimiser(name, [w], rate) for w in model.weights.values()})


def room(model: LanguageModel, tokens: float, longest: float) -> float:
    """Bytes that fine-tuning takes besides the copy that is trained: two moments, the step of one
    weight, and what a forward pass keeps.

    Arguments:
        model: its weights are not read.
        tokens: of a batch.
        longest: of a prompt.
    """
    largest = max(w.numel() for w in model.weights.values())
    kept = activation_bytes(model, longest, WIDE) * tokens
    return WIDE * (2 * model.n_parameters + 3 * largest) + kept


def descend(model: LanguageModel, optimisers: Optimisers, pairs: list[Pair]) -> None:
    """One step of fine-tuning on the answers of some pairs, in place; each weight takes it as soon
    as its gradient is whole, so that memory holds one gradient at a time."""

    def moments(w: Tensor) -> list[Tensor]:
        return [t for t in optimisers[w].state[w].values() if t.ndim] if optimisers.rest else []

    def take(w: Tensor) -> None:
        to_device(moments(w), w.device)
        optimisers[w].step()
        w.grad = None
        to_host(moments(w))

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
