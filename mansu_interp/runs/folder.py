"""The folder of a run: what it is made from, whether it may go on there, and how long it took."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar, cast

from ..errors import ArtifactError, ResourceError
from ..models.provenance import Provenance, differences
from ..utils.distributed import first_says, rank
from ..utils.files import (
    LOCK,
    Json,
    atomic_folder,
    atomic_path,
    expect,
    file_sha256,
    is_leftover,
    read_json,
    write_json,
    write_text,
)
from ..utils.records import Record, from_json, to_json
from ..utils.renamed import renamed_setting
from ..utils.words import shortened
from .config import RunConfig

REPORTS = ("report.json", "report.md", "report.html")
PROVENANCE, CIRCUIT, GRAPHML = "provenance.json", "circuit.json", "circuit.graphml"
MASK, HISTORY, LEDGER = "mask.safetensors", "history.json", "ledger.safetensors"
MODEL, CARD = "model", "README.md"
RESULTS = "results.json"
"""What was measured so far; gone when the report is written."""
NAMES = (PROVENANCE, CIRCUIT, GRAPHML, MASK, HISTORY, LEDGER, RESULTS, *REPORTS)
"""The files of a run whose hashes it records, but for those in the folder of the model."""
RECORD = "written.json"
"""Where it records them."""


T = TypeVar("T")


def config_json(config: RunConfig) -> dict[str, Json]:
    """The settings as plain JSON values."""
    out = asdict(config)
    out["out"] = str(config.out)
    unlearn = out.pop("unlearn")
    return _listed({**out, "method": config.unlearn.method, "unlearn": unlearn})


def _listed(value: object) -> Json:
    """A nested dictionary with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def result_affecting(settings: dict[str, Json]) -> dict[str, Json]:
    """A run's settings without those that change only its place, its memory and its speed."""
    out = _without(settings, "out", "by_layer", "device")
    if isinstance(circuit := out.get("circuit"), dict):
        out["circuit"] = _without(circuit, "batch_size", "memory_gb")
    return out


def _without(settings: dict[str, Json], *names: str) -> dict[str, Json]:
    """Settings but for some of them."""
    return {k: v for k, v in settings.items() if k not in names}


DIFFERING = 3
"""Settings that a message names."""


def _differing(before: dict[str, Json], now: dict[str, Json]) -> str:
    """The first settings that differ, with both values; empty where none do."""
    old, new = _flat(before), _flat(now)
    names = [n for n in {**new, **old} if (n in old, old.get(n)) != (n in new, new.get(n))]

    def told(values: dict[str, Json], name: str) -> str:
        return shortened(json.dumps(values[name]), 60) if name in values else "not there"

    some = [f"{n} was {told(old, n)}, now {told(new, n)}" for n in names[:DIFFERING]]
    more = len(names) - len(some)
    return "; ".join([*some, f"and {more} more"] if more else some)


def _flat(settings: dict[str, Json], inside: str = "") -> dict[str, Json]:
    """Nested settings by their whole names, such as unlearn.lr."""
    out: dict[str, Json] = {}
    for key, value in settings.items():
        name = f"{inside}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out


