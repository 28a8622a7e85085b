"""Edges left out by exact ablation: models solved by hand, the true minimum, and what it needs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pairs, make_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.circuits.search.faithfulness import (
    completeness,
    minimal_edges,
    random_completeness,
    strongest,
)
from mansu_interp.circuits.search.meta import CircuitMeta, necessity
from mansu_interp.circuits.search.rebuilt import Rebuilt
from mansu_interp.circuits.search.removal import remove_edges
from mansu_interp.errors import ConfigError
from mansu_interp.models.graph import Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet

FEW = CircuitConfig(pairs=5, ig_steps=2, faithfulness_pairs=5)
TARGET = 0.85


def one_layer(seed: int) -> LanguageModel:
    """A random Llama of one layer and two heads: 13 edges."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return LanguageModel("one-layer", LlamaForCausalLM(config).eval(), None)


CLEAN, CORRUPT, ANSWER, WRONG = 1, 2, 3, 4


def copying(heads: int) -> tuple[LanguageModel, PairSet]:
    """A model whose heads each write 3 into one coordinate if they read the clean token.

    The embeddings are unit vectors, the MLP writes nothing, and the answer's logit is that
    coordinate after the final norm, of eight: with a sum s of writes sqrt(8) s / sqrt(1 + s^2).
    Of the 13 edges only input -> value and head -> logits of each writing head matter.
    """
    model = one_layer(0)
    for weight in model.hf.parameters():
        weight.data.zero_()
    weights = dict(model.hf.named_parameters())
    for name, weight in weights.items():
        if "norm" in name:
            weight.data.fill_(1.0)
    weights["model.embed_tokens.weight"].data[CLEAN, 0] = 1.0
    weights["model.embed_tokens.weight"].data[CORRUPT, 1] = 1.0
    layer = "model.layers.0.self_attn"
    for head in range(heads):
        weights[f"{layer}.v_proj.weight"].data[4 * head, 0] = 1.0  # reads sqrt(8) after the norm
        weights[f"{layer}.o_proj.weight"].data[2, 4 * head] = 3 / 8**0.5
    weights["lm_head.weight"].data[ANSWER, 2] = 1.0
    weights["lm_head.weight"].data[5, 1] = 1.0
    pair = Pair((CLEAN,), (CORRUPT,), ANSWER, WRONG, (WRONG,), "", "s", "p", "", "")
    return model, PairSet("copying", (pair,))


def ids(graph: Graph, edges: np.ndarray) -> set[tuple[str, str]]:
    return {(graph.writers[i].id, graph.readers[j].id) for i, j in np.argwhere(edges)}


def metric(s: float) -> float:
    return 8**0.5 * s / (1 + s**2) ** 0.5


@pytest.mark.slow
def test_two_redundant_paths_are_sufficient_each_and_necessary_neither():
    model, pairs = copying(2)
    ablation = Ablation(model, pairs)
    assert ablation.ends == pytest.approx((metric(6), 0.0), abs=1e-5)
    found = remove_edges(ablation, model.graph.exists, target=TARGET, tries=1000)
    assert found.irreducible and found.tried < 1000
    head = next(w for w, _ in ids(model.graph, found.edges) if w != "input")
    assert ids(model.graph, found.edges) == {("input", f"{head}<v>"), (head, "logits")}
    assert found.faithfulness == pytest.approx(metric(3) / metric(6), abs=1e-5)  # 0.96
    assert completeness(ablation, found.edges) == pytest.approx(metric(3) / metric(6), abs=1e-5)
    assert 0.5 < random_completeness(ablation, 2, seed=1) <= 1.0001
    circuit = discover(model, pairs, config=replace(FEW, removal_tries=1000))
    assert circuit.n_edges == 2 and circuit.meta.irreducible
    smallest, left = circuit.meta.remarks()
    assert smallest == (
        "It is the smallest found: no single edge can be left out, though a smaller circuit may "
        "exist."
    )
    assert left.startswith("Completeness: 96% of the metric is left without these edges, ")
    assert left.endswith("sufficient but not necessary: other paths carry the answer, too.")
    assert "faithfulness 0.962, completeness 0.962" in repr(circuit)


