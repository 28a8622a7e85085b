"""Progress on the terminal."""

from __future__ import annotations

import shutil
import sys
import time


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s or 2 h 04 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return (
        f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
    )


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line per stage and per minute of it."""

    EVERY = 60.0

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self.stage, self.start = "", time.monotonic()
        self.said = self.start

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that a stage is at ``done`` of ``total`` (0 = unknown)."""
        if self.quiet:
            return
        now = time.monotonic()
        if stage != self.stage:
            self.close()
            self.stage, self.start, self.said = stage, now, now
            if not self.live:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        spent = now - self.start
        left = f", {duration(spent / done * (total - done))} left" if total and done else ""
        count = f"{done}/{total}" if total else f"{done}"
        line = f"{stage}  {count}  {duration(spent)}{left}"
        if not self.live and now - self.said >= self.EVERY:
            self.said = now
            print(line, file=sys.stderr, flush=True)
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the current line."""
        if self.live and self.stage:
            print(file=sys.stderr)
