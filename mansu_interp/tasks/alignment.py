"""Which token of a prompt stands for which of another that has more tokens, or fewer (ours).

The tokens that both begin with stand for each other, and the rest is counted from the end, so that
the last tokens always meet; where the rest of one is longer, its first tokens all get the first of
the other's rest::

    clean      the capital of   New     Zealand   is
    corrupt    the capital of  (Malta)   Malta    is

    clean      the capital of           Malta     is
    corrupt    the capital of  [New]   Zealand    is

What stands in brackets has no token of its own: (Malta) is taken twice, [New] by none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def align(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """For each token of a prompt, the position in another that stands for it; of equally many
    tokens, the same position. Both have at least one."""
    if len(one) == len(other):
        return tuple(range(len(one)))
    least = min(len(one), len(other)) - 1  # the last tokens meet, whatever they are
    begun = next((k for k in range(least) if one[k] != other[k]), least)
    shift = len(other) - len(one)
    return tuple(k if k < begun else max(k + shift, begun) for k in range(len(one)))


def take(
    value: Shaped[Tensor, "batch old ..."], at: Int[Tensor, "batch new"]
) -> Shaped[Tensor, "batch new ..."]:
    """The values at some positions of each row."""
    at = at.to(value.device)
    return value[torch.arange(len(at), device=value.device)[:, None], at]
