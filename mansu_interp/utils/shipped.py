"""What ships with the package: where its data lie, and which models are embedded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"


def is_embedded(model: str) -> bool:
    """Whether a model ships with the package."""
    # Path.exists raises over 255 characters
    return Path(model).name == model and os.path.exists(DATA / "models" / model / "config.json")


def split_names(given: Iterable[str]) -> tuple[str, ...]:
    """Names separated by spaces or commas."""
    return tuple(n for part in given for n in part.replace(",", " ").split())
