"""Other people's packages: the optional ones, their chatter, and their errors.

Running out of memory is one of these, told in one line with what helps.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

from ..errors import ConfigError, MansuError, ResourceError
from .shipped import ENGINES

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
)


def library(
    name: str,
    extra: str,
    what: str = "This quantizer",
    kind: type[MansuError] = ConfigError,
    without: str = "",
) -> ModuleType:
    """Import an optional package.

    Arguments:
        name: of the module.
        extra: of this package's extras, which installs it; empty: it comes with this package.
        what: what needs it, as the beginning of a sentence.
        kind: the error to raise.
        without: what works without it, as a sentence.

    Raises:
        MansuError: it is not installed; names the line that installs it.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        package = f'"mansu-interp[{extra}]"' if extra else name.partition(".")[0]
        raise kind(
            f"{what} needs the package {name.partition('.')[0]}, which cannot be imported "
            f"({error}). Install it: pip install {package}. {without}".strip()
        ) from error


def gguf_lacks(kind: str = "f16") -> str:
    """The line that installs what a GGUF file of a type needs and is not here; empty if nothing.
    Looked up, not imported.

    Arguments:
        kind: ``f16``, or a format of llama.cpp by its name there, in small letters.
    """
    fitted = kind in ENGINES["llama.cpp"].fitted
    packages, extra = (("gguf", "xllamacpp"), "llama-cpp") if fitted else (("gguf",), "gguf")
    missing = any(find_spec(name) is None for name in packages)
    return f'pip install "mansu-interp[{extra}]"' if missing else ""


def check_gguf(kind: str) -> None:
    """Before long work.

    Raises:
        ConfigError: a package that a GGUF file of this type needs is missing.
    """
    if not (install := gguf_lacks(kind)):
        return
    if kind in ENGINES["llama.cpp"].fitted:
        raise ConfigError(f"GGUF files of type {kind}, by llama.cpp's own code, need: {install}.")
    raise ConfigError(
        f"GGUF files need: {install}. Of {', '.join(ENGINES['llama.cpp'].fitted)}, by llama.cpp's "
        'own code: pip install "mansu-interp[llama-cpp]".'
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and notices of the libraries below off the user's screen."""
    from transformers.utils import logging as hf_logging

    previous, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    root = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(root)
        hf_logging.set_verbosity(previous)
        if bars:
            hf_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or the system means that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(s in str(error) for s in _OUT_OF_MEMORY)
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
