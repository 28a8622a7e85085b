"""The report as Markdown."""

from __future__ import annotations

import re
from typing import Any

from .story import CARD_NUMBERS, Block, Cards, Code, Graph, Picture, Table, heading, sections
from .values import get, measured, status_of, text_of


def _md(text: Any) -> str:
    """Text on one line in which nothing is markup."""
    line = " ⏎ ".join(str(text).strip().splitlines())
    line = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _md_table(table: Table) -> str:
    spans = [group for group, width in table.groups for _ in range(width)]
    head = [
        f"{name} ({spans[i]})" if spans and spans[i] and name != "chance" else name
        for i, name in enumerate(table.head)
    ]
    rule = ["---" if i < table.words else "---:" for i in range(len(head))]
    lines = [[_md(h) for h in head], rule]
    for row in table.rows:
        if isinstance(row, str):
            lines.append([f"**{_md(row)}**", *[""] * (len(head) - 1)])
        else:
            lines.append([_md(cell) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md_block(block: Block) -> str:
    if isinstance(block, Picture):
        return _md_table(block.instead) if block.instead else ""
    if isinstance(block, Graph):
        return _md_table(block.instead)
    if isinstance(block, Table):
        return _md_table(block)
    if isinstance(block, Code):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        title = f"{_md(block.folded)}:\n\n" if block.folded else ""
        return f"{title}{fence}\n{block.text}\n{fence}"
    if isinstance(block, Cards):
        rows = []
        for item in block.properties:
            word, icon = status_of(get(item, "passed"))
            row = [text_of(get(item, "name")), f"{icon} {word}", text_of(get(item, "unit"))]
            row += [measured(get(item, k), k == "margin") for k in CARD_NUMBERS]
            rows.append([*row, text_of(get(item, "sentence"))])
        head = ["property", "result", "measured", *CARD_NUMBERS, "meaning"]
        return _md_table(Table(head, rows, words=len(head)))
    return _md(block)


def render_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown (GitHub's tables)."""
    title, subtitle, word, sentence = heading(report)
    parts = [f"# {_md(title)}", f"**{word.capitalize()}.** {_md(sentence)}", _md(subtitle)]
    for section in sections(report):
        parts.append(f"## {section.title}")
        parts += [text for block in section.blocks if (text := _md_block(block))]
    return "\n\n".join(parts) + "\n"
