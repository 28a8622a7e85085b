"""A whole run started by torchrun: two processes, one run, the artefacts of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mansu_interp.circuit import Circuit
from mansu_interp.ledger import Ledger
from mansu_interp.masks import Mask

SETTINGS = """--circuit.pairs 8 --circuit.ig-steps 2 --circuit.faithfulness 0.5 --unlearn.steps 4
--unlearn.lr 0.1 --relearn-steps 0 --score-pairs 20 --threads 1"""


def launch(out: Path, *launcher: str) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "mansu_interp", "run", "--out", out, *SETTINGS.split()],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_make_one_run(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    launch(one)
    said = launch(two, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert said.count("report.html") == 1  # the first process alone says what came out
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    circuits = [Circuit.load(folder / "circuit.json") for folder in (one, two)]
    assert (circuits[0].edges == circuits[1].edges).all()
    np.testing.assert_allclose(circuits[0].scores, circuits[1].scores, rtol=0, atol=1e-5)
    masks = [Mask.load(folder / "mask.safetensors").indices for folder in (one, two)]
    chosen = [{(name, int(i)) for name, index in m.items() for i in index} for m in masks]
    assert len(chosen[0] ^ chosen[1]) <= 0.001 * len(chosen[0])
    edits = [Ledger.load(folder / "ledger.safetensors") for folder in (one, two)]
    assert edits[0].n_edits > 0 and abs(edits[0].n_edits - edits[1].n_edits) <= 5
