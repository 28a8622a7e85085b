"""Self-contained pages: the widget's own module and its data, inlined under a strict policy.

The content security policy allows the page's one script, by its hash, and nothing from anywhere.
Data travels as JSON in a script element that is never executed, with every ``<`` escaped, so that
no text can end it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path

from ..utils.files import finite
from .data import GraphData
from .svg import escape, view_svg

_MOUNT = """
for (const el of document.querySelectorAll("[data-mansu-graph]")) {
  try {
    const name = el.dataset.mansuGraph;
    const data = JSON.parse(document.getElementById(name).textContent);
    const view = mount(el, data, null, name);
    if (view) (window.mansuViews ??= []).push(view);
  } catch (error) {
    el.textContent = `This graph cannot be drawn: ${error.message}`;
  }
}
"""
_CSS = """:root{color-scheme:light dark}
body{margin:0;padding:20px;background:#fcfcfa;font:16px system-ui,sans-serif}
@media (prefers-color-scheme:dark){body{background:#15191d}}
main{max-width:1500px;margin:0 auto}@media (max-width:600px){body{padding:8px}}"""


def module_source() -> str:
    """The ES module that widget and pages share."""
    parts = (Path(__file__).parent / name for name in ("panels.js", "graph.js"))
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)


@cache
def page_script() -> str:
    """The text of a page's only script."""
    return module_source() + _MOUNT


def policy(script: bool = True) -> str:
    """The content security policy of a page, with or without the graph's script."""
    digest = base64.b64encode(hashlib.sha256(page_script().encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; " if script else ""
    return (
        f"default-src 'none'; {allowed}style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )


def script_element() -> str:
    """The script, once per page, after every `graph_element`."""
    return f'<script type="module">{page_script()}</script>'


def graph_element(data: GraphData, name: str = "graph") -> str:
    """A graph's place and data; shows the static picture where scripts do not run."""
    text = json.dumps(
        finite(data.to_json()), separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return (
        f'<div data-mansu-graph="{escape(name)}"><noscript>{view_svg(data)}</noscript></div>'
        f'<script type="application/json" id="{escape(name)}">{text}</script>'
    )


def graph_page(data: GraphData) -> str:
    """One view as a whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>"
        f"{graph_element(data)}</main>\n{script_element()}\n</body>\n</html>\n"
    )
