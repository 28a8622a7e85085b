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
from mansu_interp.losses.low_rank import Adapters
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.baselines import dense
from mansu_interp.unlearning.baselines.dense import Objective, train_dense
from mansu_interp.unlearning.baselines.durableun import int4, ramp
from mansu_interp.unlearning.baselines.repselect import collapse
from mansu_interp.unlearning.baselines.undo import (
    UnlearnNoiseDistil,
    prompt_kl,
    shrink_and_perturb,
)
from mansu_interp.unlearning.methods import (
    BASELINES,
    METHODS,
    RMU,
    SURE,
    UNDO,
    DenseConfig,
    GradDiff,
    IdkDPO,
    RepSelect,
    TaskVector,
    get_method,
)
from mansu_interp.unlearning.methods import method as register
from mansu_interp.unlearning.registry import MethodConfig
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
    assert (result.history[0].retain is not None) == (
        method not in ("ga", "task-vector", "repselect")
    )


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
        ("npo-sam", {"rho": 0.0}, "rho must be above 0; got 0.0"),
        ("repselect", {"components": 0}, "components must be at least 1; got 0"),
        ("undo", {"noise": -0.1}, "noise must be at least 0 and at most 1; got -0.1"),
        ("undo", {"unlearn_share": 1.0}, "unlearn_share must be above 0 and below 1; got 1.0"),
        ("undo", {"steps": 1}, "undo unlearns and distils: it needs 2 steps; got 1"),
        ("lora", {"rank": 0}, "rank must be at least 1; got 0"),
        ("durableun", {"warmup": 1.0}, "warmup must be at least 0 and below 1; got 1.0"),
        ("durableun", {"quantized_weight": -1.0}, "quantized_weight must be at least 0; got -1"),
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
    assert all(get_method(n)().lr == (1e-3 if n == "lora" else 1e-4) for n in BASELINES)


@pytest.mark.parametrize("method", BASELINES)
def test_what_a_method_needs_is_what_its_loss_looks_at(two: list[Any], method: str):
    """The original is asked for predictions exactly by those that say so."""
    if method in ("sure", "rmu", "idkdpo", "repselect", "lora"):
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


# Methods with a loop of their own, on matrices small enough to work out.


class Toy(LanguageModel):
    """Weights, and nothing that computes: losses look at them."""

    name, device = "toy", torch.device("cpu")
    linear_names: Any = ("w",)

    def __init__(self, **weights: list[Any]) -> None:
        self.weights = {n: torch.tensor(w) for n, w in weights.items()}

    def copy(self, sharing: Any = ()) -> LanguageModel:
        made = Toy()
        made.weights = {n: w.clone() for n, w in self.weights.items()}
        return made


def own_loop(method: str, model: LanguageModel, loss: Any, **settings: Any) -> Any:
    """The loop of a method on another forget loss, ready to be differentiated."""
    config = get_method(method)(**settings)
    made = OBJECTIVES[method](model, NO_TASK, config, 0)
    assert made.loop and isinstance(config, DenseConfig)
    loop = made.loop(model, replace(made, forget=loss), config, 0)
    for w in getattr(loop, "weights", ()):
        w.requires_grad_(True)
    return loop


def test_npo_sam_takes_the_gradient_at_the_ascent_point(two: list[Any]):
    """loss = (3 a^2 + 2 b^2) / 2 at a = 1, b = 2: g = (3, 4), of length 5, so that rho = 0.5 leads
    to (1.3, 2.4), where the gradient is (3.9, 4.8)."""
    curve = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    seen = []

    def loss(student: LanguageModel, _: Any) -> torch.Tensor:
        seen.append(student.weights["w"].detach().clone())
        return 0.5 * (curve * student.weights["w"] ** 2).sum()

    loop = own_loop("npo-sam", Toy(w=[[1.0, 0.0], [0.0, 2.0]]), loss, rho=0.5)
    assert loop.forget_gradient([two], 0) == pytest.approx(5.5)
    assert torch.allclose(seen[1], torch.tensor([[1.3, 0.0], [0.0, 2.4]]))
    assert torch.allclose(loop.weights[0].grad, torch.tensor([[3.9, 0.0], [0.0, 4.8]]))
    assert torch.equal(loop.weights[0], seen[0])  # back where it was, bit for bit


def test_npo_sam_is_npo_but_for_the_ascent(facts: LanguageModel, capitals: Task):
    settings: dict[str, Any] = {"steps": 2, "batch_size": 8}
    plain = unlearn(facts, capitals, None, get_method("npo")(**settings))
    near = unlearn(facts, capitals, None, get_method("npo-sam")(**settings, rho=1e-9))
    far = unlearn(facts, capitals, None, get_method("npo-sam")(**settings))
    assert near.history[0] == plain.history[0] == far.history[0]
    name = "model.layers.1.mlp.up_proj.weight"
    step = plain.model.weights[name] - facts.weights[name]
    gap = [(r.model.weights[name] - plain.model.weights[name]).norm() for r in (near, far)]
    assert gap[0] < 0.01 * step.norm() < gap[1]


