"""Where everything in a drawing of a circuit goes. Pure arithmetic, without SVG.

Computation flows upward: the input at the bottom, one row per layer, the logits at the top. A row
has its heads side by side and the MLP at their right, raised by half a row because it reads what
the heads have written. Where query heads share keys and values, a thin bar under each group stands
for the shared reader (``a3.kv1``); everywhere else a head is one box for its q, k, v and output.

A drawing may be folded: layers and heads that carry nothing are left out, and what is left moves
together. graph.js places boxes and curves by the same rules; tests compare the two.

Coordinates are pixels with y growing downward, as in SVG.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..models.graph import Architecture

LEFT, RIGHT, TOP, BOTTOM = 38.0, 54.0, 10.0, 10.0
_MLP_WIDTH, _MLP_GAP = 46.0, 26.0
_LETTER = 6.6
"""Width of a letter of a label at 11 pixels, about."""
_PORTS = {"q": -0.28, "k": 0.0, "v": 0.28}
_SHARED_PORTS = {"k": -0.16, "v": 0.16}
ROOM = 540.0
_CROWDED = 60
"""Heads and MLPs from which on a drawing is folded at first."""
CONSTANTS = {
    "left": LEFT,
    "right": RIGHT,
    "top": TOP,
    "bottom": BOTTOM,
    "mlp_width": _MLP_WIDTH,
    "mlp_gap": _MLP_GAP,
    "letter": _LETTER,
    "room": ROOM,
    "crowded": _CROWDED,
    "ports": _PORTS,
    "shared_ports": _SHARED_PORTS,
}
"""What graph.js needs to place boxes and curves by the same rules."""


@dataclass(frozen=True)
class Box:
    """One visual node."""

    id: str
    """Node id without its ``<q>``, ``<k>``, ``<v>`` reader."""
    kind: str
    """``input``, ``head``, ``kv``, ``mlp`` or ``logits``."""
    label: str
    """Text in the box: its id; empty for ``kv`` bars."""
    x: float
    """Horizontal centre."""
    y: float
    """Vertical centre."""
    width: float
    height: float

    @property
    def top(self) -> float:
        """Where edges leave."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """Where edges arrive."""
        return self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """All boxes of an architecture."""

    width: float
    height: float
    pitch: float
    """Height of a layer's row."""
    column: float
    """Width of a head's column."""
    boxes: Mapping[str, Box]
    """By box id, in the order in which they compute."""
    rows: Mapping[int, float]
    """By layer: vertical centre of its heads."""
    margin: float
    """Right end of the MLPs, beyond which only curves run."""


def box_id(node_id: str) -> str:
    """The box that stands for a node: ``a3.h5<q>`` -> ``a3.h5``."""
    return node_id.partition("<")[0]


def reader_name(node_id: str) -> str:
    """``q``, ``k`` or ``v`` for the reader of a head, otherwise empty."""
    return node_id.partition("<")[2].rstrip(">")


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def crowded(architecture: Architecture) -> bool:
    """Whether a drawing of every component would be too small to read."""
    return architecture.n_layers * (architecture.n_heads + 1) > _CROWDED


@dataclass(frozen=True)
class _Row:
    """What is drawn of a layer."""

    heads: list[int]
    mlp: bool


