"""A checkpoint as one GGUF file, written with llama.cpp's own ``gguf`` package.

Tensor names, file layout and the blocks of fixed grids are that package's, those of K-quants and
IQ4_NL llama.cpp's. What neither knows is done here: the hyper-parameters of Llama-shaped models,
the row order that llama.cpp expects of Llama's q and k, and tokenizers: byte-level BPE, and whole
words as a unigram model. Groups run along a row, so the blocks are those of the quantizers of the
same name. Norms and biases stay float32. With a fixed grid, embedding and unembedding are written
as Q8_0 (finer than any cell that an edit leaves); in a mix they are what llama.cpp makes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ArtifactError, ConfigError, ModelError
from ..models.language_model import LanguageModel
from ..quantizers.gguf import (
    ARCHITECTURES,
    EXACT,
    GROUP,
    MIXES,
    FileShape,
    file_shape,
    gguf_names,
    pack,
    tensor_type,
)
from ..utils.files import Json, atomic_path, read_json
from ..utils.libraries import check_gguf, library

if TYPE_CHECKING:
    from gguf import GGUFWriter
else:  # an optional package
    GGUFWriter = object

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that are written."""
_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
PRE = {_DIGITS % "{1,3}": "llama-bpe", _DIGITS % "": "qwen2"}
"""How a tokenizer's splitting rule begins -> llama.cpp's name for it."""


def export_gguf(model: LanguageModel, path: Path, kind: str = "q8_0", new: bool = False) -> None:
    """Write a GGUF file, whole or not at all.

    Arguments:
        model: a Llama, Mistral, Qwen2 or Qwen3 model whose tokenizer is a byte-level BPE or whole
            words.
        path: of the file.
        kind: ``f16``, or a format of llama.cpp by its name there, in small letters.
        new: whether there must be no such file yet.

    Raises:
        ArtifactError: there is one, and ``new``.
        ModelError: another family, a scaled rotary embedding, or another kind of tokenizer.
        ConfigError: another type, or a package is missing.
    """
    if kind not in ("f16", *EXACT, *MIXES):
        raise ConfigError(
            f"GGUF types: got {kind!r:.60}, expected f16, {', '.join((*EXACT, *MIXES))}."
        )
    check_gguf(kind)
    gguf = library("gguf", "gguf", "A GGUF file")
    config = model.config
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{model.name}: GGUF export knows {', '.join(FAMILIES)}; this model is of type "
            f"{config.model_type!r}. Use llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    vocabulary = _vocabulary(model)
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    with atomic_path(path, new=new) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
        _write_settings(writer, model, kind, gguf)
        _write_tokenizer(writer, model, vocabulary, gguf)
        names, shape = gguf_names(model), file_shape(model)
        for name, weight in model.weights.items():
            if name not in names:
                raise ModelError(f"{model.name}: GGUF has no name for the weight {name}.")
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


def exportable(folder: Path) -> bool:
    """Whether a saved model is likely to be written as GGUF, once the packages that `gguf_lacks`
    tells of are here; looked up, not tried."""
    try:
        kind = read_json(folder / "config.json").get("model_type")
        tokenizer = read_json(folder / "tokenizer.json")
        known = _pre(tokenizer)
    except (ArtifactError, AttributeError, LookupError, TypeError):
        return False
    return bool(known) and kind in FAMILIES


def _stored_as(target: str, weight: Tensor, kind: str, shape: FileShape) -> str:
    """The type of a tensor, in small letters."""
    if weight.ndim < 2:
        return "f32"
    if kind in MIXES:
        return tensor_type(kind, target, weight.shape[-1], shape)
    if kind == "f16" or weight.shape[-1] % GROUP:
        return "f16"
    return "q8_0" if target in ("token_embd.weight", "output.weight") else kind


