"""Sums over the processes of a ``torch.distributed`` group, if there is one."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def _active() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """This process's number; 0 without a group."""
    return distributed.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes there are; 1 without a group."""
    return distributed.get_world_size() if _active() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if _active():
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        moved = tensor.to(device)
        distributed.all_reduce(moved)
        tensor.copy_(moved.to(torch.device(tensor.device)))
    return tensor
