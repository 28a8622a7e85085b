"""Several processes of a ``torch.distributed`` group that share out work, if there is a group.

Every process does the same, except that each takes its `shard` of pairs, batches or losses, and
what comes out is summed: all then hold the same numbers. Only the first one writes files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def _active() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def launched() -> int:
    """How many processes a launcher (torchrun, accelerate launch) says that it started; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Join the processes that a launcher started, over gloo; one process alone joins nothing."""
    if launched() < 2 or _active():
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def cores() -> int:
    """How many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not say
        return os.cpu_count() or 1


def rank() -> int:
    """This process's number; 0 without a group."""
    return distributed.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes there are; 1 without a group."""
    return distributed.get_world_size() if _active() else 1


def shard(items: Sequence[T]) -> tuple[T, ...]:
    """The items that are this process's own: every ``world_size``-th."""
    return tuple(items[rank() :: world_size()])


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if _active():
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        moved = tensor.to(device).contiguous()
        distributed.all_reduce(moved)
        tensor.copy_(moved.to(torch.device(tensor.device)))
    return tensor


def sum_number(value: float) -> float:
    """The sum of a number over all processes."""
    return float(sum_over_processes(torch.tensor(value, dtype=torch.float64)))


def first_says(yes: bool) -> bool:
    """The first process's answer, for all of them; returns once every process has asked."""
    return bool(sum_number(float(yes and rank() == 0)))
