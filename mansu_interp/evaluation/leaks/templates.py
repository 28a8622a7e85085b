"""Templates of the leak test: files that say in which words facts are asked.

`mansu_interp/data/leaks.schema.json` is made of these models (scripts/make_docs.py), so that an
editor completes and checks such files: name its path or address under ``"$schema"``.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...errors import ArtifactError, TaskError
from ...tasks.files import data_file, read_text
from ...utils.files import read_json
from ...utils.shipped import DATA
from ...utils.words import shown

Kind = Literal[
    "paraphrase", "chat", "few-shot", "reversed", "multi-hop", "description", "language", "choice",
    "denial", "sampling",
]  # fmt: skip
Scope = Literal["must go", "may stay", "must stay"]
Part = Literal["train", "unseen"]
Language = Literal["fr", "es", "de", "pt"]
PARTS: tuple[Part, ...] = get_args(Part)
SCOPES: tuple[Scope, ...] = get_args(Scope)
SLOTS = ("s", "a", "r", "t", "clue", "examples", "options")
SHIPPED = DATA / "leaks"
GENERAL = "general.json"
"""Templates of any relation; the other shipped files are of one each."""
_SLOT = re.compile(r"\{(\w*)\}")


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class Columns(_Strict):
    """A relation, by the columns of its table."""

    subject: str
    """The column of subjects."""
    answer: str
    """The column of answers."""


class Clue(_Strict):
    """Where a template finds what stands for the subject."""

    table: str
    """CSV file beside the file of templates, or a shipped one."""
    key: str
    """Its column of subjects."""
    column: str
    """Its column of clues; one that several subjects have is not used."""


class Template(_Strict):
    """One way of asking a fact."""

    kind: Kind
    """What is tried; the verdicts are by kind, those of languages by language."""
    label: str
    """The register, language or form, in words."""
    part: Part
    """train: unlearning may use it; unseen: reports show it."""
    scope: Scope = "must go"
    """must go: asked of what is forgotten, and of what is retained to see that it stays; may stay:
    of what is forgotten, without consequence; must stay: of what is retained alone."""
    text: str
    """What is asked, up to the answer: {s} the subject, {a} the answer where it is reversed, {r}
    what an answer is to its subject ("capital"), {t} what a subject is ("country"), {clue},
    {examples}, {options}."""
    begin: str = ""
    """With chat: how the assistant's turn begins."""
    system: str | None = None
    """With chat: the system's turn; null: none."""
    example: str = ""
    """With few-shot: one of the examples, with {s}, {a}, and perhaps {r} and {t}."""
    language: Language | None = None
    """With language: in which names are written."""
    clue: Clue | None = None
    """With multi-hop and description: where {clue} comes from."""
    of: Columns | None = None
    """The relation that it asks; null: that of the file."""

    @property
    def name(self) -> str:
        """What is judged together: the kind, or of languages each."""
        return f"{self.kind}: {self.label}" if self.kind == "language" else self.kind

    @property
    def said(self) -> str:
        """All of its own words, a line each turn."""
        return "\n".join(filter(None, (self.system, self.example, self.text, self.begin)))

    @property
    def slot(self) -> str:
        """The slot that says which fact is asked."""
        return "clue" if self.clue else "a" if self.kind == "reversed" else "s"

    def problem(self) -> str:
        """What is wrong with it; empty: nothing."""
        texts = (self.text, self.begin, self.example)
        slots = Counter(_SLOT.findall(self.text))
        if odd := [s for text in texts for s in _SLOT.findall(text) if s not in SLOTS]:
            return f"has the unknown slot {{{odd[0]}}}; there are {', '.join(SLOTS)}"
        needs = {self.slot}
        needs |= {"examples"} if self.kind == "few-shot" else set()
        needs |= {"options"} if self.kind == "choice" else set()
        if lacking := sorted(s for s in needs if slots[s] != 1):
            return f"needs the slot {{{lacking[0]}}} exactly once"
        if odd := sorted(slots.keys() - needs - {"r", "t"}):
            return f"has the slot {{{odd[0]}}}, which {self.kind} does not fill"
        example = set(_SLOT.findall(self.example))
        if self.kind == "few-shot" and not {"s", "a"} <= example:
            return "needs an example with {s} and {a}"
        if (self.kind == "language") != (self.language is not None):
            return "needs a language" if self.language is None else "is not of the kind language"
        if self.kind in ("multi-hop", "description") and not self.clue:
            return "needs a clue"
        if not self.text.strip() or self.text != self.text.rstrip():
            return "is empty or ends in white space, and the answer comes after a space"
        return ""


