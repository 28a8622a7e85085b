"""The report of a run. ``report.json`` is the truth; Markdown and HTML are rendered from it only.

All renderings walk the same list of sections, so they cannot tell different stories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.files import write_json, write_text
from .card import model_card
from .html import render_html
from .markdown import render_markdown
from .terminal import console_summary

__all__ = ["console_summary", "model_card", "render_html", "render_markdown", "write_report"]


def write_report(folder: Path, report: dict[str, Any], svg: str) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``, each whole or not at all."""
    folder = Path(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report, svg))
