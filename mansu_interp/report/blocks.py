"""What a page is made of: every rendering walks the same blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.properties import Property
from ..utils.files import Json


@dataclass(frozen=True)
class Table:
    """A table; a row that is a plain string is a heading across it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str] | str]
    words: int = 1
    """How many leading columns hold words; the others hold numbers."""
    groups: Sequence[tuple[str, int]] = ()
    """Headings above ``head``, each with the number of columns it spans."""
    folded: str = ""
    """Title of the fold that hides it in HTML; empty shows it."""

    @property
    def full_head(self) -> list[str]:
        """``head``, each with the heading above it."""
        spans = [group for group, width in self.groups for _ in range(width)]
        return [
            f"{name} ({spans[i]})" if spans and spans[i] and name != "chance" else name
            for i, name in enumerate(self.head)
        ]

    @property
    def starts(self) -> set[int]:
        """The columns with which groups begin, but the first."""
        out, column = set(), 0
        for _, width in self.groups:
            out.add(column)
            column += width
        return out - {0}


@dataclass(frozen=True)
class Code:
    """Verbatim text."""

    text: str
    folded: str = ""
    """Title of the fold that hides it in HTML; empty shows it."""


@dataclass(frozen=True)
class Picture:
    """An inline SVG, and the table that Markdown shows in its place."""

    svg: str
    instead: Table | None = None


@dataclass(frozen=True)
class Graph:
    """The interactive view of what became of the graph, and the table that stands in its place."""

    data: Mapping[str, Json]
    instead: Table


@dataclass(frozen=True)
class Cards:
    """The properties, as cards or as a table."""

    properties: Sequence[Property]


Block = str | Table | Code | Picture | Graph | Cards


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]
