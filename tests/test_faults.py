"""Faults put into small runs: what the user sees, what is kept, and that they then end the same.

The table in docs/faults.md is made of `FAULTS`, and each row of it is tested here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
BEGUN = "circuit, mask and the checkpoint of unlearning"
WRITE = (
    "RUN{} cannot be written: {}. What was finished before is kept whole. Make room or allow "
    "writing there and run the same command again, or name another folder."
)
CHANGED = (
    "RUN/{} was changed after this run wrote it. Delete RUN/{} and run the same command again, or "
    "name another --out."
)
#: fault -> how it is put in, what the user sees, what is kept
FAULTS: dict[str, tuple[str, str, str]] = {
    "killed": (
        "SIGKILL just before each of the 18 files takes its place, and between two steps",
        "nothing; the same command goes on",
        "every file that was whole; the end is the same byte for byte",
    ),
    "interrupted": (
        "SIGINT (Ctrl-C) at a step of unlearning",
        "interrupted; run the same command again to continue.",
        BEGUN,
    ),
    "two_at_once": (
        "a second run into the folder of a stopped one; then the first is killed",
        "RUN is in use by another run (process PID). Wait until it ends, or name another --out.",
        "all of the first run's; a killed run does not block",
    ),
    "disk_full": (
        "a file system of 1 MB (tmpfs)",
        WRITE.format("/model", "the disk is full"),
        f"{BEGUN}; no part of the model",
    ),
    "file_limit": (
        "RLIMIT_FSIZE of 1 MB",
        WRITE.format("/model", "the file is larger than is allowed here"),
        f"{BEGUN}; no part of the model",
    ),
    "read_only": (
        "a folder that cannot be written",
        WRITE.format("", "(it is read-only|permission is denied)"),
        "nothing was begun",
    ),
    "memory": (
        "RLIMIT_DATA leaves 150 MB when discovery begins, with --circuit.batch-size 256",
        "Out of memory while discovering the circuit. Run it again in the same folder with a "
        "smaller --circuit.batch-size (now 256) or a --circuit.memory-gb. What was finished before "
        "is kept.",
        "everything; with --circuit.batch-size 4, under the same limit, the run goes on and ends "
        "the same as one that had enough",
    ),
    "circuit.json": (
        "cut to two thirds",
        CHANGED.format("circuit.json", "circuit.json"),
        "everything else; delete the file and run again",
    ),
    "mask.safetensors": (
        "cut to two thirds",
        CHANGED.format("mask.safetensors", "mask.safetensors"),
        "everything else; delete the file and run again",
    ),
    "unlearning.safetensors": (
        "cut to two thirds",
        "RUN/unlearning.safetensors is not a readable checkpoint: (.+)",
        "everything else; delete the file and run again",
    ),
    "ledger.safetensors": (
        "cut to two thirds",
        CHANGED.format("ledger.safetensors", "ledger.safetensors"),
        "everything else; delete the file and run again",
    ),
    "model/model.safetensors": (
        "cut to two thirds",
        CHANGED.format("model/model.safetensors", "model"),
        "everything else; delete the folder and run again",
    ),
    "another_model": (
        "the run was begun with a model of another hash",
        "RUN was begun with another model. Go on with the same, or name another --out.",
        "everything",
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened, fault by fault."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "fault_script.py"), str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["whole"][0] == 0
    return {**out, **out["truncated"]}


def pattern(fault: str) -> str:
    """What the table says is seen, as a pattern."""
    parts = re.split(r"(\(.*?[|+].*?\))", FAULTS[fault][1])
    text = "".join(p if k % 2 else re.escape(p) for k, p in enumerate(parts))
    return "mansu: " + text.replace("RUN", "run").replace("PID", r"\d+")


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "killed"])
def test_one_clear_line_and_the_rest_is_kept(found: dict[str, Any], fault: str):
    seen = found[fault]
    if seen is None:
        pytest.skip("needs Linux, and the right to mount a file system")
    (line,) = seen["said"]
    assert re.fullmatch(pattern(fault), line), line
    assert seen["status"] == (130 if fault == "interrupted" else 1)
    assert not [f for f in seen["kept"] if ".partial" in f]
    if "then" in seen:
        assert (seen["then"], seen["then_said"], seen["same"]) == (0, [], True)
    if FAULTS[fault][2].startswith(BEGUN):
        begun = {"circuit.json", "mask.safetensors", "unlearning.safetensors"}
        assert begun <= set(seen["kept"]) and not [f for f in seen["kept"] if "model/" in f]
    if fault == "read_only":
        assert seen["kept"] == []


def test_killed_at_every_write_the_end_is_the_same(found: dict[str, Any]):
    seen = found["killed"]
    assert seen["statuses"] == [-9] * 19 and len(seen["names"]) == 18
    assert seen["then"] == [0, []] and seen["same"]


def table_row(fault: str, parts: tuple[str, str, str]) -> str:
    row = f"| {' | '.join([fault.replace('_', ' '), *parts])} |".replace("(.+)", "...")
    return row.replace("(it is read-only|permission is denied)", "it is read-only")


def test_the_table_is_these_faults():
    text = (HERE.parent / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for fault, parts in FAULTS.items():
        row = table_row(fault, parts)
        assert row in rows, row
