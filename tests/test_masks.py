"""Masks: the floor step, the slices behind components, the choice, and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED, make_pairs
from safetensors.torch import save_file
from torch import Tensor

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.errors import ArtifactError, CircuitError, ConfigError, MaskError, ModelError
from mansu_interp.losses.fisher import fisher_diagonal, projection, retain_bound
from mansu_interp.losses.gradients import ByLayer, ReadOnce, gradient, take
from mansu_interp.masks import pool, select
from mansu_interp.masks.components import component_slices, region
from mansu_interp.masks.floor import NARROW, Floor, floor, floor_step, quantizer_set
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.pool import Pool, sampled_rows
from mansu_interp.masks.rounding import Candidates, candidates, joint_rounding
from mansu_interp.masks.select import choose_parameters, circuit_mask
from mansu_interp.models.graph import Graph, Node
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.unlearning.methods import Mansu

TinyModel = Callable[[int], LanguageModel]
NF = NF4()
LAYER = "model.layers.1."


def test_floor_step_takes_one_whole_cell_against_the_gradient():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator) * 0.05
    gradient = torch.randn(64, 96, generator=generator)
    gradient[5] = 0
    step = floor_step(weight, gradient, NF, narrow=())
    before, after = NF.cells(weight), NF.cells(weight + step)
    moved = (step != 0).flatten()
    change = (after.codes - before.codes)[moved]
    assert (change.abs() == 1).all()
    assert torch.equal(change, -gradient.flatten()[moved].sign().long())
    assert (step * gradient <= 0).all()
    assert not (moved & before.sets_scale).any()
    assert torch.equal(before.scale, after.scale)
    assert ((after.codes[moved] >= 1) & (after.codes[moved] <= 14)).all()
    assert torch.equal(before.codes[~moved], after.codes[~moved])
    assert not step[5].any()
    # It lands on the level itself, and most weights can move.
    landed = (weight + step).flatten()[moved]
    assert torch.allclose(landed, (NF.levels[after.codes] * after.scale)[moved], atol=1e-7)
    assert moved.float().mean() > 0.8


def test_floor_step_refuses_the_outermost_levels():
    weight = torch.zeros(1, 64)
    weight[0, 0] = 1.0  # sets the scale
    weight[0, 1], weight[0, 2], weight[0, 3] = 0.75, 0.95, -0.75
    # 1 would have to go up to the outermost level, 2 lies on it, 3 would have to go down to it.
    up = floor_step(weight, torch.tensor([[-1.0, -1, -1, 1] + [1.0] * 60]), NF)[0]
    assert up[:4].tolist() == [0, 0, 0, 0]
    down = floor_step(weight, torch.tensor([[1.0, 1, 1, -1] + [1.0] * 60]), NF)[0]
    assert down[0] == 0
    assert (weight[0] + down)[1:4].tolist() == pytest.approx(
        [float(NF.levels[13]), float(NF.levels[14]), float(NF.levels[2])], abs=1e-6
    )


def rows(name: str, first: int, last: int) -> list[tuple[str, str, slice]]:
    return [(f"{LAYER}self_attn.{name}.weight", "rows", slice(first, last))]


@pytest.mark.parametrize(
    ("node", "writes", "expected"),
    [
        (Node("q", 1, 3), False, rows("q_proj", 24, 32)),
        (Node("k", 1, 1, True), False, rows("k_proj", 8, 16)),
        (Node("v", 1, 0, True), False, rows("v_proj", 0, 8)),
        (
            Node("head", 1, 2),
            True,
            [(f"{LAYER}self_attn.o_proj.weight", "cols", slice(16, 24))],
        ),
        (
            Node("mlp", 1),
            False,
            [(f"{LAYER}mlp.{n}_proj.weight", "rows", slice(None)) for n in ("gate", "up")],
        ),
        (Node("mlp", 1), True, [(f"{LAYER}mlp.down_proj.weight", "rows", slice(None))]),
        (Node("input", -1), True, []),
        (Node("logits", 3), False, []),
    ],
)
def test_slices_behind_components_with_shared_keys(
    tiny_model: TinyModel, node: Node, writes: bool, expected: list
):
    assert component_slices(tiny_model(2), node, writes) == expected


def test_region_is_the_union(tiny_model: TinyModel):
    model = tiny_model(2)
    parts = [
        (Node("q", 1, 0), False),
        (Node("q", 1, 3), False),
        (Node("head", 1, 1), True),
        (Node("mlp", 0), True),
    ]
    found = region(model, parts)
    q = found[f"{LAYER}self_attn.q_proj.weight"]
    assert q.shape == (32, 32) and q[:8].all() and q[24:].all() and not q[8:24].any()
    o = found[f"{LAYER}self_attn.o_proj.weight"]
    assert o[:, 8:16].all() and int(o.sum()) == 8 * 32
    assert found["model.layers.0.mlp.down_proj.weight"].all()
    assert len(found) == 3


def test_a_missing_weight_is_named(tiny_model: TinyModel):
    with pytest.raises(ModelError, match="No weight of layer 9 is known as its MLP"):
        component_slices(tiny_model(2), Node("mlp", 9), True)


NAME = f"{LAYER}mlp.up_proj.weight"


def choose(model: LanguageModel, budget: float, fisher: torch.Tensor | None = None) -> Mask:
    gradient = torch.randn(model.weights[NAME].shape, generator=torch.Generator().manual_seed(3))
    regions = {NAME: torch.ones_like(gradient, dtype=torch.bool)}
    damage = None if fisher is None else {NAME: fisher}
    return choose_parameters(model, regions, budget, {NAME: gradient}, retain_fisher=damage)


@pytest.fixture
def no_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many candidates as the budget, so that the choice itself shows."""
    monkeypatch.setattr("mansu_interp.masks.select.POOL", 1, raising=False)


