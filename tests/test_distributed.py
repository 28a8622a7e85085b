"""Several processes, each with its share: the same scores, circuit, Fisher and edits as one."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pairs, make_tiny

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import CircuitError
from mansu_interp.losses.advantage import gradient_transfer
from mansu_interp.losses.answers import answer_gradient
from mansu_interp.losses.fisher import fisher_diagonal
from mansu_interp.losses.gradients import gradient
from mansu_interp.masks.select import random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.unlearning.methods import Mansu, get_method
from mansu_interp.unlearning.unlearn import unlearn
from mansu_interp.utils.distributed import (
    first_says,
    rank,
    shard,
    sum_number,
    sum_over_processes,
    world_size,
)

pytestmark = pytest.mark.slow

HOW = AttributionConfig(ig_steps=2, batch_size=2)
FIRST = "model.layers.0.mlp.down_proj.weight"
CHOICE = CircuitConfig(ig_steps=2, batch_size=2, pairs=5, faithfulness_pairs=5, top=60)


EDITS = {"mansu": 0.3, "graddiff": 1e-3, "rmu": 1e-3, "npo-sam": 1e-3}
"""Methods and step sizes; of rmu one process may have no part, and some weights no gradient."""


def measure() -> dict[str, Any]:
    """Everything that is shared out, on five pairs."""
    model, pairs = make_tiny(2), make_pairs()
    found = attribute(model, pairs, config=HOW, positions=True, neurons=True)
    circuit = discover(model, pairs, config=CHOICE)
    out: dict[str, Any] = {
        "scores": found.scores,
        "by_position": found.by_position,
        "ends": np.array([found.clean, found.corrupt]),
        "edges": circuit.edges,
        "faithfulness": np.array(circuit.meta.faithfulness),
        **found.neurons,
    }
    for kind in ("mean", "zero"):
        out[kind] = np.array(Ablation(model, pairs, ablation=kind)(circuit.edges))
    out["fisher"] = fisher_diagonal(model, [FIRST], pairs, batch_size=2)[FIRST].numpy()
    out["gradient"] = answer_gradient(model, [FIRST], pairs)[FIRST].numpy()
    transfer = gradient_transfer(model, pairs, pairs)
    out["transfer"] = np.array([transfer.transfer, transfer.advantage])
    return out


def edited(method: str) -> dict[str, Any]:
    """What a few steps of unlearning change in the embedded model, and its losses."""
    model = load_model("facts")
    task = load_task("capitals", model)
    kind = get_method(method)
    more = {"adversarial_steps": 1, "probe_weight": 0.5} if issubclass(kind, Mansu) else {}
    config = kind(steps=2, lr=EDITS[method], batch_size=40, **more)
    result = unlearn(model, task, random_mask(model, 0.001), config)
    return {
        "edit": (result.model.weights[FIRST] - model.weights[FIRST]).numpy(),
        "losses": np.array([[*record.to_json().values()] for record in result.history]),
    }


def computed(model: LanguageModel, losses: int) -> int:
    """How many of some losses this process computes itself."""
    calls = []

    def loss(k: int) -> torch.Tensor:
        calls.append(k)
        return (model.weights[FIRST] ** 2).sum() * k

    (found,) = gradient(model, [FIRST], [lambda k=k: loss(k) for k in range(losses)])
    assert torch.allclose(found, 2 * sum(range(losses)) * model.weights[FIRST])
    return len(calls)


def too_few() -> str:
    """What is said when a process has no pair and neurons are asked for."""
    try:
        attribute(make_tiny(2), make_pairs((4,)), config=HOW, neurons=True)
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
    assert [shard("abc"), shard("a")] == [[("a", "c"), ("a",)], [("b",), ()]][number]
    assert sum_number(number + 0.5) == 2.0
    assert (first_says(number == 0), first_says(number == 1)) == (True, False)
    assert [computed(make_tiny(2), n) for n in (5, 1)] == [[3, 1], [2, 0]][number]
    np.savez(Path(folder) / f"{number}.npz", **measure(), summed=summed.numpy())
    for method in EDITS:
        np.savez(Path(folder) / f"{method}-{number}.npz", **edited(method))
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


@pytest.mark.parametrize("method", EDITS)
def test_two_processes_edit_as_one(folder: Path, method: str):
    alone = edited(method)
    pair = [np.load(folder / f"{method}-{number}.npz") for number in range(2)]
    assert (pair[0]["edit"] == pair[1]["edit"]).all()
    assert np.abs(alone["edit"]).max() > 0
    far = np.abs(pair[0]["edit"] - alone["edit"]) > 1e-3 * np.abs(alone["edit"]).max()
    assert far.mean() < 1e-3
    np.testing.assert_allclose(pair[0]["losses"], alone["losses"], rtol=1e-4)


def test_a_process_without_a_pair_cannot_score_neurons(folder: Path):
    said = [(folder / f"{n}.txt").read_text() for n in range(2)]
    assert all("More processes than pairs" in s for s in said)


def test_one_process_needs_no_group():
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_processes(torch.tensor(3.0)) == 3
