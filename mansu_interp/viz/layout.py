"""Where everything in a drawing of a circuit goes. Pure arithmetic, without SVG.

Computation flows upward: the input at the bottom, one row per layer, the logits at the top. A row
has its heads side by side and the MLP at their right, raised by half a row because it reads what
the heads have written. Where query heads share keys and values, a thin bar under each group stands
for the shared reader (``a3.kv1``); everywhere else a head is one box for its q, k, v and output.

A drawing may be folded: layers and heads that carry nothing are left out, and what is left moves
together. By token position, every token has a column and a node is a component at a token
(``a3.h5@2``); only nodes that carry something are placed. Members of a closed group are drawn as
one box. graph.js places boxes and curves by the same rules; tests compare the two.

Coordinates are pixels with y growing downward, as in SVG.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..models.graph import Architecture

LEFT, RIGHT, TOP, BOTTOM = 38.0, 54.0, 10.0, 10.0
_MLP_WIDTH, _MLP_GAP = 46.0, 26.0
LETTER = 6.6
"""Width of a letter of a label at 11 pixels, about."""
PORTS = {"q": -0.28, "k": 0.0, "v": 0.28}
SHARED_PORTS = {"k": -0.16, "v": 0.16}
ROOM = 540.0
COLUMN_GAP = 18.0
"""Between the columns of two tokens, where edges climb past other rows."""
_LINE = 4
"""Nodes of one layer side by side at one token."""
POSITION_TOP = 100
"""Edges drawn at first where each is drawn at each position."""
_SMALLEST = 11 + 2
"""Height of a box around letters of 11 pixels."""
GROUP = "⊞ "
"""Stands before the name of a closed group in the id of its box."""
_CROWDED = 60
"""Heads and MLPs from which on a drawing is folded at first."""
CONSTANTS = {
    "left": LEFT,
    "right": RIGHT,
    "top": TOP,
    "bottom": BOTTOM,
    "mlp_width": _MLP_WIDTH,
    "mlp_gap": _MLP_GAP,
    "letter": LETTER,
    "room": ROOM,
    "column_gap": COLUMN_GAP,
    "line": _LINE,
    "position_top": POSITION_TOP,
    "crowded": _CROWDED,
    "ports": PORTS,
    "shared_ports": SHARED_PORTS,
}
"""What graph.js needs to place boxes and curves by the same rules."""


@dataclass(frozen=True)
class Box:
    """One visual node."""

    id: str
    """Node id without its ``<q>``, ``<k>``, ``<v>`` reader."""
    kind: str
    """``input``, ``head``, ``kv``, ``mlp``, ``logits`` or ``group``."""
    label: str
    """Text in the box: its component; empty for ``kv`` bars."""
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
class Column:
    """A token, or three and more in a row at which nothing is drawn."""

    positions: list[int]
    label: str
    x: float
    """Horizontal centre."""
    width: float

    def holds(self, box: Box) -> bool:
        """Whether a box is in this column."""
        return abs(box.x - self.x) <= self.width / 2


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
    """Right end of the boxes, beyond which only curves run."""
    columns: Sequence[Column] = ()
    """Of tokens; none in a layout by layer."""
    axis_y: float = 0.0
    """Vertical centre of the tokens' names."""


def box_id(node_id: str) -> str:
    """The box that stands for a node: ``a3.h5<q>`` -> ``a3.h5``, ``a3.h5<q>@2`` -> ``a3.h5@2``."""
    return node_id if node_id.startswith(GROUP) else re.sub("<.*>", "", node_id)


def reader_name(node_id: str) -> str:
    """``q``, ``k`` or ``v`` for the reader of a head, otherwise empty."""
    return "" if node_id.startswith(GROUP) else node_id.partition("<")[2].partition(">")[0]


def component_of(node_id: str) -> str:
    """A node without its token position: ``a3.h5@2`` -> ``a3.h5``."""
    return node_id if node_id.startswith(GROUP) else re.sub(r"@\d+$", "", node_id)


