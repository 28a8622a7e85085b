"""What hooks of TransformerLens get, and one that remembers what passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from ..errors import CircuitError

Component: TypeAlias = Any
"""A module of TransformerLens or bitsandbytes; which attributes it has depends on the library's
version and the architecture."""


@runtime_checkable
class HookPoint(Protocol):
    """What TransformerLens hands to a hook beside the value."""

    name: str | None
    """As in the hook list."""


Hook = Callable[[Tensor, HookPoint], Tensor | None]


class Recorder:
    """Remembers the tensors that pass the named hooks."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor:
        """Remember a value under its hook point's name, and pass it on.

        A view: where attention and MLP share one norm (Phi), the gradient at one of them must not
        hold the other's.
        """
        seen = self.seen[str(hook.name)] = value.view_as(value)
        return seen

    def on(self, names: list[str]) -> list[tuple[str, Hook]]:
        """Hook list for `Stream.hooked`."""
        return [(n, self) for n in names]

    def __getitem__(self, name: str) -> Tensor:
        """What passed a hook point.

        Raises:
            CircuitError: nothing did.
        """
        if name not in self.seen:
            raise CircuitError(
                f"This version of TransformerLens does not run the hook point {name} on this "
                "architecture. Install transformer-lens 4.3 or newer."
            )
        return self.seen[name]
