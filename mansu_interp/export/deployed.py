"""What is deployed beside the weights: configuration, tokenizer, templates, licence."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models.files import stored, weight_files
from ..models.hugging_face import PreTrainedTokenizerBase
from ..models.language_model import LanguageModel
from ..models.provenance import tokenizer_sha256
from ..utils.files import Json, read_json
from ..utils.shipped import DATA
from ..utils.tensors import dtype_name

LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
"""How files begin that lay down the terms of a model."""
MAX_LICENCE = 1 << 20
BOOKKEEPING = {
    "_name_or_path",
    "_from_model_config",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
}
"""Keys of a configuration that say where it comes from, not what the model computes; the dtype of
the checkpoint is compared by itself."""
SETTINGS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "model_input_names",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
    "extra_special_tokens",
)
"""What is compared of a tokenizer besides the rules by which it splits."""
OTHERS = ("add_bos_token", "add_eos_token", "add_prefix_space", "auto_map")
"""Keys of tokenizer_config.json that other programs read, where transformers may not."""
KNOWN = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
}
"""Files whose meaning is compared, as transformers loads it."""


def licence_files(folder: Path | None) -> list[Path]:
    """The files in a model's folder that lay down its terms."""
    found = sorted(folder.iterdir()) if folder else []
    return [
        p
        for p in found
        if p.name.upper().startswith(LICENCES)
        and p.suffix.lower() in ("", ".txt", ".md")
        and p.is_file()
        and p.stat().st_size <= MAX_LICENCE
    ]


def _metadata(folder: Path | None) -> dict[str, Json]:
    """Those of the model card in a folder; none where it has none that can be read."""
    card, found = folder / "README.md" if folder else None, None
    if card and card.is_file() and card.stat().st_size <= MAX_LICENCE:
        from huggingface_hub import metadata_load

        with contextlib.suppress(Exception):  # a stranger's card
            found = metadata_load(card)
    return found if isinstance(found, dict) else {}


def card_formats(folder: Path | None) -> list[str] | None:
    """The formats that an edit was made to survive, by the model card in its folder; None: it says
    nothing of that, as of a model that was not edited."""
    own = _metadata(folder).get("mansu")
    found = own.get("survive") if isinstance(own, dict) else None
    return list(map(str, found)) if isinstance(found, list) else None


def licence_terms(folder: Path | None) -> dict[str, str]:
    """What the card of a model says of its licence, as `ModelCardData` has it; ``unknown`` where
    neither card nor licence lies in its folder."""
    found = _metadata(folder)
    if isinstance(found.get("license"), str):
        keys = ("license", "license_name", "license_link")
        return {k: found[k] for k in keys if isinstance(found.get(k), str)}
    if folder and DATA in folder.parents:
        return {"license": "mit"}  # comes with this package
    files = licence_files(folder)
    if files:
        link = {"license_link": files[0].name}
        return {"license": "other", "license_name": "that-of-the-original", **link}
    return {"license": "unknown"}


def save_edited(edited: LanguageModel, original: LanguageModel, folder: Path) -> None:
    """Write an edited checkpoint into a folder, with the licence of its original.

    Raises:
        ModelError: it has no tokenizer.
    """
    edited.save(folder)
    for file in licence_files(original.folder):
        shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class Deployed:
    """How two checkpoints differ beside the weights that they share."""

    changed: list[str]
    """What differs, each in words."""
    uncovered: list[str]
    """What is deployed and was not compared."""


def compare_deployed(original: LanguageModel, edited: LanguageModel) -> Deployed:
    """Compare everything but the parameters.

    1. The configuration and that of generation, as loaded.
    2. The tokenizer: rules, special tokens, chat templates.
    3. Buffers, and tensors in the files that the model does not read.
    4. Name every other file.
    """
    changed = _config_changes(original, edited) + _tokenizer_changes(original, edited)
    if original.saved_dtype != edited.saved_dtype:
        changed.append(f"it is stored as {edited.saved_dtype}, not {original.saved_dtype}")
    buffers = [_buffers(model) for model in (original, edited)]
    changed += [f"the buffer {n} differs" for n in _different(*buffers)]
    if more := sorted(set(edited.unread) - set(original.unread)):
        changed.append(f"its files hold {len(more)} tensors beside the model's, such as {more[0]}")
    return Deployed(changed, _uncovered(original, edited))


