"""A summary for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from .story import METRICS, against, heading
from .values import (
    DASH,
    count,
    deepened,
    get,
    items,
    measured,
    number,
    pairs,
    parted,
    percent,
    status_of,
    text_of,
)


def _role_means(report: Mapping[str, Any]) -> list[list[str]]:
    """A row a model under a row of roles: scores averaged over all the role's facts."""
    entries = items(get(report, "scores"))
    roles = list(dict.fromkeys(text_of(get(e, "role")) for e in entries))[:3]
    rows = [["", *roles]]
    for model in dict.fromkeys(m for e in entries for m, _ in pairs(get(e, "models"))):
        cells = []
        for role in roles:
            members = [e for e in entries if text_of(get(e, "role")) == role]
            means = []
            for key in METRICS:
                got = [
                    (number(get(e, "n")) or 1.0, v)
                    for e in members
                    if (v := number(get(e, "models", model, key))) is not None
                ]
                total = sum(n for n, _ in got)
                means.append(percent(sum(n * v for n, v in got) / total) if got else DASH)
            cells.append(" / ".join(means))
        rows.append([model, *cells])
    return rows


def console_summary(report: dict[str, Any], width: int) -> str:
    """Plain lines for the terminal, none wider than ``width``: some 20, and one for each model.

    Control characters are dropped, so that no prompt can offset_rate the terminal.
    """
    width = max(width, 20)

    def printable(text: str) -> str:
        return "".join(c if c.isprintable() else " " for c in text)

    def lines(text: str, limit: int = 2, indent: str = "") -> list[str]:
        return textwrap.wrap(
            printable(text), width, max_lines=limit, placeholder=" …", subsequent_indent=indent
        )

    title, subtitle, word, sentence = heading(report)
    out = [*lines(f"{word.upper()}  {title} ({subtitle})", 1), *lines(sentence, 3)]
    for item in items(get(report, "properties"))[:4]:
        state = status_of(get(item, "passed"))[0].upper()
        value = measured(get(item, "value"))
        name = text_of(get(item, "name"))
        out += lines(f"{state:<9}  {name}: {value} ({against(item)})", 2, " " * 11)
    scores = _role_means(report)
    if len(scores) > 1:
        out += lines("Scores, top-1 / choice:", 1)
        widths = [max(map(len, column)) for column in zip(*scores, strict=True)]
        fits = sum(widths) + 2 * len(widths) <= width
        for row in scores:
            padded = [c.ljust(w) for c, w in zip(row, widths, strict=True)]
            aligned = printable("  " + "  ".join(padded)).rstrip()
            out += [aligned] if fits else lines("  ".join(row), 2, "  ")
    edit, circuit = get(report, "edit"), get(report, "circuit")
    rows = number(get(edit, "embedding"))
    unquantized = f", {count(rows)} are in the embedding, which is not quantized" if rows else ""
    out += lines(
        f"Edit: {count(get(edit, 'edited'))} parameters ({percent(get(edit, 'share'), 3)}), "
        f"{count(get(edit, 'survived'))} survive quantization{unquantized}. "
        f"Circuit: {count(get(circuit, 'edges'))} of {count(get(circuit, 'of'))} edges.",
    )
    if deepened(report):
        out += lines(f"Deepened: {deepened(report)}.", 1)
    if parted(report):
        out += lines(f"Reserve: {parted(report)}.", 1)
    became = pairs(get(report, "graph", "counts"))
    if became:
        out += lines(f"Edges: {', '.join(f'{count(n)} {name}' for name, n in became)}.", 1)
    erasure = get(report, "erasure")
    if get(erasure, "verdict"):
        sure = percent(get(erasure, "confidence"), 0)
        out += lines(f"CAD: {text_of(get(erasure, 'verdict'))} (confidence {sure})", 1)
    return "\n".join(out)
