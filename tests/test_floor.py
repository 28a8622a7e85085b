"""The floor for a set of quantizers: every edit leaves its cell in all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mansu_interp.errors import ConfigError
from mansu_interp.masks.floor import NARROW, Floor, floor, floor_step, quantizer_set
from mansu_interp.masks.rounding import Candidates, candidates, joint_rounding
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.unlearning.methods import Mansu

SETS = [
    ("nf4",),
    ("nf4", "fp4", "int4-g64", "q4_0"),
    ("nf4-dq", "nf4-128", "int4-sym-g32", "q4_1", "torchao-int4-g128", "q8_0", "int8"),
    ("q4_0", "nf4"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(dtype: torch.dtype) -> Tensor:
    made = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * 0.03
    made[5] = 0
    made[6] = made[6].abs() + 0.02
    return made.to(dtype).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("survive", SETS, ids=",".join)
def test_every_edit_survives_every_quantizer_and_dtype(survive: tuple, dtype: torch.dtype):
    """Random latent weights; the codes are recomputed from scratch, with the checkpoint's dtype and
    after both checkpoints are saved in a narrower one."""
    before = weight(dtype)
    where = floor(before, survive, dtype)
    latent = before.flatten() + 0.06 * torch.randn(
        before.numel(), generator=torch.Generator().manual_seed(4)
    )
    value, moved = where.land(latent)
    after = torch.where(moved, value, before.flatten()).view_as(before)
    assert torch.equal(after, after.to(dtype).float())
    assert 0.2 < moved.float().mean() < 1
    up = (after > before).flatten()[moved]
    for kind in (dtype, *NARROW):
        for name in survive:
            quantizer = get_quantizer(name)
            a = quantizer.cells(before.to(kind).float()).codes
            b = quantizer.cells(after.to(kind).float()).codes
            assert torch.equal(a[~moved], b[~moved]), (name, kind)
            assert (a != b)[moved].all(), (name, kind)
            assert torch.equal((b > a)[moved], up), (name, kind)
    for name in survive:  # the real round trip moves the way of the edit, too
        quantizer = get_quantizer(name)
        change = (quantizer.round_trip(after) - quantizer.round_trip(before)).flatten()
        assert torch.equal(change[moved] > 0, up), name
        assert (change[~moved] == 0).all(), name


def test_one_quantizer_lands_on_the_neighbouring_level():
    before = weight(torch.float32)
    cells, where = NF4().cells(before), floor(before, "nf4", narrow=())
    free = ~cells.sets_scale & (cells.codes > 1) & (cells.codes < 13) & ~where.up.isnan()
    assert free.float().mean() > 0.8
    assert torch.equal(where.up[free], cells.value(cells.codes + 1)[free])
    assert torch.equal(where.down[free], cells.value(cells.codes - 1)[free])
    edge = cells.boundaries[cells.codes[free]] * cells.scale[free]
    assert torch.equal(where.leave_up[free], edge)


def test_a_larger_set_steps_at_least_as_far_and_refuses_at_least_as_often():
    before = weight(torch.bfloat16)
    slope = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    one = floor_step(before, slope, "nf4", torch.bfloat16)
    many = floor_step(before, slope, SETS[2], torch.bfloat16)
    both = (one != 0) & (many != 0)
    assert (many.abs() >= one.abs())[both].all()
    assert ((many == 0) | (one != 0)).float().mean() > 0.99
    assert (many == 0).sum() > (one == 0).sum()
    assert (torch.sign(many) == -torch.sign(slope))[many != 0].all()
    assert (floor_step(before, slope * 0, "nf4") == 0).all()


def test_a_far_wish_lands_on_the_level_of_the_widest_cell():
    before = weight(torch.float32)
    names = ("nf4", "fp4")
    where = floor(before, names, narrow=())
    grids = [get_quantizer(n).cells(before) for n in names]
    wanted = before.flatten() + 0.7 * grids[0].span * before.flatten().sign().neg()
    value, moved = where.land(wanted)
    far = moved & (value != where.up) & (value != where.down)
    assert far.float().mean() > 0.5
    codes = [g.encode(wanted) for g in grids]
    widths = [g.edge(c) - g.edge(c - 1) for g, c in zip(grids, codes, strict=True)]
    inner = far & widths[0].isfinite() & widths[1].isfinite()
    nf4_is_wider = inner & (widths[0] > widths[1])
    fp4_is_wider = inner & (widths[1] > widths[0])
    assert nf4_is_wider.any() and fp4_is_wider.any()
    assert torch.equal(value[nf4_is_wider], grids[0].value(codes[0])[nf4_is_wider])
    assert torch.equal(value[fp4_is_wider], grids[1].value(codes[1])[fp4_is_wider])


def test_the_order_of_the_set_means_nothing():
    before = weight(torch.bfloat16)
    one, other = (floor(before, s, torch.bfloat16) for s in (SETS[2], SETS[2][::-1]))
    assert torch.equal(one.span, other.span)
    wanted = before.flatten() + one.span * torch.linspace(-1, 1, before.numel())
    for a, b in zip(one.land(wanted), other.land(wanted), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_wish_within_the_cell_of_one_of_the_set_moves_nothing():
    before = weight(torch.float32)
    where = floor(before, ("nf4", "q8_0"))
    nf4, q8 = NF4().cells(before), get_quantizer("q8_0").cells(before)
    out_of_q8 = (q8.edge(q8.codes) + nf4.edge(nf4.codes)) / 2
    between = (out_of_q8 > q8.edge(q8.codes)) & (out_of_q8 < nf4.edge(nf4.codes))
    assert between.float().mean() > 0.5
    assert not where.land(out_of_q8)[1][between].any()


def test_sets_are_checked_before_any_work():
    with pytest.raises(ConfigError, match="No edit can be made to survive hqq by construction"):
        quantizer_set(("nf4", "hqq"))
    with pytest.raises(ConfigError, match="Unknown quantizer 'q5'; available: nf4, "):
        quantizer_set("q5")
    with pytest.raises(ConfigError, match="survive names no quantizer"):
        quantizer_set(())
    assert Mansu(survive=("nf4,fp4", "q4_0")).survive == ("nf4", "fp4", "q4_0")
    with pytest.raises(ConfigError, match="different quantizers; got nf4, nf4"):
        Mansu(survive=("nf4,nf4",))


# Where edits of a set land: admissible, and kept in full by every quantizer together.

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
