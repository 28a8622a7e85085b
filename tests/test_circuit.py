"""Circuits: discovery's choices, set operations, files."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import oracle
import pytest
import reference
import torch
from checked import wrong_type
from conftest import SHIPPED, make_pairs, make_tiny

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import compare
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.metrics import logit_diff
from mansu_interp.circuits.scores import SCHEMA, Attribution, edge_changes
from mansu_interp.circuits.search.discover import discover, selective_scores
from mansu_interp.circuits.search.faithfulness import (
    Curve,
    circuit_metric,
    faithfulness_curve,
    minimal_edges,
    strongest,
)
from mansu_interp.circuits.search.meta import CircuitMeta
from mansu_interp.errors import ArtifactError, CircuitError
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import circuit_mask
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.utils.tensors import write_tensors

TinyModel = Callable[[int], LanguageModel]
GRAPH = Graph(Architecture(2, 4, 2))
FEW = CircuitConfig(pairs=5, ig_steps=2, faithfulness_pairs=5)


def circuit(*edges: tuple[str, str], scale: float = 1.0) -> Circuit:
    chosen = GRAPH.exists & False
    for edge in edges:
        chosen[GRAPH.edge(*edge)] = True
    return Circuit(GRAPH, scale * np.arange(chosen.size).reshape(chosen.shape), chosen)


def ids(c: Circuit) -> set[tuple[str, str]]:
    return {(GRAPH.writers[i].id, GRAPH.readers[j].id) for i, j in np.argwhere(c.edges)}


LEFT = [("input", "m0"), ("m0", "logits"), ("input", "a1.kv0<v>"), ("a1.h0", "logits")]
RIGHT = [("input", "m0"), ("m0", "logits"), ("input", "m1"), ("a1.h0", "logits")]


def test_union_intersection_and_difference():
    a, b = circuit(*LEFT), circuit(*RIGHT, scale=-1.0)
    assert ids(a | b) == {*LEFT, *RIGHT}
    assert ids(a & b) == {("input", "m0"), ("m0", "logits")}  # a1.h0 is fed by neither now
    assert ids(a - b) == {("input", "a1.kv0<v>")}
    both, own, other = (GRAPH.edge(*e) for e in (LEFT[0], LEFT[2], RIGHT[2]))
    union = (a | b).scores
    assert union[both] == a.scores[both]
    assert union[own] == a.scores[own]
    assert union[other] == b.scores[other] == -a.scores[other]
    wider = Graph(Architecture(2, 4, 4))
    other_model = Circuit(wider, wider.exists * 1.0, wider.exists)
    for combine in (operator.or_, operator.and_, operator.sub):
        with pytest.raises(CircuitError, match="Combine circuits of one model"):
            combine(a, other_model)


def test_networkx_graph_links_a_heads_inputs_to_its_output():
    net = circuit(*LEFT).to_networkx()
    assert net.edges["a1.kv0<v>", "a1.h0"] == {
        "score": 0.0,
        "kind": "inside",
        "weight": 0.0,
        "label": "",
    }
    assert nx.has_path(net, "input", "a1.h0")
    node = {"kind": "v", "layer": 1, "head": 0, "label": "a1.kv0<v>"}
    assert net.nodes["a1.kv0<v>"] == node
    assert {(u, v) for u, v, kind in net.edges(data="kind") if kind == "residual"} == set(LEFT)


def test_json_graphml_and_gexf_hold_the_same_edges(tmp_path: Path):
    made = replace(circuit(*LEFT), meta=CircuitMeta(model="tiny", faithfulness=0.9))
    made.save(tmp_path / "c.json")
    back = Circuit.load(tmp_path / "c.json")
    assert (back.edges == made.edges).all()
    assert (back.scores[made.edges] == made.scores[made.edges]).all()
    assert not back.scores[~made.edges].any()
    assert back.meta == made.meta
    expected = {(u, v): d["score"] for u, v, d in made.to_networkx().edges(data=True)}
    made.save_graphml(tmp_path / "c.graphml")
    made.save_gexf(tmp_path / "c.gexf")
    for net in (nx.read_graphml(tmp_path / "c.graphml"), nx.read_gexf(tmp_path / "c.gexf")):
        assert {(u, v): d["score"] for u, v, d in net.edges(data=True)} == expected


def saved(tmp_path: Path) -> dict[str, Any]:
    circuit(*LEFT).save(tmp_path / "c.json")
    return json.loads((tmp_path / "c.json").read_text())


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("graph", "schema"), 3, "unknown circuit schema 3; expected 2"),
        (
            ("graph", "schema"),
            1,
            r"of schema 1, written by mansu_interp 0\.1, .* schema 2\. Discover it again\.",
        ),
        (("graph", "architecture", "n_heads"), 3, "n_kv_heads dividing"),
        (("graph", "architecture", "n_layers"), 10**9, "larger than any model"),
        (("graph", "architecture", "n_layers"), 2.0, "n_layers is 2.0"),
        (("graph", "architecture", "parallel"), "no", "parallel is 'no'"),
        (("graph", "architecture", "depth"), 1, "depth"),
        (("links", 0, "source"), "a7.h0", "No edge 'a7.h0'"),
        (("links", 0, "score"), float("nan"), "not a finite number"),
        (("links", 0, "score"), "1e999", "not a finite number"),
        (("links", 0, "score"), "high", "score is 'high', not a finite number"),
        (("links",), 5, "links is 5, expected list"),
        (("graph",), None, "not a valid circuit"),
        (("graph", "faithfulness"), "high", "faithfulness is 'high', not a finite number"),
        (("graph", "curve"), [[1.0]], "the curve is no list of"),
        (("graph", "settings"), {"selective": 1.0}, "the settings have an unknown 'selective'"),
        (("graph", "settings"), {"pairs": 0}, "its settings are out of range"),
        (("graph", "settings"), {"pairs": "all"}, "settings.pairs is 'all', expected int"),
        (("graph", "provenance"), "me", "provenance is 'me', expected dict"),
    ],
)
def test_files_that_cannot_be_true(tmp_path: Path, where: tuple, value: Any, message: str):
    data = saved(tmp_path)
    inner: Any = data
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message) as caught:
        Circuit.load(tmp_path / "c.json")
    assert "c.json" in str(caught.value)


def test_meta_comes_back_and_unknown_keys_are_left_out(
    tiny_model: TinyModel, pairs: PairSet, tmp_path: Path
):
    found = discover(tiny_model(2), pairs, config=replace(FEW, top=60))
    assert found.meta.settings == replace(FEW, top=60)
    assert found.meta.curve == ((60, found.meta.faithfulness),)
    assert found.meta.provenance is not None and found.meta.provenance["seed"] == 0
    found.save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    assert list(data["graph"]) == [
        *("schema", "architecture", "model", "settings", "provenance", "pairs_per_batch"),
        *("gb_per_pair", "faithfulness", "curve", "completeness", "random_completeness"),
        *("metric_clean", "metric_corrupt", "caveat"),
    ]  # not model_sha256, which a model made in memory does not have
    data["graph"]["note"] = "mine"
    (tmp_path / "c.json").write_text(json.dumps(data))
    back = Circuit.load(tmp_path / "c.json")
    assert back.meta == found.meta
    said = found.meta.caveat  # of a random model
    assert (back | back).meta == CircuitMeta(model="tiny", made_by="union", caveat=said)


def test_of_circuits_of_two_checkpoints_the_model_is_not_known(tiny_model: TinyModel):
    first, second = (
        replace(circuit(*LEFT), meta=CircuitMeta(model=name, model_sha256=name))
        for name in ("one", "two")
    )
    assert (first | first).meta.model == "one" and (first & second).meta.model == ""
    assert first != second and len({first, second, first}) == 2
    with pytest.raises(CircuitError, match="the other circuit"):
        first | 3  # pyright: ignore
    empty = first - first
    assert not empty.n_edges and list(empty.to_pandas()) == ["source", "target", "score"]


def test_control_characters_of_a_name_stay_out_of_graphml(tmp_path: Path):
    replace(circuit(*LEFT), meta=CircuitMeta(model="a\x01<b>")).save_graphml(tmp_path / "c.graphml")
    assert "<b>" in nx.read_graphml(tmp_path / "c.graphml").graph["model"]


def test_files_with_an_edge_twice_or_of_an_unknown_kind(tmp_path: Path):
    circuit(*LEFT).save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    first = data["links"][0]
    for links, message in (([first, first], "there twice"), ([{**first, "kind": "x"}], "kind 'x'")):
        (tmp_path / "d.json").write_text(json.dumps({**data, "links": links}))
        with pytest.raises(ArtifactError, match=message):
            Circuit.load(tmp_path / "d.json")


def test_a_circuit_belongs_to_its_checkpoint(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2).copy()
    model.sha256 = "aa"
    found = discover(model, pairs, config=replace(FEW, top=60))
    found.check_fits(model)
    model.sha256 = "bb"
    for use in (
        lambda: circuit_mask(found, model),
        lambda: compare(found, model, {"x": model}, pairs),
    ):
        with pytest.raises(CircuitError, match="found on another checkpoint"):
            use()


def test_top_and_threshold_choose_by_rank(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    top = discover(model, pairs, config=replace(FEW, top=50))
    size = np.sort(np.abs(top.scores[model.graph.exists]))[::-1]
    assert 10 < top.n_edges <= 50
    cut = discover(model, pairs, config=replace(FEW, threshold=float(size[49])))
    assert (cut.edges == top.edges).all()
    assert np.abs(cut.scores[cut.edges]).min() >= size[49]
    with pytest.raises(CircuitError, match="No edge reaches the threshold 1000000"):
        discover(model, pairs, config=replace(FEW, threshold=1e6))


def test_the_smallest_circuit_reaches_its_target(tiny_model: TinyModel):
    pairs = make_pairs(seed=6)  # their metric differs enough between clean and corrupt
    low, high = (
        discover(tiny_model(2), pairs, config=replace(FEW, faithfulness=f)) for f in (0.5, 0.95)
    )
    assert (low.meta.faithfulness or 0) >= 0.5
    assert (high.meta.faithfulness or 0) >= 0.95
    assert low.n_edges < high.n_edges < low.graph.n_edges


@pytest.mark.slow
def test_retained_edges_lose_rank(tiny_model: TinyModel, pairs: PairSet):
    """An edge that the retain set needs as much keeps a tenth of its score."""
    forget = np.array([[4.0, -4.0, 4.0]])
    assert selective_scores(forget, np.array([[0.0, 3.0, -9.0]]), 1.0).tolist() == [[4, -1, 0.4]]
    assert selective_scores(forget, np.array([[0.0, 3.0, -9.0]]), 0.0).tolist() == forget.tolist()
    model = tiny_model(2)
    top = replace(FEW, top=60)
    alone = discover(model, pairs, config=top)
    # Everything is needed, so the order stays.
    same = discover(model, pairs, config=top, retain=pairs)
    assert (same.edges == alone.edges).all()
    other = discover(model, pairs, config=top, retain=make_pairs(seed=5))
    assert (other.edges != alone.edges).any()
    assert (other.scores == alone.scores).all()  # the scores stay the forget set's


@wrong_type
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_list_of_pairs_is_no_pair_set(tiny_model: TinyModel, pairs: PairSet, name: str):
    given: dict[str, Any] = {"forget": pairs, "retain": None, name: list(pairs)}
    with pytest.raises(CircuitError, match=f"{name}: got a list, expected a PairSet"):
        discover(tiny_model(2), **given)


# The exported circuits load, fit the embedded model, and are what discovery finds.


@pytest.fixture(scope="module")
def model():
    return load_model("facts")


@pytest.mark.parametrize("name", ["capitals", "countries"])
def test_exported_files_fit_the_model(model, name: str):
    circuit = Circuit.load(SHIPPED / f"facts-{name}.json")
    assert circuit.graph.architecture == model.architecture
    assert circuit.meta.model_sha256 == model.sha256
    assert (circuit.meta.faithfulness or 0) >= 0.85
    assert circuit.n_edges == circuit.graph.prune(circuit.edges).sum() > 10
    mask = Mask.load(SHIPPED / f"facts-{name}.mask.safetensors")
    mask.check_fits(model)
    assert mask.limit == int(0.005 * model.n_parameters)


@pytest.mark.slow
def test_rediscovery_finds_the_exported_circuit(model):
    task = load_task("capitals", model)
    found = discover(model, task.forget, retain=task.retain)
    saved = Circuit.load(SHIPPED / "facts-capitals.json")
    both = (found.edges & saved.edges).sum()
    assert both / (found.edges | saved.edges).sum() > 0.9
    where = found.edges & saved.edges
    np.testing.assert_allclose(found.scores[where], saved.scores[where], rtol=1e-3, atol=1e-5)


def test_a_damaged_circuit_is_refused(tmp_path: Path):
    text = (SHIPPED / "facts-capitals.json").read_text()
    for bad in (
        text[:-20],
        text.replace('"schema": 2', '"schema": 9'),
        text.replace('"source": "input"', '"source": "a9.h0"'),
    ):
        (tmp_path / "c.json").write_text(bad)
        with pytest.raises(ArtifactError, match=r"c\.json"):
            Circuit.load(tmp_path / "c.json")


def test_answers_that_the_model_does_not_know(tiny_model: TinyModel):
    """Where the corrupt prompts give more of the metric there is no circuit, at 0.98 or else."""
    model, pairs = tiny_model(4), make_pairs((5, 4, 6, 3))
    clean = attribute(model, pairs)
    other = PairSet("other", tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in pairs))
    known, unknown = (pairs, other) if clean.clean > clean.corrupt else (other, pairs)
    assert discover(model, known, config=FEW).n_edges
    with pytest.raises(CircuitError, match="tiny does not know these answers: the metric is "):
        discover(model, unknown, config=FEW)


def test_a_circuit_is_not_empty(tiny_model: TinyModel):
    model = tiny_model(4)
    pairs = make_pairs((5, 4, 6, 3))
    other = PairSet("other", tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in pairs))
    for these in (pairs, other):
        found = attribute(model, these, config=replace(FEW, top=1))
        if found.clean > found.corrupt:
            with pytest.raises(
                CircuitError, match=r"None of the 1 strongest .* the first (\d+) hold one"
            ) as told:
                discover(model, these, config=replace(FEW, top=1))
            n = int(str(told.value).split("the first ")[1].split()[0])
            assert discover(model, these, config=replace(FEW, top=n)).n_edges
            with pytest.raises(CircuitError, match="None of the"):
                discover(model, these, config=replace(FEW, top=n - 1))


def test_scores_by_edge_by_rank_and_as_files(facts: LanguageModel, capitals: Task, tmp_path: Path):
    some = capitals.forget.sample(4, 0)
    found = attribute(facts, some, config=AttributionConfig(ig_steps=1), positions=True)
    strongest, second = found.top(2)
    assert strongest.score == found.edge(strongest.source, strongest.target)
    assert abs(strongest.score) == np.abs(found.scores).max() >= abs(second.score)
    with pytest.raises(CircuitError, match="No edge 'm0' -> 'a0"):
        found.edge("m0", "a0.h1<q>")
    table = found.to_pandas()
    assert len(table) == facts.graph.n_edges and table.score[0] == strongest.score
    drawn = found.to_networkx()
    assert drawn.edges[strongest.source, strongest.target]["score"] == strongest.score
    found.save(tmp_path / "scores.safetensors")
    again = Attribution.load(tmp_path / "scores.safetensors")
    assert np.array_equal(again.scores, found.scores) and again.clean == found.clean
    assert found.top(0) == []
    with pytest.raises(CircuitError, match=r"how many edges there are to be, at least 0; got -1\."):
        found.top(-1)
    assert again.by_position is not None and found.by_position is not None
    assert np.array_equal(again.by_position, found.by_position)
    flat = {"scores": found.scores, "by_position": found.by_position[0]}
    header = {"architecture": asdict(found.graph.architecture), "clean": 1.0, "corrupt": 0.0}
    tensors = {name: torch.from_numpy(values) for name, values in flat.items()}
    write_tensors(tmp_path / "flat.safetensors", "scores", SCHEMA, tensors, header)
    with pytest.raises(ArtifactError, match="by position have no positions"):
        Attribution.load(tmp_path / "flat.safetensors")
    with pytest.raises(ArtifactError, match="is not a readable scores"):
        Attribution.load(SHIPPED / "facts-capitals.mask.safetensors")
    assert "1,055 edges" in repr(found) and strongest.source in found._repr_html_()
    assert found.view().data.total == facts.graph.n_edges


def test_a_table_of_what_became_of_each_edge():
    def scores(**given: float) -> Attribution:
        matrix = np.zeros(GRAPH.exists.shape)
        for name, value in given.items():
            matrix[GRAPH.edge("input", name)] = value
        return Attribution(GRAPH, matrix, 1.0, 0.0)

    before, after = scores(m0=4.0, m1=-2.0, logits=1.0), scores(m0=0.1, m1=-2.0, logits=0.0)
    table = edge_changes(before, after, scores(m0=3.0, m1=-2.0), threshold=0.5)
    assert list(table.target) == ["m0", "m1", "logits"]
    assert list(table.change) == ["recovered", "kept", "silent"]
    assert list(table.left) == [0.025, 1.0, 0.0]
    other = Graph(Architecture(1, 1, 1))
    with pytest.raises(CircuitError, match="different architectures"):
        edge_changes(before, Attribution(other, np.zeros(other.exists.shape), 1.0, 0.0))


def test_what_a_circuit_predicts(facts: LanguageModel, capitals: Task):
    """Of all edges what the model does, of none what it does with the corrupt prompts."""
    pairs = capitals.forget.sample(6, 0)
    circuit = Circuit.load(SHIPPED / "facts-capitals.json")
    everything = replace(circuit, edges=circuit.graph.exists).ablate(facts, pairs)
    assert torch.allclose(everything.values, everything.whole)
    assert list(everything.predicted_whole) == [p.answer_text for p in everything.pairs]
    nothing = replace(circuit, edges=circuit.graph.exists & False).ablate(facts, pairs)
    for pair, row in zip(nothing.pairs, nothing.logits, strict=True):
        corrupt = facts.last_logits(
            torch.tensor([pair.corrupt]), torch.tensor([len(pair.corrupt) - 1])
        )
        assert torch.allclose(row, corrupt[0], atol=1e-3)
    within = circuit.ablate(facts, pairs)
    assert float(within.values.mean()) == pytest.approx(
        circuit_metric(facts, pairs, circuit.edges), rel=1e-5
    )
    assert list(within.to_pandas()["metric in circuit"]) == within.values.tolist()
    with pytest.raises(CircuitError, match="The circuit is of"):
        circuit.ablate(make_tiny(2), make_pairs())


# Ablate-outside faithfulness: its two ends, the oracle, and the search for a small circuit.

KV = pytest.mark.parametrize("kv_heads", [4, 2])


@KV
def test_full_circuit_is_the_clean_run_and_empty_the_corrupt_run(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    graph = model.graph
    ablation = Ablation(model, pairs, batch_size=3)
    assert sum(len(base.batch) for base in ablation.bases) == len(pairs)
    for base in ablation.bases:
        batch = base.batch
        clean = model.last_logits(batch.clean, batch.last)
        corrupt = model.last_logits(batch.corrupt, batch.last)
        assert (clean - corrupt).abs().max() > 0.1
        full = ablation.logits(base, graph.exists)
        empty = ablation.logits(base, np.zeros_like(graph.exists))
        assert torch.allclose(full, clean, atol=1e-4)
        assert torch.allclose(empty, corrupt, atol=1e-4)


def test_a_random_circuit_agrees_with_transformer_lens(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    rng = np.random.default_rng(1)
    edges = model.graph.prune((rng.random(model.graph.exists.shape) < 0.4) & model.graph.exists)
    assert 20 < edges.sum() < 0.6 * model.graph.n_edges
    values = []
    for pair in pairs.pairs[:3]:
        recovered, clean, corrupt = oracle.recovered(model, pair, edges)
        values.append(corrupt + recovered * (clean - corrupt))
        one = circuit_metric(model, PairSet("one", (pair,)), edges)
        assert one == pytest.approx(values[-1], abs=1e-4)
        assert abs(recovered - 1) > 0.01  # the circuit is not trivial
    several = circuit_metric(model, PairSet("three", pairs.pairs[:3]), edges, batch_size=2)
    assert several == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_random_circuits_agree_with_the_definition_written_out(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    rng = np.random.default_rng(2)
    for density in (0.2, 0.6, 0.95):
        edges = (rng.random(model.graph.exists.shape) < density) & model.graph.exists
        expected = [reference.ablated(model, p, edges) for p in pairs]
        found = circuit_metric(model, pairs, edges, batch_size=3)
        assert found == pytest.approx(np.mean(expected), abs=1e-4)


def test_single_edges_patched_agree_with_the_definition_written_out(
    tiny_model: TinyModel, pairs: PairSet
):
    model, one = tiny_model(2), PairSet("one", pairs.pairs[2:3])
    ablation = Ablation(model, one)
    whole = ablation(model.graph.exists)
    effects = []
    for i, j in np.argwhere(model.graph.exists)[::7]:
        edges = model.graph.exists.copy()
        edges[i, j] = False
        expected = reference.ablated(model, one.pairs[0], edges)
        assert ablation(edges) == pytest.approx(expected, abs=1e-4)
        effects.append(abs(expected - whole))
    assert max(effects) > 0.05


def test_a_metric_that_explains_nothing_is_refused(tiny_model: TinyModel, pairs: PairSet):
    ablation = Ablation(tiny_model(2), pairs, metric=lambda logits, b, c: logits[:, 0] * 0 + 3)
    with pytest.raises(CircuitError, match="3 with the full circuit and 3 with none"):
        ablation.faithfulness(ablation.graph.exists)
    with pytest.raises(CircuitError, match="Unknown ablation 'noise'; expected one of corrupt"):
        Ablation(tiny_model(2), pairs, ablation="noise")


def test_the_curve_and_its_areas(tiny_model: TinyModel, pairs: PairSet):
    curve = Curve((0.0, 0.5, 1.0), (0, 5, 10), (0.0, 1.2, 1.0))
    assert curve.cpr == pytest.approx(0.25 * 1.2 + 0.25 * 2.2)
    assert curve.cmd == pytest.approx(0.25 * (1 + 0.2) + 0.25 * 0.2)
    ablation = Ablation(tiny_model(2), pairs)
    scores = attribute(tiny_model(2), pairs).scores
    done: list[tuple[int, int]] = []
    found = faithfulness_curve(
        ablation, scores, fractions=(0.1, 1.0), on_step=lambda *x: done.append(x)
    )
    assert found.faithfulness[1] == pytest.approx(1.0, abs=1e-4)
    n = round(0.1 * ablation.graph.n_edges)
    assert found.faithfulness[0] == ablation.faithfulness(strongest(ablation.graph, scores, n))
    assert found.edges == (strongest(ablation.graph, scores, n).sum(), ablation.graph.n_edges)
    assert done == [(1, 2), (2, 2)]
    for wrong in ((0.5, 0.1), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(CircuitError, match="must ascend within"):
            faithfulness_curve(ablation, scores, fractions=wrong)


def test_a_dangling_edge_changes_nothing(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    edges = strongest(model.graph, attribute(model, pairs).scores, 60)
    more = edges.copy()
    more[model.graph.edge("input", "m1")] = True
    more[model.graph.writer_index["m1"]] = False  # m1 is fed but never read
    without = more.copy()
    without[model.graph.edge("input", "m1")] = False
    assert circuit_metric(model, pairs, more) == pytest.approx(
        circuit_metric(model, pairs, without), abs=1e-5
    )
    assert not model.graph.prune(more)[model.graph.edge("input", "m1")]


def test_metric_by_name_or_function(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    a = circuit_metric(model, pairs, model.graph.exists)
    b = circuit_metric(model, pairs, model.graph.exists, metric=logit_diff, batch_size=1)
    clean = attribute(model, pairs, config=AttributionConfig(method="eap")).clean
    assert a == pytest.approx(clean, abs=1e-4)
    assert b == pytest.approx(clean, abs=1e-4)


THREE = Graph(Architecture(3, 4, 4))


def ranked(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(THREE.exists.shape) * THREE.exists


def test_strongest_takes_the_largest_and_prunes():
    scores = np.zeros(THREE.exists.shape)
    for edge, score in {
        ("input", "m0"): 1.0,
        ("m0", "logits"): -3.0,
        ("a0.h0", "logits"): 2.0,  # nothing feeds this head
        ("input", "logits"): 0.5,
    }.items():
        scores[THREE.edge(*edge)] = score
    kept = strongest(THREE, scores, 3)
    assert {tuple(e) for e in np.argwhere(kept)} == {
        THREE.edge("input", "m0"),
        THREE.edge("m0", "logits"),
    }
    assert strongest(THREE, scores, THREE.n_edges).sum() == THREE.n_edges
    for n in (0, THREE.n_edges + 1):
        with pytest.raises(CircuitError, match=f"Asked for {n} edges; this graph has"):
            strongest(THREE, scores, n)


@pytest.mark.parametrize("needed", [1, 7, 40, 131, THREE.n_edges])
def test_minimal_edges_finds_the_count_it_takes(needed: int):
    """Faithfulness grows with the number of the ``needed`` strongest edges in the circuit."""
    scores = np.abs(ranked()) + THREE.exists * 1.0
    scores[THREE.edge("input", "logits")] = 100.0  # so that a single edge is a path
    order = np.sort(scores[THREE.exists])[::-1]
    important = (scores >= order[needed - 1]) & THREE.exists
    whole = THREE.prune(important).sum()

    def faithfulness(edges: np.ndarray) -> float:
        return float((edges & important).sum() / whole)

    edges, curve = minimal_edges(THREE, scores, faithfulness, target=1.0, tolerance=0.0)
    assert faithfulness(edges) >= 1.0
    counts = [n for n, _ in curve]
    assert counts == sorted(set(counts))
    # The fewest: it reaches the target, and the count just below, which was tried, does not.
    asked = min(n for n, f in curve if f >= 1.0)
    assert asked <= needed
    assert (edges == strongest(THREE, scores, asked)).all()
    assert asked == 1 or faithfulness(strongest(THREE, scores, asked - 1)) < 1.0
    assert dict(curve)[asked] == faithfulness(edges)


def test_minimal_edges_stops_within_the_tolerance():
    scores = np.abs(ranked(1)) + THREE.exists * 1.0

    def measure(target: float, tolerance: float) -> tuple[int, int]:
        tries: list[int] = []

        def faithfulness(edges: np.ndarray) -> float:
            tries.append(int(edges.sum()))
            return edges.sum() / THREE.n_edges

        edges, _ = minimal_edges(THREE, scores, faithfulness, target=target, tolerance=tolerance)
        return int(edges.sum()), len(tries)

    exact, loose = measure(0.5, 0.0), measure(0.5, 0.2)
    assert loose[1] < exact[1]
    assert exact[0] <= loose[0] <= 1.3 * exact[0]


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01])
def test_target_out_of_range(target: float):
    with pytest.raises(CircuitError, match=r"must lie in \(0, 1\]; got"):
        minimal_edges(THREE, ranked(), lambda e: 1.0, target=target)
