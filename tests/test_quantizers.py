"""NF4 cells against bitsandbytes' own codes, round trips, and what survives an edit."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from functools import lru_cache

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from mansu_interp.bench.config import BenchConfig
from mansu_interp.cli.settings import EvaluateConfig, VerifyConfig
from mansu_interp.errors import ConfigError
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.masks.floor import floor
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.base import as_units
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.gguf import EXACT as EXACT_FORMATS
from mansu_interp.quantizers.gguf import FITTED, TYPES, Mix, pack
from mansu_interp.quantizers.gguf import llama_cpp as engine
from mansu_interp.quantizers.packed import Packed
from mansu_interp.quantizers.quanto import group_of
from mansu_interp.quantizers.registry import QUANTIZERS, fitted_quantizers, get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.quantizers.torchao import Int4
from mansu_interp.runs.config import PlanConfig, RunConfig
from mansu_interp.runs.run import run
from mansu_interp.tasks.load import load_task
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.utils.libraries import library, quiet
from mansu_interp.utils.shipped import ENGINES, LOADED, MEANT, quantizer_names

with quiet():  # tells which of its kernels do not load
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quant_primitives, quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

NF = NF4()


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(96, 64, generator=generator) * 0.02
    if kind == "uniform":
        return torch.rand(64, 80, generator=generator) * 2 - 1
    if kind == "zero block":
        weight = torch.randn(8, 64, generator=generator)
        weight[3] = 0
        return weight
    if kind == "bf16":  # ties and exact boundaries are likelier on a coarse grid
        return torch.randn(64, 128, generator=generator).bfloat16().float()
    return torch.randn(13, 37, generator=generator)  # 481 = 7 x 64 + 33


KINDS = pytest.mark.parametrize("kind", ["normal", "uniform", "zero block", "bf16", "odd size"])


def bitsandbytes_codes(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and scales out of bitsandbytes' packed bytes: the high nibble comes first."""
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
    byte = packed.flatten().view(torch.uint8).long()
    codes = torch.stack([byte >> 4, byte & 15], 1).flatten()[: weight.numel()]
    return codes, state.absmax.float()


@KINDS
@pytest.mark.parametrize("blocksize", [64, 128])
def test_codes_are_those_of_bitsandbytes(kind: str, blocksize: int):
    weight = weights(kind)
    codes, absmax = bitsandbytes_codes(weight, blocksize)
    cells = NF4(blocksize).cells(weight)
    assert torch.equal(cells.codes, codes)
    assert torch.equal(cells.scale, absmax.repeat_interleave(blocksize)[: weight.numel()])
    assert len(codes.unique()) == 16


@KINDS
def test_round_trip_is_level_times_absmax(kind: str):
    weight = weights(kind)
    cells = NF.cells(weight)
    expected = (NF.levels[cells.codes] * cells.scale).view_as(weight)
    assert torch.equal(NF.round_trip(weight), expected)
    assert (NF.round_trip(weight) - weight).abs().max() < 0.16 * weight.abs().max()


def test_scale_setters():
    weight = torch.zeros(2, 64)
    weight[0, 5], weight[0, 9], weight[0, 40] = 1.0, -1.0, 0.5
    sets = NF.cells(weight).sets_scale.view(2, 64)
    assert sets[0].nonzero().flatten().tolist() == [5, 9]
    assert sets[1].all()  # an all-zero block: every element is its absmax


def test_levels_are_ascending_and_boundaries_between():
    assert NF.levels[0] == -1 and NF.levels[15] == 1 and NF.levels[7] == 0
    assert (NF.levels.diff() > 0).all()
    assert (NF.boundaries > NF.levels[:-1]).all() and (NF.boundaries < NF.levels[1:]).all()
    assert NF.levels.diff().min() == pytest.approx(0.0796, abs=1e-4)
    assert NF.levels.diff().max() == pytest.approx(0.3038, abs=1e-4)


def test_unknown_quantizer():
    """What was meant is named, and where all names stand; not all names."""
    near = (
        r"^Unknown quantizer 'nf5'; did you mean nf4 or [^?]*\? Engines: llama.cpp, .*`mansu list`"
    )
    with pytest.raises(ConfigError, match=near) as error:
        get_quantizer("nf5")
    assert len(str(error.value)) < 200 and "gptq" not in str(error.value)
    for name, meant in (("W4A16", "int4-sym-g128"), ("ollama", "llama.cpp"), ("Q4_KM", "q4_k_m")):
        with pytest.raises(ConfigError, match=rf"did you mean {re.escape(meant)}( or|\?)"):
            get_quantizer(name)
    with pytest.raises(
        ConfigError, match=r"^vLLM is an engine; expected .* formats: nf4, int4-sym"
    ):
        get_quantizer("vLLM")
    assert {*MEANT.values()} <= {*QUANTIZERS, *ENGINES} and not {*MEANT} & {*QUANTIZERS, *ENGINES}


def test_names_are_taken_in_any_case_and_stored_in_the_usual_one():
    assert all(name == name.lower() for name in (*QUANTIZERS, *ENGINES, *LOADED))
    assert get_quantizer("Q4_K_M") is get_quantizer("q4_k_m")
    assert [q.name for q in fitted_quantizers(["HQQ"])] == ["hqq"]
    assert quantizer_names(["NF4, LLAMA.CPP"]) == quantizer_names(["nf4", "llama.cpp"])
    assert Mansu(survive=("Q4_0",), train_through=("Q4_K_M",)).survive == ("q4_0",)
    assert RunConfig(quantizers=("Q4_K_M", "ALL")).quantizers[0] == "q4_k_m"
    assert VerifyConfig("a", "b", ("Vllm",)).survive == ENGINES["vllm"].exact
    assert PlanConfig(survive=("llama.cpp",)).survive == ENGINES["llama.cpp"].exact
    assert EvaluateConfig("a", quantizers=("NF4", "Transformers")).quantizers == (
        "nf4", "transformers",
    )  # fmt: skip


