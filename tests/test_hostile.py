"""What strangers' files can do: a smoke part of the fuzzing (scripts/fuzz.py), and known tricks."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checked import wrong_type
from hypothesis import given, settings
from hypothesis import strategies as st

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.errors import ArtifactError, ModelError, ResourceError, TaskError
from mansu_interp.masks.mask import Mask
from mansu_interp.models.load import empty_model
from mansu_interp.runs import run as pipeline
from mansu_interp.tasks.files import data_file, read_task_file
from mansu_interp.utils import files, tensors
from mansu_interp.utils.files import (
    LOCK,
    atomic_folder,
    atomic_path,
    is_leftover,
    locked,
    read_json,
)


def load_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec and spec.loader
    sys.modules["fuzz"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = load_script()
QUICK = [n for n in fuzz.LOADERS if n not in ("report", "model config", "arguments", "slips")]


@pytest.mark.parametrize("name", QUICK)
def test_every_seed_is_taken_but_a_foreign_run_folder(name: str):
    taken = [fuzz.attempt(fuzz.LOADERS[name], seed) for seed in fuzz.LOADERS[name].seeds()]
    assert all(taken) == (name != "run folder")


@pytest.mark.parametrize(
    "name", [n if n != "slips" else pytest.param(n, marks=wrong_type) for n in fuzz.LOADERS]
)
def test_changed_inputs_raise_only_our_own_errors(name: str):
    loader, rng = fuzz.LOADERS[name], random.Random(0)
    seeds = loader.seeds()
    taken = [
        fuzz.attempt(loader, loader.mutate(rng.choice(seeds), rng))
        for _ in range({**dict.fromkeys(QUICK, 60), "slips": 300}.get(name, 6))
    ]
    assert not all(taken)


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_raise_only_our_own_errors(name: str, data: bytes):
    fuzz.attempt(fuzz.LOADERS[name], data)


@pytest.mark.slow
def test_a_third_of_changed_rows_are_taken_and_become_tasks():
    loader, rng = fuzz.LOADERS["rows"], random.Random(1)
    seeds, n = loader.seeds(), 120
    fuzz.MADE.clear()
    for _ in range(n):
        fuzz.attempt(loader, loader.mutate(rng.choice(seeds), rng))
    assert n / 3 < fuzz.MADE["tasks"] <= fuzz.MADE["read"] < n


def test_deep_huge_and_endless_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.json"
    for text, message in (
        ("[" * 100_000, "nested too deeply"),
        ("9" * 10_000, "limit"),
        ("[NaN]", "NaN is not a finite number"),
    ):
        file.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            read_json(file)
    with pytest.raises(ArtifactError, match="no regular file"):
        read_json(Path("/dev/zero"))
    monkeypatch.setattr("mansu_interp.utils.files.MAX_JSON", 10)
    file.write_text(" " * 11)
    with pytest.raises(ArtifactError, match="11 bytes, more than 10"):
        read_json(file)


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path):
    header = {"a": {"dtype": "I32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ArtifactError, match="not a readable mask"):
        Mask.load(tmp_path / "m")
    (tmp_path / "m").write_bytes((1 << 60).to_bytes(8, "little"))
    with pytest.raises(ArtifactError, match="header is longer"):
        Mask.load(tmp_path / "m")
    config = {"model_type": "llama", "num_hidden_layers": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="more than 1,000 layers"):
        empty_model(tmp_path / "config.json")
    data = json.loads(fuzz.LOADERS["circuit"].seeds()[0])
    data["graph"]["architecture"]["n_layers"] = 10**7
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="larger than any model"):
        Circuit.load(tmp_path / "c.json")


def test_a_task_reads_nothing_outside_its_folder(tmp_path: Path):
    (tmp_path / "secret.csv").write_text("s,a\n")
    inside = tmp_path / "task"
    inside.mkdir()
    (inside / "link.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(TaskError, match="a link that leads out of its folder"):
        data_file(inside, "facts", "link.csv")
    for name in ("../secret.csv", str(tmp_path / "secret.csv"), "..", "a\0b", "x" * 300):
        with pytest.raises(TaskError, match=r"without a path|neither beside"):
            data_file(inside, "facts", name)
    (inside / "t.json").write_text(json.dumps({**fuzz.TASK, "reference_models": ["owner/model"]}))
    with pytest.raises(TaskError, match="the reference model 'owner/model' is no shipped model"):
        read_task_file(inside / "t.json")


# Locks, and what killed runs leave behind.

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
    ours = f".x.json.mansu-{files._MACHINE}-{{}}-abcd0123.partial"
    dead, alive = ours.format(2**22 + 1), ours.format(os.getppid())  # beyond the largest number
    kept = [
        run / ".notes.partial",
        run / f".x.json.mansu-{files._MACHINE}-12-short.partial",
        run / f"x.json.mansu-{files._MACHINE}-12-abcd0123.partial",
        run / dead.replace(files._MACHINE, "000000"),  # of another machine
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300, "its name is too long"),
        ("file/x", "a part of its path is a file"),
        ("file/x/y", "a part of its path is a file"),
        ("a\0b", "no file can have that name"),
        ("a\ud800b", "no file can have that name"),
        ("..", "no file can have that name"),
    ],
)
def test_what_cannot_be_a_file_is_one_sentence(tmp_path: Path, name: str, said: str):
    (tmp_path / "file").write_text("mine")
    for made in (atomic_path, atomic_folder):
        with (
            pytest.raises(ResourceError, match=f"cannot be written: {said}"),
            made(tmp_path / name),
        ):
            pass
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "mine")]


def test_a_name_as_long_as_a_name_can_be(tmp_path: Path):
    with atomic_path(tmp_path / ("é" * 127)) as file:
        file.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["é" * 127]


def test_what_is_there_is_left_alone(tmp_path: Path):
    """Also what comes while the new one is made, and a link to nothing."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for made in (atomic_path, atomic_folder):
        for name in ("file", "link"):
            with pytest.raises(ArtifactError, match="exists already"), made(tmp_path / name, True):
                pass
        with pytest.raises(ArtifactError, match="exists already"), made(tmp_path / "x", True):
            (tmp_path / "x").write_text("mine")
        assert (tmp_path / "x").read_text() == "mine"
        (tmp_path / "x").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_modes_are_those_of_the_umask(tmp_path: Path):
    previous = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "x") as file:
            file.chmod(0o600)  # as safetensors leaves it
        with atomic_folder(tmp_path / "y") as folder:
            (folder / "z").touch(0o600)
    finally:
        os.umask(previous)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"x": 0o640, "y": 0o750, "z": 0o640}


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path):
    process = hold(tmp_path)
    kill(process)
    (tmp_path / ".notes.partial").write_text("mine")
    (tmp_path / LOCK).unlink()
    assert len(leftovers(tmp_path)) == 1
    with atomic_folder(tmp_path / "new"):
        assert len(leftovers(tmp_path)) == 1  # its own
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes.partial", "new"]


def test_an_error_of_the_body_is_not_taken_for_one_of_writing(tmp_path: Path):
    with (
        pytest.raises(ArtifactError, match="not a readable mask"),
        atomic_folder(tmp_path / "new", new=True),
    ):
        Mask.load(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["model", pytest.param("run", marks=pytest.mark.slow)])
def test_spoilt_folders_are_refused_found_or_harmless(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("measure", "load_model", "load_task"):
        monkeypatch.setattr(pipeline, name, getattr(pipeline, name))  # the script replaces them
    monkeypatch.setattr(tensors, "SECONDS", tensors.SECONDS)
    monkeypatch.setattr(fuzz, "_SCRATCH", [])
    monkeypatch.setattr(fuzz, "WORK", tmp_path)
    fuzz.fuzz_folders(kind, 12, 0, tmp_path)
    assert not list(tmp_path.glob("crash-*"))
