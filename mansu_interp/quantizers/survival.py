"""What a quantizer makes of a whole model, and of an edit to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ..errors import ModelError
from ..models.language_model import LanguageModel
from ..utils.ranges import entrance
from ..utils.words import Shown
from .base import Quantizer
from .registry import get_quantizer


@torch.no_grad()
@entrance(ModelError)
def quantize(
    model: LanguageModel,
    quantizer: Quantizer | str = "nf4",
    calibration: Sequence[Sequence[int]] = (),
    *,
    sharing: bool = False,
) -> LanguageModel:
    """A copy whose linear weights went through a quantizer and back.

    De-quantized weights sit in a plain model, so that every analysis runs on it unchanged. Layers
    whose shape the quantizer's library does not take stay as they are.

    Arguments:
        model: not changed.
        quantizer: one of `QUANTIZERS`, or its name.
        calibration: prompts as token ids, such as `Task.calibration`; only calibrated ones look.
        sharing: what is not quantized is the model's own, not a copy: editing one edits both.

    Raises:
        ConfigError: unknown quantizer, its library is missing, or calibration prompts are.
    """
    model.check_editable()
    quantizer = get_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    layers = quantizer.fit(model, calibration)
    copy = model.copy(sharing=set(model.weights) - set(layers) if sharing else ())
    for name, layer in layers.items():
        copy.weights[name].copy_(layer.round_trip(model.weights[name].cpu()))
    return copy


@dataclass(frozen=True, repr=False)
class Survival(Shown):
    """What one quantizer makes of an edit."""

    edited: int
    """Weights whose value differs, in layers that the quantizer touches."""
    survived: int
    """Edited weights whose code changed."""
    collateral: int
    """Unedited weights whose code changed."""
    intended: int | None = None
    """Edited weights whose quantized value moved in the direction of the edit. This and all below
    are None where the quantizer moves scales between layers (AWQ)."""
    update_over_bin: float | None = None
    """RMS of the edit over the RMS of the local bin width (the group's mean gap between levels).
    None, too, where all edits lie in groups of zeros, which have no bins."""
    share_kept: float | None = None
    """<dQ, d> / <d, d>: the share of the edit that is left in the quantized model, 1 = all."""
    noise_over_signal: float | None = None
    """||dQ - d|| / ||d||: what rounding adds to the edit, over the edit."""

    def told(self) -> dict[str, object]:
        """For its short form: what is known."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


def _of_both(
    before: LanguageModel,
    after: LanguageModel,
    quantizer: Quantizer,
    calibration: Sequence[Sequence[int]],
    embedding: bool,
) -> list[tuple[str, Quantizer, Quantizer]]:
    """Each weight that is quantized in both checkpoints, with what quantizes it in either."""
    if embedding:
        names = [before.embedding_name]
        layers = [{n: quantizer for n in names if quantizer.touches(before.weights[n])}] * 2
    else:
        names = before.linear_names
        layers = [quantizer.fit(model, calibration) for model in (before, after)]
    first, second = layers
    return [(n, first[n], second[n]) for n in names if n in first and n in second]


@torch.no_grad()
@entrance(ModelError)
def survival(
    before: LanguageModel,
    after: LanguageModel,
    quantizer: Quantizer | str = "nf4",
    calibration: Sequence[Sequence[int]] = (),
    embedding: bool = False,
) -> Survival:
    """Compare two checkpoints code by code, over every quantized weight (arguments: `quantize`).

    With ``embedding``: over the input embedding alone, were it quantized as linear layers are.
    """
    before.check_editable()
    after.check_editable()
    quantizer = get_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    edited = survived = collateral = intended = 0
    update = bins = along = noise = 0.0
    for name, first, second in _of_both(before, after, quantizer, calibration, embedding):
        a, b = before.weights[name].cpu().float(), after.weights[name].cpu().float()
        moved = (a != b).flatten()
        # The same quantizer gives the same weight the same codes; a calibrated one need not.
        if first is second and not moved.any():
            continue
        cells_a, cells_b = first.cells(a), second.cells(b)
        changed = cells_a.codes != cells_b.codes
        edited += int(moved.sum())
        survived += int((changed & moved).sum())
        collateral += int((changed & ~moved).sum())
        d = (b - a).flatten()[moved].double()
        dq = (second.round_trip(b) - first.round_trip(a)).flatten()[moved].double()
        update += float(d @ d)
        bins += float(cells_a.width[moved].double().square().sum())
        along += float(dq @ d)
        intended += int((dq * d > 0).sum())
        noise += float((dq - d).square().sum())
    if quantizer.rescales:
        return Survival(edited, survived, collateral)
    if not edited:
        return Survival(
            0,
            0,
            collateral,
            intended=0,
            update_over_bin=0.0,
            share_kept=0.0,
            noise_over_signal=0.0,
        )
    return Survival(
        edited,
        survived,
        collateral,
        intended=intended,
        update_over_bin=(update / bins) ** 0.5 if bins else None,
        share_kept=along / update,
        noise_over_signal=(noise / update) ** 0.5,
    )


@torch.no_grad()
def survival_elsewhere(
    before: LanguageModel, after: LanguageModel, quantizer: Quantizer
) -> dict[str, Survival]:
    """`survival` in other libraries, and in the arithmetic of the checkpoints' dtype, by where (see
    `Quantizer.elsewhere`); counts alone. Of checkpoints in two dtypes it is empty."""
    dtype, found = before.saved_dtype, dict[str, list[int]]()
    if after.saved_dtype != dtype:
        return {}
    for name, of, _ in _of_both(before, after, quantizer, (), embedding=False):
        a, b = before.weights[name].cpu().float(), after.weights[name].cpu().float()
        moved, then = (a != b).flatten(), of.elsewhere(b, dtype)
        for where, cells in of.elsewhere(a, dtype).items():
            changed = cells.codes != then[where].codes
            counts = moved, changed & moved, changed & ~moved
            sums = found.setdefault(where, [0, 0, 0])
            found[where] = [x + int(y.sum()) for x, y in zip(sums, counts, strict=True)]
    return {where: Survival(*counts) for where, counts in found.items()}
