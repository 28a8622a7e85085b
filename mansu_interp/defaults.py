"""The settings a run starts from: those of `RunConfig`, then those that its task file recommends.

Knows nothing of torch, so that ``mansu --help`` is quick.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import TaskError

DATA = Path(__file__).parent / "data"


def default_task(model: str) -> str:
    """The task that goes with a model when none is named."""
    return "capitals" if is_embedded(model) else "world-capitals"


def is_embedded(model: str) -> bool:
    """Whether a model ships with the package."""
    return Path(model).name == model and (DATA / "models" / model / "config.json").exists()


def default_config(model: str = "facts", task: str | None = None) -> RunConfig:
    """The settings for a model and a task, before any of the user's own.

    Arguments:
        model: as in `RunConfig`.
        task: shipped task or path of a task file, whose ``settings`` are taken over; a file that
            cannot be read is left for `load_task` to complain about.

    Raises:
        TaskError: the task's ``settings`` name something that `RunConfig` does not have, or give
            it a value out of range.
    """
    config = RunConfig(model=model, task=task)
    name = task or default_task(model)
    shipped = DATA / "tasks" / f"{name}.json"
    path = shipped if shipped.exists() else Path(name)
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config
    settings = spec.get("settings", {}) if isinstance(spec, dict) else {}
    return _updated(config, settings, f"settings of task {name!r}")


def _updated(config: Any, settings: Any, where: str) -> Any:
    names = {f.name for f in fields(config)} - {"model", "task", "out", "seed"}
    if not isinstance(settings, dict) or not settings.keys() <= names:
        raise TaskError(f"{where}: expected some of {', '.join(sorted(names))}; got {settings!r}.")
    values = {
        k: _updated(getattr(config, k), v, f"{where}, {k}")
        if is_dataclass(getattr(config, k))
        else v
        for k, v in settings.items()
    }
    try:
        return replace(config, **values)
    except TypeError as error:
        raise TaskError(f"{where}: {error}.") from error
