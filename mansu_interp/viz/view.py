"""Views: what a graph shows, as one typed record, and every form in which it can be shown.

A `View` has its data and nothing else. It draws itself as an interactive widget (`widget`), as
one self-contained page (`to_html`), as a picture (`to_svg`, `to_png`), and in a saved notebook as
a static picture. The data's format is described in docs/viewing.md.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ..circuits.changes import Changes, classify
from ..errors import CircuitError, ViewError
from ..models.graph import Graph
from ..utils.files import Json, atomic_path, read_json, write_json, write_text
from ..utils.libraries import library
from ..utils.ranges import entrance
from .data import EdgeData, GraphData, Judged, NodeData, PositionData, Verdict
from .layout import box_id
from .page import graph_page, view_svg

if TYPE_CHECKING:  # at run time only their attributes are used
    from ..circuits.circuit import Circuit
    from ..circuits.compare import GraphComparison
    from ..circuits.heads.records import ExplainedHeads
    from ..circuits.scores import Attribution
    from ..masks.mask import Mask
    from ..models.language_model import LanguageModel
    from ..tasks.pairs import Pair
    from .widget import GraphWidget

LIMIT = 3000
"""Edges in a view by default: the strongest in any pane and those of the circuit."""
TOP = 200
"""Edges drawn at first; more are a hairball."""
PROMPTS = 3
"""Prompts on which attention and direct effects are shown."""


@dataclass(frozen=True)
class View:
    """A drawing of one or several attribution graphs of one architecture."""

    data: GraphData
    """Everything that is shown."""

    @classmethod
    def from_json(cls, path: Path | str) -> View:
        """What `to_json` wrote, or a page's or widget's *save as JSON*: with its pins, groups and
        notes.

        Raises:
            ArtifactError: no such file, or one that is damaged or of another kind.
        """
        return cls(GraphData.from_json(read_json(Path(path))))

    def widget(self) -> GraphWidget:
        """The interactive widget."""
        from .widget import graph_widget

        return graph_widget(self)

    def to_html(self, path: Path | str) -> Path:
        """Write one page that works from a file and asks nothing of the network."""
        path = Path(path)
        write_text(path, graph_page(self.data))
        return path

    def to_svg(self, path: Path | str, top: int = TOP) -> Path:
        """Write a static picture with the ``top`` strongest edges."""
        path = Path(path)
        write_text(path, self.svg(top))
        return path

    def to_png(
        self, path: Path | str, top: int = TOP, dark: bool = False, zoom: float = 2.0
    ) -> Path:
        """Write the picture as pixels.

        Raises:
            ViewError: the rasteriser is not installed.
        """
        without = "to_svg and to_html work without it."
        pixels = self._pixels(self.svg(top, "dark" if dark else "light"), zoom, without)
        path = Path(path)
        with atomic_path(path) as temporary:
            temporary.write_bytes(pixels)
        return path

    def _pixels(self, svg: str, zoom: float, without: str = "") -> bytes:
        resvg_py = library("resvg_py", "png", "to_png", ViewError, without)
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=zoom))

    def to_json(self, path: Path | str) -> Path:
        """Write the data (docs/viewing.md)."""
        path = Path(path)
        write_json(path, self.data.to_json())
        return path

    @entrance(ViewError)
    def svg(self, top: int = TOP, theme: str | None = None) -> str:
        """The static picture; ``theme`` (light, dark) fixes the colours, else they follow the
        reader's."""
        return view_svg(self.data, top=top, theme=theme)

    def static_forms(self) -> dict[str, str]:
        """What a saved notebook shows, by media type: pixels besides the SVG, which notebooks that
        are not trusted do not draw, where the rasteriser is installed."""
        forms = {"image/svg+xml": self.svg(), "text/plain": repr(self)}
        with contextlib.suppress(ViewError):
            pixels = self._pixels(self.svg(theme="light"), zoom=1.5)
            forms["image/png"] = base64.b64encode(pixels).decode()
        return forms

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return self.static_forms()

    def __repr__(self) -> str:
        edges = len(self.data.edges.source)
        return f"View({self.data.title!r}, {edges:,} edges in {len(self.data.panes)} panes)"


def _round(values: Float[np.ndarray, " n"]) -> list[float]:
    """Four significant digits: what a tooltip shows, at half the size."""
    return [float(f"{v:.4g}") for v in np.asarray(values, dtype=float).tolist()]


