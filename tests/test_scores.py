"""Backward rules, paths and ablated values of attribution, and the exact effect of single edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from checked import wrong_type
from conftest import make_pairs
from test_attribution import hand_model, hand_pairs
from test_families import FAMILIES, make

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.patching import patch_edges
from mansu_interp.circuits.rules import frozen, softer, straight
from mansu_interp.circuits.search.faithfulness import circuit_metric, faithfulness_curve
from mansu_interp.errors import CircuitError, ConfigError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet

TinyModel = Callable[[int], LanguageModel]
EAP = AttributionConfig(method="eap")
CLEAN = AttributionConfig(method="eap", at="clean")


# Backward rules


@pytest.mark.parametrize("rules", ["gim", "relp"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rules_agree_with_the_formulas_written_out(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int, rules: Any
):
    model = tiny_model(kv_heads)
    expected = np.mean([reference.eap(model, p, rules) for p in pairs], axis=0)
    found = attribute(model, pairs, config=replace(EAP, rules=rules))
    size = np.abs(expected).max()
    assert np.abs(found.scores - expected).max() < 1e-4 * size
    plain = attribute(model, pairs, config=EAP)
    assert np.abs(found.scores - plain.scores).max() > 0.1 * size
    assert (found.clean, found.corrupt) == (plain.clean, plain.corrupt)  # values stay


def test_rules_on_a_model_solved_by_hand():
    """As in test_attribution, with the norms' scales held: the gradient at the logits is
    (1, -1, 0, 0) / r, and restoring token 0 for 1 moves the first norm by (2, -2, 0, 0), of which
    attention passes half, and GIM's value product half of that."""
    model, pairs = hand_model(), hand_pairs()
    r = 10**0.5 / 2
    for rules, share in (("relp", 1.0), ("gim", 0.5)):
        found = attribute(model, pairs, config=replace(EAP, rules=rules))  # type: ignore[arg-type]
        expected = {("a0.h0", "logits"): 2 / r, ("input", "a0.h0<v>"): share * 2 / r}
        for i, j in np.argwhere(found.graph.exists):
            edge = found.graph.writers[i].id, found.graph.readers[j].id
            assert found.scores[i, j] == pytest.approx(expected.get(edge, 0.0), abs=1e-5), edge


LINEAR = [f for f in FAMILIES if f not in ("gemma2", "opt")]
"""Gemma 2 caps its logits; OPT's attention is refused."""


@pytest.mark.parametrize("family", LINEAR)
def test_relp_conserves_the_metric(family: str):
    """Without biases, RelP makes every part of a model linear, and the half rule halves both
    factors of a product. So what the embedding adds times what comes back is the whole metric; so
    are the edges into the logits."""
    model = make(family).copy()
    with torch.no_grad():
        for name, weight in model.weights.items():
            if name.endswith("bias"):
                weight.zero_()
    config = replace(CLEAN, rules="relp", ablation="zero")
    found = attribute(model, make_pairs((5, 4)), config=config)
    assert abs(found.clean) > 0.01
    assert found.node_scores()["input"] == pytest.approx(found.clean, rel=2e-3)
    assert found.scores[:, -1].sum() == pytest.approx(found.clean, rel=2e-3)


def test_queries_and_keys_score_nothing_with_relp(tiny_model: TinyModel, pairs: PairSet):
    found = attribute(tiny_model(2), pairs, config=replace(EAP, rules="relp"))
    for j, reader in enumerate(found.graph.readers):
        assert found.scores[:, j].any() == (reader.kind not in "qk"), reader.id


@pytest.mark.parametrize("family", ["opt", "gptj", "mixtral"])
def test_rules_refuse_what_they_cannot_reach(family: str):
    pairs = make_pairs((4,))
    for rules in ("gim", "relp"):
        with pytest.raises(CircuitError, match=f"rules='{rules}' do not fit: .* Use rules='grad"):
            attribute(make(family), pairs, config=replace(EAP, rules=rules))  # type: ignore[arg-type]
    assert attribute(make(family), pairs, config=EAP).scores.any()


