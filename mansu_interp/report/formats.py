"""What a report says of the formats: which were promised, what each makes of the edit."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Table
from .records import QuantizerRow, Report
from .values import count, figure, measured, percent

FULL = "full precision"
MEASURED = "measured"
"""Stands behind a format of which nothing was promised."""


def precision_name(report: Report, quantizer: str | None) -> str:
    """A precision in words: of a format whether it was measured without a promise."""
    if quantizer is None:
        return FULL
    alone = any(row.name == quantizer and not row.promised for row in report.quantizers)
    return f"{quantizer}, {MEASURED}" if alone else quantizer


def worst_format(quantizers: Sequence[QuantizerRow]) -> QuantizerRow:
    """Of the formats that were promised the one that leaves the smallest share of the edits, or
    changes the most other codes; of none that was promised, the first."""

    def order(row: QuantizerRow) -> tuple[float, int]:
        found = row.survival
        return (found.survived / found.edited if found.edited else 1.0), -found.collateral

    return min((row for row in quantizers if row.promised), key=order, default=quantizers[0])


def kept_promise(row: QuantizerRow) -> bool:
    """Whether every edit survives a format, and no other code changes."""
    return row.survival.survived == row.survival.edited and not row.survival.collateral


def quantizer_table(quantizers: Sequence[QuantizerRow]) -> Table:
    """What each quantizer makes of the edit, and of the forget answers."""
    rows = [
        [
            q.name,
            "yes" if q.promised else "trained through" if q.trained_through else "no",
            f"{count(q.survival.survived)} of {count(q.survival.edited)}",
            count(q.survival.collateral),
            measured(q.survival.share_kept),
            percent(q.choice.original),
            percent(q.choice.unlearned),
            measured(q.choice.gap, signed=True),
            percent(q.last and q.last.unlearned),
            f"{count(q.flips.back)} / {count(q.flips.gone)}",
            figure(q.flips.p),
        ]
        for q in quantizers
    ]
    head = ["quantizer", "promised", "of edits", "of others", "kept"]
    head += ["original", "unlearned", "gap", "ranked last", "back / gone", "p"]
    groups = [
        ("", 2),
        ("codes changed", 2),
        ("edit", 1),
        ("four-way forget accuracy", 4),
        ("prompts", 2),
    ]
    return Table(head, rows, words=2, groups=groups)
