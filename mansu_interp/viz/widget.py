"""The graph as a notebook widget. Needs anywidget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from ..errors import ViewError
from ..models.graph import Graph, Node
from ..utils.files import finite
from ..utils.libraries import library
from .layout import GROUP, box_id, component_of
from .page import inside_of_groups, module_source

WITHOUT = "A view's to_html, to_svg and its picture in a notebook work without it."
anywidget = library("anywidget", "", "The widget", ViewError, WITHOUT)
traitlets = library("traitlets", "", "The widget", ViewError, WITHOUT)

if TYPE_CHECKING:
    from ..circuits.circuit import Circuit
    from .view import View


class GraphWidget(anywidget.AnyWidget):
    """An interactive view whose selection and threshold are shared with Python."""

    _esm = module_source()
    data = traitlets.Dict().tag(sync=True)
    """What is shown: the JSON of `View.data`."""
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    """Selected components, e.g. ``["a1.h2", "m3"]``, or one at a token position, ``"m3@2"``; set it
    to select from Python."""
    selected_edge = traitlets.List(traitlets.Unicode(), maxlen=2).tag(sync=True)
    """The selected edge as [source, target], or empty; at a token position, both end in it. A
    closed group stands as ``"⊞ "`` and its name: then it is all edges that the line sums."""
    threshold = traitlets.Float(None, allow_none=True).tag(sync=True)
    """Smallest |score| that is drawn; None until it is set or moved (then the strongest 200)."""
    changed_only = traitlets.Bool(False).tag(sync=True)
    """Change view: leave out what was kept."""
    state = traitlets.Dict().tag(sync=True)
    """Pins, groups (closed ones, too), notes, search, filters, sort order: read it to keep a view,
    set it to restore one. What is as at first is left out."""
    view: View
    """The view it was made from: its static forms."""

    @property
    def groups(self) -> dict[str, list[str]]:
        """Components by the name of their group."""
        return dict(self.state.get("groups", {}))

    def circuit(self, circuit: Circuit) -> Circuit:
        """The part of a circuit that is selected and above the threshold.

        Edges that touch a selected component, or the selected edge, at any position; all of them if
        nothing is selected. Not pruned to paths from input to logits. `circuit_mask` of it, with
        ``forget=``, gives the parameters behind the selection.

        Raises:
            ViewError: a selected name that is not of this graph or of its groups.
        """
        graph = circuit.graph
        names = {box_id(n.id) for n in (*graph.writers, *graph.readers)}
        selected = {component_of(name) for name in self.selected}
        if unknown := sorted(selected - names):
            raise ViewError(f"{unknown[0]!r} is no component of {graph.architecture}.")
        edges = circuit.edges & (self._strength(circuit) >= (self.threshold or 0.0))
        if self.selected_edge:
            edges &= self._line(graph)
        elif selected:
            rows = np.array([box_id(n.id) in selected for n in graph.writers])
            columns = np.array([box_id(n.id) in selected for n in graph.readers])
            edges &= rows[:, None] | columns[None, :]
        meta = circuit.meta.of_parts("selection")
        return replace(circuit, edges=edges, meta=meta, stability=None)

    def _strength(self, circuit: Circuit) -> Float[np.ndarray, "writers readers"]:
        """|score| of every edge; in the layout by position, the largest of those it has there."""
        data, strength = self.view.data, np.abs(circuit.scores)
        if data.positions and self.state.get("by_position"):
            strength = np.zeros_like(strength)
            at = data.edges.source, data.edges.target
            strength[at] = np.abs(data.positions.scores).max(axis=0)
        return strength

    def _line(self, graph: Graph) -> Bool[np.ndarray, "writers readers"]:
        """The edges behind the selected one: itself, or those that a closed group's line sums."""
        only = np.zeros_like(graph.exists)
        source, target = map(component_of, self.selected_edge)
        if not any(end.startswith(GROUP) for end in (source, target)):
            only[graph.edge(source, target)] = True
            return only

        def ends(nodes: Sequence[Node], end: str) -> Bool[np.ndarray, " nodes"]:
            if not end.startswith(GROUP):
                return np.array([n.id == end for n in nodes])
            if (name := end.removeprefix(GROUP)) not in self.groups:
                known = ", ".join(sorted(self.groups)) or "none"
                raise ViewError(f"{name[:40]!r} is no group of this widget; its groups: {known}.")
            boxes = inside_of_groups(graph.architecture, {name: self.groups[name]})
            return np.array([box_id(n.id) in boxes for n in nodes])

        only |= ends(graph.writers, source)[:, None] & ends(graph.readers, target)[None, :]
        return only & graph.exists

    def _repr_mimebundle_(self, **kwargs: object) -> object:
        """The live widget, with the static picture for whatever cannot run it."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, *rest = bundle if isinstance(bundle, tuple) else (bundle or {},)
        data = {**data, **self.view.static_forms()}
        return (data, *rest) if rest else data


def graph_widget(view: View) -> GraphWidget:
    """A widget of a view."""
    widget = GraphWidget(data=finite(view.data.to_json()), state=view.data.state)
    widget.view = view
    return widget
