"""The hyper-parameters of a GGUF file, and what llama.cpp takes for granted of a family."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from ..models.language_model import LanguageModel
from ..quantizers.gguf import ARCHITECTURES

if TYPE_CHECKING:
    from gguf import GGUFWriter
else:  # an optional package
    GGUFWriter = object

_SILU = {"hidden_act": ("silu", "swish")}
_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
"""Every how many layers attention has no window, unless a file says otherwise."""
_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the one model whose queries llama.cpp scales by d_model / heads, not by d_head."""

FAMILIES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": _SILU,
    "mistral": _SILU,
    "qwen2": _SILU,
    "qwen3": _SILU,
    "gemma": {
        "hidden_act": _GELU,
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, False),
    },
    "gemma2": {"hidden_activation": _GELU, "tie_word_embeddings": (True,)},
    "gemma3_text": {
        "hidden_activation": _GELU,
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
    },
    "phi": {"hidden_act": _GELU, "tie_word_embeddings": (False,)},
    "phi3": _SILU,
    "gpt2": {
        "activation_function": _GELU,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "gpt_neox": {"hidden_act": _GELU, "tie_word_embeddings": (False,)},
    "bloom": {"apply_residual_connection_post_layernorm": (False,)},
}
"""Model types that are written -> settings with which llama.cpp computes them."""


def check_settings(model: LanguageModel) -> None:
    """Raise ModelError unless llama.cpp computes what a model's configuration says."""
    config, kind = model.config, model.config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"{model.name}: GGUF export knows {', '.join(FAMILIES)}; this model is of type "
            f"{kind!r}. Use llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    for name, known in FAMILIES[kind].items():
        if (value := getattr(config, name, known[0])) not in known:
            words = " or ".join(map(str, known))
            raise ModelError(
                f"{model.name}: its {name} is {value}, and llama.cpp computes {kind} with {words} "
                "alone, so a file would answer otherwise. Ask this model in transformers."
            )
    if kind == "gemma2" and None in (
        config.attn_logit_softcapping,
        config.final_logit_softcapping,
    ):
        raise ModelError(
            f"{model.name}: without soft caps (attn_logit_softcapping, final_logit_softcapping), "
            "with which llama.cpp computes every gemma2. Ask this model in transformers."
        )
    if getattr(config, "qk_layernorm", False):
        raise ModelError(
            f"{model.name}: it normalises queries and keys (qk_layernorm), which llama.cpp does "
            f"not do in a {kind}; its own converter has no names for those weights either. Ask "
            "this model in transformers."
        )
    full, local = _ropes(config)
    for rope in (full, local):
        scaled, known = rope.get("rope_type", "default"), ("linear", "llama3")
        if scaled == "llama3" and ARCHITECTURES[kind] != "LLAMA":
            own = [name for name, arch in ARCHITECTURES.items() if arch == "LLAMA"]
            raise ModelError(
                f"{model.name}: its rotary embedding is scaled (llama3), which llama.cpp computes "
                f"of {' and '.join(own)} alone, not of {kind}. Ask this model in transformers."
            )
        if scaled != "default" and (scaled not in known or rope is not full):
            raise ModelError(
                f"{model.name}: its rotary embedding is scaled ({scaled}), which this export does "
                "not write. Use llama.cpp's convert_hf_to_gguf.py on the saved folder."
            )
    if kind in _LARGEST:
        width = _head_width(model)
        if config.num_hidden_layers == _LARGEST[kind]:
            width = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != width:
            raise ModelError(
                f"{model.name}: its query_pre_attn_scalar is {config.query_pre_attn_scalar}, and "
                f"llama.cpp computes this model with {width}, so a file would answer otherwise. "
                "Ask this model in transformers."
            )
        _period(model)


def write_settings(writer: GGUFWriter, model: LanguageModel, kind: str, gguf: ModuleType) -> None:
    """Of a model that `check_settings` lets pass, in a file of a type."""
    config, arch, family = model.config, model.architecture, model.config.model_type
    width, inner = _head_width(model), getattr(config, "intermediate_size", None)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = inner or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(arch.n_heads)
    writer.add_head_count_kv(arch.n_kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        named = next(n for n in ("layer_norm_eps", "layer_norm_epsilon") if hasattr(config, n))
        writer.add_layer_norm_eps(getattr(config, named))
    full, local = _ropes(config)
    if full:
        writer.add_rope_dimension_count(int(full.get("partial_rotary_factor", 1.0) * width))
        writer.add_rope_freq_base(full["rope_theta"])
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if family == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if family in _PERIODS:
        writer.add_sliding_window(config.sliding_window)
        if (period := _period(model)) != _PERIODS[family]:
            writer.add_sliding_window_pattern(period)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    named = "MXFP4_MOE" if kind == "mxfp4" else kind.upper()
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{named}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def rope_factors(model: LanguageModel) -> Float[Tensor, " half_head"] | None:
    """By what llama.cpp is to divide the frequencies of the rotary embedding, as Llama 3.1 scales
    it; None: by nothing."""
    rope, _ = _ropes(model.config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled = model.hf.base_model.get_submodule("rotary_emb").get_buffer("inv_freq").float().cpu()
    width = _head_width(model)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width)
    return plain / scaled


def _head_width(model: LanguageModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // model.architecture.n_heads


def _ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the rotary embedding; and those of layers with a window, where they differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention") or {}
    return rope, {}


def _context(model: LanguageModel) -> int:
    """Tokens. llama.cpp knows no window of these families but Gemma's: others end where it would
    begin to matter."""
    config = model.config
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", 2048)
    window = getattr(config, "sliding_window", None)
    return min(found, window) if window and config.model_type not in _PERIODS else found


def _period(model: LanguageModel) -> int:
    """Every how many layers attention has no window.

    Raises:
        ModelError: in no such order.
    """
    layers, usual = model.config.layer_types, _PERIODS[model.config.model_type]
    for period in (usual, *range(1, len(layers) + 2)):
        full = [(i + 1) % period == 0 for i in range(len(layers))]
        if full == [kind == "full_attention" for kind in layers]:
            return period
    raise ModelError(
        f"{model.name}: attention has no window in layers "
        f"{[i for i, kind in enumerate(layers) if kind == 'full_attention']}, and llama.cpp knows "
        "only one in every so many, the last of them. Ask this model in transformers."
    )
