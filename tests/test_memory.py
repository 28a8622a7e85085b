"""What stages hold at their peak, tracked on fake weights of published sizes, beside the plan.

Nothing of these sizes is allocated (`benchmarks/tracker.py`). Only a few layers are tracked: memory
is linear in their number, which is tested, and so known for all of them.
"""

from __future__ import annotations

from functools import lru_cache

import memory
import pytest
import torch
from conftest import make_pairs, make_tiny
from tracker import Tracker, make_fake
from transformers import LlamaForCausalLM

from mansu_interp.losses.answers import nll
from mansu_interp.losses.fisher import fisher_diagonal
from mansu_interp.models.language_model import LanguageModel

FEW = {False: (1, 2), True: (5, 6)}
"""Layers that are tracked; on a card that is too small more, since of one or two its peak is where
a copy is made."""
HELD = ("attribution", "mask --by-layer", "unlearn", "scores")
"""Stages of 8B all of which one card of 80 GB holds."""
RESTING = ("relearning", "judging")
"""Those of which it does while what they can spare lies in the host's memory."""


@lru_cache
def found(shape: str, stage: str, layers: int, card: bool = False) -> tuple[float, float]:
    """GB tracked and planned, with four quantizers; on a card that holds as little as can be."""
    return memory.tracked(shape, torch.bfloat16, memory.SET, stage, layers, card)


def whole(shape: str, stage: str, card: bool = False) -> tuple[float, float]:
    """The same of all layers, from those of a few."""
    (a, b), n = FEW[card], memory.SHAPES[shape][0]
    first, second = found(shape, stage, a, card), found(shape, stage, b, card)
    tracked, planned = (x + (y - x) * (n - a) / (b - a) for x, y in zip(first, second, strict=True))
    return tracked, planned


def test_the_tracker_counts_what_is_alive():
    tracker = Tracker()
    with tracker:
        a = torch.ones(1000)
        view = a[10:]
        b = a + view.sum()
        del a, b
        c = torch.ones(500, dtype=torch.float64)
        assert tracker.alive == 8000  # a lives on in its view
        del view
        assert tracker.alive == 4000
    assert tracker.peak == 8000 + 4  # the two, and the sum
    del c


def test_fake_weights_take_what_real_ones_do():
    """The same peak to the byte, forwards, backwards and for the Fisher."""
    real = make_tiny(2)
    hf = LlamaForCausalLM(real.config).eval()
    make_fake(hf, torch.float32)
    fake = LanguageModel("fake", hf, None)
    pairs = make_pairs()
    peaks: list[list[int]] = []
    for model in (real, fake):
        ones: list[int] = []
        for job in (
            lambda m: nll(m, list(pairs)).sum(),
            lambda m: fisher_diagonal(m, m.linear_names, pairs),
        ):
            with Tracker(model.weights.values()) as tracker:
                job(model)
            ones.append(tracker.peak)
        peaks.append(ones)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "card"),
    [*((s, False) for s in (*HELD, *RESTING)), *((s, True) for s in RESTING)],
)
@pytest.mark.parametrize("shape", ["8B", "1B"])
def test_the_plan_says_what_is_tracked(shape: str, stage: str, card: bool):
    """Within a quarter, of few layers and of all."""
    few = (found(shape, stage, n, card) for n in FEW[card])
    for tracked, planned in (*few, whole(shape, stage, card)):
        assert planned == pytest.approx(tracked, rel=0.25)


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_layers():
    few = [found("1B", "attribution", n)[0] for n in (1, 2, 3, 4)]
    assert few[3] - few[1] == pytest.approx(2 * (few[2] - few[1]), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", (*HELD, *RESTING))
def test_sizes_that_one_card_holds(stage: str):
    """8B in 80 GB and 1B in 12, with what a process takes besides, four quantizers to survive."""
    for shape, gb in (("8B", 80), ("1B", 12)):
        tracked, planned = whole(shape, stage, card=stage in RESTING)
        assert max(tracked, planned) + memory.PROCESS < gb
