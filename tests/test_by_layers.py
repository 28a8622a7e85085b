"""Edge scores by layers, where memory is short: the same as at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import make_pairs, make_tiny
from test_families import make

from mansu_interp.circuits import attribution
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig, Fit, fit_memory
from mansu_interp.errors import CircuitError
from mansu_interp.models.graph import Architecture, Graph

EAP = AttributionConfig(method="eap")


def test_layers_at_a_time_fit_where_one_pair_does_not():
    deep = Graph(Architecture(n_layers=8, n_heads=8, n_kv_heads=1))
    unit = 10 * 64 * 4 / 1e9  # a vector at each position
    assert fit_memory(deep, 64, 10, EAP).gb == pytest.approx((73 + 88) * unit)
    # 34 of both runs, 8 times 11 readers, the input, and 9 a layer
    for vectors, layers in {132: 1, 141: 2, 149: 2, 159: 4}.items():
        found = fit_memory(deep, 64, 10, replace(EAP, memory_gb=(vectors + 0.1) * unit))
        assert (found.pairs, found.layers) == (1, layers)
        assert found.gb == pytest.approx((123 + 9 * layers) * unit)
    with pytest.raises(CircuitError, match="even by layers"):
        fit_memory(deep, 64, 10, replace(EAP, memory_gb=131.9 * unit))


@pytest.mark.parametrize(
    ("settings", "more", "at_once"),
    [
        ({"method": "eap", "at": "both"}, {"neurons": True}, 1),
        ({"ig_steps": 2, "ablation": "mean"}, {"positions": True}, 2),
        ({"method": "eap-ig-activations", "ig_steps": 1, "ablation": "zero"}, {}, 1),
    ],
)
def test_scores_by_layers_are_those_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], more: dict[str, bool], at_once: int
):
    model, pairs, config = make_tiny(2), make_pairs(), AttributionConfig(**settings)
    whole = attribute(model, pairs, config=config, **more)
    monkeypatch.setattr(attribution, "fit_memory", lambda *_: Fit(16, 0.0, at_once))
    found = attribute(model, pairs, config=config, **more)
    size = np.abs(whole.scores).max()
    assert np.abs(found.scores - whole.scores).max() < 1e-6 * size
    if whole.by_position is not None and found.by_position is not None:
        assert np.abs(found.by_position - whole.by_position).max() < 1e-6 * size
    for node, values in whole.neurons.items():
        assert np.allclose(found.neurons[node], values, atol=1e-6 * size)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi"])
def test_scores_by_layers_of_other_families(family: str, monkeypatch: pytest.MonkeyPatch):
    model, pairs = make(family), make_pairs((4, 6, 3))
    whole = attribute(model, pairs).scores
    monkeypatch.setattr(attribution, "fit_memory", lambda *_: Fit(16, 0.0, 1))
    assert np.abs(attribute(model, pairs).scores - whole).max() < 1e-6 * np.abs(whole).max()
