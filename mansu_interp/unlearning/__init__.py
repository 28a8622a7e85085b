"""Unlearning methods behind one function and one registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import METHODS, UnlearnConfig
from ..errors import ConfigError
from ..masks import Mask
from ..models import LanguageModel
from ..pairs import Task
from .common import Unlearned, dev_choice
from .dense import Objective, train_dense
from .dpo import dpo, idkdpo
from .ga import ga
from .graddiff import graddiff
from .kl import kl
from .mansu import mansu
from .npo import npo
from .rmu import rmu
from .satimp import satimp
from .simnpo import simnpo
from .state import Place, made_of
from .sure import sure
from .taskvector import task_vector
from .undial import undial
from .wga import wga

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
            ``mansu-random`` and ``mansu-whole`` differ from it by their mask alone: see
            `pipeline.make_mask`), ignored by dense methods.
        config: method and settings; default: those of ``mansu``.
        on_step: called with (steps done, steps in all, losses); afterwards (`finish`) with (rounds
            done, rounds in all, losses), ``above`` or ``apart`` among these.
        resume: a file in which the loop keeps its place every minute; if it is there, the loop goes
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
    place = Place(resume, made_of(model, task, mask, config) if resume else "")
    if method in OBJECTIVES:
        objective = OBJECTIVES[method](model, task, config)
        return train_dense(model, task, config, objective, on_step, place)
    if mask is None:
        raise ConfigError(f"{method} edits inside a mask: give mask=circuit.mask(model).")
    mask.check_fits(model)
    if method == "mansu-unprojected":
        config = replace(config, projection=0.0)
    if method == "mansu-unsteered":
        config = replace(config, steer=0.0)
    return mansu(model, task, mask, config, on_step, method != "mansu-unsnapped", place)


__all__ = ["METHODS", "OBJECTIVES", "UnlearnConfig", "Unlearned", "dev_choice", "unlearn"]
