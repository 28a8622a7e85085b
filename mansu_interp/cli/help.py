"""Short help: of a command with many settings, --help shows a few and --help-all the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import TypeVar, cast, get_type_hints

from tyro.conf import Suppress

from ..unlearning.methods import Mansu, MethodConfig
from ..utils.records import Record

Settings = TypeVar("Settings", bound=Record)
HELP_ALL = "--help-all"
RUN = (
    "model", "task", "method", "out", "seed", "quantizers", "relearn_steps", "device",
)  # fmt: skip
"""Shown of ``run`` with every method."""
MANSU = ("robust", "budget", "unlearn.steps", "unlearn.lr", "unlearn.survive")
"""And with MANSU."""
SHARED = ("batch_size", "stop_at")
"""Not shown with a baseline, whose other settings are few."""
BENCH = (
    "models", "tasks", "methods", "quantizers", "survive", "seeds", "levels", "strengths", "steps",
    "jobs", "out",
)  # fmt: skip
"""Shown of ``bench``."""


def shown_of_run(method: MethodConfig) -> tuple[str, ...]:
    """The settings of ``run`` that its short help shows."""
    if isinstance(method, Mansu):
        return RUN + MANSU
    return (*RUN, *(f"unlearn.{f.name}" for f in fields(method) if f.name not in SHARED))


def shortened(default: Settings, shown: Collection[str], inside: str = "") -> Settings:
    """The same settings, of a class whose help shows a few of them alone. For help only: what is
    not shown cannot be parsed.

    Arguments:
        default: the settings, a dataclass.
        shown: names of those to show, such as ``unlearn.lr``.
        inside: prefix of the names in nested settings.
    """
    kind = type(default)
    hints = get_type_hints(kind, include_extras=True)
    annotations: dict[str, object] = {}
    values: dict[str, object] = {}
    body: dict[str, object] = {"__annotations__": annotations, "__module__": kind.__module__}
    for item in fields(kind):
        name, value = f"{inside}{item.name}", getattr(default, item.name)
        nested = isinstance(value, Record) and any(s.startswith(f"{name}.") for s in shown)
        if nested:
            value = shortened(value, shown, f"{name}.")
            annotations[item.name] = type(value)
        else:
            hint = hints[item.name]
            annotations[item.name] = hint if name in shown else Suppress[hint]
        body[item.name] = field(default_factory=lambda v=value: v)
        values[item.name] = value
    shorter = dataclass(frozen=True)(type(kind.__name__, (kind,), body))
    return cast(Settings, shorter(**values))
