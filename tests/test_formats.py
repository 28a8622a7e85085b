"""Circuits in the files of other tools: names and sums by hand, round trips, files that lie."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from conftest import SHIPPED, make_pairs, make_tiny
from transformer_lens.tools.analysis.attribution_patching import Node as LensNode

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.formats.files import read_circuit, write_circuit
from mansu_interp.circuits.formats.scored import save_scores
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.discover import discover
from mansu_interp.circuits.search.meta import CircuitMeta
from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError
from mansu_interp.models.graph import Architecture, Graph

ARCHITECTURES = {
    "own keys": Architecture(3, 4, 4),
    "shared keys": Architecture(3, 4, 2),
    "one key": Architecture(2, 4, 1),
    "parallel": Architecture(3, 4, 4, parallel=True),
}
WAYS = {
    "eap-ig": "c.json",
    "eap-ig tensors": "c.pt",
    "transformer-lens": "c.json",
    "neuronpedia": "c.json",
    "node-link": "c.json",
    "native": "c.json",
}


def some_circuit(sizes: Architecture, seed: int = 0) -> Circuit:
    """A random connected circuit with edges to q, k and v; every edge of the graph has a score."""
    rng, graph = np.random.default_rng(seed), Graph(sizes)
    scores = (rng.normal(size=graph.exists.shape) * graph.exists).astype(np.float32)
    edges = graph.prune(graph.exists & (rng.random(graph.exists.shape) < 0.7))
    assert {"q", "k", "v", "mlp", "logits"} == {graph.readers[j].kind for j in np.nonzero(edges)[1]}
    return Circuit(graph, scores, edges, CircuitMeta(model="tiny"))


@pytest.mark.parametrize("sizes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("way", WAYS)
def test_every_edge_comes_back(tmp_path: Path, way: str, sizes: Architecture):
    made, path = some_circuit(sizes), tmp_path / WAYS[way]
    write_circuit(made, path, way.split(maxsplit=1)[0])  # pyright: ignore[reportArgumentType]
    for model in (None, sizes):
        back = read_circuit(path, model)
        assert back.graph == made.graph
        assert (back.edges == made.edges).all()
        assert back.scores[made.edges] == pytest.approx(made.scores[made.edges], abs=1e-6)
        whole = made.scores if way.startswith("eap-ig") else np.where(made.edges, made.scores, 0)
        assert np.abs(back.scores - whole).max() < 1e-6
        assert not back.meta.caveat
    with pytest.raises(ArtifactError, match=r"and the model is Arch|No edge|twice"):
        read_circuit(path, Architecture(5, 6, 6))


# hannamw/EAP-IG: one layer of two heads, in the words of its Graph.to_json and Graph.to_pt.
CFG = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
IN = {
    "input->a0.h0<q>": 0.5,
    "input->a0.h0<k>": 0.25,
    "input->a0.h1<k>": -1.0,
    "input->a0.h0<v>": 0.125,
    "input->a0.h1<v>": 2.0,
    "a0.h0->m0": -3.0,
    "a0.h0->logits": 4.0,
    "m0->logits": 5.0,
}
OUT = {"input->a0.h1<q>": 7.0, "a0.h1->logits": -8.0}


def theirs() -> dict[str, Any]:
    nodes = {n: {"in_graph": n != "a0.h1"} for n in ("input", "a0.h0", "a0.h1", "m0", "logits")}
    edges = {n: {"score": s, "in_graph": n in IN} for n, s in {**IN, **OUT}.items()}
    return {"cfg": CFG, "nodes": nodes, "edges": edges}


def as_tensors() -> dict[str, Any]:
    graph = Graph(Architecture(1, 2, 2))
    scores, edges = torch.zeros(graph.exists.shape), torch.zeros(graph.exists.shape).bool()
    for name, score in {**IN, **OUT}.items():
        at = graph.edge(*name.split("->"))
        scores[at], edges[at] = score, name in IN
    names = ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0", "logits"]
    return {
        "cfg": CFG,
        "src_nodes": ["input", "a0.h0", "a0.h1", "m0"],
        "dst_nodes": names,
        "edges_scores": scores,
        "edges_in_graph": edges,
        "nodes_in_graph": torch.tensor([True, True, False, True]),
    }


def saved(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("tensors", [False, True])
def test_eap_ig_by_hand(tmp_path: Path, tensors: bool):
    """Edges that end in a node outside the circuit are outside, too, as its own pruning has it."""
    path = tmp_path / "theirs.pt" if tensors else saved(tmp_path, theirs())
    if tensors:
        torch.save(as_tensors(), path)
    found = read_circuit(path)
    assert found.graph.architecture == Architecture(1, 2, 2)
    names = {**IN, **OUT}
    for i, j in np.argwhere(found.graph.exists):
        name = f"{found.graph.writers[i].id}->{found.graph.readers[j].id}"
        assert found.scores[i, j] == names.get(name, 0.0)
        assert found.edges[i, j] == (name in IN and "h1" not in name), name
    assert found.meta == CircuitMeta(made_by="EAP-IG")


@pytest.mark.parametrize("tensors", [False, True])
def test_a_shared_key_has_the_sum_of_its_heads(tmp_path: Path, tensors: bool):
    path = tmp_path / "theirs.pt" if tensors else saved(tmp_path, theirs())
    if tensors:
        torch.save(as_tensors(), path)
    found = read_circuit(path, Architecture(1, 2, 1))
    graph = found.graph
    assert found.scores[graph.edge("input", "a0.kv0<k>")] == 0.25 - 1.0
    assert found.scores[graph.edge("input", "a0.kv0<v>")] == 0.125 + 2.0
    assert found.scores[graph.edge("input", "a0.h0<q>")] == 0.5
    assert found.edges[graph.edge("input", "a0.kv0<v>")]
    assert found.meta.caveat == (
        "circuit read from a file of EAP-IG: 2 of its edges to keys or values that heads share are "
        "of some of these heads alone in the file, and of all of them here"
    )


def test_written_shares_are_even(tmp_path: Path):
    made = some_circuit(Architecture(2, 4, 2))
    made.scores[made.graph.edge("input", "a1.kv1<k>")] = 3.0
    write_circuit(made, tmp_path / "c.json", "eap-ig")
    edges = json.loads((tmp_path / "c.json").read_text())["edges"]
    assert [edges[f"input->a1.h{h}<k>"]["score"] for h in (2, 3)] == [1.5, 1.5]
    assert len(edges) == Graph(Architecture(2, 4, 4)).n_edges


class Harm:
    """What runs code when it is unpickled by trusting readers."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


