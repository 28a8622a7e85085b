"""Unlearning: what the floor guarantees on the saved checkpoint, seeds, and bad input."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from checked import wrong_type
from torch import Tensor

from mansu_interp.audit.probes import answer_rows, fit_probe, last_states
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import ArtifactError, ConfigError, MansuError, MaskError
from mansu_interp.export.verify import verify
from mansu_interp.losses.accuracy import answered_correctly
from mansu_interp.losses.counterfactual import (
    CounterfactualTargets,
    forget_gradient,
    model_answer_excess,
)
from mansu_interp.masks.components import embedding_rows
from mansu_interp.masks.floor import Floor, floor, quantizer_set
from mansu_interp.masks.margin_edits import (
    CandidateEdits,
    MarginEdits,
    candidate_edits,
    choose_edits,
)
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import POOL, choose_parameters, circuit_mask, random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.packed import Packed
from mansu_interp.quantizers.registry import fitted_quantizers, get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.pairs import PairSet, answer_tokens
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.history import StepRecord
from mansu_interp.unlearning.mansu import algorithm
from mansu_interp.unlearning.mansu.latent_weights import LatentWeights, LatentWeightsWithoutFloor
from mansu_interp.unlearning.mansu.margins import (
    PAIRS,
    ROUNDS,
    MarginEditor,
    lacking,
    margins_by_scatter,
)
from mansu_interp.unlearning.mansu.probe_penalty import ProbePenalty, z_scores
from mansu_interp.unlearning.mansu.students import Students
from mansu_interp.unlearning.methods import (
    BASELINES,
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
from mansu_interp.utils import tensors
from mansu_interp.utils.shipped import ENGINES

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
    latent = LatentWeights(Students(facts.copy(), [NF]), both)
    generator = torch.Generator().manual_seed(0)
    for t in (1, 2):
        some = [torch.randn(i.shape, generator=generator) for i in latent.indices.values()]
        latent.step(some, 0.3, t)
    assert latent.write() == 3000
    edited = latent.model
    found = survival(facts, edited, NF, embedding=True)
    assert found.edited == found.survived > 300 and found.collateral == 0
    assert found.edited + survival(facts, edited, NF).edited == 3000
    _, reference = latent.models
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


@pytest.mark.slow
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
    students = Students(facts.copy(), [NF])
    assert len(LatentWeights(students, mask).models) == 2
    assert len(LatentWeightsWithoutFloor(students, mask).models) == 1


@pytest.mark.slow
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


@pytest.mark.parametrize("depth", [0, 1])
def test_trees_are_for_adversarial_relearning(
    facts: LanguageModel, capitals: Task, random_few: Mask, monkeypatch: pytest.MonkeyPatch,
    depth: int,
):  # fmt: skip
    """In all of its passes, and in no others: the rest keeps the bytes that it had."""
    shapes: list[tuple[int, bool]] = []
    real = LanguageModel.logits_at

    def spy(self: LanguageModel, tokens: Tensor, *where: Tensor) -> Tensor:
        shapes.append((len(tokens), self.in_trees))
        return real(self, tokens, *where)

    monkeypatch.setattr(LanguageModel, "logits_at", spy)
    config = Mansu(steps=1, lr=0.1, batch_size=8, adversarial_steps=depth)
    edited = unlearn(facts, capitals, random_few, config).model
    # One relearning step, a gradient there, one here, and what the teacher and student retain.
    assert [trees for _, trees in shapes[-5:]] == [depth > 0] * 5
    assert not edited.in_trees and not facts.in_trees


def test_students_are_quantized_in_turns_and_are_their_own_teachers(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """One copy of what is not quantized and one of what is, the rest as codes of half a byte; of
    the embedding, edited as well; and of a student without its edits, which come back."""
    name, linear = facts.embedding_name, facts.linear_names
    both = Mask({**mask.indices, name: embedding_rows(facts, capitals.forget)}, {"limit": 3000})
    survive = [get_quantizer(q) for q in ("q4_0", "nf4", "torchao-int4-g32")]
    students = Students(student := facts.copy(), survive)
    assert [q.name for q in students.quantizers] == ["nf4", "torchao-int4-g32", "q4_0"]
    survive = students.quantizers
    teachers = [facts, *(quantize(facts, q) for q in survive)]
    latent = LatentWeights(students, both)
    held = {w.data_ptr() for m in latent.models for w in m.weights.values()}
    assert len(held) == len(facts.weights) + len(linear)
    elements = sum(facts.weights[n].numel() for n in linear)
    for shelved, bytes_ in zip(students._shelf, (0.5, 4, 0.5), strict=True):
        codes = (p.codes if isinstance(p, Packed) else p for p in shelved.packed.values())
        assert sum(c.numel() * c.element_size() for c in codes) == bytes_ * elements
    generator = torch.Generator().manual_seed(0)
    latent.step(
        [torch.randn(i.shape, generator=generator) for i in latent.indices.values()], 1.0, 1
    )
    assert latent.write() > 500
    for side, teacher in enumerate(teachers):
        edited = {n: w.clone() for n, w in latent.models[side].weights.items()}
        assert not all(torch.equal(w, teacher.weights[n]) for n, w in edited.items())
        with latent.unedited(side) as found:
            assert all(torch.equal(w, teacher.weights[n]) for n, w in found.weights.items())
        assert all(torch.equal(w, edited[n]) for n, w in latent.models[side].weights.items())
    assert not torch.equal(student.weights[name], facts.weights[name])
    for side in (2, 1, 3, 1):
        again, model = quantize(student, survive[side - 1]), latent.models[side]
        off = max(float((w - again.weights[n]).abs().max()) for n, w in model.weights.items())
        assert off < (0.05 if side == 2 else 1e-6)  # its library rounds scales to bfloat16
        moved = [n for n in linear if not torch.equal(again.weights[n], model.weights[n])]
        assert side == 2 or not moved
    with pytest.raises(IndexError):
        latent.models[4]


@pytest.mark.slow
def test_students_of_fitted_quantizers_are_quantized_anew(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """After every edit, by the quantizer itself; and of the original, for their teachers. They take
    turns in the memory of the others, whose edits they leave as they are."""
    name = facts.embedding_name
    both = Mask({**mask.indices, name: embedding_rows(facts, capitals.forget)}, {"limit": 3000})
    names, prompts = ("nf4", "q4_k_m", "gptq-g128"), capitals.calibration
    students = Students(edited := facts.copy(), names[:1], ("gptq-g128", "q4_k_m"), prompts)
    assert [q.name for q in students.fitted] == ["q4_k_m", "gptq-g128"] and len(students) == 4
    latent = LatentWeights(students, both, offset_rate=1.0)
    assert not any(x.offsets for x in latent.groups)  # one exact quantizer: none to tell apart
    held = {w.data_ptr() for m in latent.models for w in m.weights.values()}
    assert len(held) == len(facts.weights) + len(facts.linear_names)
    teachers = [facts, *(quantize(facts, q, prompts) for q in names)]
    generator = torch.Generator().manual_seed(0)
    for t in (1, 2):
        assert latent.models[2]  # of the weights that are now edited
        some = [torch.randn(i.shape, generator=generator) for i in latent.indices.values()]
        latent.step(some, 0.3, t, t + 1)
        assert latent.write() > 500
        for side in (2, 1, 3, 0):
            wanted = quantize(edited, names[side - 1], prompts) if side else edited
            for _ in range(2):
                for n, w in latent.models[side].weights.items():
                    assert torch.equal(w, wanted.weights[n]), (side, n)
                with latent.unedited(side) as found:
                    for n, w in found.weights.items():
                        assert torch.equal(w, teachers[side].weights[n]), (side, n)
            assert not torch.equal(edited.weights[name], facts.weights[name])
    with pytest.raises(IndexError):
        latent.models[4]


@pytest.mark.slow
def test_training_through_a_fitted_quantizer_keeps_the_promise(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    """On its turns the losses are those of the quantized model, and its teacher the original after
    the same quantizer; attacks and margins are of the exact ones."""
    through = replace(CONFIG, steps=6, train_through=("q4_k_m",))
    made = unlearn(facts, capitals, mask, through)
    found = survival(facts, made.model, "nf4")
    assert found.edited == found.survived > 300 and found.collateral == 0
    plain = unlearn(facts, capitals, mask, replace(through, train_through=())).model
    assert any(not torch.equal(w, plain.weights[n]) for n, w in made.model.weights.items())
    more = replace(
        through, steps=4, adversarial_steps=7, probe_weight=0.1, quantization_margin=0.01
    )
    last = unlearn(facts, capitals, mask, more).history[-1]
    assert last.adversarial is not None and last.quantization_margin_reached is not None


def test_weights_that_one_of_the_quantizers_leaves_alone_are_rounded_with_the_others(
    tiny_model: Callable[[int], LanguageModel],
):
    """Rows of 48 do not divide into groups of Q4_0: those weights have fewer options."""
    tiny, survive = tiny_model(4), ("nf4", "q4_0")
    mask = random_mask(tiny, 0.3, survive=survive)
    latent = LatentWeights(Students(tiny.copy(), survive), mask, offset_rate=1.0)
    assert sorted(sum(map(bool, x.grids)) for x in latent.groups) == [1, 2]
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 9):
        slopes = [torch.randn(len(i), generator=generator) for i in latent.indices.values()]
        latent.step(slopes, 0.1, t, t % 3)
        edited = latent.write()
    for name in survive:
        found = survival(tiny, latent.model, name)
        assert found.edited == found.survived > 50 and found.collateral == 0
    assert edited > survival(tiny, latent.model, "q4_0").edited


def test_the_losses_of_a_turn_are_those_of_the_quantized_model(
    facts: LanguageModel, capitals: Task, mask: Mask, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[LanguageModel, dict[str, Tensor]]] = []
    real = algorithm._retained

    def retained(teacher: LanguageModel, *rest: Any) -> Any:
        seen.append((teacher, {n: w.clone() for n, w in teacher.weights.items()}))
        return real(teacher, *rest)

    monkeypatch.setattr(algorithm, "_retained", retained)
    config = replace(CONFIG, steps=6, train_through=("q4_k_m",))
    unlearn(facts, capitals, mask, config)
    for side, quantizer in enumerate((None, "nf4", "q4_k_m") * 2):
        wanted = quantize(facts, quantizer) if quantizer else facts
        for n, w in seen[side][1].items():
            assert torch.equal(w, wanted.weights[n]), (side, n)


def test_what_training_goes_through_is_fitted():
    """And what can be promised is named where it is."""
    assert Mansu(train_through=("llama.cpp",)).train_through == ENGINES["llama.cpp"].fitted
    assert [q.name for q in fitted_quantizers(("hqq", "q2_k"))] == ["q2_k", "hqq"]
    for names, error in (
        (("nf4",), "An edit can be made to survive nf4: name it under survive, where that is"),
        (("awq-g128",), "Training cannot go through awq-g128: it moves scales between layers"),
        (("q9",), r"Unknown quantizer 'q9'\. Engines: llama.cpp, "),
    ):
        with pytest.raises(ConfigError, match=error):
            fitted_quantizers(names)
    with pytest.raises(ConfigError, match="train_through names different quantizers; got hqq, hqq"):
        Mansu(train_through=("hqq,hqq",))
    with pytest.raises(ConfigError, match="mansu-no-floor trains the full-precision model alone"):
        MansuNoFloor(train_through=("hqq",))


@pytest.mark.slow
def test_the_order_in_which_quantizers_are_named_means_nothing(
    facts: LanguageModel, capitals: Task, mask: Mask
):
    made = [
        unlearn(facts, capitals, mask, replace(CONFIG, survive=names, steps=5)).model
        for names in (("nf4", "fp4", "q4_0"), ("q4_0", "nf4", "fp4"))
    ]
    assert all(torch.equal(w, made[1].weights[n]) for n, w in made[0].weights.items())
    assert any(not torch.equal(w, facts.weights[n]) for n, w in made[0].weights.items())


def test_edits_with_offsets_survive_and_each_quantized_model_has_its_own(
    facts: LanguageModel, mask: Mask
):
    """A model's own gradient moves its own offsets, and no other's; an edit without a floor has
    none."""
    names = ("nf4", "fp4", "q4_0")
    survive = [get_quantizer(q) for q in names]
    ended: list[list[Tensor]] = []
    for pull in (0.0, 1.0):
        latent = LatentWeights(Students(facts.copy(), survive), mask, offset_rate=1.0)
        generator = torch.Generator().manual_seed(0)
        for t in range(1, 9):
            some = [torch.randn(i.shape, generator=generator) for i in latent.indices.values()]
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
    args = Students(facts.copy(), survive), mask
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
    told = r"(must be the settings of a method|config: got 'npo', expected a MethodConfig\.)"
    with pytest.raises(MansuError, match=told):
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
        {"training_margin": float("inf")},
        {"adversarial_lr": 0},
        {"survive": ()},
    ],
)
def test_settings_out_of_range(settings: dict):
    with pytest.raises(ConfigError, match=rf"^{next(iter(settings))} .*; got "):
        Mansu(**settings)


@wrong_type
def test_settings_are_among_those_that_there_are():
    with pytest.raises(ConfigError, match="got 'x', expected 'counterfactual' or 'ga'"):
        Mansu(forget_loss="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision: got 'fp16', expected 'fp32' or 'bf16'"):
        Mansu(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps: got 'many', expected an int"):
        Mansu(steps="many")  # type: ignore[arg-type]


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_unlearning_takes_it_along(facts: LanguageModel, capitals: Task):
    mask = random_mask(facts, 0.02)
    config = Mansu(batch_size=8, steps=3, lr=0.3)
    plain, read = (
        unlearn(facts, capitals, mask, replace(config, probe_weight=w)) for w in (0.0, 10.0)
    )
    assert plain.history[0].probe is None and (read.history[0].probe or 0) > 1
    assert any(not torch.equal(w, read.model.weights[n]) for n, w in plain.model.weights.items())


# A killed loop goes on from its checkpoint, and determinism within a stated tolerance.

STEPS = Mansu(steps=5, lr=0.1, batch_size=8, adversarial_steps=1, probe_weight=0.5)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def random_few(facts: LanguageModel) -> Mask:
    return random_mask(facts, 0.002)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mansu", "mansu through q4_k_m", "mansu-no-floor", *BASELINES])
def test_a_killed_loop_ends_the_same(
    facts: LanguageModel,
    capitals: Task,
    random_few: Mask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
):
    monkeypatch.setattr(tensors, "SECONDS", 0.0)
    method, _, through = method.partition(" through ")
    config: MethodConfig = get_method(method)(steps=5, batch_size=8)
    if isinstance(config, Mansu):
        config = type(config)(**{**vars(STEPS), "survive": ("nf4", "fp4")})
        config = replace(config, quantization_margin=0.01)
    if through:
        config = replace(config, train_through=(through,))
    file, steps = tmp_path / "checkpoint.safetensors", []
    whole = unlearn(facts, capitals, random_few, config)

    def die(done: int, *_: object) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        unlearn(facts, capitals, random_few, config, on_step=die, resume=str(file))
    again = unlearn(
        facts,
        capitals,
        random_few,
        config,
        on_step=lambda done, *_: steps.append(done),
        resume=file,
    )
    assert steps[:2] == [4, 5]
    assert again.history == whole.history and again.stopped_at == 5
    for name, weight in whole.model.weights.items():
        assert torch.equal(weight, again.model.weights[name]), name
    with pytest.raises(ArtifactError, match="run of another model, task, mask, configuration or"):
        unlearn(facts, capitals, random_few, config, seed=1, resume=file)


@pytest.mark.slow
def test_what_comes_before_the_first_step_is_told_and_asked_once(
    facts: LanguageModel,
    capitals: Task,
    random_few: Mask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """A killed loop knows from its checkpoint what the original answers, in the same order."""
    monkeypatch.setattr(tensors, "SECONDS", 0.0)
    some = capitals.retain.sample(64, 0)
    wrong = (
        replace(p, answer=p.counterfactual, counterfactual=p.answer, distractors=(p.answer,) * 3)
        for p in some.pairs[:16]
    )
    unscored = PairSet("unscored", (*wrong, *some.pairs[16:]))
    few = replace(capitals, retain_unscored=unscored)
    config = replace(CONFIG, steps=2)
    file, told, seen = tmp_path / "checkpoint.safetensors", [], []
    real = algorithm.Sampler

    def sampler(task: Task, *rest: Any) -> Any:
        seen.append(tuple(task.retain_unscored or ()))
        return real(task, *rest)

    monkeypatch.setattr(algorithm, "Sampler", sampler)

    def prepare(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    def die(done: int, *_: object) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        unlearn(facts, few, random_few, config, on_prepare=prepare, on_step=die, resume=file)
    asked = [t for t in told if t[0] == "what the original answers"]
    assert [t[1] for t in asked] == list(range(asked[0][2]))
    assert [t[1:] for t in told[len(asked) :]] == [(0, 2), (1, 2)]  # full precision and NF4
    monkeypatch.setattr(algorithm, "answered_correctly", None)
    unlearn(facts, few, random_few, config, resume=file)
    kept = answered_correctly(facts, unscored)
    assert kept and len(kept) == 48
    assert seen == [tuple(kept), tuple(kept)]


@pytest.mark.slow
def test_a_killed_loop_ends_the_same_in_the_middle_of_an_attack(
    facts: LanguageModel,
    capitals: Task,
    random_few: Mask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """It goes on from the end of the attack before."""
    monkeypatch.setattr(tensors, "SECONDS", 0.0)
    config = replace(STEPS, steps=6, adversarial_steps=18, probe_weight=0.0)
    file, steps = tmp_path / "checkpoint.safetensors", []
    whole = unlearn(facts, capitals, random_few, config)

    def die(done: int, *_: object) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        unlearn(facts, capitals, random_few, config, on_step=die, resume=file)
    again = unlearn(
        facts, capitals, random_few, config,
        on_step=lambda done, *_: steps.append(done), resume=file,
    )  # fmt: skip
    assert steps == [4, 5, 6] and again.history == whole.history
    for name, weight in whole.model.weights.items():
        assert torch.equal(weight, again.model.weights[name]), name


def test_a_record_is_json_and_back():
    record = StepRecord(0.5, 0.25, probe=1.5, edited=3)
    assert record.to_json() == {"forget": 0.5, "retain": 0.25, "probe": 1.5, "edited": 3}
    assert StepRecord.from_json(record.to_json()) == record
    assert math.isnan(StepRecord.from_json({"forget": None}).forget)
    with pytest.raises(ValueError, match="unknown 'attacked'"):
        StepRecord.from_json({"forget": 0.5, "attacked": 1.0})
    with pytest.raises(ValueError, match="no forget loss"):
        StepRecord.from_json({"retain": 0.5})


SCORES, OVERLAP, LOSSES = 1e-5, 0.999, 1e-5
"""Tolerance over batch sizes and thread counts: scores relative to the largest, share of a mask's
parameters, and losses relative to their size (docs/faults.md)."""


@pytest.mark.slow
def test_another_batch_size_stays_within_the_tolerance(facts: LanguageModel, capitals: Task):
    config = CircuitConfig(pairs=8, ig_steps=1, top=200, faithfulness_pairs=4)
    found = []
    for size in (2, 8, 2):
        circuit = discover(facts, capitals.forget, config=replace(config, batch_size=size))
        mask = circuit_mask(circuit, facts, budget=0.002, retain=[capitals.retain], n_pairs=8)
        result = unlearn(
            facts,
            capitals,
            mask,
            replace(STEPS, steps=1, adversarial_steps=0, probe_weight=0.0),
        )
        chosen = {(k, int(i)) for k, index in mask.indices.items() for i in index}
        found.append((circuit.scores, chosen, result.history[0]))
    (scores, chosen, losses), other, again = found
    assert 0 < abs(other[0] - scores).max() <= SCORES * abs(scores).max()
    assert len(other[1] & chosen) >= OVERLAP * len(chosen)
    for key, value in losses.to_json().items():
        assert other[2].to_json()[key] == pytest.approx(value, rel=LOSSES, abs=1e-7), key
    # The same batches: the same bytes.
    assert (again[0] == scores).all() and again[1:] == (chosen, losses)


@pytest.mark.slow
def test_another_thread_count_stays_within_the_tolerance(facts: LanguageModel, capitals: Task):
    config = CircuitConfig(pairs=2, ig_steps=1)
    scores, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            scores.append(attribute(facts, capitals.forget.sample(2, 0), config=config).scores)
    finally:
        torch.set_num_threads(threads)
    assert abs(scores[1] - scores[0]).max() <= SCORES * abs(scores[0]).max()


# Edits that part quantized models from full precision: what the real libraries make of them.

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
    edits = choose_edits(found, torch.full((len(survive),), wanted), 4000)
    after = applied(weight, edits)
    i, value = edits.elements, edits.values
    original = weight.flatten()[i]
    shifts = (after - weight).flatten() * slope
    assert wanted <= edits.gain.min() < wanted + 0.05  # the last edit's
    assert float(shifts.sum()) == pytest.approx(edits.shift, abs=1e-4)
    one = float(shifts.abs().max())
    assert abs(edits.shift) <= one < float(shifts.abs().sum()) / 5
    assert abs(edits.shift) < 0.05 < float(shifts.abs().sum()) / 10
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
    edits = choose_edits(found, torch.full((1 + len(survive),), wanted), 4000)
    after = applied(weight, edits)
    assert wanted <= edits.gain.min() < wanted + 0.1
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
        choose_edits(replace(found, loss=loss), torch.full((4,), 0.3), 4000)
        for loss in (torch.zeros_like(found.loss), -found.gain.mean(0))
    )
    assert lifted.loss < -0.3
    assert alone.loss == 0 and (alone.elements == lifted.elements).all()


@pytest.mark.slow
def test_no_more_is_edited_than_asked_for_or_allowed():
    *_, found = case(SET)
    few, many = (
        len(choose_edits(found, torch.full((4,), wanted), 4000).elements) for wanted in (0.1, 0.5)
    )
    assert 5 < few < many / 2 < 1000
    short = choose_edits(found, torch.full((4,), 0.5), few)
    assert len(short.elements) == few and 0.05 < short.gain.min() < 0.5


def test_what_weighs_less_is_left_alone():
    """Half of the weights are kept by others."""
    *_, found = case(SET)
    weight = torch.ones(64 * 256)
    weight[::2] = 1e-6
    edits = choose_edits(replace(found, weight=weight), torch.full((4,), 0.1), 4000)
    assert (edits.elements % 2 == 1).all()


def test_nothing_is_made_of_nothing():
    """Without slope, or where the floor forbids both ways."""
    weight, slope, kept, where, found = case(SET)
    nothing = replace(found, gain=0 * found.gain)
    assert not len(choose_edits(nothing, torch.full((4,), 0.1), 100).elements)
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
    margins = torch.tensor([0.2, 0.1])
    assert lacking(distance, margins).tolist() == pytest.approx([0.1, 0.1, 0.0, 0.4])


def test_a_format_parts_from_full_precision_as_far_as_it_scatters():
    """By standard deviation, wherever the mean lies; of one format, and of none that scatters."""
    some = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    distance = torch.stack([0.4 * some, 0.5 + 0.1 * some, 0.02 * some - 3])
    assert margins_by_scatter(distance, 0.2).tolist() == pytest.approx([0.2, 0.05, 0.01])
    assert margins_by_scatter(distance[1:2], 0.2).tolist() == pytest.approx([0.2])
    assert margins_by_scatter(torch.ones(2, 4), 0.2).tolist() == [0.0, 0.0]


def test_formats_share_the_edits():
    """Where an edit has to lower every one of nine formats, next to none is left: their sums reach
    what is wanted with a tenth of the edits, and more so where eight bits want little."""
    survive = (*SET, "int4-g128", "q4_1", "q5_0", "q8_0", "mxfp4")
    *_, found = case(survive)
    share = torch.tensor([0.7, 1.0, 0.7, 0.7, 0.7, 0.5, 0.3, 0.05, 0.9])
    edits = choose_edits(found, 0.2 * share, 4000)
    assert (edits.gain >= 0.2 * share - 1e-6).all()
    together = replace(found, gain=found.gain.amin(0)[None])
    alike = choose_edits(together, torch.tensor([0.2]), 4000)
    assert 5 < len(edits.elements) < len(alike.elements) / 10
    assert edits.gain.max() < 0.5


def test_a_format_that_is_far_enough_does_not_come_nearer():
    *_, found = case(SET)
    wanted = torch.tensor([-0.3, 0.4, -0.1, 0.2])
    edits = choose_edits(found, wanted, 4000)
    assert (edits.gain >= wanted.clamp_min(0) - 1e-6).all()


@pytest.fixture(scope="module")
def mlp_mask(facts: LanguageModel, capitals: Task) -> Mask:
    names = [n for n in facts.linear_names if ".mlp." in n]
    gradient = forget_gradient(facts, names, capitals.forget.sample(32, 0))
    everywhere = {n: torch.ones_like(g, dtype=torch.bool) for n, g in gradient.items()}
    return choose_parameters(facts, everywhere, 0.005, gradient, survive=SET)


@pytest.mark.slow
def test_the_quantized_models_lie_below_by_the_quantization_margin(
    facts: LanguageModel, capitals: Task, mlp_mask: Mask
):
    """As the libraries quantize the checkpoint; the promises hold for these edits, too."""
    config = replace(SETTINGS, margin_budget=0.5)
    pairs = list(capitals.forget.sample(PAIRS, 0))
    targets = CounterfactualTargets(facts, capitals.forget, 0)
    apart = []
    for quantization_margin in (0.0, 0.03):
        found = unlearn(
            facts, capitals, mlp_mask, replace(config, quantization_margin=quantization_margin)
        )
        with torch.no_grad():
            full, *others = (
                model_answer_excess(m, pairs, targets)
                for m in (found.model, *(quantize(found.model, q) for q in SET))
            )
        distance = full - torch.stack(others)
        apart.append(distance.mean(1))
        last = found.history[-1]
        for q in SET:
            after = survival(facts, found.model, q)
            assert after.edited == after.survived == last.edited <= mlp_mask.limit
            assert after.collateral == 0
        assert (last.quantization_margin_reached is not None) == bool(quantization_margin)
    margins = margins_by_scatter(distance, quantization_margin)
    assert margins.max() == pytest.approx(quantization_margin)
    beyond = [float((some - margins).min()) for some in apart]  # of the one that lacks most
    assert beyond[0] < -0.01 and -0.003 < beyond[1] < 0.02
    reached = quantization_margin + beyond[1]
    assert last.quantization_margin_reached == pytest.approx(reached, abs=0.01)
    assert 20 < last.quantization_margin_edits <= config.margin_budget * mlp_mask.limit


@pytest.mark.slow
def test_answers_reach_the_final_margin(
    facts: LanguageModel, capitals: Task, mlp_mask: Mask, monkeypatch: pytest.MonkeyPatch
):
    """In full precision and as the libraries quantize the checkpoint."""
    pairs = capitals.forget.sample(PAIRS, 0)
    kept = PairSet("kept", tuple(p for some in capitals.retain_sets for p in some)).sample(PAIRS, 0)
    targets = CounterfactualTargets(facts, capitals.forget, 0)
    quantized = [quantize(facts, q) for q in SET]
    survive = quantizer_set(SET)
    latent = LatentWeights(Students(facts.copy(), survive), mlp_mask)

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
def test_the_final_margin_is_of_the_fitted_models_too(
    facts: LanguageModel, capitals: Task, random_few: Mask, monkeypatch: pytest.MonkeyPatch
):
    """A prompt counts by the higher of both, and the model that is higher on average has to get
    there; an exact quantizer's is left to the quantization margin."""
    pairs = capitals.forget.sample(48, 0)
    targets = CounterfactualTargets(facts, capitals.forget, 0)
    students = Students(facts.copy(), quantizer_set(("nf4",)), ("iq4_nl",))
    editor = MarginEditor(LatentWeights(students, random_few), pairs, targets, pairs)
    with torch.no_grad():
        full, fitted = (
            torch.cat([model_answer_excess(m, part, targets) for part in pairs.parts(16)])
            for m in (facts, quantize(facts, "iq4_nl"))
        )
    assert (full > fitted).any() and (full < fitted).any()
    seen: list[Tensor] = []
    monkeypatch.setattr(MarginEditor, "_edit", lambda _, lacks, *rest: seen.append(lacks) or 0)
    found = editor.reach_final_margin(1.0, 100)
    assert torch.allclose(seen[0], torch.maximum(full, fitted) + 1.0, atol=1e-4)
    assert found.reached == pytest.approx(
        max(float(full.mean()), float(fitted.mean())) + 1, abs=1e-4
    )


