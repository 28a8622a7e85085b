"""Every annotation of the package is checked at run time in the tests, shapes of tensors included.

`conftest` imports this before the package. It is what ``--jaxtyping-packages`` of jaxtyping's own
<<<<<<< HEAD
pytest plugin does. Processes that tests start are not checked, nor are those with MANSU_UNCHECKED
in their environment: `test_unchecked` runs there what gives arguments of a wrong type, which the
checker would refuse before the package's own check sees them.
=======
pytest plugin does; processes that tests start are not checked.
>>>>>>> shapes
"""

from __future__ import annotations

<<<<<<< HEAD
import os

import pytest
from jaxtyping import install_import_hook

UNCHECKED = "MANSU_UNCHECKED" in os.environ
if not UNCHECKED:
    install_import_hook("mansu_interp", "beartype.beartype")

wrong_type = pytest.mark.wrong_type
=======
import sys

import pytest
from jaxtyping import install_import_hook

ROOMS = ("errors", "utils", "models", "tasks", "losses", "quantizers", "masks", "export")
"""Whose annotations hold so far; in the end ``mansu_interp`` alone, which is all of them."""

install_import_hook([f"mansu_interp.{room}" for room in ROOMS], "beartype.beartype")

CHECKED = any(word.startswith("--jaxtyping-packages") for word in sys.argv)
wrong_type = pytest.mark.skipif(CHECKED, reason="a wrong type, refused by the checker itself")
>>>>>>> shapes
