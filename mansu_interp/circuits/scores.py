"""Edge scores: what `attribute` returns, as tables, graphs and files."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ArtifactError, CircuitError
from ..models.graph import Architecture, Graph, Node
from ..models.stream import StreamedModel
from ..tasks.pairs import Pair, PairSet
from ..tasks.task import spelled
from ..utils.files import expect
from ..utils.ranges import entrance
from ..utils.tensors import Checkpoint, read_tensors, tensors_sha256, write_tensors
from .changes import classify

if TYPE_CHECKING:
    import pandas

    from ..viz.view import View

OnPairs = Callable[[Sequence[Pair], Float[Tensor, "batch writers readers"]], None]
"""Called with the pairs of a batch and the scores of each of them."""
SCHEMA = 1
"""Version of the file's format."""
NEURONS = "neurons/"
"""Before a node, in the names of sums."""
MAX_SCORE = 1e38
"""Largest score that is believed of a file: float32 ends at 3.4e38."""
SCORES_FILE = {"architecture": dict, "clean": float, "corrupt": float, "caveat?": str}
"""What is checked of its header."""


@dataclass
class Sums:
    """What attribution adds up over pairs and path points.

    Sums over batches are float64 on the CPU: they are added to once a batch, which takes no time,
    and hardly round, however many batches there are. On the device nothing is float64, which MPS
    does not have.
    """

    scores: Float[Tensor, "writers readers"]
    ends: Float[Tensor, "facts 4"]
    """Clean metric, corrupt metric, answers ranked first, and pairs, by fact."""
    by_position: Float[Tensor, "pos writers readers"] | None
    neurons: dict[str, Float[Tensor, " n"]]
    batch: Float[Tensor, "writers readers"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Scores of the batch at hand, on the device."""
    each: Float[Tensor, "batch writers readers"] | None = None
    """Of the pairs of the batch at hand, if they are asked for."""

    @classmethod
    def zeros(cls, graph: Graph, positions: int, facts: int) -> Sums:
        """Nothing yet; ``positions`` = 0: none are told apart."""
        shape = (len(graph.writers), len(graph.readers))
        return cls(
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(facts, 4, dtype=torch.float64),
            torch.zeros(positions, *shape) if positions else None,
            {},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All sums over batches, by name."""
        places = {} if self.by_position is None else {"by_position": self.by_position}
        neurons = {NEURONS + node: value for node, value in self.neurons.items()}
        return {"scores": self.scores, "ends": self.ends, **places, **neurons}


@dataclass
class Unfinished(Checkpoint):
    """Sums over the first batches, in one file."""

    SCHEMA = 1
    META: ClassVar[dict[str, object]] = {"batches": int, "size": int}
    OF = "model, pairs or settings"

    size: int = 0
    """Pairs in a batch."""

    def load(
        self,
        sums: Sums,
        model: StreamedModel,
        pairs: PairSet,
        *settings: object,
    ) -> int:
        """Fill in the sums of the file, if there is one of batches of this size; returns how many
        batches they are of."""
        if self.path is None:
            return 0
        text = f"{model.sha256 or tensors_sha256(model.weights)} {spelled(pairs)} {settings}"
        self.made_of = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        meta = self.read()
        if meta is None or meta["size"] != self.size:
            return 0
        neurons = {n: t for n, t in self.tensors.items() if n.startswith(NEURONS)}
        for name, into in sums.tensors().items():
            self.restore(name, into)
        sums.neurons = {name.removeprefix(NEURONS): t for name, t in neurons.items()}
        return meta["batches"]

    def save(self, sums: Sums, batches: int) -> None:
        """Write the file, whole or not at all."""
        self.write(sums.tensors(), {"batches": batches, "size": self.size})


@dataclass(frozen=True)
class ScoredEdge:
    """One edge and its score."""

    source: str
    """Id of the writer."""
    target: str
    """Id of the reader."""
    score: float
    """In units of the metric; positive: supports the answer."""


def ranked_edges(
    graph: Graph,
    scores: Float[np.ndarray, "writers readers"],
    n: int | None = None,
    edges: Bool[np.ndarray, "writers readers"] | None = None,
) -> list[ScoredEdge]:
    """Edges by |score|, the strongest first.

    Arguments:
        graph: whose edges.
        scores: of every edge.
        n: at most so many; default: all.
        edges: True for those that count; default: all of the graph.

    Raises:
        CircuitError: a negative number.
    """
    if n is not None and n < 0:
        raise CircuitError(f"Give how many edges there are to be, at least 0; got {n}.")
    rows, columns = np.nonzero(graph.exists if edges is None else edges)
    order = np.argsort(-np.abs(scores[rows, columns]), kind="stable")[:n]
    return [
        ScoredEdge(graph.writers[i].id, graph.readers[j].id, float(scores[i, j]))
        for i, j in zip(rows[order], columns[order], strict=True)
    ]


def to_networkx(
    graph: Graph,
    scores: Float[np.ndarray, "writers readers"],
    edges: Bool[np.ndarray, "writers readers"],
) -> nx.DiGraph:
    """Some edges as a directed graph; see `Circuit.to_networkx`."""
    out = nx.DiGraph()

    def add(node: Node) -> str:
        out.add_node(node.id, kind=node.kind, layer=node.layer, head=node.head)
        return node.id

    for i, j in np.argwhere(edges):
        u, v = graph.writers[i], graph.readers[j]
        out.add_edge(add(u), add(v), score=float(scores[i, j]), kind="residual")
    for j in np.flatnonzero(edges.any(0)):
        v = graph.readers[j]
        if v.kind in "qkv":
            for row in graph.feeds[j]:
                if edges[row].any():
                    out.add_edge(v.id, graph.writers[row].id, score=0.0, kind="inside")
    return out


def edge_frame(edges: Sequence[ScoredEdge]) -> pandas.DataFrame:
    """Edges as a data frame with the columns source, target and score."""
    import pandas

    return pandas.DataFrame(
        [(e.source, e.target, e.score) for e in edges], columns=["source", "target", "score"]
    )


def labelled(net: nx.DiGraph) -> nx.DiGraph:
    """The same graph with what programs that draw graphs look for: see `Circuit.to_networkx`."""
    for node, data in net.nodes(data=True):
        data["label"] = node
    for *_, data in net.edges(data=True):
        free = data["kind"] == "inside"
        data |= {"weight": abs(data["score"]), "label": "" if free else f"{data['score']:+.3g}"}
    return net


@dataclass(frozen=True, eq=False)
class Attribution:
    """Edge scores over a pair set."""

    graph: Graph
    scores: Float[np.ndarray, "writers readers"]
    """Mean over pairs, in units of the metric; 0 where no edge exists."""
    clean: float
    """Mean metric of the clean runs."""
    corrupt: float
    """Mean metric of the corrupt runs."""
    by_position: Float[np.ndarray, "pos writers readers"] | None = None
    """The same by token position, counted from the start; the sum over positions is ``scores``."""
    neurons: dict[str, Float[np.ndarray, " n"]] = field(default_factory=dict)
    """Scores of each MLP's neurons (``m3``) and each head's output dimensions (``a3.h5``), in units
    of the metric; their sum over a writer is its node score."""
    caveat: str = ""
    """What to know when reading the scores: no gap between clean and corrupt prompts, or answers
    that the model seldom ranks first; empty: nothing."""

    def node_scores(self) -> dict[str, float]:
        """Score of each writer: the sum of its outgoing edges, because its total gradient is the
        sum of its readers' gradients."""
        return dict(zip(self.graph.writer_index, self.scores.sum(1).tolist(), strict=True))

    @entrance(CircuitError)
    def edge(self, source: str, target: str) -> float:
        """Score of an edge by its ids, such as ``("a0.h1", "m3")``.

        Raises:
            CircuitError: no such edge.
        """
        return float(self.scores[self.graph.edge(source, target)])

    @entrance(CircuitError)
    def top(self, n: int = 10) -> list[ScoredEdge]:
        """The strongest edges by |score|, at most ``n``.

        Raises:
            CircuitError: a negative number.
        """
        return ranked_edges(self.graph, self.scores, n)

    def to_networkx(self) -> nx.DiGraph:
        """Every edge that has a score, as a directed graph (see `Circuit.to_networkx`)."""
        return labelled(to_networkx(self.graph, self.scores, self.scores != 0))

    def to_pandas(self) -> pandas.DataFrame:
        """Every edge as a row: source, target, score; the strongest first."""
        return edge_frame(ranked_edges(self.graph, self.scores))

    @entrance(CircuitError)
    def save(self, path: Path | str) -> None:
        """Write the scores as safetensors, those by position with them."""
        header = {
            "architecture": asdict(self.graph.architecture),
            "clean": self.clean,
            "corrupt": self.corrupt,
            **({"caveat": self.caveat} if self.caveat else {}),
        }
        kept = {"scores": self.scores, "by_position": self.by_position}
        tensors = {name: torch.from_numpy(v) for name, v in kept.items() if v is not None}
        write_tensors(Path(path), "scores", SCHEMA, tensors, header)

    @classmethod
    @entrance(CircuitError)
    def load(cls, path: Path | str) -> Attribution:
        """Read what `save` wrote: scores by edge and position, not those by neuron.

        Raises:
            ArtifactError: no such file, or one that is damaged or of another kind.
        """
        tensors, header = read_tensors(Path(path), "scores", SCHEMA)
        try:
            expect(header, SCORES_FILE, "the header")
            graph = Graph(Architecture(**header["architecture"]))
            found = {name: tensor.numpy() for name, tensor in tensors.items()}
            scores, places = found["scores"], found.get("by_position")
            shapes = {v.shape[-2:] for v in found.values()}
            if shapes != {graph.exists.shape} or scores.ndim != 2:
                raise ValueError("the scores do not fit the architecture")
            if places is not None and places.ndim != 3:
                raise ValueError("the scores by position have no positions")
            if not all(np.isfinite(v).all() for v in found.values()):
                raise ValueError("the scores are not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds no edge scores: {error}.") from error
        ends, said = (header["clean"], header["corrupt"]), header.get("caveat", "")
        return cls(graph, scores, *ends, places, caveat=said)

    def view(self, **settings: Any) -> View:
        """The graph, drawn: `attribution_view` with its settings, such as ``model=``."""
        from ..viz.view import attribution_view

        return attribution_view(self, **settings)

    def __repr__(self) -> str:
        return (
            f"Attribution({self.graph.n_edges:,} edges; metric {self.clean:.3g} clean, "
            f"{self.corrupt:.3g} corrupt{self.caveat and f'; caveat: {self.caveat}'})"
        )

    def _repr_html_(self) -> str:
        return html_table(f"{self!r}; the strongest:", self.top())


@entrance(CircuitError)
def edge_changes(
    before: Attribution,
    after: Attribution,
    quantized: Attribution | None = None,
    *,
    threshold: float | None = None,
) -> pandas.DataFrame:
    """What became of each edge, as a table: one row an edge that any of the models has.

    Arguments:
        before: `attribute` of the original model.
        after: the same of the edited model, on the same pairs with the same metric.
        quantized: the same of its quantized form.
        threshold: |score| from which an edge counts as present (see `classify`).

    Returns:
        The columns source, target, before, after, quantized (if given), left (after / before) and
        change (see `classify`), the strongest of the original first. Edges that vanished are
        ``table[table.change == "silent"]``.

    Raises:
        CircuitError: graphs of different architectures.
    """
    import pandas

    given = [x for x in (before, after, quantized) if x is not None]
    if any(x.graph.architecture != before.graph.architecture for x in given):
        raise CircuitError("These are graphs of different architectures; give scores of one model.")
    classes = classify(*(x.scores for x in given), threshold=threshold).names()
    rows, columns = np.nonzero(before.graph.exists & (classes != "quiet"))
    order = np.argsort(-np.abs(before.scores[rows, columns]), kind="stable")
    at = rows[order], columns[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        left = after.scores[at] / before.scores[at]
    table = {
        "source": [before.graph.writers[i].id for i in at[0]],
        "target": [before.graph.readers[j].id for j in at[1]],
        "before": before.scores[at],
        "after": after.scores[at],
        **({"quantized": quantized.scores[at]} if quantized is not None else {}),
        "left": left,
        "change": classes[at],
    }
    return pandas.DataFrame(table)


def html_table(caption: str, edges: Sequence[ScoredEdge]) -> str:
    """A short table for notebooks."""
    rows = "".join(
        f"<tr><td><code>{e.source}</code></td><td><code>{e.target.replace('<', '&lt;')}</code></td>"
        f"<td style='text-align:right'>{e.score:+.3f}</td></tr>"
        for e in edges
    )
    head = "<tr><th>source</th><th>target</th><th>score</th></tr>"
    caption = f"<caption>{html.escape(caption)}</caption>"
    return f"<table>{caption}<thead>{head}</thead><tbody>{rows}</tbody></table>"
