"""Where rows come from: files, data sets, DataFrames and lists, as numbered records.

Nothing here runs code from a file, and only a hub name touches the network. CSV is read cell by
cell as text, so that no "NA" or "007" becomes something else.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from ...errors import TaskError
from ...utils.files import read_bytes, unread
from ...utils.hub import check_online, is_hub_name
from ...utils.libraries import first_line, library
from ...utils.words import decode
from .shapes import KNOWN

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""How row files may end."""
LARGEST = 1 << 28
"""Bytes of a row file beyond which it is refused unread."""
MOST = 1_000_000
"""Rows of a Parquet file, which may be far smaller than what it holds."""
MOST_FILES = 10_000
"""In the folder of a data set, folders included."""
SEPARATORS = ",;\t|"
Numbered = tuple[int, object]
"""Line (or row, from 1) and what it holds; a string in a mapping's place says why there is none."""


@dataclass(frozen=True)
class Source:
    """Records, and how they are read."""

    where: str
    """Named in messages."""
    how: str
    """The format, for the line that tells it."""
    records: Iterator[Numbered]


class _Frame(Protocol):
    """What a pandas DataFrame has."""

    def to_dict(self, orient: str) -> list[object]: ...


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False for names that no file can have."""
    return os.path.isfile(path)  # Path.is_file raises over 255 characters


def is_rows(path: Path) -> bool:
    """Whether a file holds rows: by its ending; of JSON, whether it is a list or a value a line.

    Raises:
        TaskError: it cannot be read.
    """
    if path.suffix.casefold() != ".json":
        return path.suffix.casefold() in SUFFIXES
    text = _text(path).strip()
    first, _, rest = text.partition("\n")
    with contextlib.suppress(ValueError):
        return text.startswith("[") or (bool(rest) and isinstance(_value(first), dict))
    return False


def _text(path: Path) -> str:
    try:
        return decode(read_bytes(path, LARGEST))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {unread(error)}.") from error


def _value(text: str) -> object:
    """A JSON value; NaN, as Python writes it for what is missing, is taken."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _json(path: Path) -> Source:
    """A list, or a value a line, whatever the ending says: both are found under either."""
    text = _text(path)
    with contextlib.suppress(ValueError):
        found = _value(text)
        if isinstance(found, dict):  # a row, or one around the list of them
            lists = [v for v in found.values() if isinstance(v, list)]
            found = lists[0] if len(lists) == len(found) == 1 else [found]
        if isinstance(found, list):
            return Source(str(path), "a JSON list", iter(enumerate(found, 1)))
    return Source(str(path), "JSON lines", _json_lines(text))


def _json_lines(text: str) -> Iterator[Numbered]:
    for line, one in enumerate(text.split("\n"), 1):
        if not one.strip():
            continue
        try:
            yield line, _value(one)
        except ValueError as error:
            yield line, f"not JSON: {error}"


def separator(header: str, known: Collection[str]) -> str:
    """What separates the columns of a CSV file: that which gives most known names, then most
    columns, by its first line."""

    def fits(by: str) -> tuple[int, int]:
        cells = _cells(header, by)
        return sum(cell in known for cell in cells), len(cells)

    return max(SEPARATORS, key=fits)


def _cells(line: str, by: str) -> list[str]:
    """The cells of a line, as names of fields are compared."""
    return [c.strip().casefold() for c in next(csv.reader([line], delimiter=by), [])]


def _csv(path: Path) -> Source:
    text = _text(path)
    header = next((line for line in text.splitlines() if line.strip()), "")
    by = "\t" if path.suffix.casefold() == ".tsv" else separator(header, KNOWN)
    cells = _cells(header, by)
    how = "TSV" if by == "\t" else "CSV" if by == "," else f"CSV separated by {by!r}"
    fields = None
    if len(cells) > 5 and cells[-1] in ("a", "b", "c", "d", "e") and not KNOWN & {*cells}:
        # As MMLU is published: question, choices, letter.
        fields = ["question", *"abcdefghij"[: len(cells) - 2], "answer"]
        how += " without a header"
    return Source(str(path), how, _csv_records(path, text, by, fields))


