"""What rests in the host's memory while a card that cannot hold everything computes with the rest.

Moving a tensor there and back does not change a bit of it, so that results are the same as on a
card that holds all. On the CPU nothing is moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..models.language_model import LanguageModel

Awake = Callable[[LanguageModel], AbstractContextManager[object]]
"""awake(model): the context in which a model that may rest is on the device."""


def free_bytes(device: torch.device) -> float:
    """What a card can still hold, in bytes; infinite on other devices."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def activation_bytes(model: LanguageModel, tokens: float, itemsize: int | None = None) -> float:
    """What a forward pass keeps for the backward pass, in bytes a token, about.

    Arguments:
        model: its weights are not read.
        tokens: of the longest prompt.
        itemsize: bytes of a number; default: of the weights' dtype.
    """
    a, config = model.architecture, model.config.get_text_config(decoder=True)
    mlp = getattr(config, "intermediate_size", None) or 4 * model.d_model
    numbers = a.n_layers * (16 * model.d_model + 5 * mlp + 2 * a.n_heads * tokens)
    return (itemsize or model.dtype.itemsize) * numbers


def to_host(tensors: Iterable[Tensor]) -> None:
    """Move tensors to the host's memory, in place; pinned, which is several times as quick."""
    for t in tensors:
        pinned = t.device.type == "cuda"
        t.data = torch.empty_like(t.data, device="cpu", pin_memory=pinned).copy_(t.data)


def to_device(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move tensors back, in place."""
    for t in tensors:
        t.data = t.data.to(device)


@contextmanager
def resting(
    models: Sequence[LanguageModel], need: float, *, beside: LanguageModel | None = None
) -> Iterator[Awake]:
    """While the body runs let the weights of some models rest, where the device has not ``need``
    bytes besides them. Of these models the body may only use those that it wakes.

    Arguments:
        models: on one device; they may share weights.
        need: bytes that the body takes on it.
        beside: another model that the body uses; what it shares with them stays.
    """
    if not models or free_bytes(device := models[0].device) >= need:
        yield lambda _: nullcontext()
        return
    shared = {id(w) for w in beside.weights.values()} if beside else set()
    every = {id(w): w for model in models for w in model.weights.values()}
    asleep = {k: w for k, w in every.items() if k not in shared}

    @contextmanager
    def awake(model: LanguageModel) -> Iterator[None]:
        own = {id(w): w for w in model.weights.values() if id(w) in asleep}
        for k in own:
            del asleep[k]
        to_device(own.values(), device)
        try:
            yield
        finally:
            asleep.update(own)
            to_host(own.values())

    to_host(asleep.values())
    try:
        yield awake
    finally:
        to_device(asleep.values(), device)


@contextmanager
def resting_activations(model: LanguageModel) -> Iterator[None]:
    """While the body runs, what forward passes keep for backward ones rests, but for weights."""
    weights = {w.untyped_storage()._cdata for w in model.weights.values()}

    def pack(t: Tensor) -> tuple[Tensor, torch.device | None]:
        if t.untyped_storage()._cdata in weights or not t.is_floating_point():
            return t, None
        kept = t.detach()  # a view of its own, which alone is moved
        to_host([kept])
        return kept, t.device

    def unpack(packed: tuple[Tensor, torch.device | None]) -> Tensor:
        t, device = packed
        if device is not None:
            to_device([t], device)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
