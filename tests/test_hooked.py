"""Models that people hold, in place of one of this package.

`HookedTransformer` of TransformerLens 3.9 gives the same scores as the bridge on the same weights.
TransformerLens 4 has no such class, so those tests are skipped there; `.ci/run` runs this file in
an environment of its own.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import test_families
import torch
from conftest import make_pairs

import mansu_interp as mansu
from mansu_interp.audit.cad import CAD
from mansu_interp.audit.relearning import Point, Relearning
from mansu_interp.audit.suite import AttackResults
from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.compare import compare
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import CircuitError, ModelError
from mansu_interp.models.hooked import HookedStream, as_language_model, as_model
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.layout import turn_back
from mansu_interp.runs.run import RunResult
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.unlearning.history import StepRecord
from mansu_interp.unlearning.training import Unlearned
from mansu_interp.utils.ranges import GUARDED
from mansu_interp.utils.words import Shown

HookedTransformer: Any
try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None
needs_3_9 = pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4")
CONVERTERS = {
    "llama gqa": "llama",
    "llama mqa": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "gpt2": "gpt2",
    "gpt-neox": "neox",
    "gpt-neox serial": "neox",
    "phi": "phi",
}
RMS = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
ROTARY = (*RMS, "gpt_neox", "phi")
EACH = pytest.mark.parametrize("family", CONVERTERS)
PAIRS = make_pairs((5, 4, 6))


def hooked_config(model: LanguageModel) -> Any:
    """What TransformerLens' own table would say of a published model of this family."""
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    c, kind = model.config, model.config.model_type
    rms = kind in RMS
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rotary = (
        int(head * (c.rope_parameters.get("partial_rotary_factor", 1))) if kind in ROTARY else 0
    )
    extra: dict[str, Any] = {
        "gemma2": {
            "attn_scale": getattr(c, "query_pre_attn_scalar", 1) ** 0.5,
            "attn_scores_soft_cap": getattr(c, "attn_logit_softcapping", None),
            "output_logits_soft_cap": getattr(c, "final_logit_softcapping", None),
            "use_normalization_before_and_after": True,
        },
        "qwen3": {"use_qk_norm": True},
        "gpt_neox": {"parallel_attn_mlp": getattr(c, "use_parallel_residual", False)},
        "phi": {"parallel_attn_mlp": True},
    }.get(kind, {})
    act = getattr(c, "hidden_act", None) or getattr(c, "activation_function", "relu")
    return HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=64,
        d_head=head,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads if rms else None,
        d_mlp=getattr(c, "intermediate_size", None) or getattr(c, "ffn_dim", 4 * c.hidden_size),
        d_vocab=c.vocab_size,
        act_fn="gelu_pytorch_tanh" if kind == "gemma2" else act,
        eps=getattr(c, "rms_norm_eps", 1e-5),
        normalization_type="RMS" if rms else "LN",
        positional_embedding_type="rotary" if rotary else "standard",
        rotary_dim=rotary or None,
        rotary_adjacent_pairs=False,
        gated_mlp=rms,
        final_rms=rms,
        original_architecture=c.architectures[0],
        device="cpu",
        **extra,
    )


@lru_cache
def hooked(family: str, fold: bool = False) -> Any:
    """The same weights as `test_families.make`, as a HookedTransformer."""
    from transformer_lens.pretrained import weight_conversions

    model = test_families.make(family)
    config = hooked_config(model)
    plain = copy.deepcopy(model.hf)
    turn_back(plain)  # the converter knows GPT-2's own layout
    weights = getattr(weight_conversions, f"convert_{CONVERTERS[family]}_weights")(plain, config)
    out = HookedTransformer(config)
    out.load_and_process_state_dict(
        {k: v.detach().clone() for k, v in weights.items()},
        fold_ln=fold,
        center_writing_weights=fold,
        center_unembed=fold,
        fold_value_biases=fold,
    )
    return out.eval()


