"""Every decoder family, as a tiny random model: exact ends, exact single edges, complete sums."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, make_pairs

from mansu_interp.audit.linearized import moved_names, tangent_kernel
from mansu_interp.audit.probes import last_logits, stitches
from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import CircuitError, ModelError
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.advantage import answer_advantage
from mansu_interp.models import language_model
from mansu_interp.models.graph import Architecture
from mansu_interp.models.hook_points import Recorder
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.layout import turn_back
from mansu_interp.models.stream import Stream
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.pairs import PairSet, answer_tokens, collate
from mansu_interp.viz.view import circuit_view

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
# More, whose single edges are compared with the model of transformers, patched by hand.
HYBRID = {**GATED, "num_key_value_heads": 2}
SIZED = {**HYBRID, "head_dim": 8}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {**COMMON, "initializer_range": 0.2, "bias": True}
EXPERTS = {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = {**HYBRID, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SPECIAL = {f"{k}_token_id": i for i, k in enumerate(("pad", "bos", "eos"))}
LATENT = {
    **GATED,
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 2.0}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "granite": ("Granite", "GraniteForCausalLM", {**HYBRID, **GRANITE, "residual_multiplier": 0.3}),
    "granite moe": ("GraniteMoe", "GraniteMoeForCausalLM", {**EXPERTS, "residual_multiplier": 0.3}),
    "mixtral": ("Mixtral", "MixtralForCausalLM", EXPERTS),
    "bloom": (
        "Bloom",
        "BloomForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 3,
            "n_head": 4,
            "initializer_range": 0.2,
        },
    ),
    "mpt": (
        "Mpt",
        "MptForCausalLM",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4, "initializer_range": 0.2},
    ),
    "falcon one key": ("Falcon", "FalconForCausalLM", {**FALCON, "multi_query": True}),
    "falcon": ("Falcon", "FalconForCausalLM", {**FALCON, "multi_query": False}),
    "falcon serial": (
        "Falcon",
        "FalconForCausalLM",
        {**FALCON, "multi_query": True, "parallel_attn": False},
    ),
    "bigcode one key": ("GPTBigCode", "GPTBigCodeForCausalLM", {**GPT, "initializer_range": 0.2}),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", HYBRID),
    "olmo3": ("Olmo3", "Olmo3ForCausalLM", HYBRID),
    "exaone4": ("Exaone4", "Exaone4ForCausalLM", HYBRID),
    "cohere": ("Cohere", "CohereForCausalLM", HYBRID),
    "cohere2": (
        "Cohere2",
        "Cohere2ForCausalLM",
        {
            **HYBRID,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma": ("Gemma", "GemmaForCausalLM", SIZED),
    "gemma3 that sees": ("Gemma3", "Gemma3ForConditionalGeneration", SIZED),
    "llava": ("Llava", "LlavaForConditionalGeneration", HYBRID),
    "mistral3": ("Mistral3", "Mistral3ForConditionalGeneration", SIZED),
    "idefics3": ("Idefics3", "Idefics3ForConditionalGeneration", {**HYBRID, "pad_token_id": 0}),
    "gptj": ("GPTJ", "GPTJForCausalLM", {**GPT, "rotary_dim": 4, "initializer_range": 0.2}),
    "glm4": ("Glm4", "Glm4ForCausalLM", {**SIZED, "pad_token_id": 0}),
    "phi3": ("Phi3", "Phi3ForCausalLM", {**HYBRID, "pad_token_id": 0}),
    "starcoder2": ("Starcoder2", "Starcoder2ForCausalLM", HYBRID),
    "stablelm": ("StableLm", "StableLmForCausalLM", HYBRID),
    "stablelm parallel": (
        "StableLm",
        "StableLmForCausalLM",
        {**HYBRID, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "gpt-neo": (
        "GPTNeo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            **{"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64},
            **{"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
            "initializer_range": 0.2,
        },
    ),
    "codegen": (
        "CodeGen",
        "CodeGenForCausalLM",
        {**GPT, "rotary_dim": 4, "initializer_range": 0.2},
    ),
    "xglm": (
        "XGLM",
        "XGLMForCausalLM",
        {
            "vocab_size": VOCAB,
            **{"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
            **{"max_position_embeddings": 64, "init_std": 0.2},
        },
    ),
    "llama with biases": (
        "Llama",
        "LlamaForCausalLM",
        {**HYBRID, "attention_bias": True, "mlp_bias": True},
    ),
    "llama4": ("Llama4Text", "Llama4ForCausalLM", {**EXPERTS, "head_dim": 8}),
    "smollm3": ("SmolLM3", "SmolLM3ForCausalLM", {**HYBRID, "pad_token_id": 0}),
    "ministral3": ("Ministral3", "Ministral3ForCausalLM", SIZED),
    "qwen2 windows": (
        "Qwen2",
        "Qwen2ForCausalLM",
        {**HYBRID, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2 moe": (
        "Qwen2Moe",
        "Qwen2MoeForCausalLM",
        {**SPARSE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "qwen3 moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", {**SPARSE, "head_dim": 8}),
    "gpt-oss": (
        "GptOss",
        "GptOssForCausalLM",
        {**SIZED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo": ("Olmo", "OlmoForCausalLM", HYBRID),
    "olmoe": ("Olmoe", "OlmoeForCausalLM", SPARSE),
    "flex olmo": ("FlexOlmo", "FlexOlmoForCausalLM", {**SPARSE, **SPECIAL}),
    "nemotron": ("Nemotron", "NemotronForCausalLM", HYBRID),
    "glm": ("Glm", "GlmForCausalLM", {**SIZED, "pad_token_id": 0}),
    "glm4 moe": (
        "Glm4Moe",
        "Glm4MoeForCausalLM",
        {
            **SIZED,
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"first_k_dense_replace": 1, "pad_token_id": 0},
        },
    ),
    "ernie 4.5": ("Ernie4_5", "Ernie4_5ForCausalLM", SIZED),
    "ernie 4.5 moe": (
        "Ernie4_5_Moe",
        "Ernie4_5_MoeForCausalLM",
        {
            **HYBRID,
            **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
            **{"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        },
    ),
    "minimax m2": (
        "MiniMaxM2",
        "MiniMaxM2ForCausalLM",
        {**SIZED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "arcee": ("Arcee", "ArceeForCausalLM", HYBRID),
    "apertus": ("Apertus", "ApertusForCausalLM", HYBRID),
    "seed oss": ("SeedOss", "SeedOssForCausalLM", SIZED),
    "hunyuan": ("HunYuanDenseV1", "HunYuanDenseV1ForCausalLM", {**SIZED, "pad_token_id": 0}),
    "jais2": ("Jais2", "Jais2ForCausalLM", HYBRID),
    "bitnet": ("BitNet", "BitNetForCausalLM", HYBRID),
    "vaultgemma": ("VaultGemma", "VaultGemmaForCausalLM", SIZED),
    "modernbert decoder": (
        "ModernBertDecoder",
        "ModernBertDecoderForCausalLM",
        {
            **GATED,
            **{f"{k}_token_id": k_id for k_id, k in enumerate(("pad", "bos", "eos", "cls", "sep"))},
        },
    ),
}
EACH = pytest.mark.parametrize("family", FAMILIES)


SEES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Gemma3": (
        "gemma3_text",
        "siglip_vision_model",
        {
            **{"image_token_index": 49, "boi_token_index": 48, "eoi_token_index": 47},
            "mm_tokens_per_image": 4,
        },
    ),
    "Llava": ("llama", "clip_vision_model", {"image_token_index": 49}),
    "Mistral3": ("mistral", "pixtral", {"image_token_index": 49}),
    "Idefics3": ("llama", "idefics3_vision", {"image_token_id": 49}),
}
"""Models that also see: model types of what reads and what sees, and further settings."""


def configure(config_name: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{config_name}Config")
    if config_name not in SEES:
        return config(**settings)
    reads, sees, more = SEES[config_name]
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sight |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return config(
        text_config={**settings, "model_type": reads},
        vision_config={**sight, "model_type": sees},
        **more,
    )


@lru_cache
def make(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    config_name, model_name, settings = {**FAMILIES, **MORE}[family]
    torch.manual_seed(1)
    config = configure(config_name, settings)
    config.architectures = [model_name]
    config._experts_implementation = "eager"  # the others have no float64
    hf = getattr(transformers, model_name)(config).eval().to(dtype)
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


@pytest.mark.slow
@EACH
def test_scores_are_complete(family: str):
    """The input's edges sum to the whole effect, and every score has its sign."""
    model = make(family)
    found = attribute(model, make_pairs((5, 4, 6)), config=AttributionConfig(ig_steps=48))
    effect = found.clean - found.corrupt
    assert found.scores[0].sum() == pytest.approx(effect, abs=0.02 * max(1.0, abs(effect)))