def test_quantize_changes_linear_weights_alone(tiny_model):
    model = tiny_model(2)
    quantized = quantize(model)
    for name, weight in model.weights.items():
        if name in model.linear_names:
            assert torch.equal(quantized.weights[name], NF.round_trip(weight)), name
            assert not torch.equal(quantized.weights[name], weight), name
        else:
            assert torch.equal(quantized.weights[name], weight), name
    assert len(model.linear_names) == 3 * 7
    again = quantize(quantized)
    assert all(torch.equal(again.weights[n], quantized.weights[n]) for n in model.weights)


def edited(model: LanguageModel, changes: dict[tuple[str, int], float]) -> LanguageModel:
    out = model.copy()
    for (name, at), value in changes.items():
        out.weights[name].view(-1)[at] = value
    return out


def test_survival_by_hand(tiny_model):
    """One edit within its cell, one to the next level: one of two survives."""
    model = tiny_model(4)
    name = model.linear_names[0]
    cells, flat = NF.cells(model.weights[name]), model.weights[name].flatten()
    inner = ((cells.codes > 2) & (cells.codes < 13)).nonzero().flatten()
    a, b = int(inner[0]), int(inner[1])
    level = NF.levels[cells.codes] * cells.scale
    target = float(NF.levels[cells.codes[b] + 1] * cells.scale[b])
    stay = float((flat[a] + level[a]) / 2)
    found = survival(model, edited(model, {(name, a): stay, (name, b): target}), NF)
    assert (found.edited, found.survived, found.collateral) == (2, 1, 0)
    d = torch.tensor([stay - flat[a], target - flat[b]]).double()
    bins = cells.scale[[a, b]].double() * 2 / 15
    assert found.update_over_bin == pytest.approx(float(d.norm() / bins.norm()), rel=1e-5)
    moved = target - float(level[b])
    assert found.share_kept == pytest.approx(float(moved * d[1] / (d @ d)), rel=1e-4)


def test_touching_the_absmax_re_codes_the_block(tiny_model):
    model = tiny_model(4)
    name = model.linear_names[3]
    cells = NF.cells(model.weights[name])
    at = int(cells.sets_scale[:64].nonzero()[0])
    twice = 2 * float(model.weights[name].flatten()[at])
    after = edited(model, {(name, at): twice})
    found = survival(model, after, NF)
    changed = NF.cells(model.weights[name]).codes != NF.cells(after.weights[name]).codes
    assert (found.edited, found.survived) == (1, 0)  # an outermost code stays one
    assert found.collateral == int(changed.sum()) > 20
    assert not changed[64:].any()


def test_no_edit_no_survival(tiny_model):
    model = tiny_model(4)
    found = survival(model, model.copy(), NF)
    assert (found.edited, found.survived, found.collateral, found.share_kept) == (0, 0, 0, 0.0)


def test_ties_go_where_bitsandbytes_sends_them():
    """On every cell boundary, and on the nearest float to either side of it."""
    at = NF.boundaries
    around = torch.cat([at, at.nextafter(torch.tensor(2.0)), at.nextafter(torch.tensor(-2.0))])
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1:46] = 1.0, around
    codes, _ = bitsandbytes_codes(weight, 64)
    assert torch.equal(NF.cells(weight).codes, codes)


@pytest.mark.parametrize(
    "name", ["nf4", "fp4", "int4-g32", "q4_0", "q8_0", "mxfp4", "nvfp4", "nvfp4-1"]
)
def test_leaving_a_cell_is_a_code_that_changes(name: str):
    """Boundaries themselves and values beyond all levels included."""
    torch.manual_seed(0)
    cells = get_quantizer(name).cells(torch.randn(8, 64))
    n = len(cells.codes)
    beyond = (torch.full((n,), -9.0), torch.full((n,), 9.0))
    edges = [cells.edge(cells.codes - k).nan_to_num(posinf=9.0, neginf=-9.0) for k in (0, 1)]
    for values in (torch.randn(n), *edges, *beyond):
        code = cells.encode(values)
        up = torch.rand(n) < 0.5
        assert torch.equal(
            cells.leaves(values, up), torch.where(up, code > cells.codes, code < cells.codes)
        )
        assert torch.equal(cells.leaves(values, torch.tensor(True)), code > cells.codes)


# Every quantizer's cells, code by code against the library that it stands for.

