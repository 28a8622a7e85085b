"""The three files of a report. ``report.json`` is the truth; the others are rendered from it only.

All renderings walk the same list of sections, so they cannot tell different stories.
"""

from __future__ import annotations

from pathlib import Path

from ..utils.files import json_text, write_text
from .html import render_html
from .markdown import render_markdown
from .records import Report


def report_files(report: Report, svg: str) -> dict[str, str]:
    """What ``report.json``, ``report.md`` and ``report.html`` hold.

    Arguments:
        report: what a run found.
        svg: the circuit's picture, as it is; empty for none.
    """
    return {
        "report.json": json_text(report.to_json()),
        "report.md": render_markdown(report),
        "report.html": render_html(report, svg),
    }


def write_report(folder: Path, report: Report, svg: str) -> None:
    """Write the three files into a folder, each whole or not at all."""
    for name, text in report_files(report, svg).items():
        write_text(Path(folder) / name, text)
