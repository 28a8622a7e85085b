"""Models on an accelerator. Where there is none, on a device that only pretends (see `pretend`).

MANSU_TEST_DEVICE=cuda python -m pytest tests/test_device.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEST_DEVICE, make_pairs, make_tiny
from test_objectives import make_whole

from mansu_interp.audit.cad import judge_erasure
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.probes import stitches
from mansu_interp.audit.relearning import relearn
from mansu_interp.circuits.ablation import ABLATIONS, Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.cli.main import main
from mansu_interp.errors import ConfigError
from mansu_interp.export.ledger import Ledger, apply, delta
from mansu_interp.export.verify import verify
from mansu_interp.losses.accuracy import accuracy, perplexity, right
from mansu_interp.losses.answers import nll
from mansu_interp.losses.fisher import fisher_diagonal, retain_bound
from mansu_interp.masks.floor import floor
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import circuit_mask, random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model, pick_device
from mansu_interp.quantizers.registry import QUANTIZERS, get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.run import run
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import BASELINES, Mansu, get_method
from mansu_interp.unlearning.unlearn import unlearn

SET = ("nf4", "q4_0", "int4-g32")


@pytest.fixture(scope="module")
def device() -> str:
    return TEST_DEVICE


@pytest.fixture(scope="module")
def there(device: str) -> LanguageModel:
    """The embedded model on the device."""
    return load_model("facts", device)


@pytest.fixture(scope="module")
def task(capitals: Task) -> Task:
    """`capitals` with few pairs, so that everything is quick."""
    scored = {
        split: {role: {k: s.sample(24, 0) for k, s in by.items()} for role, by in roles.items()}
        for split, roles in capitals.scored.items()
    }
    retain_unscored = capitals.retain_unscored.sample(16, 0) if capitals.retain_unscored else None
    forget, retain = capitals.forget.sample(48, 0), capitals.retain.sample(16, 0)
    return replace(
        capitals, forget=forget, retain=retain, retain_unscored=retain_unscored, scored=scored
    )


@pytest.fixture(scope="module")
def mask(facts: LanguageModel) -> Mask:
    return random_mask(facts, 0.005, survive=SET)


def alike(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to rounding, measured by the largest element."""
    scale = float(wanted.abs().max()) or 1.0
    assert float((found.cpu() - wanted).abs().max()) <= tolerance * scale


def same_weights(a: LanguageModel, b: LanguageModel) -> float:
    """The largest difference between two models."""
    return max(float((w - b.weights[n].cpu()).abs().max()) for n, w in a.weights.items())


def test_weights_lie_where_asked(there: LanguageModel, device: str):
    assert {w.device.type for w in there.weights.values()} == {device.split(":", maxsplit=1)[0]}
    assert there.copy().device == there.device
    assert quantize(there).device == there.device


def test_auto_is_the_cpu_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"


def test_auto_gives_each_process_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, index in (("0", 0), ("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device("auto") == torch.device("cuda", index)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta"])
def test_no_such_device(name: str):
    with pytest.raises(ConfigError, match="There is no device"):
        load_model("facts", name)


def test_what_it_says(facts: LanguageModel, there: LanguageModel, task: Task):
    for pairs in (task.forget, task.retain):
        assert accuracy(there, pairs) == accuracy(facts, pairs)
    text = [p.clean for p in task.forget[:4]]
    assert perplexity(there, text) == pytest.approx(perplexity(facts, text), rel=1e-4)
    assert there.generate("The capital of") == facts.generate("The capital of")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("metric", ["logit_diff", "log_prob", "choice_margin", "kl"])
