"""Several processes, each with its share of the pairs: the same scores and circuit as one."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pairs, make_tiny

from mansu_interp.attribution import attribute
from mansu_interp.circuit import discover
from mansu_interp.config import AttributionConfig, CircuitConfig
from mansu_interp.distributed import rank, sum_over_processes, world_size
from mansu_interp.errors import CircuitError
from mansu_interp.faithfulness import Ablation

HOW = AttributionConfig(ig_steps=2, batch_size=2)
CHOICE = CircuitConfig(ig_steps=2, batch_size=2, pairs=5, faithfulness_pairs=5, top=60)


def measure() -> dict[str, Any]:
    """Everything that is shared out, on five pairs."""
    model, pairs = make_tiny(2), make_pairs()
    found = attribute(model, pairs, HOW, positions=True, neurons=True)
    circuit = discover(model, pairs, CHOICE)
    out: dict[str, Any] = {
        "scores": found.scores,
        "by_position": found.by_position,
        "ends": np.array([found.clean, found.corrupt]),
        "edges": circuit.edges,
        "faithfulness": np.array(circuit.meta["faithfulness"]),
        **found.neurons,
    }
    for kind in ("mean", "zero"):
        out[kind] = np.array(Ablation(model, pairs, ablation=kind)(circuit.edges))
    return out


def too_few() -> str:
    """What is said when a process has no pair and neurons are asked for."""
    try:
        attribute(make_tiny(2), make_pairs((4,)), HOW, neurons=True)
    except CircuitError as error:
        return str(error)
    return "nothing"


def worker(number: int, folder: str) -> None:
    """One process of two."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=number,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    assert (rank(), world_size()) == (number, 2)
    summed = sum_over_processes(torch.tensor([1.0, number]))
    np.savez(Path(folder) / f"{number}.npz", **measure(), summed=summed.numpy())
    (Path(folder) / f"{number}.txt").write_text(too_few())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(n, str(path))) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [p.exitcode for p in processes] == [0, 0]
    return path


def test_two_processes_agree_with_one(folder: Path):
    alone = measure()
    for number in range(2):
        found = np.load(folder / f"{number}.npz")
        assert found["summed"].tolist() == [2.0, 1.0]
        for name, value in alone.items():
            size = max(1e-3, float(np.abs(value).max()))
            assert np.abs(found[name].astype(float) - value).max() < 1e-5 * size, name


def test_a_process_without_a_pair_cannot_score_neurons(folder: Path):
    said = [(folder / f"{n}.txt").read_text() for n in range(2)]
    assert all("More processes than pairs" in s for s in said)


def test_one_process_needs_no_group():
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_processes(torch.tensor(3.0)) == 3