def test_durableun_sees_the_codes_and_passes_their_gradient_straight_through(two: list[Any]):
    """Rows' scales are 7 / 7 and 1.4 / 7: codes 7, 3 and -7, 3. Loss -w^2 / 2: gradient -w."""
    rounded = torch.tensor([[7.0, 3.0], [-1.4, 0.6]])
    start = [[7.0, 3.4], [-1.4, 0.52]]
    seen = []

    def loss(student: LanguageModel, _: Any) -> torch.Tensor:
        seen.append(student.weights["w"].detach().clone())
        return -0.5 * (student.weights["w"] ** 2).sum()

    assert torch.allclose(int4(torch.tensor(start)), rounded)
    assert torch.equal(int4(torch.zeros(2, 2)), torch.zeros(2, 2))
    loop = own_loop("durableun", Toy(w=start), loss, steps=6, quantized_weight=3.0, warmup=1 / 3)
    for done, weight in ((1, 0.0), (2, 1.5), (5, 3.0)):
        seen.clear()
        loop.weights[0].grad = None
        loop.forget_gradient([two], done)
        assert len(seen) == 1 + (weight > 0) and torch.equal(seen[0], torch.tensor(start))
        assert not weight or torch.allclose(seen[1], rounded)
        want = -torch.tensor(start) - weight * rounded  # at the extremes, too: nothing is clipped
        assert torch.allclose(loop.weights[0].grad, want)
        assert torch.equal(loop.weights[0], torch.tensor(start))
    assert [ramp(d, 300, 1 / 3) for d in (99, 100, 149, 199, 299)] == [0, 0.01, 0.5, 1, 1]


def test_adapters_by_the_chain_rule():
    """W + 2 BA with A = (1 2), B = (1 0 -1): dA = 2 B'G, dB = 2 GA'."""
    model = Toy(w=[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    adapters = Adapters(model, ["w"], 1, 0)
    assert not adapters.up["w"].any() and adapters.down["w"].shape == (1, 2)
    adapters.down["w"] = torch.tensor([[1.0, 2.0]])
    adapters.up["w"] = torch.tensor([[1.0], [0.0], [-1.0]])
    adapters.write()
    assert model.weights["w"].tolist() == [[3.0, 4.0], [0.0, 1.0], [-1.0, -3.0]]
    adapters.gradients("w", torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]))
    assert adapters.down["w"].grad.tolist() == [[-8.0, -10.0]]
    assert adapters.up["w"].grad.tolist() == [[10.0], [22.0], [38.0]]


def test_lora_edits_linear_weights_within_its_rank(facts: LanguageModel, capitals: Task):
    config = get_method("lora")(steps=3, batch_size=8, rank=2)
    edited = unlearn(facts, capitals, None, config).model
    for name, weight in facts.weights.items():
        change = edited.weights[name] - weight
        if name in facts.linear_names:
            sizes = torch.linalg.svdvals(change)
            assert sizes[1] > 0 and sizes[2] < 1e-4 * sizes[0], name
        else:
            assert not change.any(), name


def test_repselect_collapses_on_both_sides():
    """Of diag(4, 2, 1) with two components: hard leaves 1; soft multiplies 4 by (2/4)^2."""
    diagonal = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    hard, soft = collapse(diagonal, 2, hard=True), collapse(diagonal, 2)
    assert torch.allclose(hard, torch.diag(torch.tensor([0.0, 0.0, 1.0])), atol=1e-6)
    assert torch.allclose(soft, torch.diag(torch.tensor([1.0, 2.0, 1.0])), atol=1e-5)
    drawn = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    out = collapse(drawn, 3, hard=True)
    assert float((left[:, :3].T @ out).abs().max()) < 1e-5
    assert float((out @ right[:3].T).abs().max()) < 1e-5 < float(out.abs().max())
    assert not collapse(torch.zeros(2, 3), 1).any()


def test_repselect_follows_the_forget_gradient(facts: LanguageModel, capitals: Task):
    """Against one ordinary backward pass, with nothing elicited."""
    few = replace(capitals, forget=capitals.forget.sample(32, 0))
    config = RepSelect(steps=3, batch_size=8, elicit_lr=0.0, components=2, collapse="hard")
    names = [n for n in facts.linear_names if ".mlp." in n]
    model = facts.copy()
    for n in names:
        model.weights[n].requires_grad_(True)
    (-nll(model, few.forget.pairs).mean()).backward()
    want = {n: collapse(model.weights[n].grad, 2, hard=True) for n in names}
    size = torch.cat([w.flatten() for w in want.values()]).square().mean().sqrt()
    found = unlearn(facts, few, None, config)
    for n, w in facts.weights.items():
        moved = found.model.weights[n] - w
        if n in want:
            along = -3 * config.lr * want[n] / size
            assert float((moved - along).norm()) < 1e-2 * float(along.norm()), n
        else:
            assert not moved.any(), n
    elicited = unlearn(facts, few, None, replace(config, elicit_lr=0.1)).model
    assert not torch.equal(elicited.weights[names[0]], found.model.weights[names[0]])


