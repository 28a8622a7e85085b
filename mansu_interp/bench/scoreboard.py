"""The benchmark's table as CSV, Markdown and one self-contained page; the rows are the truth."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..evaluation.properties import FORGET_TARGET
from ..report.blocks import Block, Picture, Section, Table
from ..report.html import render_page
from ..report.markdown import markdown_block, markdown_text
from ..report.values import DASH, known
from ..utils.files import write_text
from ..utils.words import p_value
from ..viz.plots import Dots, scatter_svg, strip_svg
from .table import TableRow
from .trial import ORIGINAL

INTRO = (
    "Every method stops where its four-way accuracy on the dev phrasings of the forget facts comes "
    "down to the level named; the first seed chooses the step size that retained best, among as "
    "many tries for every method. With a disruption budget none stops early: the last measured "
    "step whose mean KL to the original, in nats a token, is within it counts, and the step size "
    "is the one that forgot most there. All other figures are on unseen phrasings, on the "
    "checkpoint as saved and loaded again; q is the real library's quantizer. "
    "Back/gone: prompts whose answer comes to the first rank of four or leaves it, seed by seed, "
    "and the least p of a sign test. Relearnt: four-way accuracy on one "
    "half of the facts once the other is relearnt, worst of three rates; erased: at most 0.40, "
    "and so with answers that rank last; "
    "cad: the verdict of mansu cad. Mean "
    "\N{PLUS-MINUS SIGN} standard deviation over seeds; chance is 0.25."
)


def spread(
    values: Iterable[float | None], digits: int = 3, scale: float = 1.0, sign: str = ""
) -> str:
    """Mean and standard deviation of what is a number; a dash if nothing is. ``sign``: "+" shows it
    on a positive mean, too."""
    found = [scale * v for v in map(known, values) if v is not None]
    if not found:
        return DASH
    mean = f"{statistics.mean(found):{sign}.{digits}f}"
    return mean if len(found) < 2 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def _met(values: Sequence[bool | None]) -> str:
    """How many of the seeds meet something; ? where it was not tested."""
    tested = [v for v in values if v is not None]
    return f"{sum(tested) if tested else '?'}/{len(values)}"


def _untouched(rows: Sequence[TableRow]) -> str:
    """Says where the figures are the original's: no step was within the disruption budget."""
    none = [r for r in rows if r.level is None and r.steps == 0 and r.method != ORIGINAL]
    return ", none within the budget: the original" if none else ""


def _flips(rows: Sequence[TableRow]) -> str:
    """Seed by seed, the prompts that came back and went, and the least p of a sign test."""
    ps = [r.p for r in rows if r.p is not None]
    if not ps:
        return DASH
    counts = ", ".join(f"{r.back}/{r.gone}" for r in rows if r.p is not None)
    return f"{counts} ({p_value(min(ps))})"


def _by_method(rows: Iterable[TableRow]) -> dict[str, list[TableRow]]:
    out: dict[str, list[TableRow]] = {}
    for row in rows:
        out.setdefault(row.method, []).append(row)
    return out


Columns = Mapping[str, Callable[[Sequence[TableRow]], str]]
"""Heading -> the cell of a method's seeds; a heading that ends with " q" is after the quantizer."""

OUTCOME: Columns = {
    "step": lambda g: "/".join(dict.fromkeys(f"{r.lr:.1e}" for r in g)),
    "tries": lambda g: "/".join(dict.fromkeys(str(r.tries) for r in g)),
    "reached": lambda g: _met([r.reached for r in g]) + _untouched(g),
    "forget": lambda g: spread(r.forget_choice for r in g),
    "forget q": lambda g: spread(r.forget_choice_q for r in g),
    "top-1": lambda g: spread(r.forget_top1 for r in g),
    "top-1 q": lambda g: spread(r.forget_top1_q for r in g),
    "gap": lambda g: spread(r.gap_choice for r in g),
    "gap top-1": lambda g: spread(r.gap_top1 for r in g),
    "back/gone": _flips,
}
"""What was forgotten."""
PROPERTIES: Columns = {
    "KL": lambda g: spread((r.disruption for r in g), 4),
    "retain headroom": lambda g: spread(r.retain_headroom for r in g),
    "forgets": lambda g: _met([r.forgets for r in g]),
    "retains": lambda g: _met([r.retains for r in g]),
    "gap <= 0": lambda g: _met([r.stays for r in g]),
    "relearnt": lambda g: spread(r.relearnt_choice for r in g),
    "erased": lambda g: _met([r.erased for r in g]),
    "cad": lambda g: ", ".join(dict.fromkeys(r.cad for r in g if r.cad)) or DASH,
}
"""Which of the four properties hold."""
REASONS: Columns = {
    "edited %": lambda g: spread((r.edited_share for r in g), 2, 100),
    "codes changed %": lambda g: spread((r.codes_changed for r in g), 1, 100),
    "other codes changed": lambda g: spread((r.collateral for r in g), 0),
    "update / bin": lambda g: spread(r.update_over_bin for r in g),
    "share kept": lambda g: spread(r.share_kept for r in g),
    "noise / signal": lambda g: spread((r.noise_over_signal for r in g), 2),
    "steps": lambda g: spread((r.steps for r in g), 0),
    "seconds": lambda g: spread((r.seconds for r in g), 1),
    "GB": lambda g: spread((r.peak_gb for r in g), 2),
}
"""Why, and at what cost."""