@needs_3_9
@EACH
def test_scores_are_those_of_the_bridge(family: str):
    for config in (AttributionConfig(method="eap"), AttributionConfig(ig_steps=3)):
        neurons = family != "gemma2"
        expected = attribute(test_families.make(family), PAIRS, config=config, neurons=neurons)
        found = attribute(hooked(family), PAIRS, config=config, neurons=neurons)
        size = np.abs(expected.scores).max()
        assert np.abs(found.scores - expected.scores).max() < 1e-4 * size
        assert (found.clean, found.corrupt) == pytest.approx(
            (expected.clean, expected.corrupt), abs=1e-4
        )
        for name, values in expected.neurons.items():
            assert np.abs(found.neurons[name] - values).max() < 1e-4 * size


@needs_3_9
@EACH
@pytest.mark.parametrize("kind", ["corrupt", "mean"])
def test_circuits_are_as_faithful_as_on_the_bridge(family: str, kind: str):
    model = test_families.make(family)
    rng = np.random.default_rng(0)
    a, b = (Ablation(m, PAIRS, ablation=kind, batch_size=2) for m in (model, hooked(family)))
    for _ in range(3):
        edges = model.graph.prune(rng.random(model.graph.exists.shape) < 0.5)
        assert 20 < edges.sum() < model.graph.n_edges
        assert b(edges) == pytest.approx(a(edges), abs=1e-4)


@needs_3_9
def test_a_bridge_without_the_hooks_is_refused():
    """TransformerLens 3.9 bridges OPT without a hook behind its MLP; 4.3 has one."""
    with pytest.raises(CircuitError, match=r"hook point blocks\.0\.mlp\.hook_out"):
        attribute(test_families.make("opt"), PAIRS)


@needs_3_9
def test_processed_weights_stay_exact():
    """Folded norms and centred writes: another basis, the same function and exact ends."""
    folded, plain = hooked("gpt2", fold=True), hooked("gpt2")
    ablation = Ablation(folded, PAIRS)
    expected = attribute(plain, PAIRS, config=AttributionConfig(ig_steps=3))
    assert ablation.ends == pytest.approx((expected.clean, expected.corrupt), abs=1e-3)
    scores = attribute(folded, PAIRS, config=AttributionConfig(ig_steps=48)).scores
    assert scores[0].sum() == pytest.approx(expected.clean - expected.corrupt, abs=0.02)


@needs_3_9
def test_discovery_and_comparison_take_it():
    family = "llama gqa"
    config = CircuitConfig(top=40, pairs=3, faithfulness_pairs=3, ig_steps=2)
    # Turned, since a random model gives more of the metric on the corrupt ones.
    pairs = PairSet("turned", tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in PAIRS))
    found = discover(hooked(family), pairs, config=config)
    expected = discover(test_families.make(family), pairs, config=config)
    assert (found.edges == expected.edges).all()
    assert found.meta.faithfulness == pytest.approx(expected.meta.faithfulness, abs=1e-3)
    models = {"same": test_families.make(family)}
    same = compare(found, hooked(family), models, pairs).models["same"]
    assert same.projected_share == pytest.approx(1.0, abs=1e-4)


