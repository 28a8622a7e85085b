"""A second device for machines that have none.

Its tensors lie in the CPU's memory, but torch treats them as those of an accelerator, with CUDA's
rules of what may be mixed, and its division by a plain number, which multiplies by the reciprocal.
Importing this registers the device ``pretend`` with torch, for the whole process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

DEVICE = "pretend:0"
MAY_MIX = ("aten.copy_", "aten._to_copy", "aten.index.", "aten.index_put", "aten._index_put")
"""Operations that CUDA allows between the devices: copies, and indices that lie on the CPU."""


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Held(torch.Tensor):
    """A tensor that says it is on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Held:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
        )
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a pretend tensor to numpy: use Tensor.cpu() first")

    def __repr__(self, **_: Any) -> str:
        return f"Held({self.held})"


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on what the tensors hold, if CUDA would."""
    name, given = str(func), [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    here = [t for t in given if isinstance(t, Held)]
    away = [t for t in given if not isinstance(t, Held)]
    mixed = here and any(t.ndim for t in away)
    if mixed and not name.startswith(MAY_MIX):
        raise RuntimeError(f"{name}: expected all tensors to be on one device")
    if here and "index" in name and not isinstance(args[0], Held):
        raise RuntimeError(f"{name}: indices of a CPU tensor must be on the CPU")
    if name == "aten.div.Tensor" and here and isinstance(args[0], Held) and away:
        func, args = torch.ops.aten.mul.Tensor, (args[0], 1 / away[0].to(args[0].dtype))
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a generator of the device")
    to = kwargs.get("device")
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(Held, lambda t: t.held, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    same = {id(t.held): t for t in here} | {id(t): t for t in away}
    leaves = to is not None and torch.device(to).type == "cpu"

    def wrap(t: torch.Tensor) -> torch.Tensor:
        """In-place operations give back the very tensor."""
        return same[id(t)] if id(t) in same else t if leaves else Held(t)

    return tree_map_only(torch.Tensor, wrap, out)


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    a, b = (t.held if isinstance(t, Held) else t for t in (source, target))
    b.copy_(a)
    return target


def _made(func: Any) -> Any:
    return lambda *args, **kwargs: _run(func, args, kwargs)


_setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)
_library = torch.library.Library("aten", "IMPL")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("empty.memory_format", _made(torch.ops.aten.empty.memory_format), "PrivateUse1")
_library.impl("empty_strided", _made(torch.ops.aten.empty_strided.default), "PrivateUse1")