def _weights(graph: Graph, model: LanguageModel | None, mask: Mask | None) -> dict[str, list[str]]:
    """What lies behind each box, in words; empty without a model."""
    if model is None:
        return {}
    from ..masks.components import component_slices

    out: dict[str, list[str]] = {}
    for nodes, writes in ((graph.readers, False), (graph.writers, True)):
        for node in nodes:
            for name, axis, where in component_slices(model, node, writes):
                start, stop, _ = where.indices(model.weights[name].shape[axis == "cols"])
                line = f"{name} {axis} {start}–{stop - 1}"
                if mask is not None and name in mask.indices:
                    columns = model.weights[name].shape[1]
                    flat = np.asarray(mask.indices[name])
                    at = flat % columns if axis == "cols" else flat // columns
                    inside = int(((at >= start) & (at < stop)).sum())
                    line += f": {inside:,} of them in the mask" if inside else ""
                out.setdefault(box_id(node.id), []).append(line)
    table = model.embedding_name
    if mask is not None and table in mask.indices:
        line = f"{table} rows of subjects: {len(mask.indices[table]):,} of them in the mask"
        out.setdefault("input", []).append(line)
    return out


def _strongest(
    circuit: Circuit, panes: Mapping[str, Float[np.ndarray, "writers readers"]], limit: int | None
) -> tuple[Int[np.ndarray, " edges"], Int[np.ndarray, " edges"]]:
    """Rows and columns of the edges that a view shows: the strongest in any pane, and all of the
    circuit."""
    graph = circuit.graph
    strength = np.max([np.abs(s) for s in panes.values()], axis=0) * graph.exists
    rows, columns = np.nonzero(graph.exists & ((strength > 0) | circuit.edges))
    order = np.lexsort((-strength[rows, columns], ~circuit.edges[rows, columns]))
    if limit is not None and len(order) > limit:
        by_strength = np.argsort(-strength[rows, columns], kind="stable")[:limit]
        order = np.union1d(order[: circuit.n_edges], by_strength)
    order = order[np.argsort(-strength[rows[order], columns[order]], kind="stable")]
    return rows[order], columns[order]


def _graph_data(
    title: str,
    circuit: Circuit,
    panes: Mapping[str, Float[np.ndarray, "writers readers"]],
    limit: int | None,
) -> GraphData:
    """The strongest edges of some panes and all writers, with their scores.

    Raises:
        CircuitError: scores of another architecture.
    """
    graph = circuit.graph
    for name, scores in panes.items():
        if scores.shape != graph.exists.shape:
            raise CircuitError(
                f"The scores of {name or 'the graph'} have shape {scores.shape}; this architecture "
                f"needs {graph.exists.shape}."
            )
    i, j = _strongest(circuit, panes, limit)
    return GraphData(
        title=title,
        architecture=graph.architecture,
        panes=list(panes),
        edges=EdgeData(
            source=i.tolist(),
            target=j.tolist(),
            in_circuit=circuit.edges[i, j].astype(int).tolist(),
            scores=[_round(s[i, j]) for s in panes.values()],
        ),
        nodes=NodeData([_round(s.sum(1)) for s in panes.values()]),
        total=graph.n_edges,
        top=TOP,
    )


def _with_tokens(
    data: GraphData,
    model: LanguageModel | None,
    pairs: Sequence[Pair] | None,
    scores: Attribution | None = None,
    by_position: bool = False,
) -> GraphData:
    """The same with what happens at the tokens of some prompts, and scores by token position, laid
    out so at first if that is asked for.

    Raises:
        ViewError: pairs without a model, or no scores by position to lay out.
    """
    found = scores.by_position if scores is not None else None
    if by_position and found is None:
        raise ViewError(
            "These scores are not by token position: attribute(model, pairs, positions=True) "
            "makes them."
        )
    if pairs is not None and model is None:
        raise ViewError("Attention and direct effects on pairs need the model: give model=, too.")
    places, at = None, (data.edges.source, data.edges.target)
    if found is not None:
        names = [str(k) for k in range(len(found))]
        nodes = [_round(scores.sum(1)) for scores in found]
        places = PositionData(names, [_round(scores[at]) for scores in found], nodes)
    if pairs is not None and model is not None:
        from .tokens import look_inside, position_names

        if places is not None:
            places = replace(places, tokens=position_names(pairs, model, len(places.tokens)))
        lengths = sorted({len(pair.clean) for pair in pairs})
        if places is not None and len(lengths) > 1:
            fact = f"prompts of {lengths[0]} to {lengths[-1]} tokens, counted from the first"
            data = replace(data, facts=[*data.facts, fact])
        edges = zip(data.edge_ids(), data.edges.in_circuit, strict=True)
        drawn = [edge for k, (edge, inside) in enumerate(edges) if k < data.top or inside]
        nodes = {box_id(end) for edge in drawn for end in edge}
        data = replace(data, prompts=look_inside(model, pairs[:PROMPTS], nodes))
    state: dict[str, Json] = {"by_position": True} if by_position else {}
    return replace(data, positions=places, state=state)


