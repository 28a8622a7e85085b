"""The attribution graph: edge counts of known models, ids, pruning."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest

from mansu_interp.errors import CircuitError
from mansu_interp.models.graph import Architecture, Graph

KNOWN = {
    "gpt2-small": (Architecture(12, 12, 12), 32_491),
    "gpt2-medium": (Architecture(24, 16, 16), 231_877),
    "gpt2-large": (Architecture(36, 20, 20), 810_703),
    "gpt2-xl": (Architecture(48, 25, 25), 2_235_025),
    "pythia-70m": (Architecture(6, 8, 8, parallel=True), 3_580),
    "pythia-160m": (Architecture(12, 12, 12, parallel=True), 32_347),
    "pythia-410m": (Architecture(24, 16, 16, parallel=True), 231_493),
    "pythia-2.8b": (Architecture(32, 32, 32, parallel=True), 1_591_857),
    "llama-3.1-8b": (Architecture(32, 32, 8), 805_681),
    "llama-3.2-1b": (Architecture(16, 32, 8), 195_865),
    "qwen2.5-0.5b": (Architecture(24, 14, 2), 79_813),
    "gemma-2-2b": (Architecture(26, 8, 4), 50_610),
}


def closed_form(a: Architecture) -> int:
    """The documented sum: q, k, v and MLP readers per layer, then the logits."""
    n, h, k = a.n_layers, a.n_heads, a.n_kv_heads
    layers = sum((1 + i * (h + 1)) * (h + 2 * k + 1) + (0 if a.parallel else h) for i in range(n))
    return layers + 1 + n * (h + 1)


@pytest.mark.parametrize("name", KNOWN)
def test_edge_counts_of_known_models(name: str):
    architecture, count = KNOWN[name]
    assert Graph(architecture).n_edges == count == closed_form(architecture)


@pytest.mark.parametrize(
    "architecture", [Architecture(3, 4, 4), Architecture(3, 4, 2), Architecture(2, 4, 1, True)]
)
def test_ids_are_unique_and_only_an_mlp_is_both_writer_and_reader(architecture: Architecture):
    graph = Graph(architecture)
    writers, readers = [n.id for n in graph.writers], [n.id for n in graph.readers]
    assert len(set(writers)) == len(writers)
    assert len(set(readers)) == len(readers)
    assert set(writers) & set(readers) == {f"m{i}" for i in range(architecture.n_layers)}


def test_key_ids_say_whether_heads_share_them():
    assert "a1.h3<k>" in Graph(Architecture(2, 4, 4)).reader_index
    grouped = Graph(Architecture(2, 4, 2)).reader_index
    assert "a1.kv1<k>" in grouped
    assert "a1.h1<k>" not in grouped
    assert "a1.h3<q>" in grouped


def test_grouped_readers_feed_their_query_heads():
    graph = Graph(Architecture(2, 4, 2))
    reads = graph.feeds[graph.reader_index["a1.kv1<v>"]]
    assert [graph.writers[i].id for i in reads] == ["a1.h2", "a1.h3"]
    assert [graph.writers[i].id for i in graph.feeds[graph.reader_index["m1"]]] == ["m1"]
    assert graph.feeds[graph.reader_index["logits"]] == ()


def test_who_reads_whom():
    serial, parallel = Graph(Architecture(2, 4, 2)), Graph(Architecture(2, 4, 2, True))
    serial.edge("a0.h3", "m0")
    for source, target in [
        ("a0.h0", "a0.h1<q>"),
        ("m0", "m0"),
        ("m1", "a1.h0<q>"),
        ("logits", "m0"),
        ("input", "nowhere"),
        ("a0.h0", "a1.h0<k>"),  # the keys are grouped here
    ]:
        with pytest.raises(CircuitError, match=f"No edge '{source}' -> '{target}' in Archi"):
            serial.edge(source, target)
    with pytest.raises(CircuitError, match=r"No edge 'a0\.h3' -> 'm0'"):
        parallel.edge("a0.h3", "m0")


@pytest.mark.parametrize("sizes", [(2, 4, 3), (0, 4, 4), (2, 0, 0)])
def test_impossible_architectures(sizes: tuple[int, int, int]):
    with pytest.raises(CircuitError, match="n_kv_heads dividing n_heads; got"):
        Architecture(*sizes)


def chosen(graph: Graph, *edges: tuple[str, str]) -> Any:
    matrix = np.zeros_like(graph.exists)
    for source, target in edges:
        matrix[graph.edge(source, target)] = True
    return matrix


PATH = [("input", "a0.kv0<v>"), ("a0.h1", "m0"), ("m0", "a1.h3<q>"), ("a1.h3", "logits")]


def test_prune_keeps_a_whole_path():
    graph = Graph(Architecture(2, 4, 2))
    whole = chosen(graph, *PATH)
    assert (graph.prune(whole) == whole).all()
    assert (graph.prune(graph.exists) == graph.exists).all()


@pytest.mark.parametrize(
    "dangling",
    [
        ("a0.h2", "logits"),  # head 2 reads kv1, which nothing feeds
        ("input", "m1"),  # m1 is never read
        ("a0.h0", "m1"),
        ("m1", "logits"),
        ("input", "a1.kv0<k>"),  # feeds heads 0 and 1 of layer 1 only
    ],
)
def test_prune_drops_what_dangles(dangling: tuple[str, str]):
    graph = Graph(Architecture(2, 4, 2))
    assert (graph.prune(chosen(graph, *PATH, dangling)) == chosen(graph, *PATH)).all()


def test_prune_drops_everything_when_the_path_is_cut():
    graph = Graph(Architecture(2, 4, 2))
    for cut in range(len(PATH)):
        assert not graph.prune(chosen(graph, *PATH[:cut], *PATH[cut + 1 :])).any()


def test_prune_agrees_with_reachability_in_networkx():
    graph = Graph(Architecture(3, 4, 2))
    rng = np.random.default_rng(0)
    for density in (0.02, 0.05, 0.1):
        edges = (rng.random(graph.exists.shape) < density) & graph.exists
        net = nx.DiGraph()
        net.add_nodes_from([("w", "input"), ("r", "logits")])
        for i, j in np.argwhere(edges):
            net.add_edge(("w", graph.writers[i].id), ("r", graph.readers[j].id))
        for reader, rows in zip(graph.readers, graph.feeds, strict=True):
            for i in rows:
                net.add_edge(("r", reader.id), ("w", graph.writers[i].id))
        fed = nx.descendants(net, ("w", "input")) | {("w", "input")}
        read = nx.ancestors(net, ("r", "logits")) | {("r", "logits")}
        expected = np.zeros_like(edges)
        for i, j in np.argwhere(edges):
            expected[i, j] = ("w", graph.writers[i].id) in fed and (
                "r",
                graph.readers[j].id,
            ) in read
        assert (graph.prune(edges) == expected).all()
        assert expected.sum() < edges.sum()