def position_of(node_id: str) -> int | None:
    """The token position of a node, if it has one and is no group."""
    at = node_id.startswith(GROUP) or re.search(r"@(\d+)$", node_id)
    return int(at[1]) if isinstance(at, re.Match) else None


def clamp(value: float, low: float, high: float) -> float:
    """The nearest value between two ends."""
    return max(low, min(high, value))


def crowded(architecture: Architecture) -> bool:
    """Whether a drawing of every component would be too small to read."""
    return architecture.n_layers * (architecture.n_heads + 1) > _CROWDED


def row_sizes(n: int) -> tuple[float, float]:
    """Height of each of ``n`` rows, and of the boxes in it."""
    pitch = clamp(640 / max(n, 1), 48.0, 104.0)
    return pitch, clamp(pitch * 0.36, 17.0, 28.0)


def least_scale(column: float, tall: float, letters: float) -> float:
    """The smallest scale of a drawing: letters of 11 pixels have room in a column and in a box."""
    return min(1.0, max(letters / (0.96 * column), _SMALLEST / tall))


def wanted_width(label: str) -> float:
    """Of the box of a closed group on the screen."""
    return clamp(LETTER * len(label) + 18, 40.0, 180.0)


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
    widest = LETTER * len(f"a{a.n_layers - 1}.h{a.n_heads - 1}") + 4
    column = max(clamp(room / columns, 30.0, 84.0), widest + 6)
    pitch, tall = row_sizes(len(drawn))
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


@dataclass
class _Node:
    """What is placed in a layout by position."""

    id: str
    kind: str
    label: str
    layer: int
    """-1 for the input, the number of layers for the logits."""
    position: int
    rank: int
    """From left to right in its row."""

    def order(self) -> tuple[int, bool, int, int, str]:
        """Nodes sort in the order in which they compute."""
        return self.layer, self.kind == "mlp", self.position, self.rank, self.id


def _node(box: str, a: Architecture) -> _Node:
    """The node of a box such as ``a3.h5@2``; keys and values come before the heads that read
    them."""
    label, position = component_of(box), position_of(box) or 0
    if not (found := re.fullmatch(r"[am](\d+)(?:\.(h|kv)(\d+))?", label)):
        layer = -1 if label == "input" else a.n_layers
        return _Node(box, label, label, layer, position, rank=2 * a.n_heads + 1)
    layer, kind, k = int(found[1]), found[2], int(found[3] or 0)
    each = a.n_heads // a.n_kv_heads
    rank = {"h": 2 * k + 1, "kv": 2 * k * each, None: 2 * a.n_heads + 1}[kind]
    return _Node(box, "head" if kind else "mlp", label, layer, position, rank)


def _nodes(a: Architecture, shown: Collection[str], inside: Mapping[str, str]) -> list[_Node]:
    """In order. A closed group stands where its highest member would."""
    out, groups = [], dict[str, _Node]()
    for node in (_node(box, a) for box in shown):
        if (group := inside.get(node.id)) is None:
            out.append(node)
        elif group not in groups or groups[group].order() < node.order():
            groups[group] = node
    for group, top in groups.items():
        rank = 2 * a.n_heads if 0 <= top.layer < a.n_layers else top.rank
        label = group.removeprefix(GROUP)
        out.append(replace(top, id=group, kind="group", label=label, rank=rank))
    return sorted(out, key=_Node.order)


def layer_of(box: str, architecture: Architecture) -> int:
    """The layer of a box; -1 for the input, the number of layers for the logits."""
    return _node(box, architecture).layer


def column_name(text: str) -> str:
    """A token as the name of a column: without spaces around it, but not empty."""
    return text.strip() or ("↵" if "\n" in text else "␣")