def test_attribution(device: str, method: str, metric: str):
    model = make_tiny(2)
    moved = model.copy()
    moved = LanguageModel("tiny", moved.hf.to(device), None)
    config = AttributionConfig(method=method, metric=metric, ig_steps=2)  # type: ignore[arg-type]
    wanted = attribute(model, make_pairs(), config=config, positions=True, neurons=True)
    found = attribute(moved, make_pairs(), config=config, positions=True, neurons=True)
    alike(torch.tensor(found.scores), torch.tensor(wanted.scores))
    for name, value in wanted.neurons.items():
        alike(torch.tensor(found.neurons[name]), torch.tensor(value), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_faithfulness(device: str, ablation: str):
    model = make_tiny(4)
    moved = LanguageModel("tiny", model.copy().hf.to(device), None)
    edges = model.graph.exists.copy()
    edges[::2] = False
    wanted = Ablation(model, make_pairs(), ablation=ablation)(edges)
    assert Ablation(moved, make_pairs(), ablation=ablation)(edges) == pytest.approx(wanted, 1e-4)


@pytest.mark.slow
def test_circuit_and_mask(facts: LanguageModel, there: LanguageModel, task: Task):
    """Ties and rounding may send single candidates the other way."""
    config = CircuitConfig(pairs=8, top=200, ig_steps=1, faithfulness_pairs=8)
    found = [discover(m, task.forget, config=config, retain=task.retain) for m in (facts, there)]
    assert (found[0].edges != found[1].edges).sum() <= 8
    circuit = found[0]
    masks = [
        circuit_mask(
            circuit,
            m,
            budget=0.005,
            retain=task.retain_sets,
            forget=task.forget,
            survive=SET,
            subject_rows=True,
        )
        for m in (facts, there)
    ]
    for name, index in masks[0].indices.items():
        other = masks[1].indices[name]
        assert not other.is_cuda
        assert torch.isin(index, other).float().mean() > 0.99


def test_fisher_draws_the_same_labels(facts: LanguageModel, there: LanguageModel, task: Task):
    names = facts.linear_names[:3]
    wanted = fisher_diagonal(facts, names, task.retain)
    for name, value in fisher_diagonal(there, names, task.retain).items():
        alike(value, wanted[name], 1e-3)


@pytest.mark.parametrize("name", [q for q in QUANTIZERS if get_quantizer(q).promises])
def test_cells_are_those_of_the_cpu(facts: LanguageModel, there: LanguageModel, name: str):
    """Code for code, for the guarantee is about the library, which runs on the CPU."""
    quantizer = get_quantizer(name)
    for weight in (facts.linear_names[0], facts.linear_names[-1]):
        wanted, found = (quantizer.cells(m.weights[weight]) for m in (facts, there))
        assert torch.equal(found.codes.cpu(), wanted.codes)
        assert torch.equal(found.sets_scale.cpu(), wanted.sets_scale)
    wanted, found = (floor(m.weights[weight], name, m.saved_dtype) for m in (facts, there))
    for key in ("up", "down", "leave_up", "leave_down"):
        a, b = getattr(wanted, key), getattr(found, key).cpu()
        assert torch.equal(a.isnan(), b.isnan())
        alike(b.nan_to_num(), a.nan_to_num(), 1e-6)


def test_quantized_by_the_library(facts: LanguageModel, there: LanguageModel):
    assert same_weights(quantize(facts, "nf4"), quantize(there, "nf4")) == 0


SETTINGS = Mansu(
    steps=4,
    batch_size=8,
    survive=SET,
    quantization_margin=0.02,
    adversarial_steps=1,
    probe_weight=0.5,
    adversarial_lr=1e-3,
    lr=0.2,
)


@pytest.fixture(scope="module")
def edited(there: LanguageModel, task: Task, mask: Mask) -> LanguageModel:
    return unlearn(there, task, mask, SETTINGS).model


@pytest.mark.slow
def test_mansu(facts: LanguageModel, task: Task, mask: Mask, edited: LanguageModel):
    """The same edits but for weights on the edge of a cell, and every one survives."""
    wanted = unlearn(facts, task, mask, SETTINGS).model
    moved = [wanted.weights[n] != facts.weights[n] for n in mask.indices]
    other = [edited.weights[n].cpu() != facts.weights[n] for n in mask.indices]
    assert sum(int(m.sum()) for m in moved) > 100
    odd = sum(int((a != b).sum()) for a, b in zip(moved, other, strict=True))
    assert odd <= 0.05 * sum(int(m.sum()) for m in moved)
    for name in SET:
        row = survival(facts, edited, name)
        assert row.survived == row.edited > 0
        assert row.collateral == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same(
    there: LanguageModel, task: Task, mask: Mask, edited: LanguageModel
):
    again = unlearn(there, task, mask, SETTINGS).model
    assert all(torch.equal(w, again.weights[n]) for n, w in edited.weights.items())


@pytest.mark.slow
def test_bf16_and_the_other_loss(there: LanguageModel, task: Task, mask: Mask):
    settings = replace(
        SETTINGS, precision="bf16", forget_loss="ga", adversarial_steps=0, probe_weight=0.0
    )
    result = unlearn(there, task, mask, replace(settings, steps=2))
    assert all(w.dtype == torch.float32 for w in result.model.weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", [*BASELINES, "mansu-no-floor", "mansu-no-projection"])
def test_methods(facts: LanguageModel, there: LanguageModel, task: Task, mask: Mask, method: str):
    settings = get_method(method)(steps=2, batch_size=8, lr=1e-4)
    wanted, found = (unlearn(m, task, mask, settings) for m in (facts, there))
    assert found.model.device == there.device
    for a, b in zip(wanted.history, found.history, strict=True):
        assert b.forget == pytest.approx(a.forget, rel=2e-2, abs=1e-3)


@pytest.mark.slow
def test_the_edit_travels(
    facts: LanguageModel, there: LanguageModel, edited: LanguageModel, tmp_path: Path
):
    """A checkpoint written there is one of the CPU, and so is the ledger."""
    edited.save(tmp_path / "model")
    here = load_model(tmp_path / "model")
    assert same_weights(here, edited) == 0
    ledger = Ledger.of(there, edited, SET)
    assert verify(
        facts, here, SET, replace(ledger, meta={**ledger.meta, "edited_sha256": ""})
    ).holds
    assert same_weights(apply(facts, delta(there, edited)), edited) == 0
    assert same_weights(apply(facts, delta(facts, edited)), edited) == 0


@pytest.mark.slow
def test_an_interrupted_loop_goes_on(
    there: LanguageModel, task: Task, mask: Mask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mansu_interp.utils.tensors.SECONDS", 0.0)

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for method in ("mansu", "ga"):
        settings = get_method(method)(steps=3, batch_size=8)
        file = tmp_path / f"{method}.safetensors"
        whole = unlearn(there, task, mask, settings).model
        with pytest.raises(KeyboardInterrupt):
            unlearn(there, task, mask, settings, on_step=stop, resume=file)
        again = unlearn(there, task, mask, settings, resume=file).model
        assert (
            max(float((w - again.weights[n]).abs().max()) for n, w in whole.weights.items()) < 1e-5
        )


@pytest.mark.slow
def test_verdict_and_attack(facts: LanguageModel, there: LanguageModel, task: Task):
    twin = load_model(task.reference_models[0], there.device)
    found = judge_erasure(there, twin, task, quantized=quantize(twin))
    wanted = judge_erasure(facts, load_model(task.reference_models[0]), task)
    assert found.verdict == wanted.verdict
    assert stitches(there, twin, task.forget) == pytest.approx(
        stitches(facts, load_model(task.reference_models[0]), task.forget), abs=0.05
    )
    attack = RelearnConfig(steps=(2,), rates=(1e-3,))
    a, b = (relearn(m, task, config=attack).at(2) for m in (facts, there))
    assert a == pytest.approx(b, abs=0.05)


@pytest.mark.slow
def test_retain_bound(
    facts: LanguageModel, there: LanguageModel, task: Task, edited: LanguageModel
):
    apart = apply(facts, delta(facts, edited))
    wanted = retain_bound(facts, apart, task.retain)
    found = retain_bound(there, edited, task.retain)
    assert found.bound == pytest.approx(wanted.bound, rel=1e-2)


@pytest.mark.slow
def test_a_whole_run(device: str, tmp_path: Path):
    config = RunConfig(
        device=device,
        out=tmp_path / "run",
        score_pairs=24,
        relearn_steps=0,
        quantizers=("int8",),
        circuit=CircuitConfig(pairs=8, ig_steps=1, faithfulness_pairs=8),
        unlearn=Mansu(steps=2, batch_size=16),
    )
    result = run(config)
    assert (tmp_path / "run" / "report.html").exists()
    assert result.model.device.type == device.split(":", maxsplit=1)[0]


def test_whole_answers(device: str):
    """Answers of several tokens."""
    model, pairs = make_tiny(2), make_whole(12, 1, True)
    moved = LanguageModel("tiny", model.copy().hf.to(device), None)
    for a, b in zip(right(model, pairs), right(moved, pairs), strict=True):
        assert torch.equal(a, b.cpu())
    alike(nll(moved, pairs).detach(), nll(model, pairs))


@pytest.mark.parametrize(
    "command", [["run"], ["bench"], ["relearn", "facts"], ["cad", "facts", "facts"]]
)
def test_a_wrong_device_is_said_at_once(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "gpu"]) == 1
    assert "There is no device 'gpu' here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
