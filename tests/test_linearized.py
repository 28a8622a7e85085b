"""Linearized relearning: the kernel against single gradients, and models whose past is known."""

from __future__ import annotations

import pytest
import torch

from mansu_interp.audit import linearized as module
from mansu_interp.audit.linearized import linearized_relearning, tangent_kernel
from mansu_interp.audit.probes import last_logits
from mansu_interp.audit.relearning import halves, of_subjects, rivals_within
from mansu_interp.audit.transfer import answer_advantage, model_advantage
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.pairs import PairSet, answer_tokens, collate
from mansu_interp.tasks.task import Task


@pytest.fixture(scope="module")
def split(capitals: Task) -> tuple[PairSet, PairSet]:
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


def test_the_steps_teach_half_a(split: tuple[PairSet, PairSet]):
    """Each goes on from the one before; the model itself is left alone."""
    never = load_model("facts-capitals-reference-1")
    before = {name: w.clone() for name, w in never.weights.items()}
    few = split[0].sample(24, 0)
    found = linearized_relearning(never, few, few)
    assert found.half_a.shape == (module.STEPS, 24) and torch.equal(found.half_a, found.half_b)
    shares = found.half_a.float().mean(1)
    assert shares[0] < shares[-1] and shares[-1] > 0.95
    assert torch.equal(linearized_relearning(never, few, few, steps=1).half_a[0], found.half_a[0])
    assert all(torch.equal(before[name], w) for name, w in never.weights.items())


def test_one_step_is_the_damped_solution(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    """Against J^T (K + damping)^-1 (log n - m) with single prompts' gradients in memory."""
    few = split[0].sample(6, 0)
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
    split: tuple[PairSet, PairSet], monkeypatch: pytest.MonkeyPatch
):
    never, half = load_model("facts-capitals-reference-0"), split[0]
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


def test_it_tells_hidden_from_gone(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    known = linearized_relearning(facts, *split).half_b.float().mean(1)
    assert known.min() > 0.95
    never = linearized_relearning(load_model("facts-capitals-reference-1"), *split)
    assert never.half_b.float().mean(1).max() < 0.4
