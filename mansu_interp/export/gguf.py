"""A checkpoint as one GGUF file, written with llama.cpp's own ``gguf`` package.

Tensor names, file layout and the blocks of fixed grids are that package's, those of K-quants and
IQ4_NL llama.cpp's. What neither knows is done here: hyper-parameters (`gguf_settings`), tokenizers
(`gguf_tokenizer`), the row order that llama.cpp expects of some q, k and v, and the 1 that Gemma's
norms add to their weights. Groups run along a row, so the blocks are those of the quantizers of the
same name. Norms, biases and positions stay float32. With a fixed grid, embedding and unembedding
are written as Q8_0 (finer than any cell that an edit leaves); in a mix they are what llama.cpp
makes them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import ArtifactError, ConfigError, ModelError
from ..models.language_model import LanguageModel
from ..models.layout import BY_HEAD
from ..models.provenance import values_sha256
from ..quantizers.gguf import (
    ARCHITECTURES,
    EXACT,
    GROUP,
    MADE_FROM,
    MIXES,
    FileShape,
    file_shape,
    gguf_names,
    pack,
    tensor_type,
)
from ..utils.files import Json, atomic_path, read_json
from ..utils.libraries import check_gguf, library
from .gguf_settings import FAMILIES, check_settings, rope_factors, write_settings
from .gguf_tokenizer import splitting, vocabulary, write_tokenizer


def export_gguf(model: LanguageModel, path: Path, kind: str = "q8_0", new: bool = False) -> None:
    """Write a GGUF file, whole or not at all.

    Arguments:
        model: of one of `FAMILIES`, whose tokenizer is a byte-level BPE, one of SentencePiece, or
            whole words.
        path: of the file.
        kind: ``f16``, or a format of llama.cpp by its name there, in small letters.
        new: whether there must be no such file yet.

    Raises:
        ArtifactError: there is one, and ``new``.
        ModelError: another family or kind of tokenizer, or llama.cpp computes the family
            otherwise than this model is configured.
        ConfigError: another type, or a package is missing.
    """
    if kind not in ("f16", *EXACT, *MIXES):
        raise ConfigError(
            f"GGUF types: got {kind!r:.60}, expected f16, {', '.join((*EXACT, *MIXES))}."
        )
    check_gguf(kind)
    gguf = library("gguf", "gguf", "A GGUF file")
    words = check_export(model)
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[model.config.model_type])
    with atomic_path(path, new=new) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_string(MADE_FROM, values_sha256(model))
        write_settings(writer, model, kind, gguf)
        write_tokenizer(writer, model, words, gguf)
        names, shape = gguf_names(model), file_shape(model)
        if (factors := rope_factors(model)) is not None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        for name, weight in model.weights.items():
            values = _converted(model, name, weight.detach().float().cpu()).contiguous()
            stored = _stored_as(names[name], weight, kind, shape)
            if stored in ("f32", "f16"):
                plain = values if stored == "f32" else values.half()
                writer.add_tensor(names[name], plain.numpy())
            else:
                number = getattr(gguf.GGMLQuantizationType, stored.upper())
                writer.add_tensor(names[name], pack(values, stored), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_export(model: LanguageModel) -> dict[str, Json]:
    """The tokenizer of a model that can be written, see `vocabulary`.

    Raises:
        ModelError, ConfigError: see `export_gguf`.
    """
    check_settings(model)
    words, names = vocabulary(model), gguf_names(model)
    if odd := [name for name in model.weights if name not in names]:
        raise ModelError(
            f"{model.name}: llama.cpp has no name for the weight {odd[0]} ({len(odd)} such) of a "
            f"{model.config.model_type}, so it computes something else. Ask this model in "
            "transformers."
        )
    return words


def exportable(folder: Path) -> bool:
    """Whether a saved model is likely to be written as GGUF, once the packages that `gguf_lacks`
    tells of are here; looked up, not tried."""
    try:
        kind = read_json(folder / "config.json").get("model_type")
        tokenizer = read_json(folder / "tokenizer.json")
        known = splitting(tokenizer)
    except (ArtifactError, AttributeError, LookupError, TypeError):
        return False
    return bool(known) and kind in FAMILIES


def _stored_as(target: str, weight: Tensor, kind: str, shape: FileShape) -> str:
    """The type of a tensor, in small letters."""
    if weight.ndim < 2 or target == "position_embd.weight":
        return "f32"
    if kind in MIXES:
        return tensor_type(kind, target, weight.shape[-1], shape)
    if kind == "f16" or weight.shape[-1] % GROUP:
        return "f16"
    return "q8_0" if target in ("token_embd.weight", "output.weight") else kind


def _converted(model: LanguageModel, name: str, weight: Tensor) -> Tensor:
    """A weight or bias as llama.cpp expects it: of Llama's q and k the two halves of a head
    interleaved; a projection that is fused head by head as all q, all k, all v; and norms that
    scale by 1 + weight with the 1 in it."""
    family, arch, part = model.config.model_type, model.architecture, name.split(".")[-2]
    if family in BY_HEAD and part == "query_key_value":
        return weight.unflatten(0, (arch.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if family.startswith("gemma") and part.endswith("norm"):
        return weight + 1
    if ARCHITECTURES[family] != "LLAMA" or part not in ("q_proj", "k_proj"):
        return weight
    heads = arch.n_heads if part == "q_proj" else arch.n_kv_heads
    return weight.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)
