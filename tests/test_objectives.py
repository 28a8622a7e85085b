"""Forget and retain losses, by formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, make_pairs

from mansu_interp.losses.answers import above_rivals, answer_gradient, divergence, log_probs, nll
from mansu_interp.losses.counterfactual import (
    CounterfactualTargets,
    answer_excess,
    counterfactual_loss,
    forget_gradient,
)
from mansu_interp.losses.gradients import gradient
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import Pair, PairSet, answer_tokens
from mansu_interp.tasks.task import Task

TinyModel = Callable[[int], LanguageModel]


def logp(model: LanguageModel, pair: Pair, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor([tokens or pair.clean])).logits[0, -1].log_softmax(-1)


def alone() -> Pair:
    """A pair without distractors, whose answer is token 0."""
    return replace(make_pairs((5,)).pairs[0], answer=0, counterfactual=9, distractors=())


def test_targets_are_the_mean_answer_to_the_corrupt_prompts(tiny_model: TinyModel, pairs: PairSet):
    """But for the answers, which share by frequency what is theirs together."""
    model = tiny_model(2)
    targets = CounterfactualTargets(model, pairs)
    assert len(targets.by_phrasing) == 4  # two pairs share the phrasing "of 6"
    both = [p for p in pairs if p.phrasing == "of 6"]
    mean = sum(logp(model, p, p.corrupt).exp() for p in both) / 2
    target, answers = targets(both[0]), sorted({p.answer for p in both})
    assert targets.answers[both[0].relation].tolist() == sorted({p.answer for p in pairs})
    others = [t for t in range(VOCAB) if t not in answers]
    assert torch.allclose(target[others], mean[others], atol=1e-6)
    assert len(answers) == 2
    assert torch.allclose(target[answers], mean[answers].sum() / 2, atol=1e-6)
    assert target.shape == (VOCAB,) and float(target.sum()) == pytest.approx(1)


def test_answers_share_by_frequency(tiny_model: TinyModel):
    """Within their phrasing; the only answer of a phrasing keeps what the corrupt prompts say."""
    model = tiny_model(2)
    asked = [replace(alone(), subject=s, answer=a) for s, a in zip("abc", (3, 4, 4), strict=True)]
    lonely = replace(alone(), phrasing="else", answer=5)
    targets = CounterfactualTargets(model, PairSet("some", (*asked, lonely)))
    target = targets(asked[0])
    assert float(target[4]) == pytest.approx(2 * float(target[3]), rel=1e-4)
    assert torch.allclose(targets(lonely), logp(model, lonely, lonely.corrupt).exp(), atol=1e-6)


def test_every_answer_has_its_share_of_the_target(facts: LanguageModel, capitals: Task):
    """Though few of 179 subjects are averaged, and the model knows them all."""
    targets = CounterfactualTargets(facts, capitals.forget)
    target = targets(capitals.forget[0])[targets.answers["capital"]]
    assert len(target) == 179 and float(target.sum()) > 0.9
    assert torch.allclose(target, target.mean().expand(179), rtol=1e-4)


def test_excess_by_hand(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    targets = CounterfactualTargets(model, pairs)
    among = {pairs[0].relation: torch.tensor(sorted({p.answer for p in pairs})[:3])}
    some = [p for p in pairs if p.answer in among[p.relation]]
    got = answer_excess(log_probs(model, some), targets.log(some), some, among)
    for value, pair in zip(got, some, strict=True):
        now, want = logp(model, pair), targets(pair).log()
        own = (now - want)[pair.answer]
        level = sum(float((now - want)[a]) for a in among[pair.relation]) / 3
        assert float(value) == pytest.approx(float(own) - level, abs=1e-4)


def test_no_excess_where_the_answer_is_in_the_midst_of_its_rivals():
    """The mean of log p, not the log of the sum, which one strong rival lifts above most."""
    pair = alone()
    flat = torch.full((1, VOCAB), 1 / VOCAB).log()
    among = {pair.relation: torch.arange(5)}
    row = torch.tensor([0.0, 4.0, -1.0, -1.0, -2.0, *[-9.0] * (VOCAB - 5)]).log_softmax(0)
    got = answer_excess(row[None], flat, [pair], among)
    assert float(got) == pytest.approx(0, abs=1e-5)
    assert torch.allclose(answer_excess(row[None] + 3, flat, [pair], among), got)


def test_counterfactual_loss_by_hand(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    targets = CounterfactualTargets(model, pairs)
    expected, ranking_weight = [], []
    now, want = log_probs(model, pairs.pairs), targets.log(pairs.pairs)
    high = answer_excess(now, want, pairs.pairs, targets.answers)
    for pair, above in zip(pairs, high.tolist(), strict=True):
        both = zip(targets(pair).tolist(), logp(model, pair).tolist(), strict=True)
        expected.append(sum(t * (math.log(t) - n) for t, n in both))
        ranking_weight.append(0.5 * abs(above + 1.0))
    loss = float(counterfactual_loss(model, pairs.pairs, targets))
    assert loss == pytest.approx(sum(expected) / 5, rel=1e-4)
    loss = float(counterfactual_loss(model, pairs.pairs, targets, ranking_weight=0.5, margin=1.0))
    assert loss == pytest.approx((sum(expected) + sum(ranking_weight)) / 5, rel=1e-4)
    assert sum(ranking_weight) > 0.1


def test_counterfactual_loss_vanishes_at_its_target(tiny_model: TinyModel):
    """With one pair a phrasing and corrupt = clean, the model is its own target."""
    model, pair = tiny_model(2), make_pairs((5,)).pairs[0]
    same = Pair(**{**vars(pair), "corrupt": pair.clean})
    targets = CounterfactualTargets(model, PairSet("same", (same,)))
    assert float(counterfactual_loss(model, [same], targets)) == pytest.approx(0, abs=1e-5)
    ranking_weight = counterfactual_loss(model, [same], targets, ranking_weight=2.0, margin=0.5)
    assert float(ranking_weight) == pytest.approx(2.0 * 0.5, abs=1e-4)


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
        model,
        [name],
        [lambda: counterfactual_loss(model, pairs.pairs, targets, ranking_weight=1.0)],
    )
    assert torch.allclose(whole, g, atol=1e-5 * float(g.abs().max()) + 1e-7)


def test_above_rivals_by_relation_in_the_order_of_the_pairs():
    torch.manual_seed(0)
    given = [replace(p, relation="abba"[k % 4]) for k, p in enumerate(make_pairs((4,) * 9))]
    answers, rows = answer_tokens(given), torch.randn(9, VOCAB)
    found = above_rivals(rows, given, answers, lambda some: some.mean(1))
    for value, row, p in zip(found, rows, given, strict=True):
        assert float(value) == pytest.approx(float(row[p.answer] - row[answers[p.relation]].mean()))
