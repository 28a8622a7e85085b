"""Static, self-contained SVG: a circuit, and its faithfulness curve.

Width and opacity of an edge follow |score|, colour and dashes its sign (see `EDGE_STYLES`). With a
``status`` map (edge -> ``kept``, ``silent``, ``weakened``, ``recovered`` or ``new``) they show the
status instead, and the sign is left to the tooltip. Light and dark follow ``prefers-color-scheme``.
No scripts; tooltips are ``<title>``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..circuits.changes import MEANING
from ..errors import CircuitError
from ..models.graph import Architecture
from ..utils.words import number_of
from .data import EDGE_STYLES, GONE
from .layout import (
    COLUMN_GAP,
    LEFT,
    LETTER,
    PORTS,
    RIGHT,
    ROOM,
    SHARED_PORTS,
    Box,
    Layout,
    box_id,
    clamp,
    crowded,
    place,
    reader_name,
    wanted_width,
)

if TYPE_CHECKING:  # at run time only its methods are used, so pictures need no torch
    from ..circuits.circuit import Circuit

STATUS_TEXT = MEANING
SIGN_TEXT = {
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
    light |= {"box": "#f4f6f8", "accent": "#0b6bcb"}
    dark |= {"box": "#232a31", "accent": "#6cb4f5"}
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
        ".mansu .group rect{stroke:var(--accent)}",
        ".mansu .group .behind{fill:var(--paper)}",
        ".mansu .move{stroke:var(--soft);stroke-dasharray:1.5 3}",
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


LEFT_OUT = "Layers and heads that no drawn edge touches are left out."


def touched_layout(
    architecture: Architecture, drawn: Sequence[tuple[str, str]], room: float = ROOM
) -> Layout:
    """Where boxes are; of a large model those alone that an edge touches."""
    touched = {box_id(end) for edge in drawn for end in edge}
    return place(architecture, touched if crowded(architecture) else None, room)


def ports(layout: Layout, source: str, target: str) -> tuple[float, float, float, float]:
    """Start and end (x0, y0, x1, y1) of an edge between two node ids.

    q, k and v arrive side by side so that parallel edges stay apart. The wide input and logits
    boxes are met near the other end, which keeps the fan narrow.
    """

    def near(x: float, box: Box) -> float:
        within = 0.4 * box.width if layout.columns else float("inf")
        return clamp(0.75 * x, -within, within)

    u, v = layout.boxes[box_id(source)], layout.boxes[box_id(target)]
    offsets = SHARED_PORTS if v.kind == "kv" else PORTS
    x0, x1 = u.x, v.x + offsets.get(reader_name(target), 0.0) * v.width
    if u.kind == "input" and v.kind != "logits":
        x0 += near(x1 - u.x, u)
    if v.kind == "logits" and u.kind != "input":
        x1 += near(x0 - v.x, v)
    return x0, u.top, x1, v.bottom


def curve(layout: Layout, source: str, target: str) -> tuple[tuple[float, float], ...]:
    """Four Bezier points of an edge.

    Edges leave and arrive vertically. One that climbs past other rows in its own column would run
    straight through their boxes, so it swings out sideways: MLPs into the free margin at the right,
    heads alternately to both sides; beside its column where columns are tokens. A closed group may
    have edges to what is beside or below it.
    """
    x0, y0, x1, y1 = ports(layout, source, target)
    rise, swing = y0 - y1, 0.0
    u, v = layout.boxes[box_id(source)], layout.boxes[box_id(target)]
    if rise < 0:
        if abs(x1 - x0) < layout.column:
            swing = layout.column * (1 if x1 < LEFT + layout.column else -1)
        up = 0.6 * layout.pitch
        return (x0, y0), (x0 + swing, y0 - up), (x1 + swing, y1 + up), (x1, y1)
    own = next((c for c in layout.columns if c.holds(u)), None)
    if own and rise > 1.1 * layout.pitch and own.holds(v):
        off, edge = (x0 + x1) / 2 - own.x, own.width / 2 + 0.4 * COLUMN_GAP
        right = off > 0 if abs(off) > 0.01 else round(y0 / layout.pitch) % 2
        swing = ((edge if right else -edge) - off) / 0.75
        return (x0, y0), (x0 + swing, y0 - 0.3 * rise), (x1 + swing, y1 + 0.3 * rise), (x1, y1)
    if not layout.columns and rise > 1.1 * layout.pitch and abs(x1 - x0) < 0.6 * layout.column:
        if u.kind == "mlp" or v.kind == "mlp" or {u.kind, v.kind} == {"input", "logits"}:
            swing = min(26 + 5 * rise / layout.pitch, RIGHT * 1.1)
            if {u.kind, v.kind} == {"input", "logits"}:  # all the way up, outside everything
                x0 = x1 = layout.margin - 4
                swing = RIGHT * 1.25
        else:
            side = 1 if round(y0 / layout.pitch) % 2 else -1
            swing = side * layout.column * min(0.55 + 0.05 * rise / layout.pitch, 1.1)
        return (x0, y0), (x0 + swing, y0 - 0.3 * rise), (x1 + swing, y1 + 0.3 * rise), (x1, y1)
    reach = min(0.5 * rise, 1.2 * layout.pitch)
    return (x0, y0), (x0, y0 - reach), (x1, y1 + reach), (x1, y1)


def move_curve(layout: Layout, start: str, end: str) -> tuple[tuple[float, float], ...]:
    """Four Bezier points from where a head reads keys and values to where it writes, above its
    row."""
    u, v, up = layout.boxes[start], layout.boxes[end], 0.3 * layout.pitch
    side = 1 if u.x <= v.x else -1
    x0, x1 = u.x + side * u.width / 2, v.x - side * v.width / 2
    return (x0, u.y), (x0 + 12 * side, u.y - up), (x1 - 12 * side, v.y - up), (x1, v.y)


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """A Bezier curve as the text of a path."""
    (x0, y0), *rest = points
    return f"M{x0:.1f} {y0:.1f}C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in rest)


def edge_svg(
    layout: Layout,
    edge: tuple[str, str],
    score: float,
    share: float,
    weakest: float,
    name: str,
    frequency: float | None = None,
    gone: bool | None = None,
) -> str:
    """An edge with its tooltip: width and opacity by its share of the largest score, opacity by the
    share of resamples that have it where it is known, style by name; solid where it is not gone."""
    source, target = edge
    path = path_of(curve(layout, source, target))
    reader = reader_name(target)
    note = f" (read as {reader})" if reader else ""
    kind = f", {name}" if name in STATUS_TEXT else ""
    width, opacity = 0.8 + 3.6 * share, weakest + (0.95 - weakest) * share
    if frequency is not None:
        kind, opacity = f"{kind}, in {frequency:.0%} of resamples", faded(frequency)
    solid = ' style="stroke-dasharray:none"' if gone is False else ""
    return (
        f'<g class="edge"><title>{escape(f"{source} -> {target}{note}: {score:+.4g}{kind}")}'
        f'</title><path class="hit" d="{path}"/><path class="line {name}" d="{path}" '
        f'stroke-width="{width:.2f}" opacity="{opacity * (GONE if gone else 1):.2f}"{solid}/></g>'
    )


def box_svg(box: Box, note: str, active: bool) -> str:
    """A box with its tooltip; faint unless it is active."""
    state = "on" if active else "off"
    radius = 2 if box.kind == "kv" else 5
    width, text, behind = box.width, box.label, ""
    if box.kind == "group":  # one behind it
        width = min(width, wanted_width(text))
        text = shorten(text, (width - 8) / LETTER)
        behind = (
            f'<rect class="behind" x="{box.x - width / 2 + 3:.1f}" y="{box.top - 3:.1f}" '
            f'width="{width:.1f}" height="{box.height:.1f}" rx="5"/>'
        )
    if text:
        text = f'<text class="mid" x="{box.x:.1f}" y="{box.y:.1f}">{escape(text)}</text>'
    return (
        f'<g class="{box.kind} {state}"><title>{escape(f"{box.id}: {note}")}</title>{behind}'
        f'<rect x="{box.x - width / 2:.1f}" y="{box.top:.1f}" width="{width:.1f}" '
        f'height="{box.height:.1f}" rx="{radius}"/>{text}</g>'
    )


def shorten(text: str, letters: float) -> str:
    """As much of a text as so many letters hold."""
    return text if len(text) <= letters else f"{text[: max(1, int(letters) - 1)]}…"


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
    layout = touched_layout(circuit.graph.architecture, list(drawn))
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
        legend = list(SIGN_TEXT.items())
    stable = circuit.stability
    what = "Width" if stable else "Width and opacity"
    legend.append(("", f"{what}: |score|, the largest {largest:.3g}."))
    legend += [("", FADES.format(stable.over))] if stable else []
    if len(drawn) < total:
        legend.append(("", f"Drawn: the strongest {len(drawn):,} of {number_of(total, 'edge')}."))
    if circuit.graph.architecture.n_kv_heads < circuit.graph.architecture.n_heads:
        legend.append(("", "Bar under heads: the keys and values that they share."))
    if crowded(circuit.graph.architecture):
        legend.append(("", LEFT_OUT))
    height = layout.height + 18 * len(legend) + 12

    model = circuit.meta.model
    label = f"Circuit{f' of {model}' if model else ''}: {total:,} edges, {len(drawn):,} drawn"
    parts = [open_svg(layout.width, height, label)]
    for layer, y in layout.rows.items():
        parts.append(f'<text class="soft" x="8" y="{y + 4:.1f}">L{layer}</text>')
    parts += [box_svg(b, notes[b.id], False) for b in layout.boxes.values() if b.id not in active]
    weakest = weakest_opacity(len(drawn))
    for edge, score in reversed(drawn.items()):  # the strongest end up in front
        share = abs(score) / largest if largest else 0.0
        often = float(stable.frequency[circuit.graph.edge(*edge)]) if stable else None
        parts.append(edge_svg(layout, edge, score, share, weakest, name(edge), often))
    parts += [box_svg(b, notes[b.id], True) for b in layout.boxes.values() if b.id in active]
    parts.append(legend_svg(legend, 8.0, layout.height + 12))
    return "\n".join([*parts, "</svg>"]) + "\n"


FADES = "Opacity: share of {} whose circuit has the edge."


def faded(frequency: float) -> float:
    """Opacity of an edge that so many resamples have; the same rule as `look` in graph.js."""
    return 0.12 + 0.83 * frequency


def weakest_opacity(n: int) -> float:
    """Opacity of the weakest of ``n`` edges: few need not be so faint."""
    return 0.25 + 0.3 * min(1.0, 40 / max(n, 1))


def spread(row: Sequence[Box], right: float) -> list[Box]:
    """Side by side up to an end, as near to their places as that allows; narrower if they must
    be."""
    gap, row = 12.0, sorted(row, key=lambda b: b.x)
    share = min(1.0, (right - LEFT) / (sum(b.width for b in row) + gap * (len(row) - 1)))
    start, out = LEFT, []
    for b in row:
        width = b.width * share
        out.append(replace(b, x=max(b.x, start + width / 2), width=width))
        start = out[-1].x + width / 2 + gap * share
    for k in reversed(range(len(out))):
        out[k] = replace(out[k], x=min(out[k].x, right - out[k].width / 2))
        right = out[k].x - out[k].width / 2 - gap * share
    return out