def test_a_single_path_is_necessary():
    model, pairs = copying(1)
    circuit = discover(model, pairs, config=replace(FEW, removal_tries=1000))
    assert ids(model.graph, circuit.edges) == {("input", "a0.h0<v>"), ("a0.h0", "logits")}
    assert circuit.meta.faithfulness == pytest.approx(1.0, abs=1e-5)
    assert circuit.meta.completeness == pytest.approx(0.0, abs=1e-5)
    # Of eight draws of 2 of 13 edges, those that hit one of the two leave nothing: 24 in 78 do.
    left = circuit.meta.random_completeness
    assert left is not None and left * 8 == pytest.approx(round(left * 8), abs=1e-3) and left > 0.3
    assert "not necessary" not in circuit.meta.remarks()[1]


def test_what_is_said_of_necessity():
    assert necessity(-0.002, None, 0.9).startswith("Completeness: 0% of the metric")
    assert "is sufficient but not necessary" in necessity(0.7, 0.9, 0.9)
    assert "The circuit is not necessary" in necessity(0.7, 0.9, 0.02)


@pytest.mark.slow
def test_the_true_minimum_of_small_models():
    """By trying all circuits of 13 edges. The search is no proof: it may end above the minimum."""
    graph, every = one_layer(0).graph, []
    where = np.argwhere(graph.exists)
    assert len(where) == 13
    for bits in itertools.product((False, True), repeat=13):
        edges = np.zeros_like(graph.exists)
        edges[tuple(where[list(bits)].T)] = True
        if (graph.prune(edges) == edges).all():
            every.append(edges)
    sizes = []
    for seed in range(4):
        pairs = make_pairs((3, 3), seed=seed)
        ablation = Ablation(one_layer(seed), pairs)
        full, empty = ablation.ends
        values = (np.array(ablation.many(every)) - empty) / (full - empty)
        least = min(int(e.sum()) for e, v in zip(every, values, strict=True) if v >= TARGET)
        found = remove_edges(ablation, graph.exists, target=TARGET, tries=10_000)
        assert found.faithfulness >= TARGET and found.irreducible
        sizes.append((int(found.edges.sum()), least))
    assert all(found >= least for found, least in sizes)
    assert sum(found == least for found, least in sizes) >= 3, sizes


@pytest.mark.slow
def test_no_single_edge_of_what_is_left_can_go():
    model, pairs = make_tiny(4), make_pairs()
    ablation = Ablation(model, pairs)
    ranked = discover(model, pairs, config=FEW)
    found = remove_edges(ablation, ranked.edges, target=TARGET, tries=5000)
    assert found.irreducible and (model.graph.prune(found.edges) == found.edges).all()
    assert found.edges.sum() <= 20 and ranked.n_edges > 160
    assert ablation.faithfulness(found.edges) == pytest.approx(found.faithfulness, abs=1e-5)
    for edge in np.argwhere(found.edges):
        less = found.edges.copy()
        less[tuple(edge)] = False
        assert ablation.faithfulness(less) < TARGET


def plain_greedy(ablation: Ablation, edges: np.ndarray) -> np.ndarray:
    """Leave out the edge that costs least, one at a time, until the target would be missed."""
    full, empty = ablation.ends
    while True:
        circuits = [edges.copy() for _ in range(int(edges.sum()))]
        for less, edge in zip(circuits, np.argwhere(edges), strict=True):
            less[tuple(edge)] = False
        circuits = [ablation.graph.prune(less) for less in circuits]
        values = (np.array(ablation.many(circuits)) - empty) / (full - empty)
        if values.max() < TARGET:
            return edges
        edges = circuits[int(values.argmax())]


@pytest.mark.slow
def test_removal_ends_no_larger_than_plain_greedy_removal():
    """In the embedded model, where single edges alone leave a larger circuit."""
    model, config = load_model("facts"), CircuitConfig()
    pairs = load_task("countries", model).forget.sample(config.pairs, 0)
    scores = attribute(model, pairs, config=config).scores
    ablation = Ablation(model, pairs.sample(config.faithfulness_pairs, 0))
    ranked, _ = minimal_edges(model.graph, scores, ablation.faithfulness, target=TARGET)
    wider = strongest(model.graph, scores, int(ranked.sum()) + 4)
    plain = plain_greedy(ablation, wider)
    found = remove_edges(ablation, ranked, target=TARGET, tries=300)
    assert found.irreducible and found.edges.sum() <= plain.sum() < ranked.sum()
    assert ablation.faithfulness(found.edges) >= TARGET and found.tried <= 300