@pytest.mark.slow
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


LLAMA = ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp", None, None)
POST = ("self_attn", "mlp", "self_attn.o_proj", "mlp")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
PLACES: dict[str, tuple[str | None, ...]] = {
    "granitemoe": (*LLAMA[:3], "block_sparse_moe", None, None),
    "bloom": (*LLAMA[:2], "self_attention.dense", "mlp.dense_4h_to_h", None, None),
    "mpt": ("norm_1", "norm_2", "attn.out_proj", "ffn.down_proj", None, None),
    "falcon": (*LLAMA[:2], "self_attention.dense", "mlp", None, None),
    "gpt_bigcode": ("ln_1", "ln_2", "attn.c_proj", "mlp", None, None),
    "gptj": ("ln_1", "ln_1", "attn.out_proj", "mlp", None, None),
    "olmo2": (*POST, *AFTER),
    "olmo3": (*POST, *AFTER),
    "exaone4": (*POST, *AFTER),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm", *POST[2:], *AFTER),
    "glm4": (*LLAMA[:4], "post_self_attn_layernorm", "post_mlp_layernorm"),
    "modernbert-decoder": ("attn_norm", "mlp_norm", "attn.Wo", "mlp", None, None),
    "gpt2": ("ln_1", "ln_2", "attn.c_proj", "mlp", None, None),
    "gpt_neox": (*LLAMA[:2], "attention.dense", "mlp", None, None),
    "phi": ("input_layernorm", "input_layernorm", "self_attn.dense", "mlp", None, None),
    "opt": ("self_attn_layer_norm", "final_layer_norm", "self_attn.out_proj", "fc2", None, None),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", *POST[2:], *AFTER),
    "gpt_neo": ("ln_1", "ln_2", "attn.attention.out_proj", "mlp", None, None),
    "codegen": ("ln_1", "ln_1", "attn.out_proj", "mlp", None, None),
    "apertus": ("attention_layernorm", "feedforward_layernorm", *LLAMA[2:]),
    "vaultgemma": ("input_layernorm", "pre_feedforward_layernorm", *LLAMA[2:]),
    "xglm": ("self_attn_layer_norm", "final_layer_norm", "self_attn.out_proj", "fc2", None, None),
    "llama4_text": (*LLAMA[:3], "feed_forward", None, None),
    "flex_olmo": (*POST, *AFTER),
}
FINAL = (
    "norm",
    "final_norm",
    "ln_f",
    "norm_f",
    "final_layernorm",
    "layer_norm",
    "final_layer_norm",
)


