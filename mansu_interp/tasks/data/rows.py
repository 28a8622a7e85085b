"""Rows brought by the user, checked one by one.

A row is one prompt with its answer (see `Row`); rows of published data become such rows (see
`shapes`). Every bad row is named with its line and reason; none is dropped, except choices among
too few, which are counted in the line that tells how rows were read.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard, TypeVar

from ...errors import TaskError
from ...utils.words import half_pair, number_of, shown
from .shapes import OWN, as_list, convert, fold
from .sources import Numbered, records

ROLES = ("forget", "retain", "retain_unscored", "neighbour")
SPLITS = ("train", "dev", "unseen")
SHOWN = 10
"""Bad rows that a message lists; it counts the others."""
FIELDS = OWN
NO_ROLE = ": give each row one, or one file a role (mansu task rows --forget FILE --retain FILE)"
FEWEST_DEV = 4
"""Phrasings of a fact of which one is for ``dev``, where rows are held out."""
FIFTH = 5
"""Of so many retain facts in one phrasing, one is held out."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Row:
    """One prompt and its answer."""

    role: str
    """forget, retain, retain_unscored (retained, never scored) or neighbour (scored, never trained
    on)."""
    prompt: str
    """The text before the answer."""
    answer: str
    split: str = ""
    """train, dev or unseen; empty: every split that the task has phrasings for."""
    corrupt: str = ""
    """A prompt of as many tokens with another answer; empty: made (see `row_pairs`)."""
    counterfactual: str = ""
    """The corrupt prompt's answer; empty: that of the row it was made from."""
    distractors: tuple[str, ...] = ()
    """Three wrong answers (of more, the first three are taken); empty: other rows' answers."""
    relation: str = ""
    """What is asked; rows of one relation lend each other prompts and answers; empty: the role."""
    subject: str = ""
    """Whom it is asked of; all rows of a subject are one fact; empty: the answer stands for it."""
    phrasing: str = ""
    """How it is asked, where the rows of a relation differ in that."""
    line: int = 0
    """Where the row stood."""

    @property
    def fact(self) -> str:
        """The subject, or the answer in its place."""
        return self.subject or self.answer


def sift(
    records: Iterable[Numbered], make: Callable[[int, Mapping[str, object]], Made], where: str
) -> list[Made]:
    """What becomes of each record; one error lists the bad ones by line.

    Arguments:
        records: line and mapping; a string in a mapping's place says why there is none.
        make: what to make of a line and its mapping; raises a TaskError that says why it cannot.
        where: named in the message.

    Raises:
        TaskError: there are bad records; lists the first `SHOWN` with line and reason.
    """
    out: list[Made] = []
    bad: list[tuple[int, str]] = []
    n = 0
    for line, record in records:
        n += 1
        if not isinstance(record, Mapping):
            bad.append((line, record if isinstance(record, str) else "not an object with fields"))
            continue
        try:
            out.append(make(line, record))
        except TaskError as error:
            bad.append((line, str(error)))
    if bad:
        lines = [f"  line {line}: {why}" for line, why in bad[:SHOWN]]
        more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        head = f"{where}: {len(bad)} of {n} rows are bad. Mend or remove them:"
        raise TaskError("\n".join([head, *lines, *more]))
    return out


def _text(value: object) -> object:
    """Missing values of CSV and pandas as empty strings, and whole numbers as text.

    Raises:
        TaskError: a number with a point, of which it is not known how it was written.
    """
    value = as_list(value)
    nan = isinstance(value, float) and math.isnan(value)
    if value is None or nan or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        raise TaskError(f"{value!r} is a number with a point: write it as text, as it is to stand")
    return value


def _why_bad(row: Mapping[str, object]) -> str:
    """What is wrong with the fields of a row, or nothing."""
    if unknown := sorted(set(map(str, row)) - set(FIELDS)):
        return f"unknown field {', '.join(unknown)}; expected some of {', '.join(FIELDS)}"
    for name in ("role", "prompt", "answer"):
        if not row.get(name):
            return f"{name} is missing or empty{NO_ROLE if name == 'role' else ''}"
    for name, value in row.items():
        if name != "distractors" and not isinstance(value, str):
            return f"{name} must be text; got {type(value).__name__}"
    text = {k: v for k, v in row.items() if isinstance(v, str)}
    for name, value in (*text.items(), ("distractors", row.get("distractors"))):
        if half := half_pair("".join(value) if _are_texts(value) else str(value)):
            return f"{name} holds {half}, half of a surrogate pair, which is no text"
    role, split, answer = text["role"], text.get("split", ""), text["answer"]
    if role not in ROLES:
        return f"role {role!r}; expected {', '.join(ROLES)}"
    if split and split not in SPLITS:
        return f"split {split!r}; expected {', '.join(SPLITS)}"
    if role == "retain_unscored" and split in ("dev", "unseen"):
        return "retain_unscored rows are never scored: give them the split train or none"
    if role == "neighbour" and split == "train":
        return "neighbour rows are never trained on: give them the split dev, unseen or none"
    if not text["prompt"].strip():
        return "the prompt is nothing but white space"
    return _why_bad_answers(row.get("distractors") or [], answer, text.get("counterfactual"))


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _why_bad_answers(wrong: object, answer: str, counterfactual: str | None) -> str:
    """The same of its wrong answers."""
    if not (_are_texts(wrong) and all(wrong)):
        return "distractors must be a list of texts (in CSV: separated by |)"
    if wrong and len(set(wrong)) < 3:
        return f"{len(set(wrong))} different distractors; expected three or none"
    if answer in (*wrong, counterfactual):
        return f"the answer {answer!r} is also a wrong one"
    return ""