def _table(rows: Sequence[TableRow], columns: Columns, quantizer: str) -> Table:
    """One line per method."""
    lines: list[list[str]] = []
    for method, group in _by_method(rows).items():
        errors = [r.error for r in group if r.error is not None]
        if errors:
            lines.append([method, f"failed: {errors[0]}", *[DASH] * (len(columns) - 1)])
        else:
            lines.append([method, *(cell(group) for cell in columns.values())])
    head = [c[:-1] + quantizer if c.endswith(" q") else c for c in columns]
    return Table(["method", *head], lines)


def _pictures(rows: Sequence[TableRow], quantizer: str) -> list[Block]:
    methods = _by_method(r for r in rows if r.error is None)
    if not methods:
        return []

    def dots(value: Callable[[TableRow], float | None]) -> list[Dots]:
        return [
            Dots(m, [known(value(r)) or 0.0 for r in g], m.startswith("mansu"))
            for m, g in methods.items()
        ]

    width = dots(lambda r: r.update_over_bin)
    in_bins = f"update RMS / {quantizer} bin width"
    charts = [
        strip_svg(
            dots(lambda r: r.forget_choice),
            "four-way forget accuracy, unseen phrasings",
            target=FORGET_TARGET,
        ),
        strip_svg(
            dots(lambda r: r.retain_headroom), "headroom of the worst retained score", target=0.0
        ),
        strip_svg(
            dots(lambda r: r.gap_choice),
            f"four-way forget accuracy, {quantizer} minus full",
            target=0.0,
        ),
        strip_svg(width, in_bins, target=1.0, log=True),
        scatter_svg(
            list(zip(width, dots(lambda r: r.gap_top1), strict=True)),
            in_bins,
            "forget top-1: gap",
            log_x=True,
        ),
    ]
    return [Picture(svg) for svg in charts]


def _stop(row: TableRow) -> str:
    """At what a row's method was stopped."""
    if row.level is not None:
        return f"level {row.level:g}"
    return f"disruption at most {row.disruption_budget or 0:g}"


def scoreboard(rows: Sequence[TableRow]) -> list[Section]:
    """One section per model, task, level and quantizer."""
    groups: dict[tuple[str, str, str, str], list[TableRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.task, _stop(row), row.quantizer), []).append(row)
    out = []
    for (model, task, stop, q), group in groups.items():
        first = next((r for r in group if r.error is None), group[0])
        seeds = ", ".join(map(str, dict.fromkeys(r.seed for r in group)))
        told = (
            f"{stop[0].upper()}{stop[1:]}; seeds {seeds}; {first.prompts} forget prompts a seed; "
            f"{first.tries} step sizes tried for each method. KL is measured on "
            f"{first.disruption_text or 'text'}. The original scores "
            f"{first.forget_choice_original or 0:.3f} four-way and "
            f"{first.forget_choice_original_q or 0:.3f} after {q}."
        )
        tables = [_table(group, columns, q) for columns in (OUTCOME, PROPERTIES, REASONS)]
        blocks: list[Block] = [told, *tables, *_pictures(group, q)]
        out.append(Section(f"{model}, {task}, {stop}, {q}", blocks))
    return out


def as_csv(rows: Sequence[TableRow]) -> str:
    """The tidy table; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(TableRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows([asdict(row) for row in rows])
    return text.getvalue()


SCOREBOARD = ("table.csv", "scoreboard.md", "scoreboard.html")


def write_scoreboard(folder: Path, rows: Sequence[TableRow]) -> None:
    """Write ``table.csv``, ``scoreboard.md`` and ``scoreboard.html``, each whole or not at all."""
    folder, sections = Path(folder), scoreboard(rows)
    markdown = ["# Scoreboard", markdown_text(INTRO)]
    for section in sections:
        markdown += [f"## {markdown_text(section.title)}"]
        markdown += [text for b in section.blocks if (text := markdown_block(b))]
    page = render_page("scoreboard.html", "Scoreboard", sections, intro=INTRO)
    texts = (as_csv(rows), "\n\n".join(markdown) + "\n", page)
    for name, text in zip(SCOREBOARD, texts, strict=True):
        write_text(folder / name, text)
