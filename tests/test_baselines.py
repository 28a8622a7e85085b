"""Each baseline against its formula, on numbers worked out by hand or by a loop of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checked import wrong_type
from conftest import make_pairs

from mansu_interp.errors import ConfigError
from mansu_interp.losses.answers import nll
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.baselines import dense
from mansu_interp.unlearning.baselines.dense import Objective, train_dense
from mansu_interp.unlearning.methods import (
    BASELINES,
    METHODS,
    RMU,
    SURE,
    DenseConfig,
    GradDiff,
    IdkDPO,
    MethodConfig,
    TaskVector,
    get_method,
)
from mansu_interp.unlearning.methods import method as register
from mansu_interp.unlearning.training import dev_choice
from mansu_interp.unlearning.unlearn import OBJECTIVES, unlearn

V = 4
#: Next-token probabilities of two pairs under the original and under the student.
ORIGINAL = [[0.7, 0.1, 0.1, 0.1], [0.25, 0.5, 0.125, 0.125]]
STUDENT = [[0.4, 0.2, 0.2, 0.2], [0.5, 0.25, 0.125, 0.125]]
ANSWER, OTHER = (0, 1), (1, 3)  # answers to forget, and the corrupt subjects' answers


NO_TASK: Any = Mock(spec=Task)


class Fixed(LanguageModel):
    """A model that says what it is told: pair k gets row k."""

    device = torch.device("cpu")

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.logits = torch.tensor(probabilities).log()

    def last_logits(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self.logits_at(tokens, torch.arange(len(tokens)), last)

    def logits_at(self, tokens: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.logits[tokens[rows, 0]] + 3.0  # a constant that must not matter


@pytest.fixture
def two() -> list[Any]:
    made = make_pairs((1, 1)).pairs
    return [
        replace(p, clean=(k,), answer=ANSWER[k], counterfactual=OTHER[k], distractors=())
        for k, p in enumerate(made)
    ]


def losses(method: str, two: list[Any], **settings: float) -> tuple[float, float | None]:
    """Forget and retain loss of the student, both on the two pairs."""
    made = OBJECTIVES[method](Fixed(ORIGINAL), NO_TASK, get_method(method)(**settings))
    student: Any = Fixed(STUDENT)
    return float(made.forget(student, two)), made.retain and float(made.retain(student, two))


# -log 0.4 and -log 0.25; the original says 0.7 and 0.5.
NLL = (-math.log(0.4) - math.log(0.25)) / 2
KL = (
    0.7 * math.log(0.7 / 0.4)
    + 3 * 0.1 * math.log(0.1 / 0.2)
    + 0.25 * math.log(0.25 / 0.5)
    + 0.5 * math.log(0.5 / 0.25)
) / 2


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def test_ascent_and_its_retain_terms(two: list[Any]):
    assert losses("ga", two) == (pytest.approx(-NLL), None)
    assert losses("graddiff", two) == (pytest.approx(-NLL), pytest.approx(NLL))
    assert losses("kl", two) == (pytest.approx(-NLL), pytest.approx(KL, rel=1e-5))


def test_npo(two: list[Any]):
    # b (NLL - NLL_ref) = b log(p_ref / p): 0.7 / 0.4 and 0.5 / 0.25.
    by_hand = sum(2 / 0.5 * softplus(-0.5 * math.log(r)) for r in (0.7 / 0.4, 2.0)) / 2
    assert losses("npo", two, beta=0.5) == (pytest.approx(by_hand), pytest.approx(KL, rel=1e-5))
    default = sum(20 * softplus(-0.1 * math.log(r)) for r in (0.7 / 0.4, 2.0)) / 2
    assert losses("npo", two)[0] == pytest.approx(default)


def test_simnpo(two: list[Any]):
    by_hand = sum(2 / 4.5 * softplus(-4.5 * (-math.log(p) - 0.3)) for p in (0.4, 0.25)) / 2
    assert losses("simnpo", two, delta=0.3) == (pytest.approx(by_hand), pytest.approx(NLL))


def test_dpo_prefers_the_counterfactual_answer(two: list[Any]):
    # p(win) / p(lose), student over original: (.2/.4) / (.1/.7) and (.125/.25) / (.125/.5).
    ratios = ((0.2 / 0.4) / (0.1 / 0.7), (0.125 / 0.25) / (0.125 / 0.5))
    by_hand = sum(2 / 0.1 * softplus(-0.1 * math.log(r)) for r in ratios) / 2
    assert losses("dpo", two) == (pytest.approx(by_hand), pytest.approx(NLL))


def test_idkdpo_prefers_the_first_admission_that_the_tokenizer_knows(two: list[Any]):
    original: Any = Fixed(ORIGINAL)
    original.name, original.encode = "fixed", lambda text: [9 if "know" in text else 2]
    original.tokenizer = type("T", (), {"unk_token_id": 9})
    made = OBJECTIVES["idkdpo"](original, NO_TASK, IdkDPO())
    ratios = ((0.2 / 0.4) / (0.1 / 0.7), (0.125 / 0.25) / (0.125 / 0.5))
    by_hand = sum(20 * softplus(-0.1 * math.log(r)) for r in ratios) / 2
    student: Any = Fixed(STUDENT)
    assert float(made.forget(student, two)) == pytest.approx(by_hand)
    original.encode = lambda text: [9]
    with pytest.raises(ConfigError, match=r"knows no first token of .* Use dpo"):
        OBJECTIVES["idkdpo"](original, NO_TASK, IdkDPO())


def test_undial(two: list[Any]):
    # The teacher's logit of the answer falls by log 2, i.e. its probability halves before
    # normalisation: (.35, .1, .1, .1) / .65 and (.25, .25, .125, .125) / .75.
    targets = [[0.35 / 0.65] + [0.1 / 0.65] * 3, [1 / 3, 1 / 3, 1 / 6, 1 / 6]]
    by_hand = (
        -sum(
            t * math.log(s)
            for want, got in zip(targets, STUDENT, strict=True)
            for t, s in zip(want, got, strict=True)
        )
        / 2
    )
    found = losses("undial", two, beta=math.log(2))
    assert found == (pytest.approx(by_hand), pytest.approx(NLL))


def test_weighed_ascent(two: list[Any]):
    wga = (0.4**2 * math.log(0.4) + 0.25**2 * math.log(0.25)) / 2
    assert losses("wga", two, beta=2.0) == (pytest.approx(wga), pytest.approx(NLL))
    satimp = (0.4**5 * 0.6 * math.log(0.4) + 0.25**5 * 0.75 * math.log(0.25)) / 2
    assert losses("satimp", two) == (pytest.approx(satimp), pytest.approx(NLL))


@pytest.mark.parametrize(("method", "weight"), [("wga", 0.4), ("satimp", 0.4**5 * 0.6)])
def test_weights_carry_no_gradient(two: list[Any], method: str, weight: float):
    student: Any = Fixed(STUDENT)
    student.logits.requires_grad_(True)
    made = OBJECTIVES[method](student, NO_TASK, get_method(method)())
    made.forget(student, two[:1]).backward()
    # d NLL / d logit of the answer = p - 1, times -weight.
    assert float(student.logits.grad[0, 0]) == pytest.approx(-weight * (0.4 - 1), rel=1e-5)


def test_rmu_pushes_one_layer(tiny_model: Callable[..., LanguageModel], pairs: PairSet):
    model, student = tiny_model(2), tiny_model(2).copy()
    with torch.no_grad():
        student.weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
    made = OBJECTIVES["rmu"](model, NO_TASK, RMU(layer=1, scale=3.0), 5)
    u = torch.rand(32, generator=torch.Generator().manual_seed(5))

    def states(m: LanguageModel) -> list[torch.Tensor]:
        """The input of layer 2 at the last token: the output of layer 1, counted from 0."""
        seen: list[torch.Tensor] = []
        hook = m.hf.model.layers[2].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0][0, -1]),
            with_kwargs=True,
        )
        with torch.no_grad():
            for pair in pairs:
                m.hf(torch.tensor([pair.clean]))
        hook.remove()
        return seen

    mine, theirs = states(student), states(model)
    away = sum(float(((h - 3 * u / u.norm()) ** 2).mean()) for h in mine) / len(mine)
    stay = sum(float(((a - b) ** 2).mean()) for a, b in zip(mine, theirs, strict=True)) / len(mine)
    assert float(made.forget(student, pairs.pairs)) == pytest.approx(away, rel=1e-4)
    assert made.retain and float(made.retain(student, pairs.pairs)) == pytest.approx(stay, rel=1e-4)
    assert stay > 1e-3
    with pytest.raises(ConfigError, match=r"The layer of rmu must lie in \[0, 2\) for tiny; got 2"):
        OBJECTIVES["rmu"](model, NO_TASK, RMU(layer=2))


def test_task_vector_takes_off_what_it_learnt(tiny_model: Callable[..., LanguageModel]):
    model, tuned = tiny_model(2), tiny_model(2).copy()
    name = "model.layers.0.mlp.up_proj.weight"
    tuned.weights[name] += 0.25
    made = OBJECTIVES["task-vector"](model, NO_TASK, TaskVector(scale=2.0))
    assert made.outcome and made.retain is None
    out = made.outcome(tuned)
    assert torch.allclose(out.weights[name], model.weights[name] - 0.5, atol=1e-6)
    assert torch.equal(out.weights["lm_head.weight"], model.weights["lm_head.weight"])


def test_sure_moves_the_rows_that_forgetting_pulls_most(facts: LanguageModel, capitals: Task):
    config = SURE(steps=2, lr=1e-3, batch_size=4, percentile=90.0)
    made = OBJECTIVES["sure"](facts, capitals, config)
    assert made.rows is not None
    # The same saliency by one ordinary backward pass.
    model = facts.copy()
    for name in model.linear_names:
        model.weights[name].requires_grad_(True)
    nll(model, capitals.forget.sample(96, 0).pairs).mean().backward()
    norms = {n: torch.linalg.vector_norm(model.weights[n].grad, dim=1) for n in made.rows}
    moving = torch.cat([norms[n][keep[:, 0]] for n, keep in made.rows.items()])
    still = torch.cat([norms[n][~keep[:, 0]] for n, keep in made.rows.items()])
    assert len(moving) == pytest.approx(0.1 * (len(moving) + len(still)), abs=1)
    assert float(moving.min()) > float(still.max()) * 0.999
    edited = unlearn(facts, capitals, None, config).model
    for name, weight in facts.weights.items():
        changed = (edited.weights[name] != weight).any(-1)
        keep = made.rows[name][:, 0] if name in made.rows else torch.zeros_like(changed)
        assert not (changed & ~keep).any(), name
        assert name not in made.rows or changed.sum() >= 0.8 * keep.sum(), name


def test_one_step_of_the_shared_loop_is_adamw_on_clipped_gradients(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """Two steps against a loop written out: gradient of forget + weight x retain, norm 1, Adam."""
    few = capitals.forget.pairs[:4]
    monkeypatch.setattr(dense.Sampler, "forget", lambda self: [list(few)])
    monkeypatch.setattr(dense.Sampler, "retain", lambda self: [list(few)])
    objective = Objective(
        lambda m, p: -nll(m, p).mean(), lambda m, p: (nll(m, p) ** 2).mean() + nll(m, p).mean()
    )
    objective = replace(objective, retain_weight=3.0)
    config = DenseConfig(steps=2, lr=1e-3, batch_size=4)
    found = train_dense(facts, capitals, config, objective).model
    name = "model.layers.1.mlp.down_proj.weight"
    model = facts.copy()
    first, second = ({n: torch.zeros_like(w) for n, w in model.weights.items()} for _ in range(2))
    for t in (1, 2):
        for w in model.weights.values():
            w.requires_grad_(True)
        x = nll(model, few)
        loss = -x.mean() + 3.0 * ((x**2).mean() + x.mean())
        grads = torch.autograd.grad(loss, list(model.weights.values()))
        norm = float(torch.cat([g.flatten() for g in grads]).norm())
        for w in model.weights.values():
            w.requires_grad_(False)
        for n, raw in zip(model.weights, grads, strict=True):
            g = raw * min(1.0, 1 / (norm + 1e-6))
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g * g
            step = first[n] / (1 - 0.9**t) / ((second[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            model.weights[n].sub_(1e-3 * step)
    moved = (found.weights[name] - facts.weights[name]).norm()
    assert float((found.weights[name] - model.weights[name]).norm()) < 2e-3 * float(moved)


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_moves_the_shipped_model(facts: LanguageModel, capitals: Task, method: str):
    before = float(nll(facts, capitals.forget.pairs[:64]).mean())
    config = get_method(method)(steps=6, lr=1e-3, batch_size=16)
    result = unlearn(facts, capitals, None, config)
    assert all(torch.isfinite(w).all() for w in result.model.weights.values())
    assert float(nll(result.model, capitals.forget.pairs[:64]).mean()) > before + 0.05
    assert (result.history[0].retain is not None) == (method not in ("ga", "task-vector"))


def test_the_registry_is_what_the_command_line_offers():
    assert tuple(OBJECTIVES) == BASELINES
    assert set(METHODS) - set(BASELINES) == {m for m in METHODS if m.startswith("mansu")}


def test_task_vectors_are_stopped_by_what_they_will_be(facts: LanguageModel, capitals: Task):
    """The tuned student knows the facts better; the level is looked for in its negation."""
    config = TaskVector(steps=40, lr=1e-3, batch_size=16, stop_at=0.6, scale=10.0)
    result = unlearn(facts, capitals, None, config)
    assert result.stopped_at < 40
    assert dev_choice(result.model, capitals) == result.history[-1].choice <= 0.6


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("npo", {"beta": 0.0}, "beta must be above 0; got 0.0"),
        ("dpo", {"beta": math.nan}, "beta must be above 0; got nan"),
        ("sure", {"percentile": 100.0}, "percentile must be at least 0 and below 100; got 100.0"),
        ("satimp", {"beta2": math.inf}, "beta2 must be finite; got inf"),
        ("rmu", {"layer": -1}, "layer must be at least 0; got -1"),
        ("kl", {"retain_weight": -0.5}, "retain_weight must be at least 0; got -0.5"),
        ("ga", {"lr": math.nan}, "lr must be above 0; got nan"),
        ("ga", {"stop_at": math.inf}, "stop_at must be finite; got inf"),
    ],
)
def test_settings_out_of_range(method: str, settings: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=f"^{message}"):
        get_method(method)(**settings)


def test_every_method_owns_its_settings():
    """One class each, whose defaults are valid, and no setting of another method."""
    own = {name: {f.name for f in fields(kind)} for name, kind in METHODS.items()}
    shared = {f.name for f in fields(MethodConfig)}
    assert own["npo"] - shared == {"retain_weight", "beta"}
    assert own["ga"] == shared and own["task-vector"] - shared == {"scale"}
    assert own["satimp"] - own["graddiff"] == {"beta1", "beta2"}
    for name, kind in METHODS.items():
        assert kind.method == name and kind().method == name
        assert ("mask" in kind.needs) == name.startswith("mansu")
    assert {n for n, kind in METHODS.items() if "circuit" in kind.needs} == {
        "mansu", "mansu-no-projection", "mansu-no-offsets", "mansu-no-floor",
    }  # fmt: skip
    assert all(get_method(n)().lr == 1e-4 for n in BASELINES)


@pytest.mark.parametrize("method", BASELINES)
def test_what_a_method_needs_is_what_its_loss_looks_at(two: list[Any], method: str):
    """The original is asked for predictions exactly by those that say so."""
    if method in ("sure", "rmu", "idkdpo"):
        return  # look at more than logits
    original: Any = Fixed(ORIGINAL)
    asked: list[int] = []
    real = original.logits_at
    original.logits_at = lambda *args: asked.append(1) or real(*args)
    kind = get_method(method)
    made = OBJECTIVES[method](original, NO_TASK, kind())
    student: Any = Fixed(STUDENT)
    made.forget(student, two)
    if made.retain:
        made.retain(student, two)
    assert bool(asked) == ("references" in kind.needs)


@wrong_type
def test_a_method_registers_once_and_needs_something_known():
    with pytest.raises(ConfigError, match="'npo' is taken"):
        register("npo")(GradDiff)
    with pytest.raises(ConfigError, match="needs something unknown"):
        register("new", needs=("magic",))(GradDiff)  # type: ignore[arg-type]
    assert get_method("npo") is not GradDiff and "new" not in METHODS
