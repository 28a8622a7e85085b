"""The shortest command that makes a run."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from ..errors import ConfigError, TaskError
from ..models.language_model import LanguageModel
from ..models.load import SMALL
from ..tasks.files import ROBUST
from ..utils.records import Record
from .config import RunConfig
from .defaults import default_config, default_task

TOLD = (
    "budget", "unlearn.lr", "unlearn.batch_size", "unlearn.retain_weight", "unlearn.survive",
    "relearn_steps",
)  # fmt: skip
"""Settings that a plan tells, changed or not."""
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


def settings_lines(config: RunConfig, model: LanguageModel) -> list[str]:
    """Which settings a run has chosen, and why: for its plan."""
    method, name = config.unlearn.method, config.task or default_task(config.model)
    plain = RunConfig(model=config.model, task=config.task, unlearn=type(config.unlearn)())
    usual = default_config(config.model, config.task, method=method)
    start, why = usual, f"of task {name}"
    with contextlib.suppress(ConfigError, TaskError):
        robust = default_config(config.model, config.task, robust=True, method=method)
        if len(_options(config, robust)) < len(_options(config, usual)):
            start, why = robust, f"of task {name} with --{ROBUST}"
    told = [(why, _chosen(start, plain)), ("given", _chosen(config, start))]
    lines = [f"{' '.join(words)} ({reason})" for reason, words in told if words]
    seen = {word for _, words in told for word in words}
    rest = [words for words in _usual(config) if words[0] not in seen]
    lines.append(f"{' '.join(w for words in rest for w in words)} (usual; --help-all has the rest)")
    if config.device == "auto":
        small = model.n_parameters < SMALL and torch.cuda.is_available()
        reason = "below ten million parameters" if small else "what there is"
        lines[-1] += f" --device {model.device} ({reason})"
    return [f"{'' if k else 'settings':9}{line}" for k, line in enumerate(lines)]


def _chosen(config: RunConfig, usual: RunConfig) -> list[str]:
    """The same without model and task, which have lines of their own."""
    return _options(replace(config, task=None), usual)[2:]


def _usual(config: RunConfig) -> Iterator[list[str]]:
    """The settings that decide most, as options."""
    for name in TOLD:
        of = config.unlearn if name.startswith("unlearn.") else config
        value = getattr(of, name.removeprefix("unlearn."), None)
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            yield [f"--{name}".replace("_", "-"), *map(str, values)]


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
