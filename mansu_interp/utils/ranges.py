"""Settings within their range, or a clear error."""

from __future__ import annotations

import math

from ..errors import ConfigError


def check_range(
    config: object,
    *names: str,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Raise ConfigError unless some settings lie between bounds.

    Arguments:
        config: whose settings are looked at; None counts as not given, and fits.
        names: which ones, each a number or a tuple of numbers; NaN and infinity never fit.
        at_least: lower bound, itself allowed.
        above: lower bound, itself not allowed.
        at_most: upper bound, itself allowed.
        below: upper bound, itself not allowed.
    """
    bounds = (
        ("at least", at_least, lambda v, b: v >= b),
        ("above", above, lambda v, b: v > b),
        ("at most", at_most, lambda v, b: v <= b),
        ("below", below, lambda v, b: v < b),
    )
    given = [(word, bound, fits) for word, bound, fits in bounds if bound is not None]
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if all(_is_finite(v) and all(fits(v, b) for _, b, fits in given) for v in values):
            continue
        words = " and ".join(f"{word} {bound:g}" for word, bound, _ in given) or "finite"
        raise ConfigError(f"{name} must be {words}; got {value}.")


def check_seeds(config: object, *names: str) -> None:
    """Raise ConfigError unless some settings are seeds that every generator takes."""
    check_range(config, *names, at_least=-(1 << 63), below=1 << 63)


def _is_finite(value: float) -> bool:
    """Also of whole numbers that no float is as large as."""
    return isinstance(value, int) or math.isfinite(value)
