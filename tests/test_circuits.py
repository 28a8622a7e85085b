"""The exported circuits load, fit the embedded model, and are what discovery finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SHIPPED

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.discover import discover
from mansu_interp.errors import ArtifactError
from mansu_interp.masks.mask import Mask
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task


@pytest.fixture(scope="module")
def model():
    return load_model("facts")


@pytest.mark.parametrize("name", ["capitals", "countries"])
def test_exported_files_fit_the_model(model, name: str):
    circuit = Circuit.load(SHIPPED / f"facts-{name}.json")
    assert circuit.graph.architecture == model.architecture
    assert circuit.meta.model_sha256 == model.sha256
    assert (circuit.meta.faithfulness or 0) >= 0.85
    assert circuit.n_edges == circuit.graph.prune(circuit.edges).sum() > 10
    mask = Mask.load(SHIPPED / f"facts-{name}.mask.safetensors")
    mask.check_fits(model)
    assert mask.limit == int(0.005 * model.n_parameters)


def test_rediscovery_finds_the_exported_circuit(model):
    task = load_task("capitals", model)
    found = discover(model, task.forget, retain=task.retain)
    saved = Circuit.load(SHIPPED / "facts-capitals.json")
    both = (found.edges & saved.edges).sum()
    assert both / (found.edges | saved.edges).sum() > 0.9
    where = found.edges & saved.edges
    np.testing.assert_allclose(found.scores[where], saved.scores[where], rtol=1e-3, atol=1e-5)


def test_a_damaged_circuit_is_refused(tmp_path: Path):
    text = (SHIPPED / "facts-capitals.json").read_text()
    for bad in (
        text[:-20],
        text.replace('"schema": 2', '"schema": 9'),
        text.replace('"source": "input"', '"source": "a9.h0"'),
    ):
        (tmp_path / "c.json").write_text(bad)
        with pytest.raises(ArtifactError, match=r"c\.json"):
            Circuit.load(tmp_path / "c.json")