VALUES = ("normal", "ties", "zero block", "negative extreme", "one sign", "constant", "many sizes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made_weights(kind: str, dtype: torch.dtype, width: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    weight = torch.randn(24, width, generator=generator) * 0.02
    if kind == "ties":  # multiples of half a step, under many scales
        weight = torch.randint(-16, 17, (24, width), generator=generator) / 2.0
        weight *= torch.tensor([1.0, 0.3, 0.01]).repeat(8)[:, None]
    if kind == "zero block":
        weight[3:5] = 0
        weight[7, :128] = 0
    if kind == "negative extreme":
        weight[:, ::32] = -weight.abs().amax() * 1.5
    if kind == "one sign":
        weight = weight.abs() + 0.01
    if kind == "constant":
        weight[::2] = 0.02
    if kind == "many sizes":  # of groups, from 1 down to 2 ** -15 of the largest
        weight *= (2.0 ** -torch.arange(width // 16)).repeat_interleave(16)
    return weight.to(dtype).float()


def reference_codes(name: str, weight: Tensor) -> Tensor:
    """The library's own codes, turned so that a higher code is a higher value."""
    if name.startswith(("nf4", "fp4")):
        kind, *rest = name.split("-")
        size = int(rest[0]) if rest and rest[0].isdigit() else 64
        packed, _ = functional.quantize_4bit(
            weight, quant_type=kind, blocksize=size, compress_statistics=name.endswith("dq")
        )
        byte = packed.flatten().view(torch.uint8).long()
        codes = torch.stack([byte >> 4, byte & 15], 1).flatten()[: weight.numel()]
        order = functional.get_4bit_type(kind, device="cpu").argsort()
        ranks = order.argsort()[codes]
        return ranks - (ranks > 7).long() if kind == "fp4" else ranks  # one of its two zeros
    if name == "int8":
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        codes[absmax == 0] = 0  # 0 x inf, cast to an integer, is whatever the machine makes it
        return codes.long().flatten() + 127
    if name.startswith(("int4", "torchao")):
        quantizer = get_quantizer(name)
        assert isinstance(quantizer, Int4)
        return quantizer.library_codes(weight)[0].long().flatten() + 8 * (quantizer.rule == "sym")
    if name == "quanto-int4":
        quanto = library("optimum.quanto", "quanto")
        group = quanto_group(weight.shape[1])
        scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, 0, group)
        codes = torch.ops.quanto.quantize_affine(weight, 4, 0, group, scale, shift).long()
        codes[(scale == 0).flatten()] = 0  # 0 / 0, cast to an integer; every code stands for min
        return codes.flatten()
    if name.startswith("nvfp4"):
        packed = to_nvfp4(weight, one_level=name == "nvfp4-1").qdata
        return float_ranks(unpack_uint4(packed).flatten())
    return torch.from_numpy(gguf_codes(name, weight.numpy())).flatten()


@lru_cache
def quanto_group(width: int) -> int | None:
    """Of the package's own layer."""
    layer = library("optimum.quanto", "quanto").QLinear
    return layer(width, 2, weights="qint4", device="meta").weight_group_size


def float_ranks(codes: Tensor) -> Tensor:
    """4-bit floats, whose first bit is the sign, counted from the lowest; two zeros are one."""
    magnitude = (codes & 7).long()
    return 7 + torch.where(codes > 7, -magnitude, magnitude)


def to_nvfp4(weight: Tensor, one_level: bool = False) -> nvfp4_tensor.NVFP4Tensor:
    scale = None if one_level else nvfp4_tensor.per_tensor_amax_to_scale(weight.abs().amax())
    return nvfp4_tensor.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)


def gguf_codes(name: str, weight: np.ndarray) -> np.ndarray:
    """Out of the bytes of gguf's blocks: scales, then fifth bits, then pairs of nibbles."""
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    blocks = gguf.quantize(weight, kind).reshape(weight.size // 32, -1)
    if name == "q8_0":
        return blocks[:, 2:].view(np.int8).astype(np.int64) + 127
    nibbles = blocks[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], 1).astype(np.int64)
    if name == "mxfp4":
        return float_ranks(torch.from_numpy(codes)).numpy()
    if name.startswith("q5"):
        high = np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little")
        codes += 16 * high.astype(np.int64)
    if name.endswith("_0"):
        grouped = weight.reshape(-1, 32)
        extreme = np.take_along_axis(grouped, abs(grouped).argmax(1)[:, None], 1)
        codes = np.where(extreme > 0, (31 if name == "q5_0" else 15) - codes, codes)
    return codes


EXACT = [n for n, q in QUANTIZERS.items() if q.promises]
WEIGHTWISE = [*EXACT, "hqq"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", EXACT)
def test_codes_are_those_of_the_library(name: str, kind: str, dtype: torch.dtype):
    weight = made_weights(kind, dtype)
    assert torch.equal(get_quantizer(name).cells(weight).codes, reference_codes(name, weight))


@pytest.mark.parametrize(
    "name", [n for n in EXACT if n[:3] in ("nf4", "fp4", "int") and "int4" not in n]
)
def test_odd_shapes(name: str):
    weight = torch.randn(13, 37, generator=torch.Generator().manual_seed(5))
    assert torch.equal(get_quantizer(name).cells(weight).codes, reference_codes(name, weight))


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", WEIGHTWISE)
def test_values_are_the_library_s_round_trip(name: str, kind: str):
    """Up to what the library rounds when it stores its scales (float16, or 8 bits)."""
    weight, quantizer = made_weights(kind, torch.float32), get_quantizer(name)
    cells = quantizer.cells(weight)
    restored = quantizer.round_trip(weight).flatten()
    slack = 0.02 if name.endswith("dq") else 2e-3
    bound = slack * torch.maximum(cells.span, cells.highest.abs())
    bound += 2.0**-25 * cells.levels.abs().max()  # a tiny scale is rounded as float16 has it
    if name == "nf4":
        assert torch.equal(restored, cells.value(cells.codes))
    elif name.endswith("dq"):
        assert (restored - cells.value(cells.codes)).norm() <= 0.15 * weight.norm()
    else:
        assert ((restored - cells.value(cells.codes)).abs() <= bound).all()


@pytest.mark.parametrize("name", [n for n in EXACT if not n.endswith("dq")])
def test_only_setters_re_code_others(name: str):
    """Moving any other element, within its group's extremes, changes no code but its own."""
    weight, quantizer = made_weights("normal", torch.float32), get_quantizer(name)
    cells = quantizer.cells(weight)
    generator = torch.Generator().manual_seed(1)
    moved = torch.rand(weight.numel(), generator=generator) < 0.3
    moved &= ~cells.sets_scale
    share = 0.02 + 0.96 * torch.rand(weight.numel(), generator=generator)
    other = cells.lowest + (cells.highest - cells.lowest) * share
    after = quantizer.cells(torch.where(moved, other, weight.flatten()).view_as(weight))
    assert torch.equal(after.codes[~moved], cells.codes[~moved])
    assert torch.equal(after.scale, cells.scale)
    sure = (after.codes == cells.encode(other))[moved]
    assert sure.float().mean() > 0.99
    at = int(cells.sets_scale.nonzero()[0])
    weight.view(-1)[at] *= 3
    assert (quantizer.cells(weight).codes != cells.codes).sum() > 5


@pytest.mark.parametrize("name", EXACT)
def test_edges_enclose_the_element(name: str):
    weight = made_weights("negative extreme", torch.float32)
    cells = get_quantizer(name).cells(weight)
    slack = 1e-4 * cells.span + (4e-4 * weight.abs().max() if name == "int8" else 0)
    assert (weight.flatten() <= cells.edge(cells.codes) + slack).all()
    assert (weight.flatten() >= cells.edge(cells.codes - 1) - slack).all()


@pytest.mark.parametrize("k", [-60, -7, -5, -1, 0, 1, 5, 60])
def test_mxfp4_s_exponent_around_a_power_of_two(k: int):
    """gguf takes a float32 logarithm, which rounds up just below."""
    steps = 2.0 ** torch.tensor([-24.0]) * torch.tensor([[0], [1], [2], [8], [60], [-2], [-40]])
    weight = torch.linspace(-1, 1, 32).repeat(7, 1) * 0.9
    weight[:, 5:6] = 1 - steps
    weight *= 2.0**k
    codes = get_quantizer("mxfp4").cells(weight).codes
    assert torch.equal(codes, reference_codes("mxfp4", weight))


def test_mxfp4_of_torchao_differs_in_ties_alone():
    """torchao's go to the even code, gguf's towards 0."""
    for kind in ("normal", "ties"):
        weight = made_weights(kind, torch.float32)
        _, packed = mx_tensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
        cells = get_quantizer("mxfp4").cells(weight)
        other = float_ranks(unpack_uint4(packed).flatten()) != cells.codes
        units = weight.flatten() / torch.where(cells.scale > 0, cells.scale, 1.0)
        assert not (other & ~torch.isin(units.abs(), cells.boundaries)).any()
        assert other.any() == (kind == "ties")


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_nvfp4_of_llama_cpp_differs_in_ties_and_small_groups_alone(kind: str, size: float):
    """It sends ties towards 0, and has subnormal scales where torchao has its smallest."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's own code: needs the wheel xllamacpp")
    weight = made_weights(kind, torch.float32) * size
    blocks, number = np.zeros((weight.numel() // 64, 36), np.uint8), gguf.GGMLQuantizationType.NVFP4
    values = weight.numpy()
    engine().ggml_quantize_chunk(
        number.value, values.ctypes.data, blocks.ctypes.data, 0, *values.shape, None
    )
    pairs = torch.from_numpy(blocks[:, 4:].reshape(-1, 8))
    codes = float_ranks(torch.cat([pairs & 15, pairs >> 4], 1).flatten())
    cells = get_quantizer("nvfp4-1").cells(weight)
    normal, units = cells.scale > 2.0**-6, weight.flatten() / cells.scale
    apart = codes != cells.codes
    assert not (apart & normal & ~torch.isin(units.abs(), cells.boundaries)).any()
    assert (apart & normal).any() == (kind == "ties" and size == 100)
    stored = torch.from_numpy(blocks[:, :4].copy()).view(torch.float8_e4m3fn).float()
    assert torch.equal(stored.flatten()[normal[::16]], cells.scale[::16][normal[::16]])
    absmax = weight.abs().view(-1, 16).amax(1)
    step = 2.0**-9  # of subnormal scales
    expected = (absmax / 6 / step).round() * step
    assert torch.equal(stored.flatten()[absmax / 6 < 2.0**-6], expected[absmax / 6 < 2.0**-6])


def test_mxfp4_of_compressed_tensors_has_the_next_scale_from_7_units_on():
    """What vLLM loads: by hand, and ties to the even level."""
    weight = torch.zeros(4, 32)
    weight[:, 0] = torch.tensor([6.9, 7.0, -7.5, 8.0])
    weight[:, 1:5] = torch.tensor([5.0, 3.5, 0.25, -2.5])
    quantizer = get_quantizer("mxfp4")
    cells = quantizer.elsewhere(weight, torch.float32)["in compressed-tensors"]
    assert cells.scale.view(4, 32)[:, 0].tolist() == [1.0, 2.0, 2.0, 2.0]
    assert quantizer.cells(weight).scale.view(4, 32)[:, 0].tolist() == [1.0, 1.0, 1.0, 2.0]
    assert cells.highest.view(4, 32)[:, 0].tolist() == [7.0, 14.0, 14.0, 14.0]
    restored = cells.value(cells.codes).view(4, 32)[:, :5]
    assert restored[0].tolist() == [6.0, 4.0, 4.0, 0.0, -2.0]
    assert restored[1].tolist() == [8.0, 4.0, 4.0, 0.0, -2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
def test_mxfp4_elsewhere_is_that_of_compressed_tensors(kind: str, dtype: torch.dtype):
    codes = (
        pytest.importorskip("compressed_tensors", reason="needs compressed-tensors") and mxfp4a16
    )
    weight = made_weights(kind, dtype)
    cells = get_quantizer("mxfp4").elsewhere(weight, dtype)["in compressed-tensors"]
    restored, scale = codes(weight)
    some = cells.scale > 0
    assert torch.equal(cells.scale[some], scale[some])
    assert torch.equal(cells.value(cells.codes)[some], restored[some])


@pytest.mark.parametrize("names", [("mxfp4",), ("nf4", "int4-sym-g128", "mxfp4", "nvfp4")])
def test_an_edit_that_survives_mxfp4_does_in_vllm(names: tuple[str, ...]):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    weight = made_weights("normal", torch.bfloat16, width=1024)
    where, draws = floor(weight, names, torch.bfloat16), torch.Generator().manual_seed(1)
    up, edited = torch.rand(2, weight.numel(), generator=draws).gt(0.5)
    value = torch.where(up, where.up, where.down)
    moves = edited & ~value.isnan()
    after = torch.where(moves, value, weight.flatten()).view_as(weight)
    (a, scale), (b, other) = mxfp4a16(weight), mxfp4a16(after)
    assert moves.float().mean() > 0.2 and torch.equal(scale, other)
    assert torch.equal(a != b, moves)


def mxfp4a16(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What compressed-tensors restores, and the scale of every element."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = preset_name_to_scheme("MXFP4A16", ["Linear"]).weights
    assert args is not None
    groups = weight.unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    restored = fake_quantize(weight, scale, zero, args).flatten()
    return restored, scale.float().repeat_interleave(32, -1).flatten()


def test_a_value_may_rise_within_mxfp4_s_exponent_alone():
    """Up to 8 units the scale stays; at 8 it doubles."""
    weight = torch.full((1, 32), 0.3)
    weight[0, 0] = 4.5
    q = get_quantizer("mxfp4")
    before = q.cells(weight)
    weight[0, 1] = before.highest[1] * (1 - 2**-8)
    assert torch.equal(q.cells(weight).scale, before.scale)
    weight[0, 1] = before.highest[1]
    assert torch.equal(q.cells(weight).scale, 2 * before.scale)


def w4a16_codes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of compressed-tensors, in the weight's dtype."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as rounded
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group)
    low, high = (getattr(weight.view(len(weight), -1, group), f)(-1) for f in ("amin", "amax"))
    scale, zero = calculate_qparams(low, high, args)
    return rounded(weight, scale, zero, args).flatten().long() + 8, scale


@pytest.mark.parametrize("kind", ["normal", "ties", "negative extreme", "many sizes"])
def test_w4a16_of_compressed_tensors_is_symmetric_int4(kind: str):
    """Where its code of an extreme is another, which no edit touches: it divides by the scale, and
    an extreme lies on a tie."""
    pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    weight = made_weights(kind, torch.float32)
    codes, scale = w4a16_codes(weight, 128)
    cells = get_quantizer("int4-sym-g128").cells(weight)
    assert torch.equal(codes[~cells.sets_scale], cells.codes[~cells.sets_scale])
    assert torch.equal(scale.flatten(), cells.scale.view(-1, 128)[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ("mxfp4",),
        ("nvfp4",),
        ("nvfp4-1",),
        ("quanto-int4",),
        ("nf4", "q5_0", "q5_1", "mxfp4", "nvfp4"),
    ],
)
def test_what_the_floor_admits_survives(names: tuple[str, ...], dtype: torch.dtype):
    """A third of a weight edited up or down, as far as the floor allows or just so far: in the
    library every code of an edit changes, and no other."""
    weight = made_weights("normal", dtype)
    where, generator = floor(weight, names, dtype), torch.Generator().manual_seed(1)
    up, far, edited = torch.rand(3, weight.numel(), generator=generator).gt(0.5)
    end = torch.where(up, where.highest, where.lowest)
    value, moves = where.land(torch.where(far, end * 0.98, torch.where(up, where.up, where.down)))
    moves &= edited
    assert moves.float().mean() > 0.2
    after = torch.where(moves, value, weight.flatten()).view_as(weight)
    for kind in (dtype, torch.bfloat16):
        a, b = weight.to(kind).float(), after.to(kind).float()
        for name in names:
            assert torch.equal(reference_codes(name, a) != reference_codes(name, b), moves), name


NARROW = ("int4-g32", "int4-sym-g128", "torchao-int4-g64", "quanto-int4")


def narrow_reference(name: str, weight: Tensor) -> list[Tensor]:
    """Codes of the libraries that compute in the dtype of a weight, a higher one for a higher
    value; torchao's integer ones as its tensor subclass stores them in a layer."""
    if name == "quanto-int4":
        return [reference_codes(name, weight)]
    quantizer = get_quantizer(name)
    assert isinstance(quantizer, Int4)
    if quantizer.rule == "tinygemm":
        block, limits = (1, quantizer.group), (torch.uint8, 0, 15)
        params = quant_primitives._choose_qparams_affine_tinygemm(
            weight, quant_primitives.MappingType.ASYMMETRIC, block, *limits
        )
        codes = quant_primitives._quantize_affine_tinygemm(weight, block, *params, *limits)
        return [codes.flatten()]
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    kinds = quant_primitives.MappingType
    quantize_(
        layer,
        IntxWeightOnlyConfig(
            torch.int4,
            granularity=PerGroup(quantizer.group),
            mapping_type=kinds.SYMMETRIC if quantizer.rule == "sym" else kinds.ASYMMETRIC,
        ),
    )
    found = [layer.weight.qdata.flatten().long() + 8]
    if quantizer.rule == "sym" and importlib.util.find_spec("compressed_tensors"):
        found.append(w4a16_codes(weight, quantizer.group)[0])
    return found


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", NARROW)
def test_narrow_codes_are_those_of_the_library(name: str, kind: str, dtype: torch.dtype):
    """Of every element, and of other values of those that set no scale."""
    weight = made_weights(kind, dtype)
    grids = list(get_quantizer(name).elsewhere(weight, dtype).values())
    for cells, reference in zip(grids, narrow_reference(name, weight.to(dtype)), strict=False):
        assert torch.equal(cells.codes[~cells.sets_scale], reference[~cells.sets_scale].long())
    free = ~grids[0].sets_scale
    draws = torch.rand(weight.numel(), generator=torch.Generator().manual_seed(2))
    other = (grids[0].lowest + draws * (grids[0].highest - grids[0].lowest)).to(dtype).float()
    other = torch.where(free, other, weight.flatten())
    after = other.view_as(weight).to(dtype)
    for cells, reference in zip(grids, narrow_reference(name, after), strict=False):
        assert torch.equal(cells.encode(other)[free], reference[free].long())
        up = other > weight.flatten()
        assert torch.equal(cells.leaves(other, up)[free], (reference.long() != cells.codes)[free])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [*((n,) for n in NARROW), ("nf4", *NARROW[:2], "q4_0", "mxfp4")])
def test_what_the_floor_admits_survives_in_the_library_s_own_arithmetic(
    names: tuple[str, ...], dtype: torch.dtype
):
    """torchao, compressed-tensors and optimum-quanto compute in the dtype that a checkpoint is
    loaded in: one edit in some hundred was lost there, as values near a boundary fell back."""
    weight = made_weights("normal", dtype, width=1024)
    where, generator = floor(weight, names, dtype), torch.Generator().manual_seed(1)
    up, edited = torch.rand(2, weight.numel(), generator=generator).gt(0.5)
    value = torch.where(up, where.up, where.down)
    moves = edited & ~value.isnan()
    assert moves.float().mean() > 0.2
    after = torch.where(moves, value, weight.flatten()).view_as(weight)
    for kind in DTYPES[1:]:
        for name in (n for n in names if n in NARROW):
            both = (narrow_reference(name, w.to(kind)) for w in (weight, after))
            for a, b in zip(*both, strict=True):
                assert torch.equal(a != b, moves), (name, kind)


@pytest.mark.parametrize("width", [64, 128, 160, 192, 200, 256, 320, 576])
def test_groups_of_quanto_go_by_width(width: int):
    assert group_of(width) == (quanto_group(width) or width)
    weight, quantizer = made_weights("normal", torch.float32, width), get_quantizer("quanto-int4")
    assert torch.equal(quantizer.cells(weight).codes, reference_codes("quanto-int4", weight))
    part = as_units(weight, [quantizer])
    codes = [quantizer.cells(unit).codes for unit in part]
    assert torch.equal(torch.cat(codes), quantizer.cells(weight).codes)


@pytest.mark.slow  # the package compiles its extension, which takes a minute
def test_quanto_restores_what_its_tensors_do():
    quanto = library("optimum.quanto", "quanto")
    weight = torch.cat([made_weights(kind, torch.float32) for kind in VALUES])
    scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, 0, 128)
    packed = quanto.quantize_weight(weight, quanto.qint4, 0, scale, shift, 128, optimized=False)
    assert torch.equal(get_quantizer("quanto-int4").round_trip(weight), packed.dequantize())