def _config_changes(original: LanguageModel, edited: LanguageModel) -> list[str]:
    out = []
    parts = [(m.config.to_dict(), _generation(m), _unknown(m)) for m in (original, edited)]
    for where, a, b in zip(
        ("config.json", "generation_config.json", "config.json"), *parts, strict=True
    ):
        out += [f"{key} of {where} is {_shown(b, key)}, not {_shown(a, key)}"
                for key in _different(a, b) if key not in BOOKKEEPING]  # fmt: skip
    named = edited.config.architectures or []
    if named not in (original.config.architectures or [], [type(edited.hf).__name__]):
        out.append(f"architectures of config.json is {named!r:.60}")
    out += _dtype_change(original, edited)
    return list(dict.fromkeys(out))


def _dtype_change(original: LanguageModel, edited: LanguageModel) -> list[str]:
    """A dtype in config.json, in which others load, that is neither the original's nor the one in
    which the weights are stored."""
    named, usual = (
        (raw.get("dtype") or raw.get("torch_dtype"))
        for raw in (_raw(m, "config.json") for m in (edited, original))
    )
    own = dtype_name(edited.saved_dtype)
    known = (None, usual, own)
    return [] if named in known else [f"dtype of config.json is {named!r:.60}, not {own!r}"]


def _generation(model: LanguageModel) -> dict[str, Json]:
    found = getattr(model.hf, "generation_config", None)
    return found.to_dict() if found else {}


def _unknown(model: LanguageModel) -> dict[str, Json]:
    """What stands in config.json and does not reach the configuration that transformers makes."""
    raw = _raw(model, "config.json")
    known = model.config.to_dict().keys() | model.config.attribute_map.keys()
    return {k: v for k, v in raw.items() if k not in known and not hasattr(model.config, k)}


def _raw(model: LanguageModel, name: str) -> dict[str, Json]:
    """A JSON file of a model's folder; nothing where there is none."""
    file = model.folder / name if model.folder else None
    found = read_json(file) if file and file.exists() else {}
    return found if isinstance(found, dict) else {}


def _tokenizer_changes(original: LanguageModel, edited: LanguageModel) -> list[str]:
    a, b = original.tokenizer, edited.tokenizer
    if a is None or b is None:
        return [] if a is b else ["one of them has no tokenizer"]
    out = []
    if tokenizer_sha256(a) != tokenizer_sha256(b):
        out.append("the tokenizer splits or encodes otherwise")
    if a.chat_template != b.chat_template:
        out.append("the chat template differs")
    first, second = _settings(a), _settings(b)
    for key, value in _raw(edited, "tokenizer_config.json").items():
        usual = _raw(original, "tokenizer_config.json").get(key, getattr(a, key, None))
        if key in OTHERS and not _same(value, usual):
            out.append(f"{key} of tokenizer_config.json is {value!r:.60}, not {usual!r:.60}")
    return out + [
        f"{key} of the tokenizer is {_shown(second, key)}, not {_shown(first, key)}"
        for key in _different(first, second)
    ]


def _settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    return {key: str(getattr(tokenizer, key, None)) for key in SETTINGS}


def _buffers(model: LanguageModel) -> dict[str, Tensor]:
    """Tensors that are stored with a model and are no parameters."""
    parameters = {id(p) for p in model.hf.parameters()}
    return {n: t for n, t in model.hf.state_dict(keep_vars=True).items() if id(t) not in parameters}


def _different(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Keys whose values differ, or that one of the two lacks."""
    return sorted(k for k in a.keys() | b.keys() if not _same(a.get(k), b.get(k)))


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.cpu(), b.to(a.dtype).cpu())
    texts = [json.dumps(value, sort_keys=True, default=repr) for value in (a, b)]
    return texts[0] == texts[1]


def _shown(values: Mapping[str, object], key: str) -> str:
    return f"{values[key]!r:.60}" if key in values else "absent"


def _uncovered(original: LanguageModel, edited: LanguageModel) -> list[str]:
    """What of an edited checkpoint's folder was not compared."""
    if edited.folder is None:
        return ["the files: the model was not loaded from a folder"]
    weights = weight_files(edited.folder, {})
    wide = [n for file in weights for n, kind in stored(file).items() if kind == "F64"]
    out = [f"digits of {n} beyond float32" for n in wide]
    read = {p.name for p in weights} | KNOWN
    if len(weights) > 1 or weights[0].name != "model.safetensors":
        read.add("model.safetensors.index.json")
    for path in sorted(edited.folder.rglob("*")):
        name = path.relative_to(edited.folder).as_posix()
        if path.is_dir() or name in read or _is_copy(original.folder, name, path):
            continue
        out.append(f"the file {name}")
    return out


def _is_copy(folder: Path | None, name: str, path: Path) -> bool:
    """Whether a file stands in the original's folder just so."""
    file = folder / name if folder else None
    return bool(file and file.is_file() and file.read_bytes() == path.read_bytes())
