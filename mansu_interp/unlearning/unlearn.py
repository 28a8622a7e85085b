"""Unlearning methods behind one function and one registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..tasks.task import Task
from .baselines.dense import Objective, train_dense
from .baselines.dpo import dpo, idkdpo
from .baselines.ga import ga
from .baselines.graddiff import graddiff
from .baselines.kl import kl
from .baselines.npo import npo
from .baselines.rmu import rmu
from .baselines.satimp import satimp
from .baselines.simnpo import simnpo
from .baselines.sure import sure
from .baselines.task_vector import task_vector
from .baselines.undial import undial
from .baselines.wga import wga
from .checkpoint import Checkpoint, made_of
from .config import METHODS, UnlearnConfig
from .mansu.algorithm import mansu
from .training import Unlearned, dev_choice

OBJECTIVES: dict[str, Callable[[LanguageModel, Task, UnlearnConfig], Objective]] = {
    "ga": ga,
    "graddiff": graddiff,
    "kl": kl,
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "idkdpo": idkdpo,
    "rmu": rmu,
    "undial": undial,
    "wga": wga,
    "satimp": satimp,
    "task-vector": task_vector,
    "sure": sure,
}
"""Dense methods: what each minimises."""


def unlearn(
    model: LanguageModel,
    task: Task,
    mask: Mask | None = None,
    config: UnlearnConfig | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    resume: Path | None = None,
) -> Unlearned:
    """Make a copy of a model forget.

    Arguments:
        model: the original; it is not changed.
        task: what to forget and what to keep.
        mask: the parameters that may be edited; required by ``mansu`` and its variants (of which
            ``mansu-random-mask`` and ``mansu-whole-model`` differ from it by their mask alone: see
            `pipeline.make_mask`), ignored by dense methods.
        config: method and settings; default: those of ``mansu``.
        on_step: called with (steps done, steps in all, losses); afterwards (`finish`) with (rounds
            done, rounds in all, losses), ``above`` or ``apart`` among these.
        resume: a file in which the loop keeps its checkpoint every minute; if it is there, the loop goes
            on from it and ends the same as if it had not been interrupted. It stays afterwards.

    Returns:
        The edited model and the losses on the way.

    Raises:
        ConfigError: unknown method, or ``mansu`` without a mask.
        MaskError: the mask does not fit the model.
        ArtifactError: ``resume`` is damaged, or was kept by another run.
    """
    config = config or UnlearnConfig()
    method = config.method
    if method not in METHODS:
        raise ConfigError(f"Unknown method {method!r}; available: {', '.join(METHODS)}.")
    checkpoint = Checkpoint(resume, made_of(model, task, mask, config) if resume else "")
    if method in OBJECTIVES:
        objective = OBJECTIVES[method](model, task, config)
        return train_dense(model, task, config, objective, on_step, checkpoint)
    if mask is None:
        raise ConfigError(f"{method} edits inside a mask: give mask=circuit_mask(circuit, model).")
    mask.check_fits(model)
    if method == "mansu-no-projection":
        config = replace(config, projection=0.0)
    if method == "mansu-no-offsets":
        config = replace(config, offset_rate=0.0)
    return mansu(model, task, mask, config, on_step, method != "mansu-no-floor", checkpoint)


__all__ = ["METHODS", "OBJECTIVES", "UnlearnConfig", "Unlearned", "dev_choice", "unlearn"]
