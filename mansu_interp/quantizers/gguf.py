"""GGUF's formats: those of fixed grids, those that llama.cpp fits, and the mixes that it makes.

Groups of 32 along a row. Codes use the float32 scale; Q formats store it rounded to float16. As the
``gguf`` package implements llama.cpp's reference:

- Q4_0, Q5_0: the element of largest absolute value (the first, of several) gets code -8 or -16,
  with its sign in the scale d = max / -8 or max / -16;
- Q4_1, Q5_1: d = (max - min) / 15 or / 31, from min;
- Q8_0: d = absmax / 127;
- MXFP4: `E2M1` times a power of two, 2 ** (floor(log2(absmax)) - 2). Beyond 6 units it saturates,
  and until 8 units no element changes the scale. compressed-tensors (vLLM) takes the next power
  where absmax is 7 units or more (`Gguf.elsewhere`).

K-quants (blocks of 256 along a row) and IQ4_NL fit their scales to every element, by llama.cpp's
own code in the ``xllamacpp`` wheel: no promise is possible, and what survives is measured. A file
such as Q4_K_M mixes them by tensor (`tensor_type`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..models.language_model import LanguageModel
from ..utils.libraries import library
from .base import Cells, Quantizer, affine, divided, grouped, mxfp4

MADE_FROM = "mansu.weights_sha256"
"""Key in a file's metadata: the hash of the weights that it was made from."""
GROUP = 32
EXACT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
FITTED = {
    "q2_k": (4, slice(16, 80)),
    "q3_k": (8, slice(0, 96)),
    "q4_k": (16, slice(16, 144)),
    "q5_k": (32, slice(16, 176)),
    "q6_k": (64, slice(0, 192)),
    "iq4_nl": (16, slice(2, 18)),
}
"""Type -> levels, and which bytes of a block hold the codes: all bits 0 is one end of a group's
levels, all bits 1 the other."""
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIXES = {
    "q2_k": "q2_k",
    "q3_k_m": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "iq4_nl": "iq4_nl",
}
"""Files that llama.cpp makes -> the type of most of their tensors."""
NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What a tensor gets whose rows do not divide into blocks of 256."""
ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA",
    "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "phi": "PHI2", "phi3": "PHI3", "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX", "bloom": "BLOOM",
}  # fmt: skip
"""Model type -> architecture of the gguf package."""


@dataclass(frozen=True)
class Gguf(Quantizer):
    """A format of fixed grids."""

    name: str = "q4_0"
    needs = (("gguf", "gguf"),)

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into groups of 32."""
        return weight.shape[-1] % GROUP == 0

    def splits(self, n: int, width: int) -> bool:
        """See `Quantizer.splits`."""
        return n % GROUP == 0

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`."""
        x = grouped(weight, GROUP)
        if self.name in ("q4_0", "q5_0"):
            return _from_extreme(x, 8 if self.name == "q4_0" else 16)
        if self.name in ("q4_1", "q5_1"):
            return _from_range(x, 15 if self.name == "q4_1" else 31)
        return _eight_bits(x) if self.name == "q8_0" else mxfp4(x)

    def elsewhere(self, weight: Float[Tensor, "out in"], dtype: torch.dtype) -> dict[str, Cells]:
        """See `Quantizer.elsewhere`: MXFP4 as vLLM loads it."""
        if self.name != "mxfp4":
            return {}
        return {"in compressed-tensors": mxfp4(grouped(weight, GROUP), rounds_up=7.0)}

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        return unpack(pack(weight, self.name), self.name)


def _from_extreme(x: Float[Tensor, "groups size"], half: int) -> Cells:
    """Q4_0 and Q5_0: the extreme of a group on the lowest of ``2 * half`` levels."""
    absmax = x.abs().amax(1, keepdim=True)
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -half
    raw = torch.trunc(x * _inverse(d) + (half + 0.5)).clamp(0, 2 * half - 1)
    # With d < 0 the codes descend; counted from the lowest value their levels are 1-half..half.
    return affine(
        torch.where(d < 0, 2 * half - 1 - raw, raw),
        scale=d.abs(),
        offset=torch.where(d < 0, d.abs(), 0.0),
        levels=torch.arange(-float(half), half),
        sets=x.abs() == absmax,
        lowest=-absmax,
        highest=absmax,
    )


def _from_range(x: Float[Tensor, "groups size"], steps: int) -> Cells:
    """Q4_1 and Q5_1."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    d = divided(high - low, float(steps))
    return affine(
        torch.floor((x - low) * _inverse(d) + 0.5).clamp(0, steps),
        scale=d,
        offset=low,
        levels=torch.arange(steps + 1.0),
        sets=(x == low) | (x == high),
        lowest=low,
        highest=high,
    )


def _eight_bits(x: Float[Tensor, "groups size"]) -> Cells:
    absmax = x.abs().amax(1, keepdim=True)
    d = divided(absmax, 127.0)
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    return affine(
        scaled.sign() * (whole + torch.floor(2 * (scaled.abs() - whole))) + 127,
        scale=d,
        offset=d * 0,
        levels=torch.arange(-127.0, 128.0),
        sets=x.abs() == absmax,
        lowest=-absmax,
        highest=absmax,
    )


def _inverse(d: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.where(d == 0, 0.0, 1 / torch.where(d == 0, 1.0, d))


@lru_cache
def llama_cpp() -> ctypes.CDLL:
    """llama.cpp's own code.

    Raises:
        ConfigError: the wheel is missing, or of a build that does not export it.
    """
    module = library("xllamacpp.xllamacpp", "llama-cpp", "This format of llama.cpp")
    try:
        found = ctypes.CDLL(str(module.__file__))
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        found.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[pointer] * 2, *[size] * 3, pointer]
        found.ggml_quantize_chunk.restype = ctypes.c_size_t
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"This build of xllamacpp does not export ggml_quantize_chunk ({error}). Install the "
            'CPU wheel: pip install "mansu-interp[llama-cpp]".'
        ) from error
    return found


def pack(weight: Float[Tensor, "out in"], kind: str) -> np.ndarray:
    """The bytes of a tensor in a GGUF file, one row each.

    Arguments:
        weight: its rows divide into blocks of the type.
        kind: one of `EXACT` or `FITTED`.

    Raises:
        ConfigError: a package is missing.
    """
    gguf = library("gguf", "gguf")
    number = getattr(gguf.GGMLQuantizationType, kind.upper())
    values = weight.detach().float().contiguous().cpu().numpy()
    if kind in EXACT:
        return gguf.quantize(values, number)
    rows, width = values.shape
    block, size = gguf.GGML_QUANT_SIZES[number]
    out = np.zeros((rows, width // block * size), np.uint8)
    llama_cpp().ggml_quantize_chunk(
        number.value, values.ctypes.data, out.ctypes.data, 0, rows, width, None
    )
    return out


def unpack(packed: np.ndarray, kind: str) -> Float[Tensor, "out in"]:
    """The values of such bytes."""
    gguf = library("gguf", "gguf")
    number = getattr(gguf.GGMLQuantizationType, kind.upper())
    return torch.from_numpy(gguf.dequantize(packed, number).copy())


@dataclass(frozen=True)
class Ggml(Quantizer):
    """A type of `FITTED`, of one weight."""

    name: str = "q4_k"
    promises: bool = False

    def touches(self, weight: Float[Tensor, "out in"]) -> bool:
        """Rows must divide into blocks."""
        return weight.shape[-1] % (GROUP if self.name == "iq4_nl" else 256) == 0

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """See `Quantizer.cells`; every element counts as one that sets its group's parameters.

        Codes are counted from the lowest value. The levels of IQ4_NL are not evenly spaced, and
        turned around where a scale is negative: codes are right, values between the ends are not.
        """
        packed = pack(weight, self.name)
        n, where = FITTED[self.name]
        blocks = packed.reshape(-1, library("gguf", "gguf").GGML_QUANT_SIZES[self._number][1])
        ends = []
        for byte in (0, 255):
            blank = blocks.copy()
            blank[:, where] = byte
            ends.append(unpack(blank.reshape(packed.shape), self.name).flatten())
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        inside = (unpack(packed, self.name).flatten() - low) / (high - low).clamp(min=1e-38)
        codes = (inside * (n - 1)).round().long()
        if self.name == "iq4_nl":
            grid = (torch.tensor(IQ4_NL) - IQ4_NL[0]) / (IQ4_NL[-1] - IQ4_NL[0])
            middles = (grid[1:] + grid[:-1]) / 2
            up, down = (torch.bucketize(at, middles) for at in (inside, 1 - inside))
            codes = torch.where(ends[0] <= ends[1], up, n - 1 - down)
        return Cells(
            codes=codes,
            scale=(high - low) / (n - 1),
            sets_scale=torch.ones_like(low, dtype=torch.bool),
            levels=torch.arange(float(n)),
            offset=low,
            lowest=low,
            highest=high,
        )

    @property
    def _number(self) -> int:
        return getattr(library("gguf", "gguf").GGMLQuantizationType, self.name.upper())

    def round_trip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `Quantizer.round_trip`."""
        return unpack(pack(weight, self.name), self.name)


TYPES: Mapping[str, Quantizer] = {n: Gguf(n) for n in EXACT} | {n: Ggml(n) for n in FITTED}
"""The types of tensors that files are made of."""


@dataclass(frozen=True)
class Mix(Quantizer):
    """A file of llama.cpp that mixes types by tensor; its linear layers."""

    name: str = "q4_k_m"
    promises: bool = False
    needs = (("gguf", "llama-cpp"), ("xllamacpp", "llama-cpp"))

    def fit(
        self, model: LanguageModel, calibration: Sequence[Sequence[int]]
    ) -> dict[str, Quantizer]:
        """The type of each linear layer; what would stay in 16 bits is left out.

        Raises:
            ConfigError: a package is missing, or the rules for this family are not known.
        """
        names, shape = gguf_names(model), file_shape(model)
        kinds = {
            n: tensor_type(self.name, names[n], model.weights[n].shape[-1], shape)
            for n in model.linear_names
        }
        if any(kind in FITTED for kind in kinds.values()):
            llama_cpp()
        return {n: TYPES[kind] for n, kind in kinds.items() if kind in TYPES}

    def cells(self, weight: Float[Tensor, "out in"]) -> Cells:
        """Not of a lone weight: see `fit`."""
        raise ConfigError(f"{self.name} quantizes whole models; use quantize() and survival().")

    round_trip = cells  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class FileShape:
    """What the rules of `tensor_type` look at besides one tensor."""

    layers: int
    sharing: float
    """Query heads per key/value head."""
    tied: bool
    """Whether the embedding unembeds as well."""


def file_shape(model: LanguageModel) -> FileShape:
    """Of a model."""
    arch = model.architecture
    tied = bool(model.config.tie_word_embeddings)
    return FileShape(arch.n_layers, arch.n_heads / arch.n_kv_heads, tied)


def gguf_names(model: LanguageModel) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight that has one.

    Raises:
        ConfigError: a family that is not known.
    """
    gguf, kind = library("gguf", "gguf"), model.config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{model.name}: llama.cpp's names are known for {', '.join(ARCHITECTURES)}; this model "
            f"is of type {kind!r}. Leave out the formats {', '.join(MIXES)}."
        )
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind])
    names, ends = gguf.get_tensor_name_map(arch, model.architecture.n_layers), (".weight", ".bias")
    found = {
        n: names.get_name(n, ends) or names.get_name(n.removeprefix("transformer."), ends)
        for n in model.weights
    }
    return {n: target for n, target in found.items() if target}


def tensor_type(file: str, name: str, width: int, shape: FileShape) -> str:
    """What llama.cpp makes of a tensor (its llama-quant.cpp of November 2026, without an importance
    matrix; no mixtures of experts, no Falcon).

    Arguments:
        file: one of `MIXES`.
        name: of the tensor in the file, such as ``blk.3.attn_v.weight``.
        width: length of its rows.
        shape: of the file.

    Returns:
        One of `TYPES`, or ``f16`` where rows do not divide into groups of 32 either.
    """
    parts = name.split(".")
    part, layer = (parts[2], int(parts[1])) if parts[0] == "blk" else (parts[0], 0)
    kind = MIXES[file]
    if part == "output" or (part == "token_embd" and shape.tied):
        kind = "q6_k"
    elif part in ("attn_v", "attn_qkv"):
        kind = _of_values(file, layer, shape)
    elif part == "ffn_down":
        kind = _of_down(file, layer, shape.layers)
    elif part == "attn_output":
        kind = {"q2_k": "q3_k", "q3_k_m": "q4_k"}.get(file, kind)
    if width % 256:
        kind = NARROW.get(kind, kind)
    return kind if width % GROUP == 0 else "f16"


def _of_values(file: str, layer: int, shape: FileShape) -> str:
    """Of attention's values, alone or fused with queries and keys."""
    kind = MIXES[file]
    if file == "q2_k":
        kind = "q4_k" if shape.sharing >= 4 else "q3_k"
    elif file == "q3_k_m":
        kind = "q5_k" if layer < 2 else "q4_k"
    elif (file == "iq4_nl" and shape.sharing >= 4) or (file == "q4_k_s" and layer < 4):
        kind = "q5_k"
    elif file in ("q4_k_m", "q5_k_m") and _gets_more(layer, shape.layers):
        kind = "q6_k"
    large = shape.layers == 80 and shape.sharing > 1  # "70B"
    return "q5_k" if large and kind in ("q3_k", "q4_k") else kind


def _of_down(file: str, layer: int, layers: int) -> str:
    """Of the MLP's second matrix."""
    if file == "q2_k":
        return "q3_k"
    if file == "q3_k_m":
        return "q5_k" if layer < layers // 16 else "q4_k"
    if file in ("q4_k_m", "q5_k_m") and _gets_more(layer, layers):
        return "q6_k"
    if file in ("q4_k_s", "iq4_nl") and layer < layers // 8:
        return "q5_k"
    return MIXES[file]


def _gets_more(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
