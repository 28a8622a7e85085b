"""The report as Markdown."""

from __future__ import annotations

import re

from ..errors import printable
from .blocks import Block, Cards, Code, Graph, Picture, Table
from .records import Report
from .story import heading, sections
from .values import measured, status_of


def markdown_text(text: str) -> str:
    """Text on one line in which nothing is markup."""
    line = " ⏎ ".join(printable(part) for part in text.strip().splitlines())
    line = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _table(table: Table) -> str:
    head = table.full_head
    rule = ["---" if i < table.words else "---:" for i in range(len(head))]
    lines = [[markdown_text(h) for h in head], rule]
    for row in table.rows:
        if isinstance(row, str):
            lines.append([f"**{markdown_text(row)}**", *[""] * (len(head) - 1)])
        else:
            lines.append([markdown_text(cell) for cell in row])
    title = f"{markdown_text(table.folded)}:\n\n" if table.folded else ""
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cards(cards: Cards) -> str:
    rows = []
    for item in cards.properties:
        word, icon = status_of(item.passed)
        headroom = measured(item.headroom, signed=True)
        numbers = [measured(item.value), measured(item.target), headroom]
        rows.append([item.name, f"{icon} {word}", item.unit, *numbers, item.sentence])
    head = ["property", "result", "measured", "value", "target", "headroom", "meaning"]
    return _table(Table(head, rows, words=len(head)))


def _code(code: Code) -> str:
    longest = max((len(run) for run in re.findall("`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    title = f"{markdown_text(code.folded)}:\n\n" if code.folded else ""
    return f"{title}{fence}\n{printable(code.text)}\n{fence}"


def markdown_block(block: Block) -> str:
    """A block; empty where Markdown shows nothing."""
    if isinstance(block, Picture):
        return _table(block.instead) if block.instead else ""
    if isinstance(block, Graph):
        return _table(block.instead)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        return _code(block)
    if isinstance(block, Cards):
        return _cards(block)
    return markdown_text(block)


def render_markdown(report: Report) -> str:
    """The report as Markdown (GitHub's tables)."""
    top = heading(report)
    parts = [
        f"# {markdown_text(top.title)}",
        f"**{top.status.capitalize()}.** {markdown_text(top.sentence)}",
        markdown_text(top.subtitle),
    ]
    for section in sections(report):
        parts.append(f"## {section.title}")
        parts += [text for block in section.blocks if (text := markdown_block(block))]
    return "\n\n".join(parts) + "\n"