def jacobian(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(f, x)  # type: ignore[return-value]


@pytest.mark.parametrize("d", [4, 5])
def test_a_frozen_norm_by_hand(d: int):
    torch.manual_seed(0)
    x, gain = torch.randn(d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    layer = torch.nn.LayerNorm(d, eps=1e-3, dtype=torch.float64)
    square = torch.nn.RMSNorm(d, eps=1e-3, dtype=torch.float64)
    layer.weight.data, square.weight.data = gain, gain
    layer.bias.data = torch.randn(d, dtype=torch.float64)
    scale = (x.square().mean() + 1e-3).rsqrt()
    assert torch.allclose(frozen(square)(x), square(x))
    assert torch.allclose(jacobian(frozen(square), x), torch.diag(gain * scale))
    centre = torch.eye(d, dtype=torch.float64) - 1 / d
    scale = ((x - x.mean()).square().mean() + 1e-3).rsqrt()
    assert torch.allclose(frozen(layer)(x), layer(x))
    assert torch.allclose(jacobian(frozen(layer), x), (gain * scale)[:, None] * centre)
    same = frozen(torch.nn.Identity())  # what OLMo 2 has in front of its readers
    assert torch.allclose(jacobian(same, x), torch.eye(d, dtype=torch.float64))
    with pytest.raises(CircuitError, match=r"from a LayerNorm or RMSNorm, .* rules='gradient'"):
        frozen(torch.nn.Tanh())(3 * x)


def test_the_softer_softmax_by_hand():
    """Scores 0 and 2 log 3: at temperature 2, p = (1/4, 3/4), J = p0 p1 ((1, -1), (-1, 1))."""
    scores = torch.tensor([0.0, 2 * np.log(3)], dtype=torch.float64)
    found = jacobian(lambda s: straight(s.softmax(-1), softer(s)), scores)
    wanted = 3 / 16 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(found, wanted)
    assert torch.equal(straight(scores.softmax(-1), softer(scores)), scores.softmax(-1))


# Paths and ablated values


def test_both_ends_are_the_mean_of_the_ends(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    ends = [attribute(model, pairs, config=c).scores for c in (EAP, CLEAN)]
    both = attribute(model, pairs, config=replace(EAP, at="both"))
    assert np.allclose(both.scores, np.mean(ends, axis=0), atol=1e-6)
    assert not np.allclose(ends[0], ends[1], atol=1e-2)


@pytest.mark.slow
def test_paths_of_activations_sum_to_the_patched_component(tiny_model: TinyModel, pairs: PairSet):
    """The gradient along one component's straight path, integrated, is what ablating all of its
    outgoing edges does."""
    model = tiny_model(2)
    config = AttributionConfig(method="eap-ig-activations", ig_steps=24)
    found = attribute(model, pairs, config=config)
    exists = found.graph.exists
    for ids in ([f"a1.h{h}" for h in range(4)], ["m0"], ["m2"]):
        rows, rest = [found.graph.writer_index[n] for n in ids], exists.copy()
        rest[rows] = False
        effect = found.clean - circuit_metric(model, pairs, rest)
        assert abs(effect) > 0.01
        assert found.scores[rows].sum() == pytest.approx(effect, abs=0.01 * abs(found.clean)), ids


def test_mean_and_zero_agree_with_the_definition(tiny_model: TinyModel):
    model, pairs = tiny_model(2), make_pairs((5, 5, 3))
    runs = [reference.run(model, p.corrupt, reference._sum)[0] for p in pairs]
    for ablation in ("mean", "zero"):
        expected = []
        for pair, own in zip(pairs, runs, strict=True):
            n = len(pair.clean)
            instead = {name: torch.zeros_like(v) for name, v in own.items()}
            for name, value in instead.items() if ablation == "mean" else ():
                for k in range(n):
                    at = [r[name][k] for r in runs if len(r[name]) > k]
                    value[k] = torch.stack(at).mean(0)
            expected.append(reference.eap(model, pair, ablated=instead))
        config = replace(EAP, ablation=ablation)  # type: ignore[arg-type]
        found = attribute(model, pairs, config=config).scores
        wanted = np.mean(expected, axis=0)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), ablation


def test_neurons_have_a_corrupt_value_and_the_inputs_path(tiny_model: TinyModel):
    model, pairs = tiny_model(4), make_pairs((4,))
    for odd in (replace(EAP, ablation="mean"), AttributionConfig(method="eap-ig-activations")):
        with pytest.raises(CircuitError, match="Neurons are scored with ablation='corrupt' and"):
            attribute(model, pairs, config=odd, neurons=True)


# Exact effects


def test_single_edges_solved_by_hand():
    """In the model of test_attribution, each of two edges carries the whole effect 2 / r, and the
    others nothing, in both directions."""
    model, pairs = hand_model(), hand_pairs()
    r = 10**0.5 / 2
    for direction in ("noising", "denoising"):
        found = patch_edges(model, pairs, direction=direction)  # type: ignore[arg-type]
        for i, j in np.argwhere(model.graph.exists):
            edge = model.graph.writers[i].id, model.graph.readers[j].id
            whole = edge in {("a0.h0", "logits"), ("input", "a0.h0<v>")}
            assert found[i, j] == pytest.approx(2 / r if whole else 0.0, abs=1e-5), edge
        assert np.isnan(found[~model.graph.exists]).all()


def some_edges(model: LanguageModel, n: int) -> list[tuple[int, int]]:
    every = np.argwhere(model.graph.exists)
    chosen = np.random.default_rng(0).permutation(len(every))[:n]
    return [(int(i), int(j)) for i, j in every[chosen]]


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["corrupt", "mean", "zero"])
@pytest.mark.parametrize("family", ["llama gqa", "gpt2", "gemma3", "phi"])
def test_noising_agrees_with_ablating_the_edge(family: str, ablation: str):
    model, pairs = make(family), make_pairs((4, 6, 3))
    rest, places = Ablation(model, pairs, ablation=ablation), some_edges(model, 12)
    chosen = np.zeros_like(model.graph.exists)
    for place in places:
        chosen[place] = True
    found = patch_edges(model, pairs, chosen, ablation=ablation)
    assert np.isfinite(found).sum() == 12
    exists = model.graph.exists
    for place in places:
        without = exists.copy()
        without[place] = False
        assert found[place] == pytest.approx(rest(exists) - rest(without), abs=1e-4), place


def test_noising_agrees_with_the_definition_written_out(tiny_model: TinyModel):
    model, pairs = tiny_model(2), make_pairs((4, 3))
    found, exists = patch_edges(model, pairs), model.graph.exists
    for place in some_edges(model, 8):
        without = exists.copy()
        without[place] = False
        effects = [
            reference.ablated(model, p, exists) - reference.ablated(model, p, without)
            for p in pairs
        ]
        assert found[place] == pytest.approx(np.mean(effects), abs=1e-4), place


def test_denoising_is_noising_the_other_way_round(tiny_model: TinyModel, pairs: PairSet):
    """Restoring an edge in the corrupt run is ablating it in a run whose prompts are swapped."""
    model = tiny_model(2)
    names = [
        (model.graph.writers[i].id, model.graph.readers[j].id) for i, j in some_edges(model, 9)
    ]
    swapped = PairSet("swapped", tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in pairs))
    found = patch_edges(model, pairs, names, direction="denoising")
    assert np.allclose(found, -patch_edges(model, swapped, names), atol=1e-5, equal_nan=True)
    noised = patch_edges(model, pairs, names)
    assert not np.allclose(found, noised, atol=1e-2, equal_nan=True)
    # kl compares with the clean run in either direction
    kl = patch_edges(model, pairs, names, direction="denoising", metric="kl")
    assert np.nanmax(np.abs(kl)) > 1e-4


