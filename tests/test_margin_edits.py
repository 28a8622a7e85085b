"""Edits that part quantized models from full precision: what the real libraries make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mansu_interp.losses.counterfactual import (
    CounterfactualTargets,
    forget_gradient,
    model_answer_excess,
)
from mansu_interp.masks.floor import Floor, floor, quantizer_set
from mansu_interp.masks.margin_edits import (
    CandidateEdits,
    MarginEdits,
    candidate_edits,
    choose_edits,
)
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import choose_parameters
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.history import StepRecord
from mansu_interp.unlearning.mansu.latent_weights import LatentWeights
from mansu_interp.unlearning.mansu.margins import PAIRS, ROUNDS, MarginEditor, lacking
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn

SET = ("nf4", "fp4", "int4-g32", "q4_0")
SETTINGS = Mansu(steps=10, lr=0.1, batch_size=16, survive=SET, offset_rate=0.0)


def case(
    survive: tuple[str, ...], together: bool = False
) -> tuple[Tensor, Tensor, Tensor, Floor, CandidateEdits]:
    """A weight, the slope of something along it, the floor and what may be edited."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * 0.03
    slope = torch.randn(64 * 256, generator=generator)
    where = floor(weight, survive)
    quantizers = [get_quantizer(q) for q in survive]
    grids = [q.cells(weight) for q in quantizers]
    own = [q.round_trip(weight).flatten() for q in quantizers]
    kept = slope / 2 + torch.randn(64 * 256, generator=generator)
    alike = torch.ones_like(slope)
    found = candidate_edits(
        where,
        grids,
        quantized=own,
        original=weight.flatten(),
        slope=slope,
        retained=kept,
        weight=alike,
        together=together,
    )
    return weight, slope, kept, where, found


def applied(weight: Tensor, edits: MarginEdits) -> Tensor:
    """The edited weight."""
    after = weight.flatten().clone()
    after[edits.elements] = edits.values
    return after.view_as(weight)


@pytest.mark.parametrize("survive", [SET, ("nf4",)])
def test_every_quantized_model_moves_by_what_was_asked_for(survive: tuple[str, ...]):
    """In the real libraries' own round trips; full precision stays where it is, and what is kept
    loses nothing, though its slope is alike."""
    weight, slope, kept, where, found = case(survive)
    wanted = 0.5
    edits = choose_edits(found, wanted, 4000)
    after = applied(weight, edits)
    i, value = edits.elements, edits.values
    original = weight.flatten()[i]
    shift = ((after - weight).flatten() * slope).sum()
    assert wanted <= edits.gain < wanted + 0.05  # the last edit's
    assert float(shift) == pytest.approx(edits.shift, abs=1e-4)
    assert abs(float(shift)) < 0.05 < float(((after - weight).flatten() * slope).abs().sum()) / 10
    lost = []
    for q in map(get_quantizer, survive):
        apart = (after - weight - (q.round_trip(after) - q.round_trip(weight))).flatten()
        assert float((apart * slope).sum()) > wanted - 0.01, q.name
        assert (q.cells(weight).encode(after.flatten())[i] != q.cells(weight).codes[i]).all()
        lost.append(float((apart * kept).sum()))
    assert sum(lost) / len(lost) == pytest.approx(edits.loss, abs=1e-3)
    assert abs(edits.loss) < 0.02
    beyond = torch.where(value > original, value >= where.up[i], value <= where.down[i])
    assert (beyond & (value > where.lowest[i]) & (value < where.highest[i])).all()


@pytest.mark.parametrize("survive", [SET, ("nf4",)])
def test_all_models_fall_together_by_what_was_asked_for(survive: tuple[str, ...]):
    weight, slope, kept, _, found = case(survive, together=True)
    wanted = 5.0
    edits = choose_edits(found, wanted, 4000)
    after = applied(weight, edits)
    assert wanted <= edits.gain < wanted + 0.1
    falls = [
        weight - after,
        *(q.round_trip(weight) - q.round_trip(after) for q in map(get_quantizer, survive)),
    ]
    for fall in falls:
        assert wanted - 0.01 < float((fall.flatten() * slope).sum()) < 1.3 * wanted
    lost = [float((fall.flatten() * kept).sum()) for fall in falls]
    assert sum(lost) / len(lost) == pytest.approx(edits.loss, abs=1e-3)
    assert abs(edits.loss) < 0.1
    assert 5 < len(edits.elements) < 500


