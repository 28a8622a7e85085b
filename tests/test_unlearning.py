"""Unlearning: what the floor guarantees on the saved checkpoint, seeds, and bad input."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from checked import wrong_type
from torch import Tensor

from mansu_interp.audit.probes import answer_rows, fit_probe, last_states
from mansu_interp.errors import ConfigError, MaskError
from mansu_interp.export.verify import verify
from mansu_interp.losses.counterfactual import forget_gradient
from mansu_interp.masks.components import embedding_rows
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import POOL, choose_parameters, random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.pairs import answer_tokens
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.mansu.latent_weights import LatentWeights, LatentWeightsWithoutFloor
from mansu_interp.unlearning.mansu.probe_penalty import ProbePenalty, z_scores
from mansu_interp.unlearning.methods import (
    NPO,
    GradDiff,
    Mansu,
    MansuNoFloor,
    MansuNoOffsets,
    MansuNoProjection,
    MethodConfig,
    get_method,
)
from mansu_interp.unlearning.training import (
    Sampler,
    Unlearned,
    arithmetic,
    forgetting_level,
    may_stop,
)
from mansu_interp.unlearning.unlearn import unlearn

NF = NF4()
# A large step, so that eight of them move many weights, and by several cells.
CONFIG = Mansu(steps=8, lr=0.2, batch_size=8)


@pytest.fixture(scope="module")
def mask(facts: LanguageModel, capitals: Task) -> Mask:
    names = [n for n in facts.linear_names if ".2.mlp." in n or ".1.self_attn.v_proj" in n]
    gradient = forget_gradient(facts, names, capitals.forget.sample(32, 0))
    everywhere = {n: torch.ones_like(g, dtype=torch.bool) for n, g in gradient.items()}
    return choose_parameters(facts, everywhere, 0.005, gradient)


@pytest.fixture(scope="module")
def result(facts: LanguageModel, capitals: Task, mask: Mask) -> Unlearned:
    return unlearn(facts, capitals, mask, CONFIG)


@pytest.fixture(scope="module")
def saved(result: Unlearned, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder: Path = tmp_path_factory.mktemp("edited") / "model"
    result.model.save(folder)
    return load_model(folder)


def test_every_edit_survives_on_the_saved_checkpoint(facts: LanguageModel, saved: LanguageModel):
    assert saved.saved_dtype == torch.bfloat16
    found = survival(facts, saved, NF)
    assert found.edited > 500
    assert found.survived == found.edited
    assert found.collateral == 0
    assert found.update_over_bin > 0.3
    assert found.share_kept == pytest.approx(1, abs=0.2)


def test_rows_of_the_embedding_leave_their_cells_and_stay_unquantized(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """The models trained through a quantizer are those that it makes of the edited model: linear
    layers quantized, the embedding as it is. The floor holds for its rows all the same."""
    name = facts.embedding_name
    own = embedding_rows(facts, capitals.forget)
    both = Mask({**mask.indices, name: own}, {"limit": 3000})
    latent = LatentWeights(facts.copy(), [quantize(facts, NF)], both, [NF])
    generator = torch.Generator().manual_seed(0)
    for t in (1, 2):
        some = [torch.randn(facts.weights[n].shape, generator=generator) for n in latent.names]
        latent.step(some, 0.3, t)
    assert latent.write() == 3000
    edited = latent.model
    found = survival(facts, edited, NF, embedding=True)
    assert found.edited == found.survived > 300 and found.collateral == 0
    assert found.edited + survival(facts, edited, NF).edited == 3000
    (reference,) = latent.quantized
    real = quantize(edited, NF)
    assert torch.equal(reference.weights[name], edited.weights[name])
    for n in facts.linear_names:
        assert torch.allclose(reference.weights[n], real.weights[n], atol=1e-6)
    held = verify(facts, edited, ("nf4",))
    assert held.holds and held.embedding["nf4"].edited == found.edited and not held.outside


def test_bf16_sees_every_edit(
    facts: LanguageModel,
    capitals: Task,
    mask: Mask,
    result: Unlearned,
    monkeypatch: pytest.MonkeyPatch,
):
    """Low precision rounds the losses a little; weights cached from before an edit would not
    follow the full-precision losses from step to step."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    config = replace(CONFIG, precision="bf16")
    low = [h.forget for h in unlearn(facts, capitals, mask, config).history]
    high = [h.forget for h in result.history]
    assert low != high
    assert low == pytest.approx(high, rel=0.005)