@pytest.mark.slow
def test_a_search_that_ends_early_says_so_and_is_no_worse(tmp_path: Path):
    model, pairs = make_tiny(4), make_pairs()
    ranked, short = (discover(model, pairs, config=replace(FEW, removal_tries=n)) for n in (0, 30))
    again = discover(model, pairs, config=replace(FEW, removal_tries=30))
    assert (again.edges == short.edges).all() and again.meta.curve == short.meta.curve
    assert ranked.meta.irreducible is None and short.meta.irreducible is False
    assert short.n_edges < ranked.n_edges and (short.meta.faithfulness or 0) >= TARGET
    assert short.meta.remarks()[0].startswith("Leaving edges out ended after 30 circuits: more may")
    assert remove_edges(Ablation(model, pairs), ranked.edges, target=TARGET, tries=30).tried <= 30
    short.save(tmp_path / "c.json")
    back = Circuit.load(tmp_path / "c.json")
    assert back.meta == short.meta and back.meta.remarks() == short.meta.remarks()
    assert CircuitMeta.from_json({"settings": {"pairs": 5}}).settings == CircuitConfig(pairs=5)
    with pytest.raises(ConfigError, match="removal_tries must be at least 0; got -1"):
        CircuitConfig(removal_tries=-1)


@pytest.mark.parametrize("ablation", ["corrupt", "mean", "zero"])
def test_several_circuits_in_one_pass_are_what_each_is_alone(ablation: str):
    model, pairs = make_tiny(2), make_pairs()
    rng = np.random.default_rng(0)
    circuits = [rng.random(model.graph.exists.shape) < d for d in (0.0, 0.1, 0.3, 0.7, 1.0)]
    one = Ablation(model, pairs, ablation=ablation, batch_size=3)
    expected = [Ablation(model, pairs, ablation=ablation)(c) for c in circuits]
    assert one.many(circuits) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    assert one.many([]) == []


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_gradient_at_all_edges_is_eap_at_the_clean_run(kv_heads: int):
    model, pairs = make_tiny(kv_heads), make_pairs()
    scores = attribute(model, pairs, config=AttributionConfig(method="eap", at="clean")).scores
    found = Ablation(model, pairs, batch_size=2).gradient(model.graph.exists)
    np.testing.assert_allclose(found, scores, atol=1e-4 * np.abs(scores).max())
    assert np.abs(scores).max() > 0.1


def test_the_gradient_at_a_circuit_is_the_derivative_by_each_weight():
    """Against central differences, inside and outside the circuit."""
    model, pairs = make_tiny(2), make_pairs((4, 4))
    ablation = Ablation(model, pairs)
    edges = strongest(model.graph, attribute(model, pairs).scores, 60)
    found = ablation.gradient(edges)

    def weighed(edge: tuple[int, int], step: float) -> float:
        keep = edges.astype(np.float32)
        keep[edge] += step
        (base,) = ablation.bases
        logits = ablation.run(base, Rebuilt(base, keep[None]))[0]
        return float(ablation.metric(logits, base.batch, base.clean_logits).mean())

    outside = np.where(edges | ~model.graph.exists, 0.0, np.abs(found))
    tested = [(int(i), int(j)) for i, j in np.argwhere(edges)[::6]]
    tested += [divmod(int(k), edges.shape[1]) for k in np.argsort(-outside, axis=None)[:6]]
    with torch.no_grad():
        slope = [(weighed(e, 0.01) - weighed(e, -0.01)) / 0.02 for e in tested]
    assert [found[e] for e in tested] == pytest.approx(slope, abs=0.01 * np.abs(slope).max())
    assert np.abs(slope[-6:]).max() > 0.01 and not found[~model.graph.exists].any()
