"""Make a language model forget something, and prove that it stays forgotten.

    >>> from mansu_interp import load_model, load_task, discover, unlearn, evaluate, compare
    >>> model = load_model("facts")
    >>> task = load_task("capitals", model)
    >>> circuit = discover(model, task.forget)
    >>> mask = circuit.mask(model, budget=0.005)
    >>> result = unlearn(model, task, mask)

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AttributionConfig": "config",
    "CAD": "cad",
    "Circuit": "circuit",
    "CircuitConfig": "config",
    "Erasure": "erasure",
    "LanguageModel": "models",
    "MansuError": "errors",
    "Mask": "masks",
    "Pair": "pairs",
    "PairSet": "pairs",
    "RelearnConfig": "config",
    "Relearning": "relearning",
    "RowOptions": "pairing",
    "RunConfig": "config",
    "Task": "pairs",
    "UnlearnConfig": "config",
    "attribute": "attribution",
    "circuit_metric": "faithfulness",
    "compare": "cad",
    "discover": "circuit",
    "evaluate": "evaluation",
    "judge_erasure": "erasure",
    "load_model": "models",
    "load_task": "tasks",
    "quantize": "quantizers",
    "read_rows": "rows",
    "relearn": "relearning",
    "run": "pipeline",
    "survival": "quantizers",
    "task_from_rows": "pairing",
    "unlearn": "unlearning",
}

__all__ = ["__version__", *sorted(_WHERE)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mansu_interp' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from .attribution import attribute
    from .cad import CAD, compare
    from .circuit import Circuit, discover
    from .config import (
        AttributionConfig,
        CircuitConfig,
        RelearnConfig,
        RunConfig,
        UnlearnConfig,
    )
    from .erasure import Erasure, judge_erasure
    from .errors import MansuError
    from .evaluation import evaluate
    from .faithfulness import circuit_metric
    from .masks import Mask
    from .models import LanguageModel, load_model
    from .pairing import RowOptions, task_from_rows
    from .pairs import Pair, PairSet, Task
    from .pipeline import run
    from .quantizers import quantize, survival
    from .relearning import Relearning, relearn
    from .rows import read_rows
    from .tasks import load_task
    from .unlearning import unlearn