def _rows(a: Architecture, shown: Collection[str] | None) -> dict[int, _Row]:
    """The layers of which something is shown. A shared key/value reader needs one of its heads."""
    group, out = a.n_heads // a.n_kv_heads, {}
    for layer in range(a.n_layers):
        heads = [h for h in range(a.n_heads) if shown is None or f"a{layer}.h{h}" in shown]
        for k in range(a.n_kv_heads if shown is not None and group > 1 else 0):
            if f"a{layer}.kv{k}" in (shown or ()) and not any(h // group == k for h in heads):
                heads = sorted([*heads, k * group])
        mlp = shown is None or f"m{layer}" in shown
        if heads or mlp:
            out[layer] = _Row(heads, mlp)
    return out


def place(
    architecture: Architecture, shown: Collection[str] | None = None, room: float = ROOM
) -> Layout:
    """Boxes for heads, MLPs, shared key/value readers, the input and the logits.

    Arguments:
        architecture: of the graph.
        shown: boxes that carry something: layers and heads without are left out. None: all are
            placed.
        room: width for the heads of a layer, if their names fit into it.
    """
    a, drawn = architecture, _rows(architecture, shown)
    columns = max([1, *(len(row.heads) for row in drawn.values())])
    widest = _LETTER * len(f"a{a.n_layers - 1}.h{a.n_heads - 1}") + 4
    column = max(_clamp(room / columns, 30.0, 84.0), widest + 6)
    pitch = _clamp(640 / max(len(drawn), 1), 48.0, 104.0)
    tall = _clamp(pitch * 0.36, 17.0, 28.0)
    head_width = max(column * 0.72, widest)
    mlp_x = LEFT + column * columns + _MLP_GAP + _MLP_WIDTH / 2
    margin = mlp_x + _MLP_WIDTH / 2
    raised = 0.0 if a.parallel else 0.5 * pitch
    end_x, end_width = (LEFT + margin) / 2, margin - LEFT

    logits_y = TOP + 12
    first = logits_y + raised + 0.8 * pitch  # the highest row of heads
    rows = {n: first + pitch * (len(drawn) - 1 - k) for k, n in enumerate(drawn)}
    input_y = max([logits_y, *rows.values()]) + 0.9 * pitch

    boxes: dict[str, Box] = {}

    def add(name: str, kind: str, *, at: tuple[float, float], size: tuple[float, float]) -> None:
        label = "" if kind == "kv" else name
        (x, y), (width, height) = at, size
        boxes[name] = Box(name, kind, label, x=x, y=y, width=width, height=height)

    add("input", "input", at=(end_x, input_y), size=(end_width, 24.0))
    group = a.n_heads // a.n_kv_heads
    for layer, row in drawn.items():
        y, at = rows[layer], {h: LEFT + column * (k + 0.5) for k, h in enumerate(row.heads)}
        for h, x in at.items():
            add(f"a{layer}.h{h}", "head", at=(x, y), size=(head_width, tall))
        for k in range(a.n_kv_heads if group > 1 else 0):
            if over := [x for h, x in at.items() if h // group == k]:
                x, width = (over[0] + over[-1]) / 2, over[-1] - over[0] + head_width
                add(f"a{layer}.kv{k}", "kv", at=(x, y + tall / 2 + 5), size=(width, 4.0))
        if row.mlp:
            add(f"m{layer}", "mlp", at=(mlp_x, y - raised), size=(_MLP_WIDTH, tall))
    add("logits", "logits", at=(end_x, logits_y), size=(end_width, 24.0))
    height = input_y + 12 + BOTTOM
    width = margin + RIGHT
    return Layout(
        width,
        height,
        pitch=pitch,
        column=column,
        boxes=boxes,
        rows=rows,
        margin=margin,
    )


def ports(layout: Layout, source: str, target: str) -> tuple[float, float, float, float]:
    """Start and end (x0, y0, x1, y1) of an edge between two node ids.

    q, k and v arrive side by side so that parallel edges stay apart. The wide input and logits
    boxes are met near the other end, which keeps the fan narrow.
    """
    u, v = layout.boxes[box_id(source)], layout.boxes[box_id(target)]
    offsets = _SHARED_PORTS if v.kind == "kv" else _PORTS
    x0, x1 = u.x, v.x + offsets.get(reader_name(target), 0.0) * v.width
    if u.kind == "input" and v.kind != "logits":
        x0 += 0.75 * (x1 - u.x)
    if v.kind == "logits" and u.kind != "input":
        x1 += 0.75 * (x0 - v.x)
    return x0, u.top, x1, v.bottom


def curve(layout: Layout, source: str, target: str) -> tuple[tuple[float, float], ...]:
    """Four Bezier points of an edge.

    Edges leave and arrive vertically. One that climbs past other rows in its own column would run
    straight through their boxes, so it swings out sideways: MLPs into the free margin at the right,
    heads alternately to both sides.
    """
    x0, y0, x1, y1 = ports(layout, source, target)
    rise = y0 - y1
    u, v = layout.boxes[box_id(source)], layout.boxes[box_id(target)]
    if rise > 1.1 * layout.pitch and abs(x1 - x0) < 0.6 * layout.column:
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
