"""Views without a browser: what they hold, what they leave out, and every static form."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import re
import socket
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import browser
import numpy as np
import pytest
import torch

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.changes import CLASSES, classify
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import Divergence, GraphComparison
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.meta import CircuitMeta
from mansu_interp.errors import ArtifactError, CircuitError, ViewError
from mansu_interp.masks.mask import Mask
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.utils.files import finite
from mansu_interp.viz.data import Effect, GraphData, Judged, PromptData, is_gone
from mansu_interp.viz.layout import box_id, component_of, place_by_position, position_of
from mansu_interp.viz.page import module_source, page_script, policy, view_svg
from mansu_interp.viz.plots import Axis, Dots, make_axis, scatter_svg, strip_svg
from mansu_interp.viz.tokens import attention_patterns, harmless_token, look_inside, token_log_probs
from mansu_interp.viz.view import View, attribution_view, changes_view, circuit_view


def make_circuit(layers: int = 3, heads: int = 4, kv: int = 4, n: int = 40) -> Circuit:
    graph = Graph(Architecture(layers, heads, kv))
    rng = np.random.default_rng(0)
    scores = rng.standard_t(2, graph.exists.shape) * graph.exists * 0.05
    edges = np.abs(scores) >= np.sort(np.abs(scores[graph.exists]))[-n]
    return Circuit(graph, scores, edges & graph.exists, CircuitMeta("facts", faithfulness=0.87))


def make_attributions(circuit: Circuit) -> list[Attribution]:
    """Before, after and quantized, with every class of edge."""
    before = circuit.scores.copy()
    rng = np.random.default_rng(1)
    after = before * rng.choice([1.0, 0.0, 0.4, -0.8], before.shape)
    quantized = np.where(rng.random(before.shape) < 0.3, before, after)
    new = (rng.random(before.shape) < 0.1) & circuit.graph.exists
    before[new] = 0
    return [Attribution(circuit.graph, s, 1.0, 0.0) for s in (before, after, quantized)]


def test_a_view_holds_the_strongest_edges_and_the_circuit():
    circuit = make_circuit()
    weakest = np.argwhere(circuit.graph.exists & ~circuit.edges)[0]
    circuit.edges[tuple(weakest)] = True
    circuit.scores[tuple(weakest)] = 1e-9
    data = circuit_view(circuit, limit=50).data
    edges = data.edges
    at = list(zip(edges.source, edges.target, strict=True))
    strongest = np.sort(np.abs(circuit.scores[circuit.graph.exists]))[::-1]
    assert np.abs(edges.scores[0])[:50] == pytest.approx(strongest[:50], rel=1e-3)
    assert tuple(weakest) in at and len(at) == 51 and sum(edges.in_circuit) == 41
    assert len(circuit_view(circuit, limit=None).data.edges.source) == circuit.graph.n_edges
    values = data.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_a_change_view_agrees_with_classify():
    circuit = make_circuit()
    before, after, quantized = make_attributions(circuit)
    data = changes_view(circuit, before, after, quantized).data
    wanted = classify(before.scores, after.scores, quantized.scores)
    assert data.counts == wanted.counts() and min(data.counts.values()) > 0
    assert data.present_from == wanted.threshold
    sums = np.abs(before.scores.sum(1))
    first = next(i for i in np.argsort(-sums) if i)  # the input is where everything begins
    where, became, _ = data.facts
    assert where.startswith(f"carried most before: {circuit.graph.writers[first].id}, ")
    most = max(data.counts, key=lambda name: data.counts[name])
    assert became.startswith(f"edges: {data.counts[most]} {most}, ")
    assert data.edges.classes is not None
    for i, j, code in zip(data.edges.source, data.edges.target, data.edges.classes, strict=True):
        assert wanted.codes[i, j] == code
    of_nodes = classify(*(a.scores.sum(1) for a in (before, after, quantized)))
    assert data.nodes.classes == of_nodes.codes.tolist()


SHOWN = GraphComparison({"unlearned": Divergence(0.1, -0.02, 0.3, 0.2)})


def change_data() -> GraphData:
    """A change view with everything that is optional."""
    circuit = make_circuit(kv=2)
    cad = Judged("suppressed", "Hidden.")
    return changes_view(circuit, *make_attributions(circuit), cad=cad, comparison=SHOWN).data


def test_what_is_lost_is_solid_where_it_carries():
    """In the picture, as `is_gone` says; other classes have their own style everywhere."""
    assert is_gone("erased", [4.0, 1.9, 2.1], 0) is False
    assert is_gone("erased", [4.0, 1.9, 2.1], 1) is True
    assert is_gone("suppressed", [-4.0, -1.9, -2.1], 2) is False
    assert is_gone("silent", [4.0, -4.0], 1) is True  # of the other sign
    assert is_gone("kept", [4.0, 1.0], 1) is None and is_gone(None, [1.0], 0) is None
    data = change_data()
    edges, names = data.edges, [CLASSES[k] for k in data.edges.classes or []]
    looks = [[is_gone(name, [s[k] for s in edges.scores], p) for k, name in enumerate(names)]
             for p in range(len(data.panes))]  # fmt: skip
    solid = View(data).svg(top=len(names)).count('style="stroke-dasharray:none"')
    assert solid == sum(look is False for pane in looks for look in pane) > 0
    assert {True, False, None} == {look for pane in looks for look in pane}


def test_data_comes_back_from_its_json():
    for data in (circuit_view(make_circuit()).data, change_data()):
        values = json.loads(json.dumps(finite(data.to_json()), allow_nan=False))
        again = GraphData.from_json(values)
        assert finite(again.to_json()) == values
        assert replace(again, comparison=None) == replace(data, comparison=None)
    assert again.comparison is not None
    assert np.isnan(again.comparison["unlearned"].metric)  # unknown, and not 0


def test_the_json_is_the_documented_one():
    """The table of docs/viewing.md."""
    values = change_data().to_json()
    assert set(values) == {
        *("schema", "title", "facts", "unit", "architecture", "panes", "total", "top", "writers"),
        *("readers", "edges", "nodes", "weights", "layout", "styles", "fading", "cad"),
        *("comparison", "classes", "meaning", "counts", "present_from"),
    }
    assert values["schema"] == 2
    assert values["classes"] == list(CLASSES)
    names = {"kept", "silent", "weakened", "recovered", "new"}
    assert set(values["counts"]) == set(values["meaning"]) == names
    assert set(values["edges"]) == {"source", "target", "in_circuit", "scores", "class"}
    assert set(values["nodes"]) == {"scores", "class"}
    assert values["comparison"]["unlearned"]["projected_share"] == -0.02
    plain = circuit_view(make_circuit()).data.to_json()
    assert set(values) - set(plain) == {"classes", "meaning", "counts", "present_from"}
    assert set(plain["edges"]) == {"source", "target", "in_circuit", "scores"}


def refused(values: Any, where: tuple[Any, ...], value: Any, message: str) -> None:
    """A graph's data with one value replaced are no graph's data."""
    inner: Any = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        GraphData.from_json(values)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("schema",), 1, "has schema 1; this version reads 2"),
        (("title",), 5, "the graph.title is 5, expected str"),
        (("architecture", "n_kv_heads"), 3, "n_kv_heads dividing"),
        (("edges", "source", 0), 10**6, "no edge 1000000"),
        (("edges", "source", 0), -1, "no edge -1"),
        (("edges", "scores", 0), [], "edges has a column of 0 entries, expected"),
        (("edges", "class", 0), 8, "a class is none of the 8"),
        (("nodes", "scores"), [], "panes has a column of 0 entries, expected 3"),
        (("counts",), {}, "classes and counts must come together"),
        (("comparison", "unlearned", "mass"), "much", "mass is 'much'"),
        (("comparison", "unlearned"), {}, "lacks alignment"),
    ],
)
def test_damaged_data_is_refused(where: tuple[Any, ...], value: Any, message: str):
    values = finite(change_data().to_json())
    refused(values, where, value, message)
    with pytest.raises(ArtifactError, match="The graph is damaged: the graph is list"):
        GraphData.from_json([])


def token_data() -> GraphData:
    """A view with prompts, positions and a state."""
    circuit = make_circuit(kv=2)
    by_position = np.stack([0.25 * circuit.scores, 0.75 * circuit.scores])
    scores = Attribution(circuit.graph, circuit.scores, 1.0, 0.0, by_position)
    prompt = PromptData("a b", ["a", "b"], "c", {"a1.h2": [100, 40, 60]},
                        {"m0": Effect(["c", "d"], [1.5, -2.0], 1.5)})  # fmt: skip
    data = attribution_view(scores, limit=50).data
    return replace(data, prompts=[prompt], state={"pinned": ["m0"]})


def test_what_happens_at_the_tokens_comes_back_from_json():
    data = token_data()
    assert data.positions is not None and data.positions.tokens == ["0", "1"]
    small, large = (np.array(x) for x in data.positions.scores)
    assert small * 3 == pytest.approx(large, rel=2e-3)
    assert small + large == pytest.approx(np.array(data.edges.scores[0]), rel=2e-3)
    nodes = np.array(data.positions.nodes)
    assert nodes.sum(0) == pytest.approx(np.array(data.nodes.scores[0]), rel=5e-3, abs=1e-4)
    values = json.loads(json.dumps(data.to_json(), allow_nan=False))
    assert GraphData.from_json(values) == data
    assert values["prompts"][0]["effects"] == {
        "m0": {"tokens": ["c", "d"], "values": [1.5, -2.0], "answer": 1.5}
    }
    plain = circuit_view(make_circuit()).data.to_json()
    assert not {"prompts", "positions", "state"} & set(plain)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("prompts", 0, "attention", "a1.h2"), [1], "attention has a column of 1 entries, exp"),
        (("prompts", 0, "effects", "m0", "values"), [], "effects has a column of 0 entries"),
        (("prompts", 0, "tokens", 0), 5, "tokens"),
        (("positions", "scores", 1), [], "positions has a column of 0 entries"),
        (("positions", "tokens"), [], "positions has a column of 0 entries"),
        (("positions", "nodes", 0), [], "positions has a column of 0 entries"),
        (("panes",), ["", "x"], "panes has a column of 1 entries"),
        (("state",), [], "state is list, expected dict"),
    ],
)
def test_damaged_token_data_are_refused(where: tuple[Any, ...], value: Any, message: str):
    values = json.loads(json.dumps(token_data().to_json()))
    refused(values, where, value, message)


def test_attention_and_direct_effects_by_hand(facts: LanguageModel, capitals: Task):
    """Against hooks on the Hugging Face model's own modules."""
    pair, hf = capitals.forget[0], facts.hf
    (prompt,) = look_inside(facts, [pair], ["a0.h1", "a3.h7", "m3"])
    assert prompt.text == pair.prompt and prompt.answer == pair.answer_text
    assert set(prompt.attention) == {"a0.h1", "a3.h7"}
    assert set(prompt.effects) == {*prompt.attention, "m3"}
    tokens, base = torch.tensor([pair.clean]), hf.base_model
    seen: dict[str, torch.Tensor] = {}

    def without(write: torch.Tensor) -> torch.Tensor:
        hook = base.norm.register_forward_pre_hook(lambda m, i: (i[0] - write,))
        with torch.no_grad():
            found = facts.all_logits(tokens)[0, -1]
        hook.remove()
        return found

    attention = base.layers[0].self_attn
    hooks = [
        base.layers[3].mlp.register_forward_hook(lambda m, i, o: seen.update(m3=o)),
        attention.o_proj.register_forward_pre_hook(lambda m, i: seen.update(z=i[0])),
    ]
    whole = without(torch.zeros(1))
    for hook in hooks:
        hook.remove()
    size = facts.d_model // facts.architecture.n_heads
    head = seen["z"].clone()
    head[..., :size] = head[..., 2 * size :] = 0
    for name, write in (("m3", seen["m3"]), ("a0.h1", head @ attention.o_proj.weight.T)):
        effect = whole - without(write)
        effect = effect - effect.mean()
        found = prompt.effects[name]
        assert found.answer == pytest.approx(float(effect[pair.answer]), rel=0.02, abs=2e-3)
        assert found.values[0] == pytest.approx(float(effect.max()), rel=0.01)
        assert found.values[-1] == pytest.approx(float(effect.min()), rel=0.01)
        assert found.tokens[0] == facts.get_tokenizer().decode([int(effect.argmax())])
        assert len(found.tokens) == 12
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        shares = hf(tokens, output_attentions=True).attentions[3][0, 7]
    hf.set_attn_implementation("sdpa")
    n = len(pair.clean)
    assert prompt.attention["a3.h7"] == [
        round(100 * float(shares[q, k])) for q in range(n) for k in range(q + 1)
    ]


