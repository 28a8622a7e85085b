"""What the settings of every method share, and the registry that names them.

Knows nothing of torch, so that ``mansu --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar, get_args

from ..errors import ConfigError
from ..utils.ranges import check_kinds, check_range

Need = Literal["circuit", "mask", "references"]
"""What a method cannot do without: a circuit, a mask, or the original's own predictions on every
batch, to which its losses refer."""


@dataclass(frozen=True)
class MethodConfig:
    """What the settings of every method share."""

    method: ClassVar[str] = ""
    """Name of the method; see `METHODS`."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it cannot do without."""

    steps: int = 250
    """Optimiser steps; fewer where stop_at is reached."""
    batch_size: int = 48
    """Forget pairs per step; methods that retain take as many retain pairs."""
    lr: float = 1e-4
    """Step size, in the method's own unit."""
    stop_at: float | None = None
    """Stop when four-way forget accuracy on the dev phrasings is at most this."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_range(self, "steps", "batch_size", at_least=1)
        check_range(self, "lr", above=0)
        check_range(self, "stop_at")

    def at_strength(self, strength: float) -> MethodConfig:
        """The same settings with the step size, or whatever else decides how much a method changes,
        at a multiple."""
        return replace(self, lr=self.lr * strength)

    @property
    def promised(self) -> tuple[str, ...]:
        """Quantizers that every edit survives by construction; none unless a method says so."""
        return ()

    @property
    def trained_through(self) -> tuple[str, ...]:
        """Fitted quantizers that training takes turns with; none unless a method says so."""
        return ()


METHODS: dict[str, type[MethodConfig]] = {}
"""Name -> settings of every method, in the order in which they are listed."""

C = TypeVar("C", bound=MethodConfig)


def method(name: str, *, needs: Collection[Need] = ()) -> Callable[[type[C]], type[C]]:
    """Register a class of settings under the name of its method.

    Arguments:
        name: as on the command line.
        needs: what the method cannot do without.
    """

    def register(kind: type[C]) -> type[C]:
        if name in METHODS or set(needs) - set(get_args(Need)):
            raise ConfigError(f"The method {name!r} is taken, or needs something unknown.")
        kind.method, kind.needs = name, frozenset(needs)
        METHODS[name] = kind
        return kind

    return register


@dataclass(frozen=True)
class DenseConfig(MethodConfig):
    """What baselines share that train all weights with AdamW."""

    lr: float = 1e-4
    """Learning rate of AdamW, in units of the weights."""


@dataclass(frozen=True)
class RetainingConfig(DenseConfig):
    """What those share that have a retain loss."""

    retain_weight: float = 1.0
    """Weight of the retain loss beside the forget loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "retain_weight", at_least=0)


@dataclass(frozen=True)
class PreferenceConfig(RetainingConfig):
    """What those share whose forget loss is a log-sigmoid."""

    beta: float = 0.1
    """Inverse temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", above=0)
