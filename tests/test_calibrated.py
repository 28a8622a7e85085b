"""Calibrated quantizers: what auto-round did is what is reported, and nothing else is changed."""

import pytest
import torch

from mansu_interp.errors import ConfigError
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.load import load_task

pytest.importorskip("auto_round")
NAMES = ("awq-g64", "autoround-g64")


@pytest.fixture(scope="module")
def capitals(facts: LanguageModel):
    return load_task("capitals", facts)


@pytest.fixture(scope="module")
def prompts(capitals):
    return capitals.calibration[:60]


def test_calibration_prompts_know_nothing_of_the_forget_facts(capitals):
    forget = {p.clean for p in capitals.forget}
    assert capitals.calibration
    assert not forget & set(capitals.calibration)


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
