"""4-bit quantizers that fit a group's parameters, so that an edit may re-code its neighbours.

No promise is possible of them, and what survives is measured.

- ``hqq`` (Badri & Shaji 2023), as the ``hqq`` package does it: groups of 64 along a row, whose zero
  point is optimised over every element;
- ``awq``: activation-aware scaling of input channels (Lin et al. 2023), then rounding;
- ``autoround``: rounding and clipping learnt by signed gradient descent (Cheng et al. 2023).

The last two are the ``auto-round`` package's, on any processor: symmetric, in groups along a row.
They look at what the layers do on calibration prompts, so that the codes of one weight depend on
all others. AWQ also divides each channel's scale out of the layer before, so that its weights,
norms included, can be compared with the original's only as a whole model.
"""

from __future__ import annotations

import contextlib
import copy
import io
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..errors import ConfigError
from ..models.language_model import LanguageModel
from ..utils.libraries import library, quiet
from ..utils.tensors import tensors_sha256
from .base import Cells, Quantizer, affine, grouped

HQQ_GROUP = 64
ROW = 64
"""Tokens of a calibration row; auto-round drops shorter ones."""
ROWS = 128
MIDDLE = 8
"""Code of the value 0."""
REMEMBERED = 2
"""Models whose calibration is remembered: scoring and comparing a pair asks for each twice."""
_FITTED: dict[tuple[str, str, tuple[int, ...]], dict[str, Quantizer]] = {}


@dataclass(frozen=True)
class Hqq(Quantizer):
    """HQQ with the package's own defaults for 4 bits."""

    name: str = "hqq"
    promises: bool = False
    needs = (("hqq", "hqq"),)

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups of 64."""
        return weight.shape[-1] % HQQ_GROUP == 0

    def _quantize(
        self, weight: Float[Tensor, "out in"]
    ) -> tuple[Shaped[Tensor, "*_shape"], dict[str, object]]:
        quantizer = library("hqq.core.quantize", "hqq").Quantizer
        with quiet():
            return quantizer.quantize(
                weight.detach().float().contiguous(),
                nbits=4,
                group_size=HQQ_GROUP,
                round_zero=True,
                axis=1,
                bitpack=False,
                device="cpu",
            )

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`; every element counts as one that sets its group's parameters."""
        codes, meta = self._quantize(weight)
        codes = codes.view(-1, HQQ_GROUP)
        scale, zero = (torch.as_tensor(meta[k]).float().view(-1, 1) for k in ("scale", "zero"))
        x = grouped(weight, HQQ_GROUP)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        every = torch.ones_like(x, dtype=torch.bool)
        return affine(
            codes,
            scale=scale,
            offset=-zero * scale,
            levels=torch.arange(16.0),
            sets=every,
            lowest=low,
            highest=high,
        )

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        codes, meta = self._quantize(weight)
        quantizer = library("hqq.core.quantize", "hqq").Quantizer
        return quantizer.dequantize(codes, meta).float().view_as(weight)


