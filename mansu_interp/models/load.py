"""Load a model: an embedded one, a Hugging Face folder, or one of the hub; safetensors only."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import ConfigError, ModelError, ResourceError
from ..utils.files import Json, expect, file_sha256, read_json
from ..utils.hub import cached_model, check_online, fetch_model, is_hub_name
from ..utils.libraries import first_line, is_out_of_memory, quiet
from ..utils.ranges import entrance
from ..utils.shipped import DATA, is_embedded
from ..utils.tensors import dtype_name
from ..utils.words import shown
from .files import weight_files
from .language_model import LanguageModel

EMBEDDED = DATA / "models"

MAX_SIZE = 10**8
"""Largest whole number in a config.json."""

MAX_LAYERS = 1000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What weights are stored as, in safetensors' words."""

SMALL = 10**7
"""Parameters below which ``auto`` stays on the CPU and in float32, which is faster then."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a folder with a tokenizer has one."""

ROW_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files of prompts, which somebody may give in a model's place."""

HELD = ("auto", "float32", "bfloat16")
"""What `pick_dtype` knows."""


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").exists())


def _locate(name: str, weights: bool = True) -> Path:
    """The folder of an embedded or local model, or of one of the hub, fetched if need be."""
    if is_embedded(name):
        return EMBEDDED / name
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # Path.is_dir raises over 255 characters
        if not (folder / "config.json").exists():
            raise ModelError(
                f"The folder {name} holds no config.json. "
                "Give a Hugging Face model folder (config.json, *.safetensors, tokenizer)."
            )
        return folder
    if folder.suffix in ROW_FILES and os.path.isfile(folder):
        raise ModelError(
            f"{name} is a file of rows, where a model is expected. The order is "
            "read_prompts(path, model)."
        )
    repository, at, revision = name.partition("@")
    unknown = (
        f"Unknown model {name!r}. Shipped: {', '.join(embedded_models())}. Or give a path to "
        "a Hugging Face folder, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct."
    )
    valid = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision) if at else True
    if not is_hub_name(repository, plain=True) or not valid:
        raise ModelError(unknown)
    if cached := cached_model(repository, revision or None, weights):
        return cached
    try:
        check_online(f"Model {name!r}", ModelError)
    except ModelError as error:
        if "/" in repository:
            raise
        raise ModelError(f"{unknown} {error}") from error  # more likely a slip
    return fetch_model(repository, revision or None, weights)


def _read_config(file: Path) -> dict[str, Json]:
    """A model's config.json, of a size that can be real.

    Raises:
        ModelError: no such file, no JSON object, or a size that no model has.
    """
    try:
        raw = read_json(file)
        expect(raw, dict, "it")
        for key, value in raw.items():
            if type(value) is int and abs(value) > MAX_SIZE:
                raise ValueError(f"{key} is larger than {MAX_SIZE:,}")
        if not raw.get("num_hidden_layers", raw.get("n_layer", 1)) <= MAX_LAYERS:
            raise ValueError(f"it has more than {MAX_LAYERS:,} layers")
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file} is not the configuration of a model: {error}.") from error
    return raw


def empty_model(
    name: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> LanguageModel:
    """A model without weights, from its configuration alone: sizes and graph, nothing else.

    Arguments:
        name: as in `load_model`, or the path of a config.json.
        device: where it would compute, which decides its dtype.
        dtype: as in `pick_dtype`; the checkpoint's is the one that its configuration names.

    Raises:
        ConfigError: a dtype that does not fit.
        ModelError: no such configuration, or one that transformers does not know.
    """
    given = Path(name)
    is_config = given.suffix == ".json" and given.is_file()
    place = given if is_config else _locate(str(name), weights=False)
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            raw = _read_config(place if is_config else place / "config.json")
            config = AutoConfig.for_model(raw.pop("model_type"), **raw)
            with torch.device("meta"):
                hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        except ModelError:
            raise
        except Exception as error:  # the libraries below trip over damaged settings in many ways
            raise ModelError(
                f"{name} is not the configuration of a causal language model: {first_line(error)}"
            ) from error
    stored = getattr(config, "dtype", None) or torch.float32
    held = pick_dtype(dtype, stored, hf.num_parameters(), pick_device(device))
    return LanguageModel(str(name), hf.to(dtype=held), None, stored)


def pick_device(name: str | torch.device) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, ``cuda:1``, or whatever else torch has; ``auto`` is
    CUDA where there is one (of several processes on one machine each takes its own), else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        )
    try:
        found = torch.empty(0, device=torch.device(name)).device
        if found.type == "meta":
            raise RuntimeError("it computes nothing.")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"There is no device {str(name)!r} here: {first_line(error)} Give auto, cpu, or cuda "
            "where there is one."
        ) from error
    return found


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device is quick in bfloat16: below AVX-512 PyTorch emulates it, fifteen times as
    slowly as it computes float32."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def pick_dtype(
    name: str | torch.dtype, stored: torch.dtype, n_parameters: int, device: torch.device
) -> torch.dtype:
    """The dtype in which the weights of a checkpoint are held and its layers compute; edits, losses
    and everything that is summed are float32 in either.

    Arguments:
        name: ``float32``; ``bfloat16``, of a checkpoint that is stored in it; ``auto``: the latter
            for ten million parameters and more, on devices that are quick at it.
        stored: in the checkpoint.
        n_parameters: of the model.
        device: where it will compute.

    Raises:
        ConfigError: another name, or bfloat16 for a checkpoint that it would round.
    """
    asked = str(name).removeprefix("torch.")
    if asked not in HELD:
        raise ConfigError(f"dtype: got {shown(asked)}, expected {', '.join(HELD)}.")
    exact = stored == torch.bfloat16
    if asked == "bfloat16" and not exact:
        raise ConfigError(
            f"dtype: got bfloat16 for a checkpoint that is stored as "
            f"{dtype_name(stored)} and would be rounded, so that another model "
            "would be edited. Give auto or float32, or store the checkpoint in bfloat16 first."
        )
    quick = exact and n_parameters >= SMALL and computes_bfloat16(device)
    return torch.bfloat16 if asked == "bfloat16" or (asked == "auto" and quick) else torch.float32


