"""A summary for the terminal, laid out by rich.

Texts reach rich as `Text`, never as markup, and without control characters, so that no prompt or
model name can style or steer the terminal.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..errors import printable
from ..evaluation.scores import METRICS, Metric, ScoreRow
from ..evaluation.versions import ModelVersion
from ..utils.words import number_of
from .graphs import edge_counts
from .records import Report
from .story import (
    ROLES,
    heading,
)
from .values import DASH, count, measured, percent, status_of

MIN_WIDTH = 20
ROOMY = 60
"""Columns from which on targets and top-1 are shown."""
STYLES = {"pass": "bold green", "fail": "bold red", "undecided": "bold yellow"}


def console_summary(report: Report, width: int, color: bool = False) -> str:
    """The verdict, the four properties, mean scores, and the edit in a line.

    Arguments:
        report: what a run found.
        width: no line is wider, in columns (at least 20).
        color: with the codes that a terminal takes for colours; without them, nothing but
            printable text.
    """
    console = Console(
        file=io.StringIO(),
        width=max(width, MIN_WIDTH),
        force_terminal=color,
        color_system="standard" if color else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    top = heading(report)
    title = _text(f"{top.title} ({top.subtitle})")
    console.print(Text.assemble((top.status.upper(), STYLES[top.status]), "  ", title), **_ONE_LINE)
    console.print(_text(_sum(report)))
    narrow = console.width < ROOMY
    console.print(_properties(report, narrow))
    if report.scores:
        console.print(_text(f"Mean scores, {'' if narrow else 'top-1 / '}choice among four:"))
        console.print(_role_means(report, ("choice",) if narrow else METRICS))
    for line in _lines(report):
        console.print(line)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


_ONE_LINE = {"no_wrap": True, "overflow": "ellipsis"}


def _text(text: str, style: str = "") -> Text:
    """Text of anybody's: on one line, without control characters, never markup."""
    return Text(re.sub(r"\s", " ", printable(text)), style)


def _sum(report: Report) -> str:
    """How many properties hold; the table below says which, and why."""
    held = sum(p.passed is True for p in report.properties)
    return f"{held} of {len(report.properties)} properties hold."


def _properties(report: Report, narrow: bool) -> RenderableType:
    """A row a property, with the reason of one that is not met; where there is little room, without
    its target."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("property", overflow="fold")
    for name in ("value",) if narrow else ("value", "target", "headroom"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in report.properties:
        word = status_of(item.passed)[0]
        told = _text(item.name)
        if item.reason:
            told.append_text(_text(f": {_shortened(item.reason)}", "dim"))
        numbers = [measured(item.value), measured(item.target), measured(item.headroom, True)]
        shown = numbers[:1] if narrow else numbers
        table.add_row(Text(word.upper(), STYLES[word]), told, *map(Text, shown))
    return table


def _shortened(text: str, most: int = 240) -> str:
    return text if len(text) <= most else text[: most - 2] + " …"


def _role_means(report: Report, metrics: Sequence[Metric]) -> RenderableType:
    """A row a model: scores averaged over all the facts of a role."""

    def cell(role: str, version: ModelVersion) -> str:
        rows = [e for e in report.scores if e.role == role]
        return " / ".join(_mean(rows, version, metric) for metric in metrics)

    roles = [r for r in ROLES if any(e.role == r for e in report.scores)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    for role in roles:
        table.add_column(role, justify="right", overflow="fold")
    for version in dict.fromkeys(v for e in report.scores for v in e.models):
        table.add_row(_text(str(version)), *(Text(cell(role, version)) for role in roles))
    return Padding(table, (0, 0, 0, 2))


def _mean(rows: list[ScoreRow], version: ModelVersion, metric: Metric) -> str:
    """Over the prompts of all sets that a model was scored on."""
    scored = [(r.n, r[version].value(metric)) for r in rows if version in r.models]
    total = sum(n for n, _ in scored)
    return percent(sum(n * v for n, v in scored) / total) if total else DASH


def _lines(report: Report) -> list[Text]:
    """The edit, its circuit, what was done after training, and CAD's prediction."""
    edit, circuit = report.edit, report.circuit
    line = f"Edit: {number_of(edit.edited, 'parameter')} ({percent(edit.share, 3)})"
    for row in report.quantizers[:1]:
        line += f", {count(row.survival.survived)} survive {row.name}"
    if edit.embedding:
        line += f", {count(edit.embedding)} are in the embedding, which is not quantized"
    if circuit:
        line += f". Circuit: {count(circuit.edges)} of {count(circuit.of)} edges"
    out = [f"{line}."]
    if edit.final_margin:
        out.append(f"Final margin: {edit.final_margin}.")
    if edit.quantization_margin:
        out.append(f"Quantization margin: {edit.quantization_margin}.")
    if counts := edge_counts(report):
        out.append(f"Edges: {', '.join(f'{count(n)} {name}' for name, n in counts.items())}.")
    if cad := report.cad:
        facts = ", ".join(f"{count(n)} {state}" for state, n in cad.counts.items() if cad.facts)
        out.append(
            f"CAD predicts: {cad.verdict} (confidence {percent(cad.confidence, 0)})"
            + (f"; facts of one half: {facts}." if facts else ".")
        )
    return [_text(line) for line in out]
