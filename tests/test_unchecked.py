"""Arguments of a wrong type meet the package's own errors where no annotation is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_wrong_types_are_told_by_the_package():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "wrong_type"],
        cwd=TESTS,
        env={**os.environ, "MANSU_UNCHECKED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
