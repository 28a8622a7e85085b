"""Forget and retain losses, by formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import VOCAB, make_pairs

from mansu_interp.models import LanguageModel
from mansu_interp.nullspace import gradient
from mansu_interp.objectives import (
    CounterfactualTargets,
    answer_gradient,
    counterfactual_loss,
    divergence,
    forget_gradient,
    nll,
)
from mansu_interp.pairs import Pair, PairSet

TinyModel = Callable[[int], LanguageModel]


def logp(model: LanguageModel, pair: Pair, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor([tokens or pair.clean])).logits[0, -1].log_softmax(-1)


def test_targets_are_the_mean_answer_to_the_corrupt_prompts(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    targets = CounterfactualTargets(model, pairs)
    assert len(targets.by_phrasing) == 4  # two pairs share the phrasing "of 6"
    both = [p for p in pairs if p.phrasing == "of 6"]
    expected = sum(logp(model, p, p.corrupt).exp() for p in both) / 2
    assert torch.allclose(targets(both[0]), expected, atol=1e-6)
    assert targets(both[0]).shape == (VOCAB,)
    assert float(targets(both[0]).sum()) == pytest.approx(1)
    assert targets.answers[both[0].relation].tolist() == sorted({p.answer for p in pairs})


def test_counterfactual_loss_by_hand(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    targets = CounterfactualTargets(model, pairs)
    expected, pushed = [], []
    for pair in pairs:
        target, now = targets(pair), logp(model, pair)
        both = zip(target.tolist(), now.tolist(), strict=True)
        kl = sum(t * (math.log(t) - n) for t, n in both)
        rivals = sorted({p.answer for p in pairs})
        share = [float(p[pair.answer] / p[rivals].sum()) for p in (now.exp(), target)]
        expected.append(kl)
        pushed.append(kl + 0.5 * abs(math.log(share[0]) - math.log(share[1]) + 1.0))
    loss = float(counterfactual_loss(model, pairs.pairs, targets))
    assert loss == pytest.approx(sum(expected) / 5, rel=1e-4)
    loss = float(counterfactual_loss(model, pairs.pairs, targets, push=0.5, margin=1.0))
    assert loss == pytest.approx(sum(pushed) / 5, rel=1e-4)
    assert pushed != expected


def test_counterfactual_loss_vanishes_at_its_target(tiny_model: TinyModel):
    """With one pair a phrasing and corrupt = clean, the model is its own target."""
    model, pair = tiny_model(2), make_pairs((5,)).pairs[0]
    same = Pair(**{**vars(pair), "corrupt": pair.clean})
    targets = CounterfactualTargets(model, PairSet("same", (same,)))
    assert float(counterfactual_loss(model, [same], targets)) == pytest.approx(0, abs=1e-5)
    hinge = counterfactual_loss(model, [same], targets, push=2.0, margin=0.25)
    assert float(hinge) == pytest.approx(0.5, abs=1e-4)


def test_nll_and_its_gradient(tiny_model: TinyModel, pairs: PairSet):
    model, name = tiny_model(2).copy(), "model.layers.2.mlp.down_proj.weight"
    losses = nll(model, pairs.pairs).detach()
    by_hand = torch.stack([-logp(model, p)[p.answer] for p in pairs])
    assert torch.allclose(losses, by_hand, atol=1e-4)
    g = answer_gradient(model, [name], pairs, batch_size=2)[name]
    (whole,) = gradient(model, [name], [lambda: nll(model, pairs.pairs).mean()])
    assert torch.allclose(g, whole, atol=1e-5 * float(whole.abs().max()) + 1e-7)
    model.weights[name] += 0.1 * g / g.norm()
    assert float(nll(model, pairs.pairs).mean()) > float(losses.mean())


def test_divergence_is_kl_from_the_teacher():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(divergence(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(teacher, teacher)) == 0


def test_forget_gradient_is_a_mean_over_pairs(tiny_model: TinyModel, pairs: PairSet):
    model, name = tiny_model(2), "model.layers.1.mlp.up_proj.weight"
    whole = forget_gradient(model, [name], pairs, batch_size=16)[name]
    parts = forget_gradient(model, [name], pairs, batch_size=2)[name]
    assert torch.allclose(whole, parts, atol=1e-5 * float(whole.abs().max()) + 1e-7)
    targets = CounterfactualTargets(model, pairs)
    (g,) = gradient(
        model, [name], [lambda: counterfactual_loss(model, pairs.pairs, targets, push=1.0)]
    )
    assert torch.allclose(whole, g, atol=1e-5 * float(g.abs().max()) + 1e-7)
