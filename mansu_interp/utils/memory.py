"""Running out of memory, told in one line with what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import ResourceError

_SAID = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or the system means that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(s in str(error) for s in _SAID)
    )


@contextlib.contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into one clear error.

    Arguments:
        doing: what the memory was for, after "while".
        advice: what takes less, as sentences.

    Raises:
        ResourceError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"Out of memory while {doing}. {advice} What was finished before is kept."
        ) from error