def test_hqq_is_the_package_s_own():
    from hqq.core.quantize import Quantizer

    weight, quantizer = made_weights("normal", torch.float32), get_quantizer("hqq")
    packed, meta = Quantizer.quantize(
        weight, nbits=4, group_size=64, round_zero=True, axis=1, device="cpu"
    )
    assert torch.equal(quantizer.round_trip(weight), Quantizer.dequantize(packed, meta).float())
    cells = quantizer.cells(weight)
    assert not quantizer.promises and cells.sets_scale.all()


def test_rows_that_do_not_divide_are_left_alone():
    narrow = torch.zeros(4, 48)
    assert not get_quantizer("q4_0").touches(narrow)
    assert get_quantizer("nf4").touches(narrow) and get_quantizer("int8").touches(narrow)
    assert not get_quantizer("int4-g128").touches(torch.zeros(4, 192))
    assert get_quantizer("int4-g64").touches(torch.zeros(4, 192))


def test_a_missing_package_names_its_install_line():
    with pytest.raises(ConfigError, match=r'pip install "mansu-interp\[hqq\]"'):
        library("not_installed_anywhere", "hqq")


# Engines stand for the formats that people use with them.


def test_an_engine_stands_for_its_formats():
    """What can be survived is what promises; the rest is measured."""
    for name, formats in ENGINES.items():
        assert all(get_quantizer(q).promises for q in formats.exact), name
        assert not any(get_quantizer(q).promises for q in formats.fitted), name
        assert quantizer_names([name], "exact") == formats.exact
    both = quantizer_names(["q4_0, vllm", "llama.cpp"])
    assert len(both) == len(set(both)) and both[:2] == ("q4_0", "nf4") and "q4_k_m" in both
    every = {q for f in ENGINES.values() for q in (*f.exact, *f.fitted)}
    assert set(quantizer_names(["all"])) == every
    assert quantizer_names(["q4_0", "q4_0"]) == ("q4_0", "q4_0")  # a slip, left for others to say
    assert Mansu(survive=("llama.cpp",)).survive == ENGINES["llama.cpp"].exact
    config = RunConfig(quantizers=("transformers",))
    assert config.quantizers == ("nf4", "fp4", "int8", "torchao-int4-g128", "hqq")
    bench = BenchConfig(survive=("vllm",), quantizers=("vllm",))
    assert bench.survive == ENGINES["vllm"].exact != bench.quantizers
    assert VerifyConfig("a", "b", ("all",)).survive == quantizer_names(["all"], "exact")