@dataclass(frozen=True)
class Fitted(Quantizer):
    """One weight as a calibrated quantizer left it; knows no other."""

    restored: Float[Tensor, "*shape"]
    """Of a matrix, or of a norm that was scaled with it."""
    scale: Float[Tensor, "*groups"] | None = None
    """Of each group along a row; None: left in full precision, but scaled."""
    promises: bool = False

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """The cells that calibration gave to this weight."""
        if self.scale is None:
            raise ConfigError("This weight was scaled and not quantized: it has no codes.")
        return fitted_cells(weight.float().cpu(), self.restored, self.scale)

    def round_trip(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The values that calibration gave to this weight."""
        return self.restored


@dataclass(frozen=True)
class Calibrated(Quantizer):
    """One algorithm at one group size that looks at what the layers do on calibration prompts."""

    algorithm: str
    group: int = 128
    promises: bool = False

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in `get_quantizer`."""
        return f"{self.algorithm}-g{self.group}"

    @abstractmethod
    def calibrate(
        self, model: LanguageModel, rows: Int[Tensor, "rows pos"]
    ) -> dict[str, Quantizer]:
        """What quantizes each weight of a model, by name, after a look at rows of tokens."""

    def fit(
        self, model: LanguageModel, calibration: Sequence[Sequence[int]]
    ) -> dict[str, Quantizer]:
        """Quantize a whole model.

        Arguments:
            model: not changed.
            calibration: prompts as token ids, joined to rows of ``ROW`` tokens.

        Raises:
            ConfigError: a package is not installed, or there are too few calibration tokens.
        """
        tokens = [t for prompt in calibration for t in prompt][: ROW * ROWS]
        if len(tokens) < ROW:
            raise ConfigError(
                f"{self.name} needs at least {ROW} tokens of calibration prompts; "
                f"got {len(tokens)}."
            )
        key = (self.name, tensors_sha256(model.weights), tuple(tokens))
        if key not in _FITTED:
            while len(_FITTED) >= REMEMBERED:
                del _FITTED[next(iter(_FITTED))]
            rows = torch.tensor(tokens)[: len(tokens) // ROW * ROW].view(-1, ROW)
            _FITTED[key] = self.calibrate(model, rows)
        return dict(_FITTED[key])

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """Not of a lone weight: see `fit`."""
        raise ConfigError(f"{self.name} quantizes whole models; use quantize() and survival().")

    round_trip = cells  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class AutoRound(Calibrated):
    """One algorithm of auto-round, with the package's own defaults."""

    algorithm: str = "awq"
    needs = (("auto_round", "autoround"),)

    @property
    def rescales(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True of AWQ."""
        return self.algorithm == "awq"

    def calibrate(
        self, model: LanguageModel, rows: Int[Tensor, "rows pos"]
    ) -> dict[str, Quantizer]:
        """See `Calibrated.calibrate`."""
        hf = _rounded(self, model, rows)
        layers = dict(hf.named_modules())
        fitted: dict[str, Quantizer] = {}
        for name, value in hf.named_parameters():
            original, restored = model.weights[name].float().cpu(), value.detach().float()
            scale = getattr(layers[name.rpartition(".")[0]], "scale", None)
            if scale is not None and name.endswith(".weight"):
                # A negative scale turns -8..7 around.
                fitted[name] = Fitted(restored, scale.detach().float().abs())
            elif not torch.equal(restored, original):
                fitted[name] = Fitted(restored)
        return fitted


def _rounded(
    kind: AutoRound, model: LanguageModel, rows: Int[Tensor, "rows pos"]
) -> torch.nn.Module:
    """A copy of a model, de-quantized by the package."""
    package = library("auto_round", "autoround")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.enable_grad():
            rounder = package.AutoRound(
                copy.deepcopy(model.hf).to("cpu"),  # pyright: ignore[reportArgumentType]
                model.tokenizer,
                scheme="W4A16",
                alg_configs={"awq": "awq", "autoround": "auto_round"}[kind.algorithm],
                group_size=kind.group,
                dataset=list(rows[:, None]),
                seqlen=ROW,
                nsamples=len(rows),
                device_map="cpu",
                enable_torch_compile=False,
                seed=0,
            )
            return rounder.quantize()[0]
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)


def fitted_cells(
    original: Float[Tensor, "out in"],
    restored: Float[Tensor, "out in"],
    scale: Float[Tensor, "*_shape"],
) -> Cells:
    """Cells of a weight whose symmetric INT4 codes are in its restored values.

    Arguments:
        original: the weight before.
        restored: codes times scale.
        scale: of each group along a row, not negative.
    """
    scale = scale.reshape(-1, 1)
    codes = (restored.view(len(scale), -1) / scale.clamp_min(1e-30)).round() + MIDDLE
    x = original.view(len(scale), -1)
    every = torch.ones_like(x, dtype=torch.bool)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    levels = torch.arange(2.0 * MIDDLE + 1) - MIDDLE
    return affine(
        codes, scale=scale, offset=scale * 0, levels=levels, sets=every, lowest=low, highest=high
    )
