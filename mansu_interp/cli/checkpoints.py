"""Which checkpoint and task a command means that is given a run."""

from __future__ import annotations

from pathlib import Path

from ..runs.defaults import default_task
from ..utils.files import read_json
from .console import warn

MODEL, SETTINGS = "model", "config.json"
"""In the folder of a run: the edited checkpoint, and what was asked for."""


def checkpoint_of(given: str) -> str | Path:
    """The checkpoint of a run's folder, or what is given itself."""
    inside = Path(given) / MODEL
    place = inside if (inside / "config.json").exists() else Path(given)
    return place if place.is_dir() else given


def task_of(named: str | None, given: str, original: str | None = None) -> str:
    """The task that is asked: the one that is named, else that of the run whose folder or
    checkpoint is given, else the one that goes with the original.

    Arguments:
        named: by the user; where the run forgets another, a warning says so.
        given: a checkpoint, or the folder of a run.
        original: model before the edit; default: what is given.

    Raises:
        ArtifactError: the settings of a run cannot be read.
    """
    run = task_of_run(given)
    if named and run and run != named:
        warn(f"Careful: {given} was made to forget {run}; this asks for {named}.")
    return named or run or default_task(original or given)


def task_of_run(given: str) -> str | None:
    """The task of the run whose folder or checkpoint is given; None: it is no run's.

    Raises:
        ArtifactError: the settings of the run cannot be read.
    """
    return _asked(Path(given)) or _asked(Path(given).parent)


def _asked(folder: Path) -> str | None:
    """The task in the settings of a run, if the folder is one."""
    if not (folder / MODEL / "config.json").exists() or not (folder / SETTINGS).exists():
        return None
    found = read_json(folder / SETTINGS)
    if not isinstance(found, dict) or not isinstance(model := found.get("model"), str):
        return None
    task = found.get("task")
    return task if isinstance(task, str) else default_task(model)