@needs_3_9
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_only": True}, "no MLPs"),
        ({"normalization_type": None}, "no norms"),
        ({"positional_embedding_type": "shortformer"}, "adds positions"),
        ({"ungroup_grouped_query_attention": True}, "ungrouped"),
        ({"original_architecture": "Olmo2ForCausalLM"}, "behind its components"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    model = hooked("llama gqa")
    for name, value in change.items():
        monkeypatch.setattr(model.cfg, name, value)
    with pytest.raises(CircuitError, match=message):
        attribute(model, PAIRS)


@needs_3_9
def test_training_mode_and_bad_weights():
    model = hooked("gpt2")
    model.train()
    try:
        with pytest.raises(CircuitError, match="training mode"):
            attribute(model, PAIRS)
    finally:
        model.eval()
    kept = model.blocks[1].mlp.W_in.data[0, 0].clone()
    model.blocks[1].mlp.W_in.data[0, 0] = torch.nan
    try:
        with pytest.raises(CircuitError, match=r"blocks\.1\.mlp\.W_in holds NaN"):
            attribute(model, PAIRS)
    finally:
        model.blocks[1].mlp.W_in.data[0, 0] = kept


@needs_3_9
def test_no_hook_is_left_behind():
    model = hooked("gpt2")
    attribute(model, PAIRS, config=AttributionConfig(ig_steps=1))
    Ablation(model, PAIRS)(HookedStream(as_model(model)).graph.exists)
    assert not [p.name for p in model.hook_points() if p.fwd_hooks or p.bwd_hooks]


def test_anything_else_is_refused():
    with pytest.raises(CircuitError, match="got a Linear, expected a LanguageModel"):
        attribute(torch.nn.Linear(2, 2), PAIRS)


FEW = AttributionConfig(method="eap")


class Peft(torch.nn.Module):
    """A model wrapped as PEFT does: by duck typing it is one."""

    def __init__(self, hf: Any, lora: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.base_model, self.lora = hf, lora
        self.peft_config = {"default": "lora"}

    def merge_and_unload(self) -> Any:
        for name, parameter in self.base_model.named_parameters():
            if name in self.lora:
                parameter.data += self.lora[name]
        return self.base_model


def real_peft(hf: Any, lora: dict[str, torch.Tensor]) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    (name,) = lora
    made = peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=[name.split(".")[-2]]))
    one = next(n for n in (n for n, _ in made.named_modules()) if n.endswith(name[:-7]))
    a, b = (made.get_submodule(f"{one}.lora_{x}.default").weight for x in "AB")
    u, s, v = torch.linalg.svd(lora[name])
    scale = made.get_submodule(one).scaling["default"]
    a.data, b.data = v[:4] / scale, u[:, :4] * s[:4]
    return made


def held(kind: str, facts: LanguageModel, tmp_path: Any = None) -> tuple[Any, LanguageModel]:
    """A model as somebody holds it, and the one of this package with the same weights."""
    from transformers import AutoModelForCausalLM

    assert facts.folder
    hf = AutoModelForCausalLM.from_pretrained(facts.folder, dtype=torch.float32)
    if kind == "name":
        return "facts", facts
    if kind == "folder":
        return facts.folder, facts
    if kind == "transformers":
        return hf, facts
    if kind == "with its tokenizer":
        return (hf, facts.tokenizer), facts
    if kind == "bfloat16":
        return hf.to(torch.bfloat16), facts  # the embedded models are stored in it
    if kind == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        if HookedTransformer:
            pytest.skip("TransformerLens 3: refused, see test_a_bridge_of_3_9_is_refused")
        return TransformerBridge.boot_transformers(str(facts.folder), device="cpu"), facts
    name = "model.layers.1.self_attn.v_proj.weight"
    torch.manual_seed(0)
    rows, columns = facts.weights[name].shape
    lora = {name: 0.1 * torch.randn(rows, 2) @ torch.randn(2, columns)}
    own = facts.copy()
    own.weights[name] += lora[name]
    wrap = real_peft if kind == "peft" else Peft
    return wrap(hf, lora), own


@needs_3_9
def test_a_bridge_of_3_9_is_refused(facts: LanguageModel):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(facts.folder), device="cpu")
    with pytest.raises(ModelError, match="of TransformerLens 3 changes the model inside"):
        as_language_model(bridge)


SLOW_ONES = ("name", "folder", "with its tokenizer", "bfloat16", "peft", "wrapped")
HELD = ("transformers", "bridge", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_ONES))