class TemplateFile(_Strict):
    """A file of templates."""

    format: str | None = Field(default=None, alias="$schema")
    """Path or address of the JSON schema, for editors."""
    version: Literal[1] = Field(alias="schema")
    """Version of this format."""
    of: Columns | None = None
    """The relation that they ask; null: any."""
    names: str = "names.csv"
    """CSV file of names in other languages, beside this file or the shipped one."""
    templates: list[Template]
    """The ways of asking."""


def json_schema() -> dict[str, object]:
    """The JSON schema of files of templates."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Leak templates of mansu-interp",
        **TypeAdapter(TemplateFile).json_schema(),
    }


def shipped_files() -> list[Path]:
    """The files that ship with the package."""
    return sorted(SHIPPED.glob("*.json"))


def read_templates(path: Path) -> TemplateFile:
    """A checked file of templates.

    Raises:
        TaskError: it is malformed, a template lacks its slot, or one stands there twice, such as in
            both parts.
    """
    try:
        found = TemplateFile.model_validate(read_json(path))
    except ArtifactError as error:
        raise TaskError(f"The leak templates {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise TaskError(
            f"The leak templates {path} are malformed: {place}, {shown(first['input'])}: "
            f"{first['msg']} (docs/leaks.md)."
        ) from error
    seen: dict[tuple[object, ...], Part] = {}
    for t in found.templates:
        if problem := t.problem():
            raise TaskError(f"{path}: the template {t.text!r:.200} {problem} (docs/leaks.md).")
        said = " ".join(f"{t.example}|{t.text}".casefold().split())
        key = (said, t.kind, t.system, t.begin, t.language, str(t.of), str(t.clue))
        if key in seen:
            where = "twice" if seen[key] == t.part else "in train and in unseen"
            raise TaskError(
                f"{path}: the template {t.text!r:.200} stands {where}. Leave one out: what is "
                "trained on is no test."
            )
        seen[key] = t.part
    return found


class Tables:
    """The tables beside a file of templates, each read once."""

    def __init__(self, folder: Path, names: str) -> None:
        self.folder, self._file = folder, names
        self._clues: dict[Clue, dict[str, str]] = {}
        self._cells: dict[str, dict[str, str]] = {}

    def _rows(self, name: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
        """The rows of a table.

        Raises:
            TaskError: it is missing, too large, or lacks a column.
        """
        kind = "leaks" if (SHIPPED / Path(name).name).exists() else "facts"
        text = read_text(data_file(self.folder, kind, name))
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if not rows or any(c not in rows[0] for c in columns):
            has = ", ".join(map(str, rows[0])) if rows else "nothing"
            raise TaskError(f"The table {name} lacks one of {columns}; it has {has:.200}.")
        return [{k: row[k] or "" for k in columns} for row in rows]

    def clues(self, clue: Clue) -> dict[str, str]:
        """Subject -> its clue, of those clues that no other subject has."""
        if clue not in self._clues:
            rows = self._rows(clue.table, (clue.key, clue.column))
            counts = Counter(row[clue.column] for row in rows)
            single = [r for r in rows if r[clue.column] and counts[r[clue.column]] == 1]
            self._clues[clue] = {r[clue.key]: r[clue.column] for r in single}
        return self._clues[clue]

    @property
    def _names(self) -> dict[str, dict[str, str]]:
        """Name -> its cells by language; several spellings stand between bars."""
        if not self._cells:
            rows = self._rows(self._file, ("name", *get_args(Language), "also"))
            self._cells = {row["name"]: row for row in rows}
        return self._cells

    def name(self, thing: str, language: Language) -> str | None:
        """What a thing is called in a language, in its usual spelling; None: it is not known."""
        return self._names.get(thing, {}).get(language, "").split("|")[0] or None

    def spellings(self, thing: str) -> tuple[str, ...]:
        """All that a thing is called, in every language; its own name first."""
        cells = "|".join(self._names.get(thing, {}).values())
        return tuple(dict.fromkeys((thing, *filter(None, cells.split("|")))))
