"""A checkpoint as one GGUF file, written with llama.cpp's own ``gguf`` package.

Tensor names, file layout and the F16, Q8_0 and Q4_0 blocks are that package's. What it does not
know is done here: the hyper-parameters of Llama-shaped models, the row order that llama.cpp expects
of Llama's q and k, and byte-level BPE tokenizers. Groups of 32 run along a row, so the blocks are
those of the quantizers ``q8_0`` and ``q4_0``. Norms and biases stay float32; with q4_0 embedding
and unembedding are written as Q8_0 (finer than any cell that an edit leaves).
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ArtifactError, ModelError
from ..models.language_model import LanguageModel
from ..quantizers.gguf import GROUP
from ..utils.files import Json, atomic_path, read_json
from ..utils.libraries import library

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
else:  # an optional package
    GGMLQuantizationType = GGUFWriter = object

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model type -> architecture of the gguf package."""
_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
PRE = {_DIGITS % "{1,3}": "llama-bpe", _DIGITS % "": "qwen2"}
"""How a tokenizer's splitting rule begins -> llama.cpp's name for it."""


def export_gguf(model: LanguageModel, path: Path, kind: str = "q8_0", new: bool = False) -> None:
    """Write a GGUF file, whole or not at all.

    Arguments:
        model: a Llama, Mistral, Qwen2 or Qwen3 model with a byte-level BPE tokenizer.
        path: of the file.
        kind: ``f16``, ``q8_0`` or ``q4_0``.
        new: whether there must be no such file yet.

    Raises:
        ArtifactError: there is one, and ``new``.
        ModelError: another family, a scaled rotary embedding, or another kind of tokenizer.
        ConfigError: the ``gguf`` package is missing.
    """
    gguf = library("gguf", "gguf")
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{model.name}: GGUF export knows {', '.join(ARCHITECTURES)}; this model is of type "
            f"{config.model_type!r}. Use llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    vocabulary = _vocabulary(model)
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    with atomic_path(path, new=new) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
        _write_settings(writer, model, kind, gguf)
        _write_tokenizer(writer, model, vocabulary, gguf)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        for name, weight in model.weights.items():
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ModelError(f"{model.name}: GGUF has no name for the weight {name}.")
            values = _converted(model, name, weight.detach().float().cpu()).contiguous().numpy()
            stored = _stored_as(gguf, target, weight, kind)
            if stored == gguf.GGMLQuantizationType.F32:
                writer.add_tensor(target, values)
            else:
                writer.add_tensor(target, gguf.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def exportable(folder: Path) -> bool:
    """Whether a saved model is likely to be written as GGUF here; looked up, not tried."""
    try:
        kind = read_json(folder / "config.json").get("model_type")
        tokenizer = read_json(folder / "tokenizer.json")
        known = tokenizer["model"]["type"] == "BPE" and _pre(tokenizer["pre_tokenizer"])
    except (ArtifactError, AttributeError, LookupError, TypeError):
        return False
    return bool(known) and kind in ARCHITECTURES and find_spec("gguf") is not None


def _stored_as(gguf: ModuleType, target: str, weight: Tensor, kind: str) -> GGMLQuantizationType:
    types = gguf.GGMLQuantizationType
    if weight.ndim < 2:
        return types.F32
    if kind == "f16" or weight.shape[-1] % GROUP:
        return types.F16
    outer = target in ("token_embd.weight", "output.weight")
    return types.Q8_0 if outer or kind == "q8_0" else types.Q4_0


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
    names = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(getattr(gguf.LlamaFileType, names[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(model: LanguageModel) -> dict[str, Json]:
    """A byte-level BPE tokenizer as plain data, with llama.cpp's name of its splitting rule."""
    fast = getattr(model.get_tokenizer(), "backend_tokenizer", None)
    data = json.loads(fast.to_str() if fast else '{"model": {}}')
    pre = _pre(data.get("pre_tokenizer"))
    if data["model"].get("type") != "BPE" or pre is None:
        raise ModelError(
            f"{model.name}: GGUF export knows byte-level BPE tokenizers with the splitting rule of "
            f"GPT-2, SmolLM, Llama 3 or Qwen2; this one is {data['model'].get('type')}. Use "
            "llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    return {**data, "pre": pre}


def _pre(rule: Json) -> str | None:
    steps = (rule or {}).get("pretokenizers") or [rule or {}]
    kinds = [s.get("type") for s in steps]
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
    for text, i in data["model"]["vocab"].items():
        tokens[i], types[i] = text, kinds.NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(data["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
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


def _adds(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text, and its EOS after it."""
    tokenizer = model.get_tokenizer()
    ids = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = len(ids) > len(model.encode("a"))
    return bool(added and ids[0] == bos), bool(added and ids[-1] == eos)
