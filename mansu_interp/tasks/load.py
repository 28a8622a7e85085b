"""Load a task: what to forget, what to retain, and how each is asked.

A task is a small JSON file over CSV fact tables. Each relation has phrasings in three groups:
``train`` (discovery and unlearning see these), ``dev`` (for choosing settings) and ``unseen``
(every reported score). Each fact and phrasing becomes a `Pair`: a clean prompt, a corrupt prompt of
equal token length about another subject, the answer, the counterfactual answer, and three
distractors of the same type for four-way choice. Rows of the user (`rows`, `row_pairs`) are the
other kind of task; both are loaded by `load_task`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from ..errors import TaskError
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..utils.ranges import entrance
from ..utils.shipped import is_embedded
from .data.row_pairs import task_from_rows
from .data.rows import read
from .data.sources import SUFFIXES
from .fact_pairs import FactPairs, prefix
from .files import data_file, read_task_file, read_text
from .pairs import Pair, PairSet, Tokens
from .schema import Relation, RowOptions, RowTask, TableTask, TaskFile
from .task import Asked, FactTable, Task, distinct

SCORED = ("dev", "unseen")
"""Splits that are scored."""


def _running_text(
    spec: TaskFile, folder: Path, model: LanguageModel
) -> dict[str, tuple[Tokens, ...]]:
    """Split -> the paragraphs of its text file as tokens."""
    begin = prefix(model, spec)
    return {
        split: tuple(
            tuple(model.encode(begin + line))
            for line in read_text(data_file(folder, "text", file)).splitlines()
            if line.strip()
        )
        for split, file in (spec.text or {}).items()
    }


def _load_rows(spec: RowTask, place: Path, model: LanguageModel, score_pairs: int) -> Task:
    """`load_task` of a task file over rows; ``place`` is its folder, or the file of rows itself."""
    folder, path = place, place
    if place.is_dir():
        if Path(spec.rows).suffix.casefold() not in SUFFIXES:
            raise TaskError(
                f"rows must name a file beside the task file, with an ending of "
                f"{', '.join(SUFFIXES)}; got {spec.rows!r}."
            )
        path = data_file(place, "rows", spec.rows)
    found = read(path)
    task = task_from_rows(
        found.rows,
        model,
        RowOptions(**{f.name: getattr(spec, f.name) for f in fields(RowOptions)}),
        score_pairs=score_pairs,
        name=spec.name,
        title=spec.title or None,
        reference_models=spec.reference_models,
    )
    told = "; ".join(filter(None, (found.told, task.read)))
    return replace(task, text=_running_text(spec, folder, model), read=told)


@entrance(TaskError)
def load_task(name: str | Path, model: LanguageModel, score_pairs: int = 200) -> Task:
    """Build a task for a model's tokenizer.

    Arguments:
        name: shipped task (`mansu list` names them), or the path of a task file or of rows.
        model: the model whose tokenizer is used.
        score_pairs: at most so many prompts per scored set, drawn evenly over its phrasings, the
            same ones for every model and seed.

    Raises:
        TaskError: unknown task, malformed file, an empty forget set, a table that the tokenizer
            does not know, a relation with too few answers, or prompts that contradict each other.
    """
    spec, folder = read_task_file(name)
    if isinstance(spec, RowTask):
        return _load_rows(spec, folder, model, score_pairs)
    return _load_tables(spec, folder, model, score_pairs)


def _load_tables(spec: TableTask, folder: Path, model: LanguageModel, score_pairs: int) -> Task:
    """`load_task` of a task file over fact tables."""
    roles = {"forget": spec.forget.relations, "retain": spec.retain, "neighbour": spec.neighbours}
    named = {r for names in (*roles.values(), spec.retain_unscored) for r in names}
    if unknown := sorted(named - spec.relations.keys()):
        raise TaskError(f"Task {spec.name!r} names unknown relations: {', '.join(unknown)}.")
    if not spec.forget.relations:
        raise TaskError(f"Task {spec.name!r} has an empty forget set: name a relation.")
    build = FactPairs(model, spec, folder)
    chosen = spec.forget.subjects
    forget_subjects = None if chosen is None else set(chosen)
    known = {s for r in spec.forget.relations for s, _ in build.facts[r]}
    if forget_subjects is not None and not forget_subjects & known:
        raise TaskError(f"Task {spec.name!r} has an empty forget set: no subject is in a table.")

    def subjects(relation: str, role: str) -> set[str] | None:
        if role == "forget":
            return forget_subjects
        if relation in spec.forget.relations:
            return known - (forget_subjects or known)
        return None

    asked: dict[Asked, list[Pair]] = {}
    for role, names in {**roles, "retain_unscored": spec.retain_unscored}.items():
        for r in names:
            by_split = spec.relations[r].phrasings
            if role != "neighbour":
                asked.setdefault(Asked(role, "train", ""), []).extend(
                    build.pairs(r, by_split.train, subjects(r, role))
                )
            for split in SCORED if role in roles else ():
                for label, phrasings in getattr(by_split, split).items():
                    key = r if label in (split, "zero-shot") else f"{r} ({label})"
                    asked[Asked(role, split, key)] = build.pairs(r, phrasings, subjects(r, role))
    found, left_out = distinct(spec.name, asked)

    def trained(role: str) -> tuple[Pair, ...]:
        return tuple(found.get(Asked(role, "train", ""), ()))

    def score(role: str, split: str) -> dict[str, PairSet]:
        return {
            at.label: PairSet(f"{role}/{at.label}", tuple(pairs)).sample(score_pairs, 0)
            for at, pairs in found.items()
            if (at.role, at.split) == (role, split)
        }

    unscored = trained("retain_unscored")
    return Task(
        name=spec.name,
        title=spec.title or spec.name,
        forget=PairSet("forget", trained("forget")),
        retain=PairSet("retain", trained("retain")),
        retain_unscored=PairSet("retain_unscored", unscored) if unscored else None,
        scored={split: {role: score(role, split) for role in roles} for split in SCORED},
        text=_running_text(spec, folder, model),
        reference_models=tuple(spec.reference_models),
        dropped={**build.dropped, **left_out},
        prefix=build.prefix,
        tables={name: _table(rel, build.facts[name]) for name, rel in spec.relations.items()},
    )


def _table(relation: Relation, facts: list[tuple[str, str]]) -> FactTable:
    """A relation's table; what its columns are called, in words."""
    subject, answer = (c.replace("_", " ") for c in (relation.subject, relation.answer))
    return FactTable(subject, answer, relation.description or answer, tuple(facts))


def has_reference(task: Task, model: LanguageModel) -> bool:
    """Whether a model ships that was never taught what a task forgets, and fits ``model``."""
    return bool(task.reference_models) and is_embedded(model.name)


def reference_model(task: Task, model: LanguageModel) -> LanguageModel | None:
    """The first model that was never taught what a task forgets; None where none ships that fits
    ``model``, on its device."""
    if not has_reference(task, model):
        return None
    return load_model(task.reference_models[0], model.device)
