"""How values are written: a missing or null one is a dash and never stops a render."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DASH = "–"
MAX = 1e100
"""No figure of a report is larger; with room to add and square."""
_STATUS = {True: ("pass", "✓"), False: ("fail", "✗"), None: ("undecided", "?")}


def get(value: Any, *keys: str) -> Any:
    """A nested value, None where anything on the way is missing or null."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def items(value: Any) -> list[Any]:
    """The non-null entries of a list; none for anything else."""
    return [v for v in value if v is not None] if isinstance(value, (list, tuple)) else []


def pairs(value: Any) -> list[tuple[str, Any]]:
    """The entries of a mapping; none for anything else."""
    return list(value.items()) if isinstance(value, Mapping) else []


def text_of(value: Any) -> str:
    """The value as text, a dash for null."""
    return DASH if value is None else str(value)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= MAX else None


def count(value: Any) -> str:
    """12345 -> 12,345."""
    n = number(value)
    return DASH if n is None else f"{n:,.0f}"


def percent(value: Any, digits: int = 1) -> str:
    """0.1234 -> 12.3%."""
    n = number(value)
    return DASH if n is None else f"{100 * n:.{digits}f}%".replace("-", "−")


def figure(value: Any, digits: int = 3) -> str:
    """A number with this many significant digits and no exponent in the common range."""
    n = number(value)
    if n is None:
        return DASH
    if n and not 1e-4 <= abs(n) < 1e6:
        return f"{n:.{digits - 1}e}".replace("-", "−")
    decimals = digits - 1 - math.floor(math.log10(abs(n))) if n else 2
    return f"{n:,.{max(0, min(decimals, 6))}f}".replace("-", "−")


def measured(value: Any, signed: bool = False) -> str:
    """A score or ratio, with the three decimals that the sentences use."""
    n = number(value)
    return DASH if n is None else f"{n:{'+' if signed else ''}.3f}".replace("-", "−")


def deepened(report: Mapping[str, Any]) -> str:
    """Edits made to final_margin the forgetting, and how far above its target it ended; nothing where it
    was not asked for."""
    made, above = (
        number(get(report, "edit", key)) for key in ("final_margin_edits", "above_target")
    )
    if made is None:
        return ""
    target = figure(0.0 - (number(get(report, "config", "unlearn", "final_margin")) or 0.0), 2)
    return f"{count(made)} edits, {figure(above, 2)} nats above a target of {target}"


def parted(report: Mapping[str, Any]) -> str:
    """Edits made for the quantization_margin, and how much of it they reached; nothing where none was asked."""
    made, reached = (
        number(get(report, "edit", key))
        for key in ("quantization_margin_edits", "quantization_margin_reached")
    )
    if made is None:
        return ""
    asked = figure(get(report, "config", "unlearn", "quantization_margin"), 2)
    return f"{count(made)} edits, {figure(reached, 2)} of {asked} nats"


def status_of(passed: Any) -> tuple[str, str]:
    """Word and icon of pass, fail or undecided."""
    return _STATUS[passed if isinstance(passed, bool) else None]
