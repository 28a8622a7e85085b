"""Unlearning methods behind one function and one registry."""

from __future__ import annotations

from collections.abc import Callable

from ..config import UnlearnConfig
from ..errors import ConfigError
from ..masks import Mask
from ..models import LanguageModel
from ..tasks import Task
from .common import Unlearned
from .graddiff import graddiff
from .mansu import mansu
from .npo import npo

METHODS: dict[str, Callable[..., Unlearned]] = {"mansu": mansu, "graddiff": graddiff, "npo": npo}


def unlearn(
    model: LanguageModel,
    task: Task,
    mask: Mask | None = None,
    config: UnlearnConfig | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Unlearned:
    """Make a copy of a model forget.

    Arguments:
        model: the original; it is not changed.
        task: what to forget and what to keep.
        mask: the parameters that may be edited; required by ``mansu``, ignored by dense methods.
        config: method and settings; default: those of ``mansu``.
        on_step: called with (steps done, steps in all, losses).

    Returns:
        The edited model and the losses on the way.

    Raises:
        ConfigError: unknown method, or ``mansu`` without a mask.
        MaskError: the mask does not fit the model.
    """
    config = config or UnlearnConfig()
    if config.method not in METHODS:
        raise ConfigError(f"Unknown method {config.method!r}; available: {', '.join(METHODS)}.")
    if config.method == "mansu":
        if mask is None:
            raise ConfigError("mansu edits inside a mask: give mask=circuit.mask(model).")
        mask.check_fits(model)
    return METHODS[config.method](model, task, mask, config, on_step)


__all__ = ["METHODS", "UnlearnConfig", "Unlearned", "unlearn"]