@pytest.mark.slow
def test_margin_edits_survive_every_quantizer(facts: LanguageModel, capitals: Task, mlp_mask: Mask):
    config = replace(SETTINGS, margin_budget=0.5, final_margin=0.2, quantization_margin=5.0)
    found = unlearn(facts, capitals, mlp_mask, config)
    last = found.history[-1]
    assert 0 < last.final_margin_edits <= mlp_mask.limit / 4 + 1
    assert last.quantization_margin_edits > 0
    for q in SET:
        after = survival(facts, found.model, q)
        assert after.edited == after.survived == last.edited <= mlp_mask.limit
        assert after.collateral == 0


@pytest.mark.slow
def test_a_run_killed_during_margin_edits_goes_on_after_its_training(
    facts: LanguageModel, capitals: Task, mlp_mask: Mask, tmp_path: Path
):
    config = replace(SETTINGS, steps=2, quantization_margin=0.1)
    file, seen = tmp_path / "checkpoint.safetensors", []

    def stop(done: int, total: int, record: StepRecord) -> None:
        if done and record.quantization_margin_reached is not None:
            raise KeyboardInterrupt

    whole = unlearn(facts, capitals, mlp_mask, config).model
    with pytest.raises(KeyboardInterrupt):
        unlearn(facts, capitals, mlp_mask, config, on_step=stop, resume=file)
    again = unlearn(
        facts, capitals, mlp_mask, config, on_step=lambda *step: seen.append(step), resume=file
    ).model
    assert [(done, total) for done, total, _ in seen][:2] == [(0, ROUNDS), (1, ROUNDS)]
    reached = [record.quantization_margin_reached for *_, record in seen]
    assert reached[0]  # measured, before the first round
    assert reached == sorted(reached)
    assert all(torch.equal(w, again.weights[n]) for n, w in whole.weights.items())
