"""Forget and retain losses, by formula."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import VOCAB, make_pairs, make_tiny

from mansu_interp.audit.relearning import rivals_within
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.metrics import logit_diff
from mansu_interp.errors import TaskError
from mansu_interp.losses.accuracy import accuracy, answered_correctly, ranked_first, right
from mansu_interp.losses.answers import above_rivals, answer_gradient, divergence, log_probs, nll
from mansu_interp.losses.counterfactual import (
    CounterfactualTargets,
    answer_excess,
    counterfactual_loss,
    forget_gradient,
)
from mansu_interp.losses.gradients import gradient
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import (
    Pair,
    PairSet,
    Tokens,
    WholeAnswers,
    answer_tokens,
    clash,
    collate,
)
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import DPO, SimNPO, get_method
from mansu_interp.unlearning.training import HINGE, retain_loss, retain_target
from mansu_interp.unlearning.unlearn import OBJECTIVES

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


# Answers of several tokens, against loops over single positions; answers of one, bit for bit.


def make_whole(n: int = 12, seed: int = 0, normalise: bool = False) -> PairSet:
    """Random prompts whose answers have 1 to 4 tokens out of few, so that many begin alike."""
    rng = random.Random(seed)
    out = []
    for pair in make_pairs(tuple(rng.randint(2, 7) for _ in range(n)), seed):
        answers: list[Tokens] = []
        while len(answers) < 5:  # most of two tokens or more, so that there are always enough
            length = 1 if not answers and rng.random() < 0.3 else rng.randint(2, 4)
            new = tuple(rng.randint(1, 3) for _ in range(length))
            if not any(clash(new, old) for old in answers):
                answers.append(new)
        own, other, *rest = answers
        out.append(pair.with_answers(WholeAnswers(own, other, tuple(rest), normalise)))
    return PairSet("whole", tuple(out))


@torch.no_grad()
def slow_log_prob(model: LanguageModel, question: Tokens, answer: Tokens) -> float:
    """One forward pass for each token of the answer."""
    total = 0.0
    for k, token in enumerate(answer):
        text = torch.tensor([question + answer[:k]])
        total += float(model.all_logits(text)[0, -1].log_softmax(-1)[token])
    return total


@torch.no_grad()
def greedy(model: LanguageModel, question: Tokens, length: int) -> Tokens:
    text = list(question)
    for _ in range(length):
        text.append(int(model.all_logits(torch.tensor([text]))[0, -1].argmax()))
    return tuple(text[len(question) :])


@pytest.mark.parametrize("seed", range(3))
def test_pairs_end_where_answer_and_counterfactual_part(seed: int):
    rng = random.Random(seed)
    plain = make_pairs(tuple(rng.randint(2, 7) for _ in range(12)), seed)
    pairs = make_whole(12, seed)
    assert sum(bool(p.whole and p.whole.shared) for p in pairs) >= 1
    for p in pairs:
        assert p.whole is not None
        cut = len(p.question)
        assert p.clean[cut:] == p.corrupt[cut:] == p.answers[0][: len(p.clean) - cut]
        assert (*p.clean[cut:], p.answer) == p.answers[0][: len(p.clean) - cut + 1]
        assert (*p.clean[cut:], p.counterfactual) == p.rival[: len(p.clean) - cut + 1]
        assert len(p.distractors) == 3
        other = p.with_answers(WholeAnswers((1, 2), (3,), ((2,), (3, 1), (3, 2))))
        assert other.question == p.question and other.clean == p.question
    assert {p.question for p in pairs} == {p.clean for p in plain}


def test_answers_of_one_token_stay_plain():
    pair = make_pairs((4,)).pairs[0]
    plain = WholeAnswers(*[(pair.answer,), (pair.counterfactual,)], pair.answers[1:])
    assert pair.with_answers(plain) == pair and pair.whole is None
    longer = pair.with_answers(replace(plain, distractors=((1, 2), (3, 4), (5, 6))))
    assert longer.whole is not None and longer.clean == pair.clean


@pytest.mark.parametrize("other", [(1,), (1, 2), (1, 2, 3)])
def test_an_answer_that_begins_another_is_refused(other: Tokens):
    pair = make_pairs((4,)).pairs[0]
    for whole in (WholeAnswers((1, 2), other, ()), WholeAnswers((1, 2), (3,), (other,))):
        with pytest.raises(TaskError, match=r"'answer 0' and another one begin with each other\."):
            pair.with_answers(whole)


def test_nll_sums_over_all_tokens():
    model, pairs = make_tiny(2), make_whole()
    found = nll(model, pairs.pairs)
    for value, p in zip(found, pairs, strict=True):
        assert float(value) == pytest.approx(-slow_log_prob(model, p.question, p.answers[0]), 1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_choice_compares_whole_answers(normalise: bool):
    model, pairs = make_tiny(2), make_whole(24, 1, normalise)
    _, chosen = right(model, pairs.pairs)
    want = []
    for p in pairs:
        of = [slow_log_prob(model, p.question, a) / (len(a) if normalise else 1) for a in p.answers]
        want.append(of[0] > max(of[1:]))
    assert chosen.tolist() == want and 0 < sum(want) < 24
    assert accuracy(model, pairs).choice == sum(want) / 24
    kept = answered_correctly(model, pairs)
    assert kept is not None and len(kept) == sum(want)


def test_length_normalisation_matters():
    model = make_tiny(2)
    found = [right(model, make_whole(24, 1, n).pairs)[1].tolist() for n in (False, True)]
    assert found[0] != found[1]


def test_top1_is_greedy_decoding_of_the_whole_answer():
    model = make_tiny(2)
    pairs = []
    for k, p in enumerate(make_whole(10, 2)):
        said = greedy(model, p.question, 3)
        if k % 2:  # right but for its last token
            said = (*said[:-1], said[-1] % (VOCAB - 1) + 1)
        rivals = ((said[0] % (VOCAB - 1) + 1,), *(((said[0] + j) % VOCAB, 1) for j in (2, 3, 4)))
        pairs.append(p.with_answers(WholeAnswers(said, rivals[0], tuple(rivals[1:]))))
    said, _ = right(model, pairs)
    assert said.tolist() == [k % 2 == 0 for k in range(10)]


def test_attribution_takes_the_deciding_token():
    """Its metric is the logit difference where answer and counterfactual part."""
    model, pairs = make_tiny(4), make_whole(6, 3)
    found = attribute(model, pairs, config=AttributionConfig(ig_steps=1, metric="logit_diff"))
    want = []
    for p in pairs:
        assert p.whole is not None
        shared = p.answers[0][: p.whole.shared]
        with torch.no_grad():
            logits = model.all_logits(torch.tensor([p.question + shared]))[0, -1]
        want.append(float(logits[p.answers[0][len(shared)]] - logits[p.rival[len(shared)]]))
    assert found.clean == pytest.approx(sum(want) / len(want), rel=1e-4)


def test_rivals_within_takes_whole_answers():
    pairs = make_whole(12, 4)
    answers = {p.answers[0] for p in pairs} | {a for p in pairs for a in p.answers}
    for p, old in zip(rivals_within(pairs), pairs, strict=True):
        assert p.question == old.question and p.answers[0] == old.answers[0]
        assert len(set(p.answers)) == 4 and set(p.answers) <= answers


def test_a_gradient_at_some_elements_is_that_of_the_whole_weights_there():
    model, pairs = make_tiny(2), make_whole(6, 5).pairs
    names = [model.embedding_name, *model.linear_names[:2]]
    generator = torch.Generator().manual_seed(0)
    some = {n: torch.randperm(model.weights[n].numel(), generator=generator)[:20] for n in names}
    losses = [lambda p=p: nll(model, [p]).sum() for p in pairs]
    model.weights[names[0]].grad = own = torch.ones_like(model.weights[names[0]])
    whole, there = gradient(model, names, losses), gradient(model, some, losses)
    assert model.weights[names[0]].grad is own and not own.sub(1).any()
    for name, g, part in zip(names, whole, there, strict=True):
        assert not model.weights[name].requires_grad and part.any()
        assert torch.equal(part, g.flatten()[some[name]])
    with torch.enable_grad():
        weight = model.weights[names[1]].requires_grad_(True)
        total = torch.stack([loss() for loss in losses]).sum()
        assert torch.allclose(torch.autograd.grad(total, weight)[0], whole[1], atol=1e-6)
        weight.requires_grad_(False)
    assert not any(g.any() for g in gradient(model, some, []))


def test_the_retain_loss_holds_every_token():
    model, student, pairs = make_tiny(2), make_tiny(2).copy(), make_whole(8, 5)
    with torch.no_grad():
        for name, w in student.weights.items():
            w.mul_(1 + 0.05 * len(name) % 0.2)
    kls, lost = [], []
    _, chosen = right(model, pairs.pairs)
    with torch.no_grad():
        for p, ok in zip(pairs, chosen, strict=True):
            for k in range(len(p.answers[0])):
                text = torch.tensor([p.question + p.answers[0][:k]])
                kls.append(
                    float(
                        divergence(student.all_logits(text)[0, -1], model.all_logits(text)[0, -1])
                    )
                )
            gap = slow_log_prob(model, p.question, p.answers[0])
            gap -= slow_log_prob(student, p.question, p.answers[0])
            lost.append(max(0.0, gap + HINGE) * bool(ok))
    want = sum(kls) / len(kls) + 2 * sum(lost) / len(lost)
    assert float(retain_loss(student, retain_target(model, pairs.pairs, 2.0))) == pytest.approx(
        want, rel=1e-3
    )
    assert any(lost)


def test_losses_of_baselines_by_token():
    model, pairs = make_tiny(2), make_whole(5, 6).pairs
    student = model.copy()
    with torch.no_grad():
        student.weights["lm_head.weight"].mul_(1.1)

    def tokens(m: LanguageModel, p: Pair) -> list[float]:
        a = p.answers[0]
        return [slow_log_prob(m, p.question + a[:k], a[k : k + 1]) for k in range(len(a))]

    def loss(method: str) -> float:
        return float(
            OBJECTIVES[method](model, Mock(spec=Task), get_method(method)()).forget(student, pairs)
        )

    by = [tokens(student, p) for p in pairs]
    mean = lambda values: sum(values) / len(pairs)  # noqa: E731
    assert loss("ga") == pytest.approx(mean(sum(t) for t in by), rel=1e-4)
    assert loss("wga") == pytest.approx(mean(sum(x * math.exp(x) for x in t) for t in by), rel=1e-4)
    b = SimNPO().beta
    want = mean(2 / b * math.log1p(math.exp(b * sum(t) / len(t))) for t in by)
    assert loss("simnpo") == pytest.approx(want, rel=1e-4)
    b, ratios = DPO().beta, []
    for p in pairs:
        win, lose = (
            slow_log_prob(student, p.question, a) - slow_log_prob(model, p.question, a)
            for a in (p.rival, p.answers[0])
        )
        ratios.append(2 / b * math.log1p(math.exp(-b * (win - lose))))
    assert loss("dpo") == pytest.approx(mean(ratios), rel=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_answers_of_one_token_give_the_same_bits_as_one_position(kv_heads: int):
    """Losses, gradients and scores against the formulas of a single position."""
    model = make_tiny(kv_heads)
    shared = tuple(range(1, 31))  # long enough that the prefix is computed once
    pairs = [
        replace(p, clean=shared + p.clean, corrupt=shared + p.corrupt)
        for p in make_pairs((4, 6, 6, 3, 7, 5))
    ]
    batch, weight = collate(pairs), model.weights["model.layers.1.mlp.up_proj.weight"]
    weight.requires_grad_(True)
    try:
        answers = batch.answer[:, None]
        old = -log_probs(model, pairs).gather(1, answers)[:, 0]
        new = nll(model, pairs)
        assert torch.equal(old, new)
        slopes = [torch.autograd.grad(x.mean(), weight)[0] for x in (old, new)]
        assert torch.equal(*slopes)
    finally:
        weight.requires_grad_(False)
    student = model.copy()
    with torch.no_grad():
        student.weights["lm_head.weight"].mul_(1.3)
        want = model.last_logits(batch.clean, batch.last)
        got = student.last_logits(batch.clean, batch.last)
        lost = want.log_softmax(-1).gather(1, answers) - got.log_softmax(-1).gather(1, answers)
        hinge = (lost[:, 0] + HINGE).relu() * ranked_first(want, batch.choices)
        assert torch.equal(
            retain_loss(student, retain_target(model, pairs, 0.7)),
            divergence(got, want) + 0.7 * hinge.mean(),
        )
        said, chosen = right(model, pairs)
        assert torch.equal(said, want.argmax(-1) == batch.answer)
        assert torch.equal(chosen, ranked_first(want, batch.choices))
        assert torch.equal(logit_diff(want, batch, want), want[range(6), batch.answer] - want[
            range(6), batch.counterfactual])  # fmt: skip


def test_whole_and_plain_scores_agree_on_one_token():
    """The slow path on pairs that need not take it."""
    model, pairs = make_tiny(2), make_pairs((4, 6, 6, 3, 7, 5, 4, 4))
    mixed = [*pairs, *make_whole(1)]
    both = zip(right(model, pairs.pairs), right(model, mixed), strict=True)
    assert all(a.tolist() == b[: len(pairs)].tolist() for a, b in both)


def test_clash_is_symmetric():
    for a, b in itertools.product([(1,), (1, 2), (2, 1), (1, 2, 3)], repeat=2):
        assert clash(a, b) == clash(b, a) == (a[: len(b)] == b or b[: len(a)] == a)