def is_small(model: LanguageModel) -> bool:
    """Whether a model's matrix products are too small to be shared out among cores, and its calls
    are a good part of its time."""
    return model.device.type == "cpu" and model.n_parameters < SMALL


def use_threads(model: LanguageModel, threads: int | None = None) -> None:
    """Set how many CPU threads this process computes with.

    Arguments:
        model: what is computed.
        threads: so many; None: one for a model below ten million parameters, else torch's own
            choice. A small model gains next to nothing from two on idle cores, and takes ten times
            as long where another process has one of them.
    """
    if threads or is_small(model):
        torch.set_num_threads(threads or 1)


@entrance(ModelError)
def load_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> LanguageModel:
    """Load an embedded model, a local Hugging Face folder, or a model of the hub.

    Arguments:
        name: embedded name (see `embedded_models`), folder, or a name on the hub, ``owner/name`` or
            ``owner/name@revision``. Only a hub name that is not in the cache touches the network.
        device: where it computes, as in `pick_device`; ``auto`` leaves a model below ten million
            parameters on the CPU, as `SMALL` says.
        dtype: in which its weights are held and it computes, as in `pick_dtype`.

    Raises:
        ConfigError: no such device, or a dtype that does not fit the checkpoint.
        ModelError: unknown name, unreachable hub (within 5 s), no safetensors, or a checkpoint
            that is already packed to 4 or 8 bits.
    """
    target = pick_device(device)
    place = _locate(str(name))
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        raw = _read_config(place / "config.json")
        if packed := raw.get("quantization_config"):
            method = packed.get("quant_method") if isinstance(packed, dict) else "unknown"
            raise ModelError(
                f"{name} is already quantized ({method}). Unlearning needs the full-precision "
                "weights: give the original checkpoint; this tool quantizes the result itself."
            )
        files = weight_files(place, raw)
        stored, size = _stored(name, files)
        small = device == "auto" and size < SMALL
        target = torch.device("cpu") if small else target
        held = pick_dtype(dtype, stored, size, target)
        try:
            # Code that comes with a model is never run, and never offered to be.
            how = {"local_files_only": True, "trust_remote_code": False}
            hf, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
                place, dtype=held, use_safetensors=True, output_loading_info=True, **how
            )
            hf.eval().to(target)  # pyright: ignore[reportArgumentType]
            tokenizer = AutoTokenizer.from_pretrained(place, **how)
            tokenizer.decode(tokenizer("a").input_ids)  # a damaged one may load, and fail here
        except Exception as error:  # the libraries below trip over damaged files in many ways
            if is_out_of_memory(error):
                raise ResourceError(
                    f"Out of memory while loading {name}. It takes {held.itemsize} bytes a "
                    "parameter and as much again for each copy: take a smaller model or a larger "
                    "machine."
                ) from error
            if not any((place / file).exists() for file in TOKENIZERS):
                raise ModelError(
                    f"{name} has no tokenizer (none of {', '.join(TOKENIZERS)}). Copy the original "
                    "checkpoint's into the folder, with tokenizer_config.json."
                ) from error
            raise ModelError(f"{name} could not be loaded: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{name} lacks {len(missing)} weights, such as {missing[0]}, which would be random. "
            "Give a whole checkpoint that fits its config.json."
        )
    unread = tuple(sorted(found["unexpected_keys"]))
    sha = file_sha256(*files)
    return LanguageModel(str(name), hf, tokenizer, stored, sha, folder=place, unread=unread)


def _stored(name: str | Path, files: Sequence[Path]) -> tuple[torch.dtype, int]:
    """The dtype in which a checkpoint's weights are stored, whatever its config.json says (of
    several, one that holds all their values), and how many elements they have.

    Raises:
        ModelError: they are no floats, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found, size = set(), 0
    try:
        for file in files:
            with safe_open(file, "pt") as tensors:
                for part in map(tensors.get_slice, tensors.keys()):
                    found.add(part.get_dtype())
                    size += math.prod(part.get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{name} could not be loaded: {first_line(error)}") from error
    kinds = {DTYPES[x] for x in found if x in DTYPES}
    if not kinds:
        raise ModelError(
            f"{name} stores {', '.join(sorted(found)) or 'no weights'}; expected floats, such as "
            f"{', '.join(DTYPES)}. Give the original checkpoint."
        )
    return kinds.pop() if len(kinds) == 1 else torch.float32, size
