"""Tasks: what to forget, what to keep, and how each is asked.

A task is a small JSON file over CSV fact tables. Each relation has phrasings in three groups:
``train`` (discovery and unlearning see these), ``dev`` (for choosing settings) and ``unseen``
(every reported score). Each fact and phrasing becomes a `Pair`: a clean prompt, a corrupt prompt of
equal token length about another subject, the answer, the counterfactual answer, and three
distractors of the same type for four-way choice. Rows of the user (`rows`, `pairing`) are the
other kind of task; both are loaded by `load_task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..utils.shipped import is_embedded
from .fact_pairs import _Builder, prefix
from .files import ROBUST, data_file, read_task_file, read_text
from .pairs import Pair, PairSet
from .row_pairs import RowOptions, task_from_rows
from .rows import SUFFIXES, read_rows
from .task import Task

ROW_KEYS = {"schema", "name", "title", "rows", "text", "reference_models", "settings", ROBUST}
"""Keys of a task file over rows, beside those of `RowOptions`."""


def _running_text(
    spec: dict[str, Any], folder: Path, model: LanguageModel
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Split -> the paragraphs of its text file as tokens."""
    begin = prefix(model, spec)
    return {
        split: tuple(
            tuple(model.encode(begin + line))
            for line in read_text(data_file(folder, "text", file)).splitlines()
            if line.strip()
        )
        for split, file in (spec.get("text") or {}).items()
    }


def _load_rows(spec: dict[str, Any], folder: Path, model: LanguageModel, score_pairs: int) -> Task:
    """`load_task` of a task file over rows."""
    keys = {f.name for f in fields(RowOptions)}
    if unknown := sorted(spec.keys() - keys - ROW_KEYS):
        raise TaskError(
            f"Task {spec['name']!r}: unknown key {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(keys | ROW_KEYS))}."
        )
    file = str(spec["rows"])
    if Path(file).suffix not in SUFFIXES:
        raise TaskError(f"rows must name a .jsonl or .csv file beside the task file; got {file!r}.")
    options = RowOptions(**{k: v for k, v in spec.items() if k in keys})
    rows = read_rows(data_file(folder, "rows", file))
    task = task_from_rows(
        rows,
        model,
        options,
        score_pairs,
        spec["name"],
        spec.get("title"),
        spec.get("reference_models", ()),
    )
    return replace(task, text=_running_text(spec, folder, model))


def load_task(name: str | Path, model: LanguageModel, score_pairs: int = 200) -> Task:
    """Build a task for a model's tokenizer.

    Arguments:
        name: shipped task (`mansu list` names them), or the path of a task file or of rows.
        model: the model whose tokenizer is used.
        score_pairs: at most so many prompts per scored set, drawn evenly over its phrasings, the
            same ones for every model and seed.

    Raises:
        TaskError: unknown task, malformed file, an empty forget set, a table that the tokenizer
            does not know, or a relation with too few answers.
    """
    spec, folder = read_task_file(name)
    if "rows" in spec:
        return _load_rows(spec, folder, model, score_pairs)
    relations = spec["relations"]
    named = [
        *spec["forget"].get("relations", []),
        *spec["retain"],
        *spec.get("retain_unscored", []),
        *spec.get("neighbours", []),
    ]
    if unknown := sorted(set(named) - relations.keys()):
        raise TaskError(f"Task {spec['name']!r} names unknown relations: {', '.join(unknown)}.")
    if not spec["forget"].get("relations"):
        raise TaskError(f"Task {spec['name']!r} has an empty forget set: name a relation.")
    build = _Builder(model, spec, folder)
    chosen = spec["forget"].get("subjects")
    forget_subjects = None if chosen is None else set(chosen)
    known = {s for r in spec["forget"]["relations"] for s, _ in build.facts[r]}
    if forget_subjects is not None and not forget_subjects & known:
        raise TaskError(f"Task {spec['name']!r} has an empty forget set: no subject is in a table.")

    def subjects(relation: str, role: str) -> set[str] | None:
        if role == "forget":
            return forget_subjects
        if relation in spec["forget"]["relations"]:
            return known - (forget_subjects or known)
        return None

    def collect(role: str, names: Sequence[str], split: str) -> list[Pair]:
        out: list[Pair] = []
        for r in names:
            phrasings = relations[r]["phrasings"].get(split, [])
            out += build.pairs(r, phrasings, subjects(r, role)) if phrasings else []
        return out

    scored: dict[str, dict[str, dict[str, PairSet]]] = {}
    roles = {
        "forget": spec["forget"]["relations"],
        "retain": spec["retain"],
        "neighbour": spec.get("neighbours", []),
    }
    for split in ("dev", "unseen"):
        scored[split] = {}
        for role, names in roles.items():
            sets = scored[split].setdefault(role, {})
            for r in names:
                for label, phrasings in relations[r]["phrasings"].get(split, {}).items():
                    pairs = build.pairs(r, phrasings, subjects(r, role))
                    key = r if label in (split, "zero-shot") else f"{r} ({label})"
                    sets[key] = PairSet(f"{role}/{key}", tuple(pairs)).sample(score_pairs, 0)
    retain_unscored = collect("retain_unscored", spec.get("retain_unscored", []), "train")
    return Task(
        name=spec["name"],
        title=spec.get("title", spec["name"]),
        forget=PairSet("forget", tuple(collect("forget", roles["forget"], "train"))),
        retain=PairSet("retain", tuple(collect("retain", roles["retain"], "train"))),
        retain_unscored=PairSet("retain_unscored", tuple(retain_unscored))
        if retain_unscored
        else None,
        scored=scored,
        text=_running_text(spec, folder, model),
        reference_models=tuple(spec.get("reference_models", ())),
        dropped=build.dropped,
    )


def reference_model(task: Task, model: LanguageModel) -> LanguageModel | None:
    """The first model that was never taught what a task forgets; None where none ships that fits
    ``model``, on its device."""
    fits = task.reference_models and is_embedded(model.name)
    return load_model(task.reference_models[0], model.device) if fits else None