def test_what_is_kept_costs_nothing_where_it_gains():
    """Its slope against the other's: then the edits are those of the other alone."""
    *_, found = case(SET)
    alone, lifted = (
        choose_edits(replace(found, loss=loss), 0.3, 4000)
        for loss in (torch.zeros_like(found.loss), -found.gain)
    )
    assert lifted.loss < -0.3
    assert alone.loss == 0 and (alone.elements == lifted.elements).all()


def test_no_more_is_edited_than_asked_for_or_allowed():
    *_, found = case(SET)
    few, many = (len(choose_edits(found, wanted, 4000).elements) for wanted in (0.1, 0.5))
    assert 5 < few < many / 4 < 1000
    short = choose_edits(found, 0.5, few)
    assert len(short.elements) == few and 0.05 < short.gain < 0.5


def test_what_weighs_less_is_left_alone():
    """Half of the weights are kept by others."""
    *_, found = case(SET)
    weight = torch.ones(64 * 256)
    weight[::2] = 1e-6
    assert (choose_edits(replace(found, weight=weight), 0.1, 4000).elements % 2 == 1).all()


def test_nothing_is_made_of_nothing():
    """Without slope, or where the floor forbids both ways."""
    weight, slope, kept, where, found = case(SET)
    assert not len(choose_edits(replace(found, gain=0 * found.gain), 0.1, 100).elements)
    never = torch.full_like(where.up, torch.nan)
    quantizers = [get_quantizer(q) for q in SET]
    grids = [q.cells(weight) for q in quantizers]
    own = [q.round_trip(weight).flatten() for q in quantizers]
    still = replace(where, up=never, down=never)
    none = candidate_edits(
        still,
        grids,
        quantized=own,
        original=weight.flatten(),
        slope=slope,
        retained=kept,
        weight=torch.ones_like(slope),
    )
    assert not none.gain.any()


def test_a_prompt_counts_by_the_quantizer_that_lacks_most():
    distance = torch.tensor([[0.1, 0.3, 0.5, -0.2], [0.5, 0.0, 0.2, 0.4]])
    assert lacking(distance, 0.2).tolist() == pytest.approx([0.1, 0.2, 0.0, 0.4])


@pytest.fixture(scope="module")
def mask(facts: LanguageModel, capitals: Task) -> Mask:
    names = [n for n in facts.linear_names if ".mlp." in n]
    gradient = forget_gradient(facts, names, capitals.forget.sample(32, 0))
    everywhere = {n: torch.ones_like(g, dtype=torch.bool) for n, g in gradient.items()}
    return choose_parameters(facts, everywhere, 0.005, gradient, survive=SET)


