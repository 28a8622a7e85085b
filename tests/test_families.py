"""Every decoder family, as a tiny random model: exact ends, exact single edges, complete sums."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, make_pairs

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.errors import CircuitError, ModelError
from mansu_interp.models.hook_points import Recorder
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.stream import Stream
from mansu_interp.quantizers.survival import quantize

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GATED = {**COMMON, "intermediate_size": 48, "initializer_range": 0.2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama gqa": ("Llama", "LlamaForCausalLM", {**GATED, "num_key_value_heads": 2}),
    "llama mqa": ("Llama", "LlamaForCausalLM", {**GATED, "num_key_value_heads": 1}),
    "mistral": ("Mistral", "MistralForCausalLM", {**GATED, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {**GATED, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**GATED, "num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", {**GATED, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        {**GATED, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "gpt2": (
        "GPT2",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
        },
    ),
    "gpt-neox": ("GPTNeoX", "GPTNeoXForCausalLM", GATED),
    "gpt-neox serial": ("GPTNeoX", "GPTNeoXForCausalLM", {**GATED, "use_parallel_residual": False}),
    "phi": ("Phi", "PhiForCausalLM", GATED),
    "opt": (
        "OPT",
        "OPTForCausalLM",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
}
EACH = pytest.mark.parametrize("family", FAMILIES)


@lru_cache
def make(family: str) -> LanguageModel:
    config_name, model_name, settings = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{config_name}Config")(**settings)
    config.architectures = [model_name]
    hf = getattr(transformers, model_name)(config).eval()
    for name, weight in hf.named_parameters():
        if "norm" in name or "bias" in name:  # nothing may cancel because it is 0 or 1
            weight.data += 0.3 * torch.randn_like(weight)
    return LanguageModel(family, hf, None)


@EACH
def test_the_writes_add_up_to_the_stream(family: str):
    model = make(family)
    stream, batch = Stream(model), next(make_pairs((6, 6)).batches(2))
    recorder = Recorder()
    with torch.no_grad(), stream.hooked(recorder.on([*stream.writers(), stream.final])):
        logits = stream.logits(batch.clean, batch.last)
        assert torch.allclose(logits, model.last_logits(batch.clean, batch.last), atol=1e-4)
    seen = recorder.seen
    total = seen[stream.input].clone()
    for i in range(stream.n_layers):
        total += stream.head_writes(i, seen[stream.z(i)]).sum(0) + seen[stream.mlp_out(i)]
        bias = stream.output_bias(i)
        total += 0 if bias is None else bias
    assert torch.allclose(total, seen[stream.final], atol=1e-4)


@EACH
@pytest.mark.parametrize("ablation", ["corrupt", "mean", "zero"])
def test_the_full_circuit_is_the_clean_run(family: str, ablation: str):
    model = make(family)
    rebuilt = Ablation(model, make_pairs((5, 5, 3, 6)), ablation=ablation, batch_size=3)
    nothing = np.zeros_like(model.graph.exists)
    for base in rebuilt.bases:
        clean = model.last_logits(base.batch.clean, base.batch.last)
        assert torch.allclose(rebuilt.logits(base, model.graph.exists), clean, atol=2e-4)
        empty = rebuilt.logits(base, nothing)
        if ablation == "corrupt":
            corrupt = model.last_logits(base.batch.corrupt, base.batch.last)
            assert torch.allclose(empty, corrupt, atol=2e-4)
        assert (empty - clean).abs().max() > 0.05


@EACH
def test_scores_are_complete(family: str):
    """The input's edges sum to the whole effect, and every score has its sign."""
    model = make(family)
    found = attribute(model, make_pairs((5, 4, 6)), config=AttributionConfig(ig_steps=48))
    effect = found.clean - found.corrupt
    assert found.scores[0].sum() == pytest.approx(effect, abs=0.02 * max(1.0, abs(effect)))


@EACH
def test_the_edges_into_the_logits_are_exact(family: str):
    """With one edge u -> logits ablated, the final stream moves by u's own difference; for a small
    difference the metric moves by the edge's score."""
    model, tiny = make(family), make_pairs((5,))
    ablation = Ablation(model, tiny)
    graph = model.graph
    clean = ablation(graph.exists)
    scores = attribute(model, tiny, config=AttributionConfig(method="eap", at="clean")).scores
    drops, guesses = [], []
    for writer in range(len(graph.writers)):
        edges = graph.exists.copy()
        edges[writer, -1] = False
        drops.append(clean - ablation(edges))
        guesses.append(scores[writer, -1])
    assert np.corrcoef(drops, guesses)[0, 1] > 0.8
    assert np.abs(drops).max() > 1e-3


