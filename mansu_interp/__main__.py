"""``mansu`` and ``python -m mansu_interp``: the process around the command, which Ctrl-C and a
polite `kill` end."""

import locale
import os
import signal
import sys
import threading
import time
from types import FrameType

BURST = 2.0
"""Seconds within which further signals are the same one: the first is still being answered."""

SOON = 0.02
"""Seconds after which it is tried again where it cannot be answered."""

DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What answers a signal where nobody has chosen otherwise, as a shell does for background jobs."""


class _Interrupt:
    """What Ctrl-C and `kill` do: nothing half-written is left."""

    last = -BURST

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.last < BURST:
            return
        while frame and frame.f_code.co_name != "__del__":
            frame = frame.f_back
        if frame:  # Python swallows what is raised there
            threading.Timer(SOON, _again, [signum]).start()
            return
        self.last = now
        raise KeyboardInterrupt


def _again(signum: int) -> None:
    """Send a signal to the main thread, which may sleep."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signum)
    else:  # Windows
        signal.raise_signal(signum)


def _use_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale knows few letters: torch and others read
    files of their own in the locale's encoding. What is printed stays in that one."""
    few = locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8")
    if few and os.name == "posix" and os.environ.get("PYTHONUTF8") != "1":
        printed = f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace"
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", printed)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> int:
    """Run the command; returns its exit status."""
    _use_utf8()
    interrupt = _Interrupt()
    for signum, default in DEFAULTS.items():
        if signal.getsignal(signum) is default:
            signal.signal(signum, interrupt)
    try:
        from .cli.main import main as command

        return command()
    except KeyboardInterrupt:  # before the command was there to say so
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
