"""Circuits in the files of other tools, written and read.

1. The form of a file is told from what is in it, not from its name.
2. Edges are named by that tool's own names, and turned into ours; a name that the model's graph
   does not have is an error, not a guess.
3. What a file holds and a circuit does not have is left out, and said in the circuit's caveat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import numpy as np

from ... import __version__
from ...errors import ArtifactError, CircuitError
from ...models.graph import Architecture, Graph, Node
from ...models.hooked import AnyModel, as_model
from ...utils.files import MAX_JSON, Json, expect, read_bytes, read_json, unread, write_json
from ...utils.ranges import entrance
from ..circuit import Circuit
from ..config import Format
from ..scores import Attribution
from .eap_ig import (
    foreign,
    heads_graph,
    per_head,
    read_eap_ig_json,
    read_eap_ig_pt,
    write_eap_ig,
)
from .scored import is_table, is_tensors, read_table, whole

ZIP = b"PK"
"""What a file of torch.save begins with."""
SIZES = {"n_layers": int, "n_heads": int, "n_kv_heads": int, "parallel?": bool}
HOOKS_FILE = {
    "architecture?": SIZES,
    "edges": [{"source": str, "target": str, "score": float}],
}
PAGE_FILE = {
    "metadata": {"architecture?": SIZES},
    "nodes": [{"node_id": str}],
    "links": [{"source": str, "target": str, "weight": float, "readers?": {...: float}}],
}
WRITER_HOOK = re.compile(
    r"hook_embed|blocks\.(?P<layer>[0-9]{1,5})\."
    r"(?:attn\.hook_(?:result|z)\.(?P<head>[0-9]{1,5})|(?P<mlp>hook_mlp_out))"
)
READER_HOOK = re.compile(
    r"blocks\.(?P<layer>[0-9]{1,5})\.(?:(?:attn\.)?hook_(?P<kind>[qkv])_input\.(?P<head>[0-9]{1,5})"
    r"|(?P<mlp>hook_mlp_in)|hook_resid_post)"
)
PLACES = ["every position", "last position"]
"""What stands for tokens in a graph whose scores are sums over positions; the metric reads the
last. Fewer than two, and the page drops every node as one that is active everywhere."""
KIND = "unknown"
"""Type of a node that is no feature of a transcoder: the page then looks none up."""


@entrance(CircuitError)
def write_circuit(circuit: Circuit, path: Path | str, format: Format) -> None:
    """Write a circuit as another tool reads it.

    Arguments:
        circuit: the circuit.
        path: the file. With ``eap-ig`` and a name that ends with .pt, tensors; otherwise JSON.
        format: ``eap-ig`` (hannamw/EAP-IG), ``transformer-lens`` (edges between hook points, with
            heads behind them), ``neuronpedia`` (attribution graphs of Neuronpedia and
            circuit-tracer), ``node-link`` (`networkx.node_link_graph`, as it reads by default from
            3.6 on), ``graphml``, ``gexf`` (Gephi), or ``native`` (`Circuit.save`).

    Keys and values that several heads share are written once for each of these heads, with an even
    share of the score, in the first three.

    Raises:
        CircuitError: another format.
        ResourceError: the file cannot be written.
    """
    path = Path(path)
    writers: dict[str, Callable[[], None]] = {
        "eap-ig": lambda: write_eap_ig(circuit, path),
        "transformer-lens": lambda: write_json(path, _hooks(circuit)),
        "neuronpedia": lambda: write_json(path, _page(circuit, path.stem)),
        "node-link": lambda: write_json(path, circuit.node_link(edges="edges")),
        "graphml": lambda: circuit.save_graphml(path),
        "gexf": lambda: circuit.save_gexf(path),
        "native": lambda: circuit.save(path),
    }
    writers[format]()


@entrance(CircuitError)
def read_circuit(path: Path | str, model: AnyModel | Architecture | None = None) -> Circuit:
    """Read a circuit of this package or of another tool; which one is seen from the file.

    Arguments:
        path: a file that `write_circuit` or `Circuit.save` wrote (not GraphML or GEXF), or one of
            hannamw/EAP-IG, JSON or .pt; or the scores that `Attribution.save` or `mansu attribute`
            wrote (.safetensors, .csv), all of whose edges are then in the circuit.
        model: of the circuit, or its architecture. EAP-IG does not say how many heads share a key,
            edges between hook points need not say how many layers and heads there are, and a table
            of scores never does.

    Returns:
        The circuit. Scores that a file gives by query head are added up where heads share a key or
        a value, and such an edge is in the circuit if it is with any of them; ``meta.caveat`` says
        so.

    Raises:
        ArtifactError: missing, damaged, of no known form, or of another model.
    """
    path = Path(path)
    known = model if isinstance(model, (Architecture, type(None))) else as_model(model).architecture
    try:
        found = _read(path, known)
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a valid circuit: {unread(error)}.") from error
    if known not in (None, found.graph.architecture):
        raise ArtifactError(
            f"{path} is a circuit of {found.graph.architecture}, and the model is {known}."
        )
    return found


def _read(path: Path, known: Architecture | None) -> Circuit:
    if path.is_file():
        with path.open("rb") as stream:
            begin = stream.read(64)
        if begin.startswith(ZIP):
            return read_eap_ig_pt(path, known)
        if is_tensors(begin):
            return whole(Attribution.load(path))
        if is_table(path, begin):
            return read_table(read_bytes(path, MAX_JSON), known)
    data = read_json(path)
    keys = data.keys() if isinstance(data, dict) else set()
    if "cfg" in keys:
        return read_eap_ig_json(data, known)
    if "graph" in keys:
        return Circuit.load(path)
    if {"metadata", "links"} <= keys:
        return _from_page(data, known)
    if "edges" in keys:
        return _from_hooks(data, known)
    raise ArtifactError(
        f"{path} is no circuit: JSON with {', '.join(sorted(keys)[:5]) or 'no names in it'}. What "
        f"is read are files of {', '.join(f for f in get_args(Format) if f not in UNREAD)}."
    )


UNREAD = ("graphml", "gexf")
"""Written for pages to look at."""


def _edges(circuit: Circuit) -> Iterator[tuple[Node, Node, float]]:
    """Writer, reader and score of every edge, with a key and a value for every query head."""
    graph = heads_graph(circuit.graph)
    scores, edges = per_head(circuit)
    for i, j in np.argwhere(edges):
        yield graph.writers[i], graph.readers[j], float(scores[i, j])


def _graph_of(sizes: dict[str, Json] | None, known: Architecture | None) -> Graph:
    """The graph of a file that may say its sizes.

    Raises:
        ValueError: nobody says them.
    """
    if sizes is not None:
        names = [f.name for f in fields(Architecture)]
        return Graph(Architecture(**{k: v for k, v in sizes.items() if k in names}))
    if known is None:
        raise ValueError("it does not say how many layers and heads there are; give model=")
    return Graph(known)


def _gathered(
    kind: str, ours: Graph, edges: Iterator[tuple[str, str, float]], more: Callable[[], str]
) -> Circuit:
    """A circuit of named edges, by query head; each may be named once."""
    graph = heads_graph(ours)
    scores, chosen = np.zeros(graph.exists.shape), np.zeros(graph.exists.shape, dtype=bool)
    for source, target, score in edges:
        at = graph.edge(source, target)
        if chosen[at]:
            raise ValueError(f"the edge {source} -> {target} is in it twice")
        scores[at], chosen[at] = score, True
    return foreign(kind, ours, scores, chosen, more())


# TransformerLens: hook points, and the head behind those that have one.


def _writer_hook(node: Node) -> str:
    if node.kind == "input":
        return "hook_embed"
    if node.kind == "mlp":
        return f"blocks.{node.layer}.hook_mlp_out"
    return f"blocks.{node.layer}.attn.hook_result.{node.head}"


def _reader_hook(node: Node) -> str:
    if node.kind == "logits":
        return f"blocks.{node.layer - 1}.hook_resid_post"
    if node.kind == "mlp":
        return f"blocks.{node.layer}.hook_mlp_in"
    return f"blocks.{node.layer}.attn.hook_{node.kind}_input.{node.head}"


def _hooks(circuit: Circuit) -> dict[str, Json]:
    return {
        "architecture": asdict(circuit.graph.architecture),
        "edges": [
            {"source": _writer_hook(u), "target": _reader_hook(v), "score": score}
            for u, v, score in _edges(circuit)
        ],
    }


def _writer_id(hook: str) -> str:
    found = WRITER_HOOK.fullmatch(hook)
    if found is None:
        raise ValueError(f"{hook[:60]!r} is no hook point that a component writes at")
    if found["layer"] is None:
        return "input"
    layer = int(found["layer"])
    return f"m{layer}" if found["mlp"] else f"a{layer}.h{int(found['head'])}"


def _reader_id(hook: str, last: int) -> str:
    found = READER_HOOK.fullmatch(hook)
    if found is None:
        raise ValueError(f"{hook[:60]!r} is no hook point that a component reads at")
    layer = int(found["layer"])
    if found["mlp"]:
        return f"m{layer}"
    if found["kind"]:
        return f"a{layer}.h{int(found['head'])}<{found['kind']}>"
    if layer != last:
        raise ValueError(f"{hook!r} is read by the logits in the last layer, {last}, alone")
    return "logits"


def _from_hooks(data: Json, known: Architecture | None) -> Circuit:
    expect(data, HOOKS_FILE, "the file")
    graph = _graph_of(data.get("architecture"), known)
    last = graph.architecture.n_layers - 1
    edges = (
        (_writer_id(e["source"]), _reader_id(e["target"], last), e["score"]) for e in data["edges"]
    )
    return _gathered("TransformerLens", graph, edges, lambda: "")


# Neuronpedia and circuit-tracer: a node for each component, links with their weight.


def _page_node(node: Node, n_heads: int) -> dict[str, Json]:
    """A component as a node of an attribution graph; a reader is the component that it feeds."""
    end = node.kind == "logits"
    name = node.id.partition("<")[0]
    return {
        "node_id": name,
        "jsNodeId": name,
        "feature": n_heads if node.kind == "mlp" else max(node.head, 0),
        "layer": "E" if node.kind == "input" else str(node.layer),
        "ctx_idx": int(end),
        "feature_type": "embedding" if node.kind == "input" else "logit" if end else KIND,
        # The page takes a probability from the text of a logit, where there is a text.
        "clerp": "" if end else name,
    }


def _page(circuit: Circuit, slug: str) -> dict[str, Json]:
    nodes: dict[str, Json] = {}
    links: dict[tuple[str, str], dict[str, float]] = {}
    for u, v, score in _edges(circuit):
        for node in (u, v):
            made = _page_node(node, circuit.graph.architecture.n_heads)
            nodes[made["node_id"]] = made
        links.setdefault((u.id, v.id.partition("<")[0]), {})[v.id] = score
    return {
        "metadata": {
            "slug": slug,
            "scan": circuit.meta.model or "model",
            "prompt_tokens": PLACES,
            "prompt": " ".join(PLACES),
            "transcoder_list": [],
            "architecture": asdict(circuit.graph.architecture),
            "info": {
                "description": "Attribution edges between attention heads and MLPs, summed over "
                "positions and averaged over pairs of prompts.",
                "generator": {"name": "mansu_interp", "version": __version__},
            },
        },
        "qParams": {
            **{"pinnedIds": [], "supernodes": []},
            **{"linkType": "both", "clickedId": "", "sg_pos": ""},
        },
        "nodes": list(nodes.values()),
        "links": [
            {"source": u, "target": v, "weight": sum(by.values()), "readers": by}
            for (u, v), by in links.items()
        ],
    }


def _from_page(data: Json, known: Architecture | None) -> Circuit:
    expect(data, PAGE_FILE, "the file")
    names = {node["node_id"] for node in data["nodes"]}
    if not any(re.fullmatch(r"input|a[0-9]+\.h[0-9]+|m[0-9]+", name) for name in names):
        raise ValueError(
            f"none of its {len(names):,} nodes is a head, an MLP or the embedding: they are "
            "features of transcoders at single tokens, which a circuit of components does not have"
        )
    ours = _graph_of(data["metadata"].get("architecture"), known)
    graph = heads_graph(ours)
    left = 0

    def edges() -> Iterator[tuple[str, str, float]]:
        nonlocal left
        for link in data["links"]:
            by = link.get("readers", {link["target"]: link["weight"]})
            fits = [name in graph.reader_index for name in by]
            if link["source"] in graph.writer_index and all(fits):
                yield from ((link["source"], name, score) for name, score in by.items())
            else:
                left += 1

    def told() -> str:
        n = len(data["links"])
        return f"{left} of its {n} links are between other nodes and were left out" if left else ""

    return _gathered("Neuronpedia", ours, edges(), told)
