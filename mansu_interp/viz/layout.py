"""Where everything in a drawing of a circuit goes. Pure arithmetic, without SVG.

Computation flows upward: the input at the bottom, one row per layer, the logits at the top. A row
has its heads side by side and the MLP at their right, raised by half a row because it reads what
the heads have written. Where query heads share keys and values, a thin bar under each group stands
for the shared reader (``a3.kv1``); everywhere else a head is one box for its q, k, v and output.

Coordinates are pixels with y growing downward, as in SVG.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.graph import Architecture

LEFT, RIGHT, TOP, BOTTOM = 46.0, 58.0, 10.0, 10.0
_MLP_WIDTH, _MLP_GAP = 46.0, 26.0
_PORTS = {"q": -0.28, "k": 0.0, "v": 0.28}
_SHARED_PORTS = {"k": -0.16, "v": 0.16}
CONSTANTS = {
    "ports": _PORTS,
    "shared_ports": _SHARED_PORTS,
    "right": RIGHT,
    "mlp_width": _MLP_WIDTH,
}
"""What `curve` needs besides a layout; graph.js draws by the same rule."""


@dataclass(frozen=True)
class Box:
    """One visual node."""

    id: str
    """Node id without its ``<q>``, ``<k>``, ``<v>`` reader."""
    kind: str
    """``input``, ``head``, ``kv``, ``mlp`` or ``logits``."""
    label: str
    """Text in the box; empty for ``kv`` bars."""
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
    rows: tuple[float, ...]
    """Vertical centre of each layer's heads."""


def box_id(node_id: str) -> str:
    """The box that stands for a node: ``a3.h5<q>`` -> ``a3.h5``."""
    return node_id.partition("<")[0]


def reader_name(node_id: str) -> str:
    """``q``, ``k`` or ``v`` for the reader of a head, otherwise empty."""
    return node_id.partition("<")[2].rstrip(">")


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def _box(
    id: str,
    kind: str,
    centre: tuple[float, float],
    size: tuple[float, float],
    label: str | None = None,
) -> Box:
    """A box around a point; its label is its kind unless another is given."""
    (x, y), (width, height) = centre, size
    return Box(id, kind, kind if label is None else label, x=x, y=y, width=width, height=height)


def place(architecture: Architecture) -> Layout:
    """Boxes for every head, MLP, shared key/value reader, the input and the logits."""
    a = architecture
    column = _clamp(540 / a.n_heads, 30.0, 84.0)
    pitch = _clamp(640 / a.n_layers, 48.0, 104.0)
    tall = _clamp(pitch * 0.36, 17.0, 28.0)
    heads_width = column * a.n_heads
    width = LEFT + heads_width + _MLP_GAP + _MLP_WIDTH + RIGHT
    mlp_x = LEFT + heads_width + _MLP_GAP + _MLP_WIDTH / 2
    raised = 0.0 if a.parallel else 0.5 * pitch
    end_x, end_width = (LEFT + mlp_x + _MLP_WIDTH / 2) / 2, mlp_x + _MLP_WIDTH / 2 - LEFT

    logits_y = TOP + 12
    first = logits_y + raised + 0.8 * pitch  # the highest row of heads
    rows = tuple(first + pitch * (a.n_layers - 1 - layer) for layer in range(a.n_layers))
    input_y = rows[0] + 0.9 * pitch

    boxes = [_box("input", "input", (end_x, input_y), (end_width, 24.0))]
    group = a.n_heads // a.n_kv_heads
    for layer, y in enumerate(rows):
        for h in range(a.n_heads):
            x = LEFT + column * (h + 0.5)
            boxes.append(_box(f"a{layer}.h{h}", "head", (x, y), (column * 0.72, tall), f"h{h}"))
        for h in range(a.n_kv_heads if group > 1 else 0):
            x = LEFT + column * group * (h + 0.5)
            size = column * (group - 0.28), 4.0
            boxes.append(_box(f"a{layer}.kv{h}", "kv", (x, y + tall / 2 + 5), size, ""))
        boxes.append(_box(f"m{layer}", "mlp", (mlp_x, y - raised), (_MLP_WIDTH, tall)))
    boxes.append(_box("logits", "logits", (end_x, logits_y), (end_width, 24.0)))
    height = input_y + 12 + BOTTOM
    return Layout(width, height, pitch, column, {b.id: b for b in boxes}, rows)


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
                edge = layout.boxes["m0"].x + _MLP_WIDTH / 2
                x0 = x1 = edge - 4
                swing = RIGHT * 1.25
        else:
            side = 1 if round(y0 / layout.pitch) % 2 else -1
            swing = side * layout.column * min(0.55 + 0.05 * rise / layout.pitch, 1.1)
        return (x0, y0), (x0 + swing, y0 - 0.3 * rise), (x1 + swing, y1 + 0.3 * rise), (x1, y1)
    reach = min(0.5 * rise, 1.2 * layout.pitch)
    return (x0, y0), (x0, y0 - reach), (x1, y1 + reach), (x1, y1)