def check_folder(config: RunConfig) -> None:
    """Accept an absent or empty output folder, or an unfinished run of the same settings.

    Raises:
        ArtifactError: the folder holds something else, or a finished run.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file. Name a folder with --out.")
    if not out.exists() or all(is_leftover(p) for p in out.iterdir()):
        return
    before = read_json(out / "config.json") if (out / "config.json").exists() else {}
    if old := renamed_setting(before):
        raise ArtifactError(
            f"{out} holds a run of an older version (in its config.json, {old}). Name another "
            "--out."
        )
    wanted = result_affecting(config_json(config))
    finished = all((out / name).exists() for name in REPORTS)
    if not isinstance(before, dict) or "model" not in before:
        raise ArtifactError(f"{out} already holds another run or other files. Name another --out.")
    if other := _differing(result_affecting(before), wanted):
        go_on = "" if finished else "The same command as before goes on with it; for this one, n"
        raise ArtifactError(
            f"{out} already holds another run, with other settings: {other}. "
            f"{go_on or 'N'}ame another --out."
        )
    if finished:
        raise ArtifactError(
            f"{out} already holds this run, finished (see {out / 'report.html'}). "
            "Name another --out, or delete it to run again."
        )


class RunFolder:
    """The files of a run, with a record of what it wrote: a later go trusts nothing else.

    ``written.json`` holds the hash of every file, noted before the file takes its place. Of a file
    that was written twice the last two count, since a run may be killed between note and move. The
    settings are compared and written anew in every go, and ``seconds.json`` only adds up times, so
    they are not in it; the checkpoint of unlearning carries a hash of its own.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.record = out / RECORD
        self.files: dict[str, list[str]] = {}
        if self.record.exists():
            self.files = self._read()

    def _read(self) -> dict[str, list[str]]:
        found = read_json(self.record)
        try:
            expect(found, {"files": {...: [str]}, "sha256": str}, "it")
            if found["sha256"] != _sha256_of(found["files"]):
                raise ValueError("it was changed after it was written")
        except ValueError as error:
            raise ArtifactError(
                f"{self.record} is not this run's record of its files: {error}. Name another "
                "--out, or delete the folder to begin anew."
            ) from error
        return found["files"]

    def _note(self, hashes: dict[str, str]) -> None:
        """Note the hashes of files that are about to take their places."""
        for name, sha in hashes.items():
            self.files[name] = [sha, *(h for h in self.files.get(name, ()) if h != sha)][:2]
        self.files = dict(sorted(self.files.items()))
        write_json(self.record, {"files": self.files, "sha256": _sha256_of(self.files)})

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A temporary file to write to, which becomes this one of the run."""
        self.check_held()
        with atomic_path(
            self.out / name, ready=lambda made: self._note({name: file_sha256(made)})
        ) as made:
            yield made

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """The same for a folder."""
        self.check_held()

        def note(made: Path) -> None:
            files = [p for p in made.rglob("*") if p.is_file()]
            names = [f"{name}/{p.relative_to(made).as_posix()}" for p in files]
            self.files = {k: v for k, v in self.files.items() if not k.startswith(f"{name}/")}
            self._note(dict(zip(names, map(file_sha256, files), strict=True)))

        with atomic_folder(self.out / name, ready=note) as made:
            yield made

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file of the run."""
        with self.file(name) as made:
            write_json(made, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run."""
        with self.file(name) as made:
            write_text(made, text)

    def remove(self, name: str) -> None:
        """Remove a file of the run, and the record of it."""
        self.check_held()
        (self.out / name).unlink(missing_ok=True)
        self.files.pop(name, None)
        self._note({})

    def check(self) -> None:
        """Raise ArtifactError over a file that this run did not write as it is now.

        Only names that a run writes are looked at; what else lies in the folder is never read. In
        ``model/``, which is loaded as a whole, every file counts.
        """
        for path in sorted(self.out.iterdir()):
            if path.name == MODEL:
                self._check_model(path)
            elif path.name in NAMES:
                self._check_file(path, path)

    def _check_model(self, folder: Path) -> None:
        recorded = {n for n in self.files if n.startswith(f"{MODEL}/")}
        found = {p for p in folder.rglob("*") if not (p.is_dir() and not p.is_symlink())}
        found = {p for p in found if not is_leftover(p)}
        missing = recorded - {p.relative_to(self.out).as_posix() for p in found}
        missing -= {f"{MODEL}/{CARD}"}  # written at the end
        if folder.is_symlink() or not folder.is_dir() or missing:
            what = f"lacks {min(missing)}, which this run wrote" if missing else "is no folder"
            raise ArtifactError(f"{folder} {what}. {_delete(folder)}")
        for path in sorted(found):
            self._check_file(path, folder)

    def _check_file(self, path: Path, delete: Path) -> None:
        known = self.files.get(path.relative_to(self.out).as_posix(), [])
        if path.is_symlink() or not path.is_file() or not known:
            raise ArtifactError(f"{path} was not written by this run. {_delete(delete)}")
        if file_sha256(path) not in known:
            raise ArtifactError(f"{path} was changed after this run wrote it. {_delete(delete)}")

    def check_held(self) -> None:
        """Raise ResourceError unless the folder is there and still locked by this process."""
        try:
            holder = (self.out / LOCK).read_text()
        except OSError:
            holder = ""
        if holder != str(os.getpid()):
            raise ResourceError(
                f"{self.out} was removed or taken over while this run was writing to it. Run the "
                "same command again, or name another --out."
            )

    def check_whole(self) -> None:
        """Raise ResourceError unless everything is there that the report is made from."""
        self.check_held()
        for name in self.files.keys() - {*REPORTS, f"{MODEL}/{CARD}"}:
            if not (self.out / name).is_file():
                raise ResourceError(
                    f"{self.out / name} was removed while this run was going on. Run the same "
                    "command again."
                )


def _delete(path: Path) -> str:
    return f"Delete {path} and run the same command again, or name another --out."


def _sha256_of(files: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def begin(config: RunConfig, made_from: Provenance) -> RunFolder:
    """Write down what a run is made from, or check that it goes on with the same.

    Raises:
        ArtifactError: the folder holds something else, a finished run, one that was begun with
            another model, task or package version, or files that the run did not write.
    """
    check_folder(config)
    folder = RunFolder(config.out)
    write_json(config.out / "config.json", config_json(config))
    file = config.out / PROVENANCE
    if not file.exists():
        folder.write_json(PROVENANCE, made_from)
    before = read_json(file)
    if other := differences(before if isinstance(before, dict) else {}, made_from):
        raise ArtifactError(
            f"{config.out} was begun with {' and '.join(other)}. Go on with the same, or name "
            "another --out."
        )
    folder.check()
    return folder


class Results:
    """What was measured of an edited model, kept one by one (a `Keep`): an interruption loses at
    most one of them.

    All processes of a run read the file before the first one writes it.
    """

    def __init__(self, folder: RunFolder, of: str) -> None:
        """Read what an earlier go measured.

        Arguments:
            folder: where they are kept.
            of: SHA-256 of the edited model; results of another one are not used.
        """
        self.folder, self.of = folder, of
        self.file = folder.out / RESULTS
        self.found: dict[str, Json] = {}
        if self.file.exists():
            before = read_json(self.file)
            try:
                expect(before, {"of": str, "results": {...: {}}}, "it")
            except ValueError as error:
                raise ArtifactError(f"{self.file} holds no results: {error}. Delete it.") from error
            self.found = before["results"] if before["of"] == of else {}
        first_says(True)

    def __call__(self, key: str, kind: type[T], make: Callable[[], T]) -> T:
        """See `Keep`."""
        if key in self.found:
            return from_json(kind, self.found[key], f"{self.file}, {key!r}")
        value = make()
        self.found[key] = to_json(cast(Record, value))
        if rank() == 0:
            self.folder.write_json(RESULTS, {"of": self.of, "results": self.found})
        return value


class Clock:
    """Seconds per stage, added up in a file of their own over all goes at a run; of several
    processes the first one writes it."""

    def __init__(self, file: Path) -> None:
        self.file, self.last = file, time.perf_counter()
        self.seconds: dict[str, float] = read_json(file) if file.exists() else {}
        try:
            expect(self.seconds, {...: float}, "it")
        except ValueError as error:
            raise ArtifactError(f"{file} holds no seconds: {error}. Delete it.") from error

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self.last, 2)
        self.last = now
        if rank() == 0 and self.file.parent.is_dir():  # else `RunFolder.check_held` complains
            write_json(self.file, self.seconds)
