"""Small static charts as inline SVG: values by method, one value against another, and
faithfulness by size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from .svg import escape, legend_svg, open_svg

_LEFT, _RIGHT, _ROW = 150.0, 560.0, 18.0
_LETTER = 6.0
"""Width of a letter of a label, about."""


@dataclass(frozen=True)
class Dots:
    """The values of one method, one per seed."""

    name: str
    values: Sequence[float]
    ours: bool = False
    """Drawn in the other colour, and as squares."""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    """Value at ``start``."""
    high: float
    """Value at ``end``."""
    start: float
    """In pixels."""
    end: float
    log: bool
    """Whether logarithms are spaced evenly."""

    def at(self, value: float) -> float:
        """Where a value is, in pixels; values outside are at the nearer end."""
        scale: Callable[[float], float] = math.log10 if self.log else float
        value = min(max(value, self.low), self.high)
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, or four or so round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.log10(self.high) + 1e-9
            return [10.0**k for k in range(first, math.floor(last) + 1)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def make_axis(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    """An axis for all values; a logarithmic one leaves out those that are not positive."""
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [0.1, 1.0]
    low, high = min(shown), max(shown)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return Axis(low, high if high > low else low * 10, start, end, True)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return Axis(low - pad, high + pad, start, end, False)


def _mark(x: float, y: float, ours: bool, note: str) -> str:
    title = f"<title>{escape(note)}</title>"
    if ours:
        return (
            f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="var(--pos)" '
            f'opacity=".75">{title}</rect>'
        )
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--neg)" opacity=".75">{title}</circle>'
    )


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _across(axis: Axis, top: float, bottom: float, label: str) -> list[str]:
    """Vertical grid lines, their values, and what they measure."""
    parts = []
    for tick in axis.ticks():
        x = axis.at(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(
            f'<text class="soft mid" x="{x:.1f}" y="{bottom + 12:.1f}">{_number(tick)}</text>'
        )
    middle = (axis.start + axis.end) / 2
    parts.append(
        f'<text class="soft mid" x="{middle:.1f}" y="{bottom + 30:.1f}">{escape(label)}</text>'
    )
    return parts


def strip_svg(
    rows: Sequence[Dots], label: str, *, target: float | None = None, log: bool = False
) -> str:
    """One row of dots per method.

    Arguments:
        rows: from top to bottom.
        label: what is measured.
        target: marked by a dashed line.
        log: logarithmic; values that are not positive are left out.
    """
    every = [v for r in rows for v in r.values] + ([] if target is None else [target])
    axis = make_axis(every, _LEFT, _RIGHT, log)
    bottom = 10 + _ROW * len(rows)
    parts = [open_svg(_RIGHT + 20, bottom + 44, label), *_across(axis, 6.0, bottom, label)]
    if target is not None:
        x = axis.at(target)
        parts.append(
            f'<path class="target" stroke-width="1.5" d="M{x:.1f} 4V{bottom:.1f}">'
            f"<title>target {_number(target)}</title></path>"
        )
    for k, row in enumerate(rows):
        y = 10 + _ROW * (k + 0.5)
        parts.append(
            f'<text text-anchor="end" x="{_LEFT - 10}" y="{y + 4:.1f}">{escape(row.name)}</text>'
        )
        for value in row.values:
            if math.isfinite(value) and (value > 0 or not log):
                note = f"{row.name}: {_number(value)}"
                parts.append(_mark(axis.at(value), y, row.ours, note))
    return "\n".join([*parts, "</svg>"]) + "\n"


def scatter_svg(
    points: Sequence[tuple[Dots, Dots]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    labels: bool = False,
) -> str:
    """One mark per method and seed; hovering names it.

    Arguments:
        points: per method its values across, and up.
        x_label: what is measured across.
        y_label: and up.
        log_x: across on a logarithmic axis.
        labels: write each name once, at its first value.
    """
    pairs = [
        (x.name, a, b, x.ours)
        for x, y in points
        for a, b in zip(x.values, y.values, strict=True)
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x)
    ]
    across = make_axis([a for _, a, _, _ in pairs], 70.0, _RIGHT, log_x)
    up = make_axis([b for _, _, b, _ in pairs], 250.0, 22.0, False)
    parts = [
        open_svg(_RIGHT + 20, 294.0, f"{y_label} by {x_label}"),
        *_across(across, 22.0, 250.0, x_label),
    ]
    parts.append(f'<text class="soft" x="4" y="12">{escape(y_label)}</text>')
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<path class="axis" d="M70 {y:.1f}H{_RIGHT}"/>')
        parts.append(
            f'<text class="soft" text-anchor="end" x="64" y="{y + 4:.1f}">{_number(tick)}</text>'
        )
    written: list[tuple[float, float, float]] = []  # where a name begins, its line, its end
    unnamed = {name for name, *_ in pairs} if labels else set()
    for name, a, b, ours in pairs:
        note, x, y = f"{name}: {_number(a)}, {_number(b)}", across.at(a), up.at(b)
        parts.append(_mark(x, y, ours, note))
        if name in unnamed:
            unnamed.remove(name)
            left = x > (across.start + across.end) / 2
            first = x - 8 - _LETTER * len(name) if left else x + 8
            line = y + 4
            last = first + _LETTER * len(name)
            while any(abs(line - b) < 12 and first < c and a < last for a, b, c in written):
                line += 12
            written.append((first, line, last))
            anchor, at = ("end", x - 8) if left else ("start", x + 8)
            parts.append(
                f'<text text-anchor="{anchor}" x="{at:.1f}" y="{line:.1f}">{escape(name)}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


_LINES = ("kept", "recovered", "weakened", "new", "silent", "other")


def lines_svg(curves: Mapping[str, Sequence[Sequence[object]]], x_label: str, y_label: str) -> str:
    """A small line chart of shares (0 to 1), a line a name with its own colour and dashes.

    Arguments:
        curves: by name, [[x, share], ...] in any order; points that are not numbers are left out.
        x_label: what x counts.
        y_label: what the share is of.
    """

    def real(value: object) -> TypeGuard[float]:
        return isinstance(value, (int, float)) and math.isfinite(value)

    lines = {k: sorted((x, y) for x, y in v if real(x) and real(y)) for k, v in curves.items()}
    most = max([1.0, *(x for points in lines.values() for x, _ in points)])
    left, right, top, bottom = 44.0, 404.0, 16.0, 170.0
    parts = [open_svg(420.0, 214.0 + 18 * len(lines), f"{y_label} by {x_label}")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - (bottom - top) * share
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{right}"/>')
        parts.append(
            f'<text class="soft" text-anchor="end" x="{left - 6}" y="{y + 4:.1f}">{share:g}</text>'
        )
    for x in sorted({x for points in lines.values() for x, _ in points}):
        at = left + (right - left) * x / most
        parts.append(f'<text class="soft mid" x="{at:.1f}" y="{bottom + 14}">{x:g}</text>')
    middle = (left + right) / 2
    parts.append(f'<text class="soft mid" x="{middle}" y="{bottom + 32}">{escape(x_label)}</text>')
    for name, points in zip(_LINES * len(lines), lines.values(), strict=False):
        path = " ".join(
            f"{left + (right - left) * x / most:.1f} {bottom - (bottom - top) * y:.1f}"
            for x, y in points
        )
        parts.append(f'<path class="{name}" stroke-width="2" d="M{path}"/>' if path else "")
    legend = list(zip(_LINES * len(lines), lines, strict=False))
    parts.append(legend_svg(legend, 8.0, 222.0))
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
