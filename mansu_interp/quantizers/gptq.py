"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), ours from the paper.

The grid is that of compressed-tensors' W4A16: symmetric INT4 in groups along a row, scale =
absmax / 7.5 of the original weight. Layers are quantized in the order of one forward pass, each on
what the layers before it, quantized already, send it for the calibration prompts:

1. H = X X^T over all tokens, plus 1 % of its mean diagonal on the diagonal.
2. Columns are taken by falling diagonal of H. Each is rounded to nearest, and its error is spread
   over the columns that are not rounded yet, such that ``||(W - Q) X||`` stays least.

How the error of column i spreads is row i of the upper Cholesky factor of H^-1; columns beyond the
current block of 128 get it block by block. Columns whose inputs are always 0 are set to 0; a layer
that no prompt reaches is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.language_model import LanguageModel
from .base import Quantizer, divided, grouped
from .fitted import Calibrated, Fitted

DAMPING = 0.01
BLOCK = 128
TINY = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Gptq(Calibrated):
    """GPTQ at one group size."""

    algorithm: str = "gptq"

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups."""
        return weight.shape[-1] % self.group == 0

    def calibrate(
        self, model: LanguageModel, rows: Int[Tensor, "rows pos"]
    ) -> dict[str, Quantizer]:
        """See `Calibrated.calibrate`."""
        work = model.copy()
        names = [n for n in work.linear_names if self.touches(work.weights[n])]
        scales = {n: group_scales(work.weights[n], self.group) for n in names}
        waiting, hooks = set(names), []

        def rounds(name: str) -> Callable[..., None]:
            def hook(
                module: torch.nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]
            ) -> None:
                if name in waiting:
                    x = (given[0] if given else named["input"]).flatten(0, -2)
                    waiting.remove(name)
                    _round(work.weights[name], scales[name], x.T @ x)

            return hook

        for name in names:
            layer = work.hf.get_submodule(name.removesuffix(".weight"))
            hooks.append(layer.register_forward_pre_hook(rounds(name), with_kwargs=True))
        try:
            work.hf.base_model(input_ids=rows.to(work.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for name in waiting:
            _round(work.weights[name], scales[name], None)
        return {n: Fitted(work.weights[n].float().cpu(), scales[n].cpu()) for n in names}


def group_scales(weight: Float[Tensor, "out in"], group: int) -> Float[Tensor, "groups 1"]:
    """Scales of groups along the rows: absmax / 7.5; of zeros, any."""
    absmax = grouped(weight, group).abs().amax(1, keepdim=True)
    scale = divided(absmax, 7.5)
    return torch.where(scale > 0, scale, TINY)


def _round(
    weight: Float[Tensor, "out in"],
    scales: Float[Tensor, "groups 1"],
    hessian: Float[Tensor, "in in"] | None,
) -> None:
    """Put the values of a weight's codes in its place."""
    group = weight.numel() // len(scales)
    each = scales.expand(-1, group).reshape(weight.shape)
    if hessian is None:
        codes = (weight / each).round().clamp(-8, 7)
    else:
        codes = gptq_codes(weight, each, hessian)
    weight.copy_(codes * each)


def gptq_codes(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Codes -8..7 of one weight, computed in float64.

    Arguments:
        weight: the original.
        scale: of each element's group.
        hessian: X X^T of the layer's inputs, not damped.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    h = hessian.double()[order][:, order]
    dead = h.diagonal() == 0
    # Turned, so that a column is a row, and lies in one piece.
    w, s = (x.double().T[order].contiguous() for x in (weight, scale))
    w[dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean() + dead.double())
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes, width = torch.empty_like(w), len(w)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.empty_like(w[start:end])
        for i in range(start, end):
            codes[i] = (w[i] / s[i]).round().clamp(-8, 7)
            errors[i - start] = (w[i] - codes[i] * s[i]) / spread[i, i]
            w[i + 1 : end].addr_(spread[i, i + 1 : end], errors[i - start], alpha=-1)
        w[end:] -= spread[start:end, end:].T @ errors
    return codes[order.argsort()].T.float().contiguous()
