"""Every annotation of the package is checked at run time in the tests, shapes of tensors included.

`conftest` imports this before the package. It is what ``--jaxtyping-packages`` of jaxtyping's own
pytest plugin does; processes that tests start are not checked.
"""

from __future__ import annotations

import sys

import pytest
from jaxtyping import install_import_hook

ROOMS = ("errors", "utils", "models", "tasks", "losses", "quantizers", "masks", "export")
"""Whose annotations hold so far; in the end ``mansu_interp`` alone, which is all of them."""

install_import_hook([f"mansu_interp.{room}" for room in ROOMS], "beartype.beartype")

CHECKED = any(word.startswith("--jaxtyping-packages") for word in sys.argv)
wrong_type = pytest.mark.skipif(CHECKED, reason="a wrong type, refused by the checker itself")
