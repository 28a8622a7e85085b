"""CAD: its evidence and its verdict, by hand and on models whose past is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mansu_interp.audit import linearized as module
from mansu_interp.audit.cad import Evidence, check_alike, decide, judge_erasure, number, settle
from mansu_interp.audit.linearized import linearized_relearning, tangent_kernel
from mansu_interp.audit.probes import last_logits, probe, ranked, states, stitches
from mansu_interp.audit.relearning import ERASED_LEVEL, halves, of_subjects, rivals_within
from mansu_interp.audit.transfer import answer_advantage, gradient_transfer, model_advantage
from mansu_interp.errors import ModelError, TaskError
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.pairs import PairSet, answer_tokens, collate
from mansu_interp.tasks.task import Task

TinyModel = Callable[[int], LanguageModel]


@pytest.fixture(scope="module")
def split(capitals: Task) -> tuple[PairSet, PairSet]:
    first, second = halves(capitals.forget, 0)
    a, b = (rivals_within(of_subjects(capitals.forget, h)) for h in (first, second))
    return a, b.sample(90, 0)


def test_a_model_stitched_to_itself_is_itself(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    assert stitches(model, model, pairs) == [accuracy(model, pairs).choice] * 4


def test_stitches_take_the_right_end(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    """With its unembedding gone, a model's states still answer in the original, not vice versa."""
    mute = facts.copy()
    mute.weights["lm_head.weight"].zero_()
    assert stitches(mute, facts, split[1]) == [1.0] * 5
    assert stitches(facts, mute, split[1]) == [0.0] * 5  # a tie counts against the model


def test_states_are_those_of_transformers(tiny_model: TinyModel, pairs: PairSet):
    model, batch = tiny_model(2), collate(pairs.pairs)
    want = model.hf.base_model(input_ids=batch.clean, output_hidden_states=True).hidden_states
    got = states(model, batch)
    assert len(got) == 4
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.allclose(model.hf.base_model.norm(got[3]), want[3])