@pytest.mark.usefixtures("no_spares")
@pytest.mark.parametrize("budget", [0.0005, 0.003, 0.02])
def test_choice_respects_the_budget(tiny_model: TinyModel, budget: float):
    model = tiny_model(2)
    mask = choose(model, budget)
    assert mask.n_parameters == int(budget * model.n_parameters)
    assert int(mask.meta.get("limit", mask.n_parameters)) == mask.n_parameters
    index = mask.indices[NAME]
    assert torch.equal(index, index.unique())
    assert mask.meta["budget"] == budget and mask.meta["survive"] == ["nf4"]


def test_choice_stays_inside_the_region(tiny_model: TinyModel):
    model = tiny_model(2)
    inside = torch.zeros_like(model.weights[NAME], dtype=torch.bool)
    inside[7, :20] = True
    gradient = torch.randn(inside.shape, generator=torch.Generator().manual_seed(3))
    mask = choose_parameters(model, {NAME: inside}, 1.0, {NAME: gradient})
    assert inside.flatten()[mask.indices[NAME]].all()
    can_move = (floor_step(model.weights[NAME], gradient, NF) != 0) & inside
    assert mask.n_parameters == int(can_move.sum())


@pytest.mark.usefixtures("no_spares")
def test_choice_prefers_gain_then_gain_per_damage(tiny_model: TinyModel):
    """Two weights: a gains twice as much as b, and without a Fisher it is taken; if it harms a
    hundred times as much, b is."""
    model = tiny_model(2)
    weight = model.weights[NAME]
    cells = NF.cells(weight)
    movable = ((cells.codes > 3) & (cells.codes < 12) & ~cells.sets_scale).nonzero().flatten()
    a, b = int(movable[0]), int(movable[1])
    unit = floor_step(weight, torch.ones_like(weight), NF).flatten()
    gradient, inside = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    inside.view(-1)[[a, b]] = True
    gradient.view(-1)[a] = 2 / float(-unit[a])
    gradient.view(-1)[b] = 1 / float(-unit[b])
    one = 1.01 / model.n_parameters
    args = (model, {NAME: inside}, one, {NAME: gradient})
    assert choose_parameters(*args).indices[NAME].tolist() == [a]
    fisher = torch.zeros_like(weight)
    fisher.view(-1)[a] = 100 / float(unit[a]) ** 2
    fisher.view(-1)[b] = 1 / float(unit[b]) ** 2
    assert choose_parameters(*args, retain_fisher={NAME: fisher}, damage_damping=0.1).indices[
        NAME
    ].tolist() == [b]
    fisher.view(-1)[a] = 1.5 / float(unit[a]) ** 2
    assert choose_parameters(*args, retain_fisher={NAME: fisher}, damage_damping=0.1).indices[
        NAME
    ].tolist() == [a]


