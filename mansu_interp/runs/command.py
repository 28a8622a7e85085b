"""The shortest command that makes a run."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace

from ..errors import ConfigError, TaskError
from ..tasks.files import ROBUST
from ..utils.records import Record
from .config import RunConfig
from .defaults import default_config

PLACE = ("out", "threads", "device")
"""Settings of a run that say where and how fast, not what."""


def command_line(config: RunConfig) -> str:
    """The shortest command that makes this run: every setting that is not the task's default, or
    not one of its settings against relearning."""
    method = config.unlearn.method
    usual = default_config(config.model, config.task, method=method)
    try:
        robust = default_config(config.model, config.task, robust=True, method=method)
    except (ConfigError, TaskError):
        robust = usual
    plain, short = _options(config, usual), [f"--{ROBUST}", *_options(config, robust)]
    chosen = [] if method == RunConfig().unlearn.method else ["--method", method]
    return shlex.join(["mansu", "run", *chosen, *(short if len(short) < len(plain) else plain)])


def _options(config: RunConfig, usual: RunConfig) -> list[str]:
    """The options that lead from some settings to others."""
    words: list[str] = []

    def add(prefix: str, given: Record, usual: Record) -> None:
        for item in fields(given):
            value, default = getattr(given, item.name), getattr(usual, item.name)
            name = f"{prefix}{item.name}".replace("_", "-")
            if isinstance(value, Record):
                add(f"{prefix}{item.name}.", value, default)
            elif (value != default or item.name == "model") and item.name not in PLACE:
                if isinstance(value, bool):
                    no = "" if value else "no-"
                    words.append(f"--{prefix}{no}{item.name}".replace("_", "-"))
                else:
                    values = value if isinstance(value, tuple) else (value,)
                    words.extend([f"--{name}", *map(str, values)])

    add("", config, replace(usual, task=None))
    return words
