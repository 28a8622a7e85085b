"""A circuit: edges with their scores, what it was made with, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float

from ..errors import ArtifactError, CircuitError, printable
from ..models.graph import Architecture, Graph, Node
from ..models.hooked import AnyModel, as_model
from ..models.provenance import find_mismatch
from ..tasks.pairs import PairSet
from ..utils.files import Json, atomic_path, expect, read_json, write_json
from ..utils.hub import Shareable
from ..utils.ranges import entrance, expect_kind
from .scores import (
    MAX_SCORE,
    ScoredEdge,
    edge_frame,
    html_table,
    labelled,
    ranked_edges,
    to_networkx,
)
from .search.meta import CircuitMeta
from .search.stability import Stability

if TYPE_CHECKING:
    import pandas

    from ..viz.view import View
    from .heads.records import ExplainedHeads
    from .metrics import Metric
    from .search.faithfulness import Ablated

SCHEMA = 2
"""Version of the file's format. 1: written by mansu_interp 0.1, with settings of other names."""

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
        "settings?": {
            "method?": str,
            "ig_steps?": int,
            "at?": str,
            "rules?": str,
            "metric?": str,
            "pairs?": int,
            "batch_size?": int,
            "memory_gb?": (float, None),
            "faithfulness?": float,
            "top?": (int, None),
            "threshold?": (float, None),
            "ablation?": str,
            "faithfulness_pairs?": int,
            "removal_tries?": int,
            "retain_discount?": float,
            "seed?": int,
        },
        "provenance?": (dict, None),
        "pairs_per_batch?": int,
        "gb_per_pair?": float,
        "faithfulness?": (float, None),
        "curve?": [[float]],
        "irreducible?": bool,
        "completeness?": float,
        "random_completeness?": float,
        "metric_clean?": float,
        "metric_corrupt?": float,
        "made_by?": str,
        "caveat?": str,
        "stability?": Stability.WHOLE,
    },
    "links": [
        {"source": str, "target": str, "score": float, "kind": str}
        | {f"{name}?": float for name in Stability.EDGE}
    ],
}
"""What is checked of a file; what else is in it is left out."""