@pytest.mark.parametrize(
    "name", ["q4_0", "int4-g32", "nvfp4", "quanto-int4", "hqq", "awq-g64", "q4_k_m"]
)
def test_a_missing_package_is_said_before_a_run(name: str, monkeypatch, tmp_path):
    quantizer = get_quantizer(name)
    package, extra = quantizer.needs[-1]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"The quantizer {name} needs .*\[{extra}\]"):
        run(RunConfig(model="none", quantizers=(name,), out=tmp_path / "run"))


# What llama.cpp fits to its weights, by its own code.


@pytest.fixture
def llama_cpp():
    pytest.importorskip("xllamacpp", reason="llama.cpp's own code: needs the wheel xllamacpp")


@pytest.mark.parametrize("name", EXACT_FORMATS)
def test_llama_cpp_writes_the_bytes_of_gguf(llama_cpp, name: str, monkeypatch):
    """So what is exact of the package is exact in the engine."""
    weight = torch.cat([made_weights(kind, torch.float32) for kind in VALUES])
    expected = pack(weight, name)
    monkeypatch.setattr("mansu_interp.quantizers.gguf.EXACT", ())
    assert (pack(weight, name) == expected).all()


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", FITTED)
def test_fitted_cells_are_those_of_the_bytes(llama_cpp, name: str, kind: str):
    weight, quantizer = made_weights(kind, torch.float32, 512), TYPES[name]
    cells, restored = quantizer.cells(weight), quantizer.round_trip(weight).flatten()
    assert not quantizer.promises and cells.sets_scale.all()
    n = len(cells.levels)
    assert int(cells.codes.min()) >= 0 and int(cells.codes.max()) < n
    assert len(cells.codes.unique()) == n or kind != "normal"
    noise = {"q2_k": 0.4, "q3_k": 0.25, "q6_k": 0.03, "q5_k": 0.06}.get(name, 0.12)
    assert (restored - weight.flatten()).norm() < noise * weight.norm()
    if name != "iq4_nl":
        assert ((restored - cells.value(cells.codes)).abs() <= 1e-3 * cells.span).all()
    order = restored.view(-1, 16).argsort(1)  # 16 in a row share their scale in every type
    assert (cells.codes.view(-1, 16).gather(1, order).diff(dim=1) >= 0).all()
    same = restored.view(-1, 16).sort(1).values.diff(dim=1) == 0
    flat = cells.span.view(-1, 16)[:, 1:] == 0
    assert ((cells.codes.view(-1, 16).gather(1, order).diff(dim=1) == 0) == same)[~flat].all()


