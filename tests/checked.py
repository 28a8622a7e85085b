"""Whether this run checks types and shapes at run time (``--jaxtyping-packages``).

Arguments of a wrong type are then refused before the package's own check sees them.
"""

from __future__ import annotations

import sys

import pytest

CHECKED = any(word.startswith("--jaxtyping-packages") for word in sys.argv)
wrong_type = pytest.mark.skipif(CHECKED, reason="a wrong type, refused by the checker itself")