@entrance(ViewError)
def circuit_view(
    circuit: Circuit,
    *,
    scores: Attribution | None = None,
    model: LanguageModel | None = None,
    mask: Mask | None = None,
    pairs: Sequence[Pair] | None = None,
    heads: ExplainedHeads | None = None,
    limit: int | None = LIMIT,
    title: str = "",
) -> View:
    """A circuit and the scores of the other edges around it; with its `Circuit.stability`, edges
    fade with the share of resamples that have them.

    Arguments:
        circuit: from `discover`, or read from a file (then only its own edges have scores).
        scores: from `attribute` with ``positions=True``: lays the circuit out by token position.
        model: its model, to name the weights behind each component.
        mask: to count the parameters of the mask in them.
        pairs: prompts: with a model, the first three show attention and direct effects.
        heads: what its heads do, for their cards (from `Circuit.explain`).
        limit: edges in the view: so many, the strongest, and all of the circuit; None: every edge.
        title: default: the model's name.

    Raises:
        ViewError: not a circuit, pairs without a model, or scores without positions or of another
            model.
    """
    if scores is not None and scores.graph.architecture != circuit.graph.architecture:
        raise ViewError(
            f"The scores are of {scores.graph.architecture} and the circuit of "
            f"{circuit.graph.architecture}: give those of the circuit's own model."
        )
    faithfulness, name = circuit.meta.faithfulness, circuit.meta.model
    facts = [f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges in the circuit"]
    facts += [f"faithfulness {faithfulness:.2f}"] if faithfulness is not None else []
    facts += [circuit.stability.sentence] if circuit.stability else []
    facts += [circuit.meta.caveat] if circuit.meta.caveat else []
    title = title or f"Circuit{f' of {name}' if name else ''}"
    data = _graph_data(title, circuit, {"": circuit.scores}, limit)
    top = min(TOP, circuit.n_edges) or TOP
    data = replace(data, facts=facts, top=top, weights=_weights(circuit.graph, model, mask))
    if heads is not None:
        data = replace(data, heads={head.head: head.to_json() for head in heads})
    if stable := circuit.stability:
        at = data.edges.source, data.edges.target
        columns = {n: _round(getattr(stable, n)[at]) for n in ("frequency", "low", "high")}
        data = replace(data, edges=replace(data.edges, **columns), resamples=stable.over)
    return View(_with_tokens(data, model, pairs, scores, by_position=scores is not None))


@entrance(ViewError)
def attribution_view(
    scores: Attribution,
    *,
    model: LanguageModel | None = None,
    pairs: Sequence[Pair] | None = None,
    by_position: bool = False,
    limit: int | None = LIMIT,
    title: str = "Edge scores",
) -> View:
    """The strongest edges of a graph; by token position, too, if they were scored so.

    Arguments:
        scores: from `attribute`.
        by_position: open, and draw pictures, with token positions from left to right and layers
            upward. Needs scores with ``positions=True``, which pages and widgets can lay out so
            in any case.
        model: its model, to name the weights behind each component.
        pairs: those it was scored on: with a model, their tokens name the positions, and the first
            three show attention and direct effects.
        limit: edges in the view, the strongest; None: every edge.
        title: of the page.

    Raises:
        ViewError: pairs without a model, other ones than were scored, or scores without positions.
    """
    from ..circuits.circuit import Circuit

    nothing = np.zeros_like(scores.graph.exists)
    circuit = Circuit(scores.graph, scores.scores, nothing)
    data = _graph_data(title, circuit, {"": np.asarray(scores.scores)}, limit)
    facts = [f"metric {scores.clean:.3g} on clean prompts, {scores.corrupt:.3g} on corrupt ones"]
    facts += [scores.caveat] if scores.caveat else []
    data = replace(data, facts=facts, weights=_weights(scores.graph, model, None))
    return View(_with_tokens(data, model, pairs, scores, by_position))


def _scores_of(
    needed: Mapping[str, Attribution], more: Mapping[str, Attribution | None]
) -> dict[str, Float[np.ndarray, "writers readers"]]:
    """The scores of several models, by name, without those that are None."""
    return {n: np.asarray(a.scores) for n, a in {**needed, **more}.items() if a is not None}


def _with_classes(data: GraphData, edges: Changes, nodes: Changes) -> GraphData:
    """The same with what became of every edge and component."""
    counts, classes = edges.counts(), edges.codes[data.edges.source, data.edges.target].tolist()
    return replace(
        data,
        edges=replace(data.edges, classes=classes),
        nodes=replace(data.nodes, classes=nodes.codes.tolist()),
        top=max(1, min(TOP, sum(counts.values()))),  # not what is quiet in all
        counts=counts,
        present_from=edges.threshold,
    )


def _what_became(
    graph: Graph, before: Float[np.ndarray, "writers readers"], counts: Mapping[str, int]
) -> list[str]:
    """Where the original had it, and how many edges became what, most first."""
    order = np.argsort(-np.abs(before.sum(1)))
    most = [graph.writers[i].id for i in order if graph.writers[i].id != "input"][:3]
    found = sorted(((n, name) for name, n in counts.items() if n), reverse=True)
    became = ", ".join(f"{n:,} {name}" for n, name in found)
    return [f"carried most before: {', '.join(most)}", *([f"edges: {became}"] if became else [])]


@entrance(ViewError)
def changes_view(
    circuit: Circuit,
    before: Attribution,
    after: Attribution,
    quantized: Attribution | None = None,
    relearned: Attribution | None = None,
    *,
    never_taught: Attribution | None = None,
    cad: Verdict | None = None,
    comparison: GraphComparison | None = None,
    model: LanguageModel | None = None,
    mask: Mask | None = None,
    pairs: Sequence[Pair] | None = None,
    threshold: float | None = None,
    limit: int | None = LIMIT,
    title: str = "",
) -> View:
    """Before, after, quantized and relearned side by side, with what became of every edge and
    component.

    Arguments:
        circuit: the original's circuit.
        before: `attribute` of the original model on some held-out forget pairs.
        after: the same of the edited model, on the same pairs with the same metric.
        quantized: the same of its quantized form.
        relearned: the same of the edited model after relearning half of the facts; the pairs of all
            four are then of the other half.
        never_taught: the same of a reference model after the same relearning; it is not drawn.
        cad: the verdict on the edit, shown on top (from `judge_erasure`).
        comparison: how the graphs differ in numbers, shown on top (from `compare`).
        model: the original, to name the weights behind each component.
        mask: to count the parameters of the mask in them.
        pairs: prompts: with a model, the first three show its attention and direct effects.
        threshold: |score| from which an edge counts as present; see `circuits.changes.classify`.
        limit: edges in the view: so many, the strongest in any pane, and all of the circuit; None:
            every edge.
        title: default: the model's name.

    Raises:
        CircuitError: scores of another architecture, or not finite.
        ViewError: other objects than these, or pairs without a model.
    """
    more = {"quantized": quantized, "relearned": relearned, "never_taught": never_taught}
    found = _scores_of({"before": before, "after": after}, more)
    edges = classify(**found, threshold=threshold)
    nodes = classify(**{name: s.sum(1) for name, s in found.items()})
    panes = {name: s for name, s in found.items() if name != "never_taught"}
    name = circuit.meta.model
    title = title or f"What became of the graph{f' of {name}' if name else ''}"
    data = replace(
        _with_classes(_graph_data(title, circuit, panes, limit), edges, nodes),
        facts=[
            *_what_became(circuit.graph, np.asarray(before.scores), edges.counts()),
            f"an edge is present from |score| {edges.threshold:.3g}",
            *([circuit.meta.caveat] if circuit.meta.caveat else []),
        ],
        weights=_weights(circuit.graph, model, mask),
        cad=Judged(cad.verdict, cad.sentence) if cad is not None else None,
        comparison=comparison.models if comparison is not None else None,
    )
    return View(_with_tokens(data, model, pairs))