@pytest.mark.usefixtures("no_spares")
def test_choice_avoids_what_retained_answers_share(tiny_model: TinyModel):
    """Of two weights with equal gain, the one that would also harm a retained answer loses; with
    ``hold`` large enough it is no candidate at all."""
    model = tiny_model(2)
    weight = model.weights[NAME]
    cells = NF.cells(weight)
    movable = ((cells.codes > 3) & (cells.codes < 12) & ~cells.sets_scale).nonzero().flatten()
    a, b = int(movable[0]), int(movable[1])
    unit = floor_step(weight, torch.ones_like(weight), NF).flatten()
    gradient, shared = torch.zeros_like(weight), torch.zeros_like(weight)
    inside = torch.zeros_like(weight, dtype=torch.bool)
    inside.view(-1)[[a, b]] = True
    for i, gain in ((a, 1.1), (b, 1.0)):
        gradient.view(-1)[i] = gain / float(-unit[i])
    shared.view(-1)[a] = -gradient.view(-1)[a]
    one = 1.01 / model.n_parameters
    args = (model, {NAME: inside}, one, {NAME: gradient})
    assert choose_parameters(*args).indices[NAME].tolist() == [a]
    helps = {NAME: -shared}  # moving a also serves the retained answer
    assert choose_parameters(*args, retain_gradient=helps).indices[NAME].tolist() == [a]
    harms = {NAME: shared}
    some = choose_parameters(*args, retain_gradient=harms, retain_gradient_weight=0.5)
    assert some.indices[NAME].tolist() == [b]
    both = choose_parameters(
        model,
        {NAME: inside},
        1.0,
        {NAME: gradient},
        retain_gradient=harms,
        retain_gradient_weight=2.0,
    )
    assert both.indices[NAME].tolist() == [b]


def test_nothing_is_edited_below_the_depth(tiny_model: TinyModel):
    model = tiny_model(2)
    circuit = Circuit(model.graph, model.graph.exists * 1.0, model.graph.exists, pairs=make_pairs())
    names = circuit_mask(circuit, model, budget=0.02, frozen_layers=0.5).indices
    assert {int(n.split(".")[2]) for n in names} == {2}
    assert {int(n.split(".")[2]) for n in circuit_mask(circuit, model, budget=0.02).indices} == {
        0,
        1,
        2,
    }