def _csv_records(path: Path, text: str, by: str, fields: list[str] | None) -> Iterator[Numbered]:
    stream = io.StringIO(text, newline="")
    reader = csv.DictReader(stream, fieldnames=fields, delimiter=by, strict=True)
    try:
        for row in reader:
            extra = None in row
            yield reader.line_num, "more cells than the header has columns" if extra else row
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num}, is not CSV: {error}.") from error


def _parquet(path: Path) -> Source:
    library("pyarrow", "", "Reading Parquet", TaskError)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    def records() -> Iterator[Numbered]:
        try:
            with ParquetFile(path) as file:
                if file.metadata.num_rows > MOST:
                    raise TaskError(f"{path} has more than {MOST:,} rows. Give a part of it.")
                rows = (r for batch in file.iter_batches(1000) for r in batch.to_pylist())
                yield from enumerate(rows, 1)
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(f"{path} cannot be read as Parquet: {first_line(error)}") from error

    return Source(str(path), "Parquet", records())


def _dataset(name: str, place: Path) -> Iterator[Numbered]:
    """Rows of a dataset of the `datasets` library: ``name[:configuration[:split]]``."""
    datasets = library("datasets", "", "Reading data sets", TaskError)
    name, config, split = (*name.split(":"), "", "")[:3]
    try:
        if place.is_dir() and (
            (place / "state.json").exists() or (place / "dataset_dict.json").exists()
        ):
            found = datasets.load_from_disk(str(place))
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


def row_file(path: Path) -> Source:
    """The records of a file.

    Raises:
        TaskError: it is too large, of an unknown ending, or cannot be read.
    """
    ending = path.suffix.casefold()
    if ending not in SUFFIXES:
        raise TaskError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}.")
    if path.stat().st_size > LARGEST:
        raise TaskError(f"{path} has more than {LARGEST >> 20} MB. Give a part of it.")
    read = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(ending, _json)
    return read(path)


def _check_few_files(folder: Path) -> None:
    """Raise TaskError over a folder with so many files that `datasets` would look for minutes."""
    seen = 0
    for _, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MOST_FILES:
            raise TaskError(
                f"{folder} holds more than {MOST_FILES:,} files and folders. Name the folder of "
                "the data set alone, or one of its files."
            )


def _from_name(source: str) -> Source:
    place = Path(source).expanduser()
    if is_file(place):
        return row_file(place)
    if not os.path.exists(place):
        hub = source.split(":", maxsplit=1)[0]
        place = Path(hub).expanduser()
        if not os.path.exists(place):
            if not is_hub_name(hub):
                raise TaskError(
                    f"{source[:300]!r} is neither a file nor a folder, nor a data set's name "
                    "(owner/name[:configuration[:split]])."
                )
            check_online(f"The data set {hub!r}", TaskError)
    if place.is_dir():
        _check_few_files(place)
    return Source(source, "a data set", _dataset(source, place))


def records(source: str | Path | Iterable[object]) -> Source:
    """Numbered records of a source, unchecked.

    Arguments:
        source: path of a .jsonl, .json, .csv, .tsv or .parquet file, or of a folder that `datasets`
            reads; a name on the hub, ``owner/name[:configuration[:split]]``; a pandas DataFrame;
            or any iterable of mappings, such as a `datasets.Dataset`.

    Raises:
        TaskError: no such source, an unreadable one, or an unreachable hub (within 5 s).
    """
    if isinstance(source, (str, Path)):
        return _from_name(str(source))
    where = type(source).__name__
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return Source(where, where, iter(enumerate(cast(_Frame, source).to_dict("records"), 1)))
    if not isinstance(source, Iterable):
        raise TaskError(
            f"{source!r:.80} is no source of rows: expected a path, a name on the hub, a DataFrame "
            "or an iterable of mappings."
        )
    return Source(where, where, iter(enumerate(source, 1)))
