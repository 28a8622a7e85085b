"""Models of transformers: their classes as names for annotations, and what their settings say.

transformers takes seconds to import its models, and reading a circuit or a mask needs none of them.
So type checkers see its classes, and a running program sees what these are subclasses of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelError
from .graph import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:
    from torch.nn import Module as PreTrainedModel

    PreTrainedConfig = PreTrainedTokenizerBase = object

__all__ = [
    "STATEFUL",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "architecture_of",
    "check_plain",
    "check_tokens",
    "has_experts",
]

PARALLEL = ("phi", "gptj", "codegen", "cohere", "cohere2")
"""Model types whose attention and MLP read the same stream, always."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What families call the number of experts of a layer."""

STATEFUL = ("mamba", "conv", "ssm", "state_size", "lru", "linear_")
"""Parts of settings of models that keep more than keys and values of a prefix."""


def architecture_of(config: PreTrainedConfig, name: str) -> Architecture:
    """Layers, heads and block order of a model's decoder.

    Arguments:
        config: of the model, or of one that also sees or hears.
        name: of the model, for the error.

    Raises:
        ModelError: it has no attention heads, or another number of them in each layer.
    """
    c = config.get_text_config(decoder=True)
    kind = c.model_type
    layers, heads = (getattr(c, k, None) for k in ("num_hidden_layers", "num_attention_heads"))
    if type(layers) is not int or type(heads) is not int:
        raise ModelError(
            f"{name} ({kind}) has no number of attention heads that holds for every layer, so no "
            "attribution graph: give a decoder with attention in every layer, such as a Llama."
        )
    shared = getattr(c, "num_key_value_heads", None)
    parallel = getattr(c, "use_parallel_residual", kind in PARALLEL)
    if kind == "gpt_bigcode":
        shared = 1 if c.multi_query else None
    if kind == "falcon":
        new = c.new_decoder_architecture
        parallel = new or c.parallel_attn
        shared = c.num_kv_heads if new else 1 if c.multi_query else None
    return Architecture(layers, heads, shared or heads, bool(parallel))


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether the MLPs of a model are mixtures of experts, between which a router chooses."""
    c = config.get_text_config(decoder=True)
    return any((getattr(c, key, None) or 0) > 1 for key in EXPERTS)


def check_tokens(
    name: str, sizes: tuple[int, int | None], low: int, high: int, longest: int
) -> None:
    """Raise ModelError unless a model has an embedding and a position for every token.

    Arguments:
        name: of the model.
        sizes: rows of its embedding, and positions where they are limited.
        low: smallest token.
        high: largest token.
        longest: tokens of the longest prompt.
    """
    rows, positions = sizes
    if low < 0 or high >= rows:
        raise ModelError(
            f"Token {low if low < 0 else high} is not in the embedding of {name}, which has "
            f"{rows:,} rows. Take prompts of its own tokenizer."
        )
    if positions and longest > positions:
        raise ModelError(
            f"A prompt has {longest:,} tokens and {name} has {positions:,} positions. Give "
            "shorter prompts."
        )


def check_plain(hf: object, name: str) -> None:
    """Raise ModelError unless a model is one of transformers, without adapters around or in it."""
    from transformers import PreTrainedModel as Expected

    if not isinstance(hf, Expected):
        merge = (
            " Merge the adapter first: merge_and_unload()." if hasattr(hf, "peft_config") else ""
        )
        raise ModelError(
            f"{name}: got a {type(hf).__name__}, expected a PreTrainedModel of transformers, such "
            f"as AutoModelForCausalLM.from_pretrained() gives.{merge}"
        )
    adapters = [n for n, _ in hf.named_parameters() if ".lora_" in n]
    if adapters:
        raise ModelError(
            f"{name} holds an adapter ({adapters[0]}), which changes what its weights stand for. "
            "Merge it first: merge_and_unload()."
        )