@pytest.mark.parametrize("kind", HELD)
def test_every_function_takes_what_people_hold(kind: str, facts: LanguageModel, capitals: Any):
    given, own = held(kind, facts)
    module = given[0] if isinstance(given, tuple) else given
    before = {}
    if isinstance(module, torch.nn.Module):
        module.train()
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        grads = {n: p.requires_grad for n, p in module.named_parameters()}
    found = as_language_model(given)
    assert found.weights.keys() == own.weights.keys() and not found.hf.training
    tolerance = 1e-5 if kind == "peft" else 0  # it adds a product of two matrices
    for name, weight in own.weights.items():
        assert torch.allclose(found.weights[name], weight, rtol=0, atol=tolerance), name
        assert found.weights[name].dtype == torch.float32
    pairs, config = capitals.forget.sample(4, 0), FEW
    few = PairSet(pairs.name, pairs.pairs)
    if isinstance(module, torch.nn.Module):
        assert module.training
        module.eval()  # scores are refused otherwise
    if kind != "bfloat16":
        expected, scores = (attribute(m, few, config=config).scores for m in (own, given))
        assert np.abs(scores - expected).max() < 1e-4 * np.abs(expected).max()
    assert mansu.survival(own, given, "nf4").edited <= (0 if not tolerance else 16384)
    version = mansu.ModelVersion("original")
    asked = mansu.evaluate({version: given}, capitals, role="forget").rows
    assert asked == mansu.evaluate({version: own}, capitals, role="forget").rows
    if kind in ("name", "folder", "with its tokenizer", "bridge"):
        assert mansu.load_task("capitals", given).forget.pairs[0] == capitals.forget.pairs[0]
    if before:  # it is left as it is
        after = dict(module.named_parameters())
        assert after.keys() == before.keys() and all(
            torch.equal(after[n], before[n]) for n in after
        )
        assert {n: p.requires_grad for n, p in after.items()} == grads
    if kind == "bfloat16":
        assert found.saved_dtype == torch.bfloat16
        assert next(iter(before.values())).dtype == torch.bfloat16


