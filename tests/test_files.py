"""Locks, and what killed runs leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mansu_interp.errors import ResourceError
from mansu_interp.utils.files import LOCK, atomic_folder, atomic_path, is_leftover, locked

HOLD = """
import sys, time
from pathlib import Path
from mansu_interp.utils.files import atomic_path, locked
folder = Path(sys.argv[1])
with locked(folder), atomic_path(folder / "half.txt") as path:
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder and is in the middle of writing a file there."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if is_leftover(p))


def test_one_process_holds_a_folder_and_its_death_frees_it(tmp_path: Path):
    process = hold(tmp_path)
    try:
        with (
            pytest.raises(ResourceError, match=rf"another run \(process {process.pid}\)\. Wait"),
            locked(tmp_path),
        ):
            pass
        assert len(leftovers(tmp_path)) == 2  # the lock, and its half-written file
    finally:
        kill(process)
    with locked(tmp_path):
        assert leftovers(tmp_path) == [LOCK]
        with pytest.raises(ResourceError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_only_what_our_own_dead_processes_left_is_removed(tmp_path: Path):
    """Not the user's files, nor another run's, nor anything behind a link."""
    run, outside, other = tmp_path / "run", tmp_path / "outside", tmp_path / "run" / "other"
    for folder in (run / "model", outside, other):
        folder.mkdir(parents=True)
    ours = ".x.json.mansu-{}-abcd_123.partial"
    dead, alive = ours.format(2**22 + 1), ours.format(os.getppid())  # beyond the largest number
    kept = [
        run / ".notes.partial",
        run / ".x.json.mansu-12-short.partial",
        run / "x.json.mansu-12-abcd_123.partial",
        run / alive,
        outside / dead,
        other / dead,
        other / LOCK,
    ]
    gone = [run / dead, run / "model" / dead, run / ours.format(os.getpid())]
    for file in (*kept, *gone):
        file.write_text("x")
    (run / "model" / dead.replace("x.json", "folder")).mkdir()
    (run / dead.replace("x.json", "folder")).mkdir()
    (run / dead.replace("x.json", "folder") / "y").write_text("x")
    links = [run / "link", run / dead.replace("x.json", "link")]
    for link in links:
        link.symlink_to(outside)
    with locked(run):
        left = {p for p in tmp_path.rglob("*") if not p.is_dir() or p.is_symlink()}
    assert left == {*kept, *links, run / LOCK}
    assert not [p for p in run.rglob("*folder*")]


def test_what_is_unfinished_is_recognised(tmp_path: Path):
    with atomic_path(tmp_path / "a b.json") as file, atomic_folder(tmp_path / "m") as folder:
        assert is_leftover(file) and is_leftover(folder)
        file.write_text("{}")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a b.json", "m"]