def test_the_subjects_own_rows_may_be_edited_too(tiny_model: TinyModel):
    """Rows of tokens that tell clean from corrupt, but for what the floor lets move neither way;
    within the one budget."""
    model, pairs = tiny_model(2), make_pairs()
    circuit = Circuit(model.graph, model.graph.exists * 1.0, model.graph.exists, pairs=pairs)
    name, without = model.embedding_name, circuit_mask(circuit, model, budget=0.02)
    assert name == "model.embed_tokens.weight" and name not in without.indices
    mask = circuit_mask(circuit, model, budget=0.02, subject_rows=True)
    own = {a for p in pairs for a, b in zip(p.clean, p.corrupt, strict=True) if a != b}
    width = model.d_model
    assert {int(i) // width for i in mask.indices[name]} == own
    fixed = NF.cells(model.weights[name]).sets_scale
    assert not fixed[mask.indices[name]].any()
    assert len(mask.indices[name]) > 0.7 * len(own) * width
    assert mask.limit == without.limit == int(0.02 * model.n_parameters)
    assert {n: len(i) for n, i in mask.indices.items() if n != name} == {
        n: len(i) for n, i in without.indices.items()
    }


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan")])
def test_budget_out_of_range_before_any_work(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, budget: float
):
    model = tiny_model(2)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a gradient was computed for a budget that is out of range")

    monkeypatch.setattr("mansu_interp.masks.select.forget_gradient", never)
    monkeypatch.setattr("mansu_interp.masks.select.fisher_diagonal", never)
    graph = model.graph
    circuit = Circuit(graph, graph.exists * 1.0, graph.exists, pairs=make_pairs())
    with pytest.raises(MaskError, match=r"share of all parameters in \(0, 1\]; got"):
        circuit_mask(circuit, model, budget=budget, retain=[make_pairs()])
    with pytest.raises(MaskError, match=r"share of all parameters in \(0, 1\]; got"):
        choose(model, budget)


def test_nothing_can_move(tiny_model: TinyModel):
    model = tiny_model(2)
    nothing = torch.zeros_like(model.weights[NAME])
    with pytest.raises(MaskError, match="No parameter of the circuit can move by a whole cell"):
        choose_parameters(model, {NAME: nothing == 0}, 0.1, {NAME: nothing})
    with pytest.raises(MaskError, match="The mask is empty"):
        Mask({})


def test_circuit_mask_lies_in_its_components(tiny_model: TinyModel):
    model = tiny_model(2)
    graph: Graph = model.graph
    edges = graph.exists & False
    for edge in [("input", "a0.kv1<v>"), ("a0.h2", "m1"), ("m1", "logits")]:
        edges[graph.edge(*edge)] = True
    circuit = Circuit(graph, edges * 1.0, edges, pairs=make_pairs())
    mask = circuit_mask(circuit, model, budget=0.02, retain=[make_pairs(seed=1)], n_pairs=4)
    inside = region(model, circuit.components())
    assert mask.indices.keys() <= inside.keys()
    for name, index in mask.indices.items():
        assert inside[name].flatten()[index].all()
    assert set(mask.meta["components"]) == {"input", "a0.kv1<v>", "a0.h2", "m1", "logits"}
    again = circuit_mask(circuit, model, budget=0.02, retain=[make_pairs(seed=1)], n_pairs=4)
    assert all(torch.equal(again.indices[n], i) for n, i in mask.indices.items())


def test_circuit_mask_of_another_model_or_without_pairs(tiny_model: TinyModel):
    graph = tiny_model(2).graph
    circuit = Circuit(graph, graph.exists * 1.0, graph.exists)
    with pytest.raises(CircuitError, match=r"The circuit is of Architecture\(.*\), not tiny"):
        circuit_mask(circuit, tiny_model(4))
    with pytest.raises(CircuitError, match=r"needs its pairs to make a mask: give forget="):
        circuit_mask(circuit, tiny_model(2))


def test_save_and_load(tmp_path: Path, tiny_model: TinyModel):
    mask = choose(tiny_model(2), 0.003)
    mask.save(tmp_path / "mask.safetensors")
    back = Mask.load(tmp_path / "mask.safetensors")
    assert back.meta == mask.meta
    assert back.indices.keys() == mask.indices.keys()
    assert torch.equal(back.indices[NAME], mask.indices[NAME])
    assert back.indices[NAME].dtype == torch.long
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]  # no temporary file


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "no header", "schema"])
def test_damaged_files(tmp_path: Path, tiny_model: TinyModel, damage: str):
    path = tmp_path / "mask.safetensors"
    mask = choose(tiny_model(2), 0.003)
    if damage != "missing":
        mask.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("not a mask, whatever its name says")
    elif damage == "no header":
        save_file(mask.indices, path)
    elif damage == "schema":
        save_file(mask.indices, path, {"mansu_mask": json.dumps({"schema": 99})})
    message = (
        "has the mask schema 99; this version reads 2"
        if damage == "schema"
        else "not a readable mask"
    )
    with pytest.raises(ArtifactError, match=message):
        Mask.load(path)


def test_mask_must_fit(tiny_model: TinyModel):
    model = tiny_model(2).copy()
    model.sha256 = "aa"
    mask = choose(model, 0.003)
    mask.check_fits(model)
    model.sha256 = "bb"
    with pytest.raises(MaskError, match="The mask was made for another checkpoint than tiny"):
        mask.check_fits(model)
    size = model.weights[NAME].numel()
    with pytest.raises(MaskError, match=f"does not fit tiny: {NAME} has {size} elements"):
        Mask({NAME: torch.tensor([0, size])}).check_fits(model)
    with pytest.raises(MaskError, match=r"does not fit tiny: other.weight has 0 elements"):
        Mask({"other.weight": torch.tensor([0])}).check_fits(model)


