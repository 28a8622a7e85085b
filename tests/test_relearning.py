"""The relearning attack: its halves and rivals, and what it finds where the past is known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checked import wrong_type

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.relearning import (
    ERASED_LEVEL,
    Point,
    Relearning,
    RelearningMeta,
    batches,
    halves,
    is_erased,
    of_subjects,
    relearn,
    relearning_lines,
    rivals_within,
)
from mansu_interp.errors import ConfigError, TaskError
from mansu_interp.losses.answers import nll
from mansu_interp.losses.counterfactual import CounterfactualTargets
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.mansu.adversarial import AdversarialRelearning, ranking_loss
from mansu_interp.unlearning.methods import Mansu

QUICK = RelearnConfig(steps=(10,), rates=(1e-3,))


@pytest.mark.parametrize(
    ("first", "last", "erased"),
    [
        (0.25, 0.25, True),
        (ERASED_LEVEL, ERASED_LEVEL, True),
        (ERASED_LEVEL + 1e-6, 0.0, False),
        (0.0, ERASED_LEVEL + 1e-6, False),  # ranked last systematically: given away as well
    ],
)
def test_erased_is_chance_and_a_tolerance_for_first_and_last(
    first: float, last: float, erased: bool
):
    assert pytest.approx(0.40) == ERASED_LEVEL
    assert is_erased(first, last) is erased
    start, after = Point(0.1, 0, 0.0, 0.25, 0.3, 0.25), Point(0.1, 20, 0.0, first, 1.0, last)
    found = Relearning([start, after], (9, 9))
    assert found.erased is erased


def test_what_was_found_comes_back_from_json():
    config = RelearnConfig(steps=(5, 10), rates=(1e-3,), seed=2)
    points = [Point(1e-3, 5, 0.1, 0.2, 0.3, 0.4), Point(1e-3, 10, 0.0, 0.5, 1.0, 0.25)]
    found = Relearning(points, (7, 8), RelearningMeta("edited", "capitals", "dev", config))
    values = json.loads(json.dumps(found.to_json()))
    assert set(values["points"][0]) == {"rate", "steps", "top1", "choice", "half_a", "last"}
    assert Relearning.from_json(values) == found


def test_halves_are_disjoint_seeded_and_by_subject(capitals: Task):
    first, second = halves(capitals.forget, 0)
    assert not first & second
    assert first | second == {p.subject for p in capitals.forget}
    assert 0 <= len(first) - len(second) <= 1
    assert halves(capitals.forget, 0) == (first, second)
    assert halves(capitals.forget, 1) != (first, second)
    with pytest.raises(TaskError, match="at least two forget subjects to split; got 1"):
        halves(capitals.forget[:1], 0)


def test_both_halves_must_be_scored(capitals: Task):
    """Few scored prompts can all be about half A: that is said before the attack."""
    first, _ = halves(capitals.forget, 0)
    scored = {"few": of_subjects(capitals.forget, first).sample(3, 0)}
    task = replace(capitals, scored={"dev": {"forget": scored}})
    with pytest.raises(TaskError, match="3 scored prompts of 'few' all fall into one half"):
        relearn(load_model(capitals.reference_models[0]), task, config=QUICK, split="dev")


def test_rivals_are_the_halfs_own_answers(capitals: Task):
    _, second = halves(capitals.forget, 0)
    asked = rivals_within(of_subjects(capitals.forget, second))
    own = {p.answer for p in asked}
    for pair in asked:
        assert len(pair.distractors) == 3
        assert set(pair.distractors) <= own - {pair.answer}
    few = rivals_within(PairSet("few", capitals.forget.pairs[:2]))
    assert all(len(set(p.choices)) == 4 for p in few)  # filled up with the pair's own


def test_batches_use_every_pair_before_any_twice(capitals: Task):
    pairs = list(capitals.forget[:10])
    supply = batches(pairs, 4, seed=3)
    seen = [p for _ in range(5) for p in next(supply)]
    assert set(seen[:10]) == set(pairs) and set(seen[10:]) == set(pairs)


def test_the_attack_tells_a_reference_model_from_a_hidden_one(facts: LanguageModel, capitals: Task):
    before = {n: w.clone() for n, w in facts.weights.items()}
    known = relearn(facts, capitals, config=QUICK, split="dev")
    never = relearn(load_model(capitals.reference_models[0]), capitals, config=QUICK, split="dev")
    again = relearn(load_model(capitals.reference_models[0]), capitals, config=QUICK, split="dev")
    assert known.at(0) == known.at(10) == 1.0
    assert never.up_to(10) < 0.4 and never.up_to(10, "last") < 0.4 and never.at(10, "top1") == 0
    assert never.points == again.points  # by seed
    assert never.marks == [0, 10]
    assert all(torch.equal(before[n], w) for n, w in facts.weights.items())
    lines = relearning_lines({"known": known, "never taught": never})
    assert "dev phrasings" in lines[0] and lines[-2].endswith("1.000 / 0.000 / 1.000")


def test_an_attack_learns_its_half(capitals: Task):
    never = load_model(capitals.reference_models[0])
    found = relearn(never, capitals, config=replace(QUICK, steps=(40,)), split="dev")
    assert found.at(40, "half_a") > 0.9
    assert found.at(40) < 0.4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": (20, 10)}, "steps must be positive and ascending"),
        ({"rates": ()}, "rates must be positive"),
        pytest.param({"optimiser": "lion"}, "Unknown optimiser 'lion'", marks=wrong_type),
    ],
)
def test_bad_settings(wrong: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        RelearnConfig(**wrong)  # type: ignore[arg-type]


def test_ranking_loss_by_hand(facts: LanguageModel, capitals: Task):
    """Against uniform targets it is what the answer's log p has above the mean of the answers'."""
    pairs = list(capitals.forget[:3])
    targets = CounterfactualTargets(facts, PairSet("few", tuple(pairs)))
    for key, value in targets.by_phrasing.items():
        targets.by_phrasing[key] = torch.full_like(value, 1 / len(value))
    among = {"capital": torch.tensor([p.answer for p in pairs])}
    full = torch.stack([-nll(facts, [replace(p, answer=a.answer)]) for p in pairs for a in pairs])
    above = full.view(3, 3).diagonal() - full.view(3, 3).mean(1)
    want = (above + 0.25).abs().mean()
    assert ranking_loss(facts, pairs, targets, among, 0.25) == pytest.approx(float(want), abs=1e-4)


def test_the_attackers_gradient_is_at_the_relearned_point(facts: LanguageModel, capitals: Task):
    name = "model.layers.1.mlp.down_proj.weight"
    targets = CounterfactualTargets(facts, capitals.forget)
    config = Mansu(adversarial_steps=3, batch_size=8, adversarial_lr=0.003)
    before = facts.weights[name].clone()
    first, loss = AdversarialRelearning(capitals, config).gradient(facts, [name], targets)
    again, _ = AdversarialRelearning(capitals, config).gradient(facts, [name], targets)
    other, _ = AdversarialRelearning(capitals, config, seed=1).gradient(facts, [name], targets)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert loss > 1  # the shipped model knows every capital
    assert torch.equal(before, facts.weights[name])
    adversary = AdversarialRelearning(capitals, config, seed=2)
    attack = adversary.draw()
    copy = adversary.relearned(facts, attack)
    assert len({p.subject for p in attack.unseen}) == 89
    assert not torch.equal(copy.weights[name], facts.weights[name])


def test_the_attack_follows_the_precision(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """bf16 in the loop: much the same relearning, and the same gradient in direction."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    name = "model.layers.1.mlp.down_proj.weight"
    targets = CounterfactualTargets(facts, capitals.forget)
    config = Mansu(adversarial_steps=8, batch_size=16, adversarial_lr=0.003)
    low = replace(config, precision="bf16")
    attack = AdversarialRelearning(capitals, config, seed=2).draw()
    assert attack.steps > 1
    full, short = (
        AdversarialRelearning(capitals, c, seed=2).relearned(facts, attack) for c in (config, low)
    )
    moved = full.weights[name] - facts.weights[name]
    off = (short.weights[name] - full.weights[name]).norm() / moved.norm()
    assert 0 < off < 0.3
    one, two = (
        AdversarialRelearning(capitals, c, seed=2).gradient(facts, [name], targets)[0][0].flatten()
        for c in (config, low)
    )
    assert not torch.equal(one, two)
    assert torch.cosine_similarity(one, two, dim=0) > 0.9
