"""Circuits: discovered edges with their scores, as networkx graphs, files and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from .artifacts import atomic_path, expect, read_json, write_json
from .attribution import attribute, pairs_per_batch
from .config import CircuitConfig
from .errors import ArtifactError, CircuitError
from .faithfulness import Ablation, minimal_edges, strongest
from .graph import Architecture, Graph, Node
from .hooked import AnyModel, as_model
from .hub import Shareable
from .masks import DAMPING, Mask, choose_parameters, region, subject_rows
from .models import LanguageModel
from .nullspace import ByLayer, Weights, fisher_diagonal
from .objectives import answer_gradient, forget_gradient
from .pairs import PairSet
from .provenance import provenance, stranger
from .scoring import known

SCHEMA = 1
MASK_PAIRS = 192
"""Pairs behind each gradient of a mask."""
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
        if other := stranger(self.meta, model):
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

    def mask(
        self,
        model: LanguageModel,
        budget: float = 0.005,
        retain: Sequence[PairSet] = (),
        forget: PairSet | None = None,
        seed: int = 0,
        n_pairs: int = MASK_PAIRS,
        damping: float = DAMPING,
        hold: float = 1.0,
        depth: float = 0.0,
        survive: Sequence[str] = ("nf4",),
        by_layer: bool = False,
        rows: bool = False,
    ) -> Mask:
        """The parameters behind this circuit that forget most per retain damage.

        Arguments:
            model: the model it was discovered on.
            budget: share of all the model's parameters, in (0, 1].
            retain: what must stay (`Task.kept`), each set with equal weight; without it parameters
                are chosen by forget gain alone.
            forget: pairs for the forget gradient; default: those of the discovery.
            seed: which pairs are drawn.
            n_pairs: how many pairs each gradient and the Fisher use.
            damping: see `choose_parameters`.
            hold: weight of the retain answers' gradient; see `choose_parameters`.
            depth: share of the layers, from the input on, in which nothing may be edited.
            survive: quantizers that every edit must survive.
            by_layer: hold gradients and Fisher of one layer at a time: the same mask with less
                memory and as many more passes as there are layers.
            rows: the forget subjects' own rows of the embedding may be edited, too. Every
                element of them is a candidate: what they hold shows once the layers change.

        Raises:
            MaskError: budget out of range, or nothing to edit.
            CircuitError: no forget pairs known, or another checkpoint.
        """
        self.check_fits(model)
        pairs = forget or self.pairs
        if pairs is None:
            raise CircuitError("A circuit read from a file needs forget=... to make a mask.")
        first = depth * self.graph.architecture.n_layers
        components = [c for c in self.components() if c[0].layer >= first or c[0].layer < 0]
        regions = region(model, components)
        names = list(regions)
        if not 0 < budget <= 1 or not names:
            return choose_parameters(model, regions, budget, {})  # raises the right error
        chosen = pairs.sample(n_pairs, seed)

        def per_weight(compute: Callable[[list[str]], Weights]) -> Mapping[str, Tensor]:
            return ByLayer(names, compute) if by_layer else compute(names)

        g = per_weight(lambda some: forget_gradient(model, some, chosen))
        fisher = keep = None
        if retain:
            everything = PairSet("retain", tuple(p for pairs in retain for p in pairs))
            sample = everything.sample(n_pairs, seed)
            fisher = per_weight(lambda some: fisher_diagonal(model, some, sample, seed=seed))
            held = [known(model, pairs.sample(n_pairs, seed)) for pairs in retain]
            held = [pairs for pairs in held if pairs]

            def kept(some: list[str]) -> Weights:
                parts = [answer_gradient(model, some, pairs) for pairs in held]
                return {n: sum((p[n] for p in parts[1:]), parts[0][n]) for n in some}

            keep = per_weight(kept) if held else None
        own = {model.embedding_name: subject_rows(model, pairs, survive)} if rows else None
        mask = choose_parameters(
            model, regions, budget, g, fisher, keep, survive, damping, hold, own
        )
        mask.meta["components"] = [n.id for n, _ in components]
        mask.meta["provenance"] = self.meta.get("provenance")
        return mask

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


def selective_scores(
    forget: Float[np.ndarray, "w r"], retain: Float[np.ndarray, "w r"], discount: float
) -> Float[np.ndarray, "w r"]:
    """Forget scores shrunk where the retain set needs the edge as much; signs are kept."""
    size = np.abs(forget)
    return np.sign(forget) * np.maximum(size - discount * np.abs(retain), 0.1 * size)


def discover(
    model: AnyModel,
    forget: PairSet,
    config: CircuitConfig | None = None,
    retain: PairSet | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Circuit:
    """Find the smallest circuit that carries the forget answers.

    Arguments:
        model: from `load_model`, or a HookedTransformer of TransformerLens 3.9.
        forget: the pairs whose answers must go.
        config: attribution, faithfulness target and selectivity.
        retain: pairs that must stay; makes the circuit selective.
        on_step: called with (stage, done, total).

    Raises:
        CircuitError: a model that cannot be attributed, or settings out of range.
    """
    config, model = config or CircuitConfig(), as_model(model)
    for name, pairs in (("forget", forget), ("retain", retain)):
        if not (isinstance(pairs, PairSet) or (name == "retain" and pairs is None)):
            raise CircuitError(
                f"{name} must be a PairSet (task.{name}, or one of your own); got "
                f"{type(pairs).__name__}."
            )
    note = on_step or (lambda *_: None)
    chosen = forget.sample(config.pairs, config.seed)
    found = attribute(
        model, chosen, config, on_batch=lambda d, n: note("attribution of forget pairs", d, n)
    )
    ranking = found.scores
    if retain is not None and config.selective:
        kept = attribute(
            model,
            retain.sample(config.pairs, config.seed),
            config,
            on_batch=lambda d, n: note("attribution of retain pairs", d, n),
        )
        ranking = selective_scores(found.scores, kept.scores, config.selective)
    edges, curve, final = _select(model, chosen, config, ranking, note)
    longest = max(len(p.clean) for p in chosen)
    size, gb = pairs_per_batch(model.graph, model.d_model, longest, config)
    meta = {
        "model": model.name,
        "model_sha256": model.sha256,
        "settings": asdict(config),
        "provenance": provenance(model, config.seed, asdict(config)),
        "pairs_per_batch": size,
        "gb_per_pair": round(gb, 4),
        "faithfulness": final,
        "curve": curve,
        "metric_clean": found.clean,
        "metric_corrupt": found.corrupt,
    }
    return Circuit(found.graph, found.scores, edges, meta, chosen)


def _select(
    model: AnyModel,
    pairs: PairSet,
    config: CircuitConfig,
    ranking: Float[np.ndarray, "w r"],
    note: Callable[[str, int, int], None],
) -> tuple[Bool[np.ndarray, "w r"], list[tuple[int, float]], float]:
    """The circuit of a ranking, its measured curve, and its faithfulness."""
    sample = pairs.sample(config.faithfulness_pairs, config.seed)
    ablation = Ablation(model, sample, config.metric, config.ablation, config.batch_size)
    tried = 0

    def faithful(edges: Bool[np.ndarray, "w r"]) -> float:
        nonlocal tried
        tried += 1
        note("faithfulness of circuits", tried, 0)
        return ablation.faithfulness(edges)

    if config.top is None and config.threshold is None:
        edges, curve = minimal_edges(model.graph, ranking, faithful, config.faithfulness)
        return edges, curve, faithful(edges)
    n = config.top
    if n is None:
        n = int((model.graph.exists & (np.abs(ranking) >= (config.threshold or 0))).sum())
        if n == 0:
            raise CircuitError(
                f"No edge reaches the threshold {config.threshold}; the strongest has "
                f"{float(np.abs(ranking).max()):.4g}."
            )
    edges = strongest(model.graph, ranking, n)
    final = faithful(edges)
    return edges, [(n, final)], final
