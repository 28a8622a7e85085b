"""Records, which are trees of dataclasses, as JSON; and back, with every field checked.

What is read may come from anybody: a value of another type, a missing field or a number that no
figure has is refused with one clear error, so that nothing that reads a record tolerates less.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import Field, asdict
from functools import cache
from types import GenericAlias
from typing import ClassVar, Protocol, TypeVar, cast, runtime_checkable

from ..errors import ArtifactError
from .files import Json, finite

LARGEST = 1e100
"""No number of a record is larger; with room to add and square."""
T = TypeVar("T")


@runtime_checkable
class Record(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


@runtime_checkable
class Keep(Protocol):
    """Gives back a record that was kept, or makes it and keeps it."""

    def __call__(self, key: str, kind: type[T], make: Callable[[], T]) -> T:
        """The record of a key.

        Arguments:
            key: what it is of; the same in every go.
            kind: its dataclass.
            make: called if none was kept.
        """
        ...


def make_anew(key: str, kind: type[T], make: Callable[[], T]) -> T:
    """A `Keep` that keeps nothing."""
    return make()


def to_json(record: Record) -> dict[str, Json]:
    """A record as JSON values: fields in their order, null for what is not finite."""
    return finite(asdict(record))


def from_json(kind: type[T] | GenericAlias, data: object, where: str) -> T:
    """A record from JSON values.

    Arguments:
        kind: its dataclass; the types of its fields say what is accepted. Further fields are
            ignored.
        data: what `read_json` returned.
        where: what the data are called in the message, such as the file's path.

    Raises:
        ArtifactError: a field is missing or of another type, or a number is too large.
    """
    from pydantic import ValidationError

    try:
        _check_numbers(data, "it")
        return cast(T, _adapter(kind).validate_json(json.dumps(data), strict=True))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        at, more = ".".join(map(str, problems[0]["loc"])) or "it", len(problems) - 1
        why = f"{_shown(at)}: {problems[0]['msg']}{f' (and {more} more)' if more else ''}"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise ArtifactError(f"{where} does not hold what it should: {why}.")


@cache
def _adapter(kind: type[T] | GenericAlias):  # the return type is not imported before it is needed
    """What pydantic makes of a dataclass; it takes a while."""
    from pydantic import TypeAdapter

    return TypeAdapter(cast(type, kind))


def _check_numbers(value: object, at: str) -> None:
    """Raise ValueError over a number that is not finite or too large."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, at)
    elif isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        raise ValueError(f"{_shown(at)} holds a number beyond {LARGEST:g}")


def _shown(text: str) -> str:
    """A text of a file for a message: short, and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])
