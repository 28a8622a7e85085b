"""Views: what a graph shows, as plain data, and every form in which it can be shown.

A `View` holds its data and nothing else. It draws itself as an interactive widget (`widget`), as
one self-contained page (`to_html`), as a picture (`to_svg`, `to_png`), and in a saved notebook as
a static picture. The data's format is described in docs/viewing.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..circuits.changes import CLASSES, MEANING, Changes, classify
from ..errors import CircuitError, ViewError
from ..models.graph import Graph
from ..utils.files import atomic_path, write_json, write_text
from ..utils.libraries import library
from .layout import CONSTANTS, box_id, place
from .page import graph_page
from .svg import EDGE_STYLES, view_svg

if TYPE_CHECKING:  # at run time only their attributes are used
    from ..audit.cad import CAD
    from ..circuits.attribution import Attribution
    from ..circuits.circuit import Circuit
    from ..masks.mask import Mask
    from ..models.language_model import LanguageModel
    from .widget import GraphWidget

SCHEMA = 1
LIMIT = 3000
"""Edges that a view holds by default, the strongest in any pane and those of the circuit."""
TOP = 200
"""Edges drawn at first; more are a hairball."""


@dataclass(frozen=True)
class View:
    """A drawing of one or several attribution graphs of one architecture."""

    data: dict[str, Any]
    """Everything that is shown, as JSON values (docs/viewing.md)."""

    def widget(self) -> GraphWidget:
        """The interactive widget (needs the ``viz`` extra)."""
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
        resvg_py = library("resvg_py", "viz", "to_png", ViewError, without)
        svg = self.svg(top, "dark" if dark else "light")
        path = Path(path)
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=zoom)))
        return path

    def to_json(self, path: Path | str) -> Path:
        """Write the data."""
        path = Path(path)
        write_json(path, self.data)
        return path

    def svg(self, top: int = TOP, theme: str | None = None) -> str:
        """The static picture; ``theme`` (light, dark) fixes the colours, else they follow the
        reader's."""
        return view_svg(self.data, top, theme)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/svg+xml": self.svg(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        edges = len(self.data["edges"]["source"])
        return f"View({self.data['title']!r}, {edges:,} edges in {len(self.data['panes'])} panes)"


def _round(values: np.ndarray) -> list[float]:
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


def _view(
    title: str,
    circuit: Circuit,
    panes: Mapping[str, np.ndarray],
    changes: tuple[Changes, Changes] | None,
    limit: int | None,
    facts: Sequence[str],
    cad: Any,
    model: LanguageModel | None,
    mask: Mask | None,
) -> View:
    """Prune to the strongest edges and lay out."""
    graph = circuit.graph
    for name, scores in panes.items():
        if scores.shape != graph.exists.shape:
            raise CircuitError(
                f"The scores of {name or 'the graph'} have shape {scores.shape}; this architecture "
                f"needs {graph.exists.shape}."
            )
    strength = np.max([np.abs(s) for s in panes.values()], axis=0) * graph.exists
    rows, columns = np.nonzero(graph.exists & ((strength > 0) | circuit.edges))
    order = np.lexsort((-strength[rows, columns], ~circuit.edges[rows, columns]))
    n_circuit = int(circuit.edges.sum())
    if limit is not None and len(order) > limit:
        by_strength = np.argsort(-strength[rows, columns], kind="stable")[:limit]
        order = np.union1d(order[:n_circuit], by_strength)
    order = order[np.argsort(-strength[rows[order], columns[order]], kind="stable")]
    i, j = rows[order], columns[order]
    layout = place(graph.architecture)
    edges: dict[str, Any] = {
        "source": i.tolist(),
        "target": j.tolist(),
        "in_circuit": circuit.edges[i, j].astype(int).tolist(),
        "scores": [_round(s[i, j]) for s in panes.values()],
    }
    nodes: dict[str, Any] = {"scores": [_round(s.sum(1)) for s in panes.values()]}
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "title": title,
        "facts": list(facts),
        "unit": "in metric units",
        "architecture": asdict(graph.architecture),
        "total": graph.n_edges,
        "top": min(TOP, n_circuit) if changes is None and n_circuit else TOP,
        "panes": list(panes),
        "writers": [n.id for n in graph.writers],
        "readers": [n.id for n in graph.readers],
        "edges": edges,
        "nodes": nodes,
        "weights": _weights(graph, model, mask),
        "layout": {
            "width": layout.width,
            "height": layout.height,
            "pitch": layout.pitch,
            "cell": layout.cell,
            "constants": CONSTANTS,
            "rows": list(layout.rows),
            "boxes": [
                [b.id, b.kind, b.label, *(round(v, 2) for v in (b.x, b.y, b.width, b.height))]
                for b in layout.boxes.values()
            ],
        },
        "styles": EDGE_STYLES,
        "cad": cad,
    }
    if changes is not None:
        of_edges, of_nodes = changes
        edges["class"] = of_edges.codes[i, j].tolist()
        nodes["class"] = of_nodes.codes.tolist()
        data["classes"], data["meaning"] = list(CLASSES), MEANING
        data["counts"], data["present_from"] = of_edges.counts(), of_edges.threshold
        data["top"] = max(1, min(TOP, sum(data["counts"].values())))  # not what is quiet in all
    return View(json.loads(json.dumps(data)))