# Fisher, projection, and the bound on retain damage.

NAMES = ["model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight"]


def test_fisher_is_the_mean_squared_score_of_single_samples(tiny_model: TinyModel, pairs: PairSet):
    """A plain loop with ``backward`` on the Hugging Face model, drawing the same labels."""
    model = tiny_model(2)
    found = fisher_diagonal(model, NAMES, pairs, batch_size=1, seed=5)
    reference = model.copy().hf
    wanted = {n: p for n, p in reference.named_parameters() if n in NAMES}
    draw = torch.Generator().manual_seed(5)
    expected = {n: torch.zeros_like(p) for n, p in wanted.items()}
    for batch in pairs.batches(1):
        for p in wanted.values():
            p.requires_grad_(True)
            p.grad = None
        logits = reference(batch.clean).logits[0, -1]
        label = int(torch.multinomial(logits.detach().softmax(-1), 1, generator=draw))
        torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])).backward()
        for n, p in wanted.items():
            assert p.grad is not None
            expected[n] += p.grad**2 / len(pairs)
    for n in NAMES:
        assert torch.allclose(
            found[n], expected[n], rtol=1e-3, atol=1e-7 + 1e-4 * expected[n].max()
        )
        assert expected[n].max() > 0


def test_fisher_depends_on_its_seed_alone(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    a, b, c = (fisher_diagonal(model, NAMES, pairs, seed=s)[NAMES[0]] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_gradient_leaves_no_trace(tiny_model: TinyModel):
    model = tiny_model(2)
    weight = model.weights[NAMES[0]]
    (g,) = gradient(model, NAMES[:1], [lambda: 0.25 * (weight**2).sum()] * 2)
    assert torch.equal(g, weight)
    assert not weight.requires_grad and weight.grad is None
    with pytest.raises(ZeroDivisionError):
        gradient(model, NAMES[:1], [lambda: torch.tensor(1 / 0)])
    assert not weight.requires_grad


def test_projection_formula():
    fisher = torch.tensor([0.0, 1.0, 3.0, 1e6])
    assert projection(fisher, 0, 1.0).tolist() == [1, 1, 1, 1]
    # lambda = scale / strength = 2 / 2 = 1
    assert projection(fisher, 2.0, 2.0).tolist() == pytest.approx([1, 0.5, 0.25, 1e-6], rel=1e-4)
    assert projection(fisher, 1e9, 1.0)[1:].max() < 1e-8  # the exact null space
    assert projection(torch.zeros(2), 1.0, 0.0).tolist() == [1, 1]


@pytest.mark.slow
def test_by_layer_gives_the_same_mask_and_holds_one_layer(facts, capitals):
    circuit = Circuit.load(SHIPPED / "facts-capitals.json")
    how = {
        "budget": 0.002,
        "retain": capitals.retain_sets,
        "forget": capitals.forget,
        "n_pairs": 12,
    }
    whole = circuit_mask(circuit, facts, **how)
    streamed = circuit_mask(circuit, facts, **how, by_layer=True)
    assert whole.meta == streamed.meta and whole.indices.keys() == streamed.indices.keys()
    assert all(torch.equal(i, streamed.indices[n]) for n, i in whole.indices.items())
    asked: list[list[str]] = []

    def compute(names: list[str]) -> dict[str, torch.Tensor]:
        asked.append(names)
        return {n: facts.weights[n] for n in names}

    lazy = ByLayer(facts.linear_names, compute)
    assert len(lazy) == len(facts.linear_names) and not asked
    for name, weight in lazy.items():
        assert weight is facts.weights[name] and set(lazy.held) == set(asked[-1])
    assert len(asked) == facts.architecture.n_layers and len(asked[0]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_typical_damage_of_a_large_region_is_told_by_some_rows(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch, by_layer: bool
):
    """The same by layer and at once, near that of all rows, and so is the mask."""
    circuit = Circuit.load(SHIPPED / "facts-capitals.json")
    damages: list[float] = []
    real = select.typical_damage_of

    def spy(*args: object) -> float:
        damages.append(real(*args))
        return damages[-1]

    monkeypatch.setattr(select, "typical_damage_of", spy)
    masks = []
    for size in (2**20, 2**16):
        monkeypatch.setattr(pool, "SAMPLE", size)
        how = {"retain": capitals.retain_sets, "forget": capitals.forget, "by_layer": by_layer}
        masks.append(circuit_mask(circuit, facts, budget=0.005, n_pairs=12, **how))
        found = sampled_rows({n: facts.weights[n] == facts.weights[n] for n in facts.linear_names})
        of = sum(facts.weights[n].numel() for n in found)
        some = sum(len(r) * facts.weights[n].shape[1] for n, r in found.items())
        assert some == (of if size > of else pytest.approx(size, rel=0.02))
    assert damages[0] != damages[1] and damages[1] == pytest.approx(damages[0], rel=0.1)
    a, b = ({(n, int(k)) for n, i in m.indices.items() for k in i} for m in masks)
    assert len(a & b) > 0.98 * len(a)


def test_the_pool_holds_the_best_and_of_equal_ones_the_first():
    best = Pool(3)
    best.add("a", torch.tensor([1.0, 2.0]), torch.tensor([4, 7]))
    best.add("b", torch.tensor([2.0, 2.0, 0.5]), torch.tensor([0, 1, 2]))
    assert {n: i.tolist() for n, i in best.indices().items()} == {"a": [7], "b": [0, 1]}
    best.add("c", torch.tensor([2.0, 3.0]), torch.tensor([5, 6]))
    assert {n: i.tolist() for n, i in best.indices().items()} == {"a": [7], "b": [0], "c": [6]}


def test_what_is_read_once_is_freed():
    a, b = torch.ones(2), torch.zeros(3)
    once, plain = ReadOnce({"a": a, "b": b}), {"a": a}
    assert take(once, "a") is a and list(once) == ["b"] and once["b"] is b
    assert take(plain, "a") is a and "a" in plain


def test_retain_bound_of_a_small_edit(tiny_model: TinyModel, pairs: PairSet):
    """To first order the change is g . d; the curvature term is the quadratic form by hand."""
    model, name = tiny_model(2), NAMES[1]
    edited = model.copy()
    generator = torch.Generator().manual_seed(0)
    edited.weights[name] += 1e-3 * torch.randn(model.weights[name].shape, generator=generator)
    found = retain_bound(model, edited, pairs, seed=3)
    fisher = fisher_diagonal(model, [name], pairs, seed=3)[name]
    moved = edited.weights[name] - model.weights[name]
    assert found.second == pytest.approx(float((fisher * moved**2).sum()) / 2, rel=1e-4)
    assert abs(found.measured) == pytest.approx(found.first, rel=0.05)
    assert found.remainder == pytest.approx(found.measured - found.first - found.second)
    assert retain_bound(model, model.copy(), pairs).bound == 0


# The floor for a set of quantizers: every edit leaves its cell in all.

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


@pytest.mark.parametrize("survive", [("nf4", "q4_0"), ("int8",), ("nvfp4",), ("nf4", "nvfp4")])
def test_the_floor_of_some_elements_is_that_of_all(survive: tuple[str, ...]):
    """In any order, of few rows, and whatever a quantizer's groups are: blocks, rows, or, where one
    scale is the whole tensor's, all of it."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    index = torch.tensor([700, 5, 130, 4000])
    whole, some = floor(weight, survive), floor(weight, survive, index=index)
    for name in ("up", "down", "leave_up", "leave_down", "lowest", "highest"):
        a, b = getattr(some, name), getattr(whole, name)[index]
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    assert all(
        torch.equal(a.codes, b.codes[index]) for a, b in zip(some.own, whole.own, strict=True)
    )


def test_sets_are_checked_before_any_work():
    with pytest.raises(ConfigError, match="No edit can be made to survive hqq by construction"):
        quantizer_set(("nf4", "hqq"))
    with pytest.raises(ConfigError, match="Unknown quantizer 'q5'; did you mean q5_"):
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
