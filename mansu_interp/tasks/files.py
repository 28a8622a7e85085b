"""Read task files and the tables that they name, whoever wrote them."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path

from ..errors import ArtifactError, TaskError
from ..utils.files import read_bytes, read_json
from ..utils.shipped import DATA, is_embedded
from ..utils.words import decode
from .data.sources import SUFFIXES, is_file, is_rows, separator
from .schema import SCHEMA, Relation, RowTask, TaskFile, parse_task

ROBUST = "robust"
"""Key of a task file's settings against relearning."""
MAX_TABLE = 16 << 20
"""Bytes of the largest table or text that is read."""
MAX_ROWS = 100_000


def embedded_tasks() -> list[str]:
    """Names of the tasks that ship with the package."""
    return sorted(p.stem for p in (DATA / "tasks").glob("*.json"))


def read_task_file(name: str | Path) -> tuple[TaskFile, Path]:
    """The checked task file, and the folder in which its tables are looked up first.

    Of a file of rows: a task over them, and the file itself.

    Raises:
        TaskError: no such task, or not a task file.
    """
    shipped = DATA / "tasks" / f"{name}.json"
    path = shipped if is_file(shipped) else Path(name)
    if not is_file(path):
        raise TaskError(
            f"Unknown task {str(name)[:300]!r}. Shipped: {', '.join(embedded_tasks())}. "
            "Or give the path of a task file (JSON; the shipped ones are examples) or of rows "
            f"({', '.join(SUFFIXES)})."
        )
    if is_rows(path):
        return RowTask(schema=SCHEMA, name=path.stem, rows=path.name), path
    try:
        value = read_json(path)
    except ArtifactError as error:
        raise TaskError(f"The task file {path} is not valid JSON: {error}") from error
    try:
        spec = parse_task(value)
    except ValueError as error:
        raise TaskError(f"The task file {path} is malformed: {error} (docs/tasks.md).") from error
    if foreign := [m for m in spec.reference_models if not is_embedded(m)]:
        raise TaskError(
            f"The task file {path}: the reference model {foreign[0]!r} is no shipped model."
        )
    return spec, path.parent


def data_file(folder: Path, kind: str, name: str) -> Path:
    """A table or text named by a task file: beside it, or else shipped.

    Raises:
        TaskError: no such file, a path instead of a name, or a link to somewhere else.
    """
    if Path(name).name != name or len(name) > 200 or "\0" in name:
        raise TaskError(f"{name[:200]!r}: name a file beside the task file, without a path.")
    for place in (folder / name, DATA / kind / name):
        if is_file(place):
            if not _stays(place):
                raise TaskError(f"{place} is a link that leads out of its folder: copy the file.")
            return place
    raise TaskError(f"The file {name!r} is neither beside the task file nor shipped.")


def _stays(place: Path) -> bool:
    """Whether a file is what its folder holds: no link out of it, but from a snapshot of the hub's
    cache to the blobs of the same repository."""
    folder, target = place.parent.resolve(), place.resolve().parent
    repository = folder.parent.parent
    return target == folder or (
        folder.parent.name == "snapshots"
        and target == repository / "blobs"
        and repository.name.startswith(("datasets--", "models--"))
    )


def read_text(path: Path) -> str:
    """The text of a file of at most `MAX_TABLE` bytes.

    Raises:
        TaskError: it is larger, or not UTF-8.
    """
    try:
        return decode(read_bytes(path, MAX_TABLE))
    except (OSError, ValueError) as error:
        raise TaskError(f"The file {path} cannot be read: {error}.") from error


def read_facts(folder: Path, relation: str, spec: Relation) -> list[tuple[str, str]]:
    """Subject and answer of every row of a relation's table.

    Raises:
        TaskError: the table is missing, malformed or too large, or a field is empty.
    """
    path = data_file(folder, "facts", spec.table)
    text = read_text(path)
    by = separator(text.partition("\n")[0], {c.casefold() for c in (spec.subject, spec.answer)})
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=by)
    try:
        rows = list(itertools.islice(reader, MAX_ROWS + 1))
    except csv.Error as error:
        raise TaskError(f"The table {path}, line {reader.line_num}: {error}.") from error
    columns = (spec.subject, spec.answer)
    if not rows or any(c not in rows[0] for c in columns):
        has = ", ".join(map(repr, reader.fieldnames or ())) or "nothing"
        raise TaskError(
            f"Relation {relation!r}: {path.name} lacks the columns {columns}; it has {has[:300]}."
        )
    if len(rows) > MAX_ROWS:
        raise TaskError(f"The table {path} has more than {MAX_ROWS:,} rows.")
    for number, row in enumerate(rows, 2):
        if not all(row[c] for c in columns):
            raise TaskError(f"The table {path}, row {number}: {' or '.join(columns)} is empty.")
    return [(r[columns[0]], r[columns[1]]) for r in rows]
