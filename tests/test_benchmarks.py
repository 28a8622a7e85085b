"""What benchmarks and research scripts compute by themselves, by hand or against the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_pairs, make_tiny
from mask_circuits import jaccard, random_paths
from peers import LeftEnds, OnCpu, in_our_order, in_their_order

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.masks.mask import Mask
from mansu_interp.models.graph import Architecture, Graph


def test_readers_of_eap_ig_come_in_our_order_with_shared_keys_summed():
    """Its readers of a layer are q, k and v of every query head, then the MLP."""
    a = Architecture(n_layers=2, n_heads=4, n_kv_heads=2)
    theirs, graph = torch.rand(11, 27, dtype=torch.float64), Graph(a)
    found = in_our_order(theirs, a)
    wanted = {
        ("a0.h0", "a1.h3<q>"): theirs[1, 13 + 3],
        ("a0.h0", "a1.kv1<k>"): theirs[1, 13 + 4 + 2] + theirs[1, 13 + 4 + 3],
        ("m0", "a1.kv0<v>"): theirs[5, 13 + 8] + theirs[5, 13 + 9],
        ("a0.h2", "m0"): theirs[3, 12],
        ("m1", "logits"): theirs[10, 26],
    }
    for edge, score in wanted.items():
        assert found[graph.edge(*edge)] == pytest.approx(float(score))
    assert not found[~graph.exists].any() and found[graph.exists].all()


def test_a_circuit_of_ours_goes_into_eap_igs_order_with_shared_keys_for_every_head():
    a = Architecture(n_layers=2, n_heads=4, n_kv_heads=2)
    graph = Graph(a)
    edges = np.zeros_like(graph.exists)
    for edge in (("a0.h0", "a1.h3<q>"), ("a0.h0", "a1.kv1<k>"), ("m1", "logits")):
        edges[graph.edge(*edge)] = True
    found = {tuple(at) for at in in_their_order(edges, a).nonzero().tolist()}
    assert found == {(1, 13 + 3), (1, 13 + 4 + 2), (1, 13 + 4 + 3), (10, 26)}
    heads = in_our_order(in_their_order(graph.exists, a).double(), a)  # two heads share a key
    assert heads[graph.edge("m0", "a1.kv0<v>")] == 2 == heads[graph.edge("input", "a0.kv1<k>")]
    assert heads[graph.edge("m0", "a1.h0<q>")] == 1 == heads[graph.edge("m0", "logits")]


def test_one_left_end_is_eap_at_the_corrupt_run():
    model, pairs = make_tiny(2), make_pairs()
    one = attribute(model, pairs, config=LeftEnds(ig_steps=1)).scores
    eap = attribute(model, pairs, config=AttributionConfig(method="eap")).scores
    assert np.abs(one - eap).max() < 1e-6 * np.abs(eap).max()
    assert LeftEnds(ig_steps=4).path() == [0, 0.25, 0.5, 0.75]


def test_zeros_asked_for_on_a_gpu_are_on_the_cpu():
    made = OnCpu().zeros((2, 3), device="cuda", dtype=torch.float64)
    assert (made.shape, made.dtype, made.device.type) == ((2, 3), torch.float64, "cpu")


@pytest.mark.parametrize("edges", [1, 20, 60])
def test_random_paths_are_whole(edges: int):
    graph = Graph(Architecture(n_layers=3, n_heads=4, n_kv_heads=2))
    drawn = [random_paths(graph, edges, seed) for seed in range(5)]
    for found in drawn:
        assert (graph.prune(found) == found).all()
        assert edges <= found.sum() <= edges + 2 * 3  # at most a path more
    assert edges == 1 or any((found != drawn[0]).any() for found in drawn)


def test_jaccard_of_masks():
    a = Mask({"x": torch.tensor([1, 2, 3]), "y": torch.tensor([7])})
    b = Mask({"x": torch.tensor([2, 3, 4]), "z": torch.tensor([7])})
    assert jaccard(a, b) == 2 / 6
    assert jaccard(a, a) == 1
