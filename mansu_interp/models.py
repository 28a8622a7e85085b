"""Models: load them, run them, and describe them. The only importer of transformer_lens.

The weights are the Hugging Face ones in their deployed ``[out, in]`` layout. The TransformerLens
bridge wraps a structural copy of the modules that *shares* those weights, with no processing, so
that what is analysed is what is deployed.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .artifacts import expect, read_json
from .errors import ConfigError, ModelError, ResourceError
from .graph import Architecture, Graph
from .layout import linear_weights, turn, turn_back
from .libraries import first_line, quiet
from .memory import is_out_of_memory
from .remote import check_online, is_hub_name

EMBEDDED = Path(__file__).parent / "data" / "models"
PARALLEL = ("phi", "gptj", "codegen", "cohere", "falcon")
"""Model types whose attention and MLP read the same stream, always."""
MAX_SIZE = 10**8
"""Largest whole number in a config.json."""
MAX_LAYERS = 1000
SMALL = 10**7
"""Parameters below which ``auto`` stays on the CPU, which is faster then."""
MIN_SHARED = 96
"""Token positions that sharing a prefix must save to be worth a second forward call on a CPU."""
MIN_SHARED_WORK = 2.5e11
"""The same on an accelerator, times the model's parameters: a call costs it some milliseconds,
whatever is in it."""


def _common_prefix(tokens: Int[Tensor, "batch pos"], at: Int[Tensor, " n"]) -> int:
    """How many leading tokens all rows share, short of the first position that is read."""
    same = (tokens == tokens[:1]).all(0).long().cumprod(0).sum()
    return min(int(same), int(at.min()))


@torch.no_grad()
def _unpacked(packed: Any) -> torch.nn.Linear:
    """A plain float32 linear layer with the weights that a bitsandbytes 4-bit layer stands for.

    On some processors such a layer repacks itself when it first runs; what it then does to the
    unit vectors are its weights.
    """
    state, bias = packed.weight.quant_state, packed.bias
    if getattr(state, "packing_format_for_cpu", False):
        weight = packed(torch.eye(packed.in_features, dtype=torch.float32))
        weight = (weight if bias is None else weight - bias).T.contiguous()
    else:
        from bitsandbytes.functional import dequantize_4bit

        # Flat: the library's CPU kernel restores blocks that span rows with wrong scales.
        flat = copy.copy(state)
        flat.shape = torch.Size([state.shape.numel()])
        weight = dequantize_4bit(packed.weight, flat).view(state.shape)
    plain = torch.nn.Linear(packed.in_features, packed.out_features, bias is not None)
    plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        plain.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
    return plain


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").exists())


@dataclass
class LanguageModel:
    """A causal language model in float32, its tokenizer, and views of both.

    Examples:
        >>> model = load_model("facts")
        >>> model.graph.n_edges > 0
        True
    """

    name: str
    """Embedded name, folder or hub name it was loaded from."""
    hf: Any
    """The Hugging Face ``PreTrainedModel`` (float32, eval mode); a `Conv1D` in it is turned into a
    linear layer, see `layout`."""
    tokenizer: Any
    """The Hugging Face tokenizer."""
    saved_dtype: torch.dtype = torch.float32
    """The dtype of the checkpoint, in which edits are saved again."""
    sha256: str = ""
    """Hash of the safetensors files it was loaded from."""
    weights: dict[str, Tensor] = field(init=False, repr=False)
    """Every parameter by its Hugging Face name. In-place edits reach the bridge too."""

    def __post_init__(self) -> None:
        turn(self.hf)
        self.weights = {n: p.requires_grad_(False) for n, p in self.hf.named_parameters()}

    @property
    def device(self) -> torch.device:
        """Where its weights lie, and so where it computes."""
        return next(iter(self.weights.values())).device

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.hf.config

    @cached_property
    def architecture(self) -> Architecture:
        """Layers, heads and block order."""
        c = self.config
        heads = c.num_attention_heads
        return Architecture(
            n_layers=c.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            parallel=bool(getattr(c, "use_parallel_residual", c.model_type in PARALLEL)),
        )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @cached_property
    def graph(self) -> Graph:
        """All attribution edges."""
        return Graph(self.architecture)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(w.numel() for w in self.weights.values())

    @property
    def _min_shared(self) -> float:
        """Token positions that sharing a prefix must save."""
        return MIN_SHARED if self.device.type == "cpu" else MIN_SHARED_WORK / self.n_parameters

    @cached_property
    def linear_names(self) -> list[str]:
        """Names of the weights that 4-bit quantizers touch: every linear layer but the unembedding,
        not embeddings, norms or biases."""
        return linear_weights(self.hf)

    @cached_property
    def embedding_name(self) -> str:
        """Name of the input embedding's weight, ``[vocab, d_model]``; a tied one is the
        unembedding, too."""
        weight = self.hf.get_input_embeddings().weight
        return next(n for n, w in self.weights.items() if w is weight)

    @cached_property
    def bridge(self) -> Any:
        """The model as a TransformerLens ``TransformerBridge`` over the same weight tensors; layers
        packed to 4 bits by bitsandbytes are replaced by plain ones."""
        with quiet():
            from transformer_lens.model_bridge.sources._bridge_builder import (
                build_bridge_from_module,
            )

            memo = {id(t): t for t in [*self.hf.parameters(), *self.hf.buffers()]}
            twin = copy.deepcopy(self.hf, memo)
            for name, module in list(twin.named_modules()):
                if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
                    twin.set_submodule(name, _unpacked(module))
            turn_back(twin)
            twin.set_attn_implementation("eager")
            arch = (self.config.architectures or [type(self.hf).__name__])[0]
            try:
                bridge = build_bridge_from_module(
                    twin, arch, hf_config=self.config, tokenizer=self.tokenizer
                )
            except (ValueError, KeyError, NotImplementedError) as error:
                raise ModelError(
                    f"TransformerLens cannot bridge {arch} ({self.name}): {error}. "
                    "Use a decoder family that it supports."
                ) from error
        bridge.eval()
        return bridge

    def copy(self) -> LanguageModel:
        """An independent copy: its weights can be edited without touching this one's."""
        with quiet():
            twin = LanguageModel(
                self.name, copy.deepcopy(self.hf), self.tokenizer, self.saved_dtype, self.sha256
            )
        return twin

    def encode(self, text: str) -> list[int]:
        """Token ids of a text exactly as written: nothing is prepended."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def last_logits(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """Next-token logits at one position of each row (see `logits_at`)."""
        return self.logits_at(tokens, torch.arange(len(tokens)), last)

    def logits_at(
        self,
        tokens: Int[Tensor, "batch pos"],
        rows: Int[Tensor, " n"],
        at: Int[Tensor, " n"],
    ) -> Float[Tensor, "n vocab"]:
        """Next-token logits at any positions of any rows; right padding needs no mask.

        Tokens that all rows begin with (an instruction, few-shot examples) are computed once, and
        their keys and values shared: the same logits and gradients, several times faster.
        """
        tokens, rows, at = (t.to(self.device) for t in (tokens, rows, at))
        common = _common_prefix(tokens, at)
        if common * (len(tokens) - 1) < self._min_shared:
            hidden = self.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            return self._unembed(hidden[rows, at])
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        self.hf.base_model(input_ids=tokens[:1, :common], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(tokens))
        hidden = self.hf.base_model(
            input_ids=tokens[:, common:], past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self._unembed(hidden[rows, at - common])

    def _unembed(self, hidden: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
        """Logits as the model's own forward pass makes them."""
        logits = self.hf.get_output_embeddings()(hidden)
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2
        logits = logits * scale if scale != 1 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    def all_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits at every position."""
        return self.hf(input_ids=tokens.to(self.device), use_cache=False).logits

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 4) -> str:
        """Greedy continuation of a prompt, as text."""
        ids = torch.tensor([self.encode(prompt)], device=self.device)
        for _ in range(max_new_tokens):
            step = self.last_logits(ids, torch.tensor([ids.shape[1] - 1])).argmax(-1)
            ids = torch.cat([ids, step[:, None]], 1)
        return self.tokenizer.decode(ids[0, -max_new_tokens:])

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder with tokenizer, in the dtype the model was loaded in.

        Unedited weights come back bit for bit: they were widened from that dtype.
        """
        with quiet():
            out = copy.deepcopy(self.hf).to("cpu", self.saved_dtype)
            turn_back(out)
            out.config.dtype = self.saved_dtype
            out.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def _cached(name: str) -> Path | None:
    """The folder in which a model of the hub lies on this machine, if it does."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if isinstance(found, str) and list(Path(found).parent.glob("*.safetensors")):
        return Path(found).parent
    return None


def _locate(name: str) -> str | Path:
    """The folder of an embedded or local model, or the hub name itself."""
    if (EMBEDDED / name / "config.json").exists() and not re.search(r"[\\/]|^\.", name):
        return EMBEDDED / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(
                f"The folder {name} holds no config.json. "
                "Give a Hugging Face model folder (config.json, *.safetensors, tokenizer)."
            )
        return folder
    if not is_hub_name(name):
        raise ModelError(
            f"Unknown model {name!r}. Shipped: {', '.join(embedded_models())}. Or give a path to "
            "a Hugging Face folder, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    if cached := _cached(name):
        return cached
    check_online(f"Model {name!r}", ModelError)
    return name


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _read_config(file: Path) -> dict[str, Any]:
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


def empty_model(name: str | Path) -> LanguageModel:
    """A model without weights, from its configuration alone: sizes and graph, nothing else.

    Arguments:
        name: as in `load_model`, or the path of a config.json.

    Raises:
        ModelError: no such configuration, or one that transformers does not know.
    """
    given = Path(name)
    place = given if given.suffix == ".json" and given.is_file() else _locate(str(name))
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        try:
            if isinstance(place, Path):
                raw = _read_config(place if place.is_file() else place / "config.json")
                config = AutoConfig.for_model(raw.pop("model_type"), **raw)
            else:
                config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            with torch.device("meta"):
                hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        except ModelError:
            raise
        except Exception as error:  # the libraries below trip over damaged settings in many ways
            raise ModelError(
                f"{name} is not the configuration of a causal language model: {first_line(error)}"
            ) from error
    return LanguageModel(str(name), hf, None)


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


def load_model(name: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Load an embedded model, a local Hugging Face folder, or a model of the hub, in float32.

    Arguments:
        name: embedded name (see `embedded_models`), folder, or ``owner/name`` on the hub. Only a
            hub name may touch the network.
        device: where it computes, as in `pick_device`; ``auto`` leaves a model below ten million
            parameters on the CPU, as `SMALL` says.

    Raises:
        ConfigError: no such device.
        ModelError: unknown name, unreachable hub (within 5 s), no safetensors, or a checkpoint
            that is already packed to 4 or 8 bits.
    """
    target = pick_device(device)
    place = _locate(str(name))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet():
        local = isinstance(place, Path)
        if local:
            raw = _read_config(place / "config.json")
        else:
            raw = AutoConfig.from_pretrained(place, trust_remote_code=False).to_dict()
        if packed := raw.get("quantization_config"):
            method = packed.get("quant_method") if isinstance(packed, dict) else "unknown"
            raise ModelError(
                f"{name} is already quantized ({method}). Unlearning needs the full-precision "
                "weights: give the original checkpoint; this tool quantizes the result itself."
            )
        if local and not list(place.glob("*.safetensors")):
            raise ModelError(
                f"{name} has no *.safetensors file. Only safetensors are read (pickles can run "
                "code): convert it with save_pretrained."
            )
        try:
            # Code that comes with a model is never run, and never offered to be.
            kwargs: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
            hf = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, use_safetensors=True, **kwargs
            ).eval()
            small = device == "auto" and hf.num_parameters() < SMALL
            hf.to(torch.device("cpu") if small else target)  # pyright: ignore[reportArgumentType]
            tokenizer = AutoTokenizer.from_pretrained(place, **kwargs)
        except Exception as error:  # the libraries below trip over damaged files in many ways
            if is_out_of_memory(error):
                raise ResourceError(
                    f"Out of memory while loading {name}. It takes four bytes a parameter and as "
                    "much again for each copy: take a smaller model or a larger machine."
                ) from error
            raise ModelError(f"{name} could not be loaded: {first_line(error)}") from error
    named = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").split(".")[-1]
    saved = getattr(torch, named, None)
    if not isinstance(saved, torch.dtype) or not saved.is_floating_point:
        raise ModelError(f"{name} has the dtype {named[:80]!r} in its config.json; no such float.")
    folder = place if isinstance(place, Path) else _cached(place)
    return LanguageModel(str(name), hf, tokenizer, saved, _hash_folder(folder) if folder else "")