@pytest.mark.slow
def test_the_quantized_models_lie_below_by_the_quantization_margin(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """As the libraries quantize the checkpoint; the promises hold for these edits, too."""
    config = replace(SETTINGS, margin_budget=0.5)
    pairs = list(capitals.forget.sample(PAIRS, 0))
    targets = CounterfactualTargets(facts, capitals.forget, 0)
    apart = []
    for quantization_margin in (0.0, 0.03):
        found = unlearn(
            facts, capitals, mask, replace(config, quantization_margin=quantization_margin)
        )
        with torch.no_grad():
            full, *others = (
                model_answer_excess(m, pairs, targets).mean()
                for m in (found.model, *(quantize(found.model, q) for q in SET))
            )
        apart.append(float(full - max(others)))
        last = found.history[-1]
        for q in SET:
            after = survival(facts, found.model, q)
            assert after.edited == after.survived == last.edited <= mask.limit
            assert after.collateral == 0
        assert (last.quantization_margin_reached is not None) == bool(quantization_margin)
    assert apart[0] < 0.02 and 0.027 < apart[1] < 0.05
    assert last.quantization_margin_reached == pytest.approx(apart[1], abs=0.01)
    assert 20 < last.quantization_margin_edits <= config.margin_budget * mask.limit


@pytest.mark.slow
def test_answers_reach_the_final_margin(
    facts: LanguageModel, capitals: Task, mask: Mask, monkeypatch: pytest.MonkeyPatch
):
    """In full precision and as the libraries quantize the checkpoint."""
    pairs = capitals.forget.sample(PAIRS, 0)
    kept = PairSet("kept", tuple(p for some in capitals.retain_sets for p in some)).sample(PAIRS, 0)
    targets = CounterfactualTargets(facts, capitals.forget, 0)
    quantized = [quantize(facts, q) for q in SET]
    latent = LatentWeights(facts.copy(), [q.copy() for q in quantized], mask, quantizer_set(SET))

    @torch.no_grad()
    def excess_of(model: LanguageModel) -> Tensor:
        return torch.cat([model_answer_excess(model, part, targets) for part in pairs.parts(64)])

    before, asked, seen = excess_of(facts), 0.4, []
    margin = asked - float(before.mean())
    editor = MarginEditor(latent, pairs, targets, kept)
    last = editor.reach_final_margin(margin, 2000, lambda *round: seen.append(round))
    after = [facts, *quantized], [latent.model, *(quantize(latent.model, q) for q in SET)]
    falls = [float((excess_of(a) - excess_of(b)).mean()) for a, b in zip(*after, strict=True)]
    assert falls[0] == pytest.approx(asked - last.reached, abs=1e-3)
    assert abs(last.reached) < asked / 5
    assert min(falls) > 0.8 * asked and max(falls) < 1.3 * asked
    assert seen[0] == (0, pytest.approx(asked, abs=1e-3)) and 1 < len(seen) <= ROUNDS + 1
    assert 10 < last.edits < 2000
    assert survival(facts, latent.model, "fp4").edited == last.edits
    assert editor.reach_final_margin(margin - 1, 2000).edits == 0  # already below
    weights: list[Tensor] = []
    monkeypatch.setattr(MarginEditor, "_edit", lambda _, lacks, *rest: weights.append(lacks) or 0)
    editor.reach_final_margin(margin + 0.2, 2000)
    above = excess_of(latent.model) + margin + 0.2
    assert (above < 0).any()
    assert torch.allclose(weights[0], above.clamp_min(0), atol=1e-4)


@pytest.mark.slow
def test_margin_edits_survive_every_quantizer(facts: LanguageModel, capitals: Task, mask: Mask):
    config = replace(SETTINGS, margin_budget=0.5, final_margin=0.2, quantization_margin=5.0)
    found = unlearn(facts, capitals, mask, config)
    last = found.history[-1]
    assert 0 < last.final_margin_edits <= mask.limit / 4 + 1
    assert last.quantization_margin_edits > 0
    for q in SET:
        after = survival(facts, found.model, q)
        assert after.edited == after.survived == last.edited <= mask.limit
        assert after.collateral == 0


@pytest.mark.slow
def test_a_run_killed_during_margin_edits_goes_on_after_its_training(
    facts: LanguageModel, capitals: Task, mask: Mask, tmp_path: Path
):
    config = replace(SETTINGS, steps=2, quantization_margin=0.1)
    file, seen = tmp_path / "checkpoint.safetensors", []

    def stop(done: int, total: int, record: StepRecord) -> None:
        if done and record.quantization_margin_reached is not None:
            raise KeyboardInterrupt

    whole = unlearn(facts, capitals, mask, config).model
    with pytest.raises(KeyboardInterrupt):
        unlearn(facts, capitals, mask, config, on_step=stop, resume=file)
    again = unlearn(
        facts, capitals, mask, config, on_step=lambda *step: seen.append(step), resume=file
    ).model
    assert [(done, total) for done, total, _ in seen][:2] == [(0, ROUNDS), (1, ROUNDS)]
    reached = [record.quantization_margin_reached for *_, record in seen]
    assert reached[0]  # measured, before the first round
    assert reached == sorted(reached)
    assert all(torch.equal(w, again.weights[n]) for n, w in whole.weights.items())
