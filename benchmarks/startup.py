"""Start-up time: importing the package and ``mansu --help``, against a bare interpreter.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time

RUNS = 10


def fastest(*args: str) -> float:
    """Shortest wall time of several runs in seconds."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *args], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print both times and their ratio to a bare interpreter."""
    bare = fastest("-c", "pass")
    for label, args in (
        ("import mansu_interp", ("-c", "import mansu_interp")),
        ("mansu --help", ("-m", "mansu_interp", "--help")),
    ):
        seconds = fastest(*args)
        print(f"{label}: {seconds - bare:.3f} s more than a bare start, {seconds / bare:.1f} x")


if __name__ == "__main__":
    main()
