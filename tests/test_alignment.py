"""Pairs whose prompts have different numbers of tokens, against definitions written out by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from conftest import make_pairs, make_tiny
from test_families import make
from test_tasks import ASKED

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.heads.explain import explain_head
from mansu_interp.circuits.patching import patch_edges
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import TaskError
from mansu_interp.masks.components import subject_tokens
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.alignment import align
from mansu_interp.tasks.pairs import Pair, PairSet, collate

CASES = [
    # clean, corrupt, for each clean position one of the corrupt prompt
    ((1, 2, 3, 4, 9), (1, 2, 5, 9), (0, 1, 2, 2, 3)),
    ((1, 2, 5, 9), (1, 2, 3, 4, 9), (0, 1, 3, 4)),
    ((1, 2, 9), (1, 2, 5, 9), (0, 1, 3)),
    ((1, 2, 5, 9), (1, 2, 9), (0, 1, 2, 2)),
    ((7, 8, 6), (5,), (0, 0, 0)),
    ((5,), (7, 8, 6), (2,)),
    ((1, 2), (1, 2, 3), (0, 2)),
    ((1, 2, 3), (1, 2), (0, 1, 1)),
    ((3, 4, 5), (6, 7, 5), (0, 1, 2)),
]


@pytest.mark.parametrize(("clean", "corrupt", "at"), CASES)
def test_tokens_are_aligned_from_both_ends(
    clean: tuple[int, ...], corrupt: tuple[int, ...], at: tuple[int, ...]
):
    assert align(clean, corrupt) == at
    assert at[-1] == len(corrupt) - 1


def uneven(lengths: tuple[tuple[int, int], ...] = ((6, 4), (3, 5), (4, 4))) -> PairSet:
    """Random pairs of a shared beginning and end; one longer, one shorter, one level."""
    out = []
    for k, (n, m) in enumerate(lengths):
        first, second = make_pairs((n, m), seed=k)
        corrupt = (first.clean[0], *second.clean[1:-1], first.clean[-1])
        out.append(replace(first, corrupt=corrupt, subject=f"s{k}"))
    return PairSet("uneven", tuple(out))


BY_HAND = [(0, 1, 1, 1, 2, 3), (0, 3, 4), (0, 1, 2, 3)]
"""Of `uneven`."""


def test_a_batch_knows_what_stands_for_what():
    batch = collate(list(uneven()))
    assert batch.last.tolist() == [5, 2, 3] and batch.corrupt_last.tolist() == [3, 4, 3]
    assert batch.clean.shape == (3, 6) and batch.corrupt.shape == (3, 5)
    for row, (pair, at) in enumerate(zip(uneven(), BY_HAND, strict=True)):
        here = batch.as_clean(batch.corrupt)[row][: len(at)].tolist()
        assert here == [pair.corrupt[k] for k in at] == list(pair.aligned)
        other = [a != b for a, b in zip(pair.clean, here, strict=True)]
        assert (batch.changed & batch.real)[row][: len(at)].tolist() == other
    there = batch.as_corrupt(batch.clean)
    assert there[0].tolist()[:4] == [uneven()[0].clean[k] for k in (0, 3, 4, 5)]
    assert there[1].tolist() == [uneven()[1].clean[k] for k in (0, 1, 1, 1, 2)]
    level = collate(list(make_pairs()))
    assert level.of_clean is None and level.as_clean(level.corrupt) is level.corrupt


def by_hand(model: LanguageModel, pair: Pair, at: tuple[int, ...]) -> reference.Writes:
    """What every writer adds in the corrupt run, where the clean prompt has it."""
    with torch.no_grad():
        writes = reference.run(model, pair.corrupt, reference._sum)[0]
    return {name: value[list(at)] for name, value in writes.items()}


def patched(model: LanguageModel, pair: Pair, at: tuple[int, ...], without: np.ndarray) -> float:
    """Metric of the clean run in which edges of ``without`` carry the aligned corrupt value."""
    instead, graph = by_hand(model, pair, at), model.graph

    def read(name: str, writes: reference.Writes) -> torch.Tensor:
        column = graph.reader_index[name]
        cut = {w: bool(without[graph.writer_index[w], column]) for w in writes}
        return torch.stack([instead[w] if cut[w] else x for w, x in writes.items()]).sum(0)

    with torch.no_grad():
        return float(reference._metric(reference.run(model, pair.clean, read)[1], pair))


def test_exact_effects_are_those_of_edges_patched_by_hand():
    model, pairs = make_tiny(2), uneven()
    found, exists = patch_edges(model, pairs), model.graph.exists
    sizes = []
    for i, j in np.argwhere(exists)[::23]:
        one = np.zeros_like(exists)
        one[i, j] = True
        effects = [
            patched(model, p, at, np.zeros_like(exists)) - patched(model, p, at, one)
            for p, at in zip(pairs, BY_HAND, strict=True)
        ]
        assert found[i, j] == pytest.approx(np.mean(effects), abs=1e-4), (i, j)
        sizes.append(abs(found[i, j]))
    assert max(sizes) > 0.05


def test_circuits_are_those_ablated_by_hand_and_their_ends_are_the_two_runs():
    model, pairs = make_tiny(2), uneven()
    exists, rng = model.graph.exists, np.random.default_rng(0)
    ablation = Ablation(model, pairs, batch_size=2)
    for density in (0.2, 0.6, 0.95):
        kept = (rng.random(exists.shape) < density) & exists
        expected = [patched(model, p, at, ~kept) for p, at in zip(pairs, BY_HAND, strict=True)]
        assert ablation(kept) == pytest.approx(np.mean(expected), abs=1e-4)
    for base in ablation.bases:
        clean = model.last_logits(base.batch.clean, base.batch.last)
        corrupt = model.last_logits(base.batch.corrupt, base.batch.corrupt_last)
        assert torch.allclose(ablation.logits(base, exists), clean, atol=1e-4)
        assert torch.allclose(ablation.logits(base, np.zeros_like(exists)), corrupt, atol=1e-4)


def test_scores_are_those_of_the_definition_written_out():
    """Rotary models add no position to the stream: the start of the path is a prompt of the aligned
    tokens."""
    model, pairs = make_tiny(2), uneven()
    found = attribute(model, pairs, config=AttributionConfig(method="eap"))
    expected = [
        reference.eap(model, replace(p, corrupt=p.aligned), ablated=by_hand(model, p, at))
        for p, at in zip(pairs, BY_HAND, strict=True)
    ]
    size = np.abs(found.scores).max()
    assert np.abs(found.scores - np.mean(expected, axis=0)).max() < 1e-4 * size
    none = np.zeros_like(model.graph.exists)
    whole = [patched(model, p, at, none) for p, at in zip(pairs, BY_HAND, strict=True)]
    assert found.clean == pytest.approx(np.mean(whole), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["corrupt", "mean", "zero"])
def test_scores_do_not_depend_on_the_batch(ablation: str):
    model, pairs = make_tiny(2), uneven()
    config = AttributionConfig(ig_steps=2, ablation=ablation)  # type: ignore[arg-type]
    whole = attribute(model, pairs, config=config, positions=True)
    one = attribute(model, pairs, config=replace(config, batch_size=1))
    size = np.abs(one.scores).max()
    assert np.abs(whole.scores - one.scores).max() < 1e-6 * size
    assert whole.by_position is not None and len(whole.by_position) == 6
    assert np.abs(whole.by_position.sum(0) - one.scores).max() < 1e-5 * size
    if ablation != "mean":  # whose means are of all pairs
        alone = [attribute(model, PairSet("one", (p,)), config=config).scores for p in pairs]
        assert np.abs(np.mean(alone, axis=0) - one.scores).max() < 1e-6 * size
    assert "in 2 of 3 pairs the prompts have different numbers of tokens" in whole.caveat


def test_denoising_is_noising_of_swapped_prompts():
    model, pairs = make_tiny(2), uneven()
    names = [("input", "a0.h1<q>"), ("m0", "m2"), ("a1.h2", "logits"), ("input", "m0")]
    swapped = PairSet("swapped", tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in pairs))
    found = patch_edges(model, pairs, names, direction="denoising")
    assert np.allclose(found, -patch_edges(model, swapped, names), atol=1e-5, equal_nan=True)


def test_a_small_change_scores_its_exact_effects():
    """Of a model with positions in its stream, too; the prompts differ in length alone."""
    model = make("gpt2")
    pairs = uneven(((5, 4), (4, 6)))
    exists = model.graph.exists
    both = patch_edges(model, pairs, exists)
    rest = Ablation(model, pairs)
    for i, j in np.argwhere(exists)[::40]:
        without = exists.copy()
        without[i, j] = False
        assert both[i, j] == pytest.approx(rest(exists) - rest(without), abs=1e-4)
    config = AttributionConfig(method="eap", at="clean")
    scores = attribute(model, pairs, config=config).scores
    # Into the logits a norm alone is between score and effect.
    last = both[:, -1]
    assert np.corrcoef(last, scores[:, -1])[0, 1] > 0.9


@pytest.mark.slow
def test_texts_of_different_lengths_make_a_circuit(facts: LanguageModel):
    clean, corrupt = [ASKED.format("Malta")] * 2, [ASKED.format("Rwanda Kenya"), "Kenya is"]
    pairs = PairSet.from_prompts(facts, clean, corrupt, ["Valletta"] * 2, ["Kigali", "Nairobi"])
    assert [p.level for p in pairs] == [False, False]
    circuit = discover(facts, pairs)
    assert circuit.meta.faithfulness >= 0.85
    assert "different numbers of tokens" in circuit.meta.caveat
    head = explain_head(facts, pairs, "a0.h5")
    assert sum(head.attention.values()) == pytest.approx(1, abs=1e-4)
    assert set(subject_tokens(pairs)) >= {facts.encode("Malta")[-1]}
    with pytest.raises(TaskError, match=re.escape("Pair 1 has an empty corrupt prompt")):
        PairSet.from_prompts(facts, clean[:1], [""], ["Valletta"], ["Kigali"])