def test_codes_of_q4_k_by_hand(llama_cpp):
    """Its last 128 bytes: four runs of 32, low nibbles before high ones."""
    weight = made_weights("normal", torch.float32, 512)
    runs = torch.from_numpy(pack(weight, "q4_k").reshape(-1, 144)[:, 16:].copy()).view(-1, 4, 32)
    codes = torch.stack([runs & 15, runs >> 4], 2).flatten().long()
    assert torch.equal(TYPES["q4_k"].cells(weight).codes, codes)


def llama(width: int, layers: int, kv_heads: int, tied: bool, inner: int = 768) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LanguageModel("tiny", LlamaForCausalLM(config).eval(), None)


def test_a_mix_by_hand(llama_cpp):
    """Q4_K_M of eight layers: the first, the last and every third between get more bits; rows of
    192 fall back."""
    model = llama(192, 8, 4, True)
    kinds = {n: q.name for n, q in get_quantizer("q4_k_m").fit(model, ()).items()}
    more = {0, 3, 6, 7}
    for layer in range(8):
        at = f"model.layers.{layer}."
        wide, narrow = ("q6_k", "q8_0") if layer in more else ("q4_k", "q5_0")
        assert kinds[f"{at}mlp.down_proj.weight"] == wide
        assert kinds[f"{at}self_attn.v_proj.weight"] == narrow
        assert kinds[f"{at}mlp.up_proj.weight"] == "q5_0"
    with pytest.raises(ConfigError, match="q4_k_m quantizes whole models"):
        get_quantizer("q4_k_m").cells(model.weights["model.layers.0.mlp.up_proj.weight"])