def circuit_view(
    circuit: Circuit,
    model: LanguageModel | None = None,
    mask: Mask | None = None,
    limit: int | None = LIMIT,
    title: str = "",
) -> View:
    """A circuit and the scores of the other edges around it.

    Arguments:
        circuit: from `discover`, or read from a file (then only its own edges have scores).
        model: its model, to name the weights behind each component.
        mask: to count the parameters of the mask in them.
        limit: hold so many edges, the strongest, and all of the circuit; None holds all.
        title: default: the model's name.
    """
    faithfulness = circuit.meta.get("faithfulness")
    facts = [f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges in the circuit"]
    facts += [f"faithfulness {faithfulness:.2f}"] if isinstance(faithfulness, float) else []
    name = circuit.meta.get("model", "")
    title = title or f"Circuit{f' of {name}' if name else ''}"
    return _view(title, circuit, {"": circuit.scores}, None, limit, facts, None, model, mask)


def erasure_view(
    circuit: Circuit,
    before: Attribution,
    after: Attribution,
    quantized: Attribution | None = None,
    cad: CAD | Mapping[str, Any] | None = None,
    model: LanguageModel | None = None,
    mask: Mask | None = None,
    threshold: float | None = None,
    limit: int | None = LIMIT,
    title: str = "",
) -> View:
    """Before, after and quantized side by side, with what became of every edge and component.

    Arguments:
        circuit: the original's circuit.
        before: `attribute` of the original model on some held-out forget pairs.
        after: the same of the edited model, on the same pairs with the same metric.
        quantized: the same of its quantized form.
        cad: the verdict, shown on top.
        model: the original, to name the weights behind each component.
        mask: to count the parameters of the mask in them.
        threshold: |score| from which an edge counts as present; see `changes.classify`.
        limit: hold so many edges, the strongest in any pane; None holds all.
        title: default: the model's name.

    Raises:
        CircuitError: scores of another architecture, or not finite.
    """
    named = {"before": before, "after": after}
    if quantized is not None:
        named["quantized"] = quantized
    panes = {name: np.asarray(a.scores) for name, a in named.items()}
    of_edges = classify(*panes.values(), threshold=threshold)
    of_nodes = classify(*(s.sum(1) for s in panes.values()))
    name = circuit.meta.get("model", "")
    title = title or f"What became of the graph{f' of {name}' if name else ''}"
    facts = [f"an edge is present from |score| {of_edges.threshold:.3g}"]
    parts: Any = cad
    if cad is not None and not isinstance(cad, Mapping):
        parts = {"verdict": cad.verdict, "sentence": cad.sentence}
    return _view(title, circuit, panes, (of_edges, of_nodes), limit, facts, parts, model, mask)
