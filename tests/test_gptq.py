"""GPTQ against least squares solved column by column, and against the package that people use."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from torch import Tensor

from mansu_interp.errors import ConfigError
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.base import Quantizer
from mansu_interp.quantizers.fitted import ROW, Fitted
from mansu_interp.quantizers.gptq import Gptq, gptq_codes, group_scales
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.task import Task


def made(out: int, width: int, group: int, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the scale of each element, and X X^T of inputs that go together."""
    draws = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=draws) * 0.03
    x = torch.randn(tokens, width // 4, generator=draws)
    x = x @ torch.randn(width // 4, width, generator=draws)
    x += 0.3 * torch.randn(tokens, width, generator=draws) * torch.rand(width, generator=draws)
    scale = group_scales(weight, group).expand(-1, group).reshape(weight.shape)
    return weight, scale, x.T @ x


def least_squares_codes(weight: Tensor, scale: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Row by row and column by column: all that is not rounded yet is solved for anew, from the
    original and from every error so far."""
    h = hessian.double() + damping * torch.eye(len(hessian))
    order = sorted(range(len(h)), key=lambda k: -float(hessian[k, k]))
    codes = torch.zeros(weight.shape)
    for row, (w, s) in enumerate(zip(weight.double(), scale.double(), strict=True)):
        now, done = w.clone(), []
        for at, k in enumerate(order):
            codes[row, k] = (now[k] / s[k]).round().clamp(-8, 7)
            now[k] = codes[row, k] * s[k]
            done, rest = order[: at + 1], order[at + 1 :]
            pushed = h[rest][:, done] @ (now - w)[done]
            now[rest] = w[rest] - torch.linalg.solve(h[rest][:, rest], pushed)
    return codes


@pytest.mark.parametrize(("width", "group"), [(64, 32), (160, 32), (192, 64)])
def test_codes_are_those_of_least_squares(width: int, group: int):
    """More columns than a block of 128 has, too."""
    weight, scale, hessian = made(6, width, group)
    codes = gptq_codes(weight, scale, hessian)
    nearest = (weight / scale).round().clamp(-8, 7)
    damping = 0.01 * float(hessian.double().trace()) / width
    assert torch.equal(codes, least_squares_codes(weight, scale, hessian, damping))
    assert (codes != nearest).float().mean() > 0.1
    error = [
        ((weight - c * scale) @ hessian * (weight - c * scale)).sum() for c in (codes, nearest)
    ]
    assert error[0] < 0.6 * error[1]


def test_columns_that_are_always_zero_are_set_to_zero():
    weight, scale, hessian = made(6, 64, 32)
    alive = torch.ones(64, dtype=torch.bool)
    alive[[3, 40]] = False
    hessian[~alive], hessian[:, ~alive] = 0, 0
    codes = gptq_codes(weight, scale, hessian)
    assert not codes[:, ~alive].any()
    weight, scale, part = weight[:, alive], scale[:, alive], hessian[alive][:, alive]
    damping = 0.01 * float(part.double().trace()) / 64
    assert torch.equal(codes[:, alive], least_squares_codes(weight, scale, part, damping))


def test_scales_are_those_of_symmetric_int4():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    weight[2, :32] = 0
    cells = get_quantizer("int4-sym-g32").cells(weight)
    found = group_scales(weight, 32).expand(-1, 32).flatten()
    zeros = torch.zeros(6, 128, dtype=torch.bool)
    zeros[2, :32] = True
    assert torch.equal(found[~zeros.flatten()], cells.scale[~zeros.flatten()])
    assert (found > 0).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_are_those_of_llmcompressor(group: int, monkeypatch):
    """In float64; in its own float32 one code in 600 of a trained model is another."""
    package = pytest.importorskip(
        "llmcompressor.modifiers.gptq.gptq_quantize", reason="needs llmcompressor"
    )
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    for module in ("gptq_quantize", "helpers"):
        where = f"llmcompressor.modifiers.gptq.{module}.GPTQ_PRECISION"
        monkeypatch.setattr(where, torch.float64)
    weight, scale, hessian = made(24, 256, group)
    args = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=group, symmetric=True,
        actorder="static",
    )  # fmt: skip
    grouped = weight.view(24, -1, group)
    theirs, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    assert torch.equal(theirs.flatten(), scale.view(-1, group)[:, 0])
    restored, _, fallback = package.quantize_weight(
        weight.double()[None], hessian.double()[None], theirs.double()[None],
        zero.double()[None], None, args,
    )  # fmt: skip
    assert not fallback.any()
    codes = (restored[0] / scale.double()).round().float()
    assert torch.equal(codes, gptq_codes(weight, scale, hessian))


def fitted(
    model: LanguageModel, quantizer: Quantizer, prompts: list[list[int]]
) -> dict[str, Fitted]:
    found = quantizer.fit(model, prompts)
    return {n: q for n, q in found.items() if isinstance(q, Fitted)}


def test_each_layer_is_calibrated_behind_quantized_ones(facts: LanguageModel, capitals: Task):
    """What the quantized model sends each layer is what that layer's codes were made for, and they
    serve it better than rounding to nearest."""
    before = {n: w.clone() for n, w in facts.weights.items()}
    layers = fitted(facts, get_quantizer("gptq-g64"), capitals.calibration)
    assert all(torch.equal(facts.weights[n], w) for n, w in before.items())
    assert set(layers) == set(facts.linear_names)
    after = quantize(facts, "gptq-g64", capitals.calibration)
    tokens = [t for prompt in capitals.calibration for t in prompt]
    rows = torch.tensor(tokens[: len(tokens) // ROW * ROW]).view(-1, ROW)
    sent: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _, given: sent.update({name: given[0].flatten(0, -2)})

    for name in layers:
        module = after.hf.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(keep(name))
    after.hf.base_model(input_ids=rows, use_cache=False)
    for name, layer in layers.items():
        weight, x = facts.weights[name], sent[name]
        scale = group_scales(weight, 64).expand(-1, 64).reshape(weight.shape)
        codes = gptq_codes(weight, scale, x.T @ x)
        cells = layer.cells(weight)
        assert torch.equal(cells.codes, codes.flatten().long() + 8)
        assert torch.equal(layer.round_trip(weight), codes * scale)
        assert torch.equal(after.weights[name], codes * scale)
        nearest = (weight / scale).round().clamp(-8, 7) * scale
        error = [((weight - other) @ x.T).norm() for other in (codes * scale, nearest)]
        assert error[0] < 0.9 * error[1], name
    (pairs,) = capitals.scored["unseen"]["forget"].values()
    assert accuracy(after, pairs).top1 > 0.95


def test_a_layer_that_no_prompt_reaches_is_rounded_to_nearest():
    model = make_tiny(2).copy()
    mlp = model.hf.get_submodule("model.layers.1.mlp")
    mlp.forward = lambda x: x * 0  # pyright: ignore[reportAttributeAccessIssue]
    prompts = [[k % 7 + 1 for k in range(ROW * 4)]]
    found = fitted(model, Gptq(group=16), prompts)
    for name in model.linear_names:
        weight = model.weights[name]
        scale = group_scales(weight, 16)
        nearest = (weight.view(-1, 16) / scale).round().clamp(-8, 7) * scale
        same = torch.equal(found[name].round_trip(weight), nearest.view_as(weight))
        assert same == ("layers.1.mlp" in name), name


def test_what_survives_is_measured_on_both_calibrations(facts: LanguageModel, capitals: Task):
    prompts = capitals.calibration
    same = survival(facts, facts.copy(), "gptq-g128", prompts)
    assert (same.edited, same.collateral) == (0, 0)
    edited, weight = facts.copy(), facts.linear_names[3]
    edited.weights[weight].view(-1)[:400] *= -1
    found = survival(facts, edited, "gptq-g128", prompts)
    assert found.edited == 400 and found.survived > 300
    assert found.collateral > 0  # errors are spread over the columns behind
    assert found.share_kept == pytest.approx(1, abs=0.15)


def test_gptq_promises_nothing_and_says_what_it_needs(facts: LanguageModel):
    quantizer = get_quantizer("gptq-g128")
    assert not quantizer.promises and not quantizer.rescales
    assert not quantizer.touches(torch.zeros(4, 192)) and quantizer.touches(torch.zeros(4, 256))
    with pytest.raises(ConfigError, match="needs at least 64 tokens of calibration prompts; got 3"):
        quantize(facts, quantizer, [(1, 2, 3)])
    with pytest.raises(ConfigError, match="gptq-g128 quantizes whole models"):
        quantizer.cells(facts.weights[facts.linear_names[0]])