def test_code_in_a_file_is_not_run(tmp_path: Path):
    torch.save({**as_tensors(), "cfg": Harm()}, tmp_path / "c.pt")
    with pytest.raises(ArtifactError, match="could run code of the file: they are not read"):
        read_circuit(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": {**CFG, "n_heads": 0}}, "An architecture needs"),
        ({"cfg": {**CFG, "n_layers": 10**7}}, "larger than any model"),
        ({"cfg": {"n_heads": 2}}, "cfg lacks n_layers"),
        ({"edges": {"input->m7": {"score": 1.0, "in_graph": True}}}, "No edge 'input' -> 'm7'"),
        ({"edges": {"m0->a0.h0<q>": {"score": 1.0, "in_graph": True}}}, "No edge 'm0'"),
        ({"edges": {"input": {"score": 1.0, "in_graph": True}}}, "No edge 'input' -> ''"),
        ({"edges": {"input->m0": {"score": 1e300, "in_graph": True}}}, "no finite float32"),
        ({"edges": {"input->m0": {"score": None, "in_graph": True}}}, "not a finite number"),
        ({"edges": {"input->m0": {"score": 1.0, "in_graph": 1}}}, "expected bool"),
        ({"edges": []}, "edges is list, expected dict"),
        ({"nodes": {"m9": {"in_graph": True}}}, "there is no node 'm9'"),
        ({"nodes": {"m0": {"in_graph": True, "neurons": [True, False]}}}, "of single neurons"),
    ],
)
def test_damaged_eap_ig_files(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ArtifactError, match=message):
        read_circuit(saved(tmp_path, {**theirs(), **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": 5}, "cfg is 5, expected dict"),
        ({"src_nodes": ["input"]}, "src_nodes are not those of"),
        ({"edges_scores": torch.zeros(4, 7)}, r"edges_scores has the shape \(4, 7\), .* \(4, 8\)"),
        ({"edges_scores": torch.zeros(1).expand(4, 8)}, "expected a dense tensor"),
        ({"edges_scores": torch.full((4, 8), torch.nan)}, "no finite float32"),
        ({"edges_scores": [1.0]}, "edges_scores is list, expected a tensor"),
        ({"nodes_in_graph": torch.ones(5).bool()}, "nodes_in_graph has the shape"),
        ({"neurons_in_graph": torch.eye(4, 8)}, "circuit of single neurons"),
        ({"neurons_in_graph": "all"}, "circuit of single neurons"),
        ({"neurons_in_graph": torch.ones(4, device="meta")}, "expected a dense tensor"),
        ({"edges_in_graph": torch.full((4, 8), torch.nan)}, "is NaN in places"),
    ],
)
def test_damaged_eap_ig_tensors(tmp_path: Path, change: dict[str, Any], message: str):
    torch.save({**as_tensors(), **change}, tmp_path / "c.pt")
    with pytest.raises(ArtifactError, match=message):
        read_circuit(tmp_path / "c.pt")


def test_a_changed_byte_of_a_tensor_is_seen(tmp_path: Path):
    path = tmp_path / "c.pt"
    torch.save(as_tensors(), path)
    data, held = bytearray(path.read_bytes()), as_tensors()["edges_scores"].numpy().tobytes()
    data[data.index(held) + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksums do not fit"):
        read_circuit(path)


def test_files_that_are_no_circuit(tmp_path: Path):
    path = tmp_path / "c.pt"
    torch.save([1], path)
    with pytest.raises(ArtifactError, match="the file is list, expected dict"):
        read_circuit(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ArtifactError, match=r"is no file of torch\.save, or a damaged one"):
        read_circuit(path)
    for value, message in (
        ([], "no names in it"),
        ({"a": 1, "b": 2}, r"no circuit: JSON with a, b\. What is read are files of eap-ig, "),
        ({"graph": {}}, "graph lacks schema"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_circuit(saved(tmp_path, value))
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        read_circuit(tmp_path / "none.json")


def lens(kind: str, layer: int | None = None, head: int | None = None) -> str:
    """TransformerLens' own name of a node, and its head."""
    node = LensNode(kind=kind, layer=layer, head=head, position=0)  # pyright: ignore
    return node.hook_name + ("" if head is None else f".{head}")


def test_hook_points_are_those_of_transformer_lens(tmp_path: Path):
    edges = {
        (lens("embed"), lens("q_input", 1, 3)): ("input", "a1.h3<q>"),
        (lens("attn_head_out", 0, 2), lens("k_input", 1, 0)): ("a0.h2", "a1.h0<k>"),
        (lens("mlp_out", 0), lens("v_input", 1, 1)): ("m0", "a1.h1<v>"),
        (lens("attn_head_out", 0, 1), lens("mlp_in", 0)): ("a0.h1", "m0"),
        (lens("mlp_out", 1), lens("logits", 1)): ("m1", "logits"),
        ("blocks.1.attn.hook_result.2", "blocks.1.hook_resid_post"): ("a1.h2", "logits"),
        ("hook_embed", "blocks.0.hook_q_input.2"): ("input", "a0.h2<q>"),  # HookedTransformer
    }
    rows = [
        {"source": s, "target": t, "score": float(k)} for k, (s, t) in enumerate(edges, start=1)
    ]
    path = saved(tmp_path, {"edges": rows})
    found = read_circuit(path, make_tiny(4).architecture.__class__(2, 4, 4))
    assert found.n_edges == len(edges)
    for k, at in enumerate(edges.values(), start=1):
        assert found.scores[found.graph.edge(*at)] == k
    with pytest.raises(ArtifactError, match="how many layers and heads there are; give model="):
        read_circuit(path)
    write_circuit(found, tmp_path / "back.json", "transformer-lens")
    back = json.loads((tmp_path / "back.json").read_text())
    written = {(e["source"].replace("hook_result", "hook_z"), e["target"]) for e in back["edges"]}
    assert set(list(edges)[:5]) <= written
    assert back["architecture"] == asdict(found.graph.architecture)


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        (("hook_pos_embed", "blocks.0.hook_mlp_in"), "no hook point that a component writes at"),
        (("hook_embed", "blocks.0.hook_resid_mid"), "no hook point that a component reads at"),
        (("hook_embed", "blocks.0.hook_resid_post"), "by the logits in the last layer, 1, alone"),
        (("hook_embed", "blocks.0.attn.hook_q_input"), "no hook point that a component reads at"),
        (("blocks.1.hook_mlp_out", "blocks.0.hook_mlp_in"), "No edge 'm1' -> 'm0'"),
        (("hook_embed", "blocks.0.hook_mlp_in\n"), "no hook point"),
    ],
)
def test_hook_points_that_make_no_edge(tmp_path: Path, edge: tuple[str, str], message: str):
    rows = [{"source": edge[0], "target": edge[1], "score": 1.0}]
    path = saved(tmp_path, {"architecture": asdict(Architecture(2, 4, 4)), "edges": rows})
    with pytest.raises(ArtifactError, match=message):
        read_circuit(path)


def test_an_edge_named_twice(tmp_path: Path):
    rows = [
        {"source": f"blocks.0.attn.hook_{o}.1", "target": "blocks.0.hook_mlp_in", "score": 1.0}
        for o in ("z", "result")
    ]
    with pytest.raises(ArtifactError, match=r"the edge a0\.h1 -> m0 is in it twice"):
        read_circuit(saved(tmp_path, {"edges": rows}), Architecture(2, 4, 4))


NODE = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}
"""What the graph page asks of each node."""


def test_a_graph_page_has_all_that_it_asks_for(tmp_path: Path):
    made = some_circuit(Architecture(2, 4, 2))
    at = made.graph.edge("m0", "a1.kv0<k>")
    made.edges[at] = True
    write_circuit(made, tmp_path / "mine.json", "neuronpedia")
    page = json.loads((tmp_path / "mine.json").read_text())
    assert page.keys() >= {"metadata", "qParams", "nodes", "links"}
    assert page["metadata"]["slug"] == "mine" and page["metadata"]["scan"] == "tiny"
    assert len(page["metadata"]["prompt_tokens"]) == 2
    assert page["metadata"].keys() >= {"prompt", "transcoder_list"}
    assert {n["node_id"] for n in page["nodes"] if n["ctx_idx"] == 1} == {"logits"}  # read last
    state = {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    assert page["qParams"].keys() == state
    nodes = {n["node_id"]: n for n in page["nodes"]}
    assert len(nodes) == len(page["nodes"]) and all(n.keys() >= NODE for n in page["nodes"])
    features = {(n["layer"], n["feature"], n["ctx_idx"]) for n in page["nodes"]}
    assert len(features) == len(nodes)  # the page makes its own ids of these three
    assert {n["feature_type"] for n in page["nodes"]} == {"embedding", "logit", "unknown"}
    pairs = {(x["source"], x["target"]) for x in page["links"]}
    assert len(pairs) == len(page["links"])
    assert {name for pair in pairs for name in pair} == set(nodes)
    graph, want = made.graph, 0.0
    for kind in ("h1<q>", "kv0<k>", "kv0<v>"):  # all that a1.h1 reads of m0
        at = graph.edge("m0", f"a1.{kind}")
        want += made.edges[at] * made.scores[at] / (1 if "q" in kind else 2)
    (link,) = [x for x in page["links"] if (x["source"], x["target"]) == ("m0", "a1.h1")]
    assert link["weight"] == pytest.approx(want) == sum(link["readers"].values())


def test_graphs_of_features_have_no_counterpart(tmp_path: Path):
    path = tmp_path / "c.json"
    write_circuit(some_circuit(Architecture(2, 4, 4)), path, "neuronpedia")
    page = json.loads(path.read_text())
    page["nodes"].append({"node_id": "0_253_1"})
    page["links"] += [
        {"source": "0_253_1", "target": "logits", "weight": 1.0},
        {"source": "m0", "target": "a1.h1x", "weight": 1.0},
    ]
    found = read_circuit(saved(tmp_path, page))
    assert (found.edges == read_circuit(path).edges).all()
    n = len(page["links"])
    assert found.meta.caveat.endswith(
        f": 2 of its {n} links are between other nodes and were left out"
    )
    page["nodes"] = [{"node_id": "E_2_0"}, {"node_id": "0_253_1"}, {"node_id": "27_5_4"}]
    page["links"] = [{"source": "E_2_0", "target": "0_253_1", "weight": 1.0}]
    del page["metadata"]["architecture"]
    with pytest.raises(ArtifactError, match=r"none of its 3 nodes .* features of transcoders"):
        read_circuit(saved(tmp_path, page))


def test_networkx_reads_it_and_gephi_has_labels(tmp_path: Path):
    made = some_circuit(Architecture(2, 4, 2))
    write_circuit(made, tmp_path / "c.json", "node-link")
    data = json.loads((tmp_path / "c.json").read_text())
    net = nx.node_link_graph(data, edges="edges")  # the default from networkx 3.6 on
    write_circuit(made, tmp_path / "c.graphml", "graphml")
    write_circuit(made, tmp_path / "c.gexf", "gexf")
    read = {
        "json": net,
        "graphml": nx.read_graphml(tmp_path / "c.graphml"),
        "gexf": nx.read_gexf(tmp_path / "c.gexf"),
    }
    for name, found in read.items():
        assert {(u, v) for u, v in found.edges} == {(u, v) for u, v in made.to_networkx().edges}
        for node, label in found.nodes(data="label"):
            assert label == node, name
        for u, v, d in found.edges(data=True):
            assert d["weight"] == abs(d["score"])
            score = made.scores[made.graph.edge(u, v)] if d["kind"] == "residual" else 0.0
            assert d["score"] == pytest.approx(float(score))
            assert d["label"] == ("" if d["kind"] == "inside" else f"{d['score']:+.3g}")
    again = saved(tmp_path, nx.node_link_data(net, edges="links"))  # through networkx and back
    assert (Circuit.load(again).edges == made.edges).all()


def test_a_discovered_circuit_goes_out_and_comes_back(tmp_path: Path):
    """On a model with shared keys, ablation within the circuit that was read is the same."""
    model, pairs = make_tiny(2), make_pairs((5, 4, 6, 3), seed=1)
    config = CircuitConfig(pairs=4, ig_steps=1, faithfulness_pairs=4, top=60)
    found = discover(model, pairs, config=config)
    write_circuit(found, tmp_path / "c.pt", "eap-ig")
    back = read_circuit(tmp_path / "c.pt", model)
    assert torch.equal(back.ablate(model, pairs).logits, found.ablate(model, pairs).logits)
    assert [e.target for e in back.top(5)] == [e.target for e in found.top(5)]


def test_convert_compare_and_view(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    own, theirs_pt = str(SHIPPED / "facts-capitals.json"), str(tmp_path / "c.pt")
    assert main(["convert", own, "--to", "eap-ig", "--out", theirs_pt]) == 0
    assert f"for eap-ig: {theirs_pt}" in capsys.readouterr().out
    assert main(["compare", own, theirs_pt]) == 0
    assert "overlap 1.00" in capsys.readouterr().out
    assert main(["view", theirs_pt, "--out", str(tmp_path / "c.svg")]) == 0
    assert "a0.h0" in (tmp_path / "c.svg").read_text()
    capsys.readouterr()
    assert main(["convert", own, "--to", "gexf", "--out", theirs_pt]) == 1  # it is there
    path = str(saved(tmp_path, {**theirs(), "cfg": {**CFG, "n_layers": 1}}))
    back = ["convert", path, "--to", "native", "--out", str(tmp_path / "n.json")]
    assert main([*back, "--model", "facts"]) == 1
    assert "and the model is Architecture(" in capsys.readouterr().err
    assert main(back) == 0
    assert Circuit.load(tmp_path / "n.json").n_edges == 6


@pytest.fixture
def scores() -> Attribution:
    """Scores of every edge, with keys that heads share."""
    graph = Graph(Architecture(4, 8, 4))
    values = np.random.default_rng(0).normal(size=graph.exists.shape) * graph.exists
    return Attribution(graph, values.astype(np.float32), 2.0, -1.0)


@pytest.mark.parametrize("name", ["s.csv", "s.safetensors"])
def test_scores_of_every_edge_are_converted_in_full(
    scores: Attribution, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, out = tmp_path / name, tmp_path / "c.json"
    if name == "s.csv":
        path.write_text(scores.to_pandas().to_csv(index=False))
    else:
        scores.save(path)
    words = ["convert", str(path), "--to", "eap-ig", "--out", str(out)]
    if name == "s.csv":
        assert main(words) == 1
        assert "name its model (mansu convert --model" in capsys.readouterr().err
        words += ["--model", "facts"]
    assert main(words) == 0
    edges = json.loads(out.read_text())["edges"]
    assert all(edge["in_graph"] for edge in edges.values())
    back = read_circuit(out)
    assert (back.edges == scores.graph.exists).all()
    np.testing.assert_allclose(back.scores, scores.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input,m0,1\n", r"first line must be source,target,score.*'input,m0,1'"),
        ("source,target,score\ninput,m9,1\n", "line 2: .*m9"),
        ("source,target,score\ninput,m0,1\ninput,m0,2\n", "line 3: input -> m0 is there twice"),
        ("source,target,score\ninput,m0,nan\n", "line 2: input -> m0 has the score nan"),
        ("source,target,score\ninput,m0\n", "line 2: "),
        ("source,target,score\n", "it holds no edge"),
        ("", "first line must be"),
    ],
)
def test_tables_of_scores_that_lie(text: str, message: str, tmp_path: Path):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_circuit(tmp_path / "s.csv", Architecture(4, 8, 4))


def test_a_table_of_some_edges_says_so(tmp_path: Path):
    (tmp_path / "s.txt").write_text("source,target,score\ninput,m0,1.5\n\nm0,logits,-2\n")
    found = read_circuit(tmp_path / "s.txt", Architecture(4, 8, 4))
    assert found.n_edges == 2 and found.scores[found.graph.edge("m0", "logits")] == -2
    assert found.meta.caveat.startswith(f"{found.graph.n_edges - 2:,} of the model's edges are not")


def test_the_folder_of_a_discovery_is_converted_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made, folder, out = some_circuit(ARCHITECTURES["shared keys"]), tmp_path / "f", tmp_path / "c"
    folder.mkdir()
    words = ["convert", str(folder), "--to", "eap-ig", "--out"]
    assert main([*words, str(out)]) == 1
    assert "holds no circuit.json: name the folder of a run" in capsys.readouterr().err
    made.save(folder / "circuit.json")
    save_scores(made, folder / "scores.safetensors")
    assert main([*words, str(out)]) == 0
    back = read_circuit(out)
    assert (back.edges == made.edges).all() and (made.scores[~made.edges] != 0).any()
    np.testing.assert_allclose(back.scores, made.scores, atol=1e-6)
    save_scores(some_circuit(ARCHITECTURES["shared keys"], 1), folder / "scores.safetensors")
    assert main([*words, str(tmp_path / "d")]) == 1
    assert "has not the scores of the circuit beside it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["view", "compare", "convert"])
def test_file_errors_say_what_to_do(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "folder").mkdir()
    for name in ("empty.json", "empty.safetensors", "closed.json"):
        (tmp_path / name).touch()

    def refuse(path: Path, *_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    for name, message in (
        ("none.json", "there is no such file; look at its name"),
        ("none.safetensors", "there is no such file; look at its name"),
        ("folder", "name the folder of a run or of mansu discover, or a file"),
        ("empty.json", "it is empty; make it again"),
        ("empty.safetensors", "it is empty; make it again"),
        ("closed.json", "permission is denied; allow reading it"),
    ):
        if name == "closed.json":  # whoever runs this may be allowed to read everything
            monkeypatch.setattr(Path, "open", refuse)
        path = str(tmp_path / name)
        rest = {"compare": [path], "convert": ["--to", "gexf", "--out", str(tmp_path / "o.gexf")]}
        assert main([command, path, *rest.get(command, [])]) == 1
        assert message in capsys.readouterr().err, name