@pytest.mark.parametrize(
    ("capability", "precision", "low"),
    [
        ("AVX512", "bf16", True),
        ("AVX512", "fp32", False),
        ("AVX2", "bf16", False),
        ("DEFAULT", "bf16", False),
    ],
)
def test_bf16_only_where_the_processor_is_quick_at_it(
    facts: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    precision: Literal["fp32", "bf16"],
    low: bool,
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with arithmetic(facts, precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if low else torch.float32)


def test_only_unscored_prompts_that_the_model_answers_are_retained(
    facts: LanguageModel, capitals: Task, mask: Mask, monkeypatch: pytest.MonkeyPatch
):
    right = capitals.retain.pairs[:6]
    wrong = []
    for p in right:
        other = next(d for d in p.distractors if d != p.counterfactual)
        rest = tuple(p.answer if d == other else d for d in p.distractors)
        wrong.append(replace(p, answer=other, distractors=rest))
    task = replace(capitals, retain_unscored=replace(capitals.retain, pairs=(*right, *wrong)))
    seen: list[Task] = []

    class Watched(Sampler):
        def __init__(self, task: Task, batch_size: int, seed: int) -> None:
            seen.append(task)
            super().__init__(task, batch_size, seed)

    # The package's attribute of that name is the function, not the module.
    monkeypatch.setattr(sys.modules["mansu_interp.unlearning.mansu.algorithm"], "Sampler", Watched)
    unlearn(facts, task, mask, replace(CONFIG, steps=1))
    assert seen[0].retain_unscored is not None and set(seen[0].retain_unscored.pairs) == set(right)


def test_saving_rounds_nothing(result: Unlearned, saved: LanguageModel):
    for name, weight in result.model.weights.items():
        assert torch.equal(weight, saved.weights[name]), name


def test_nothing_outside_the_mask_moves(facts: LanguageModel, saved: LanguageModel, mask: Mask):
    touched = 0
    for name, weight in facts.weights.items():
        moved = (weight != saved.weights[name]).flatten()
        allowed = torch.zeros_like(moved)
        allowed[mask.indices.get(name, torch.zeros(0, dtype=torch.long))] = True
        assert not (moved & ~allowed).any(), name
        touched += int(moved.sum())
    assert 0 < touched <= min(mask.n_parameters, 0.005 * facts.n_parameters)


def test_the_budget_holds_even_if_more_could_move(facts: LanguageModel, capitals: Task):
    name = "model.layers.2.mlp.down_proj.weight"
    gradient = forget_gradient(facts, [name], capitals.forget.sample(16, 0))
    everywhere = {name: torch.ones_like(gradient[name], dtype=torch.bool)}
    few = choose_parameters(facts, everywhere, 1e-4, gradient)
    edited = unlearn(facts, capitals, few, CONFIG).model
    assert 20 < int((edited.weights[name] != facts.weights[name]).sum()) <= 103


def test_absmax_elements_stay(facts: LanguageModel, saved: LanguageModel, mask: Mask):
    for name in mask.indices:
        before, after = NF.cells(facts.weights[name]), NF.cells(saved.weights[name])
        moved = (facts.weights[name] != saved.weights[name]).flatten()
        assert not (moved & before.sets_scale).any()
        assert torch.equal(before.scale, after.scale)
        assert ((after.codes[moved] >= 1) & (after.codes[moved] <= 14)).all()


def test_the_original_is_left_alone(facts: LanguageModel, result: Unlearned):
    fresh = load_model("facts")
    assert all(torch.equal(w, fresh.weights[n]) for n, w in facts.weights.items())
    assert len(result.history) == 8 and result.stopped_at == 8
    assert result.history[-1].edited == sum(
        int((w != facts.weights[n]).sum()) for n, w in result.model.weights.items()
    )


def test_seeds(facts: LanguageModel, capitals: Task, mask: Mask, result: Unlearned):
    again = unlearn(facts, capitals, mask, CONFIG).model
    assert all(torch.equal(w, again.weights[n]) for n, w in result.model.weights.items())
    other = unlearn(facts, capitals, mask, CONFIG, seed=1).model
    assert any(not torch.equal(w, other.weights[n]) for n, w in result.model.weights.items())


def test_a_mask_element_that_must_not_move_does_not(facts: LanguageModel, capitals: Task):
    """A mask of nothing but absmax elements edits nothing."""
    name = "model.layers.2.mlp.down_proj.weight"
    at = NF.cells(facts.weights[name]).sets_scale.nonzero().flatten()
    found = unlearn(facts, capitals, Mask({name: at}), Mansu(steps=4, lr=0.5, batch_size=4))
    assert torch.equal(found.model.weights[name], facts.weights[name])
    assert found.history[-1].edited == 0


def test_gradient_ascent_lowers_the_answers(facts: LanguageModel, capitals: Task, mask: Mask):
    config = replace(CONFIG, forget_loss="ga")
    history = unlearn(facts, capitals, mask, config).history
    assert history[-1].forget < history[0].forget


def test_without_the_floor_edits_are_continuous(
    facts: LanguageModel, capitals: Task, mask: Mask, result: Unlearned
):
    config = MansuNoFloor(steps=8, lr=0.002, batch_size=8)
    found = unlearn(facts, capitals, mask, config).model
    lived = survival(facts, found, NF)
    assert 0 < lived.edited <= mask.limit
    assert lived.survived < 0.9 * lived.edited  # most of them stay in their cells
    assert lived.update_over_bin < 0.5 * survival(facts, result.model, NF).update_over_bin
    for name, weight in facts.weights.items():
        moved = (weight != found.weights[name]).flatten().nonzero()[:, 0]
        assert not set(moved.tolist()) - set(mask.indices.get(name, torch.zeros(0)).tolist()), name
        assert torch.equal(found.weights[name], found.weights[name].bfloat16().float())


@pytest.mark.parametrize(
    ("kind", "less"),
    [(MansuNoProjection, {"projection": 0.0}), (MansuNoOffsets, {"offset_rate": 0.0})],
)
def test_without_one_of_its_parts(
    facts: LanguageModel, capitals: Task, mask: Mask, kind: type[Mansu], less: dict[str, float]
):
    config, given = replace(CONFIG, survive=("nf4", "q4_0")), {"steps": 8, "lr": 0.2}
    whole = unlearn(facts, capitals, mask, config).model
    found = unlearn(
        facts, capitals, mask, kind(**given, batch_size=8, survive=("nf4", "q4_0"))
    ).model
    same = unlearn(facts, capitals, mask, replace(config, **less)).model
    assert all(torch.equal(w, same.weights[n]) for n, w in found.weights.items())
    assert any(not torch.equal(w, whole.weights[n]) for n, w in found.weights.items())


def test_a_random_mask_is_as_large_as_a_chosen_one(facts: LanguageModel, mask: Mask):
    drawn = random_mask(facts, 0.005, seed=3)
    assert drawn.limit == mask.limit == 5166
    assert drawn.n_parameters == POOL * drawn.limit
    assert set(drawn.indices) == set(facts.linear_names)
    for name, index in drawn.indices.items():
        assert not NF.cells(facts.weights[name]).sets_scale[index].any()
        share = len(index) / facts.weights[name].numel()
        assert share == pytest.approx(
            drawn.n_parameters / sum(facts.weights[n].numel() for n in facts.linear_names), rel=0.2
        )
    again, other = random_mask(facts, 0.005, seed=3), random_mask(facts, 0.005, seed=4)
    name = facts.linear_names[0]
    assert torch.equal(drawn.indices[name], again.indices[name])
    assert not torch.equal(drawn.indices[name][:9], other.indices[name][:9])
    with pytest.raises(MaskError, match=r"in \(0, 1\]; got 2"):
        random_mask(facts, 2)


def test_mansu_stops_where_told(facts: LanguageModel, capitals: Task, mask: Mask):
    found = unlearn(facts, capitals, mask, replace(CONFIG, stop_at=1.0))
    assert found.stopped_at == len(found.history) == 2
    assert found.history[-1].choice == 1.0


def test_mansu_goes_on_until_its_quantized_models_are_there(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """The worst of them counts; the original stands for one that has not forgotten."""
    forgot = load_model(capitals.reference_models[0])
    alone = forgetting_level(lambda: [forgot], capitals, 0.9, 1)
    assert alone is not None and alone < 0.4 and may_stop(alone, 0.9)
    both = forgetting_level(lambda: [forgot, facts], capitals, 0.9, 1)
    assert both == 1.0 and not may_stop(both, 0.9)
    assert forgetting_level(lambda: [forgot], capitals, 0.9, 0) is None  # not looked at
    assert forgetting_level(lambda: [forgot], capitals, None, 1) is None
    assert not may_stop(None, 0.9) and not may_stop(0.2, None)
    latent = LatentWeights(facts.copy(), [quantize(facts, NF)], mask, [NF])
    assert len(latent.models) == 2
    assert len(LatentWeightsWithoutFloor(facts.copy(), [], mask, [NF]).models) == 1


def test_every_quantizer_of_a_set_keeps_all_of_the_edit(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """On the libraries' own round trips, whatever each makes of single edits."""
    survive = ("nf4", "fp4", "int4-g32", "q4_0")
    edited = unlearn(
        facts, capitals, mask, replace(CONFIG, survive=survive, steps=12, offset_rate=0.0)
    ).model
    for name in survive:
        found = survival(facts, edited, name)
        assert found.edited == found.survived > 1000 and found.collateral == 0
        assert found.share_kept == pytest.approx(1, abs=0.004), name


@pytest.mark.parametrize("survive", [("nf4", "fp4"), ("nf4",)])
def test_the_margin_counts_at_the_model_and_at_the_relearned_point(
    facts: LanguageModel, capitals: Task, mask: Mask, monkeypatch: pytest.MonkeyPatch,
    survive: tuple[str, ...],
):  # fmt: skip
    """In full precision and after every quantizer alike."""
    seen: list[list[float]] = [[], []]
    for which, (file, name) in enumerate(
        (("mansu.algorithm", "counterfactual_loss"), ("mansu.adversarial", "ranking_loss"))
    ):
        module = sys.modules[f"mansu_interp.unlearning.{file}"]
        real = getattr(module, name)

        def spy(*args: Any, which: int = which, real: Any = real) -> Tensor:
            seen[which].append(args[-1])
            return real(*args)

        monkeypatch.setattr(module, name, spy)
    unlearn(
        facts, capitals, mask,
        replace(CONFIG, survive=survive, steps=4, training_margin=0.1, adversarial_steps=1),
    )  # fmt: skip
    for margins in seen:
        assert len(margins) >= 4 and set(margins) == {0.1}


def test_edits_with_offsets_survive_and_each_quantized_model_has_its_own(
    facts: LanguageModel, mask: Mask
):
    """A model's own gradient moves its own offsets, and no other's; an edit without a floor has
    none."""
    names = ("nf4", "fp4", "q4_0")
    survive = [get_quantizer(q) for q in names]
    ended: list[list[Tensor]] = []
    for pull in (0.0, 1.0):
        quantized = [quantize(facts, q) for q in survive]
        latent = LatentWeights(facts.copy(), quantized, mask, survive, offset_rate=1.0)
        generator = torch.Generator().manual_seed(0)
        for t in range(1, 9):
            some = [torch.randn(facts.weights[n].shape, generator=generator) for n in latent.names]
            if t > 4 and (t - 1) % 4 == 2:  # FP4's own gradient pulls everything down
                some = [g + pull for g in some]
            latent.step(some, 0.1, t, (t - 1) % 4)
        (group,) = latent.groups
        assert len(group.offsets) == 3
        ended.append([a.clone() for a in group.offsets])
        assert latent.write() > 500
        for q in names:
            found = survival(facts, latent.model, q)
            assert found.edited == found.survived > 500 and found.collateral == 0
    nf4, fp4, q4_0 = (float((new - old).mean()) for old, new in zip(*ended, strict=True))
    assert fp4 < -0.01
    assert max(abs(nf4), abs(q4_0)) < 0.002
    args = facts.copy(), quantized, mask, survive
    assert not LatentWeights(*args).groups[0].offsets
    assert not LatentWeightsWithoutFloor(*args, offset_rate=1.0).groups[0].offsets


def test_unknown_method_and_missing_mask(facts: LanguageModel, capitals: Task, mask: Mask):
    with pytest.raises(ConfigError, match=r"Unknown method 'magic'; available: mansu, mansu-r"):
        get_method("magic")
    with pytest.raises(ConfigError, match="'mansu-unsnapped' is now called 'mansu-no-floor'"):
        get_method("mansu-unsnapped")
    with pytest.raises(ConfigError, match=r"mansu edits inside a mask: give mask=circuit_mask\("):
        unlearn(facts, capitals)
    with pytest.raises(MaskError, match="made for another checkpoint than facts"):
        unlearn(facts, capitals, Mask(mask.indices, {"model_sha256": "00"}))


@wrong_type
@pytest.mark.parametrize("wrong", ["npo", MethodConfig()])
def test_settings_are_those_of_a_method(facts: LanguageModel, capitals: Task, wrong: Any):
    with pytest.raises(ConfigError, match="must be the settings of a method"):
        unlearn(facts, capitals, None, wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"lr": 0},
        {"batch_size": 0},
        {"ranking_weight": -1},
        {"probe_weight": -1},
        {"final_margin": -0.1},
        {"quantization_margin": -1},
        {"quantization_margin": float("nan")},
        {"margin_budget": 1},
        pytest.param({"forget_loss": "x"}, marks=wrong_type),
        pytest.param({"precision": "fp16"}, marks=wrong_type),
        {"training_margin": float("inf")},
        {"adversarial_lr": 0},
        {"survive": ()},
    ],
)
def test_settings_out_of_range(settings: dict):
    with pytest.raises(ConfigError, match=rf"^{next(iter(settings))} .*; got "):
        Mansu(**settings)


def test_dense_methods_stop_where_told(facts: LanguageModel, capitals: Task):
    seen: list[int] = []
    config = GradDiff(steps=6, batch_size=4, stop_at=1.0)
    result = unlearn(
        facts, capitals, config=config, on_step=lambda done, total, _: seen.append(done)
    )
    assert result.stopped_at == len(result.history) == 2  # the first check; 1.0 is always reached
    assert seen == [1, 2]
    assert result.history[-1].choice <= 1.0
    assert any(not torch.equal(w, facts.weights[n]) for n, w in result.model.weights.items())


def test_dense_methods_without_a_level_run_to_the_end(facts: LanguageModel, capitals: Task):
    for kind in (GradDiff, NPO):
        assert unlearn(facts, capitals, config=kind(steps=3, batch_size=4)).stopped_at == 3


def test_an_epoch_of_forget_batches_holds_every_pair_once(capitals: Task):
    sampler = Sampler(capitals, 40)
    seen: list[int] = []
    while len(set(seen)) < len(capitals.forget):
        for chunk in sampler.forget():
            assert len({(p.relation, p.phrasing) for p in chunk}) == 1
            repeated = len(set(seen)) < len(seen)
            seen += [id(p) for p in chunk]
            assert len(set(seen)) == len(capitals.forget) or not repeated
    assert set(seen) == {id(p) for p in capitals.forget}


def test_retain_batches_are_even_over_relations(capitals: Task):
    sampler = Sampler(capitals, 16)
    drawn = [p.relation for _ in range(200) for chunk in sampler.retain() for p in chunk]
    known = {p.relation for p in capitals.retain}
    assert set(drawn) >= known
    assert all(drawn.count(r) > 0.5 * len(drawn) / len(set(drawn)) for r in known)


# The probe penalty: what the probe reads by hand, and the gradient against it.

NAME = "model.layers.1.mlp.down_proj.weight"


def test_z_scores_by_hand(capitals: Task):
    """Scores 5, 1 and 3 among three answers: mean 3, deviation sqrt(8/3)."""
    pair = capitals.forget[0]
    others = [p.answer for p in capitals.forget if p.answer != pair.answer]
    answers = [pair.answer, others[0], next(o for o in others if o != others[0])]
    rows = torch.zeros(960, 2)
    rows[answers, 0] = torch.tensor([5.0, 1.0, 3.0])
    found = z_scores(torch.tensor([[1.0, 9.0]]), [pair], rows, {"capital": torch.tensor(answers)})
    assert found.tolist() == pytest.approx([2 / (8 / 3) ** 0.5], rel=1e-4)


def test_the_penaltys_gradient_is_of_what_it_reads(facts: LanguageModel, capitals: Task):
    """Against the difference of the loss, probes held fixed, along the gradient itself."""
    (found,), level = ProbePenalty(capitals, 8).gradient(facts, [NAME])
    drawn = ProbePenalty(capitals, 8).draw()
    seen = {p.subject for p in drawn.train}
    assert not seen & {p.subject for p in drawn.unseen} and len(drawn.chosen) == 8
    rows, probes = answer_rows(facts), fit_probe(facts, drawn.train, subject=True)
    among = answer_tokens(drawn.unseen)

    def loss(model: LanguageModel) -> float:
        with torch.no_grad():
            states = last_states(model, drawn.chosen, True)
            read = [
                z_scores(probe(x), drawn.chosen, rows, among)
                for probe, x in zip(probes, states, strict=True)
            ]
        return float(torch.stack(read).relu().mean())

    assert level == pytest.approx(loss(facts), rel=1e-4)
    assert level > 1  # the shipped model knows every capital
    ends = []
    for sign in (1, -1):
        moved = facts.copy()
        moved.weights[NAME].add_(found, alpha=sign * 1e-2 / float(found.norm()))
        ends.append(loss(moved))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(found.norm()), rel=0.05)
    other, _ = ProbePenalty(capitals, 8, seed=1).gradient(facts, [NAME])
    assert not torch.equal(found, other[0])


def test_what_is_read_falls(facts: LanguageModel, capitals: Task):
    """Descent on it lowers what probes of other halves read; each step draws and fits new ones."""
    model, penalty = facts.copy(), ProbePenalty(capitals, 48)
    names, levels = [model.embedding_name, *model.linear_names], []
    for _ in range(12):
        found, level = penalty.gradient(model, names)
        size = sum(float(g.square().sum()) for g in found) ** 0.5
        for name, g in zip(names, found, strict=True):
            model.weights[name].sub_(g, alpha=2 / size)
        levels.append(level)
    assert levels[-1] < 0.7 * levels[0]


def test_unlearning_takes_it_along(facts: LanguageModel, capitals: Task):
    mask = random_mask(facts, 0.02)
    config = Mansu(batch_size=8, steps=3, lr=0.3)
    plain, read = (
        unlearn(facts, capitals, mask, replace(config, probe_weight=w)) for w in (0.0, 10.0)
    )
    assert plain.history[0].probe is None and (read.history[0].probe or 0) > 1
    assert any(not torch.equal(w, read.model.weights[n]) for n, w in plain.model.weights.items())
