"""What a quantizer makes of a whole model, and of an edit to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models import LanguageModel
from .base import Quantizer
from .registry import get_quantizer


@torch.no_grad()
def quantize(model: LanguageModel, quantizer: Quantizer | str = "nf4") -> LanguageModel:
    """A copy whose linear weights went through a quantizer and back.

    De-quantized weights sit in a plain model, so that every analysis runs on it unchanged. Layers
    whose shape the quantizer's library does not take stay as they are.
    """
    quantizer = get_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    copy = model.copy()
    for name in copy.linear_names:
        if quantizer.touches(copy.weights[name]):
            copy.weights[name].copy_(quantizer.round_trip(copy.weights[name]))
    return copy


@dataclass(frozen=True)
class Survival:
    """What one quantizer makes of an edit."""

    edited: int
    """Weights whose value differs, in layers that the quantizer touches."""
    survived: int
    """Edited weights whose code changed."""
    collateral: int
    """Unedited weights whose code changed."""
    update_over_bin: float
    """RMS of the edit over the RMS of the local bin width (the group's mean gap between levels)."""
    projection: float
    """<dQ, d> / <d, d>: the share of the edit that the quantized model keeps, 1 = all."""
    intended: int = 0
    """Edited weights whose quantized value moved in the direction of the edit."""
    noise_over_signal: float = 0.0
    """||dQ - d|| / ||d||: what rounding adds to the edit, over the edit."""


@torch.no_grad()
def survival(
    before: LanguageModel, after: LanguageModel, quantizer: Quantizer | str = "nf4"
) -> Survival:
    """Compare two checkpoints code by code, over every quantized weight."""
    quantizer = get_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    edited = survived = collateral = intended = 0
    update = bins = kept = noise = 0.0
    for name in before.linear_names:
        a, b = before.weights[name], after.weights[name]
        moved = (a != b).flatten()
        if not moved.any() or not quantizer.touches(a):
            continue
        cells_a, cells_b = quantizer.cells(a), quantizer.cells(b)
        changed = cells_a.codes != cells_b.codes
        edited += int(moved.sum())
        survived += int((changed & moved).sum())
        collateral += int((changed & ~moved).sum())
        d = (b - a).flatten()[moved].double()
        dq = (quantizer.round_trip(b) - quantizer.round_trip(a)).flatten()[moved].double()
        update += float(d @ d)
        bins += float(cells_a.width[moved].double().square().sum())
        kept += float(dq @ d)
        intended += int((dq * d > 0).sum())
        noise += float((dq - d).square().sum())
    if not edited:
        return Survival(0, 0, 0, 0.0, 0.0)
    return Survival(
        edited,
        survived,
        collateral,
        (update / bins) ** 0.5,
        kept / update,
        intended,
        (noise / update) ** 0.5,
    )
