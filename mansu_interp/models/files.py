"""The files of a model's folder: which weights are really loaded, and that nothing there misleads.

A folder may come from anybody. transformers reads ``model.safetensors``, or the files that
``model.safetensors.index.json`` names, wherever those lie; it opens whatever is called like one of
its files, and waits for ever for a FIFO. So the folder is looked at first.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from ..utils.files import Json, expect, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
READ = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Endings of the files that transformers reads in a folder."""
ELSEWHERE = "transformers_weights"
"""The key of a config.json by which transformers takes other files for the weights."""


def weight_files(folder: Path, config: dict[str, Json]) -> list[Path]:
    """The safetensors files of a folder that transformers loads, sorted by name.

    Arguments:
        folder: with a config.json.
        config: what that holds.

    Raises:
        ModelError: there are none, the index does not say what the files hold, or something in the
            folder is no regular file.
    """
    _check_entries(folder)
    if config.get(ELSEWHERE) is not None:
        raise ModelError(f"{folder}: its config.json names weights in other files ({ELSEWHERE}).")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json). Merge it into the model first, and "
            "save that with save_pretrained."
        )
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return _indexed(folder)
    raise ModelError(
        f"{folder} has no *.safetensors file. Only safetensors are read (pickles can run code), "
        f"from {WEIGHTS} or the files that {INDEX} names: convert it with save_pretrained."
    )


def _check_entries(folder: Path) -> None:
    """Refuse what only looks like a file: a FIFO, a socket, a link to nothing, and a folder that is
    called like a file."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() and (path.suffix in READ or not path.is_dir()):
            raise ModelError(f"{path} is no regular file. Remove it from the model's folder.")


def _indexed(folder: Path) -> list[Path]:
    """The files that the index names, if they hold what it says and lie in the folder."""
    index = folder / INDEX
    try:
        found = read_json(index)
        expect(found, {"weight_map": {...: str}}, "it")
        held: dict[str, set[str]] = {}
        for tensor, name in found["weight_map"].items():
            held.setdefault(name, set()).add(tensor)
        if not held:
            raise ValueError("it names no file")
        for name in sorted(held):
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r:.100} is no safetensors file beside it")
            if not (folder / name).is_file():
                raise ValueError(f"{name!r:.100} is not there")
        for name, tensors in sorted(held.items()):
            if odd := tensors ^ stored(folder / name).keys():
                raise ValueError(f"it is not true of {name} where {min(odd)!r:.100} is")
    except ValueError as error:
        raise ModelError(f"{index} cannot be followed: {error}.") from error
    return [folder / name for name in sorted(held)]


def stored(file: Path) -> dict[str, str]:
    """Tensors of a safetensors file, and the dtype in which each is stored (``BF16``).

    Raises:
        ModelError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged: {error}.") from error
