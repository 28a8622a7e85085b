"""The console: all that the commands print goes through here.

Texts are `printable`, whoever wrote them. A console that cannot show a letter gets it escaped; one
that is closed gets nothing; one that is full is one clear error.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec

from ..errors import ResourceError, printable
from ..utils.files import finite

P = ParamSpec("P")


def prepare() -> None:
    """Make standard output and error ready for any text, also where they are closed or know few
    letters."""
    with contextlib.suppress(OSError):
        while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
            pass  # a closed 0 to 2 would become the number of a file that is opened later
        os.close(opened)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "", end: str = "\n", flush: bool = False) -> None:
    """Print a text on standard output.

    Raises:
        ResourceError: it cannot be written; `BrokenPipeError` where nobody reads any more.
    """
    with writing():
        print(printable(text), end=end, flush=flush)


def say_json(value: object) -> None:
    """Print a value as JSON, in letters that every console knows."""
    with writing():
        print(json.dumps(finite(value), indent=1, allow_nan=False).replace("\x7f", "\\u007f"))


def warn(text: str) -> None:
    """Print a text on standard error, if it can be."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        give_up("stderr")


def keeps_nothing(command: Callable[P, int]) -> Callable[P, int]:
    """Decorates a command that begins anew where it is interrupted, and says so."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            warn("\nmansu: interrupted; nothing is kept, and the same command begins anew.")
            return 130

    return run


def finish() -> None:
    """Hand on what was printed so far; errors as of `say`."""
    with writing():
        sys.stdout.flush()


def give_up(name: str) -> None:
    """Let what else is printed on a stream go nowhere, also what Python still holds of it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, getattr(sys, name).fileno())
        os.close(nowhere)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn what the system says of standard output into one clear error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up("stdout")
        why = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno or 0)
        raise ResourceError(
            f"The output cannot be written: {why}. What the command wrote to files is whole; name "
            "another place for the output and run it again."
        ) from error


@dataclass(frozen=True)
class Output:
    """How results are printed; may stand anywhere on the command line."""

    quiet: bool = False
    """``--quiet``: nothing but the result."""
    json: bool = False
    """``--json``: the result as one JSON value on standard output."""

    @classmethod
    def split(cls, argv: list[str]) -> tuple[Output, list[str]]:
        """These two options, and the rest of the command line."""
        rest = [word for word in argv if word not in ("--quiet", "--json")]
        return cls("--quiet" in argv, "--json" in argv), rest