def test_survival_of_a_mix_counts_each_layer_by_its_type(llama_cpp):
    before = llama(256, 2, 4, False)
    after, name = before.copy(), "model.layers.1.mlp.down_proj.weight"
    after.weights[name].view(-1)[:300] *= -1
    mixed, alone = survival(before, after, "q4_k_m"), survival(before, after, TYPES["q6_k"])
    assert mixed == alone and mixed.edited == 300 < mixed.survived + 40
    assert torch.equal(
        quantize(before, "q4_k_m").weights[name], TYPES["q6_k"].round_trip(before.weights[name])
    )


def test_a_mix_of_an_unknown_family_is_said(facts: LanguageModel, monkeypatch, tmp_path):
    """And before a run."""
    monkeypatch.setattr(facts.config, "model_type", "odd")
    monkeypatch.setattr("mansu_interp.runs.run.load_model", lambda *_: facts)
    monkeypatch.setattr("mansu_interp.runs.run.load_task", lambda *_: pytest.fail("went on"))
    monkeypatch.setattr(Mix, "needs", ())
    with pytest.raises(ConfigError, match=r"names are known for llama, .* of type 'odd'"):
        run(RunConfig(quantizers=("q4_k_m",), out=tmp_path / "run"))
    with pytest.raises(
        ConfigError, match=r"names are known for llama, .* of type 'odd'\. Leave out"
    ):
        quantize(facts, "q4_k_m")


@pytest.mark.parametrize("broken", ["missing", "stripped"])
def test_without_llama_cpp_the_extra_is_named(broken: str, monkeypatch):
    """Before any weight is read: of a model that needs it, and of no other."""
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    else:  # a build that exports nothing of llama.cpp
        monkeypatch.setitem(sys.modules, "xllamacpp", types.ModuleType("xllamacpp"))
        other = types.ModuleType("xllamacpp.xllamacpp")
        other.__file__ = torch._C.__file__
        monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", other)
    engine.cache_clear()
    with pytest.raises(ConfigError, match=r'pip install "mansu-interp\[llama-cpp\]"'):
        get_quantizer("q4_k_m").fit(llama(256, 1, 4, False), ())
    assert get_quantizer("q4_k_m").fit(llama(192, 1, 4, False, inner=192), ())
    engine.cache_clear()


