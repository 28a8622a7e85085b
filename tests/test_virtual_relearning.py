"""Virtual relearning: the kernel against single gradients, and models whose past is known."""

from __future__ import annotations

import pytest
import torch

from mansu_interp import virtual_relearning as module
from mansu_interp.evidence import last_logits, ranking_margins
from mansu_interp.models import LanguageModel, load_model
from mansu_interp.pairs import PairSet, Task, answer_tokens, collate
from mansu_interp.relearning import halves, of_subjects, rivals_within
from mansu_interp.virtual_relearning import tangent_kernel, virtual_relearning


@pytest.fixture(scope="module")
def split(capitals: Task) -> tuple[PairSet, PairSet]:
    a, b = (rivals_within(of_subjects(capitals.forget, h)) for h in halves(capitals.forget, 0))
    return a.sample(60, 0), b.sample(60, 0)


@pytest.mark.parametrize("held", [module.HELD, 20_000])
def test_the_kernel_is_that_of_single_gradients(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch, held: int
):
    """Phrasings of different lengths, more than one block of rows, and one layer at a time."""
    monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(module, "CHUNK", 8)
    pairs = list(capitals.forget.sample(20, 0))
    assert len({len(p.clean) for p in pairs}) > 1
    among = answer_tokens(capitals.forget)
    weights = [facts.weights[n].requires_grad_(True) for n in facts.linear_names]
    single, levels = [], []
    for pair in pairs:
        level = ranking_margins(last_logits(facts, collate([pair])), [pair], among)
        levels.append(level.detach())
        single.append(torch.cat([g.flatten() for g in torch.autograd.grad(level.sum(), weights)]))
    for w in weights:
        w.requires_grad_(False)
    kernel, margins = tangent_kernel(facts, pairs, among)
    rows = torch.stack(single)
    assert torch.allclose(margins, torch.cat(levels), atol=1e-4)
    assert torch.allclose(kernel, rows @ rows.T, rtol=1e-3, atol=1e-4 * float(kernel.max()))


def test_the_step_makes_half_a_certain(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    """Asked for what it was computed on, the first-order change answers all of it."""
    never = load_model("facts-capitals-twin-1")
    few = split[0].sample(24, 0)
    assert virtual_relearning(never, few, few, 1e-3).linear.float().mean() > 0.95


def test_it_tells_hidden_from_gone(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    before = facts.weights["model.layers.1.mlp.down_proj.weight"].clone()
    known = virtual_relearning(facts, *split)
    assert known.linear.float().mean() > 0.95 and known.stepped.float().mean() > 0.95
    assert torch.equal(before, facts.weights["model.layers.1.mlp.down_proj.weight"])
    never = virtual_relearning(load_model("facts-capitals-twin-1"), *split)
    assert max(never.linear.float().mean(), never.stepped.float().mean()) < 0.4
