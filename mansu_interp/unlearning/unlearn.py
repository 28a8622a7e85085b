"""All methods behind one function."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from ..errors import ConfigError, ModelError
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..tasks.task import Task
from ..utils.ranges import entrance
from ..utils.tensors import make_folder
from .baselines.dense import Objective, train_dense
from .baselines.dpo import dpo, idkdpo
from .baselines.durableun import durableun
from .baselines.ga import ga
from .baselines.graddiff import graddiff
from .baselines.kl import kl
from .baselines.lora import lora
from .baselines.npo import npo, npo_sam
from .baselines.repselect import repselect
from .baselines.rmu import rmu
from .baselines.satimp import satimp
from .baselines.simnpo import simnpo
from .baselines.sure import sure
from .baselines.task_vector import task_vector
from .baselines.undial import undial
from .baselines.undo import undo
from .baselines.wga import wga
from .checkpoint import Checkpoint, made_of
from .mansu.algorithm import mansu
from .methods import METHODS, DenseConfig, Mansu, MethodConfig
from .training import OnLook, OnPrepare, OnStep, Unlearned

OBJECTIVES: dict[str, Callable[..., Objective]] = {
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
    "npo-sam": npo_sam,
    "repselect": repselect,
    "undo": undo,
    "lora": lora,
    "durableun": durableun,
}
"""What each dense method minimises, made from (model, task, its settings, seed)."""


@entrance(ModelError)
def unlearn(
    model: LanguageModel,
    task: Task,
    mask: Mask | None = None,
    config: MethodConfig | None = None,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    on_look: OnLook | None = None,
    on_prepare: OnPrepare | None = None,
    resume: str | PathLike[str] | None = None,
) -> Unlearned:
    """Make a copy of a model forget.

    Arguments:
        model: the original; it is not changed.
        task: what to forget and what to retain.
        mask: the parameters that may be edited, for methods whose ``needs`` name one (``mansu`` and
            its variants); ignored by dense methods.
        config: the settings of a method, which choose it by their class; default: `Mansu`.
        seed: of every draw.
        on_step: called with (steps done, steps in all, record); after the last step, while margins
            are reached, with (rounds done, rounds in all, record).
        on_look: called with (full-precision model so far, steps done) at every second step, where
            the run could end with that model; it may not change it. Of margin edits, after the last
            step, it sees nothing.
        on_prepare: called with (what, parts done, parts in all) before the first step of MANSU and
            its variants: what the original answers, and what forgetting aims at.
        resume: a file for the loop's checkpoint, written every minute; if it is there, the loop
            goes on from it and ends the same as if it had not been interrupted. It stays
            afterwards.

    Returns:
        The edited model and a record per step.

    Raises:
        ConfigError: unknown method, or one that needs a mask without one.
        MaskError: the mask does not fit the model.
        ArtifactError: ``resume`` is damaged, or was written by another run.
        ModelError: training diverged.
    """
    model.check_editable()
    config = config or Mansu()
    if not isinstance(config, (Mansu, DenseConfig)) or config.method not in METHODS:
        raise ConfigError(
            f"config must be the settings of a method, such as Mansu(); got {config!r:.80}."
        )
    place = Path(resume) if resume else None
    if place:
        make_folder(place.parent)
    checkpoint = Checkpoint(place, made_of(model, task, mask, config, seed) if place else "")
    told = {"on_step": on_step, "on_look": on_look, "checkpoint": checkpoint}
    if isinstance(config, DenseConfig):
        objective = OBJECTIVES[config.method](model, task, config, seed)
        return _finite(train_dense(model, task, config, objective, seed=seed, **told), config)
    if mask is None:
        raise ConfigError(
            f"{config.method} edits inside a mask: give mask=circuit_mask(circuit, model)."
        )
    mask.check_fits(model)
    made = mansu(model, task, mask, config, seed=seed, on_prepare=on_prepare, **told)
    return _finite(made, config)


def _finite(made: Unlearned, config: MethodConfig) -> Unlearned:
    """What was made, if its weights are finite."""
    try:
        made.model.check_finite()
    except ModelError as error:
        raise ModelError(
            f"{config.method} diverged after {made.stopped_at} steps: a weight is NaN or infinite, "
            f"and nothing can be said of such a model. Take a smaller lr (now {config.lr:g})."
        ) from error
    return made
