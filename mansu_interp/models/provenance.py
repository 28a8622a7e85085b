"""What an artefact was made from: it travels with every circuit, mask, ledger and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

import torch

from ..utils.files import Json, finite
from ..utils.tensors import tensors_sha256
from .hooked import HookedModel
from .hugging_face import PreTrainedTokenizerBase
from .language_model import LanguageModel

SCHEMA = 1
PACKAGES = ("mansu-interp", "torch", "transformers", "transformer-lens", "bitsandbytes")


class Provenance(TypedDict):
    """What an artefact was made from, as it stands in files."""

    schema: int
    model_sha256: str
    tokenizer_sha256: str
    """Empty for a model without a tokenizer."""
    task_sha256: str
    """Empty where only pairs were given."""
    config_sha256: str
    """Hash of the settings that affect the result."""
    seed: int
    """Of every draw."""
    device: str
    """Kind of device: ``cpu`` or ``cuda``."""
    versions: dict[str, str]
    """Of this package and of those that affect the result."""


def versions() -> dict[str, str]:
    """Versions of this package and of those that affect the result."""
    out = {}
    for package in PACKAGES:
        name = package.replace("mansu-interp", "mansu_interp")
        try:
            out[name] = version(package)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash of a tokenizer's whole behaviour; empty without one."""
    if tokenizer is None:
        return ""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    text = inner.to_str() if inner else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def values_sha256(model: LanguageModel) -> str:
    """Hash of a model's weights by their values alone: in whichever dtype and files the same values
    are saved, it is the same."""
    return tensors_sha256(model.weights, torch.float32)


def provenance(
    model: LanguageModel | HookedModel,
    seed: int,
    config: Mapping[str, object],
    task_sha256: str = "",
) -> Provenance:
    """Schema, hashes of model, tokenizer, task and settings, seed, and package versions.

    Arguments:
        model: a `LanguageModel`, or a `HookedModel`, which has no tokenizer of ours.
        seed: of every draw.
        config: settings as JSON values.
        task_sha256: hash of the task; empty where only pairs were given.
    """
    text = json.dumps(finite(config), sort_keys=True, default=str)
    return {
        "schema": SCHEMA,
        "model_sha256": model.sha256,
        "tokenizer_sha256": tokenizer_sha256(getattr(model, "tokenizer", None)),
        "task_sha256": task_sha256,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": seed,
        "device": model.device.type,
        "versions": versions(),
    }


def differences(then: Mapping[str, Json], now: Provenance) -> list[str]:
    """In words, what two such records do not share; ``then`` was read from a file."""
    out = []
    for key in ("model", "tokenizer", "task", "config"):
        if then.get(f"{key}_sha256") != now.get(f"{key}_sha256"):
            out.append(f"another {key}")
    old = then.get("versions")
    old = old if isinstance(old, dict) else {}
    out += [
        f"{name} {old.get(name)} instead of {v}"
        for name, v in now["versions"].items()
        if old.get(name) != v
    ]
    return out


def find_mismatch(meta: Mapping[str, Json], model: LanguageModel | HookedModel) -> str:
    """``checkpoint`` or ``tokenizer`` if an artefact was made with another one than this model's,
    else an empty string. What is unknown of either counts as the same."""
    made_from = meta.get("provenance")
    made_from = made_from if isinstance(made_from, dict) else {}
    sha = meta.get("model_sha256") or made_from.get("model_sha256")
    if sha and model.sha256 and sha != model.sha256:
        return "checkpoint"
    sha, own = (
        made_from.get("tokenizer_sha256"),
        tokenizer_sha256(getattr(model, "tokenizer", None)),
    )
    return "tokenizer" if sha and own and sha != own else ""
