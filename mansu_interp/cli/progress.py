"""Progress on the terminal: a bar per stage with the time left; plain lines where there is none."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from ..errors import printable


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s or 2 h 04 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return (
        f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
    )


class TimeLeft(ProgressColumn):
    """The time left, while there is some: nothing of what is done, or of unknown length."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """``12 s left``, or nothing."""
        left = task.time_remaining
        return Text(f"{duration(left)} left" if left and not task.finished else "")


class Progress:
    """Shows stages on standard error: a bar each on a terminal, elsewhere lines. A clock of its own
    shows that a stage goes on, however long it says nothing."""

    OFTEN, SELDOM, FLOOD = 2.4, 60.0, 240
    """Seconds between the lines of a stage: for the first ten minutes, and at most, once it has
    taken four hours. Each line then comes when a `FLOOD`-th of the stage so far has passed, so that
    logs stay short."""
    EARLY = 0.9
    """Seconds after which a stage of unknown length is told: what fails at once is one line."""

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
                TimeLeft(),
                console=self.console,
            )
        self.stage, self.done, self.total, self.told = "", 0, 0, True
        self.found = 0
        """What of the stage was done before it was begun here: where a killed one goes on."""
        self.printed = self.start = time.monotonic()
        self.bar = TaskID(0)
        self.closed, self.lock = threading.Event(), threading.Lock()
        if not quiet and not self.bars:  # bars refresh by themselves
            threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that a stage is at ``done`` of ``total`` (0 = unknown)."""
        if self.quiet:
            return
        stage = printable(stage)
        with self.lock:
            if stage != self.stage:
                self._begin(stage, total)
                self.found = done
            self.done, self.total = done, total
            if self.bars:
                self.bars.update(self.bar, completed=done, total=total or None)
        self.beat()

    def _begin(self, stage: str, total: int) -> None:
        self.stage, self.done = stage, 0
        self.start = time.monotonic()
        if self.bars:
            self.bars.start()
            self._finish()
            self.bar = self.bars.add_task(stage, total=total or None)
        self.told = False
        if not self.bars and total:
            self._tell()

    def _tell(self) -> None:
        self.told, self.printed = True, time.monotonic()
        self.console.print(f"{self.stage} ...")

    def beat(self) -> None:
        """A line where there are no bars, if the last one is some time ago."""
        with self.lock:
            now = time.monotonic()
            spent = now - self.start
            wait = min(max(self.OFTEN, spent / self.FLOOD), self.SELDOM)
            if self.bars or not self.stage:
                return
            if not self.told:
                if spent > self.EARLY or now - self.printed >= wait:
                    self._tell()
                return
            if now - self.printed < wait:
                return
            self.printed = now
            done, total = self.done, self.total
            here = done - self.found
            left = (
                f", {duration(spent / here * (total - done))} left" if here and done < total else ""
            )
            count = f"  {done}/{total}" if total else f"  {done}" if done else ""
            self.console.print(f"{self.stage}{count}  {duration(spent)}{left}")

    def _watch(self) -> None:
        while not self.closed.wait(0.5):
            self.beat()

    def _finish(self) -> None:
        """End the bar of the stage before, whose total may not have been known."""
        if self.bars and self.bars.tasks:
            last = self.bars.tasks[-1]
            self.bars.update(last.id, total=last.completed)

    def close(self) -> None:
        """Leave the bars as they are."""
        self.closed.set()
        if self.bars:
            self._finish()
            self.bars.stop()


@contextlib.contextmanager
def stages(first: str, quiet: bool = False) -> Iterator[Progress]:
    """Progress of a command, from before it imports what takes seconds.

    Arguments:
        first: the first stage, of unknown length.
        quiet: show nothing.
    """
    progress = Progress(quiet)
    progress(first, 0, 0)
    try:
        yield progress
    finally:
        progress.close()
