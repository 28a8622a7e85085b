"""The benchmark's table as CSV, Markdown and one self-contained page; the rows are the truth."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report.html import _html_block, page
from ..report.markdown import _md, _md_block
from ..report.story import Block, Picture, Section, Table
from ..report.values import DASH, get, number
from ..utils.files import write_text
from ..viz.plots import Dots, scatter_svg, strip_svg
from ..viz.svg import escape

Row = dict[str, Any]
INTRO = (
    "Every method stops where its four-way accuracy on the dev phrasings of the forget facts comes "
    "down to the level named; the first seed chooses the step size that retained best, among the "
    "same few for every method. All other figures are on unseen phrasings, on the checkpoint as "
    "saved and loaded again; q is the real library's quantizer. "
    "Back/gone: prompts whose answer comes to the first rank of four or leaves it, seed by seed, "
    "and the least p of a sign test. Relearnt: four-way accuracy on one "
    "half of the facts once the other is relearnt, worst of three rates; erased: at most 0.40; "
    "cad: the verdict of mansu cad. Mean "
    "\N{PLUS-MINUS SIGN} standard deviation over seeds; chance is 0.25."
)


def spread(values: Sequence[Any], digits: int = 3, scale: float = 1.0, sign: str = "") -> str:
    """Mean and standard deviation of what is a number; a dash if nothing is. ``sign``: "+" shows it
    on a positive mean, too."""
    found = [scale * v for v in map(number, values) if v is not None]
    if not found:
        return DASH
    mean = f"{statistics.mean(found):{sign}.{digits}f}"
    return mean if len(found) < 2 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def _met(rows: Sequence[Row], key: str) -> str:
    known = [r[key] for r in rows if r.get(key) is not None]
    return f"{sum(known)}/{len(rows)}" if known else f"?/{len(rows)}"


def _words(rows: Sequence[Row], key: str) -> str:
    return ", ".join(dict.fromkeys(str(r[key]) for r in rows if r.get(key))) or DASH


def _flips(rows: Sequence[Row]) -> str:
    """Seed by seed, the prompts that came back and went, and the least p of a sign test."""
    known = [r for r in rows if r.get("p") is not None]
    if not known:
        return DASH
    counts = ", ".join(f"{r['back']}/{r['gone']}" for r in known)
    return f"{counts} (p {min(r['p'] for r in known):.2f})"


def _groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    out: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        out.setdefault(tuple(row[k] for k in keys), []).append(row)
    return out


def _tables(rows: Sequence[Row], quantizer: str) -> list[Block]:
    """What was forgotten, which of the four properties hold, and why, one line per method."""
    methods = _groups(rows, "method")
    outcome: dict[str, Callable[[list[Row]], str]] = {
        "step": lambda g: "/".join(dict.fromkeys(f"{r['lr']:.1e}" for r in g)),
        "at level": lambda g: _met(g, "reached"),
        "forget": lambda g: spread([r["forget_choice"] for r in g]),
        "forget q": lambda g: spread([r["forget_choice_q"] for r in g]),
        "top-1": lambda g: spread([r["forget_top1"] for r in g]),
        "top-1 q": lambda g: spread([r["forget_top1_q"] for r in g]),
        "gap": lambda g: spread([r["gap_choice"] for r in g]),
        "gap top-1": lambda g: spread([r["gap_top1"] for r in g]),
        "back/gone": _flips,
    }
    properties: dict[str, Callable[[list[Row]], str]] = {
        "retain margin": lambda g: spread([r["retain_margin"] for r in g]),
        "forgets": lambda g: _met(g, "forgets"),
        "retains": lambda g: _met(g, "retains"),
        "gap <= 0": lambda g: _met(g, "stays"),
        "relearnt": lambda g: spread([r["relearnt_choice"] for r in g]),
        "erased": lambda g: _met(g, "erased"),
        "cad": lambda g: _words(g, "cad"),
    }
    reason: dict[str, Callable[[list[Row]], str]] = {
        "edited %": lambda g: spread([r["edited_share"] for r in g], 2, 100),
        "codes changed %": lambda g: spread([r["codes_changed"] for r in g], 1, 100),
        "other codes changed": lambda g: spread([r["collateral"] for r in g], 0),
        "update / bin": lambda g: spread([r["update_over_bin"] for r in g]),
        "projection": lambda g: spread([r["projection"] for r in g]),
        "noise / signal": lambda g: spread([r["noise_over_signal"] for r in g], 2),
        "steps": lambda g: spread([r["steps"] for r in g], 0),
        "seconds": lambda g: spread([r["seconds"] for r in g], 1),
        "GB": lambda g: spread([r["peak_gb"] for r in g], 2),
    }
    out: list[Block] = []
    for columns in (outcome, properties, reason):
        lines: list[list[str]] = []
        for (method,), group in methods.items():
            if any("error" in r for r in group):
                lines.append([method, f"failed: {group[0]['error']}", *[DASH] * (len(columns) - 1)])
            else:
                lines.append([method, *(f(group) for f in columns.values())])
        head = [c[:-1] + quantizer if c.endswith(" q") else c for c in columns]
        out.append(Table(["method", *head], lines))
    return out


def _pictures(rows: Sequence[Row], quantizer: str) -> list[Block]:
    good = [r for r in rows if "error" not in r]
    methods = _groups(good, "method")

    def dots(key: str) -> list[Dots]:
        return [
            Dots(m, [number(r[key]) or 0.0 for r in g], m.startswith("mansu"))
            for (m,), g in methods.items()
        ]

    if not good:
        return []
    charts = [
        strip_svg(dots("forget_choice"), "four-way forget accuracy, unseen phrasings", target=0.35),
        strip_svg(dots("retain_margin"), "margin of the worst retained score", target=0.0),
        strip_svg(
            dots("gap_choice"), f"four-way forget accuracy, {quantizer} minus full", target=0.0
        ),
        strip_svg(
            dots("update_over_bin"), f"update RMS / {quantizer} bin width", target=1.0, log=True
        ),
        scatter_svg(
            list(zip(dots("update_over_bin"), dots("gap_top1"), strict=True)),
            f"update RMS / {quantizer} bin width",
            "forget top-1: gap",
            log_x=True,
        ),
    ]
    return [Picture(svg) for svg in charts]


def scoreboard(rows: Sequence[Row]) -> list[Section]:
    """One section per model, task, level and quantizer."""
    out = []
    for (model, task, level, q), group in _groups(
        rows, "model", "task", "level", "quantizer"
    ).items():
        first = next((r for r in group if "error" not in r), {})
        seeds = ", ".join(map(str, dict.fromkeys(r["seed"] for r in group)))
        told = (
            f"Level {level:g}; seeds {seeds}; {get(first, 'prompts')} forget prompts a seed. The "
            f"original scores {number(get(first, 'forget_choice_original')) or 0:.3f} four-way and "
            f"{number(get(first, 'forget_choice_original_q')) or 0:.3f} after {q}."
        )
        blocks: list[Block] = [told, *_tables(group, q), *_pictures(group, q)]
        out.append(Section(f"{model}, {task}, level {level:g}, {q}", blocks))
    return out


def as_csv(rows: Sequence[Row]) -> str:
    """The tidy table; what a row lacks stays empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(k for row in rows for k in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_scoreboard(folder: Path, rows: Sequence[Row]) -> None:
    """Write ``table.csv``, ``scoreboard.md`` and ``scoreboard.html``, each whole or not at all."""
    folder, sections = Path(folder), scoreboard(rows)
    markdown = ["# Scoreboard", _md(INTRO)]
    body = ["<h1>Scoreboard</h1>", f'<p class="soft">{escape(INTRO)}</p>']
    for section in sections:
        markdown += [f"## {section.title}"]
        markdown += [text for b in section.blocks if (text := _md_block(b))]
        blocks = "\n".join(_html_block(b) for b in section.blocks)
        body.append(f"<section>\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>")
    write_text(folder / "table.csv", as_csv(rows))
    write_text(folder / "scoreboard.md", "\n\n".join(markdown) + "\n")
    write_text(folder / "scoreboard.html", page("Scoreboard", body))
