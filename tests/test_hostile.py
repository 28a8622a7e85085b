"""What strangers' files can do: a smoke part of the fuzzing (scripts/fuzz.py), and known tricks."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.errors import ArtifactError, ModelError, TaskError
from mansu_interp.masks.mask import Mask
from mansu_interp.models.load import empty_model
from mansu_interp.tasks.files import data_file, read_task_file
from mansu_interp.utils.files import read_json


def load_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec and spec.loader
    sys.modules["fuzz"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = load_script()
QUICK = [n for n in fuzz.LOADERS if n not in ("report", "model config")]


@pytest.mark.parametrize("name", QUICK)
def test_every_seed_is_taken_but_a_foreign_run_folder(name: str):
    taken = [fuzz.attempt(fuzz.LOADERS[name], seed) for seed in fuzz.LOADERS[name].seeds()]
    assert all(taken) == (name != "run folder")


@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_changed_inputs_raise_only_our_own_errors(name: str):
    loader, rng = fuzz.LOADERS[name], random.Random(0)
    seeds = loader.seeds()
    taken = [
        fuzz.attempt(loader, loader.mutate(rng.choice(seeds), rng))
        for _ in range(60 if name in QUICK else 6)
    ]
    assert not all(taken)


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_raise_only_our_own_errors(name: str, data: bytes):
    fuzz.attempt(fuzz.LOADERS[name], data)


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
