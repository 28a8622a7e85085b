"""Circuits of hannamw/EAP-IG, and edges by head.

That package gives every query head a key and a value of its own, also where several heads share
them (grouped-query attention). `per_head` spreads our edges over its heads, and `shared` gathers
them again: the score of an edge to a shared key is the sum of those to its heads' copies, since
the gradient of a value that is used several times is the sum over its uses.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ...errors import ArtifactError
from ...models.graph import Architecture, Graph
from ...utils.files import Json, atomic_path, check_regular, expect, json_text, write_text
from ..circuit import Circuit
from ..scores import MAX_SCORE
from ..search.meta import CircuitMeta

MAX_BYTES = 1 << 32
"""Size of the largest .pt file that is opened: scores of 10^9 edges."""
SIZES = {"n_layers": int, "n_heads": int, "parallel_attn_mlp?": bool, "n_key_value_heads?": int}
JSON_FILE = {
    "cfg": SIZES,
    "nodes": {...: {"in_graph": bool, "neurons?": list}},
    "edges": {...: {"score": float, "in_graph": bool}},
}
PT_FILE = {"cfg": SIZES, "src_nodes": [str], "dst_nodes": [str]}
TENSORS = ("edges_scores", "edges_in_graph", "nodes_in_graph")


def heads_graph(graph: Graph) -> Graph:
    """The graph in which every query head has a key and a value of its own."""
    sizes = graph.architecture
    return Graph(replace(sizes, n_kv_heads=sizes.n_heads))


def columns(graph: Graph) -> Int[np.ndarray, " own_readers"]:
    """For each reader of `heads_graph`, the reader of a graph that it is a copy of."""
    at: dict[tuple[str, int, int], int] = {}
    for j, v in enumerate(graph.readers):
        for head in graph.reading_heads(v) if v.kind in "qkv" else (v.head,):
            at[v.kind, v.layer, head] = j
    return np.array([at[v.kind, v.layer, v.head] for v in heads_graph(graph).readers])


def per_head(
    circuit: Circuit,
) -> tuple[Float[np.ndarray, "writers own_readers"], Bool[np.ndarray, "writers own_readers"]]:
    """Scores and edges with a key and a value for every query head. The score of a shared one is
    divided evenly among its heads, so that the sum stays."""
    to = columns(circuit.graph)
    return circuit.scores[:, to] / np.bincount(to)[to], circuit.edges[:, to]


def shared(
    graph: Graph,
    scores: Float[np.ndarray, "writers own_readers"],
    edges: Bool[np.ndarray, "writers own_readers"],
) -> tuple[Float[np.ndarray, "writers readers"], Bool[np.ndarray, "writers readers"], int]:
    """The inverse of `per_head`: scores of shared keys and values are sums over their heads, and
    their edges those of any of them.

    Returns:
        Scores, edges, and to how many shared keys and values the edges were of some heads alone.
    """
    to = columns(graph)
    found = np.zeros((2, *graph.exists.shape))
    for k, values in enumerate((scores, edges)):
        np.add.at(found[k].T, to, values.T)
    partial = (found[1] > 0) & (found[1] < np.bincount(to))
    return found[0].astype(np.float32), found[1] > 0, int(partial.sum())


def foreign(
    kind: str,
    graph: Graph,
    scores: Float[np.ndarray, "writers own_readers"],
    edges: Bool[np.ndarray, "writers own_readers"],
    more: str = "",
) -> Circuit:
    """A circuit read from another tool's file; what does not come over whole is its caveat.

    Arguments:
        kind: the format.
        graph: of the model.
        scores: by query head.
        edges: by query head.
        more: what else to know.

    Raises:
        ValueError: scores that are not finite.
    """
    if not (np.abs(scores) <= MAX_SCORE).all():
        raise ValueError("it has scores that are no finite float32")
    ours, chosen, partial = shared(graph, scores, edges)
    told = [more] if more else []
    if partial:
        told.append(
            f"{partial} of its edges to keys or values that heads share are of some of these heads "
            "alone in the file, and of all of them here"
        )
    caveat = f"circuit read from a file of {kind}: {'; '.join(told)}" if told else ""
    return Circuit(graph, ours, chosen, CircuitMeta(made_by=kind, caveat=caveat))


def sizes_of(found: dict[str, Json], known: Architecture | None) -> Architecture:
    """The architecture that a file's sizes give.

    Arguments:
        found: what the file says, checked against `SIZES`.
        known: of the model that the reader knows; it decides how many keys and values there are
            where the file does not say.

    Raises:
        ValueError: the model is another one.
    """
    layers, heads = found["n_layers"], found["n_heads"]
    if known and (layers, heads) != (known.n_layers, known.n_heads):
        raise ValueError(f"it is of {layers} layers of {heads} heads, and the model is {known}")
    parallel = found.get("parallel_attn_mlp", known.parallel if known else False)
    default = known.n_kv_heads if known else heads
    shared_by = found.get("n_key_value_heads", default)
    sizes = Architecture(layers, heads, shared_by, parallel)
    if known not in (None, sizes):
        raise ValueError(f"it is of {sizes}, and the model is {known}")
    return sizes


def _sizes(graph: Graph) -> dict[str, Json]:
    a = graph.architecture
    return {
        "n_layers": a.n_layers,
        "n_heads": a.n_heads,
        "n_key_value_heads": a.n_kv_heads,
        "parallel_attn_mlp": a.parallel,
        "d_model": 0,  # it is asked for, and counts neurons alone
    }


def _name(source: str, target: str) -> str:
    return f"{source}->{target}"


def write_eap_ig(circuit: Circuit, path: Path) -> None:
    """Write a circuit as its ``Graph.to_pt`` does where the name ends with .pt, otherwise as its
    ``Graph.to_json`` does: every edge of the model, with whether it is in the circuit."""
    graph = heads_graph(circuit.graph)
    scores, edges = per_head(circuit)
    used = _used(graph, edges)
    if path.suffix == ".pt":
        values = {
            "cfg": _sizes(circuit.graph),
            "src_nodes": [u.id for u in graph.writers],
            "dst_nodes": [v.id for v in graph.readers],
            "edges_scores": torch.from_numpy(scores.astype(np.float32)),
            "edges_in_graph": torch.from_numpy(edges),
            "nodes_in_graph": torch.from_numpy(used),
        }
        with atomic_path(path) as temporary:
            torch.save(values, temporary)
        return
    data = {
        "cfg": _sizes(circuit.graph),
        "nodes": {
            **{u.id: {"in_graph": bool(n)} for u, n in zip(graph.writers, used, strict=True)},
            "logits": {"in_graph": True},
        },
        "edges": {
            _name(graph.writers[i].id, graph.readers[j].id): {
                "score": float(scores[i, j]),
                "in_graph": bool(edges[i, j]),
            }
            for i, j in np.argwhere(graph.exists)
        },
    }
    write_text(path, json_text(data))


def _used(graph: Graph, edges: Bool[np.ndarray, "writers readers"]) -> Bool[np.ndarray, " writers"]:
    """Writers that an edge leaves or enters."""
    used = np.any(edges, axis=1)
    for j in np.flatnonzero(np.any(edges, axis=0)):
        used[list(graph.feeds[j])] = True
    return used


def _within(
    graph: Graph,
    edges: Bool[np.ndarray, "writers readers"],
    nodes: Bool[np.ndarray, " writers"],
) -> Bool[np.ndarray, "writers readers"]:
    """The edges between nodes that are in the circuit: that package drops the others before it
    measures anything."""
    ends = np.array([not feeds or nodes[list(feeds)].any() for feeds in graph.feeds])
    return edges & nodes[:, None] & ends


def read_eap_ig_json(data: Json, known: Architecture | None) -> Circuit:
    """A circuit from what its ``Graph.to_json`` wrote.

    Arguments:
        data: the file's values.
        known: architecture of the model, if the reader knows it.

    Raises:
        ValueError: what is wrong with the file.
    """
    expect(data, JSON_FILE, "the file")
    ours = Graph(sizes_of(data["cfg"], known))
    graph = heads_graph(ours)
    scores, edges = np.zeros(graph.exists.shape), np.zeros(graph.exists.shape, dtype=bool)
    for name, edge in data["edges"].items():
        source, _, target = name.partition("->")
        at = graph.edge(source, target)
        scores[at], edges[at] = edge["score"], edge["in_graph"]
    nodes = np.ones(len(graph.writers), dtype=bool)
    for name, node in data["nodes"].items():
        if name != "logits":
            if name not in graph.writer_index:
                raise ValueError(f"there is no node {name[:40]!r} in {graph.architecture}")
            nodes[graph.writer_index[name]] = node["in_graph"]
        if not all(_flat(node.get("neurons", []))):
            raise ValueError(NEURONS)
    return foreign("EAP-IG", ours, scores, _within(graph, edges, nodes))


NEURONS = (
    "it is a circuit of single neurons, which leaves out a part of what a head or an MLP writes; "
    "circuits of whole components are read"
)


def _flat(values: list[Json]) -> list[Json]:
    """Of a list of lists, what these hold."""
    return [x for v in values for x in (_flat(v) if isinstance(v, list) else [v])]


def read_eap_ig_pt(path: Path, known: Architecture | None) -> Circuit:
    """A circuit from what its ``Graph.to_pt`` wrote. Only tensors and plain values are read: no
    code that a file may hold is run.

    Arguments:
        path: the file.
        known: architecture of the model, if the reader knows it.

    Raises:
        ArtifactError: it holds other objects, or is damaged.
        ValueError: what is wrong with the circuit in it.
    """
    data = _plain(path)
    expect(data, PT_FILE, "the file")
    ours = Graph(sizes_of(data["cfg"], known))
    graph = heads_graph(ours)
    for key, ids in (("src_nodes", graph.writer_index), ("dst_nodes", graph.reader_index)):
        if data[key] != list(ids):
            raise ValueError(f"its {key} are not those of {graph.architecture}, in their order")
    shape = graph.exists.shape
    scores, edges, nodes = (
        _array(data, key, shape if key.startswith("edges") else shape[:1]) for key in TENSORS
    )
    neurons = data.get("neurons_in_graph")
    if neurons is not None and not (
        isinstance(neurons, torch.Tensor)
        and _array(data, "neurons_in_graph", tuple(neurons.shape)).all()
    ):
        raise ValueError(NEURONS)
    if np.isnan(edges).any() or np.isnan(nodes).any():
        raise ValueError("what is in its circuit is NaN in places")
    edges = (edges != 0) & graph.exists
    scores = np.where(graph.exists, scores, 0.0)
    return foreign("EAP-IG", ours, scores, _within(graph, edges, nodes != 0))


def _plain(path: Path) -> Any:
    """What a file of torch holds, if that is tensors and plain values alone."""
    check_regular(path, MAX_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:  # torch packs nothing, so a small file stays small
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ArtifactError(f"{path} is compressed, which torch does not do. Not read.")
            if archive.testzip():
                raise ArtifactError(f"{path} is damaged: its checksums do not fit.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} holds more than tensors and plain values, and to read those could run code of "
            "the file: they are not read. Save the circuit with Graph.to_json instead."
        ) from error
    except (OSError, ArtifactError):
        raise
    except Exception as error:  # torch trips over damaged files in many ways
        raise ArtifactError(f"{path} is no file of torch.save, or a damaged one.") from error


def _array(data: dict[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a file as an array of the shape that it must have."""
    value = data.get(key)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"its {key} is {type(value).__name__}, expected a tensor")
    odd = value.layout is not torch.strided or value.is_quantized or value.is_complex()
    # A few bytes can be told to stand for many values.
    if (
        odd
        or value.device.type != "cpu"
        or tuple(value.shape) != shape
        or value.untyped_storage().nbytes() < value.numel() * value.element_size()
    ):
        raise ValueError(
            f"its {key} has the shape {tuple(value.shape)}, expected a dense tensor of {shape}"
        )
    return value.detach().double().numpy()
