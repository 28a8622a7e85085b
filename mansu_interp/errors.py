"""The errors of this package: one base class, one subclass per kind of input.

Every message says what was given, what was expected and what to do.
"""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control characters but tab and line end, halves of surrogate pairs, and what hides text or turns
its direction; joiners, which some scripts need, are left."""


def printable(text: str) -> str:
    """Text of anybody's for a terminal, log or message: what could steer it is shown escaped."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


class MansuError(Exception):
    """Base class: catching it catches everything this package raises on purpose.

    Its text is `printable`, whatever names, fields or paths of strangers stand in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ModelError(MansuError, ValueError):
    """A model is unknown, unreachable, packed to 4 bits, or of an unsupported shape."""


class TaskError(MansuError, ValueError):
    """A task, fact table or prompt pair is malformed."""


class CircuitError(MansuError, ValueError):
    """A circuit or attribution request is malformed, or does not fit the model."""


class ViewError(MansuError, ValueError):
    """A picture or widget cannot be made: a package is missing, or it is asked for nonsense."""


class MaskError(MansuError, ValueError):
    """A mask is malformed, empty, or does not fit the model."""


class ConfigError(MansuError):
    """A setting is out of range or unknown.

    Not a ValueError: the command-line parser would swallow it and print its own text around it.
    """


class ArtifactError(MansuError, ValueError):
    """A file that a run wrote is missing, damaged, or belongs to something else."""


class ResourceError(MansuError):
    """Disk, memory or the output folder is not to be had: nothing is wrong with the input."""