def _converted(model: LanguageModel, name: str, weight: Tensor) -> Tensor:
    """Llama's q and k rows in the order of llama.cpp: the two halves of a head interleaved."""
    part = name.split(".")[-2]
    if ARCHITECTURES[model.config.model_type] != "LLAMA" or part not in ("q_proj", "k_proj"):
        return weight
    arch = model.architecture
    heads = arch.n_heads if part == "q_proj" else arch.n_kv_heads
    return weight.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)


def _write_settings(writer: GGUFWriter, model: LanguageModel, kind: str, gguf: ModuleType) -> None:
    config, arch = model.config, model.architecture
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"{model.name}: its rotary embedding is scaled ({rope['rope_type']}), which this "
            "export does not write. Use llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // arch.n_heads
    writer.add_name(Path(model.name).name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(arch.n_heads)
    writer.add_head_count_kv(arch.n_kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    named = "MXFP4_MOE" if kind == "mxfp4" else kind.upper()
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{named}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(model: LanguageModel) -> dict[str, Json]:
    """A tokenizer as plain data, with llama.cpp's name of its splitting rule, or ``words``."""
    fast = getattr(model.get_tokenizer(), "backend_tokenizer", None)
    data = json.loads(fast.to_str() if fast else '{"model": {}}')
    pre = _pre(data)
    if pre is None:
        raise ModelError(
            f"{model.name}: GGUF export knows tokenizers of whole words, and byte-level BPE with "
            "the splitting rule of GPT-2, SmolLM, Llama 3 or Qwen2; this one is "
            f"{data['model'].get('type')} with another rule. Use "
            "llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    return {**data, "pre": pre}


def _pre(data: dict[str, Json]) -> str | None:
    rule = data.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers") or [rule]
    kinds = [s.get("type") for s in steps]
    if data["model"].get("type") == "WordLevel":
        known = kinds in (["WhitespaceSplit"], ["WhitespaceSplit", "Split"])
        return "words" if known and not data.get("normalizer") else None
    if data["model"].get("type") != "BPE":
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        regex = steps[0]["pattern"].get("Regex", "")
        return next((name for start, name in PRE.items() if regex.startswith(start)), None)
    return None


def _write_tokenizer(
    writer: GGUFWriter, model: LanguageModel, data: dict[str, Json], gguf: ModuleType
) -> None:
    size = model.config.vocab_size
    kinds = gguf.TokenType
    tokens, types = [f"[PAD{i}]" for i in range(size)], [kinds.UNUSED] * size
    words = data["pre"] == "words"
    for text, i in data["model"]["vocab"].items():
        tokens[i], types[i] = _spaced(text, data) if words else text, kinds.NORMAL
    for added in data["added_tokens"]:
        i, special = added["id"], added["special"]
        phrase = words and not special
        tokens[i] = _spaced(added["content"], data) if phrase else added["content"]
        types[i] = kinds.CONTROL if special else kinds.NORMAL if phrase else kinds.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if words:
        # As a unigram model (T5's) whose tokens all cost the same: the fewest cover a text.
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([-1.0] * size)
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(data["pre"])
        writer.add_token_merges(merges)
    for kind in ("bos", "eos", "unk", "pad"):
        found = getattr(model.tokenizer, f"{kind}_token_id")
        if found is not None:
            getattr(writer, f"add_{kind}_token_id")(found)
    for kind, adds in zip(("bos", "eos"), _adds(model), strict=True):
        getattr(writer, f"add_add_{kind}_token")(adds)
    template = model.get_tokenizer().chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:
        named = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(named)


def _spaced(text: str, data: dict[str, Json]) -> str:
    """A word with the space before it, as a unigram model writes one; none before what is split off
    the end of a word."""
    steps = data["pre_tokenizer"].get("pretokenizers", [])
    ends = [s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split"]
    attached = any(re.fullmatch(pattern, text) for pattern in ends)
    return text if attached else "\u2581" + text.replace(" ", "\u2581")


def _adds(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text, and its EOS after it."""
    tokenizer = model.get_tokenizer()
    ids = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = len(ids) > len(model.encode("a"))
    return bool(added and ids[0] == bos), bool(added and ids[-1] == eos)
