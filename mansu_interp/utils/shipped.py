"""What ships with the package: where its data lie, and which models are embedded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError

DATA = Path(__file__).parents[1] / "data"


def is_embedded(model: str) -> bool:
    """Whether a model ships with the package."""
    # Path.exists raises over 255 characters
    return Path(model).name == model and os.path.exists(DATA / "models" / model / "config.json")


def split_names(given: Iterable[str]) -> tuple[str, ...]:
    """Names separated by spaces or commas.

    Raises:
        ConfigError: something else than a list of texts.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"Names: got {given!r:.60}, expected several, such as ('nf4', 'q4_0').")
    parts = tuple(given)
    if odd := [part for part in parts if not isinstance(part, str)]:
        raise ConfigError(f"Names: got {odd[0]!r:.60}, expected texts, such as ('nf4', 'q4_0').")
    return tuple(n for part in parts for n in part.replace(",", " ").split())
