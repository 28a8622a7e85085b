"""Rows brought by the user: JSONL, CSV, pandas and `datasets`, checked one by one.

A row is one prompt with its answer (see `Row`). Every bad row is named with its line and reason;
none is dropped. Nothing here runs code from a file, and only a hub name touches the network.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from ..errors import TaskError
from ..utils.hub import check_online, is_hub_name
from ..utils.libraries import first_line, library

ROLES = ("forget", "retain", "retain_unscored", "neighbour")
SPLITS = ("train", "dev", "unseen")
SHOWN = 10
"""Bad rows that a message lists; it counts the others."""
LARGEST = 1 << 28
"""Bytes of a row file beyond which it is refused unread."""
SUFFIXES = (".jsonl", ".csv")
Numbered = tuple[int, object]
"""Line (or row, from 1) and what it holds."""
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


FIELDS = tuple(f.name for f in fields(Row) if f.name != "line")


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
    """Missing values of CSV and pandas as empty strings."""
    nan = isinstance(value, float) and value != value  # noqa: PLR0124
    return "" if value is None or nan or type(value).__name__ == "NAType" else value


def _why_bad(row: Mapping[str, object]) -> str:
    """What is wrong with the fields of a row, or nothing."""
    if unknown := sorted(set(map(str, row)) - set(FIELDS)):
        return f"unknown field {', '.join(unknown)}; expected some of {', '.join(FIELDS)}"
    for name in ("role", "prompt", "answer"):
        if not row.get(name):
            return f"{name} is missing or empty"
    for name, value in row.items():
        if name != "distractors" and not isinstance(value, str):
            return f"{name} must be text; got {type(value).__name__}"
    text = {k: v for k, v in row.items() if isinstance(v, str)}
    role, split, answer = text["role"], text.get("split", ""), text["answer"]
    if role not in ROLES:
        return f"role {role!r}; expected {', '.join(ROLES)}"
    if split and split not in SPLITS:
        return f"split {split!r}; expected {', '.join(SPLITS)}"
    if role == "retain_unscored" and split in ("dev", "unseen"):
        return "retain_unscored rows are never scored: give them the split train or none"
    if role == "neighbour" and split == "train":
        return "neighbour rows are never trained on: give them the split dev, unseen or none"
    if not answer.strip() or answer != answer.strip():
        return f"the answer {answer!r} begins or ends with white space"
    for name in ("prompt", "corrupt"):
        given = text.get(name)
        if given and (given.endswith(" ") or not given.strip()):
            return f"the {name} ends with a space; the answer follows after one by itself"
    return _why_bad_answers(row.get("distractors") or [], answer, text.get("counterfactual"))


def _why_bad_answers(wrong: object, answer: str, counterfactual: str | None) -> str:
    """The same of its wrong answers."""
    if not isinstance(wrong, list) or not all(isinstance(d, str) and d.strip() for d in wrong):
        return "distractors must be a list of texts (in CSV: separated by |)"
    if wrong and len(set(wrong)) < 3:
        return f"{len(set(wrong))} different distractors; expected three or none"
    if answer in (*wrong, counterfactual):
        return f"the answer {answer!r} is also a wrong one"
    return ""


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

    def make(line: int, record: Mapping[str, object]) -> Row:
        own = {k: _text(v) for k, v in record.items()}
        if (role := own.get("role")) and given.get("role", role) != role:
            raise TaskError(
                f"its own role is {role!r:.80}, but it stands among those given as "
                f"{given['role']!r}: correct one of them"
            )
        row: dict[str, object] = {**given}
        row |= {k: v for k, v in own.items() if not (isinstance(v, str) and not v)}
        wrong = row.pop("distractors", None)
        wrong = [d.strip() for d in wrong.split("|")] if isinstance(wrong, str) else as_list(wrong)
        if why := _why_bad({**row, "distractors": wrong} if wrong else row):
            raise TaskError(why)
        text = {k: str(v) for k, v in row.items()}
        return Row(**text, distractors=tuple(wrong) if isinstance(wrong, list) else (), line=line)

    out = sift(records, make, where)
    if not out:
        raise TaskError(f"{where}: there is no row.")
    return out


def _jsonl(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8", errors="strict") as stream:
        for line, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield line, f"not JSON: {error}"


def _csv(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        for row in reader:
            if None in row:
                yield reader.line_num, "more cells than the header has columns"
            else:
                yield reader.line_num, row


def _dataset(name: str, place: Path) -> Iterator[Numbered]:
    """Rows of a dataset of the `datasets` library: ``name[:configuration[:split]]``."""
    datasets = library("datasets", "", "Reading data sets", TaskError)
    name, config, split = (*name.split(":"), "", "")[:3]
    try:
        if place.is_dir() and (
            (place / "state.json").exists() or (place / "dataset_dict.json").exists()
        ):
            found = datasets.load_from_disk(str(place))
        elif place.is_file():
            found = datasets.load_dataset(place.suffix[1:], data_files=str(place))
        else:
            found = datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever the library raises of a strange file
        raise TaskError(
            f"The data set {name!r} could not be loaded: {first_line(error)}"
        ) from error
    if isinstance(found, dict):
        splits = ", ".join(map(str, found))
        if not split and len(found) > 1:
            raise TaskError(f"{name} has the splits {splits}: give name:configuration:split.")
        if split and split not in found:
            raise TaskError(f"{name} has no split {split!r}; it has {splits}.")
        found = found[split or next(iter(found))]
    yield from enumerate(found, 1)


def _from_name(source: str) -> Iterator[Numbered]:
    place = Path(source).expanduser()
    if not place.exists():
        place = Path(source.split(":", maxsplit=1)[0]).expanduser()
    if place.is_file() and place.stat().st_size > LARGEST:
        raise TaskError(f"{place} has more than {LARGEST >> 20} MB. Give a part of it.")
    if place.is_file() and place.suffix in SUFFIXES:
        try:
            yield from (_jsonl if place.suffix == ".jsonl" else _csv)(place)
        except (UnicodeDecodeError, csv.Error) as error:
            raise TaskError(f"{place} cannot be read as {place.suffix[1:]}: {error}.") from error
        return
    if place.is_file() and place.suffix not in (".json", ".parquet"):
        raise TaskError(f"{place}: expected .jsonl, .csv, .json or .parquet.")
    if not place.exists():
        hub = source.split(":", maxsplit=1)[0]
        if not is_hub_name(hub):
            raise TaskError(
                f"{source!r} is neither a file nor a folder, nor a data set's name "
                "(owner/name[:configuration[:split]])."
            )
        check_online(f"The data set {hub!r}", TaskError)
    yield from _dataset(source, place)


def as_list(value: object) -> object:
    """A list in place of an array of numpy or the like; anything else as it is."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def records(source: str | Path | Iterable[object]) -> Iterator[Numbered]:
    """Numbered records of a source, unchecked.

    Arguments:
        source: path of a .jsonl, .csv, .json or .parquet file, or of a folder that `datasets`
            reads; a name on the hub, ``owner/name[:configuration[:split]]``; a pandas DataFrame;
            or any iterable of mappings, such as a `datasets.Dataset`.

    Raises:
        TaskError: no such source, an unreadable one, or an unreachable hub (within 5 s).
    """
    if isinstance(source, (str, Path)):
        return _from_name(str(source))
    to_records = getattr(source, "to_dict", None)
    if to_records is not None and hasattr(source, "columns"):
        return iter(enumerate(to_records("records"), 1))
    return iter(enumerate(source, 1))


def read_rows(source: str | Path | Iterable[object], **given: str) -> list[Row]:
    """Rows of the schema of `Row`, checked.

    Arguments:
        source: see `records`.
        given: fields that every row gets unless it has its own (such as ``role="forget"``).

    Raises:
        TaskError: as `records`; or bad rows, listed with line and reason.
    """
    where = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    return parse_rows(records(source), where, **given)