def test_exact_effects_do_not_depend_on_the_batch(tiny_model: TinyModel, pairs: PairSet):
    model, steps = tiny_model(4), []
    edges = [("input", "a0.h1<q>"), ("m0", "m2"), ("a1.h2", "logits")]
    one = patch_edges(
        model, pairs, edges, batch_size=1, on_step=lambda done, n: steps.append((done, n))
    )
    assert steps == [(k, 15) for k in range(16)]  # the number of passes is told first
    for size in (4, 64):
        again = patch_edges(model, pairs, edges, batch_size=size)
        assert np.allclose(one, again, atol=1e-5, equal_nan=True)


def test_scores_of_a_small_change_are_the_exact_effects(tiny_model: TinyModel):
    """The gradient times a difference that goes to 0 is the effect: here of a hundredth."""
    model = tiny_model(4).copy()
    pair = make_pairs((3,))[0]
    near = replace(pair, corrupt=(*pair.clean[:-1], 49))
    with torch.no_grad():
        rows = model.hf.get_input_embeddings().weight
        rows[49] = rows[pair.clean[-1]] + 0.001 * torch.randn(32)
    one = PairSet("near", (near,))
    exact = patch_edges(model, one)
    scores = attribute(model, one, config=replace(EAP, at="both")).scores
    exists = model.graph.exists
    size = np.abs(exact[exists]).max()
    assert np.abs(scores - exact)[exists].max() < 0.02 * size