def test_of_4_bit_weights_prompts_and_circuits_are_read_and_edits_refused(
    facts: LanguageModel, capitals: Any
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    assert facts.folder
    packed = AutoModelForCausalLM.from_pretrained(
        facts.folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    few = PairSet("few", capitals.forget.pairs[:4])
    expected = attribute(mansu.quantize(facts, "nf4"), few, config=FEW).scores
    found = attribute(packed, few, config=FEW).scores  # it computes in bfloat16
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    assert mansu.load_task("capitals", (packed, facts.tokenizer)).forget.pairs
    mask = mansu.Mask({facts.linear_names[0]: torch.tensor([0])})
    for refused in (
        lambda: mansu.quantize(packed, "nf4"),
        lambda: mansu.survival(facts, packed, "nf4"),
        lambda: mansu.unlearn(packed, capitals, mask),
        lambda: mansu.relearn(packed, capitals),
        lambda: mansu.judge_erasure(facts, packed, capitals),
    ):
        with pytest.raises(ModelError, match=r"q_proj\.weight is packed to 4 bits by bitsandbytes"):
            refused()
    with pytest.raises(ModelError, match=r"an adapter over weights packed to 4 bits\."):
        as_model(Peft(packed, {}))


def test_weights_that_are_not_the_deployed_ones_are_refused(facts: LanguageModel, capitals: Any):
    bridge, _ = held("bridge", facts)
    bridge.enable_compatibility_mode(disable_warnings=True)
    few = PairSet("few", capitals.forget.pairs[:2])
    for refused in (lambda: mansu.quantize(bridge), lambda: attribute(bridge, few, config=FEW)):
        with pytest.raises(ModelError, match="A TransformerBridge whose weights were processed"):
            refused()
    made = type("HookedTransformer", (torch.nn.Linear,), {"cfg": None})(2, 2)
    with pytest.raises(ModelError, match="HookedTransformer, whose weights are converted"):
        mansu.quantize(made)


def test_results_have_a_short_form_for_console_and_notebook(facts: LanguageModel, capitals: Any):
    few = PairSet("few", capitals.forget.pairs[:8])
    scores = attribute(facts, few, config=FEW)
    circuit = discover(facts, few, config=CircuitConfig(method="eap", top=40))
    edited = facts.copy()
    name = edited.linear_names[0]
    edited.weights[name][0, :8] += 0.5
    original, after = mansu.ModelVersion("original"), mansu.ModelVersion("unlearned")
    mask = mansu.Mask({n: torch.arange(9) for n in facts.linear_names}, {"limit": 5})
    history = [StepRecord(forget=1.0, edited=8.0) for _ in range(500)]
    start = Point(1e-3, 0, 0.0, choice=0.25, half_a=0.2, last=0.2)
    relearned = Relearning([start, replace(start, steps=5, choice=0.3)] * 50, (9, 9))
    cad = CAD("suppressed", "Hidden.", 0.97, 0.0, {}, [0.5] * 500, [], [], {}, {},
              facts={"capital: a": "erased"})  # fmt: skip
    results = {
        "LanguageModel('facts', parameters 1,033,344, saved as bfloat16, on cpu)": facts,
        "Task('capitals': 716 forget": capitals,
        "Attribution(1,055 edges": scores,
        "Circuit(": circuit,
        "Changes(kept ": mansu.classify(scores.scores, scores.scores),
        "GraphComparison(unlearned mass ": compare(circuit, facts, {"unlearned": edited}, few),
        "Unlearned('facts', steps 500, edited 8)": Unlearned(edited, history, 500),
        "Relearning(erased, model –, steps 5, half B first, at most 0.300": relearned,
        "AttackResults(erased True, most after half-a 0.300, skipped 1)": AttackResults(
            {"half-a": relearned}, {"lora": "too wide"}
        ),
        "CAD(suppressed, CAD 0.00, confidence 0.97, erased 1, suppressed 0, intact 0": cad,
        "Survival(edited 8, survived ": mansu.survival(facts, edited, "nf4"),
        "Mask(": mask,
        "Scores(original, forget 1.000 four-way, ": mansu.evaluate(
            {original: facts, after: edited}, capitals, role="forget"
        ),
        "PairSet('few', 8 pairs": few,
        "Ablated(": circuit.ablate(facts, few),
        "Curve(cpr ": mansu.faithfulness_curve(
            Ablation(facts, few), scores.scores, fractions=(0.2, 0.5, 1.0)
        ),
    }
    for start, result in results.items():
        assert repr(result).startswith(start), repr(result)
        shown = result._repr_html_()
        assert len(repr(result)) <= 2000 and len(shown) <= 2000, start
        assert shown.startswith("<table") and shown.endswith("</table>")
    assert "parameters 9," in repr(mansu.Mask({name: torch.arange(9)}))
    hostile = replace(capitals, title="<img src=x>\x1b[31m" + "long " * 2000)._repr_html_()
    assert "<img" not in hostile and "\x1b" not in hostile and len(hostile) <= 2000
    for kind in (mansu.Report, RunResult):  # of a run: tests of runs make them
        assert kind.__repr__ is Shown.__repr__ and kind._repr_html_ is Shown._repr_html_


def test_every_public_function_has_the_one_guard():
    """Whatever takes a model asks `entrance` to make one."""
    seen = 0
    for name in mansu.__all__:
        value = getattr(mansu, name)
        members = [value] if inspect.isfunction(value) else []
        if inspect.isclass(value):
            members = [getattr(m, "__func__", m) for k, m in vars(value).items() if k[0] != "_"]
        for f in filter(inspect.isfunction, members):
            hints = [str(p.annotation) for p in inspect.signature(f).parameters.values()]
            if not any("LanguageModel" in h or "AnyModel" in h for h in hints):
                continue
            seen += 1
            assert hasattr(f, GUARDED), f
    assert seen > 20
