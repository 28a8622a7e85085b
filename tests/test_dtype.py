"""Weights held in the checkpoint's bfloat16: which are, and what that leaves as it is."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import make_pairs, make_tiny

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.relearning import relearn
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.errors import ConfigError
from mansu_interp.export.ledger import Ledger
from mansu_interp.export.verify import verify
from mansu_interp.losses.answers import answer_gradient, log_probs, nll
from mansu_interp.losses.fisher import fisher_diagonal
from mansu_interp.losses.gradients import gradient
from mansu_interp.masks.floor import floor_step
from mansu_interp.masks.mask import Mask
from mansu_interp.models import load
from mansu_interp.models.hooked import as_language_model
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.layout import output_embeddings, unembedded
from mansu_interp.models.load import empty_model, load_model, pick_dtype
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.runs import erasure as erasing
from mansu_interp.runs.config import PlanConfig, RunConfig
from mansu_interp.runs.planning import memory
from mansu_interp.runs.planning.cost import plan_lines
from mansu_interp.runs.planning.memory import PROCESS, Job, disk_gb, fitting, stages
from mansu_interp.runs.run import run
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.baselines.dense import DenseLoop, Objective
from mansu_interp.unlearning.mansu.students import Students
from mansu_interp.unlearning.methods import GradDiff, Mansu
from mansu_interp.unlearning.unlearn import unlearn

LOW, WIDE = torch.bfloat16, torch.float32
SET = ("nf4", "int4-g32", "q4_0", "nf4-dq")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def low() -> LanguageModel:
    """The embedded model as its checkpoint stores it; never edit it."""
    return load_model("facts", dtype="bfloat16")


@pytest.fixture(scope="module")
def few(capitals: Task) -> PairSet:
    return capitals.forget.sample(12, 0)


def low_copy(model: LanguageModel) -> LanguageModel:
    """A copy whose weights are rounded to bfloat16."""
    return LanguageModel("low", copy.deepcopy(model.hf).bfloat16(), None, LOW)


def mask_of(model: LanguageModel) -> Mask:
    draws = torch.Generator().manual_seed(0)
    names = [n for n in model.linear_names if "mlp" in n]
    each = {n: torch.randint(model.weights[n].numel(), (900,), generator=draws) for n in names}
    indices = {n: i.unique() for n, i in each.items()}
    return Mask(indices, {"limit": sum(map(len, indices.values())) // 3})


@pytest.mark.parametrize(
    ("name", "stored", "size", "quick", "expected"),
    [
        ("auto", LOW, 10**7, True, LOW),
        ("auto", LOW, 10**7, False, WIDE),
        ("auto", LOW, 10**7 - 1, True, WIDE),
        ("auto", WIDE, 10**9, True, WIDE),
        ("auto", torch.float16, 10**9, True, WIDE),
        ("float32", LOW, 10**9, True, WIDE),
        ("bfloat16", LOW, 10, False, LOW),
        (LOW, LOW, 10, False, LOW),
    ],
)
def test_one_place_decides(
    name: str, stored: torch.dtype, size: int, quick: bool, expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(load, "computes_bfloat16", lambda device: quick)
    assert pick_dtype(name, stored, size, CPU) == expected


@pytest.mark.parametrize("stored", [WIDE, torch.float16])
def test_what_bfloat16_would_round_is_refused(stored: torch.dtype):
    kind = str(stored).removeprefix("torch.")
    with pytest.raises(ConfigError, match=f"for a checkpoint that is stored as {kind} and would"):
        pick_dtype("bfloat16", stored, 10**9, CPU)
    with pytest.raises(ConfigError, match=r"dtype: got 'int8', expected auto, float32, bfloat16\."):
        pick_dtype("int8", stored, 10**9, CPU)


def test_small_models_are_held_in_float32_and_others_as_stored(
    facts: LanguageModel, low: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    assert (facts.dtype, facts.saved_dtype) == (WIDE, LOW)
    assert (low.dtype, low.saved_dtype) == (LOW, LOW)
    assert all(torch.equal(w.float(), facts.weights[n]) for n, w in low.weights.items())
    monkeypatch.setattr(load, "SMALL", 0)
    monkeypatch.setattr(load, "computes_bfloat16", lambda device: True)
    assert load_model("facts").dtype == LOW
    given = as_language_model(low.hf)  # its memory is shared
    name = low.embedding_name
    assert given.weights[name].data_ptr() == low.weights[name].data_ptr()
    monkeypatch.undo()
    assert as_language_model(low.hf).dtype == WIDE and low.dtype == LOW


def test_logits_are_not_rounded_to_bfloat16(low: LanguageModel, few: PairSet):
    """Else many answers would be level, and a tie counts against a model."""
    batch = next(few.batches(12, CPU))
    hidden = low.hf.base_model(input_ids=batch.clean).last_hidden_state[:, -1].detach()
    head = output_embeddings(low.hf)
    weight = head.get_parameter("weight")
    exact = hidden.double() @ weight.double().T
    logits = low.unembed(hidden)
    assert logits.dtype == WIDE
    assert (logits - exact).abs().max() < 1e-4
    rounded = head(hidden)
    assert rounded[0].unique().numel() < 0.8 * logits[0].unique().numel()
    assert low.last_logits(batch.clean, batch.last).dtype == low.all_logits(batch.clean).dtype


def test_gradients_pass_the_unembedding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mansu_interp.models.layout.ROWS", 16)  # the last part is smaller
    hf = low_copy(make_tiny()).hf
    hidden = torch.randn(3, 2, hf.config.hidden_size).to(LOW).requires_grad_(True)
    weight = hf.lm_head.weight.requires_grad_(True)
    slope = torch.randn(3, 2, hf.config.vocab_size)
    found = torch.autograd.grad((unembedded(hf, hidden) * slope).sum(), [hidden, weight])
    x, w = (t.detach().double().requires_grad_(True) for t in (hidden, weight))
    exact = torch.autograd.grad((x @ w.T * slope).sum(), [x, w])
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == LOW
        assert (got - want).abs().max() <= 2.0**-8 * want.abs().max()


@pytest.mark.slow
def test_gradients_are_added_up_in_float32(low: LanguageModel, few: PairSet):
    name, pairs = low.linear_names[3], list(few)[:2]
    of = {name: torch.arange(40)}

    def loss() -> torch.Tensor:
        return nll(low, pairs).mean()

    one, many = (gradient(low, of, [loss] * n)[0] for n in (1, 300))
    assert many.dtype == WIDE  # in bfloat16 it would not grow beyond 256 times
    assert torch.allclose(many, 300 * one, rtol=1e-4)
    fisher = fisher_diagonal(low, of, few)[name]
    assert fisher.dtype == WIDE and bool((fisher >= 0).all())


@pytest.mark.slow
def test_gradients_are_near_those_of_float32(
    facts: LanguageModel, low: LanguageModel, few: PairSet
):
    names = low.linear_names
    for name in names:
        one, other = (answer_gradient(m, [name], few)[name].flatten() for m in (low, facts))
        assert torch.cosine_similarity(one, other, 0) > 0.99, name


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_edges_agree_with_the_definition_in_64_bits(kv_heads: int):
    """Large random weights are the worst case: on the embedded model they agree to 0.001."""
    narrow, pairs = low_copy(make_tiny(kv_heads)), make_pairs()
    exact = LanguageModel("exact", copy.deepcopy(narrow.hf).double(), None)
    expected = np.mean([reference.eap(exact, p) for p in pairs], axis=0)
    assert expected.dtype == np.float64
    found = attribute(narrow, pairs, config=AttributionConfig(method="eap")).scores
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_edges_of_the_embedded_model_agree_with_64_bits(low: LanguageModel, few: PairSet):
    exact = LanguageModel("exact", copy.deepcopy(low.hf).double(), None)
    pairs = PairSet("few", few.pairs[:4])
    found, expected = (
        attribute(m, pairs, config=AttributionConfig(method="eap")).scores for m in (low, exact)
    )
    assert np.abs(found - expected).max() < 0.003 * np.abs(expected).max()


@pytest.mark.parametrize("name", SET)
def test_cells_and_steps_are_those_of_the_same_values_in_float32(
    name: str, facts: LanguageModel, low: LanguageModel
):
    weight = low.linear_names[3]
    slope = torch.randn(facts.weights[weight].shape, generator=torch.Generator().manual_seed(0))
    one, other = (floor_step(m.weights[weight], slope, name, LOW) for m in (low, facts))
    assert one.dtype == WIDE and torch.equal(one, other)
    quantized = (quantize(m, name).weights[weight] for m in (low, facts))
    one, other = quantized
    assert one.dtype == LOW and torch.equal(one, other.to(LOW))


def test_students_are_the_quantized_models(low: LanguageModel):
    """Formats that wait as codes, and those that do not."""
    students = Students(low.copy(), SET)
    for _ in range(2):
        for side, quantizer in enumerate(students.quantizers, 1):
            expected = quantize(low, quantizer).weights
            for name, weight in students[side].weights.items():
                assert weight.dtype == LOW and torch.equal(weight, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("survive", [("nf4",), SET[:3]])
def test_every_edit_survives_and_nothing_else_moves(
    survive: tuple[str, ...], low: LanguageModel, capitals: Task, tmp_path: Path
):
    mask, before = mask_of(low), {n: w.clone() for n, w in low.weights.items()}
    config = Mansu(steps=8, lr=0.2, batch_size=8, survive=survive, quantization_margin=0.1)
    made = unlearn(low, capitals, mask, config)
    assert made.model.dtype == LOW
    assert all(torch.equal(w, before[n]) for n, w in low.weights.items())
    inside = {n: torch.zeros(w.numel(), dtype=torch.bool) for n, w in low.weights.items()}
    for name, index in mask.indices.items():
        inside[name][index] = True
    for name, weight in made.model.weights.items():
        assert not ((weight != before[name]).flatten() & ~inside[name]).any(), name
    made.model.save(tmp_path / "model")
    for dtype in ("bfloat16", "float32"):  # however it is loaded
        original = load_model("facts", dtype=dtype)
        edited = load_model(tmp_path / "model", dtype=dtype)
        for quantizer in survive:
            found = survival(original, edited, quantizer)
            assert found.survived == found.edited > 100
            assert found.collateral == 0
            assert found.share_kept == pytest.approx(1, abs=0.15)
        ledger = Ledger.of(original, edited, survive)
        assert verify(original, edited, (), ledger, mask).status == 0


def test_what_relearns_does_so_in_float32(facts: LanguageModel, low: LanguageModel, capitals: Task):
    """In bfloat16 small steps would be lost, and facts would seem to be erased."""
    config = RelearnConfig(steps=(2,), rates=(3e-4,), batch_size=8)
    one, other = (relearn(m, capitals, config=config, split="dev").points for m in (low, facts))
    assert one[-1] == other[-1]
    assert low.trainable_copy().dtype == WIDE and low.dtype == LOW
    loop = DenseLoop(low, Objective(lambda m, p: nll(m, list(p)).mean()), GradDiff())
    assert loop.student.dtype == WIDE


@pytest.mark.slow
def test_adversarial_relearning_and_probes_work(low: LanguageModel, capitals: Task):
    config = Mansu(steps=4, lr=0.2, batch_size=8, adversarial_steps=7, probe_weight=0.1)
    made = unlearn(low, capitals, mask_of(low), config)
    last = made.history[-1]
    assert last.edited and last.adversarial is not None and last.probe is not None
    found = survival(low, made.model, "nf4")
    assert found.survived == found.edited == last.edited and not found.collateral


@pytest.mark.slow
def test_bf16_arithmetic_changes_nothing_there(low: LanguageModel, capitals: Task):
    one, other = (
        unlearn(low, capitals, mask_of(low), Mansu(steps=2, lr=0.2, batch_size=4, precision=p))
        for p in ("fp32", "bf16")
    )
    assert one.history == other.history


def test_predictions_are_near_those_of_float32(
    facts: LanguageModel, low: LanguageModel, few: PairSet
):
    one, other = (log_probs(m, list(few)).detach() for m in (low, facts))
    assert (one.exp() - other.exp()).abs().max() < 0.05


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(erasing, "CAD_PAIRS", 4)
    config = RunConfig(
        model="facts",
        task="capitals",
        out=tmp_path / "run",
        dtype="bfloat16",
        circuit=CircuitConfig(pairs=8, ig_steps=2, faithfulness=0.5, faithfulness_pairs=4),
        unlearn=Mansu(steps=10, lr=0.1, batch_size=8, survive=("nf4", "q4_0")),
        relearn_steps=4,
    )
    found = run(config)
    assert found.model.dtype == LOW
    original, edited = load_model("facts"), load_model(config.out / "model")
    ledger = Ledger.load(config.out / "ledger.safetensors")
    kept = verify(original, edited, (), ledger, found.mask)
    assert kept.status == 0 and ledger.n_edits > 500
    again = run(replace(config, out=tmp_path / "wide", dtype="float32"))
    before, after = (r.mask for r in (found, again))
    assert before and after
    common = sum(
        len(set(i.tolist()) & set(after.indices.get(n, i[:0]).tolist()))
        for n, i in before.indices.items()
    )
    assert common > 0.8 * sum(map(len, after.indices.values()))


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def test_the_plan_of_8b_in_bfloat16(tmp_path: Path):
    """GB by hand: 16.06 of weights, 13.96 of those in layers; 1.75 of float32 a layer."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "dtype": "bfloat16"}))
    model = empty_model(path, dtype="bfloat16")
    assert (model.dtype, model.saved_dtype) == (LOW, LOW)
    assert empty_model(path, dtype="float32").dtype == WIDE
    job = Job(32, budget=0.0005, by_layer=True, method=Mansu(survive=SET))
    found = {s.name: s.gb - PROCESS for s in stages(model, job)}
    passes = 4.6  # 16 prompts of 32 tokens
    assert found["mask"] - passes == pytest.approx(16.06 + 3 * 0.87 + 6.98 + 0.48, rel=0.05)
    candidates = 6 * 0.0005 * 8.03 * (90 + 45 * 4)
    parts = 2 * 16.06 + 13.96 + 4 * 0.65 * 6.98 + candidates
    assert found["unlearning"] - passes == pytest.approx(parts, rel=0.05)
    assert found["unlearning"] < 80 < found["relearning"]
    through = Mansu(survive=("nf4",), train_through=("q4_k_m", "iq4_nl"))
    found = {s.name: s.gb - PROCESS for s in stages(model, replace(job, method=through))}
    candidates = 6 * 0.0005 * 8.03 * (90 + 45 + 2 * 4)
    parts = 2 * 16.06 + 3 * 13.96 + 0.65 * 6.98 + 4 * 4 * 6.98 + candidates
    assert found["unlearning"] - passes == pytest.approx(parts, rel=0.05)
    text = "\n".join(plan_lines(PlanConfig(str(path), 32, dtype="bfloat16")))
    assert "16.1 GB of weights in bfloat16;" in text
    path.write_text(json.dumps(LLAMA))
    with pytest.raises(ConfigError, match="a checkpoint that is stored as float32 and would be"):
        empty_model(path, dtype="bfloat16")


