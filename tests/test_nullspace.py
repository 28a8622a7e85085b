"""Fisher, projection, and the bound on retain damage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SHIPPED

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.losses.fisher import fisher_diagonal, projection, retain_bound
from mansu_interp.losses.gradients import ByLayer, gradient
from mansu_interp.masks.select import circuit_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet

TinyModel = Callable[[int], LanguageModel]
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
