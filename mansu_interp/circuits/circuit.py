"""A circuit: edges with their scores, as a networkx graph, files and a mask."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float

from ..errors import ArtifactError, CircuitError
from ..models.graph import Architecture, Graph, Node
from ..models.hooked import AnyModel, as_model
from ..models.provenance import find_mismatch
from ..tasks.pairs import PairSet
from ..utils.files import atomic_path, expect, read_json, write_json
from ..utils.hub import Shareable

SCHEMA = 2

MAX_SCORE = 1e38

FILE = {
    "graph": {
        "schema": int,
        "architecture": {
            "n_layers": int,
            "n_heads": int,
            "n_kv_heads": int,
            "parallel?": bool,
        },
        "model?": str,
        "model_sha256?": str,
        "settings?": dict,
        "faithfulness?": (float, None),
        "curve?": [[float]],
    },
    "links": [{"source": str, "target": str, "score": float, "kind": str}],
}
"""What is checked of a file; more may stand there."""


@dataclass(frozen=True)
class Circuit(Shareable):
    """A set of edges of one model's attribution graph, with the scores of all edges."""

    FILE: ClassVar[str] = "circuit.json"

    graph: Graph
    scores: Float[np.ndarray, "writers readers"]
    """Forget attribution of every edge, in metric units (positive: supports the answer)."""
    edges: Bool[np.ndarray, "writers readers"]
    """True for the circuit's edges."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Model, settings, faithfulness and its measured curve."""
    pairs: PairSet | None = field(default=None, repr=False, compare=False)
    """The pairs it was discovered on, if discovered in this process."""

    @property
    def n_edges(self) -> int:
        """Number of edges in the circuit."""
        return int(self.edges.sum())

    def check_fits(self, model: AnyModel) -> None:
        """Raise CircuitError unless this is a circuit of this very checkpoint."""
        model = as_model(model)
        if model.architecture != self.graph.architecture:
            raise CircuitError(f"The circuit is of {self.graph.architecture}, not {model.name}.")
        if other := find_mismatch(self.meta, model):
            raise CircuitError(
                f"The circuit was found on another {other} ({self.meta.get('model')}) than "
                f"{model.name}. Discover it again on this one."
            )

    def components(self) -> list[tuple[Node, bool]]:
        """Every node that an edge touches, with True where it takes part as a writer."""
        writers = [
            (n, True)
            for n, used in zip(self.graph.writers, np.any(self.edges, axis=1), strict=True)
            if used
        ]
        readers = [
            (n, False)
            for n, used in zip(self.graph.readers, np.any(self.edges, axis=0), strict=True)
            if used
        ]
        return writers + readers

    def __or__(self, other: Circuit) -> Circuit:
        """Edges of either circuit; scores of the first, and of the second where it alone has the
        edge."""
        scores = np.where(self.edges, self.scores, np.where(other.edges, other.scores, self.scores))
        return self._combined(other, self.edges | other.edges, scores, "union")

    def __and__(self, other: Circuit) -> Circuit:
        """Edges of both circuits, less what is then on no input -> logits path."""
        return self._combined(other, self.edges & other.edges, self.scores, "intersection")

    def __sub__(self, other: Circuit) -> Circuit:
        """Edges of this circuit alone. Not pruned: a difference need not be connected."""
        return self._combined(other, self.edges & ~other.edges, self.scores, "difference")

    def _combined(
        self,
        other: Circuit,
        edges: Bool[np.ndarray, "writers readers"],
        scores: Float[np.ndarray, "writers readers"],
        how: str,
    ) -> Circuit:
        if self.graph.architecture != other.graph.architecture:
            raise CircuitError(
                f"Circuits of different models: {self.graph.architecture} and "
                f"{other.graph.architecture}. Combine circuits of one model."
            )
        if how == "intersection":
            edges = self.graph.prune(edges)
        meta = {k: self.meta[k] for k in ("model", "model_sha256") if k in self.meta}
        return Circuit(self.graph, scores, edges, {**meta, "made_by": how}, self.pairs)

    def to_networkx(self) -> nx.DiGraph:
        """The circuit as a directed graph.

        Nodes carry ``kind``, ``layer``, ``head``; edges carry ``score`` (metric units) and
        ``kind``: ``residual`` for attribution edges, ``inside`` for the free links from a head's
        q/k/v inputs to its output.
        """
        out = nx.DiGraph()
        out.graph.update((k, v) for k, v in self.meta.items() if isinstance(v, (str, int, float)))

        def add(node: Node) -> str:
            out.add_node(node.id, kind=node.kind, layer=node.layer, head=node.head)
            return node.id

        for i, j in np.argwhere(self.edges):
            u, v = self.graph.writers[i], self.graph.readers[j]
            out.add_edge(add(u), add(v), score=float(self.scores[i, j]), kind="residual")
        for j in np.flatnonzero(self.edges.any(0)):
            v = self.graph.readers[j]
            if v.kind in "qkv":
                for row in self.graph.feeds[j]:
                    if self.edges[row].any():
                        out.add_edge(v.id, self.graph.writers[row].id, score=0.0, kind="inside")
        return out

    def save(self, path: Path) -> None:
        """Write the circuit's edges as node-link JSON (networkx's own layout)."""
        data = nx.node_link_data(self.to_networkx(), edges="links")
        data["graph"] = {
            "schema": SCHEMA,
            "architecture": asdict(self.graph.architecture),
            **self.meta,
        }
        write_json(path, data)

    def save_graphml(self, path: Path) -> None:
        """Write GraphML, for Gephi, Cytoscape and the like."""
        with atomic_path(path) as temporary:
            nx.write_graphml(self.to_networkx(), temporary)

    def save_gexf(self, path: Path) -> None:
        """Write GEXF, for Gephi."""
        with atomic_path(path) as temporary:
            nx.write_gexf(self.to_networkx(), temporary)

    @classmethod
    def load(cls, path: Path) -> Circuit:
        """Read a circuit; the scores of edges outside it are 0.

        Raises:
            ArtifactError: missing, damaged, or naming an edge or score that cannot exist.
        """
        data = read_json(path)
        try:
            expect(data, FILE, "the file")
            meta = dict(data["graph"])
            if meta.pop("schema") != SCHEMA:
                raise ArtifactError(f"{path} has an unknown circuit schema; expected {SCHEMA}.")
            sizes = meta.pop("architecture")
            if odd := sorted(sizes.keys() - {f.name for f in fields(Architecture)}):
                raise ValueError(f"the architecture has an unknown {odd[0][:80]!r}")
            graph = Graph(Architecture(**sizes))
            # Zeros take no memory before they are written to: a small file cannot claim much.
            shape = (len(graph.writers), len(graph.readers))
            scores, edges = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
            for link in data["links"]:
                if link["kind"] == "residual":
                    if abs(link["score"]) > MAX_SCORE:
                        raise ValueError(f"the score {link['score']:g} is no float32")
                    at = graph.edge(link["source"], link["target"])
                    edges[at], scores[at] = True, link["score"]
        except ValueError as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path} is not a valid circuit: {error}.") from error
        return cls(graph, scores, edges, meta)