# Calibrated quantizers: what auto-round did is what is reported, and nothing else is changed.

NAMES = ("awq-g64", "autoround-g64")


@pytest.fixture(scope="module")
def capitals(facts: LanguageModel):
    return load_task("capitals", facts)


@pytest.fixture(scope="module")
def prompts(capitals):
    pytest.importorskip("auto_round")
    return capitals.calibration[:60]


def test_calibration_prompts_know_nothing_of_the_forget_facts(capitals):
    forget = {p.clean for p in capitals.forget}
    assert capitals.calibration
    assert not forget & set(capitals.calibration)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_quantized_by_auto_round_still_answers(facts, capitals, prompts, name):
    before = {n: w.clone() for n, w in facts.weights.items()}
    state = torch.get_rng_state()
    after = quantize(facts, name, prompts)
    assert all(torch.equal(facts.weights[n], w) for n, w in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    (pairs,) = capitals.scored["unseen"]["forget"].values()
    assert accuracy(after, pairs).top1 > 0.95
    fitted = get_quantizer(name).fit(facts, prompts)
    assert set(facts.linear_names) <= set(fitted)
    scaled = {n for n in fitted if n not in facts.linear_names}
    assert bool(scaled) == get_quantizer(name).rescales
    for weight in facts.linear_names:
        cells = fitted[weight].cells(facts.weights[weight])
        restored = fitted[weight].round_trip(facts.weights[weight])
        assert torch.equal(restored, after.weights[weight])
        assert int(cells.codes.min()) >= 0 and int(cells.codes.max()) <= 16
        per_group = cells.codes.view(-1, 64)
        assert max(len(group.unique()) for group in per_group[:50]) <= 16
        # auto-round de-quantizes in bfloat16, with 8 bits of mantissa
        error = (restored.flatten() - cells.value(cells.codes)).abs()
        assert (error <= 2**-8 * restored.abs().flatten() + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_survival_is_measured_on_both_calibrations(facts, prompts, name):
    same = survival(facts, facts.copy(), name, prompts)
    assert (same.edited, same.collateral) == (0, 0)
    edited, weight = facts.copy(), facts.linear_names[3]
    with torch.no_grad():
        edited.weights[weight].view(-1)[:400] *= -1
    found = survival(facts, edited, name, prompts)
    assert found.edited == 400 and found.survived > 300
    assert found.collateral > 0  # other layers were calibrated on other activations
    assert (found.share_kept is None) == get_quantizer(name).rescales
    if found.share_kept is not None:
        assert found.share_kept == pytest.approx(1, abs=0.1)


def test_without_prompts_a_calibrated_quantizer_says_what_it_needs(facts):
    with pytest.raises(ConfigError, match="needs at least 64 tokens of calibration prompts; got 3"):
        quantize(facts, "awq-g64", [(1, 2, 3)])
    with pytest.raises(ConfigError, match="whole models"):
        get_quantizer("awq-g64").cells(facts.weights[facts.linear_names[0]])


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        *((n, 0.5) for n in ("nf4", "fp4", "int4-g32", "int4-g128", "int4-sym-g32")),
        *((n, 0.5) for n in ("q4_0", "q4_1", "mxfp4", "nvfp4", "nvfp4-1", "quanto-int4")),
        *((n, 1) for n in ("q5_0", "q8_0")),
    ],
)
def test_codes_give_the_quantized_weight_back(name: str, bytes_: float):
    """Bit for bit, at half a byte or a byte an element; larger than what is unpacked at once, and
    with groups of zeros."""
    quantizer, draws = get_quantizer(name), torch.Generator().manual_seed(0)
    for shape in ((4, 128), (520, 512)):
        weight = torch.randn(shape, generator=draws) * 0.03
        weight[1, :128], weight[2] = 0.0, weight[2].abs()
        found = Packed.of(quantizer, weight)
        assert found is not None and found.codes.numel() == bytes_ * weight.numel()
        back = torch.full_like(weight, torch.nan)
        found.unpack(back)
        assert torch.equal(back, quantizer.round_trip(weight))


def test_what_codes_do_not_give_back_is_not_packed():
    """A scale of each row, scales quantized themselves, and codes that are wrong."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    assert Packed.of(get_quantizer("int8"), weight) is None
    assert Packed.of(get_quantizer("nf4-dq"), weight) is None

    class Wrong(type(NF := get_quantizer("nf4"))):
        def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
            back = super().round_trip(weight).clone()
            back[3, 5] += 1e-6
            return back

    assert Packed.of(Wrong(NF.kind), weight) is None and Packed.of(NF, weight) is not None


def test_what_training_can_go_through_of_an_engine():
    for name, formats in ENGINES.items():
        assert [q for q in formats.fitted if get_quantizer(q).rescales] == [*formats.rescaling]
        through = Mansu(train_through=(name,)).train_through
        assert through == formats.of("through")
        assert [q.promises or q.rescales for q in fitted_quantizers(through)] == [False] * len(
            through
        )
    assert "awq-g128" in quantizer_names(("vllm",))
    with pytest.raises(ConfigError, match=r"Unknown quantizer 'q9'\. Engines: "):
        fitted_quantizers(["q9"])
    with pytest.raises(ConfigError, match="are 3 models that take turns, one a step; got 2 steps"):
        Mansu(steps=2, train_through=("q4_k_m",))
