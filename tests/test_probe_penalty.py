"""The probe penalty: what the probe reads by hand, and the gradient against it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mansu_interp.audit.probes import answer_rows, fit_probe, last_states
from mansu_interp.masks.select import random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import answer_tokens
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.mansu.probe_penalty import ProbePenalty, z_scores
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn

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
