"""Faithfulness: the metric with all edges outside a circuit ablated, exactly (see `rebuild`)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..errors import CircuitError
from ..models.hooked import AnyModel
from ..models.stream import widen
from ..tasks.pairs import PairSet
from ..utils.distributed import shard, sum_over_processes
from ..utils.kinds import expect_kind
from .metrics import Metric, get_metric
from .rebuild import Edges, Rebuilder, check_exact

ABLATIONS = ("corrupt", "mean", "zero")
"""What an edge outside the circuit may carry."""


class Ablation(Rebuilder):
    """A model in which all edges outside a circuit are ablated, on fixed pairs.

    What does not depend on the circuit is computed once, so that many circuits are cheap to try. An
    instance is a function of the circuit's edges: the mean metric over the pairs.

    Arguments:
        model: a `LanguageModel` or HookedTransformer.
        pairs: clean and corrupt prompts.
        metric: name, or a function as in `attribute`.
        ablation: what an edge outside carries: ``corrupt`` (its value in the corrupt run),
            ``mean`` (its mean over the corrupt prompts at the same position) or ``zero``.
        batch_size: pairs per forward pass; changes memory and speed, not the result.

    Raises:
        CircuitError: unknown ablation, a model that cannot be rebuilt exactly, or a metric that is
            the same for the full and the empty circuit.
    """

    def __init__(
        self,
        model: AnyModel,
        pairs: PairSet,
        *,
        metric: Metric | str = "logit_diff",
        ablation: str = "corrupt",
        batch_size: int = 16,
    ) -> None:
        if ablation not in ABLATIONS:
            raise CircuitError(
                f"Unknown ablation {ablation!r}; expected one of {', '.join(ABLATIONS)}."
            )
        expect_kind(CircuitError, "pairs", pairs, PairSet)
        super().__init__(model)
        check_exact(self, pairs)
        self.metric = get_metric(metric)
        self.n_pairs = len(pairs)
        mine = shard(pairs.pairs)
        device = self.stream.model.device
        batches = list(PairSet(pairs.name, mine).batches(batch_size, device)) if mine else []
        means = self._means(pairs, batch_size) if ablation == "mean" else None
        self.bases = [self.base(b, ablation, means) for b in batches]
        self._ends: tuple[float, float] | None = None

    @torch.no_grad()
    def _means(self, pairs: PairSet, batch_size: int) -> list[Tensor]:
        """Mean write at each position over the corrupt prompts that reach it, per hook point; for
        heads ``[heads, 1, pos, d_model]``."""
        longest = max(len(p.corrupt) for p in pairs)
        total: dict[str, Tensor] = {}
        count = torch.zeros(longest, device=self.stream.model.device)
        writes_at = {self.stream.input: widen}
        for i in range(self.stream.n_layers):
            writes_at[self.stream.z(i)] = partial(self.stream.head_writes, i)
            writes_at[self.stream.mlp_out(i)] = partial(self.stream.mlp_write, i)
        for batch in pairs.batches(batch_size, count.device):
            real = (
                torch.arange(batch.corrupt.shape[1], device=count.device)[None]
                <= batch.last[:, None]
            )
            count[: real.shape[1]] += real.sum(0)
            for name, seen in self.writes(batch).items():
                weighed = widen(writes_at[name](seen)) * real[..., None]
                summed = weighed.sum(-3, keepdim=True)
                if name not in total:
                    total[name] = summed.new_zeros(*summed.shape[:-2], longest, summed.shape[-1])
                total[name][..., : summed.shape[-2], :] += summed
        names = self.stream.writers()
        return [total[n] / count[:, None].clamp_min(1) for n in names]

    def __call__(self, edges: Edges) -> float:
        """Mean metric over the pairs, with everything outside ``edges`` ablated."""
        expect_kind(CircuitError, "edges", edges, np.ndarray)
        if edges.shape != self.graph.exists.shape or edges.dtype != bool:
            raise CircuitError(
                f"edges: got {edges.dtype} of shape {list(edges.shape)}, expected booleans of "
                f"shape {list(self.graph.exists.shape)}, such as circuit.edges of this model."
            )
        total = torch.zeros(1, dtype=torch.float64)
        for base in self.bases:
            logits = self.logits(base, edges)
            total += self.metric(logits, base.batch, base.clean_logits).sum().item()
        return float(sum_over_processes(total)) / self.n_pairs

    @property
    def ends(self) -> tuple[float, float]:
        """Metric of the full and of the empty circuit."""
        if self._ends is None:
            exists = self.graph.exists
            full, empty = self(exists), self(np.zeros_like(exists))
            if not abs(full - empty) > 1e-6:
                raise CircuitError(
                    f"The metric is {full:.4g} with the full circuit and {empty:.4g} with none: "
                    "nothing to explain. Clean and corrupt prompts must differ in the answer."
                )
            self._ends = full, empty
        return self._ends

    def faithfulness(self, edges: Edges) -> float:
        """0 for the empty circuit, 1 for the full one; may lie outside [0, 1]."""
        full, empty = self.ends
        return (self(edges) - empty) / (full - empty)