def _columns(full: Sequence[float], tokens: Sequence[str]) -> list[Column]:
    """A column for each token; three or more in a row at which nothing is drawn share one.

    Arguments:
        full: width of what is drawn at each position; 0 where nothing is.
        tokens: what stands at each.
    """
    runs: list[list[int]] = []
    for p, width in enumerate(full):
        if width or not p or full[p - 1]:
            runs.append([p])
        else:
            runs[-1].append(p)
    left, out = LEFT, []
    for positions in [part for r in runs for part in ([r] if len(r) > 2 else [[p] for p in r])]:
        label = "⋯" if len(positions) > 1 else column_name(tokens[positions[0]])
        own = full[positions[0]]
        width = max(own, clamp(LETTER * len(label) + 4, 40.0 if own else 16.0, 92.0))
        out.append(Column(positions, label, left + width / 2, width))
        left += width + COLUMN_GAP
    return out


def _lines(cell: Sequence[_Node]) -> int:
    """Lines of nodes of one layer at one token."""
    return -(-len(cell) // _LINE)


def _across(position: int, lines: Sequence[tuple[int, list[Box]]]) -> float:
    """Width of the widest line at a position."""
    own = [sum(b.width for b in row) + 6 * (len(row) - 1) for at, row in lines if at == position]
    return max(own, default=0.0)


def place_by_position(
    architecture: Architecture,
    shown: Collection[str],
    tokens: Sequence[str],
    inside: Mapping[str, str] | None = None,
) -> Layout:
    """Nodes at token positions: tokens from left to right, layers upward.

    Arguments:
        architecture: of the graph.
        shown: boxes that carry something, such as ``a3.h5@2``; no others are placed.
        tokens: what stands at each position.
        inside: box -> the id of the closed group that is drawn in its place.
    """
    a, nodes = architecture, _nodes(architecture, shown, inside or {})
    heads = [n.label for n in nodes if n.kind == "head"]
    longest = LETTER * max([2, *map(len, heads)])
    layers = sorted({n.layer for n in nodes if 0 <= n.layer < a.n_layers})
    pitch, tall = row_sizes(len(layers))
    least = least_scale(longest + 10, tall, longest)
    raised, logits_y = 0.0 if a.parallel else 0.5 * pitch, TOP + 12
    cells = dict[tuple[int, bool, int], list[_Node]]()
    for n in nodes:
        cells.setdefault((n.layer, raised > 0 and n.kind == "mlp", n.position), []).append(n)
    extra = {n: max(_lines(c) - 1 for at, c in cells.items() if at[0] == n) for n in layers}
    rows, y = dict[int, float](), logits_y + raised - 0.2 * pitch
    for layer in reversed(layers):  # the highest row comes first
        more = extra[layer] * (tall + 6)
        rows[layer] = y + pitch + more / 2
        y += pitch + more
    input_y = (y if layers else logits_y) + 0.9 * pitch

    lines: list[tuple[int, list[Box]]] = []
    for (layer, above, position), cell in cells.items():
        for k in range(_lines(cell)):
            y = input_y if layer < 0 else logits_y
            if layer in rows:  # so many side by side in a line, others above them
                up = extra[layer] / 2 * (tall + 6) + raised
                y = rows[layer] - (up if above else (k - (_lines(cell) - 1) / 2) * (tall + 6))
            row = []
            for n in cell[k * _LINE : (k + 1) * _LINE]:
                height = (tall - 3 if n.kind == "group" else tall) if layer in rows else 24.0
                widths = {"head": longest + 4, "group": wanted_width(n.label) / least}
                width = widths.get(n.kind, _MLP_WIDTH)
                row.append(Box(n.id, n.kind, n.label, x=0.0, y=y, width=width, height=height))
            lines.append((position, row))
    columns, boxes = _columns([_across(p, lines) for p in range(len(tokens))], tokens), {}
    for position, row in lines:
        x = next(c.x for c in columns if position in c.positions)
        x -= _across(position, [(position, row)]) / 2
        for box in row:
            boxes[box.id] = replace(box, x=x + box.width / 2)
            x += box.width + 6
    margin = columns[-1].x + columns[-1].width / 2 if columns else LEFT
    return Layout(
        margin + COLUMN_GAP, input_y + 38 + BOTTOM, pitch=pitch, column=longest + 10, boxes=boxes,
        rows=rows, margin=margin, columns=columns, axis_y=input_y + 28,
    )  # fmt: skip