class ByHand:
    """A model of transformers alone, in which single edges are ablated by hooks on its modules."""

    def __init__(self, model: LanguageModel, pair: PairSet) -> None:
        self.model, self.batch = model, next(pair.batches(1))
        hf = model.hf
        decoder = hf.get_decoder() or hf.base_model
        decoder = hf.base_model if hf.config.model_type == "modernbert-decoder" else decoder
        decoder = hf.model if hf.config.model_type == "llama4_text" else decoder
        self.layers = next(m for m in decoder.children() if isinstance(m, torch.nn.ModuleList))
        kind = hf.config.get_text_config().model_type
        self.places = PLACES.get(kind, LLAMA)
        self.heads = model.architecture.n_heads
        self.scale = getattr(hf.config, "residual_multiplier", 1.0)
        self.final = next(getattr(decoder, n) for n in FINAL if hasattr(decoder, n))
        one, other = (self._writes(t) for t in (self.batch.clean, self.batch.corrupt))
        self.change = {name: one[name] - other[name] for name in one}

    def module(self, layer: int, place: int) -> torch.nn.Module | None:
        name = self.places[place]
        return None if name is None else self.layers[layer].get_submodule(name)

    def _writes(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each writer adds to the stream."""
        seen: dict[tuple[int, str], torch.Tensor] = {}
        handles = []

        def keep(key: tuple[int, str], which: str) -> Any:
            def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                value = args[0] if which == "in" and args else next(iter(kwargs.values()), None)
                value = (out[0] if isinstance(out, tuple) else out) if which == "out" else value
                seen[key] = value.detach().clone()  # Falcon adds to it in place

            return hook

        def on(module: Any, key: tuple[int, str], which: str) -> None:
            handles.append(module.register_forward_hook(keep(key, which), with_kwargs=True))

        on(self.layers[0], (0, "input"), "in")
        for i in range(len(self.layers)):
            on(self.module(i, 2), (i, "z"), "in")
            on(self.module(i, 3), (i, "mlp"), "out")
            for at, name in ((4, "after heads"), (5, "after mlp")):
                if module := self.module(i, at):
                    on(module, (i, name), "out")
                    on(module, (i, "before " + name), "in")
        with torch.no_grad():
            self.model.hf(input_ids=tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        writes = {"input": seen[0, "input"]}
        for i in range(len(self.layers)):
            weight = self.module(i, 2).weight.detach()
            share = 1.0
            if (i, "after heads") in seen:
                total = seen[i, "before after heads"]
                share = seen[i, "after heads"] / total.where(total != 0, 1.0)
            size = weight.shape[1] // self.heads
            for h in range(self.heads):
                cut = slice(h * size, (h + 1) * size)
                part = seen[i, "z"][..., cut] @ weight[:, cut].T
                writes[f"a{i}.h{h}"] = part * share * self.scale
            writes[f"m{i}"] = seen.get((i, "after mlp"), seen[i, "mlp"]) * self.scale
        return writes

    def metric(self, writer: str, layer: int, reader: str, share: float) -> float:
        """The metric with a share of a writer's change taken from what a reader reads."""
        place = {"attention": 0, "mlp": 1}.get(reader)
        module = self.final if place is None else self.module(layer, place)
        change = share * self.change[writer]

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] - change, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] - change}

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            logits = self.model.hf(input_ids=self.batch.clean, use_cache=False).logits[0, -1]
        handle.remove()
        return float(logits[self.batch.answer[0]] - logits[self.batch.counterfactual[0]])


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_single_edges_are_those_of_the_patched_model(family: str):
    """In float64: ablating edges, and their scores as slopes, against transformers alone."""
    dtype = torch.float32 if family == "xglm" else torch.float64  # its own mask has no float64
    model, pair = make(family, dtype), make_pairs((6,), seed=3)
    hand, ablation, graph = ByHand(model, pair), Ablation(model, pair), model.graph
    scores = attribute(model, pair, config=AttributionConfig(method="eap", at="clean")).scores
    full, drops, slopes, largest = ablation(graph.exists), [], [], 0.0
    for writer in ("input", "a0.h1", "m0", "a1.h2", "m1"):
        row = graph.writer_index[writer]
        for layer, reader in ((1, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp"), (3, "")):
            at = [
                j for j, v in enumerate(graph.readers) if v.layer == layer and graph.exists[row, j]
            ]
            mlp = [graph.readers[j].kind == "mlp" for j in at]
            if graph.architecture.parallel and family != "gpt-neox":  # one norm for both
                columns = [] if reader == "mlp" else at
            else:
                columns = [
                    j for j, is_mlp in zip(at, mlp, strict=True) if is_mlp == (reader == "mlp")
                ]
            if not columns:
                continue
            edges = graph.exists.copy()
            edges[row, columns] = False
            ablated = hand.metric(writer, layer, reader, 1.0)
            drops.append(ablation(edges) - ablated)
            up, down = (hand.metric(writer, layer, reader, s) for s in (1e-3, -1e-3))
            slopes.append(scores[row, columns].sum() - (down - up) / 2e-3)
            largest = max(largest, abs(ablated - full))
    assert len(drops) >= 5 and largest > 0.01
    assert np.abs(drops).max() < 1e-4 * max(1, largest)
    assert np.abs(slopes).max() < 5e-3 * max(1, np.abs(scores).max())


MOVED = {"layer_types": ["conv", "full_attention", "conv"]}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bloom of normed streams": (
        *MORE["bloom"][:2],
        {**MORE["bloom"][2], "apply_residual_connection_post_layernorm": True},
        "after the attention of layer 0, the stream differs by",
    ),
    "falcon alibi": (
        "Falcon",
        "FalconForCausalLM",
        {**FALCON, "parallel_attn": False, "alibi": True},
        "copy of it differs in its logits by",
    ),
    "falcon 40b": (
        "Falcon",
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "TransformerLens cannot bridge",
    ),
    "falcon h1": (
        "FalconH1",
        "FalconH1ForCausalLM",
        {**HYBRID, "mamba_d_ssm": 32, **SSM},
        "Something else adds to it",
    ),
    "bert": ("Bert", "BertLMHeadModel", {**GATED, "is_decoder": True}, "Something else adds to it"),
    "gemma4": ("Gemma4Text", "Gemma4ForCausalLM", SIZED, "Something else adds to it or scales it"),
    "opt projected": (
        "OPT",
        "OPTForCausalLM",
        {**FAMILIES["opt"][2], "word_embed_proj_dim": 16},
        "no hook point ln_final",
    ),
    "gpt1": ("OpenAIGPT", "OpenAIGPTLMHeadModel", GPT, "no hook point ln_final"),
    "lfm2": ("Lfm2", "Lfm2ForCausalLM", {**HYBRID, **MOVED}, "BlockBridge 0 lacks q, k, v, o"),
    "jamba": ("Jamba", "JambaForCausalLM", {**EXPERTS, "attn_layer_offset": 1}, "lacks q, k, v, o"),
    "mamba": (
        "Mamba",
        "MambaForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
        "no number of attention heads",
    ),
    "rwkv": (
        "Rwkv",
        "RwkvForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
        "no number of attention heads",
    ),
    "bigcode": (
        "GPTBigCode",
        "GPTBigCodeForCausalLM",
        {**GPT, "multi_query": False},
        "TransformerLens cannot bridge",
    ),
    "nanochat": ("NanoChat", "NanoChatForCausalLM", HYBRID, "one module is used in two places"),
    "afmoe": (
        "Afmoe",
        "AfmoeForCausalLM",
        {**SPARSE, "head_dim": 8, "num_dense_layers": 1},
        "heads read something beside q, k and v: the first differ by",
    ),
    "deepseek v2": (
        "DeepseekV2",
        "DeepseekV2ForCausalLM",
        {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        "keys and values of all heads come from one latent",
    ),
    "deepseek v3": (
        "DeepseekV3",
        "DeepseekV3ForCausalLM",
        {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        "keys and values of all heads come from one latent",
    ),
    "youtu": ("Youtu", "YoutuForCausalLM", LATENT, "come from one latent"),
    "glm4 moe lite": (
        "Glm4MoeLite",
        "Glm4MoeLiteForCausalLM",
        {
            **LATENT,
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"n_group": 1, "topk_group": 1, "pad_token_id": 0},
        },
        "come from one latent",
    ),
    "qwen3 next": (
        "Qwen3Next",
        "Qwen3NextForCausalLM",
        {
            **{**SPARSE, "head_dim": 8, "shared_expert_intermediate_size": 16},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
        "lacks q, k, v, o",
    ),
    "granite moe hybrid": (
        "GraniteMoeHybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **{**EXPERTS, "shared_intermediate_size": 16, "mamba_n_heads": 8},
            "layer_types": ["attention"] * 3,
        },
        "lacks an MLP",
    ),
    "bamba": (
        "Bamba",
        "BambaForCausalLM",
        {**HYBRID, **SSM, "mamba_d_head": 16, "attn_layer_indices": [1]},
        "lacks q",
    ),
    "zamba2": (
        "Zamba2",
        "Zamba2ForCausalLM",
        {
            **{**HYBRID, "mamba_d_state": 8, "n_mamba_heads": 8},
            "layer_types": ["mamba", "hybrid", "mamba"],
        },
        "lacks an MLP, q, k, v, o",
    ),
    "nemotron h": ("NemotronH", "NemotronHForCausalLM", SIZED, "lacks an MLP, q, k, v, o"),
    "recurrent gemma": ("RecurrentGemma", "RecurrentGemmaForCausalLM", SIZED, "lacks an MLP, q"),
    "olmo hybrid": (
        "OlmoHybrid",
        "OlmoHybridForCausalLM",
        {**HYBRID, **SPECIAL},
        "lacks q, k, v, o",
    ),
    "qwen3.5": (
        "Qwen3_5Text",
        "Qwen3_5ForCausalLM",
        {
            **{**SIZED, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
        "lacks q, k, v, o",
    ),
    "helium": ("Helium", "HeliumForCausalLM", SIZED, "cannot bridge Helium"),
    "persimmon": ("Persimmon", "PersimmonForCausalLM", GATED, "cannot bridge Persimmon"),
    "diffllama": ("DiffLlama", "DiffLlamaForCausalLM", HYBRID, "cannot bridge DiffLlama"),
    "granite moe shared": (
        "GraniteMoeShared",
        "GraniteMoeSharedForCausalLM",
        {**EXPERTS, "shared_intermediate_size": 16},
        "cannot bridge GraniteMoeShared",
    ),
    "hunyuan moe": (
        "HunYuanMoEV1",
        "HunYuanMoEV1ForCausalLM",
        {**SIZED, "num_experts": 4, "moe_topk": 2, "pad_token_id": 0},
        "cannot bridge HunYuanMoE",
    ),
    "jetmoe": ("JetMoe", "JetMoeForCausalLM", {**EXPERTS, "kv_channels": 8}, "lacks q, k, v, o"),
    "phimoe": ("Phimoe", "PhimoeForCausalLM", EXPERTS, "TransformerLens cannot bridge Phimoe"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_exact_is_refused(family: str):
    MORE[family] = REFUSED[family][:3]
    with pytest.raises((CircuitError, ModelError), match=REFUSED[family][3]):
        attribute(make(family), make_pairs((4,)))
    with pytest.raises((CircuitError, ModelError), match=REFUSED[family][3]):
        Ablation(make(family), make_pairs((4,)))
    del MORE[family]


def test_an_unknown_factor_or_writer_is_found(monkeypatch: pytest.MonkeyPatch):
    """What a new architecture might do: it is told where the stream differs, at every entrance."""
    model, pairs = make("granite"), make_pairs((4, 5))
    monkeypatch.setattr(Stream, "scale", 0.301)
    with pytest.raises(CircuitError, match="after the attention of layer 0, the stream differs"):
        attribute(model, pairs)
    with pytest.raises(CircuitError, match="after the attention of layer 0, the stream differs"):
        Ablation(model, pairs)
    with pytest.raises(CircuitError, match="after the attention of layer 0, the stream differs"):
        discover(model, pairs)


def test_one_key_is_not_cut_into_heads(monkeypatch: pytest.MonkeyPatch):
    model = make("falcon one key").copy()
    assert make("falcon one key").architecture.n_kv_heads == 1
    as_many = Architecture(3, 4, 4, parallel=True)
    monkeypatch.setattr(language_model, "architecture_of", lambda *_: as_many)
    with pytest.raises(CircuitError, match="k projection of layer 0 has 8 rows; 4 heads of 8 need"):
        attribute(model, make_pairs((4,)))


@pytest.mark.parametrize(
    "family", ["bert", "llama4", "cohere2", "gemma3 that sees", "modernbert decoder", "mamba"]
)
def test_logits_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch):
    """Heads that transform first, windows shorter than a shared prefix, no cache of keys."""
    monkeypatch.setattr(language_model, "MIN_SHARED", 0)
    more = {k: v[:3] for k, v in REFUSED.items()}
    monkeypatch.setitem(MORE, family, {**more, **MORE}[family])
    model = make(family)
    tokens = torch.tensor([[3, 5, 7, 9, 11, 13, 15, k] for k in (1, 2, 4)])
    want = model.hf(input_ids=tokens, use_cache=False).logits[:, -1]
    for ways in (model, replace(model, in_trees=True)):
        found = ways.last_logits(tokens, torch.full((3,), 7))
        assert torch.allclose(found, want, atol=1e-4 * float(want.abs().max()))


def test_experts_are_told_where_scores_are_shown():
    pairs = make_pairs((5, 4, 6, 3), seed=1)
    config = CircuitConfig(pairs=4, ig_steps=1, faithfulness_pairs=4, top=40)
    for family, routed in (("mixtral", True), ("llama gqa", False)):
        model = make(family)
        for p in (pairs, swapped(pairs)):
            try:
                found = discover(model, p, config=config)
            except CircuitError:
                continue  # the other way round, the random model "knows" the answers
            shown = " ".join(circuit_view(found).data.facts)
            assert ("scores need not add up" in shown) == routed


def swapped(pairs: PairSet) -> PairSet:
    """Clean and corrupt exchanged."""
    return PairSet(pairs.name, tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in pairs))


@pytest.mark.parametrize("family", ["llama gqa", "gpt2"])
def test_models_loaded_elsewhere_score_the_same_and_stay(family: str):
    """A model of transformers, and a TransformerBridge."""
    model, pairs = make(family), make_pairs((5, 4))
    want = attribute(model, pairs).scores
    model_name = FAMILIES[family][1]
    hf = getattr(transformers, model_name)(model.config).eval()
    state = model.copy()
    turn_back(state.hf)
    hf.load_state_dict(state.hf.state_dict())
    kinds = [type(m) for m in hf.modules()]
    assert np.abs(attribute(hf, pairs).scores - want).max() < 1e-5
    assert kinds == [type(m) for m in hf.modules()]
    assert all(p.requires_grad for p in hf.parameters())
    assert np.abs(attribute(model.copy().bridge, pairs).scores - want).max() < 1e-5
    assert Ablation(hf, pairs)(model.graph.exists) == pytest.approx(
        Ablation(model, pairs)(model.graph.exists), abs=1e-5
    )


class PeftModel(torch.nn.Module):
    """What peft wraps a model in."""

    peft_config = ()


def test_adapters_are_refused():
    hf = copy.deepcopy(make("llama gqa").hf)
    with pytest.raises(ModelError, match=r"got a PeftModel, .*merge_and_unload"):
        LanguageModel("mine", cast(Any, PeftModel()), None)
    with pytest.raises(ModelError, match=r"got a PeftModel, .*merge_and_unload"):
        attribute(PeftModel(), make_pairs((4,)))
    hf.model.layers[0].mlp.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"holds an adapter \(model.*lora_A"):
        LanguageModel("mine", hf, None)


@pytest.mark.parametrize("which", ["bf16", "packed"])
def test_edits_need_float32(which: str):
    model = make("llama gqa")
    low = (
        packed(model)
        if which == "packed"
        else LanguageModel("bf16", copy.deepcopy(model.hf).to(torch.bfloat16), None)
    )
    match = "is packed to 4 bits by" if which == "packed" else "is bfloat16, expected"
    with pytest.raises(ModelError, match=match):
        quantize(low)
    with pytest.raises(ModelError, match=match):
        survival(low, low)


@pytest.mark.parametrize("family", ["llama gqa", "gpt2"])
def test_bf16_is_close_to_fp32(family: str):
    model = make(family)
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


def test_a_large_write_that_is_taken_back_is_no_unknown_writer():
    """In bfloat16 the stream keeps what the large write rounded away: 0.06 of its later size in
    SmolLM2's layer 11."""
    hf = copy.deepcopy(make("gpt2", torch.bfloat16).hf)
    large = 40 * torch.randn(hf.config.n_embd, generator=torch.Generator().manual_seed(0))
    hf.transformer.h[0].mlp.c_proj.bias.data += large
    hf.transformer.h[1].attn.c_proj.bias.data -= large
    low = LanguageModel("bf16", hf, None)
    attribute(low, make_pairs((4,)), config=AttributionConfig(ig_steps=2))


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


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gpt-neox", "opt", "llama gqa", "phi"])
def test_the_tangent_kernel_is_that_of_single_gradients(family: str):
    """Block by block, whatever a block is called with and returns; and stitching a model to itself
    gives itself."""
    model, pairs = make(family), make_pairs()
    among = answer_tokens(pairs)
    weights = [model.weights[n].requires_grad_(True) for n in moved_names(model)]
    single = []
    for pair in pairs:
        level = answer_advantage(last_logits(model, collate([pair])), [pair], among)
        single.append(torch.cat([g.flatten() for g in torch.autograd.grad(level.sum(), weights)]))
    for w in weights:
        w.requires_grad_(False)
    rows = torch.stack(single)
    kernel, _ = tangent_kernel(model, list(pairs), among)
    assert torch.allclose(kernel, rows @ rows.T, rtol=1e-3, atol=1e-4 * float(kernel.max()))
    assert stitches(model, model, pairs) == [accuracy(model, pairs).choice] * 4