def test_views_with_prompts(facts: LanguageModel, capitals: Task):
    pairs = PairSet("few", capitals.forget.pairs[:4])
    scores = attribute(facts, pairs, config=AttributionConfig(method="eap"), positions=True)
    data = attribution_view(scores, model=facts, pairs=pairs, limit=300).data
    assert len(data.prompts) == 3 and data.weights["m0"]
    assert data.positions is not None
    first = [facts.get_tokenizer().decode([t]) for t in pairs[0].clean]
    assert data.positions.tokens[0] == first[0]
    assert [t.removesuffix("…") for t in data.positions.tokens[: len(first)]] == first
    drawn = {end.split("<")[0] for edge in data.edge_ids()[: data.top] for end in edge}
    assert set(data.prompts[0].effects) == {n for n in drawn if "kv" not in n} - {"logits"}
    with pytest.raises(ViewError, match="need the model: give model=, too"):
        attribution_view(scores, pairs=pairs)
    longer = PairSet("longer", (replace(pairs[0], clean=(1,) * 30, corrupt=(1,) * 30),))
    with pytest.raises(ViewError, match=r"of \d positions and the longest prompt has 30 tokens"):
        attribution_view(scores, model=facts, pairs=longer)


def by_position(kv: int = 4, tokens: int = 5, n: int = 40) -> View:
    """A view whose edges carry something at some of the tokens, the second and third excepted."""
    circuit = make_circuit(kv=kv, n=n)
    share = np.random.default_rng(3).dirichlet([0.3] * tokens, circuit.scores.shape)
    share[..., 1:3] = 0
    scores = np.moveaxis(share, -1, 0) * circuit.scores
    given = Attribution(circuit.graph, scores.sum(0), 1.0, 0.0, scores)
    return attribution_view(given, by_position=True)


