"""A checkpoint as its users load it, quantized by transformers, beside what is simulated here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..models.hugging_face import PreTrainedModel
from ..models.language_model import LanguageModel
from ..models.layout import Turned
from ..quantizers.bitsandbytes import FourBit
from ..quantizers.fitted import HQQ_GROUP
from ..quantizers.registry import get_quantizer
from ..quantizers.survival import quantize
from ..tasks.task import Task
from ..utils.libraries import first_line, library, quiet
from ..utils.shipped import LOADED

BATCH = 256
"""Prompts of one length that are asked at once."""


@dataclass(frozen=True)
class BesideEngine:
    """How far a simulated quantizer is from the engine that people run."""

    quantizer: str
    codes: int
    """Codes in the linear layers."""
    codes_apart: int
    """Those that the engine stores otherwise."""
    prompts: int
    """Prompts of the task, each once."""
    answers_apart: int
    """Those after which another token comes first."""
    logits_apart: float
    """RMS of engine minus simulated, over prompts and vocabulary."""
    logits_moved: float
    """RMS of simulated minus full precision: what quantizing does at all."""

    def __str__(self) -> str:
        return (
            f"{self.quantizer} in transformers: {self.codes_apart:,} of {self.codes:,} codes and "
            f"{self.answers_apart:,} of {self.prompts:,} first tokens differ from the simulated "
            f"ones; logits by {self.logits_apart:.3f} RMS, where quantizing moves them by "
            f"{self.logits_moved:.3f}."
        )


def _config(name: str) -> Any:
    """What users give as ``quantization_config``; None: the package is asked afterwards."""
    import transformers

    if name == "hqq":
        return None
    if name == "quanto-int4":
        library("optimum.quanto", "quanto", f"The quantizer {name}")
        return transformers.QuantoConfig(weights="int4")
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if name.startswith("int4"):
        ao = library("torchao.quantization", "torchao", f"The quantizer {name}")
        rule = ao.MappingType.SYMMETRIC if "-sym-" in name else ao.MappingType.ASYMMETRIC
        group = ao.PerGroup(int(name.rpartition("-g")[2]))
        four = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        return transformers.TorchAoConfig(
            ao.IntxWeightOnlyConfig(four, granularity=group, mapping_type=rule)
        )
    kind, *double = name.split("-")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=bool(double)
    )


def _by_hqq(hf: PreTrainedModel, names: list[str]) -> None:
    """Replace linear layers by the package's own, as its `AutoHQQHFModel.quantize_model` does."""
    hqq = library("hqq.core.quantize", "hqq", "The quantizer hqq")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=HQQ_GROUP)
    for name in names:
        layer = hf.get_submodule(name)
        how = {"compute_dtype": hf.dtype, "device": str(hf.device)}
        hf.set_submodule(name, hqq.HQQLinear(layer, config, **how))


def load_quantized(model: LanguageModel, name: str) -> LanguageModel:
    """The checkpoint of a model, loaded by transformers with a quantization config, or with the
    linear layers of the ``hqq`` package, in the dtype that it is stored in.

    Arguments:
        model: loaded from a folder, as in `load_model`.
        name: one of `LOADED`, in any case.

    Raises:
        ConfigError: another name, or a missing package.
        ModelError: the model has no folder, or transformers cannot load it so.
    """
    name = name.lower()
    if name not in LOADED:
        raise ConfigError(
            f"quantizer: got {name!r:.60}, expected one that transformers loads: "
            f"{', '.join(LOADED)}."
        )
    if model.folder is None:
        raise ModelError(
            f"{model.name} was not loaded from a folder, which transformers reads. Save it, and "
            "load that: load_model(folder)."
        )
    get_quantizer(name).check_installed()
    names = [n.removesuffix(".weight") for n in _touched(model, name)]
    if (name == "hqq" or name.startswith("int4")) and any(
        isinstance(model.hf.get_submodule(n), Turned) for n in names
    ):
        raise ModelError(
            f"{model.name} keeps its matrices transposed (Conv1D), which the package behind {name} "
            "leaves as they are. Leave it out; bitsandbytes quantizes them: nf4, fp4, int8."
        )
    with quiet():
        from transformers import AutoModelForCausalLM

        config = _config(name)
        try:
            hf = AutoModelForCausalLM.from_pretrained(
                model.folder,
                quantization_config=config,
                device_map={"": model.device},
                local_files_only=True,
                trust_remote_code=False,
            )
            if name == "hqq":
                _by_hqq(hf, names)
        except Exception as error:  # the libraries below fail in many ways
            raise ModelError(
                f"transformers cannot load {model.name} as {name}: {first_line(error)}"
            ) from error
    given = {f.name: getattr(model, f.name) for f in fields(LanguageModel) if f.init}
    return LanguageModel(**{**given, "hf": hf.eval()})


