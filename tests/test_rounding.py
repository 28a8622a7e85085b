"""Where edits of a set land: admissible, and kept in full by every quantizer together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mansu_interp.masks.floor import Floor, floor
from mansu_interp.masks.rounding import Candidates, candidates, joint_rounding
from mansu_interp.quantizers.registry import get_quantizer

SET = ("nf4", "fp4", "int4-g32", "q4_0")


def case(
    seed: int, apart: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor, Floor, Candidates, Tensor]:
    """Wishes of one or two cells for every element of a weight that may move: the weight, their
    positions, the floor, the options and where they land one by one. ``apart`` is what each
    quantized model wants beyond that."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 256, generator=generator) * 0.03
    flat = weight.flatten()
    wish = flat + 0.02 * torch.randn(flat.shape, generator=generator)
    whole = floor(weight, SET)
    value, moved = whole.land(wish)
    i = moved.nonzero()[:, 0]
    quantizers = [get_quantizer(q) for q in SET]
    grids = [q.cells(weight)[i] for q in quantizers]
    old = [q.round_trip(weight).flatten()[i] for q in quantizers]
    own = [torch.full_like(value[i], by) for by in apart]
    found = candidates(
        whole[i],
        grids,
        quantized=old,
        original=flat[i],
        wanted=wish[i],
        value=value[i],
        offsets=own,
    )
    return weight, i, whole[i], found, value[i]


@pytest.fixture
def edit() -> tuple[Floor, Candidates, Tensor, Tensor]:
    """The floor, the options, the old values and where the elements land one by one."""
    weight, i, where, found, value = case(0)
    return where, found, weight.flatten()[i], value


def kept(found: Candidates, original: Tensor, value: Tensor) -> Tensor:
    """Share of the edit that each quantizer keeps, from the options' own figures."""
    row = (found.values == value).int().argmax(0)
    assert torch.equal(found.values.gather(0, row[None])[0], value)
    surplus = found.surplus.gather(0, row[None, None].expand(1, len(SET), -1))[0].sum(1)
    return 1 + surplus / (value - original).square().sum()


def test_every_quantizer_keeps_all_of_the_edit(edit: tuple[Floor, Candidates, Tensor, Tensor]):
    _, found, original, alone = edit
    (value,) = joint_rounding([found])
    before, after = kept(found, original, alone), kept(found, original, value)
    assert (before - 1).abs().max() > 0.01  # one by one some keep too much, others too little
    assert (after - 1).abs().max() < 0.001
    assert 0.05 < (value != alone).float().mean() < 0.95


def test_the_share_kept_is_that_of_the_real_libraries():
    """Recomputed from two whole weights that went through each quantizer."""
    weight, i, _, found, _ = case(1)
    flat = weight.flatten()
    after = flat.clone()
    after[i] = joint_rounding([found])[0]
    d = after - flat
    for q in map(get_quantizer, SET):
        dq = q.round_trip(after.view_as(weight)).flatten() - q.round_trip(weight).flatten()
        assert float(dq @ d / (d @ d)) == pytest.approx(1.0, abs=0.002), q.name


def admissible(where: Floor, original: Tensor, value: Tensor) -> bool:
    """Whether all values are far enough from the original ones, and none sets a scale."""
    beyond = torch.where(value > original, value >= where.up, value <= where.down)
    return bool((beyond & (value > where.lowest) & (value < where.highest)).all())


def test_what_is_chosen_is_admissible(edit: tuple[Floor, Candidates, Tensor, Tensor]):
    where, found, original, _ = edit
    (value,) = joint_rounding([found])
    assert admissible(where, original, value)


def test_quantized_models_follow_wishes_of_their_own():
    """FP4's model wants every value higher, Q4_0's lower, by a fifth of a cell: both move that way,
    the others stay, and every place is one that the floor admits."""
    by = (0.0, 0.004, 0.0, -0.004)
    weight, i, where, still, _ = case(2, (0.0,) * 4)
    _, _, _, found, _ = case(2, by)
    assert len(found.values) == 1 + 6 * len(SET)  # two levels and four edges; where they land alone
    before, after = (joint_rounding([x])[0] for x in (still, found))
    assert admissible(where, weight.flatten()[i], after)
    shifts = []
    for q in map(get_quantizer, SET):
        weights = [weight.flatten().clone() for _ in range(2)]
        for w, landed in zip(weights, (before, after), strict=True):
            w[i] = landed
        old, new = (q.round_trip(w.view_as(weight)).flatten()[i] for w in weights)
        shifts.append(float((new - old).mean()))
    nf4, fp4, int4, q4_0 = shifts
    assert fp4 > 0.001 and q4_0 < -0.001
    assert max(abs(nf4), abs(int4)) < 0.0005


def test_weights_are_balanced_together(edit: tuple[Floor, Candidates, Tensor, Tensor]):
    """Cut in two, the same elements get the same values, in the same order."""
    _, found, _, _ = edit
    n = found.values.shape[1] // 3
    halves = [
        Candidates(
            *(t[..., part] for t in (found.values, found.distance, found.surplus, found.power))
        )
        for part in (slice(None, n), slice(n, None))
    ]
    assert torch.equal(torch.cat(joint_rounding(halves)), joint_rounding([found])[0])


def test_without_a_choice_nothing_changes(edit: tuple[Floor, Candidates, Tensor, Tensor]):
    _, found, _, alone = edit
    only = Candidates(*(t[:1] for t in (found.values, found.distance, found.surplus, found.power)))
    assert torch.equal(joint_rounding([only])[0], alone)
