"""The folder of a run: what it is made from, whether it may go on there, and how long it took."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from ..errors import ArtifactError
from ..models.provenance import Provenance, differences
from ..utils.distributed import rank
from ..utils.files import Json, expect, is_leftover, read_json, write_json
from ..utils.renamed import renamed_setting
from .config import RunConfig

REPORTS = ("report.json", "report.md", "report.html")


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
    if not isinstance(before, dict) or result_affecting(before) != wanted:
        raise ArtifactError(f"{out} already holds another run or other files. Name another --out.")
    if all((out / name).exists() for name in REPORTS):
        raise ArtifactError(
            f"{out} already holds this run, finished (see {out / 'report.html'}). "
            "Name another --out, or delete it to run again."
        )


def begin(config: RunConfig, made_from: Provenance) -> None:
    """Write down what a run is made from, or check that it goes on with the same.

    Raises:
        ArtifactError: the folder holds something else, a finished run, or one that was begun with
            another model, task or package version.
    """
    check_folder(config)
    write_json(config.out / "config.json", config_json(config))
    file = config.out / "provenance.json"
    if not file.exists():
        write_json(file, made_from)
    before = read_json(file)
    if other := differences(before if isinstance(before, dict) else {}, made_from):
        raise ArtifactError(
            f"{config.out} was begun with {' and '.join(other)}. Go on with the same, or name "
            "another --out."
        )


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
        if rank() == 0:
            write_json(self.file, self.seconds)