def drawn_in(svg: str, what: str) -> list[str]:
    """Titles of the edges, boxes or moves of a picture, or its texts."""
    root = ET.fromstring(svg)
    if what == "text":
        return [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    groups = [e for e in root.iter() if e.tag.endswith("}g") and e.get("class")]
    found = [e for e in groups if (e.get("class") or "").split()[0] == what]
    return [e[0].text or "" for e in found]


@pytest.mark.parametrize("kv", [4, 2])
def test_a_picture_by_token_position(kv: int):
    view = by_position(kv)
    places, names = view.data.positions, view.data.edge_ids()
    assert places is not None and view.data.state == {"by_position": True}
    scores = {
        (f"{u}@{p}", f"{v}@{p}"): row[k]
        for p, row in enumerate(places.scores)
        for k, (u, v) in enumerate(names)
    }
    strongest = sorted(scores, key=lambda e: -abs(scores[e]))[:30]
    svg = view.svg(top=30)
    edges = [title.split(" (")[0].split(":")[0] for title in drawn_in(svg, "edge")]
    assert sorted(edges) == sorted(f"{u} -> {v}" for u, v in strongest)
    assert {"0", "1", "2", "3", "4", "L1"} <= set(drawn_in(svg, "text"))  # columns and rows
    layout = place_by_position(
        view.data.architecture, {box_id(end) for e in strongest for end in e}, places.tokens
    )
    columns = {p: c for c in layout.columns for p in c.positions}
    for box in layout.boxes.values():  # a node stands in the column of its token
        at = position_of(box.id)
        assert at is not None and columns[at].holds(box)
        assert abs(box.x - columns[at].x) + box.width / 2 <= columns[at].width / 2 + 1e-6
    assert [c.x for c in layout.columns] == sorted(c.x for c in layout.columns)
    # a head moves from where something enters its keys or values to where it writes, never back
    reads = {box_id(v) for _, v in strongest if "<k>" in v or "<v>" in v}
    writes = {u for u, _ in strongest if u.startswith("a")}
    wanted = set()
    for start in reads:
        for end in writes:
            layer, h = component_of(end)[1:].split(".h")
            reader = f"a{layer}.kv{int(h) // 2}" if kv == 2 else component_of(end)
            later = (position_of(start) or 0) <= (position_of(end) or 0)
            if component_of(start) == reader and later and start != end:
                wanted.add(f"{start} moves to {end}, not scored")
    assert set(drawn_in(svg, "move")) == wanted and wanted
    assert "one for each edge and position" in svg


def test_a_column_of_three_empty_tokens_is_one():
    graph = Architecture(3, 4, 4)
    layout = place_by_position(graph, ["m0@0", "m1@4", "a1.h0@6"], list("abcdefgh"))
    assert [c.positions for c in layout.columns] == [[0], [1, 2, 3], [4], [5], [6], [7]]
    assert [c.label for c in layout.columns] == ["a", "⋯", "e", "f", "g", "h"]
    many = [f"a1.h{h}@1" for h in range(4)] + ["m1@1", *(f"a1.kv{k}@0" for k in range(4))]
    boxes = place_by_position(graph, [*many, "a0.h1@1"], ["x", "y"]).boxes
    assert len({boxes[f"a1.h{h}@1"].y for h in range(4)}) == 1  # four in a line
    boxes = place_by_position(Architecture(3, 8, 8), [*many, "a1.h7@1"], ["x", "y"]).boxes
    assert boxes["a1.h7@1"].y < boxes["a1.h0@1"].y and boxes["m1@1"].y < boxes["a1.h7@1"].y


def test_positions_are_asked_for_where_there_are_none(facts: LanguageModel):
    circuit = make_circuit()
    scores = Attribution(circuit.graph, circuit.scores, 1.0, 0.0)
    for make in (
        lambda: attribution_view(scores, by_position=True),
        lambda: circuit_view(circuit, scores=scores),
    ):
        with pytest.raises(ViewError, match=r"not by token position: attribute\(.*positions=True"):
            make()
    other = make_circuit(2)
    with pytest.raises(ViewError, match="give those of the circuit's own model"):
        circuit_view(circuit, scores=Attribution(other.graph, other.scores, 1.0, 0.0))
    places = np.stack([circuit.scores, 0 * circuit.scores])
    view = circuit_view(circuit, scores=Attribution(circuit.graph, circuit.scores, 1, 0, places))
    assert {t.split("@")[1][0] for t in drawn_in(view.svg(), "edge")} == {"0"}


GROUPS = {"early": ["a0.h1", "a0.h3", "m0", "a1.h0"], "late <q>": ["a2.h0", "a2.h1", "m2"]}


@pytest.mark.parametrize("kv", [4, 2])
def test_closed_groups_are_one_node_of_the_picture(kv: int):
    circuit = make_circuit(kv=kv, n=120)
    open_view = changes_view(circuit, *make_attributions(circuit))
    state: dict[str, Any] = {"groups": GROUPS, "closed": ["early"]}
    data = replace(open_view.data, state=state)
    svg = view_svg(data)
    assert len(drawn_in(svg, "group")) == 3 and "early" in drawn_in(svg, "text")
    gone = set(GROUPS["early"])
    assert not gone & set(drawn_in(svg, "text")) and "a2.h0" in drawn_in(svg, "text")
    n = min(200, data.top)
    lines: dict[tuple[str, str], list[float]] = {}
    for k, ends in enumerate(data.edge_ids()[:n]):
        u, v = ("⊞ early" if box_id(end) in gone else end for end in ends)
        if (u, v) != ("⊞ early", "⊞ early"):
            old = lines.get((u, v), [0.0] * 3)
            lines[u, v] = [a + s[k] for a, s in zip(old, data.edges.scores, strict=True)]
    titles = drawn_in(svg, "edge")
    assert len(titles) == 3 * len(lines)
    for (u, v), sums in lines.items():
        found = [t for t in titles if t.split(":")[0].split(" (")[0] == f"{u} -> {v}"]
        shown = [float(t.split(": ")[1].split(",")[0]) for t in found]
        assert shown == pytest.approx(sums, rel=2e-3, abs=1e-6), (u, v)
    assert f"as {len(lines)} lines" in svg and ", as " not in view_svg(open_view.data)
    # by position, too: a member stands for its nodes at all tokens, or for one
    view = by_position(kv)
    whole = replace(view.data, state={**view.data.state, **state})
    names = drawn_in(view_svg(whole), "text")
    assert "early" in names and not gone & set(names)
    one = {"groups": {"x": ["m0@0"]}, "closed": ["x"], "by_position": True}
    ends = [t.split(":")[0] for t in drawn_in(view_svg(replace(view.data, state=one)), "edge")]
    assert [e for e in ends if "⊞ x" in e] and not [e for e in ends if "m0@0" in e]
    assert [e for e in ends if "m0@3" in e]


@pytest.mark.parametrize(
    "state",
    [
        {"groups": 5, "closed": ["x"]}, {"groups": {"x": 5}, "closed": ["x"]},
        {"groups": {"x": [5]}, "closed": [[], "x"]}, {"by_position": 1, "tokens_of": "x"},
        {"groups": {"x": ["zz", "m9@99"]}, "closed": ["x"], "by_position": True},
    ],
)  # fmt: skip
def test_a_state_of_another_form_is_drawn_without(state: dict[str, Any]):
    data = by_position().data
    assert drawn_in(view_svg(replace(data, state=state)), "edge")


def test_the_verdict_is_shown_on_top():
    svg = view_svg(change_data())
    assert "CAD: suppressed. Hidden." in svg and "silent: carries less than a quarter" in svg


def test_the_data_of_a_view_is_small():
    circuit = make_circuit(12, 12, 12, 400)
    data = changes_view(circuit, *make_attributions(circuit)).data.to_json()
    assert circuit.graph.n_edges == 32_491
    assert len(json.dumps(data, separators=(",", ":"))) < 250_000


def test_the_weights_behind_a_component(tiny_model: Any):
    model = tiny_model(2)
    circuit = make_circuit(3, 4, 2)
    weights = circuit_view(circuit, model=model).data.weights
    assert weights["a1.h3"] == [
        "model.layers.1.self_attn.q_proj.weight rows 24–31",
        "model.layers.1.self_attn.o_proj.weight cols 24–31",
    ]
    assert weights["a2.kv1"][0] == "model.layers.2.self_attn.k_proj.weight rows 8–15"
    assert [w.split()[0].split(".")[-2] for w in weights["m0"]] == [
        "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert "input" not in weights
    rows = Mask({"model.embed_tokens.weight": torch.arange(64, 96)})
    assert circuit_view(circuit, model=model, mask=rows).data.weights["input"] == [
        "model.embed_tokens.weight rows of subjects: 32 of them in the mask"
    ]


def test_scores_of_another_architecture_are_refused():
    circuit = make_circuit()
    other = make_attributions(make_circuit(2))
    with pytest.raises(CircuitError, match=r"scores of before have shape \(11, 27\)"):
        changes_view(circuit, *other)


@pytest.mark.slow
def test_every_static_form(tmp_path: Path):
    circuit = make_circuit()
    for view, panes in (
        (circuit_view(circuit), 1),
        (changes_view(circuit, *make_attributions(circuit)), 3),
    ):
        root = ET.fromstring(view.to_svg(tmp_path / "v.svg").read_text("utf-8"))
        assert len([e for e in root if e.tag.endswith("}g")]) == panes + 0
        drawn = [e for e in root.iter() if e.get("class") == "edge"]
        assert len(drawn) == panes * min(200, view.data.top)
        page = view.to_html(tmp_path / "v.html").read_text("utf-8")
        assert page_script() in page and policy() in page
        assert view.to_json(tmp_path / "v.json").stat().st_size > 1000
        bundle = view._repr_mimebundle_()
        assert bundle["image/svg+xml"].startswith("<svg")
    assert "var(" not in circuit_view(circuit).svg(theme="light")


def test_png(tmp_path: Path):
    pytest.importorskip("resvg_py")
    image = pytest.importorskip("PIL.Image")
    view = circuit_view(make_circuit())
    light, dark = (
        np.asarray(image.open(view.to_png(tmp_path / f"{d}.png", dark=d)).convert("RGB"))
        for d in (False, True)
    )
    assert light.shape == dark.shape and light.shape[1] > 900
    assert light[1, 1].tolist() == [255, 255, 255] and dark[1, 1].max() < 50
    blue = (light == [0x00, 0x72, 0xB2]).all(-1).sum() + (np.ptp(light, axis=-1) > 60).sum()
    assert blue > 500  # edges in colour, not only boxes


def test_without_the_extra_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("resvg_py", "anywidget"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mansu_interp.viz.widget", raising=False)
    view = circuit_view(make_circuit())
    with pytest.raises(ViewError, match=r'pip install "mansu-interp\[png\]".*to_svg'):
        view.to_png(tmp_path / "x.png")
    with pytest.raises(ViewError, match=r"The widget needs the package anywidget, which cannot"):
        view.widget()
    assert list(tmp_path.iterdir()) == []


def test_the_widget_is_an_ordinary_one_with_a_static_picture():
    pytest.importorskip("anywidget")
    widget = circuit_view(make_circuit()).widget()
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["image/svg+xml"].startswith("<svg")
    assert "application/vnd.jupyter.widget-view+json" in data


@pytest.mark.slow
def test_saved_notebooks_hold_pixels_and_svg(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("resvg_py")
    circuit = make_circuit()
    view = changes_view(circuit, *make_attributions(circuit))
    bundle = view._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    root = ET.fromstring(bundle["image/svg+xml"])
    assert float(root.get("width") or 0) <= 1100 and "max-width:100%" in (root.get("style") or "")
    if importlib.util.find_spec("anywidget"):
        live = view.widget()._repr_mimebundle_()
        live = live[0] if isinstance(live, tuple) else live
        assert live["image/png"] == bundle["image/png"]
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert set(view._repr_mimebundle_()) == {"image/svg+xml", "text/plain"}


def test_a_large_graph_leaves_out_what_carries_nothing():
    circuit = make_circuit(30, 9, 9, n=40)
    text = circuit_view(circuit).svg()
    root = ET.fromstring(text)
    boxes = [g for g in root.iter() if (g.get("class") or "").split()[:1] in (["head"], ["mlp"])]
    assert 5 < len(boxes) < 100 and "are left out" in text
    assert {g.get("class", "").split()[1] for g in boxes} == {"on"}
    small = circuit_view(make_circuit()).svg()
    assert "are left out" not in small and ">a2.h3<" in small and ">m2<" in small


def test_a_selection_becomes_a_circuit():
    pytest.importorskip("anywidget")
    circuit = make_circuit()
    widget = circuit_view(circuit).widget()
    assert (widget.circuit(circuit).edges == circuit.edges).all()
    widget.selected = ["a1.h2", "m0"]
    found = widget.circuit(circuit)
    edges = [e[:2] for e in found.to_networkx().edges(data="kind") if e[2] == "residual"]
    names = [(u, v.split("<")[0]) for u, v in edges]
    assert names and all({"a1.h2", "m0"} & {u, v} for u, v in names)
    touching = sum(
        bool({"a1.h2", "m0"} & {u, v.split("<")[0]})
        for u, v, d in circuit.to_networkx().edges(data=True)
        if d["kind"] == "residual"
    )
    assert len(names) == touching
    widget.threshold = float(np.abs(circuit.scores).max())
    assert widget.circuit(circuit).n_edges <= 1
    widget.threshold = None
    source, target = names[0][0], next(v for u, v in found.to_networkx().edges if u == names[0][0])
    widget.selected_edge = [source, target]
    assert widget.circuit(circuit).n_edges == 1
    widget.selected_edge = []
    widget.state = {"groups": {"mine": ["a1.h2", "m0"]}}
    widget.selected = widget.groups["mine"]
    assert (widget.circuit(circuit).edges == found.edges).all()
    widget.selected = ["a9.h9"]
    with pytest.raises(ViewError, match=r"'a9\.h9' is no component"):
        widget.circuit(circuit)


def test_a_selection_at_a_position_becomes_its_components():
    pytest.importorskip("anywidget")
    circuit = make_circuit()
    widget = by_position().widget()
    assert widget.state == {"by_position": True}
    widget.selected = ["a1.h2"]
    whole = widget.circuit(circuit).edges
    widget.selected = ["a1.h2@3", "a1.h2@0"]
    assert (widget.circuit(circuit).edges == whole).all() and whole.any()
    # the threshold is on what an edge carries at one token
    data = widget.view.data
    assert data.positions is not None
    most = np.abs(data.positions.scores).max(0)
    widget.selected, widget.threshold = [], float(np.sort(most)[-20])
    passing = [e for e, s in zip(data.edge_ids(), most, strict=True) if s >= widget.threshold]
    found = {(e.source, e.target) for e in widget.circuit(circuit).top(10**6)}
    in_circuit = {(e.source, e.target) for e in circuit.top(10**6)}
    assert found == set(passing) & in_circuit and 0 < len(found) < circuit.n_edges
    widget.threshold = None
    source, target = next(e for e in circuit_view(circuit).data.edge_ids() if "<q>" in e[1])
    widget.selected_edge = [f"{source}@3", f"{target}@3"]
    assert widget.circuit(circuit).n_edges == 1


@pytest.mark.parametrize("kv", [4, 2])
def test_the_line_of_a_closed_group_becomes_its_edges(kv: int):
    pytest.importorskip("anywidget")
    circuit = make_circuit(kv=kv, n=180)
    widget = circuit_view(circuit).widget()
    groups = {"late": ["a1.h0", "a1.h1", "m2"], "early": ["m0", "a0.h1"]}
    widget.state = {"groups": groups, "closed": ["late", "early"]}
    bars = {"a1.kv0"} if kv == 2 else set()  # what only they read
    early, late = set(groups["early"]), {*groups["late"], *bars}
    for edge, sources, targets in (
        (["⊞ early", "⊞ late"], early, late),
        (["⊞ early", "logits"], early, {"logits"}),
        (["m1", "⊞ late"], {"m1"}, late),
    ):
        widget.selected_edge = edge
        found = {(e.source, e.target) for e in widget.circuit(circuit).top(10**6)}
        real = [(e.source, e.target) for e in circuit.top(10**6)]
        wanted = {(u, v) for u, v in real if u in sources and v.split("<")[0] in targets}
        assert found == wanted and wanted, edge
    widget.selected_edge = ["⊞ gone", "logits"]
    with pytest.raises(ViewError, match=r"'gone' is no group of this widget; its groups: early, l"):
        widget.circuit(circuit)


def test_the_module_asks_for_nothing():
    source = module_source()
    for needle in ("http:", "https:", "import ", "fetch(", "XMLHttp", "innerHTML", "eval("):
        assert needle not in source.replace("http://www.w3.org/2000/svg", ""), needle


# Charts: where values land, by hand.


def test_axis_positions():
    assert Axis(0.0, 10.0, 100.0, 200.0, False).at(2.5) == 125
    assert Axis(0.0, 10.0, 100.0, 200.0, False).at(99.0) == 200
    assert Axis(0.01, 1.0, 100.0, 300.0, True).at(0.1) == pytest.approx(200)
    up = Axis(0.0, 1.0, 250.0, 10.0, False)
    assert up.at(0.0) == 250 and up.at(1.0) == 10
    assert Axis(-0.05, 1.05, 0.0, 1.0, False).ticks() == [0.0, 0.5, 1.0]
    assert Axis(0.01, 10.0, 0.0, 1.0, True).ticks() == pytest.approx([0.01, 0.1, 1, 10])


def test_axis_of_equal_or_missing_values():
    flat = make_axis([3.0, 3.0], 0.0, 1.0, False)
    assert flat.low < 3 < flat.high
    assert make_axis([0.0, -1.0], 0.0, 1.0, True).low == pytest.approx(0.1)


def test_strip_has_a_mark_per_value_at_its_place():
    svg = strip_svg([Dots("a<b", [1.0, 2.0]), Dots("ours", [3.0], True)], "what", target=2.0)
    ElementTree.fromstring(svg)
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    (square,) = [float(x) + 4 for x in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="8"', svg)]
    assert places[1] - places[0] == pytest.approx(square - places[1], abs=0.2)
    (target,) = re.findall(r'class="target" stroke-width="1.5" d="M([\d.]+)', svg)
    assert float(target) == pytest.approx(places[1], abs=0.1)
    assert "a&lt;b: 1" in svg


def test_scatter_leaves_out_what_a_logarithm_cannot_show():
    points = [(Dots("m", [0.0, 0.1]), Dots("m", [1.0, 2.0]))]
    svg = scatter_svg(points, "x", "y", log_x=True)
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 1
    assert scatter_svg(points, "x", "y").count("<circle") == 2


def test_scatter_names_each_row_once():
    points = [(Dots("dense", [1.0, 2.0]), Dots("dense", [0.3, 0.4]))]
    assert scatter_svg(points, "x", "y", labels=True).count(">dense</text>") == 1
    assert ">dense</text>" not in scatter_svg(points, "x", "y")


def test_names_at_one_place_do_not_cover_each_other():
    points = [(Dots(n, [2.0]), Dots(n, [0.3])) for n in ("one", "two", "three")]
    points.append((Dots("far", [1.0]), Dots("far", [0.4])))
    svg = scatter_svg(points, "x", "y", labels=True)
    lines = [float(y) for y in re.findall(r'y="([\d.]+)">(?:one|two|three)<', svg)]
    assert [b - a for a, b in itertools.pairwise(lines)] == [12.0, 12.0]


# CircuitsVis panels: right numbers, one script, no network.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails afterwards too: CircuitsVis swallows every error of its own probe."""
    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> None:
        asked.append(where)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


def test_log_probs_say_what_the_model_says(no_network: None, facts: LanguageModel, capitals: Task):
    pair = capitals.forget[0]
    view = token_log_probs({"before": facts, "quantized": facts}, pair)
    with torch.no_grad():
        last = facts.all_logits(torch.tensor([pair.clean]))[0, -1].log_softmax(-1)
    assert f"before, clean: log-prob of {pair.answer_text!r} {float(last[pair.answer]):+.2f}" in (
        repr(view)
    )
    assert view.html.count("CircuitsVis.TokenLogProbs") == 4
    assert len(view._repr_html_()) < 2_500_000  # the library once, not four times


def test_attention_of_both_prompts(no_network: None, facts: LanguageModel, capitals: Task):
    view = attention_patterns({"before": facts}, capitals.forget[0], 1, 2)
    assert "a1.h2, before, corrupt" in view.html and "looks most at" in repr(view)
    with pytest.raises(ViewError, match=r"No head a9\.h0 in before"):
        attention_patterns({"before": facts}, capitals.forget[0], 9, 0)


def test_a_token_cannot_end_the_script():
    assert "</script" not in harmless_token("</script>") and "<!--" not in harmless_token("<!--")
    assert "<SCRIPT" not in harmless_token("<SCRIPT")
    assert harmless_token("<bos> a < b") == "<bos> a < b"


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")
def test_the_page_draws_without_a_network(facts: LanguageModel, capitals: Task, tmp_path: Path):
    pages = [
        token_log_probs({"before": facts}, capitals.forget[0]).to_html(tmp_path / "t.html"),
        attention_patterns({"before": facts}, capitals.forget[0], 1, 2).to_html(
            tmp_path / "a.html"
        ),
    ]
    with browser.chromium() as driver:
        for page in pages:
            driver.get(page.as_uri())
            driver.implicitly_wait(10)
            blocks = driver.find_elements("css selector", "[id^=circuits-vis] *")
            assert len(blocks) > 5
            assert browser.complaints(driver) == []
            assert set(browser.requests(driver)) == {page.as_uri()}