def test_layers_take_turns_where_all_at_once_do_not_fit(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    config = RunConfig(task="capitals")
    layered = replace(config, by_layer=True)
    at_once, one = (
        next(s.gb for s in stages(facts, Job.of(c, capitals)) if s.name == "mask")
        for c in (config, layered)
    )
    for has, expected in ((at_once, config), ((at_once + one) / 2, layered), (one / 2, config)):
        monkeypatch.setattr(memory, "machine_gb", lambda device, has=has: has)
        assert fitting(config, facts, capitals) == expected
    dense = replace(config, unlearn=GradDiff())
    assert fitting(dense, facts, capitals) == dense


def test_the_disk_of_a_run_by_hand(facts: LanguageModel):
    """1,033,344 weights of 2 bytes; 5,167 edits with a position, two values and two codes each of
    two quantizers; six candidates for each, with a position."""
    method = Mansu(survive=("nf4", "q4_0"))
    found = disk_gb(RunConfig(unlearn=method), facts)
    assert found.kept * 1e9 == pytest.approx(2_066_688 + 5_167 * (12 + 24), rel=0.001)
    assert (found.most - found.kept) * 1e9 == pytest.approx(2 * 31_000 * 8 * 3, rel=0.001)
    dense = disk_gb(RunConfig(unlearn=GradDiff()), facts)
    assert dense.kept * 1e9 == pytest.approx(2_066_688)
