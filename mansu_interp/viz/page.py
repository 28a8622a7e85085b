"""A view as a static picture, and as a page: the widget's module and data under a strict policy.

A picture draws what the view's state says of the layout: by token position or by layer, and closed
groups as one node each.

A page's content security policy allows its one script, by its hash, and nothing from anywhere. Data
travels as JSON in a script element that is never executed, with every ``<`` escaped, so that
no text can end it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..circuits.changes import CLASSES, MEANING
from ..models.graph import Architecture
from ..utils.files import finite
from ..utils.words import number_of
from .data import FADING, SOLID, GraphData, is_gone
from .layout import (
    COLUMN_GAP,
    GROUP,
    LEFT,
    LETTER,
    POSITION_TOP,
    ROOM,
    TOP,
    Box,
    Layout,
    box_id,
    component_of,
    crowded,
    layer_of,
    least_scale,
    place_by_position,
    position_of,
    reader_name,
    row_sizes,
    wanted_width,
)
from .svg import (
    FADES,
    LEFT_OUT,
    SIGN_TEXT,
    box_svg,
    edge_svg,
    escape,
    legend_svg,
    move_curve,
    open_svg,
    path_of,
    shorten,
    spread,
    touched_layout,
    weakest_opacity,
)

_MOUNT = """
for (const el of document.querySelectorAll("[data-mansu-graph]")) {
  try {
    const name = el.dataset.mansuGraph;
    const data = JSON.parse(document.getElementById(name).textContent);
    const view = mount(el, data, null, name);
    if (view) (window.mansuViews ??= []).push(view);
  } catch (error) {
    el.textContent = `This graph cannot be drawn: ${error.message}`;
  }
}
"""
_CSS = """:root{color-scheme:light dark}
body{margin:0;padding:20px;background:#fcfcfa;font:16px system-ui,sans-serif}
@media (prefers-color-scheme:dark){body{background:#15191d}}
main{max-width:1500px;margin:0 auto}@media (max-width:600px){body{padding:8px}}"""

# ---- what is drawn -------------------------------------------------------------------------------

_MOVES = "Dotted: from where a head reads keys and values to where it writes; not scored."


def inside_of_groups(
    architecture: Architecture, closed: Mapping[str, Sequence[str]], positions: int = 0
) -> dict[str, str]:
    """The boxes that closed groups stand for: members, and keys and values that only members of one
    group read. The same rule as `insideOfGroups` in panels.js, which needs it without Python.

    Arguments:
        architecture: of the graph.
        closed: members by name. A member without a position stands for its nodes at all of them.
        positions: tokens; 0 in a layout by layer, where a member with one stands for its component.

    Returns:
        Box id -> id of the box of its group.
    """
    a, inside = architecture, dict[str, str]()
    each = a.n_heads // a.n_kv_heads
    places = [f"@{p}" for p in range(positions)] or [""]
    for name, members in closed.items():
        for member in members:
            whole = position_of(member) is None or not positions
            names = [component_of(member) + at for at in places] if whole else [member]
            for box in names:
                inside.setdefault(box, GROUP + name)
    bars = [(n, k) for n in range(a.n_layers) for k in range(a.n_kv_heads)] if each > 1 else []
    for layer, k in bars if inside else ():
        heads = [f"a{layer}.h{h}" for h in range(k * each, (k + 1) * each)]
        for p, place in enumerate(places):  # keys and values at a token are read from there on
            readers = {inside.get(head + at) for at in places[p:] for head in heads}
            if len(readers) == 1 and (group := readers.pop()):
                inside[f"a{layer}.kv{k}{place}"] = group
    return inside


def close_groups(
    layout: Layout, architecture: Architecture, inside: Mapping[str, str]
) -> dict[str, Box]:
    """The boxes of a layout by layer in which each closed group is one; `closeBoxes` in panels.js.

    Half a row above the heads of a layer nothing but its MLP is in the way: there a group stands,
    over its highest member, at its members' mean; groups and MLP side by side. Nothing else moves.
    """
    a, members, rows = architecture, dict[str, list[Box]](), dict[float, list[Box]]()
    for box in layout.boxes.values():
        if group := inside.get(box.id):
            members.setdefault(group, []).append(box)
    tall = row_sizes(len(layout.rows))[1]
    least = least_scale(layout.column, tall, LETTER * len(f"a{a.n_layers - 1}.h{a.n_heads - 1}"))
    for group, own in members.items():
        top = max(enumerate(own), key=lambda x: (layer_of(x[1].id, a), x[0]))[1]
        row, label = layout.rows.get(layer_of(top.id, a)), group.removeprefix(GROUP)
        y = top.y if row is None else row - layout.pitch / 2
        x, width = sum(b.x for b in own) / len(own), wanted_width(label) / least
        box = Box(group, "group", label, x=x, y=y, width=width, height=tall - 3)
        rows.setdefault(y, []).append(box)
    boxes = {name: box for name, box in layout.boxes.items() if name not in inside}
    for y, row in rows.items():
        beside = [b for b in boxes.values() if b.kind == "mlp" and abs(b.y - y) < b.height]
        right = beside[0].x - beside[0].width / 2 - 12 if beside and not a.parallel else None
        boxes |= {b.id: b for b in spread(row, layout.margin if right is None else right)}
    return boxes


@dataclass(frozen=True)
class _Line:
    """A line of a picture: an edge, or the sum of those between a closed group and one end."""

    source: str
    target: str
    scores: list[float]
    """By pane."""
    style: str
    """Class, or sign."""
    frequency: float | None = None
    """Share of resamples whose circuit has it; of a sum, the largest."""

    @property
    def strength(self) -> float:
        """The largest |score|."""
        return max(map(abs, self.scores))


@dataclass(frozen=True)
class _Drawing:
    """What a picture shows, alike in all panes."""

    layout: Layout
    lines: list[_Line]
    moves: list[tuple[str, str]]
    """Boxes between which a head may move what it reads."""
    edges: int
    """Edges drawn, at a position each where it is by position."""
    of: str
    """In words: of how many."""


def _lines(data: GraphData, top: int, by_position: bool) -> tuple[list[_Line], int]:
    """The strongest edges, and how many there are to choose from."""
    found: list[tuple[float, int, int]] = []  # strength, edge, position
    if by_position and data.positions:
        for p, scores in enumerate(data.positions.scores):
            found += [(abs(s), k, p) for k, s in enumerate(scores) if s]
        found.sort(key=lambda x: -x[0])
    else:
        found = [(0.0, k, -1) for k in range(len(data.edges.source))]
    n = min(len(found), max(top, 0), max(data.top, 1), POSITION_TOP if by_position else top)
    names, classes, out = data.edge_ids(), data.edges.classes, []
    for _, k, p in found[:n]:
        at = f"@{p}" if p >= 0 else ""
        scores = [pane[k] for pane in data.edges.scores]
        if p >= 0 and data.positions:
            scores = [data.positions.scores[p][k]]
        style = CLASSES[classes[k]] if classes is not None else ""
        often = data.edges.frequency[k] if data.edges.frequency is not None else None
        out.append(_Line(names[k][0] + at, names[k][1] + at, scores, style, often))
    return out, len(found)


def _summed(lines: Sequence[_Line], inside: Mapping[str, str]) -> list[_Line]:
    """Lines that touch a closed group, summed by what is at their other end; those within one are
    left out. The class of a sum is that of the strongest."""
    out = dict[tuple[str, str], _Line]()
    for line in lines:
        ends = [inside.get(box_id(end), end) for end in (line.source, line.target)]
        if ends[0] == ends[1]:
            continue
        if old := out.get((ends[0], ends[1])):
            scores = [a + b for a, b in zip(old.scores, line.scores, strict=True)]
            often = None if old.frequency is None else max(old.frequency, line.frequency or 0.0)
            out[ends[0], ends[1]] = replace(old, scores=scores, frequency=often)
        else:
            out[ends[0], ends[1]] = replace(line, source=ends[0], target=ends[1])
    return sorted(out.values(), key=lambda x: -x.strength)


def _moves(
    lines: Sequence[_Line], a: Architecture, inside: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Boxes between which heads may move what they read: from every node at which a line enters
    keys or values to every node, there or later, from which one leaves; `movesOf` in panels.js."""
    reads, found = dict[str, set[int]](), dict[tuple[str, str], None]()
    for line in lines:
        at = position_of(line.target)
        if at is not None and reader_name(line.target) in ("k", "v"):
            reads.setdefault(component_of(box_id(line.target)), set()).add(at)
    for end in dict.fromkeys(line.source for line in lines):
        head, q = component_of(end), position_of(end)
        if q is None or not head.startswith("a"):
            continue
        layer, h = head[1:].split(".h")
        shared = f"a{layer}.kv{int(h) * a.n_kv_heads // a.n_heads}"
        reader = shared if a.n_kv_heads < a.n_heads else head
        for p in sorted(reads.get(reader, ())):
            boxes = [inside.get(box, box) for box in (f"{reader}@{p}", end)]
            if p <= q and boxes[0] != boxes[1]:
                found[boxes[0], boxes[1]] = None
    return list(found)


def lay_out(data: GraphData, top: int) -> _Drawing:
    """What the state of a view says to draw."""
    state, places, a = data.state, data.positions, data.architecture
    if state.get("by_position") is not True:
        places = None
    lines, n = _lines(data, top, places is not None)
    of = number_of(data.total, "edge")
    groups, closed = state.get("groups"), state.get("closed")
    known = groups if isinstance(groups, dict) and isinstance(closed, list) else {}
    chosen = {name: ids for name, ids in known.items() if name in closed and isinstance(ids, list)}
    members = {name: [m for m in ids if isinstance(m, str)] for name, ids in chosen.items()}
    inside = inside_of_groups(a, members, len(places.tokens) if places else 0)
    if places:
        tokens, prompt = places.tokens, state.get("tokens_of")
        if isinstance(prompt, int) and 0 <= prompt < len(data.prompts):
            own = data.prompts[prompt].tokens
            tokens = [*own, *[""] * len(tokens)][: len(tokens)]
        touched = {box_id(end) for line in lines for end in (line.source, line.target)}
        layout = place_by_position(a, touched, tokens, inside)
        moves, of = _moves(lines, a, inside), f"{n:,}, one for each edge and position"
    else:
        ends, room = (
            [(x.source, x.target) for x in lines],
            ROOM * (1 if len(data.panes) == 1 else 2 / 3),
        )
        layout, moves = touched_layout(a, ends, room), []
        layout = replace(layout, boxes=close_groups(layout, a, inside))
    return _Drawing(layout, _summed(lines, inside), moves, len(lines), of)


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
    panes, drawing = data.panes, lay_out(data, top)
    layout, n = drawing.layout, drawing.edges
    fit = max(1, min(len(panes), int(_WIDE / layout.width)))
    down = -(-len(panes) // fit)
    across = -(-len(panes) // down)  # rows of one length, where that is possible
    largest = max((line.strength for line in drawing.lines), default=0.0)
    legend = _view_legend(data, drawing, largest)
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
        parts += [*_pane(data, drawing, p, largest), "</g>"]
    parts.append(legend_svg(legend, 8.0, top_y + down * row + 12))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _view_legend(data: GraphData, drawing: _Drawing, largest: float) -> list[tuple[str, str]]:
    """Style and text of each line below a view."""
    legend = list(SIGN_TEXT.items())
    if data.counts:
        legend = [(c, f"{MEANING[c]} ({n:,})") for c, n in data.counts.items()]
    what = "Width" if data.resamples else "Width and opacity"
    legend.append(("", f"{what}: |score|, the largest {largest:.3g} {data.unit}."))
    legend += [("", FADES.format(data.resamples))] if data.resamples else []
    legend += [("", SOLID)] if any(name in FADING for name in data.counts) else []
    summed = f", as {len(drawing.lines):,} lines" if len(drawing.lines) < drawing.edges else ""
    legend.append(("", f"Drawn: the strongest {drawing.edges:,} of {drawing.of}{summed}."))
    if drawing.layout.columns:
        legend.append(("", _MOVES))
    elif crowded(data.architecture):
        legend.append(("", LEFT_OUT))
    return legend


def _pane(data: GraphData, drawing: _Drawing, pane: int, largest: float) -> list[str]:
    """One pane of a view with its strongest edges."""
    layout, lines, parts = drawing.layout, drawing.lines, []
    title, boxes = data.panes[pane], layout.boxes.values()
    if title:
        parts.append(f'<text x="{LEFT:.0f}" y="-6" font-weight="600">{escape(title)}</text>')
    for layer, y in layout.rows.items():
        parts.append(f'<text class="soft" x="8" y="{y + 4:.1f}">L{layer}</text>')
    parts += _token_axis(drawing)
    active = {box_id(end) for line in lines for end in (line.source, line.target)}
    parts += [box_svg(b, "not drawn", False) for b in boxes if b.id not in active]
    weakest = weakest_opacity(len(lines))
    for line in reversed(lines):  # the strongest end up in front
        score = line.scores[pane]
        share = abs(score) / largest if largest else 0.0
        style = line.style or ("pos" if line.scores[0] >= 0 else "neg")
        ends = (line.source, line.target)
        gone = is_gone(line.style, line.scores, pane)
        parts.append(edge_svg(layout, ends, score, share, weakest, style, line.frequency, gone))
    return parts + [box_svg(b, title or "component", True) for b in boxes if b.id in active]


def _token_axis(drawing: _Drawing) -> list[str]:
    """Names of the columns, lines between them, and what heads move from one to another."""
    layout, out = drawing.layout, []
    for k, column in enumerate(layout.columns):
        left = column.x - column.width / 2 - COLUMN_GAP / 2
        text = shorten(column.label, (column.width + 0.8 * COLUMN_GAP) / LETTER)
        out.append(
            f'<text class="mid" x="{column.x:.1f}" y="{layout.axis_y:.1f}">{escape(text)}</text>'
        )
        if k:
            out.append(f'<path class="axis" d="M{left:.1f} {TOP:.0f}V{layout.axis_y + 8:.1f}"/>')
    for start, end in drawing.moves:
        path = path_of(move_curve(layout, start, end))
        title = escape(f"{start} moves to {end}, not scored")
        out.append(f'<g class="move"><title>{title}</title><path class="move" d="{path}"/></g>')
    return out


# ---- pages ---------------------------------------------------------------------------------------


def module_source() -> str:
    """The ES module that widget and pages share."""
    parts = (Path(__file__).parent / name for name in ("panels.js", "graph.js"))
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)


@cache
def page_script() -> str:
    """The text of a page's only script."""
    return module_source() + _MOUNT


def policy(script: bool = True) -> str:
    """The content security policy of a page, with or without the graph's script."""
    digest = base64.b64encode(hashlib.sha256(page_script().encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; " if script else ""
    return (
        f"default-src 'none'; {allowed}style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )


def script_element() -> str:
    """The script, once per page, after every `graph_element`."""
    return f'<script type="module">{page_script()}</script>'


def graph_element(data: GraphData, name: str = "graph") -> str:
    """A graph's place and data; shows the static picture where scripts do not run."""
    text = json.dumps(
        finite(data.to_json()), separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return (
        f'<div data-mansu-graph="{escape(name)}"><noscript>{view_svg(data)}</noscript></div>'
        f'<script type="application/json" id="{escape(name)}">{text}</script>'
    )


def graph_page(data: GraphData) -> str:
    """One view as a whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>"
        f"{graph_element(data)}</main>\n{script_element()}\n</body>\n</html>\n"
    )
