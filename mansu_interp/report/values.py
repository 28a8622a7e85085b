"""How values are written: one that is missing or not finite is a dash."""

from __future__ import annotations

import math

from ..utils.records import LARGEST

DASH = "–"
_STATUS = {True: ("pass", "✓"), False: ("fail", "✗"), None: ("undecided", "?")}


def known(value: float | None) -> float | None:
    """A number that can be written, or None."""
    return value if value is not None and abs(value) <= LARGEST else None  # NaN is not


def count(value: float | None) -> str:
    """12345 -> 12,345."""
    n = known(value)
    return DASH if n is None else f"{n:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 -> 12.3%. Halves are rounded away from 0, so that 0.3125 is the same however it was
    summed (0.31250000000000006, say)."""
    n = known(value)
    if n is None:
        return DASH
    steps = round(abs(100 * n) * 10**digits, 9)
    shown = math.copysign(math.floor(steps + 0.5) / 10**digits, n)
    return f"{shown:.{digits}f}%".replace("-", "−")


def figure(value: float | None, digits: int = 3) -> str:
    """A number with this many significant digits and no exponent in the common range."""
    n = known(value)
    if n is None:
        return DASH
    if n and not 1e-4 <= abs(n) < 1e6:
        return f"{n:.{digits - 1}e}".replace("-", "−")
    decimals = digits - 1 - math.floor(math.log10(abs(n))) if n else 2
    return f"{n:,.{max(0, min(decimals, 6))}f}".replace("-", "−")


def measured(value: float | None, signed: bool = False) -> str:
    """A score or ratio, with the three decimals that the sentences use."""
    n = known(value)
    return DASH if n is None else f"{n:{'+' if signed else ''}.3f}".replace("-", "−")


def status_of(passed: bool | None) -> tuple[str, str]:
    """Word and icon of pass, fail or undecided."""
    return _STATUS[passed]
