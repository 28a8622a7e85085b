"""The three files of a report. ``report.json`` is the truth; the others are rendered from it only.

All renderings walk the same list of sections, so they cannot tell different stories.
"""

from __future__ import annotations

from pathlib import Path

from ..utils.files import write_json, write_text
from .html import render_html
from .markdown import render_markdown
from .records import Report


def write_report(folder: Path, report: Report, svg: str) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``, each whole or not at all.

    Arguments:
        folder: where they go.
        report: what a run found.
        svg: the circuit's picture, as it is; empty for none.
    """
    folder = Path(folder)
    write_json(folder / "report.json", report.to_json())
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report, svg))
