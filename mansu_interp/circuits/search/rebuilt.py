"""The streams of circuits while a model is rebuilt (`..ablation`): what every writer adds in the
ablated run, and what each reader reads in the circuits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Shaped
from torch import Tensor

from ...errors import CircuitError
from ...models.stream import Stream
from ...tasks.pairs import Batch


@dataclass
class Base:
    """What the writers add in the ablated run, for one batch."""

    batch: Batch
    input: Float[Tensor, "#batch #pos d_model"]
    heads: list[Callable[[], Tensor]]
    """By layer: ``[heads, batch, pos, d_model]``, made when asked for."""
    mlps: list[Float[Tensor, "#batch #pos d_model"]]
    clean_logits: Float[Tensor, "batch vocab"]
    streams: list[Float[Tensor, "#batch #pos d_model"]] = field(default_factory=list)
    """The ablated stream before each layer's attention and before its MLP, and the final one."""
    projected: dict[str, Float[Tensor, "#batch pos heads d_head"]] = field(default_factory=dict)
    """By hook point, the projections of the ablated stream, once asked for."""


def ablated_streams(stream: Stream, base: Base) -> Iterator[Tensor]:
    """The ablated stream before each layer's attention and before its MLP, and the final one."""
    total = torch.zeros(stream.model.d_model, device=base.input.device) + base.input
    for i in range(stream.n_layers):
        bias = stream.output_bias(i)
        after = total + base.heads[i]().sum(0)
        after = after if bias is None else after + bias
        yield from (total, total if stream.parallel else after)
        total = after + base.mlps[i]
    yield total


class Rebuilt:
    """The streams of some circuits as they are being rebuilt.

    Arguments:
        base: the ablated run of the batch.
        keep: the circuits' edges, or their weights.
        probe: to differentiate by what each reader reads (one circuit).
    """

    def __init__(
        self, base: Base, keep: Shaped[np.ndarray, "circuits writers readers"], probe: bool = False
    ) -> None:
        self.base, self.keep = base, keep
        self.shape = (len(keep), len(base.batch))
        used = keep.any(0) | probe
        self.writes: list[bool] = np.any(used, axis=1).tolist()
        """Whether a writer has an edge in one of the circuits."""
        self.reads: list[bool] = np.any(used, axis=0).tolist()
        """Whether a reader has one."""
        self.changes: list[Tensor | None] = []
        """``[circuits, batch, pos, d_model]``: what each writer so far adds beyond its ablated
        value; None where no reader asks for it."""
        self.probes: dict[tuple[int, ...], Tensor] = {}
        """By columns, zeros that are added to what these readers read."""
        self.probe = probe

    def write(self, values: Float[Tensor, "n rows pos d"], base: Tensor) -> None:
        """Some writers write; ``base``: ``[n, batch, pos, d]``, their ablated values."""
        every = base.expand(len(values), *base.shape[1:])
        for value, ablated in zip(values, every, strict=True):
            live = self.writes[len(self.changes)]
            self.changes.append(value.unflatten(0, self.shape) - ablated if live else None)

    def read(
        self, columns: list[int], stream: int, written: int | None = None
    ) -> Float[Tensor, "n circuits batch pos d"]:
        """What some readers read: the ablated stream (its number in `Base.streams`), and what the
        writers so far change."""
        if not self.changes:
            raise CircuitError(
                "A reader runs before the embedding writes: one module is used in two places. This "
                "architecture is not supported."
            )
        weights = self.keep[:, : len(self.changes) if written is None else written][..., columns]
        base = self.base.streams[stream]
        width = self.base.batch.clean.shape[1]
        out = base.expand(len(columns), *self.shape, width, base.shape[-1])
        live = weights.any((0, 2)).nonzero()[0].tolist()
        if live:
            changes = [c for w in live if (c := self.changes[w]) is not None]
            kept = torch.from_numpy(weights[:, live]).to(changes[0])
            pattern = "circuits w n, circuits w batch pos d -> n circuits batch pos d"
            out = out + einsum(kept, torch.stack(changes, 1), pattern)
        if self.probe:
            probe = torch.zeros_like(out, memory_format=torch.contiguous_format)
            self.probes[tuple(columns)] = probe.requires_grad_()
            out = out + probe
        return out

    def derivatives(self, value: Float[Tensor, ""]) -> Float[Tensor, "writers readers"]:
        """Of a value of this pass by each edge's weight: what its writer changes, times the
        gradient at its reader's input, summed over tokens. Of each reader, what it reads must have
        been probed."""
        out = torch.zeros(self.keep.shape[1:], dtype=torch.float64)
        gradients = torch.autograd.grad(value, list(self.probes.values()), allow_unused=True)
        for columns, gradient in zip(self.probes, gradients, strict=True):
            for w, change in enumerate(self.changes):
                if gradient is not None and change is not None:
                    each = (gradient * change.detach()).flatten(1).sum(1)
                    out[w, list(columns)] = each.cpu().double()
        return out