@dataclass
class Reading:
    """Rows, and what was done to read them."""

    rows: list[Row]
    told: str
    """In one line."""


@dataclass
class _Notes:
    """What is counted while rows are read."""

    shapes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Fields that no row of ours has."""
    trimmed: int = 0
    few: int = 0

    def line(self, where: str, how: str) -> str:
        """All of it."""
        told = [f"{n:,} as {name}" for name, n in self.shapes.most_common()]
        if self.few:
            told.append(f"{self.few:,} with fewer than four choices left out")
        if self.trimmed:
            told.append(f"white space around {self.trimmed:,} texts removed")
        if self.left_out:
            names = [shown(name) for name in list(self.left_out)[:SHOWN]]
            told.append(f"fields not used: {', '.join(names)}")
        return f"{where}: {how}, rows read {'; '.join(told)}"


def _trimmed(row: dict[str, object], notes: _Notes) -> dict[str, object]:
    """The row without white space around its texts; a prompt may end in a new line, which tells
    how the answer follows."""
    out = dict(row)
    for name, value in row.items():
        if name in ("prompt", "corrupt") and isinstance(value, str):
            out[name] = value.rstrip(" \t")
        elif name in ("answer", "counterfactual", "split") and isinstance(value, str):
            out[name] = value.strip()
        elif name == "role" and isinstance(value, str):
            row[name] = out[name] = value.strip().replace("-", "_")
        elif name == "distractors" and isinstance(value, list):
            out[name] = [x.strip() if isinstance(x, str) else x for x in value]
    notes.trimmed += sum(out[name] != row[name] for name in out)
    return out


def _row(made: Mapping[str, object], line: int, given: Mapping[str, str], notes: _Notes) -> Row:
    """One row, checked; raises a TaskError that says what is wrong with it."""
    own = {k: _text(v) for k, v in made.items() if k != "distractors"}
    row: dict[str, object] = {**given}
    row |= {k: v for k, v in own.items() if not (isinstance(v, str) and not v)}
    wrong = as_list(made.get("distractors"))
    if isinstance(wrong, str):
        wrong = [d.strip() for d in wrong.split("|")] if wrong.strip() else None
    if isinstance(wrong, list):
        wrong = [_text(d) for d in wrong]
    elif not _text(wrong):
        wrong = None
    row = _trimmed({**row, "distractors": wrong} if wrong else row, notes)
    if given.get("role", row.get("role")) != row.get("role"):
        raise TaskError(
            f"its own role is {row['role']!r:.80}, but it stands among those given as "
            f"{given['role']!r}: correct one of them"
        )
    if why := _why_bad(row):
        raise TaskError(why)
    wrong = row.pop("distractors", [])
    text = {k: str(v) for k, v in row.items()}
    return Row(**text, distractors=tuple(wrong) if _are_texts(wrong) else (), line=line)


def _parse(numbered: Iterable[Numbered], where: str, how: str, kind: str, **given: str) -> Reading:
    notes = _Notes()

    def make(line: int, record: Mapping[str, object]) -> list[Row]:
        shape, made, left_out = convert(fold(record), kind)
        rows = [_row(one, line, given, notes) for one in made]
        notes.shapes[shape.name] += bool(made)
        notes.few += not made
        notes.left_out.update(left_out)
        return rows

    rows = [row for rows in sift(numbered, make, where) for row in rows]
    if not rows:
        raise TaskError(f"{where}: there is no row{' of four choices' if notes.few else ''}.")
    return Reading(rows, notes.line(where, how))


def parse_rows(records: Iterable[Numbered], where: str = "rows", **given: str) -> list[Row]:
    """Rows from plain records.

    Arguments:
        records: line and mapping; a string in a mapping's place says why there is none.
        where: named in messages.
        given: fields that every row gets unless it has its own; a row of another ``role`` than is
            given is a bad one.

    Raises:
        TaskError: no row, or bad ones; lists the first `SHOWN` with line and reason.
    """
    return _parse(records, where, where, "rows", **given).rows


def read(source: str | Path | Iterable[object], kind: str = "rows", **given: str) -> Reading:
    """Rows of any known shape, checked, and how they were read.

    Arguments:
        source: see `sources.records`.
        kind: rows, tofu, muse or wmdp, which know fewer shapes (`shapes.KINDS`).
        given: fields that every row gets unless it has its own (such as ``role="forget"``).

    Raises:
        TaskError: as `sources.records`; or bad rows, listed with line and reason.
    """
    found = records(source)
    return _parse(found.records, found.where, found.how, kind, **given)


def read_rows(source: str | Path | Iterable[object], **given: str) -> list[Row]:
    """Rows of the schema of `Row`, or of another known shape (docs/tasks.md), checked.

    Arguments:
        source: path of a .jsonl, .json, .csv, .tsv or .parquet file, or of a folder that `datasets`
            reads; a name on the hub, ``owner/name[:configuration[:split]]``; a pandas DataFrame;
            or any iterable of mappings, such as a `datasets.Dataset`.
        given: fields that every row gets unless it has its own (such as ``role="forget"``).

    Raises:
        TaskError: no such source, an unreadable one, or an unreachable hub (within 5 s); or bad
            rows, listed with line and reason.
    """
    return read(source, **given).rows


def _fact_of(row: Row) -> tuple[str, ...]:
    """What a row asks: of one role and relation, one subject and one answer."""
    return row.role, row.relation, row.fact, row.answer


def hold_out(name: str, rows: Sequence[Row], seed: int) -> tuple[list[Row], str]:
    """Rows of which none names a split with splits, and in one line which.

    Rows of one role, relation, subject and answer are one fact; its different prompts, in the order
    of the file, are its phrasings.

    1. The last of two or more phrasings of a fact is unseen, and of four or more the one before it
       is for ``dev``; the others are trained on.
    2. A fact in one phrasing is trained on; but of such retain facts a fifth, drawn by the seed, is
       unseen.
    3. ``retain_unscored`` rows are trained on; ``neighbour`` rows are unseen.

    Arguments:
        name: of the task.
        rows: none of them names a split.
        seed: of the draw.

    Raises:
        TaskError: no forget fact comes in two phrasings (to score the one that was trained on
            would not show that others are forgotten); shows two rows that would do.
    """
    prompts: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        prompts.setdefault(_fact_of(row), {})[row.prompt] = None
    phrasings = {fact: list(asked) for fact, asked in prompts.items()}
    by_role = {r: [fact for fact in phrasings if fact[0] == r] for r in ("forget", "retain")}
    several = {fact for facts in by_role.values() for fact in facts if len(phrasings[fact]) > 1}
    if by_role["forget"] and not several & set(by_role["forget"]):
        raise TaskError(_one_phrasing(name, next(row for row in rows if row.role == "forget")))
    single = {r: [f for f in facts if f not in several] for r, facts in by_role.items()}
    n = len(single["retain"])
    drawn = set(random.Random(seed).sample(single["retain"], max(n // FIFTH, 1) if n > 1 else 0))

    def split(row: Row) -> str:
        fact = _fact_of(row)
        if row.role == "neighbour" or fact in drawn:
            return "unseen"
        if fact not in several:
            return "train"
        asked = phrasings[fact]
        if row.prompt == asked[-1]:
            return "unseen"
        return "dev" if len(asked) >= FEWEST_DEV and row.prompt == asked[-2] else "train"

    told = [
        f"the last phrasing of {number_of(len(found), f'{r} fact')} is unseen"
        for r, facts in by_role.items()
        if (found := several & set(facts))
    ]
    if drawn:
        told.append(f"so are {len(drawn)} of {n} retain facts that come in one phrasing")
    if single["forget"]:
        once = number_of(len(single["forget"]), "forget fact")
        told.append(f"{once} in one phrasing: trained on, not scored")
    return [replace(row, split=split(row)) for row in rows], f"no split given: {'; '.join(told)}"


def _one_phrasing(name: str, row: Row) -> str:
    """Why rows without a split are refused, with two that would do in place of one of them."""
    subject = row.answer if row.subject in ("", row.prompt) else row.subject
    fact = {"role": "forget", "subject": subject, "answer": row.answer}
    two = [
        {**fact, "split": "train", "prompt": row.prompt},
        {**fact, "split": "unseen", "prompt": "the same, asked in other words"},
    ]
    lines = "".join(f"\n  {json.dumps(one, ensure_ascii=False)}" for one in two)
    return (
        f"Task {name!r}: no row names a split, and every forget fact comes in one phrasing. That "
        "it is forgotten there would not show that it is when asked in other words. Give facts "
        "two phrasings, with the same subject and answer (then the last one is unseen), or splits, "
        f"such as for line {row.line}:{lines}\nOr give phrasings in a task file (docs/tasks.md)."
    )