def stored_codes(loaded: LanguageModel, name: str, weight: str) -> Int[Tensor, " n"]:
    """Codes that a model of `load_quantized` stores, a higher one for a higher value; to be read
    before it first runs, when some processors repack them."""
    layer: Any = loaded.hf.get_submodule(weight.removesuffix(".weight"))
    if name == "hqq":
        unpack = library("hqq.core.quantize", "hqq").Quantizer.unpack[layer.meta["packing"]]
        return unpack(layer.W_q).flatten().long()
    packed = layer.weight
    if name.startswith("int4"):
        return packed.qdata.flatten().long() + 8
    if name == "quanto-int4":
        return packed._data.unpack().flatten().long()
    if name == "int8":
        return packed.data.flatten().long() + 127
    from bitsandbytes.functional import get_4bit_type

    both = packed.data.flatten().view(torch.uint8).long()
    codes = torch.stack([both >> 4, both & 15], 1).flatten()[: packed.quant_state.shape.numel()]
    quantizer = get_quantizer(name)
    assert isinstance(quantizer, FourBit)
    table = get_4bit_type(quantizer.kind, device="cpu").data
    return torch.searchsorted(quantizer.levels, table)[codes.cpu()]


@torch.no_grad()
def beside_engine(
    model: LanguageModel,
    name: str,
    task: Task,
    split: str = "unseen",
    on_step: Callable[[str, int, int], None] | None = None,
) -> tuple[BesideEngine, LanguageModel, LanguageModel]:
    """Compare a simulated quantizer with transformers, on the prompts of a task.

    Arguments:
        model: as in `load_quantized`.
        name: one of `LOADED`.
        task: the task, tokenized for this model.
        split: its phrasings.
        on_step: called with (what, models done, models in all).

    Returns:
        What was found, the simulated model, and the engine's.

    Raises:
        ConfigError, ModelError: see `load_quantized`.
    """
    step = on_step or (lambda *_: None)
    step(f"loading as {name}", 0, 3)
    engine, quantizer = load_quantized(model, name), get_quantizer(name)
    names = _touched(model, name)
    apart = sum(
        int(
            (
                stored_codes(engine, name, n).cpu() != quantizer.cells(model.weights[n].cpu()).codes
            ).sum()
        )
        for n in names
    )
    simulated, found = quantize(model, name), []
    for k, one in enumerate((model, simulated, engine)):
        step(f"asking {name}", k, 3)
        with quiet():
            found.append(_logits(one, task, split))
    full, ours, theirs = found
    beside = BesideEngine(
        quantizer=name,
        codes=sum(model.weights[n].numel() for n in names),
        codes_apart=apart,
        prompts=len(full),
        answers_apart=int((ours.argmax(1) != theirs.argmax(1)).sum()),
        logits_apart=float((theirs - ours).square().mean().sqrt()),
        logits_moved=float((ours - full).square().mean().sqrt()),
    )
    return beside, simulated, engine


def _touched(model: LanguageModel, name: str) -> list[str]:
    quantizer = get_quantizer(name)
    return [n for n in model.linear_names if quantizer.touches(model.weights[n])]


def _logits(model: LanguageModel, task: Task, split: str) -> Float[Tensor, "prompts vocab"]:
    """After every prompt that is scored, each once."""
    sets = [pairs for by in task.scored[split].values() for pairs in by.values()]
    prompts = sorted({pair.clean for pairs in sets for pair in pairs}, key=lambda p: (len(p), p))
    out = []
    for length, alike in groupby(prompts, len):
        for tokens in torch.tensor(list(alike)).split(BATCH):
            last = torch.full((len(tokens),), length - 1)
            out.append(model.last_logits(tokens, last).float().cpu())
    return torch.cat(out)
