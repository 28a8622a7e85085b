"""Every annotation of the package is checked at run time in the tests, shapes of tensors included.

`conftest` imports this before the package. It is what ``--jaxtyping-packages`` of jaxtyping's own
pytest plugin does. Processes that tests start are not checked, nor are those with MANSU_UNCHECKED
in their environment: `test_unchecked` runs there what gives arguments of a wrong type, which the
checker would refuse before the package's own check sees them.
"""

from __future__ import annotations

import os

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

numbers = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""The checker; a whole number may stand for a float, as PEP 484 says."""
UNCHECKED = "MANSU_UNCHECKED" in os.environ
if not UNCHECKED:
    install_import_hook("mansu_interp", "checked.numbers")

wrong_type = pytest.mark.wrong_type
