"""Static, self-contained SVG: a circuit, and its faithfulness curve.

Width and opacity of an edge follow |score|, colour and dashes its sign (see `EDGE_STYLES`). With a
``status`` map (edge -> ``kept``, ``silent``, ``weakened``, ``recovered`` or ``new``) they show the
status instead, and the sign is left to the tooltip. Light and dark follow ``prefers-color-scheme``.
No scripts; tooltips are ``<title>``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..circuits.changes import CLASSES, MEANING
from ..errors import CircuitError
from ..models.graph import Architecture
from ..utils.words import number_of
from .data import EDGE_STYLES, GraphData
from .layout import LEFT, ROOM, Box, Layout, box_id, crowded, curve, place, reader_name

if TYPE_CHECKING:  # at run time only its methods are used, so pictures need no torch
    from ..circuits.circuit import Circuit

STATUS_TEXT = MEANING
_SIGN_TEXT = {
    "pos": "positive score: supports the answer",
    "neg": "negative score: opposes the answer",
}
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def legal(text: str) -> str:
    """Text without the control characters that no page may hold."""
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: object) -> str:
    """Text that is safe in HTML and SVG content and in quoted attributes."""
    return html.escape(legal(str(text)), quote=True)


def _style(theme: str | None = None) -> str:
    """The style sheet; every rule is scoped, because inline SVG shares the page's styles.

    With a ``theme`` (light, dark) the colours are written out, for programs without variables.
    """
    light = {"paper": "#fff", "ink": "#1d2329", "soft": "#5c6670", "faint": "#dfe3e7"}
    dark = {"paper": "#15191d", "ink": "#e8ebee", "soft": "#a3adb7", "faint": "#2c333a"}
    light["box"], dark["box"] = "#f4f6f8", "#232a31"
    for name, (bright, dim, _) in EDGE_STYLES.items():
        light[name], dark[name] = bright, dim

    def variables(colours: Mapping[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in colours.items())

    rules = [
        f".mansu{{{variables(light)}background:var(--paper);color:var(--ink);font:11px {_FONT}}}",
        f"@media screen and (prefers-color-scheme:dark){{.mansu{{{variables(dark)}}}}}",
        ".mansu text{fill:var(--ink);stroke:none}",
        ".mansu .mid{text-anchor:middle;dominant-baseline:central}",
        ".mansu .soft{fill:var(--soft)}",
        ".mansu .off rect{fill:none;stroke:var(--faint)}",
        ".mansu .off text{fill:var(--soft);opacity:.55}",
        ".mansu .on rect{fill:var(--box);stroke:var(--soft)}",
        ".mansu .kv.on rect{fill:var(--soft);stroke:none;opacity:.6}",
        ".mansu .kv.off rect{fill:var(--faint);stroke:none}",
        ".mansu path{fill:none;stroke-linecap:butt}",
        ".mansu .hit{stroke:transparent;stroke-width:7px}",
        ".mansu .edge:hover .line{stroke-width:5px;opacity:1}",
        ".mansu .axis{stroke:var(--faint)}",
        ".mansu .target{stroke:var(--ink);stroke-dasharray:1 4}",
    ]
    for name, (_, _, dash) in EDGE_STYLES.items():
        dashes = f";stroke-dasharray:{dash}" if dash else ""
        rules.append(f".mansu .{name}{{stroke:var(--{name}){dashes}}}")
    if theme is not None:
        chosen = dark if theme == "dark" else light
        rules = [
            re.sub(r"var\(--(\w+)\)", lambda m: chosen[m[1]], rule)
            for rule in rules[2:]
            if "hover" not in rule and "transparent" not in rule
        ]
        rules.append(f".mansu{{font-family:{_FONT};font-size:11px}}")
        rules.append(".mansu .hit{stroke:none}")
    return "<style>" + "\n".join(rules) + "</style>"


def open_svg(width: float, height: float, label: str, theme: str | None = None) -> str:
    """The start of a picture: size, title and style sheet."""
    paper = "#15191d" if theme == "dark" else "#fff"
    ground = f'<rect width="100%" height="100%" fill="{paper}"/>' if theme else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mansu" role="img" '
        f'aria-label="{escape(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'style="max-width:100%;height:auto" viewBox="0 0 {width:.0f} {height:.0f}">\n'
        f"<title>{escape(label)}</title>\n"
        f"{_style(theme)}{ground}"
    )


def _strongest(
    circuit: Circuit, status: Mapping[tuple[str, str], str] | None, top: int
) -> tuple[dict[tuple[str, str], float], int]:
    """The edges to draw with their scores, strongest first, and how many there are in all."""
    scores = {
        (u, v): float(d["score"])
        for u, v, d in circuit.to_networkx().edges(data=True)
        if d["kind"] == "residual"
    }
    for edge, name in (status or {}).items():
        if name not in STATUS_TEXT:
            raise CircuitError(f"Edge status {name!r} is none of {', '.join(STATUS_TEXT)}.")
        if edge not in scores:  # new edges lie outside the circuit
            scores[edge] = float(circuit.scores[circuit.graph.edge(*edge)])
    ranked = sorted(scores, key=lambda e: -abs(scores[e]))[: max(top, 0)]
    return {e: scores[e] for e in ranked}, len(scores)


_LEFT_OUT = "Layers and heads that no drawn edge touches are left out."


def _layout(
    architecture: Architecture, drawn: Sequence[tuple[str, str]], room: float = ROOM
) -> Layout:
    """Where boxes are; of a large model those alone that an edge touches."""
    touched = {box_id(end) for edge in drawn for end in edge}
    return place(architecture, touched if crowded(architecture) else None, room)


def _edge(
    layout: Layout, edge: tuple[str, str], score: float, share: float, weakest: float, name: str
) -> str:
    source, target = edge
    (x0, y0), *rest = curve(layout, source, target)
    path = f"M{x0:.1f} {y0:.1f}C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in rest)
    reader = reader_name(target)
    note = f" (read as {reader})" if reader else ""
    kind = f", {name}" if name in STATUS_TEXT else ""
    width, opacity = 0.8 + 3.6 * share, weakest + (0.95 - weakest) * share
    return (
        f'<g class="edge"><title>{escape(f"{source} -> {target}{note}: {score:+.4g}{kind}")}'
        f'</title><path class="hit" d="{path}"/><path class="line {name}" d="{path}" '
        f'stroke-width="{width:.2f}" opacity="{opacity:.2f}"/></g>'
    )


def _box(box: Box, note: str, active: bool) -> str:
    state = "on" if active else "off"
    radius = 2 if box.kind == "kv" else 5
    text = ""
    if box.label:
        text = f'<text class="mid" x="{box.x:.1f}" y="{box.y:.1f}">{escape(box.label)}</text>'
    return (
        f'<g class="{box.kind} {state}"><title>{escape(f"{box.id}: {note}")}</title>'
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{radius}"/>{text}</g>'
    )


def legend_svg(items: Sequence[tuple[str, str]], x: float, y: float) -> str:
    """A line an item: its style, if any, and its text."""
    lines = []
    for i, (name, text) in enumerate(items):
        at = y + 18 * i
        if name:
            lines.append(f'<path class="line {name}" stroke-width="2.5" d="M{x:.0f} {at:.0f}h34"/>')
        place_at = x + (44 if name else 0)
        lines.append(
            f'<text class="soft" x="{place_at:.0f}" y="{at + 4:.0f}">{escape(text)}</text>'
        )
    return "".join(lines)


def circuit_svg(
    circuit: Circuit, *, status: Mapping[tuple[str, str], str] | None = None, top: int = 200
) -> str:
    """A circuit as one SVG document, to save or to inline in a page.

    Arguments:
        circuit: the circuit; of a small model every head and MLP is drawn, the unused ones
            faintly, of a larger one those alone that an edge touches.
        status: what became of its edges, by (source id, target id); edges outside the circuit may
            be named too. Edges without a status are grey.
        top: draw at most this many edges, the strongest by |score|.

    Raises:
        CircuitError: an unknown status, or one for an edge that cannot exist.
    """
    drawn, total = _strongest(circuit, status, top)
    layout = _layout(circuit.graph.architecture, list(drawn))
    largest = max((abs(s) for s in drawn.values()), default=0.0)

    def name(edge: tuple[str, str]) -> str:
        if status is not None:
            return status.get(edge, "other")
        return "pos" if drawn[edge] >= 0 else "neg"

    arriving = {b: 0 for b in layout.boxes}
    leaving = dict(arriving)
    for u, v in drawn:
        leaving[box_id(u)] += 1
        arriving[box_id(v)] += 1
    notes = {b: f"{number_of(arriving[b], 'edge')} in, {leaving[b]:,} out" for b in layout.boxes}
    active = {b for b in layout.boxes if arriving[b] or leaving[b]}

    names = [n for n in (*STATUS_TEXT, "other") if n in {name(e) for e in drawn}]
    legend = [(n, STATUS_TEXT.get(n, "no status")) for n in names]
    if status is None:
        legend = list(_SIGN_TEXT.items())
    legend.append(("", f"Width and opacity: |score|, the largest {largest:.3g}."))
    if len(drawn) < total:
        legend.append(("", f"Drawn: the strongest {len(drawn):,} of {number_of(total, 'edge')}."))
    if circuit.graph.architecture.n_kv_heads < circuit.graph.architecture.n_heads:
        legend.append(("", "Bar under heads: the keys and values that they share."))
    if crowded(circuit.graph.architecture):
        legend.append(("", _LEFT_OUT))
    height = layout.height + 18 * len(legend) + 12

    model = circuit.meta.model
    label = f"Circuit{f' of {model}' if model else ''}: {total:,} edges, {len(drawn):,} drawn"
    parts = [open_svg(layout.width, height, label)]
    for layer, y in layout.rows.items():
        parts.append(f'<text class="soft" x="8" y="{y + 4:.1f}">L{layer}</text>')
    parts += [_box(b, notes[b.id], False) for b in layout.boxes.values() if b.id not in active]
    weakest = _weakest(len(drawn))
    for edge, score in reversed(drawn.items()):  # the strongest end up in front
        share = abs(score) / largest if largest else 0.0
        parts.append(_edge(layout, edge, score, share, weakest, name(edge)))
    parts += [_box(b, notes[b.id], True) for b in layout.boxes.values() if b.id in active]
    parts.append(legend_svg(legend, 8.0, layout.height + 12))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(power: int) -> str:
    """A power of ten that fits under a tick: 1, 10, 100, 1k, 10k, 100k, 1M."""
    return f"{10 ** (power % 3)}{('', 'k', 'M', 'G')[min(power // 3, 3)]}"


def curve_svg(
    points: Sequence[tuple[float, float]], chosen: tuple[float, float] | None = None
) -> str:
    """A small line chart of faithfulness over the number of edges (logarithmic).

    Arguments:
        points: (edges, faithfulness) in any order, as the search visited them.
        chosen: the circuit's own point, marked; default none.
    """
    points = sorted({(max(n, 1), f) for n, f in points if math.isfinite(n) and math.isfinite(f)})
    every = [*points, (max(chosen[0], 1), chosen[1])] if chosen else points
    decades = math.ceil(math.log10(max([n for n, _ in every], default=10)) or 1)
    low = min([0.0, *(f for _, f in every)])
    high = max([1.0, *(f for _, f in every)])
    left, right, top, bottom = 44.0, 404.0, 16.0, 170.0

    def at(n: float, f: float) -> tuple[float, float]:
        x = left + (right - left) * math.log10(max(n, 1)) / decades
        return x, bottom - (bottom - top) * (f - low) / (high - low)

    parts = [open_svg(420.0, 214.0, "Faithfulness of the circuit by its number of edges")]
    for f in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = at(1, f)
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{right}"/>')
        parts.append(
            f'<text class="soft" text-anchor="end" x="{left - 6}" y="{y + 4:.1f}">{f:g}</text>'
        )
    for power in range(decades + 1):
        x, _ = at(10.0**power, 0)
        parts.append(f'<text class="soft mid" x="{x:.1f}" y="{bottom + 14}">{_short(power)}</text>')
    parts.append(f'<text class="soft mid" x="{(left + right) / 2}" y="{bottom + 32}">edges</text>')
    if points:
        path = " ".join(f"{x:.1f} {y:.1f}" for x, y in (at(*p) for p in points))
        parts.append(f'<path class="pos" stroke-width="2" d="M{path}"/>')
    for n, f in points:
        x, y = at(n, f)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--pos)">'
            f"<title>{n:,.0f} edges: {f:.3f}</title></circle>"
        )
    if chosen:
        x, y = at(*chosen)
        note = f"{chosen[0]:,.0f} edges: {chosen[1]:.3f}"
        anchor = "end" if x > (left + right) / 2 else "start"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="var(--neg)" '
            f'stroke-width="2"><title>this circuit, {note}</title></circle>'
            f'<text text-anchor="{anchor}" x="{x + (-10 if anchor == "end" else 10):.1f}" '
            f'y="{y + 18:.1f}">{note}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


_WIDE = 1100
"""Pixels across at most: what pages of notebooks show without cutting or shrinking."""


def view_svg(data: GraphData, *, top: int = 200, theme: str | None = None) -> str:
    """The static picture of a view: its panes, as many side by side as a page has room for, and one
    legend.

    Arguments:
        data: `View.data`.
        top: draw at most this many edges, the strongest in any pane.
        theme: ``light`` or ``dark`` writes the colours out; None follows the reader's.
    """
    panes, names = data.panes, data.edge_ids()
    n = min(len(names), max(top, 0), max(data.top, 1))
    layout = _layout(data.architecture, names[:n], ROOM if len(panes) == 1 else 2 / 3 * ROOM)
    fit = max(1, min(len(panes), int(_WIDE / layout.width)))
    down = -(-len(panes) // fit)
    across = -(-len(panes) // down)  # rows of one length, where that is possible
    shown = [s for scores in data.edges.scores for s in scores[: max(n, 1)]]
    largest = max((abs(s) for s in shown), default=0.0)
    legend = _view_legend(data, n, largest)
    lines = [data.title]
    if data.cad:
        lines.append(f"CAD: {data.cad.verdict}. {data.cad.sentence}".strip())
    title, top_y = 22.0 if any(panes) else 4.0, 18.0 * len(lines)
    row = title + layout.height
    height = top_y + down * row + 18 * len(legend) + 12
    label = f"{data.title}: {', '.join(p for p in panes if p) or 'scores'}, {n:,} edges drawn"
    parts = [open_svg(layout.width * across, height, label, theme)]
    for k, line in enumerate(lines):
        weight = ' font-weight="600"' if k == 0 else ""
        parts.append(f'<text x="8" y="{16 + 18 * k}"{weight} font-size="13">{escape(line)}</text>')
    for p in range(len(panes)):
        x, y = p % across * layout.width, top_y + p // across * row + title
        parts.append(f'<g transform="translate({x:.0f} {y:.0f})">')
        parts += [*_pane(data, layout, names[:n], p, largest), "</g>"]
    parts.append(legend_svg(legend, 8.0, top_y + down * row + 12))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _view_legend(data: GraphData, n: int, largest: float) -> list[tuple[str, str]]:
    """Style and text of each line below a view."""
    legend = list(_SIGN_TEXT.items())
    if data.counts:
        legend = [(c, f"{MEANING[c]} ({n:,})") for c, n in data.counts.items()]
    legend.append(("", f"Width and opacity: |score|, the largest {largest:.3g} {data.unit}."))
    legend.append(("", f"Drawn: the strongest {n:,} of {number_of(data.total, 'edge')}."))
    if crowded(data.architecture):
        legend.append(("", _LEFT_OUT))
    return legend


def _pane(
    data: GraphData, layout: Layout, names: Sequence[tuple[str, str]], pane: int, largest: float
) -> list[str]:
    """One pane of a view with its strongest edges."""
    scores, classes = data.edges.scores[pane], data.edges.classes
    title, boxes, parts = data.panes[pane], layout.boxes.values(), []
    if title:
        parts.append(f'<text x="{LEFT:.0f}" y="-6" font-weight="600">{escape(title)}</text>')
    for layer, y in layout.rows.items():
        parts.append(f'<text class="soft" x="8" y="{y + 4:.1f}">L{layer}</text>')
    active = {box_id(end) for edge in names for end in edge}
    parts += [_box(b, "not drawn", False) for b in boxes if b.id not in active]
    weakest = _weakest(len(names))
    for k in reversed(range(len(names))):  # the strongest end up in front
        share = abs(scores[k]) / largest if largest else 0.0
        style = "pos" if data.edges.scores[0][k] >= 0 else "neg"
        style = CLASSES[classes[k]] if classes is not None else style
        parts.append(_edge(layout, names[k], scores[k], share, weakest, style))
    return parts + [_box(b, title or "component", True) for b in boxes if b.id in active]


def _weakest(n: int) -> float:
    """Opacity of the weakest of ``n`` edges: few need not be so faint."""
    return 0.25 + 0.3 * min(1.0, 40 / max(n, 1))
