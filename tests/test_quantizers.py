"""NF4 cells against bitsandbytes' own codes, round trips, and what survives an edit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from mansu_interp.errors import ConfigError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize, survival

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
    with pytest.raises(ConfigError, match=r"Unknown quantizer 'nf5'; available: nf4, "):
        get_quantizer("nf5")


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


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4-g32", "q4_0", "q8_0"])
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
