"""The settings a run starts from: those of `RunConfig`, then those that its task file recommends.

Knows nothing of torch, so that ``mansu --help`` is quick.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ArtifactError, ConfigError, TaskError
from ..tasks.data.sources import is_file
from ..tasks.files import ROBUST
from ..unlearning.methods import Mansu, get_method
from ..utils.files import Json, expect, read_json
from ..utils.ranges import entrance
from ..utils.records import Record
from ..utils.renamed import renamed_key, renamed_setting
from ..utils.shipped import DATA, is_embedded
from .config import RunConfig

Settings = TypeVar("Settings", bound=Record)


def default_task(model: str) -> str:
    """The task that goes with a model when none is named."""
    return "countries" if is_embedded(model) else "world-capitals"


@entrance(ConfigError)
def default_config(
    model: str = "facts", task: str | None = None, robust: bool = False, *, method: str = "mansu"
) -> RunConfig:
    """The settings for a model, a task and a method, before any of the user's own.

    Arguments:
        model: as in `RunConfig`.
        task: shipped task or path of a task file, whose ``settings`` are taken over; a file that
            cannot be read is left for `load_task` to complain about. Its settings of unlearning are
            those of MANSU and its variants; of them a baseline takes the batch size alone.
        robust: then those of the file's ``robust``: what was found to resist relearning.
        method: name of the method.

    Raises:
        ConfigError: unknown method, or ``robust`` with a baseline.
        TaskError: the task's ``settings`` name something that `RunConfig` does not have, or give
            it a value out of range; or it has none against relearning.
    """
    kind = get_method(method)
    if robust and not issubclass(kind, Mansu):
        raise ConfigError(f"--{ROBUST} chooses settings of mansu; leave it out with {method}.")
    config = _task_config(model, task, robust)
    taken = ["batch_size"]
    if issubclass(kind, Mansu):
        taken = [f.name for f in fields(kind) if f.name not in kind.lacks]
    return replace(config, unlearn=kind(**{n: getattr(config.unlearn, n) for n in taken}))


def _task_config(model: str, task: str | None, robust: bool) -> RunConfig:
    """The settings of `default_config` for MANSU."""
    config = RunConfig(model=model, task=task)
    name = task or default_task(model)
    shipped = DATA / "tasks" / f"{name}.json"
    path = shipped if is_file(shipped) else Path(name)
    try:
        spec = read_json(path)
    except ArtifactError:
        spec = {}
    spec = spec if isinstance(spec, dict) else {}
    if old := renamed_key(spec):
        raise TaskError(f"The task file {path} is of an older version: {old}.")
    for key in ("settings", ROBUST):
        if old := renamed_setting(spec.get(key)):
            raise TaskError(f"{key} of task {name!r}: {old}.")
    config = _updated(config, spec.get("settings", {}), f"settings of task {name!r}")
    if not robust or not is_file(path):
        return config
    if ROBUST not in spec:
        raise TaskError(
            f"Task {name!r} has no settings against relearning ({ROBUST!r} in its file, beside "
            "'settings'). Give them yourself: --unlearn.adversarial-steps, --subject-rows."
        )
    return _updated(config, spec[ROBUST], f"{ROBUST} settings of task {name!r}")


def _updated(config: Settings, settings: Json, where: str) -> Settings:
    """Settings with some of them replaced by the JSON values of a task file."""
    names = {f.name for f in fields(config)} - {"model", "task", "out", "seed", "threads"}
    if not isinstance(settings, dict) or not settings.keys() <= names:
        raise TaskError(
            f"{where}: expected some of {', '.join(sorted(names))}; got {str(settings)[:200]}."
        )
    hints = get_type_hints(type(config))
    values = {
        k: _updated(getattr(config, k), v, f"{where}, {k}")
        if is_dataclass(getattr(config, k))
        else _value(v, hints[k], f"{where}, {k}")
        for k, v in settings.items()
    }
    return replace(config, **values)


def _value(value: Json, kind: object, where: str) -> object:
    """A JSON value as a setting of some type has it."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        shape, fits = str, value in parts if isinstance(value, str) else False
    elif get_origin(kind) is tuple:
        shape, fits = [parts[0]], True
    else:
        shape, fits = parts or kind, True  # X | None, or one type
    try:
        expect(value, shape, where)
    except ValueError as error:
        raise TaskError(f"{error}.") from error
    if not fits:
        raise TaskError(f"{where} is {value!r:.80}, expected one of {', '.join(parts)}.")
    return tuple(value) if isinstance(value, list) else value