def test_undo_noises_by_its_formula():
    """(1 - a) w + a s N, N in +-sqrt(6 / (200 + 400)) = +-0.1 and uniform; vectors only shrink."""
    draws = torch.Generator().manual_seed(3)
    w = torch.randn(200, 400, generator=draws)
    noise = (shrink_and_perturb(w, 0.25, 0.5, draws) - 0.75 * w) / (0.25 * 0.5)
    assert 0.0995 < float(noise.abs().max()) < 0.1001
    assert float(noise.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.01)
    assert torch.equal(shrink_and_perturb(w[0], 0.25, 0.5, draws), 0.75 * w[0])
    assert torch.equal(shrink_and_perturb(w, 0.0, 0.5, draws), w)


def test_undo_distils_every_token_of_the_prompts(
    tiny_model: Callable[..., LanguageModel], pairs: PairSet
):
    teacher, student = tiny_model(2), tiny_model(2).copy()
    student.weights["lm_head.weight"].mul_(1.3)
    by_hand = []
    for pair in pairs:
        with torch.no_grad():
            p, q = (
                m.hf(torch.tensor([pair.clean])).logits[0].softmax(-1) for m in (teacher, student)
            )
        by_hand += (p * (p / q).log()).sum(-1).tolist()
    want = sum(by_hand) / len(by_hand)
    assert float(prompt_kl(student, teacher, pairs.pairs)) == pytest.approx(want, rel=1e-4)


def test_undo_unlearns_then_noises_then_learns_from_the_unlearned(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """The teacher is what GradDiff makes in the first steps; the student starts from its noise."""
    settings: dict[str, Any] = {"lr": 1e-3, "batch_size": 8}
    first = unlearn(facts, capitals, None, GradDiff(steps=2, **settings))
    found = []
    real = UnlearnNoiseDistil.step

    def step(self: Any, batch: Any, done: int) -> Any:
        if self.teacher and not found:
            found.extend((self.teacher.copy(), self.student.copy()))
        return real(self, batch, done)

    monkeypatch.setattr(UnlearnNoiseDistil, "step", step)
    config = UNDO(steps=4, noise=0.4, noise_scale=0.0, distil_lr=1e-4, **settings)
    result = unlearn(facts, capitals, None, config)
    teacher, student = found
    for n, w in first.model.weights.items():
        assert torch.equal(teacher.weights[n], w) and torch.allclose(student.weights[n], 0.6 * w)
    assert result.history[:2] == first.history and result.stopped_at == 4
    assert result.history[2].retain > result.history[3].retain > 0


@pytest.mark.slow
def test_a_forgetting_level_ends_undos_unlearning_and_the_rest_distils(
    facts: LanguageModel, capitals: Task
):
    shown: list[int] = []
    config = UNDO(steps=20, lr=3e-3, batch_size=8, stop_at=0.9)
    result = unlearn(facts, capitals, None, config, on_look=lambda _, done: shown.append(done))
    level = next(k for k, r in enumerate(result.history, 1) if r.choice and r.choice <= 0.9)
    assert level < 10 and result.stopped_at == 20
    assert shown == list(range(level + 2, 21, 2))  # what is only unlearned is another method's


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 3}, r"rank is at most .*; got 3, and w is \(2, 2\). Take 2 or less"),
        ("lora", {"rank": 1}, "toy has no linear layer to adapt: choose a method without adapters"),
    ],
)
def test_adapters_that_cannot_be(method: str, settings: dict[str, Any], message: str):
    model = Toy(w=[[1.0, 0.0], [0.0, 1.0]])
    model.linear_names = ["w"] if settings["rank"] > 1 else []
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES[method](model, NO_TASK, get_method(method)(**settings))


def test_more_components_than_a_matrix_has(facts: LanguageModel, capitals: Task):
    with pytest.raises(ConfigError, match=r"components is at most .* of facts, 128; got 129"):
        unlearn(facts, capitals, None, RepSelect(components=129))
    with pytest.raises(ConfigError, match="Nothing is left of the forget gradient"):
        made = replace(capitals, forget=PairSet("one", capitals.forget.pairs[:1]))
        few = RepSelect(steps=1, batch_size=1, components=128, collapse="hard")
        OBJECTIVES["repselect"](facts, made, few)