def test_what_cannot_be_patched(tiny_model: TinyModel):
    model, pairs = tiny_model(4), make_pairs((4,))
    with pytest.raises(CircuitError, match="No edge 'm1' -> 'm0'"):
        patch_edges(model, pairs, [("m1", "m0")])
    with pytest.raises(CircuitError, match="No edge to patch"):
        patch_edges(model, pairs, [])
    with pytest.raises(CircuitError, match=r"edges: got shape \[16, 39\], expected \[16, 40\]"):
        patch_edges(model, pairs, model.graph.exists[:, 1:])
    with pytest.raises(CircuitError, match=r"'denoising' restores .* give ablation='corrupt'"):
        patch_edges(model, pairs, direction="denoising", ablation="zero")
    with pytest.raises(CircuitError, match="Unknown ablation 'half'"):
        patch_edges(model, pairs, ablation="half")
    with pytest.raises(CircuitError, match="batch_size must be at least 1; got 0"):
        patch_edges(model, pairs, batch_size=0)


def test_edges_that_were_not_patched_have_no_rank(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    some, ablation = patch_edges(model, pairs, [("m0", "logits")]), Ablation(model, pairs)
    for scores, message in ((some, "edges are NaN"), (some[1:], "got shape")):
        with pytest.raises(CircuitError, match=message):
            faithfulness_curve(ablation, scores)
    with pytest.raises(CircuitError, match="Fractions must ascend"):
        faithfulness_curve(ablation, np.nan_to_num(some), fractions=())
    curve = faithfulness_curve(ablation, np.nan_to_num(some), fractions=(1.0,))
    assert curve.faithfulness == pytest.approx((1.0,), abs=1e-4)


@wrong_type
def test_an_unknown_direction_or_rule(tiny_model: TinyModel):
    with pytest.raises(CircuitError, match="expected ids of writer and reader"):
        patch_edges(tiny_model(2), make_pairs((5,)), [("m0", "logits", "x")])  # pyright: ignore
    with pytest.raises(CircuitError, match="direction: got 'up', expected 'noising' or 'den"):
        patch_edges(tiny_model(4), make_pairs((4,)), direction="up")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rules: got 'lrp', expected 'gradient'"):
        AttributionConfig(rules="lrp")  # type: ignore[arg-type]


def test_a_place_for_the_gradient_is_of_eap_alone():
    with pytest.raises(ConfigError, match="at=both with eap-ig, which takes it all along the path"):
        AttributionConfig(at="both")