def test_the_probe_reads_what_was_taught(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    read = probe(facts, *split).float().mean(1)
    assert read[0] < 0.4  # the last token's embedding is the same in every prompt of a phrasing
    assert read[1:].min() > 0.95
    never = load_model("facts-capitals-reference-1")
    assert probe(never, *split).float().mean(1).max() < 0.4


def test_transfer_is_a_cosine_and_advantages_are_bounded(
    facts: LanguageModel, split: tuple[PairSet, PairSet]
):
    half_a, half_b = (s.sample(12, 0) for s in split)
    found = gradient_transfer(facts, half_a, half_b)
    assert sum(found.by_weight.values()) == pytest.approx(found.transfer)
    assert gradient_transfer(facts, half_a, half_a).transfer == pytest.approx(1)
    assert gradient_transfer(facts, half_b, half_a).transfer == pytest.approx(found.transfer)
    among = {"capital": torch.tensor(sorted({p.answer for p in half_b}))}
    with torch.no_grad():
        level = model_advantage(facts, half_b.pairs, among)
    assert level.max() <= torch.tensor(12.0).log() + 1e-4  # certain of one answer in 12
    assert all(not w.requires_grad for w in facts.weights.values())


GONE = Evidence(
    predicted=0.28,
    relearned=0.3,
    half_a=1.0,
    ranked_last=0.3,
    probed=0.3,
    stitched=0.3,
    original=1.0,
)
"""A model that gives nothing away, by every sign."""


@pytest.mark.parametrize(
    ("verdict", "changed"),
    [
        ("unchanged", {"predicted": 0.97, "relearned": 1.0, "probed": 1.0, "stitched": 1.0}),
        ("relocated", {"predicted": 0.97, "relearned": 1.0, "probed": 1.0, "stitched": 0.3}),
        ("suppressed", {"relearned": 0.9}),
        ("suppressed", {"probed": 0.8}),  # only a probe finds it
        ("suppressed", {"stitched": 1.0}),  # only the output does not show it
        ("erased", {"probed": 0.55, "quantized": 0.3}),
        ("recovered", {"quantized": 0.5}),
        ("suppressed", {"ranked_last": 0.5}),  # given away by ranking last
        ("undecided", {"ranked_last": 0.43}),
        ("undecided", {"relearned": 0.43}),
        ("undecided", {"half_a": 0.6}),  # half A was not relearned
        ("undecided", {"predicted": 0.43}),
        ("suppressed", {"predicted": 0.6}),  # it still answers
        ("erased", {"predicted": 0.15, "quantized": 0.3}),  # a rise to chance brings nothing back
    ],
)
def test_verdicts(verdict: str, changed: dict[str, float]):
    evidence = replace(GONE, **changed)
    found, sentence = decide(evidence)
    assert found == verdict
    assert sentence.endswith(".") and sentence[0].isupper()
    cad = number(found, evidence)
    assert cad >= 0.8 if found == "erased" else cad <= 0.8 if found == "undecided" else cad < 0.74


@pytest.mark.parametrize("key", ["predicted", "relearned", "ranked_last"])
def test_cad_calls_erased_what_the_attack_calls_erased(key: str):
    assert decide(replace(GONE, **{key: ERASED_LEVEL}))[0] == "erased"
    assert decide(replace(GONE, **{key: ERASED_LEVEL + 0.01}))[0] == "undecided"


def test_a_verdict_that_most_resamplings_do_not_share_is_undecided():
    assert settle("erased", "Gone.", 0.5) == ("erased", "Gone.", 0.5)
    word, sentence, confidence = settle("erased", "Gone.", 0.46)
    assert (word, confidence) == ("undecided", 0.54) and sentence.endswith("do not give erased.")
    assert settle("undecided", "Some.", 0.3) == ("undecided", "Some.", 0.3)


def test_verdict_and_number_agree_whatever_was_found():
    """On random evidence, also of originals that know only some of the facts."""
    rng = random.Random(0)
    seen: set[str] = set()
    for _ in range(20_000):
        shares = [
            rng.choice([0.0, 0.25, 0.4, 0.45, 0.7, 0.75, 1.0, rng.random()]) for _ in range(8)
        ]
        evidence = Evidence(*shares[:6], original=max(0.3, shares[6]), quantized=shares[7])
        verdict, _ = decide(evidence)
        seen.add(verdict)
        cad = number(verdict, evidence)
        low, high = {"erased": (0.8, 1.0), "undecided": (0.733, 0.8)}.get(verdict, (0.0, 0.734))
        assert low - 1e-9 <= cad <= high + 1e-9, (verdict, cad, evidence)
    assert seen == {"unchanged", "suppressed", "erased", "relocated", "recovered", "undecided"}


def test_the_number_by_hand():
    """Without a clamp: halfway from PRESENT to the original's share is halfway from 0.267 to 1."""
    assert number("erased", replace(GONE, ranked_last=0.25, relearned=0.25, probed=0.25,
                                    stitched=0.25, predicted=0.25)) == 1.0  # fmt: skip
    half = replace(GONE, relearned=(0.45 + 0.85) / 2, original=0.85)
    assert number("suppressed", half) == pytest.approx(1 - (0.2 / 0.75 + 1) / 2)
    assert number("unchanged", replace(GONE, predicted=0.85, original=0.85)) == 0.0
    assert number("suppressed", replace(GONE, probed=0.7)) == pytest.approx(1 - 0.2 / 0.75)
    assert number("erased", replace(GONE, probed=0.69)) == pytest.approx(0.8, abs=0.01)


def test_an_original_that_never_knew_is_refused_before_any_work(
    facts: LanguageModel, capitals: Task
):
    never, stages = load_model("facts-capitals-reference-0"), list[str]()
    with pytest.raises(TaskError, match="does not know what task 'capitals' is to forget"):
        judge_erasure(never, facts, capitals, on_step=lambda stage, *_: stages.append(stage))
    assert stages == []


@pytest.mark.slow
def test_copies_are_unchanged_and_reference_models_erased(facts: LanguageModel, capitals: Task):
    same = judge_erasure(facts, facts.copy(), capitals)
    assert (same.verdict, same.cad, same.confidence) == ("unchanged", 0.0, 1.0)
    for name in capitals.reference_models:  # from the same initial weights, and from others
        never = judge_erasure(facts, load_model(name), capitals)
        assert never.verdict == "erased"
        assert never.cad > 0.85
    mute = facts.copy()
    mute.weights["lm_head.weight"].zero_()
    hidden = judge_erasure(facts, mute, capitals)
    assert hidden.verdict == "suppressed"
    lines = hidden.lines()
    assert lines[0].startswith("suppressed") and lines[4].startswith("original ")
    assert len(hidden.half_b) == len(hidden.half_a) == len(hidden.ranked_last) - 1 == 6
    assert f"{hidden.half_b[-1]:.2f}" in next(x for x in lines if "answer first" in x)
    assert hidden.to_json()["probed"]["edited"] == hidden.probed["edited"]


def test_right_answers_agree_with_the_scores(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    assert float(ranked(facts, split[1])[0].float().mean()) == accuracy(facts, split[1]).choice


def test_what_cannot_be_compared(facts: LanguageModel, tiny_model: TinyModel):
    with pytest.raises(ModelError, match="Compare two of one model"):
        check_alike(facts, tiny_model(2))
    other = facts.copy()
    other.tokenizer = type("Other", (), {"get_vocab": lambda self: {"a": 1}})()
    with pytest.raises(ModelError, match="different tokenizers"):
        check_alike(facts, other)
    broken = facts.copy()
    broken.weights[facts.linear_names[3]][0, 0] = torch.nan
    for one, two in ((facts, broken), (broken, facts)):
        with pytest.raises(ModelError, match=f"{facts.linear_names[3]} holds NaN or infinity"):
            check_alike(one, two)
    wide = facts.copy()
    mlp = wide.hf.base_model.layers[0].mlp
    mlp.up_proj = torch.nn.Linear(128, 300, bias=False)
    wide = LanguageModel("wide", wide.hf, wide.tokenizer)
    given = r"mlp.up_proj.weight is \(300, 128\) in wide and \(\d+, 128\) in facts"
    with pytest.raises(ModelError, match=given):
        check_alike(facts, wide)
    smaller = facts.copy()
    smaller.hf.resize_token_embeddings(900)
    with pytest.raises(ModelError, match="vocabulary of 900, facts of 960"):
        check_alike(facts, smaller)


# Linearized relearning: the kernel against single gradients, and models whose past is known.


@pytest.fixture(scope="module")
def sixty(capitals: Task) -> tuple[PairSet, PairSet]:
    a, b = (rivals_within(of_subjects(capitals.forget, h)) for h in halves(capitals.forget, 0))
    return a.sample(60, 0), b.sample(60, 0)


@pytest.mark.parametrize("held", [module.MAX_HELD, 20_000])
def test_the_kernel_is_that_of_single_gradients(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch, held: int
):
    """Phrasings of different lengths, more than one block of rows, and one layer at a time."""
    monkeypatch.setattr(module, "MAX_HELD", held)
    monkeypatch.setattr(module, "CHUNK", 8)
    pairs = list(capitals.forget.sample(20, 0))
    assert len({len(p.clean) for p in pairs}) > 1
    among = answer_tokens(capitals.forget)
    weights = [facts.weights[n].requires_grad_(True) for n in facts.linear_names]
    single, levels = [], []
    for pair in pairs:
        level = answer_advantage(last_logits(facts, collate([pair])), [pair], among)
        levels.append(level.detach())
        single.append(torch.cat([g.flatten() for g in torch.autograd.grad(level.sum(), weights)]))
    for w in weights:
        w.requires_grad_(False)
    kernel, found = tangent_kernel(facts, pairs, among)
    rows = torch.stack(single)
    assert torch.allclose(found, torch.cat(levels), atol=1e-4)
    assert torch.allclose(kernel, rows @ rows.T, rtol=1e-3, atol=1e-4 * float(kernel.max()))


def test_the_steps_teach_half_a(sixty: tuple[PairSet, PairSet]):
    """Each goes on from the one before; the model itself is left alone."""
    never = load_model("facts-capitals-reference-1")
    before = {name: w.clone() for name, w in never.weights.items()}
    few = sixty[0].sample(24, 0)
    found = linearized_relearning(never, few, few)
    assert found.half_a.shape == (module.STEPS, 24) and torch.equal(found.half_a, found.half_b)
    shares = found.half_a.float().mean(1)
    assert shares[0] < shares[-1] and shares[-1] > 0.95
    assert torch.equal(linearized_relearning(never, few, few, steps=1).half_a[0], found.half_a[0])
    assert all(torch.equal(before[name], w) for name, w in never.weights.items())


def test_one_step_is_the_damped_solution(facts: LanguageModel, sixty: tuple[PairSet, PairSet]):
    """Against J^T (K + damping)^-1 (log n - m) with single prompts' gradients in memory."""
    few = sixty[0].sample(6, 0)
    pairs, among = list(few), answer_tokens(few)
    weights = [facts.weights[n].requires_grad_(True) for n in facts.linear_names]
    rows, want = [], []
    for pair in pairs:
        level = answer_advantage(last_logits(facts, collate([pair])), [pair], among)
        want.append(len(among[pair.relation]))
        want[-1] = torch.tensor(float(want[-1])).log() - level.detach()[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(level.sum(), weights)]))
    for w in weights:
        w.requires_grad_(False)
    j = torch.stack(rows)
    kernel = j @ j.T
    damped = kernel + 0.1 * kernel.diagonal().mean() * torch.eye(6)
    delta = j.T @ torch.linalg.solve(damped, torch.stack(want))
    moved = facts.copy()
    module.gauss_newton_step(moved, few, 0.1)
    made = torch.cat([(moved.weights[n] - facts.weights[n]).flatten() for n in facts.linear_names])
    assert torch.allclose(made, delta, rtol=1e-2, atol=1e-3 * float(delta.abs().max()))


