"""``mansu`` and ``python -m mansu_interp``: the process around the command, which Ctrl-C ends."""

import signal
import sys
import time
from types import FrameType

BURST = 2.0
"""Seconds within which further Ctrl-C are the same one: the first is still being answered."""


class _Interrupt:
    """What Ctrl-C does."""

    last = -BURST

    def __call__(self, _: int, __: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.last >= BURST:
            self.last = now
            raise KeyboardInterrupt


def main() -> int:
    """Run the command; returns its exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _Interrupt())
    try:
        from .cli.main import main as command

        return command()
    except KeyboardInterrupt:  # before the command was there to say so
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt


if __name__ == "__main__":
    sys.exit(main())
