"""What rests in the host's memory: the same results to the bit, and nothing left behind.

There is no card here: a device that is full is feigned, and moving is told by the calls.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from conftest import make_pairs, make_tiny

from mansu_interp.audit import linearized, relearning
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.relearning import fine_tune
from mansu_interp.losses import descent, resting
from mansu_interp.losses.answers import nll
from mansu_interp.models.language_model import LanguageModel


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Feign a full card; what is moved, and of how many elements."""
    calls: list[tuple[str, int]] = []

    def note(name: str, module: ModuleType) -> None:
        own = getattr(module, name)
        place = f"{module.__name__.rpartition('.')[2]}.{name}"

        def told(tensors: object, *args: object) -> None:
            tensors = list(tensors)  # pyright: ignore[reportArgumentType]
            calls.extend((place, t.numel()) for t in tensors)
            own(tensors, *args)

        monkeypatch.setattr(module, name, told)

    for module in (resting, descent):
        for name in ("to_host", "to_device"):
            note(name, module)
    for module in (resting, relearning, linearized):
        monkeypatch.setattr(module, "free_bytes", lambda _: 0.0)
    return calls


def steps(model: LanguageModel, optimiser: str = "adam") -> dict[str, torch.Tensor]:
    """The weights after some steps of an attack."""
    config = RelearnConfig(steps=(3,), optimiser=optimiser, batch_size=4)  # pyright: ignore[reportArgumentType]
    *_, last = fine_tune(model.trainable_copy(), [make_pairs((5, 6, 7, 6))], 1e-3, config)
    return last.weights


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_moments_that_rest_change_no_bit(
    moved: list[tuple[str, int]], optimiser: str, monkeypatch: pytest.MonkeyPatch
):
    model = make_tiny(2)
    found = steps(model, optimiser)
    moments = {"adam": 2, "sgd": 1}[optimiser]
    back = sum(n for name, n in moved if name == "descent.to_device")
    assert back == 2 * moments * model.n_parameters  # before the second and the third step
    moved.clear()
    monkeypatch.setattr(relearning, "free_bytes", lambda _: float("inf"))
    wanted = steps(model, optimiser)
    assert not moved
    assert all(torch.equal(w, wanted[n]) for n, w in found.items())
    assert not all(torch.equal(w, model.weights[n]) for n, w in found.items())


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("rest", [False, True])
def test_a_large_weight_takes_its_step_in_parts(
    moved: list[tuple[str, int]], optimiser: str, rest: bool, monkeypatch: pytest.MonkeyPatch
):
    if not rest:
        monkeypatch.setattr(relearning, "free_bytes", lambda _: float("inf"))
    model = make_tiny(2)
    wanted = steps(model, optimiser)
    moved.clear()
    monkeypatch.setattr(descent, "STEP", 100)
    found = steps(model, optimiser)
    assert all(torch.equal(w, wanted[n]) for n, w in found.items())
    assert bool(moved) == rest
    assert all(n <= 100 for name, n in moved if name.startswith("descent."))


def test_activations_that_rest_change_no_bit(moved: list[tuple[str, int]]):
    model, pairs = make_tiny(2), list(make_pairs())
    found: list[list[torch.Tensor]] = []
    for rest in (False, True):
        copy = model.copy()
        for w in copy.weights.values():
            w.requires_grad_(True)
        if rest:
            with resting.resting_activations(copy):
                nll(copy, pairs).mean().backward()
        else:
            nll(copy, pairs).mean().backward()
        found.append([w.grad for w in copy.weights.values() if w.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0]
    sizes = {w.numel() for w in model.weights.values() if w.ndim > 1}
    assert moved and not sizes & {n for _, n in moved}  # no weight is moved


def test_models_rest_but_for_those_in_use(moved: list[tuple[str, int]]):
    first, second = make_tiny(2), make_tiny(2).copy()
    shared = first.linear_names[0]
    third = first.copy(sharing=[shared])
    with resting.resting([first, second], need=1.0, beside=third) as awake:
        rested = sum(n for name, n in moved if name == "resting.to_host")
        assert rested == 2 * first.n_parameters - first.weights[shared].numel()
        moved.clear()
        with awake(second):
            assert sum(n for _, n in moved) == second.n_parameters
        assert {name for name, _ in moved} == {"resting.to_host", "resting.to_device"}
        moved.clear()
    assert sum(n for name, n in moved if name == "resting.to_device") == rested


def test_nothing_is_moved_where_there_is_room(monkeypatch: pytest.MonkeyPatch):
    model = make_tiny(2)
    monkeypatch.setattr(resting, "to_host", None)  # would fail
    with resting.resting([model], need=1e15) as awake, awake(model):
        pass
    assert resting.free_bytes(torch.device("cpu")) == float("inf")


def test_linearized_relearning_with_the_model_at_rest(
    moved: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
):
    model, pairs = make_tiny(2), make_pairs()
    found, copy = linearized.linearized_relearning(model, pairs, pairs, steps=2)
    assert moved
    for module in (resting, linearized):
        monkeypatch.setattr(module, "free_bytes", lambda _: float("inf"))
    wanted, other = linearized.linearized_relearning(model, pairs, pairs, steps=2)
    assert torch.equal(found.half_b, wanted.half_b)
    assert all(torch.equal(w, other.weights[n]) for n, w in copy.weights.items())
