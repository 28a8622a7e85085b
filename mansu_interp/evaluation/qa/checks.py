"""Rows that can be asked, each once, and sets that do not share what they must not.

1. Rows with a text that a tokenizer cannot read are left out, and counted.
2. Of rows with the same question and answer the first counts; a repeated perturbed answer counts
   once.
3. Held-out rows are in no other set, and were taught to neither model, as far as models tell it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...errors import ConfigError, TaskError
from ...models.language_model import LanguageModel
from ...utils.files import read_json
from ...utils.ranges import expect_kind
from ...utils.words import number_of, shown
from .rows import Prompts, QARow

SETS = ("forget", "retain", "real_authors", "world_facts", "holdout")
"""Sets of rows; those of model utility are the three in the middle."""
TAUGHT = "taught.json"
"""The file of a taught model that says what it was taught."""


def row_hash(row: QARow) -> str:
    """A hash of question and answer: 16 hexadecimal digits."""
    text = json.dumps([row.question, row.answer])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def taught_rows(model: LanguageModel) -> frozenset[str]:
    """Hashes of the rows that a model was taught, of those that its folder tells.

    Raises:
        ArtifactError: its ``taught.json`` cannot be read.
    """
    file = model.folder / TAUGHT if model.folder else None
    found = read_json(file) if file and file.exists() else None
    hashes = found.get("row_hashes") if isinstance(found, dict) else None
    return frozenset(map(str, hashes)) if isinstance(hashes, list) else frozenset()


def kept_rows(
    rows: Sequence[QARow], prompts: Sequence[Prompts], what: str
) -> tuple[tuple[QARow, ...], dict[str, int]]:
    """Steps 1 and 2 of the module.

    Arguments:
        rows: that were given.
        prompts: of each model that is to read them.
        what: what they are called, such as the name of their set.

    Returns:
        Those that are left, and what was done to how many.

    Raises:
        TaskError: none is left.
    """
    notes: dict[str, int] = {}

    def note(text: str) -> None:
        notes[f"{what}: {text}"] = notes.get(f"{what}: {text}", 0) + 1

    kept: dict[tuple[str, str], QARow] = {}
    example = ""
    for row in rows:
        blind = next(((p.model.name, w) for p in prompts if (w := p.unreadable(row))), None)
        if blind:
            example = example or f"line {row.line}: {shown(blind[1])}"
            note(f"rows left out, which the tokenizer of {blind[0]} cannot read")
        elif (row.question, row.answer) in kept:
            note("rows left out, whose question and answer stand there before")
        else:
            once = tuple(dict.fromkeys(row.perturbed))
            if len(once) < len(row.perturbed):
                note("rows with repeated perturbed answers, each of which counts once")
            kept[row.question, row.answer] = replace(row, perturbed=once)
    if not kept:
        names = " and ".join(dict.fromkeys(p.model.name for p in prompts))
        raise TaskError(
            f"{what}: none of {number_of(len(rows), 'row')} can be read by the tokenizer of "
            f"{names}, such as {example}, which becomes its token for unknown words. Give rows in "
            "words that it knows, or a model that knows these."
        )
    for name in dict.fromkeys(p.model.name for p in prompts if p.strange):
        told = f"{what}: rows asked in words around the question that {name} does not know"
        notes[told] = len(kept)
    return tuple(kept.values()), notes


def check_sets(sets: Mapping[str, Sequence[QARow]]) -> None:
    """Raise TaskError over an unknown set, no forget rows, or a held-out row that is in another
    set as well."""
    expect_kind(TaskError, "sets", sets, Mapping)
    if unknown := [name for name in sets if name not in SETS]:
        raise TaskError(f"sets: got {shown(unknown[0])}, expected some of {', '.join(SETS)}.")
    if not sets.get("forget"):
        raise TaskError("sets: there are no forget rows, of which most metrics are. Give some.")
    for name, rows in sets.items():
        for row in rows:
            expect_kind(TaskError, f"a row of {name}", row, QARow)
    place = {
        (row.question, row.answer): name
        for name in reversed(SETS[:-1])
        for row in sets.get(name, ())
    }
    for row in sets.get("holdout", ()):
        if name := place.get((row.question, row.answer)):
            raise TaskError(
                f"holdout, line {row.line}: this row is among the {name.replace('_', ' ')} rows as "
                "well, and attacks would be asked to tell what is known from what is known. Give "
                "rows that were never taught."
            )


def check_models(
    model: LanguageModel, reference: LanguageModel | None, sets: Mapping[str, Sequence[QARow]]
) -> None:
    """Raise ConfigError over a reference that is the model itself, and TaskError over rows that a
    model was taught and must not have been: held-out ones, and forget rows of the reference."""
    if reference is not None and _same(model, reference):
        raise ConfigError(
            f"The reference {reference.name} has the very weights of the model, of which every "
            "comparison says that nothing is left. Give a model that was never taught the forget "
            "rows, or none."
        )
    cases = [(model, "model", "holdout")]
    if reference is not None:
        cases += [(reference, "reference", "holdout"), (reference, "reference", "forget")]
    for one, role, name in cases:
        known = taught_rows(one)
        if bad := [row for row in sets.get(name, ()) if row_hash(row) in known]:
            give = "rows that were" if name == "holdout" else "a reference that was"
            raise TaskError(
                f"{name}: the {role} {one.name} was taught {len(bad)} of "
                f"{number_of(len(sets[name]), 'row')}, such as line {bad[0].line}, as its "
                f"{TAUGHT} says. Give {give} never taught."
            )


def _same(one: LanguageModel, other: LanguageModel) -> bool:
    """Whether two models have the same weights."""
    if one.weights.keys() != other.weights.keys():
        return False
    pairs = ((value, other.weights[name]) for name, value in one.weights.items())
    return all(a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in pairs)