def test_a_step_is_as_long_as_serves_half_a(
    sixty: tuple[PairSet, PairSet], monkeypatch: pytest.MonkeyPatch
):
    never, half = load_model("facts-capitals-reference-0"), sixty[0]
    pairs, among = list(half), answer_tokens(half)
    certain = torch.tensor([len(among[p.relation]) for p in pairs]).log()

    def lacks(lengths: tuple[float, ...]) -> float:
        monkeypatch.setattr(module, "LENGTHS", lengths)
        moved = never.copy()
        module.gauss_newton_step(moved, half, module.DAMPING)
        with torch.no_grad():
            return float((certain - model_advantage(moved, pairs, among)).square().mean())

    single = [lacks((length,)) for length in (1.0, 0.5, 0.25)]
    assert min(single) < single[0] - 0.2  # the whole step goes too far
    assert lacks((1.0, 0.5, 0.25)) == pytest.approx(min(single))


def test_it_tells_hidden_from_gone(facts: LanguageModel, sixty: tuple[PairSet, PairSet]):
    known = linearized_relearning(facts, *sixty).half_b.float().mean(1)
    assert known.min() > 0.95
    never = linearized_relearning(load_model("facts-capitals-reference-1"), *sixty)
    assert never.half_b.float().mean(1).max() < 0.4