@dataclass(frozen=True, eq=False)
class Circuit(Shareable):
    """A set of edges of one model's attribution graph, with the scores of all edges."""

    FILE: ClassVar[str] = "circuit.json"

    graph: Graph
    scores: Float[np.ndarray, "writers readers"]
    """Forget attribution of every edge, in metric units (positive: supports the answer)."""
    edges: Bool[np.ndarray, "writers readers"]
    """True for the circuit's edges."""
    meta: CircuitMeta = field(default_factory=CircuitMeta)
    """Model, settings, faithfulness and its measured curve."""
    pairs: PairSet | None = field(default=None, repr=False, compare=False)
    """The pairs it was discovered on, if discovered in this process."""
    stability: Stability | None = field(default=None, repr=False, compare=False)
    """How it holds under resampling, if that was asked for."""

    @property
    def n_edges(self) -> int:
        """Number of edges in the circuit."""
        return int(self.edges.sum())

    @entrance(CircuitError)
    def top(self, n: int = 10) -> list[ScoredEdge]:
        """The circuit's strongest edges by |score|, at most ``n``.

        Raises:
            CircuitError: a negative number.
        """
        return ranked_edges(self.graph, self.scores, n, self.edges)

    @entrance(CircuitError)
    def ablate(
        self,
        model: AnyModel,
        pairs: PairSet,
        *,
        metric: Metric | str = "logit_diff",
        ablation: str = "corrupt",
        batch_size: int = 16,
    ) -> Ablated:
        """What a model predicts when everything outside this circuit is ablated.

        Arguments:
            model: the circuit's model, or an edited one of the same architecture.
            pairs: clean and corrupt prompts.
            metric: name, or a function as in `attribute`.
            ablation: what an edge outside carries: ``corrupt``, ``mean`` or ``zero``.
            batch_size: pairs per forward pass.

        Returns:
            Logits, the metric of each pair, and predictions, beside those of the whole model.

        Raises:
            CircuitError: another architecture, or a model that cannot be rebuilt exactly.
        """
        from .search.faithfulness import ablate

        model = as_model(model)
        if model.architecture != self.graph.architecture:
            raise CircuitError(f"The circuit is of {self.graph.architecture}, not {model.name}.")
        return ablate(
            model, self.edges, pairs, metric=metric, ablation=ablation, batch_size=batch_size
        )

    def view(self, **settings: Any) -> View:
        """The circuit, drawn: `circuit_view` with its settings, such as ``model=``."""
        from ..viz.view import circuit_view

        return circuit_view(self, **settings)

    def to_pandas(self) -> pandas.DataFrame:
        """The circuit's edges, the strongest first: source, target and score in metric units; with
        a `stability`, also ``low``, ``high``, ``frequency`` and ``same_sign``."""
        top = self.top(self.n_edges)
        frame, stable = edge_frame(top), self.stability
        if stable is not None:
            at = np.array([self.graph.edge(e.source, e.target) for e in top], int).reshape(-1, 2)
            for name in stable.EDGE:
                frame[name] = getattr(stable, name)[at[:, 0], at[:, 1]]
        return frame

    @entrance(CircuitError)
    def explain(self, model: AnyModel, pairs: PairSet | None = None) -> ExplainedHeads:
        """What the circuit's heads do: where they look and why, what they write, their role.

        Arguments:
            model: the circuit's model, or an edited one of the same architecture.
            pairs: on which; default: those that it was discovered on in this process.

        Raises:
            CircuitError: another architecture, or a circuit from a file without ``pairs``.
        """
        from .heads.explain import explain_heads

        model, pairs = as_model(model), pairs or self.pairs
        if model.architecture != self.graph.architecture:
            raise CircuitError(f"The circuit is of {self.graph.architecture}, not {model.name}.")
        if pairs is None:
            raise CircuitError(
                "This circuit does not hold the pairs that it was found on: give pairs=, such as "
                "load_task(name, model).forget.sample(96, 0)."
            )
        heads = [n.id for n, writes in self.components() if writes and n.kind == "head"]
        return explain_heads(model, pairs, heads)

    def __repr__(self) -> str:
        faithful = self.meta.faithfulness
        known = f", faithfulness {faithful:.3f}" if faithful is not None else ""
        if self.meta.completeness is not None:
            known += f", completeness {self.meta.completeness:.3f}"
        of = f" of {self.meta.model}" if self.meta.model else ""
        parts = [f"{self.n_edges:,} of {self.graph.n_edges:,} edges{of}{known}"]
        parts += [self.stability.sentence] if self.stability else []
        parts += [f"caveat: {self.meta.caveat}"] if self.meta.caveat else []
        return f"Circuit({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        return html_table(f"{self!r}; the strongest:", self.top())

    @entrance(CircuitError)
    def check_fits(self, model: AnyModel) -> None:
        """Raise CircuitError unless this is a circuit of this very checkpoint."""
        model = as_model(model)
        if model.architecture != self.graph.architecture:
            raise CircuitError(f"The circuit is of {self.graph.architecture}, not {model.name}.")
        if other := find_mismatch(self.meta.to_json(), model):
            raise CircuitError(
                f"The circuit was found on another {other} ({self.meta.model}) than "
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
        self._check_same_model(other)
        scores = np.where(other.edges & ~self.edges, other.scores, self.scores)
        return self._made("union", other, self.edges | other.edges, scores)

    def __and__(self, other: Circuit) -> Circuit:
        """Edges of both circuits, less what is then on no input -> logits path."""
        self._check_same_model(other)
        edges = self.graph.prune(self.edges & other.edges)
        return self._made("intersection", other, edges, self.scores)

    def __sub__(self, other: Circuit) -> Circuit:
        """Edges of this circuit alone. Not pruned: a difference need not be connected."""
        self._check_same_model(other)
        return self._made("difference", other, self.edges & ~other.edges, self.scores)

    def _check_same_model(self, other: Circuit) -> None:
        expect_kind(CircuitError, "the other circuit", other, Circuit)
        if self.graph.architecture != other.graph.architecture:
            raise CircuitError(
                f"Circuits of different models: {self.graph.architecture} and "
                f"{other.graph.architecture}. Combine circuits of one model."
            )

    def _made(
        self,
        how: str,
        other: Circuit,
        edges: Bool[np.ndarray, "writers readers"],
        scores: Float[np.ndarray, "writers readers"],
    ) -> Circuit:
        """Of two circuits; model and pairs are kept where both have the same."""
        meta = self.meta.of_parts(how, other.meta)
        pairs = self.pairs if self.pairs == other.pairs else None
        return Circuit(self.graph, scores, edges, meta, pairs)

    def to_networkx(self) -> nx.DiGraph:
        """The circuit as a directed graph.

        Nodes carry ``kind``, ``layer``, ``head``; edges carry ``score`` (metric units) and
        ``kind``: ``residual`` for attribution edges, ``inside`` for the free links from a head's
        q/k/v inputs to its output; with a `stability`, the former have its numbers, too. For
        programs that draw graphs, both carry a ``label``, and edges a ``weight``: |score|, 0 for
        free links.
        """
        out = labelled(self._network())
        for k, v in self.meta.to_json().items():
            if isinstance(v, (str, int, float)):  # XML has no control characters
                out.graph[k] = printable(v) if isinstance(v, str) else v
        return out

    def _network(self) -> nx.DiGraph:
        """`to_networkx` without what can be told from the rest, and is for other programs."""
        out = to_networkx(self.graph, self.scores, self.edges)
        if self.stability:
            for i, j in np.argwhere(self.edges).tolist():
                ends = self.graph.writers[i].id, self.graph.readers[j].id
                out.edges[ends].update(self.stability.of_edge(i, j))
        return out

    @entrance(CircuitError)
    def save(self, path: Path | str) -> None:
        """Write the circuit's edges as node-link JSON (networkx's own layout, its edges under
        ``links``)."""
        write_json(Path(path), self.node_link(edges="links"))

    def node_link(self, edges: str = "edges") -> dict[str, Json]:
        """The circuit as node-link values, with what it was made with.

        Arguments:
            edges: what the list of edges is called: networkx reads ``edges`` by default from 3.6
                on, and ``links`` before; `load` reads both.
        """
        net = self._network() if edges == "links" else self.to_networkx()
        sizes = asdict(self.graph.architecture)
        graph = {"schema": SCHEMA, "architecture": sizes, **self.meta.to_json()}
        if self.stability:
            graph["stability"] = self.stability.told()
        return {**nx.node_link_data(net, edges=edges), "graph": graph}

    @entrance(CircuitError)
    def save_graphml(self, path: Path | str) -> None:
        """Write GraphML, for Gephi, Cytoscape and the like."""
        with atomic_path(Path(path)) as temporary:
            nx.write_graphml(self.to_networkx(), temporary)

    @entrance(CircuitError)
    def save_gexf(self, path: Path | str) -> None:
        """Write GEXF, for Gephi."""
        with atomic_path(Path(path)) as temporary:
            nx.write_gexf(self.to_networkx(), temporary)

    @classmethod
    @entrance(CircuitError)
    def load(cls, path: Path | str) -> Circuit:
        """Read a circuit; the scores of edges outside it are 0.

        Raises:
            ArtifactError: missing, damaged, or naming an edge or score that cannot exist.
        """
        data = read_json(path := Path(path))
        try:
            _check_schema(path, data)
            if "edges" in data:
                data = {"links": data["edges"], **data}
            expect(data, FILE, "the file")
            sizes = data["graph"]["architecture"]
            if odd := sorted(sizes.keys() - {f.name for f in fields(Architecture)}):
                raise ValueError(f"the architecture has an unknown {odd[0][:80]!r}")
            graph = Graph(Architecture(**sizes))
            # Zeros take no memory before they are written to: a small file cannot claim much.
            shape = (len(graph.writers), len(graph.readers))
            scores, edges = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
            links = dict[tuple[int, int], Mapping[str, Json]]()
            for link in data["links"]:
                if link["kind"] not in ("residual", "inside"):
                    raise ValueError(f"it has a link of the kind {link['kind'][:80]!r}")
                if link["kind"] == "residual":
                    if abs(link["score"]) > MAX_SCORE:
                        raise ValueError(f"the score {link['score']:g} is no float32")
                    at = graph.edge(link["source"], link["target"])
                    if edges[at]:
                        raise ValueError(f"{link['source']} -> {link['target']} is there twice")
                    edges[at], scores[at], links[at] = True, link["score"], link
            meta, held = CircuitMeta.from_json(data["graph"]), data["graph"].get("stability")
            stable = held and Stability.from_json(held, links, shape)
            return cls(graph, scores, edges, meta, stability=stable or None)
        except ArtifactError:
            raise
        except ValueError as error:
            raise ArtifactError(f"{path} is not a valid circuit: {error}.") from error


def _check_schema(path: Path, data: object) -> None:
    """Raise ArtifactError unless a file has the schema that is read here."""
    expect(data, {"graph": {"schema": int}}, "the file")
    assert isinstance(data, dict)
    schema = data["graph"]["schema"]
    if schema == SCHEMA:
        return
    if schema == 1:
        raise ArtifactError(
            f"{path} is a circuit of schema 1, written by mansu_interp 0.1, whose settings have "
            f"other names; this version reads schema {SCHEMA}. Discover it again."
        )
    raise ArtifactError(f"{path} has an unknown circuit schema {schema}; expected {SCHEMA}.")
