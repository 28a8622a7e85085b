"""Progress on the terminal: a bar per stage with the time left; plain lines where there is none."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from ..errors import printable


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s or 2 h 04 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return (
        f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
    )


class Progress:
    """Shows stages on standard error: a bar each on a terminal; elsewhere a line per stage, and one
    per minute of it."""

    EVERY = 60.0

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.bars: Bars | None = None
        if self.console.is_terminal and not quiet:
            self.bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
        self.stage, self.start = "", time.monotonic()
        self.printed = self.start
        self.bar = TaskID(0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that a stage is at ``done`` of ``total`` (0 = unknown)."""
        if self.quiet:
            return
        now, stage = time.monotonic(), printable(stage)
        if stage != self.stage:
            self.stage, self.start, self.printed = stage, now, now
            if self.bars:
                self.bars.start()
                self._finish()
                self.bar = self.bars.add_task(stage, total=total or None)
            else:
                self.console.print(f"{stage} ...")
        if self.bars:
            self.bars.update(self.bar, completed=done, total=total or None)
        elif now - self.printed >= self.EVERY:
            self.printed = now
            spent = now - self.start
            left = f", {duration(spent / done * (total - done))} left" if total and done else ""
            count = f"{done}/{total}" if total else f"{done}"
            self.console.print(f"{stage}  {count}  {duration(spent)}{left}")

    def _finish(self) -> None:
        """End the bar of the stage before, whose total may not have been known."""
        if self.bars and self.bars.tasks:
            last = self.bars.tasks[-1]
            self.bars.update(last.id, total=last.completed)

    def close(self) -> None:
        """Leave the bars as they are."""
        if self.bars:
            self._finish()
            self.bars.stop()
