"""Peak memory of code on models that are not there: fake weights, and a count of the bytes alive.

Weights are fake tensors (torch's FakeTensorMode): shapes and dtypes without numbers. What is
computed of them is fake, too; tokens, masks of padding and positions are real, so that their
shapes are known. Questions about fake numbers are answered so that nothing is cheaper than it can
be: a number is 1, a condition holds, nothing is NaN, and of a mask a given share is True.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mansu_interp.audit import linearized, relearning
from mansu_interp.circuits import attribution
from mansu_interp.losses import descent, resting
from mansu_interp.masks import floor, select
from mansu_interp.masks.pool import SAMPLE, Pool, Regions
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers import base, packed
from mansu_interp.quantizers.base import in_parts
from mansu_interp.quantizers.registry import get_quantizer

aten = torch.ops.aten


def make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Put fake weights and buffers of the same shapes in the place of a module's, which may be on
    the meta device; tied ones stay tied."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()

    def fake(t: Tensor) -> Tensor:
        if id(t) not in made:
            with mode:
                made[id(t)] = torch.empty(t.shape, dtype=dtype, device="cpu")
        return made[id(t)]

    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                found = fake(weight)
                if not isinstance(found, nn.Parameter):
                    found = made[id(weight)] = nn.Parameter(found, requires_grad=False)
                part._parameters[name] = found
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = fake(buffer)


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that are alive while it is active.

    Arguments:
        held: what is there already.
        share: of the elements of a fake mask that are True.
    """

    def __init__(self, held: Iterable[Tensor] = (), share: float = 1.0) -> None:
        super().__init__()
        self.share, self.alive, self.peak = share, 0, 0
        self.host = False
        """Whether what is made lies in the host's memory, which is not counted."""
        self._known: dict[int, int] = {}
        for t in held:
            self._count(t)

    @property
    def gb(self) -> float:
        """The peak in GB (10^9 bytes)."""
        return self.peak / 1e9

    def _count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or self.host:
            return
        self._known[key] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self._known.pop(key)

    def _places(self, mask: Tensor) -> list[Tensor]:
        """Positions of the elements of a mask that are True, by dimension."""
        if not isinstance(mask, FakeTensor):
            return list(mask.nonzero(as_tuple=True))
        n = int(self.share * mask.numel())
        with mask.fake_mode:
            return [torch.empty(n, dtype=torch.int64) for _ in mask.shape]

    def _answer(self, func: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
        """Whether an operation asks for values, and what it is told."""
        if func is aten._local_scalar_dense.default:
            return True, torch.ones((), dtype=args[0].dtype).item()
        if func is aten.equal.default:
            return True, True
        if func is aten.isnan.default:
            return True, torch.zeros(args[0].shape, dtype=torch.bool)
        if func is aten.nonzero.default:
            return True, torch.stack(self._places(args[0]), 1)
        if func is aten.index.Tensor:
            places: list[Tensor | None] = []
            for i in args[1]:
                places += self._places(i) if i is not None and i.dtype == torch.bool else [i]
            return True, func(args[0], places)
        return False, None

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count what it gives."""
        found, asked = None, False
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            asked, found = self._answer(func, args)
        if not asked:
            found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                self._count(x)
        return found


def _some_rows(regions: Regions) -> dict[str, Tensor]:
    """As many rows of each weight as `sampled_rows` takes where all of it is in the region."""
    share = SAMPLE / max(1, sum(inside.numel() for inside in regions.values()))
    return {n: torch.arange(max(1, round(share * len(x)))) for n, x in regions.items()}


class _Pool(Pool):
    """Of equal scores: the first stay, and each weight has its share."""

    def add(self, name: str, score: Tensor, index: Tensor) -> None:
        if self.names:
            score, index = torch.cat([self.score, score]), torch.cat([self.index, index])
        of = torch.zeros_like(index)
        self.names.append(name)
        if len(score) > self.n:
            chosen = score >= score.kthvalue(len(score) - self.n + 1).values
            assert len(chosen) == len(score)
            score, of, index = (x[: self.n].clone() for x in (score, of, index))
        self.score, self.weight, self.index = score, of, index

    def indices(self) -> dict[str, Tensor]:
        parts = self.index.tensor_split(len(self.names))
        return dict(zip(self.names, (part.clone() for part in parts), strict=True))


def _fake_trainable_copy(model: LanguageModel, sharing: Collection[str] = ()) -> LanguageModel:
    """`LanguageModel.trainable_copy`, which cannot swap fake weights for others."""
    copied = model.copy()
    for w in copied.weights.values():
        w.data = torch.empty_like(w.data, dtype=torch.float32)
    return replace(copied, hf=copied.hf)


@contextmanager
def full_card(tracker: Tracker) -> Iterator[None]:
    """Feign a card that is too small for anything to stay on it that may rest elsewhere."""

    def to_host(tensors: Iterable[Tensor]) -> None:
        tracker.host = True
        to_device(tensors)
        tracker.host = False

    def to_device(tensors: Iterable[Tensor], *_: object) -> None:
        for t in tensors:
            t.data = torch.empty_like(t.data)

    with ExitStack() as stack:
        for module in (resting, descent):
            stack.enter_context(patch.object(module, "to_host", to_host))
            stack.enter_context(patch.object(module, "to_device", to_device))
        for module in (resting, relearning, linearized):
            stack.enter_context(patch.object(module, "free_bytes", lambda _: 0.0))
        yield


@contextmanager
def stand_ins(survive: Sequence[str]) -> Iterator[None]:
    """What numbers decide, for models without any.

    The check that a model is rebuilt exactly is left out. Quantizers' libraries give float32 of a
    weight's shape; every group is one of 32. Loops over equal parts of a weight look at the first
    part, codes are packed in parts of 4 million and unpacked a whole weight at a time.

    Arguments:
        survive: the quantizers.
    """
    patches: Mapping[str, tuple[object, object]] = {
        "check_exact": (attribution, lambda *_: None),
        "in_parts": (floor, lambda units: islice(in_parts(units), 1)),
        "sampled_rows": (select, _some_rows),
        "Pool": (select, _Pool),
        "_alike": (packed, lambda values, size: size <= 32),
        "BYTES": (packed, 2**40),
        "trainable_copy": (LanguageModel, _fake_trainable_copy),
    }

    def few_parts(units: Tensor) -> Iterator[tuple[slice, Tensor]]:
        with patch.object(base, "PART", 2**22):
            yield from in_parts(units)

    def round_trip(quantizer: object, weight: Tensor) -> Tensor:
        return torch.empty_like(weight, dtype=torch.float32)

    with ExitStack() as stack:
        for name, (of, stand_in) in patches.items():
            stack.enter_context(patch.object(of, name, stand_in))
        stack.enter_context(patch.object(packed, "in_parts", few_parts))
        for kind in {type(get_quantizer(name)) for name in survive}:
            stack.enter_context(patch.object(kind, "round_trip", round_trip))
        yield