def test_bf16_is_close_to_fp32():
    model = make("llama gqa")
    pairs = make_pairs((5, 4, 6))
    low = model.copy()
    low.hf.to(torch.bfloat16)
    low = LanguageModel("bf16", low.hf, None)
    config = AttributionConfig(ig_steps=3)
    a, b = (
        attribute(model, pairs, config=config).scores,
        attribute(low, pairs, config=config).scores,
    )
    assert b.dtype == np.float32
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99
    assert np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_what_normalises_the_stream_itself_is_refused():
    settings = FAMILIES["opt"][2]
    config = transformers.OPTConfig(**settings, do_layer_norm_before=False)
    config.architectures = ["OPTForCausalLM"]
    model = LanguageModel("post-norm OPT", transformers.OPTForCausalLM(config).eval(), None)
    with pytest.raises((CircuitError, ModelError), match="post-norm OPT"):
        attribute(model, make_pairs((4,)))


def packed(model: LanguageModel) -> LanguageModel:
    """The same model with bitsandbytes' own 4-bit layers."""
    import bitsandbytes as bnb

    out = copy.deepcopy(model.hf)
    for name, linear in list(out.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            small = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.float32,
                compress_statistics=False,
                quant_type="nf4",
            )
            small.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(out.model.get_submodule(parent), child, small.to("cpu"))
    return LanguageModel("packed", out.eval(), None)


def test_packed_weights_are_read_unpacked():
    """bitsandbytes' layers, and their weights de-quantized, score the same."""
    model, pairs = make("llama gqa"), make_pairs((5, 4))
    small = packed(model)
    assert any(w.dtype == torch.uint8 for w in small.weights.values())
    a = attribute(small, pairs, config=AttributionConfig(ig_steps=2))
    b = attribute(quantize(model), pairs, config=AttributionConfig(ig_steps=2))
    size = np.abs(b.scores).max()
    assert a.clean == pytest.approx(b.clean, abs=1e-4)
    assert np.abs(a.scores - b.scores).max() < 1e-3 * size
    full = attribute(model, pairs, config=AttributionConfig(ig_steps=2))
    assert np.abs(full.scores - b.scores).max() > 1e-2 * size  # quantization does change them
    edges = model.graph.prune(np.abs(b.scores) > 0.02 * size)
    assert Ablation(small, pairs)(edges) == pytest.approx(
        Ablation(quantize(model), pairs)(edges), abs=1e-3
    )


def test_other_packings_are_refused():
    model = make("llama gqa").copy()
    name = "model.layers.0.mlp.down_proj.weight"
    model.weights[name] = model.weights[name].to(torch.int8)
    with pytest.raises(CircuitError, match=f"{name} is packed as torch.int8"):
        attribute(model, make_pairs((4,)))


@pytest.mark.parametrize("family", ["llama gqa", "gpt2"])
def test_dispatched_models_score_the_same(family: str):
    """`device_map` models: accelerate's hooks move tensors between devices around every module."""
    from accelerate import dispatch_model

    model, pairs = make(family), make_pairs((5, 4))
    layers = "model.layers" if family == "llama gqa" else "transformer.h"
    hf = copy.deepcopy(model.hf)
    places = dict.fromkeys((n for n, _ in hf.named_modules() if n.count(".") == 1), "cpu")
    places |= {f"{layers}.{i}": "cpu" for i in range(3)}
    places.pop(layers)
    dispatched = LanguageModel(
        "dispatched",
        dispatch_model(hf, {**places, "lm_head": "cpu"}, main_device="cpu", force_hooks=True),
        None,
    )
    assert any(hasattr(m, "_hf_hook") for m in dispatched.bridge.modules())
    a, b = (attribute(m, pairs, config=AttributionConfig(ig_steps=2)) for m in (model, dispatched))
    assert np.array_equal(a.scores, b.scores)
    edges = model.graph.prune(np.abs(a.scores) > 0.02 * np.abs(a.scores).max())
    assert Ablation(dispatched, pairs)(edges) == Ablation(model, pairs)(edges)


@EACH
def test_every_family_names_its_embedding(family: str):
    model = make(family)
    assert model.weights[model.embedding_name].shape[0] == model.config.vocab_size
