"""Gradients of losses with respect to some weights, and values held a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.language_model import LanguageModel
from ..models.stream import widen
from ..tasks.pairs import Pair, by_phrasing, chunks
from ..utils.distributed import shard, sum_over_processes

Weights = dict[str, Float[Tensor, "*_shape"]]
"""One value per element of some weights, by name, in the weights' own shapes."""
WeightMap = Mapping[str, Float[Tensor, "*_shape"]]
"""The same, or a `ByLayer`, which holds one layer at a time, or a `ReadOnce`."""
Positions = Mapping[str, Int[Tensor, " _m"]]
"""Flat positions of some elements of some weights, by name."""
Elements = Sequence[str] | Positions
"""Whole weights, by name, or some elements of each."""


CHUNK = 48
"""Prompts of one phrasing per pass, at most, where a verdict is made."""
PACK = 2**17
"""Numbers of a residual stream (padded tokens x d_model) up to which chunks are computed together:
below it a pass through a layer costs more in calls than in arithmetic."""


def passes(pairs: Sequence[Pair], size: int, d_model: int) -> list[list[Pair]]:
    """Pairs in the parts that are computed together: at most ``size`` of one phrasing, which share
    the computation of what they begin with, or several such parts (`packed`)."""
    return packed([c for group in by_phrasing(pairs) for c in chunks(group, size)], d_model)


def packed(groups: Sequence[list[Pair]], d_model: int) -> list[list[Pair]]:
    """Chunks, those together that are small enough for one pass (`PACK`)."""
    found: list[list[Pair]] = []
    longest = 0
    for group in groups:
        longest = max(longest, *(len(p.clean) for p in group))
        if found and (len(found[-1]) + len(group)) * longest * d_model <= PACK:
            found[-1] = [*found[-1], *group]
        else:
            found.append(group)
            longest = max(len(p.clean) for p in group)
    return found


def gradient(
    model: LanguageModel, of: Elements, losses: Sequence[Callable[[], Tensor]]
) -> list[Float[Tensor, "*_shape"]]:
    """Gradient of a sum of losses with respect to some weights, leaving no trace on the model.

    Each loss is computed and differentiated before the next, so memory holds one at a time. Inside
    a ``torch.distributed`` process group each process computes its share of the losses and all
    return the gradient of the whole sum.

    The gradient of one loss has the weights' dtype; it is added up in float32.

    Arguments:
        model: whose weights.
        of: their names; or positions in them, to get the gradient there alone: memory then holds
            the whole gradient of one weight at a time.
        losses: each is called once.
    """
    return [sum_over_processes(g) for g in local_gradient(model, of, shard(losses))]


def local_gradient(
    model: LanguageModel,
    of: Elements,
    losses: Iterable[Callable[[], Tensor]],
    *,
    squared: bool = False,
) -> list[Float[Tensor, "*_shape"]]:
    """`gradient` of losses that are this process's own; with ``squared`` the sum of the squares of
    each loss's gradient."""
    total: dict[str, Tensor] = {}
    wanted = {n: model.weights[n] for n in of}
    held = {n: w.grad for n, w in wanted.items()}
    at = of if isinstance(of, Mapping) else {}

    def take(name: str, weight: Tensor) -> None:
        """Add a weight's gradient as soon as it is whole, and free it."""
        found, weight.grad = weight.grad, None
        assert found is not None
        part = widen(found.flatten()[at[name].to(found.device)] if name in at else found)
        if squared:
            part.square_()
        total[name] = total[name].add_(part) if name in total else part

    hooks = []
    try:
        for name, weight in wanted.items():
            weight.requires_grad_(True).grad = None
            hooks.append(weight.register_post_accumulate_grad_hook(partial(take, name)))
        for loss in losses:
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in wanted.items():
            weight.requires_grad_(False).grad = held[name]
    return [
        total[n] if n in total else torch.zeros_like(widen(w.flatten()[at[n]] if n in at else w))
        for n, w in wanted.items()
    ]


class ReadOnce(Mapping[str, Float[Tensor, "*_shape"]]):
    """Values per weight, of which those that were taken are freed."""

    def __init__(self, values: Weights) -> None:
        self.left = values

    def take(self, name: str) -> Float[Tensor, "*_shape"]:
        """A weight's values, for the last time."""
        return self.left.pop(name)

    def __getitem__(self, name: str) -> Float[Tensor, "*_shape"]:
        return self.left[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.left)

    def __len__(self) -> int:
        return len(self.left)


def take(values: WeightMap, name: str) -> Float[Tensor, "*_shape"]:
    """A weight's values, for the last time if they are a `ReadOnce`."""
    return values.take(name) if isinstance(values, ReadOnce) else values[name]


def by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of weights by the number of their layer; those of none by themselves."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(_layer(name), []).append(name)
    return layers


def _layer(name: str) -> str:
    found = re.search(r"\.(\d+)\.", name)
    return found.group(1) if found else name


class ByLayer(Mapping[str, Float[Tensor, "*_shape"]]):
    """Values per weight, computed for one layer at a time and held for that layer only.

    Reads like a dictionary of all of them. Read layer after layer, every layer is computed once.
    """

    def __init__(self, names: Sequence[str], compute: Callable[[list[str]], Weights]) -> None:
        """``compute`` gives the values of the weights that it is told."""
        self.compute = compute
        self.layers = by_layer(names)
        self.held: Weights = {}

    def __getitem__(self, name: str) -> Float[Tensor, "*_shape"]:
        if name not in self.held:
            self.held = {}  # freed before the next layer is computed
            self.held = self.compute(self.layers[_layer(name)])
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return (n for names in self.layers.values() for n in names)

    def __len__(self) -> int:
        return sum(map(len, self.layers.values()))
