"""Make a language model forget something, and prove that it stays forgotten.

    >>> from mansu_interp import circuit_mask, discover, load_model, load_task, unlearn
    >>> model = load_model("facts")
    >>> task = load_task("capitals", model)
    >>> circuit = discover(model, task.forget)
    >>> mask = circuit_mask(circuit, model, retain=task.retain_sets)
    >>> result = unlearn(model, task, mask)

The names below are the public interface; every other module is an implementation detail. They are
imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

PUBLIC: dict[str, tuple[str, ...]] = {
    "models.load": ("load_model",),
    "models.language_model": ("LanguageModel",),
    "tasks.load": ("load_task",),
    "tasks.pairs": (
        "Pair",
        "PairSet",
    ),
    "tasks.task": ("Task",),
    "tasks.data.prompts": ("read_prompts",),
    "tasks.data.rows": ("read_rows",),
    "tasks.synthetic": ("synthetic_pairs",),
    "tasks.schema": ("RowOptions",),
    "tasks.data.row_pairs": ("task_from_rows",),
    "circuits.config": (
        "AttributionConfig",
        "CircuitConfig",
    ),
    "circuits.scores": (
        "Attribution",
        "ScoredEdge",
        "edge_changes",
    ),
    "circuits.attribution": ("attribute",),
    "circuits.patching": ("patch_edges",),
    "circuits.ablation": ("Ablation",),
    "circuits.search.faithfulness": (
        "Ablated",
        "circuit_metric",
        "faithfulness_curve",
        "Curve",
    ),
    "circuits.search.stability": ("Stability",),
    "circuits.heads.records": (
        "ExplainedHead",
        "ExplainedHeads",
    ),
    "circuits.heads.explain": (
        "explain_head",
        "explain_heads",
    ),
    "circuits.circuit": ("Circuit",),
    "circuits.formats.files": (
        "read_circuit",
        "write_circuit",
    ),
    "circuits.search.discover": ("discover",),
    "circuits.changes": (
        "classify",
        "Changes",
    ),
    "circuits.compare": (
        "GraphComparison",
        "compare",
    ),
    "quantizers.bitsandbytes": ("NF4",),
    "quantizers.survival": (
        "Survival",
        "quantize",
        "survival",
    ),
    "quantizers.registry": ("get_quantizer",),
    "masks.mask": ("Mask",),
    "masks.select": ("circuit_mask",),
    "audit.config": ("RelearnConfig",),
    "audit.relearning": (
        "Relearning",
        "other_half",
        "relearn",
        "relearned",
    ),
    "audit.suite": (
        "AttackResults",
        "attack_suite",
    ),
    "audit.cad": (
        "CAD",
        "judge_erasure",
    ),
    "unlearning.methods": (
        "Mansu",
        "MethodConfig",
        "get_method",
    ),
    "unlearning.training": ("Unlearned",),
    "unlearning.unlearn": ("unlearn",),
    "evaluation.versions": ("ModelVersion",),
    "evaluation.scores": (
        "Scores",
        "evaluate",
    ),
    "evaluation.leaks.found": ("LeakTest",),
    "evaluation.leaks.scoring": ("leak_test",),
    "evaluation.leaks.training": ("with_leak_prompts",),
    "evaluation.qa.config": ("TeachConfig",),
    "evaluation.qa.rows": (
        "QARow",
        "read_qa_rows",
    ),
    "evaluation.qa.measure": (
        "QAMetrics",
        "qa_metrics",
    ),
    "evaluation.qa.teach": ("teach",),
    "viz.view": (
        "View",
        "attribution_view",
        "changes_view",
        "circuit_view",
    ),
    "report.records": ("Report",),
    "runs.config": ("RunConfig",),
    "runs.defaults": ("default_config",),
    "runs.edit": ("make_mask",),
    "runs.run": ("run",),
    "errors": ("MansuError",),
}
"""Module -> its public names, in the order in which data flow."""

_WHERE = {name: module for module, names in PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_WHERE)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'mansu_interp' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from .audit.cad import CAD, judge_erasure
    from .audit.config import RelearnConfig
    from .audit.relearning import Relearning, other_half, relearn, relearned
    from .audit.suite import AttackResults, attack_suite
    from .circuits.ablation import Ablation
    from .circuits.attribution import attribute
    from .circuits.changes import Changes, classify
    from .circuits.circuit import Circuit
    from .circuits.compare import GraphComparison, compare
    from .circuits.config import AttributionConfig, CircuitConfig
    from .circuits.formats.files import read_circuit, write_circuit
    from .circuits.heads.explain import explain_head, explain_heads
    from .circuits.heads.records import ExplainedHead, ExplainedHeads
    from .circuits.patching import patch_edges
    from .circuits.scores import Attribution, ScoredEdge, edge_changes
    from .circuits.search.discover import discover
    from .circuits.search.faithfulness import Ablated, Curve, circuit_metric, faithfulness_curve
    from .circuits.search.stability import Stability
    from .errors import MansuError
    from .evaluation.leaks.found import LeakTest
    from .evaluation.leaks.scoring import leak_test
    from .evaluation.leaks.training import with_leak_prompts
    from .evaluation.qa.config import TeachConfig
    from .evaluation.qa.measure import QAMetrics, qa_metrics
    from .evaluation.qa.rows import QARow, read_qa_rows
    from .evaluation.qa.teach import teach
    from .evaluation.scores import Scores, evaluate
    from .evaluation.versions import ModelVersion
    from .masks.mask import Mask
    from .masks.select import circuit_mask
    from .models.language_model import LanguageModel
    from .models.load import load_model
    from .quantizers.bitsandbytes import NF4
    from .quantizers.registry import get_quantizer
    from .quantizers.survival import Survival, quantize, survival
    from .report.records import Report
    from .runs.config import RunConfig
    from .runs.defaults import default_config
    from .runs.edit import make_mask
    from .runs.run import run
    from .tasks.data.prompts import read_prompts
    from .tasks.data.row_pairs import task_from_rows
    from .tasks.data.rows import read_rows
    from .tasks.load import load_task
    from .tasks.pairs import Pair, PairSet
    from .tasks.schema import RowOptions
    from .tasks.synthetic import synthetic_pairs
    from .tasks.task import Task
    from .unlearning.methods import Mansu, MethodConfig, get_method
    from .unlearning.training import Unlearned
    from .unlearning.unlearn import unlearn
    from .viz.view import View, attribution_view, changes_view, circuit_view
