"""GGUF files of every family, and their tokenizers, in llama.cpp itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mansu_interp.errors import ModelError
from mansu_interp.evaluation.engine import EngineModel
from mansu_interp.export.gguf import export_gguf, exportable
from mansu_interp.export.gguf_settings import FAMILIES
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.gguf import gguf_names
from mansu_interp.quantizers.survival import quantize

pytest.importorskip("xllamacpp", reason="llama.cpp itself: needs the wheel xllamacpp")

TEXT = [
    "the capital of France is Paris",
    "the capital of Peru is Lima, founded in 1535",
    "She said: it's the river's end, isn't it?",
    "Ünïcödé ist nicht ASCII; naïve café, 12,345.67 €",
] * 3
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SPACE = "\u2581"


def byte_level(*before: Any) -> Tokenizer:
    """A byte-level BPE of 320 tokens."""
    raw = Tokenizer(models.BPE())
    whole = not before or isinstance(before[0], pre_tokenizers.Digits)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    return raw


def pieces(*rules: Any, before: Any = None) -> Tokenizer:
    """As transformers writes a tokenizer of SentencePiece: bytes for what has no token, and a merge
    for every pair that is one."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.train_from_iterator(
        [*TEXT, "a  b   c"], trainers.BpeTrainer(vocab_size=170, show_progress=False)
    )
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "\n\n", *learned]
    known, merges = set(learned), []
    for token in learned:
        pairs = [(token[:k], token[k:]) for k in range(1, len(token))]
        merges += [pair for pair in pairs if known.issuperset(pair)]
    raw = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence([*rules]) if len(rules) > 1 else rules[0]
    raw.pre_tokenizer = before
    raw.add_special_tokens(special)
    raw.add_tokens([AddedToken("\n\n", normalized=False)])
    return raw


TO_SPACE = normalizers.Replace(" ", SPACE)
TOKENIZERS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "bloom": lambda: byte_level(pre_tokenizers.Split(Regex(BLOOM), "isolated")),
    "gemma": lambda: pieces(TO_SPACE, before=pre_tokenizers.Split(" ", "merged_with_previous")),
    "llama 2": lambda: pieces(normalizers.Prepend(SPACE), TO_SPACE),
}


@lru_cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[kind](), bos_token="<s>", eos_token="<s>"
    )


SIZED = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
GATED = {**SIZED, "intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}
HEADS = {**GATED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05}
GPT = {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", {**GATED, "attention_bias": True}),
    "llama 3": ("Llama", "LlamaForCausalLM", {**GATED, "rope_parameters": LLAMA_3}),
    "mistral": ("Mistral", "MistralForCausalLM", {**GATED, "head_dim": 32}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", GATED),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**GATED, "tie_word_embeddings": True}),
    "gemma": ("Gemma", "GemmaForCausalLM", {**GATED, "head_dim": 32}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", HEADS),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        {**HEADS, "num_hidden_layers": 7, "hidden_size": 256, "intermediate_size": 256},
    ),
    "gemma3 other windows": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        {
            **HEADS,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": LINEAR,
            "tie_word_embeddings": False,
        },
    ),
    "phi": ("Phi", "PhiForCausalLM", {**SIZED, "intermediate_size": 96}),
    "phi3": (
        "Phi3",
        "Phi3ForCausalLM",
        {**GATED, **WIDE},
    ),
    "phi3 tied": ("Phi3", "Phi3ForCausalLM", {**GATED, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2",
        "GPT2LMHeadModel",
        {**GPT, "n_positions": 96, "n_embd": 256},
    ),
    "gpt2 untied": (
        "GPT2",
        "GPT2LMHeadModel",
        {**GPT, "n_positions": 96, "n_inner": 96, "tie_word_embeddings": False},
    ),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", {**SIZED, "intermediate_size": 96}),
    "gpt_neox serial": (
        "GPTNeoX",
        "GPTNeoXForCausalLM",
        {**SIZED, "intermediate_size": 96, "use_parallel_residual": False, "rotary_pct": 0.5},
    ),
    "bloom": ("Bloom", "BloomForCausalLM", {**SIZED, "n_layer": 3, "n_head": 4}),
    "bloom six heads": ("Bloom", "BloomForCausalLM", {**SIZED, "hidden_size": 192, "n_head": 6}),
}


def make(case: str, tokens: str = "gpt-2", **more: Any) -> LanguageModel:
    config_name, model_name, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_name}Config")(**{**settings, **more})
    hf = getattr(transformers, model_name)(config).eval()
    for name, weight in hf.named_parameters():
        if "norm" in name or "ln_" in name or "bias" in name:  # nothing may cancel
            weight.data += 0.3 * torch.randn_like(weight)
    return LanguageModel(case, hf, tokenizer(tokens))


def read(model: LanguageModel, path: Path, kind: str) -> LanguageModel:
    """The model that a file stands for: layers de-quantized, embeddings as they are stored."""
    expected, names = model.copy() if kind == "f16" else quantize(model, kind), gguf_names(model)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, weight in expected.weights.items():
        if kind == "f16" and weight.ndim == 2:
            weight.copy_(weight.half().float())
        elif names[name] in ("token_embd.weight", "output.weight"):
            tensor = stored[names[name]]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            weight.copy_(torch.from_numpy(values.copy()))
    return expected


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_every_family(case: str, kind: str, tmp_path: Path):
    """Up to its rounding of activations, at lengths within and beyond a window; and a quantized
    file is far nearer to its own format than to full precision."""
    model = make(case)
    export_gguf(model, path := tmp_path / "m.gguf", kind)
    expected, engine = read(model, path, kind), EngineModel.open(path, model)
    torch.manual_seed(1)
    for length in (1, 7, 16, 40, 90):
        tokens = torch.randint(10, 512, (2, length))
        found, wanted = engine.all_logits(tokens), expected.all_logits(tokens)
        apart = (found - wanted).norm()
        assert apart < (0.004 if kind == "f16" else 0.07) * wanted.norm(), length
        if kind != "f16":
            assert apart < 0.35 * (found - model.all_logits(tokens)).norm(), length


def test_llama_3_s_scaling_is_in_the_file(tmp_path: Path):
    """One factor for each frequency; without them a file would answer as another model does."""
    model, plain = make("llama 3"), make("llama", attention_bias=False)
    export_gguf(model, path := tmp_path / "m.gguf", "f16")
    (found,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    assert found.tensor_type.name == "F32" and found.data.shape == (8,)
    assert found.data[0] == 1 and 1 < found.data[1] < 8 and found.data[-1] == 8
    assert all(torch.equal(w, plain.weights[n]) for n, w in model.weights.items())
    tokens = torch.randint(10, 512, (2, 90))
    wanted = model.all_logits(tokens)
    assert (plain.all_logits(tokens) - wanted).norm() > 0.1 * wanted.norm()


def test_every_family_is_here():
    assert {make(case).config.model_type for case in CASES} == set(FAMILIES)


def texts(n: int) -> Iterator[str]:
    """Words, numbers, spaces, line ends and characters of many scripts, in many orders."""
    draw, words = random.Random(0), " ".join(TEXT).split(" ")
    for _ in range(n):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            odd = chr(draw.choice([draw.randrange(33, 127), 0xE9, 0x3B1, 0x4E2D, 0x1F600, 0x2581]))
            space = draw.choice([" ", " ", " ", "  ", "\n", "\n\n\n", "\t", ""])
            parts += [draw.choice([*words, "<s>", odd, str(draw.randrange(10**6))]), space]
        yield "".join(parts)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_splits_texts_alike(kind: str, tmp_path: Path):
    model = make("gemma3", kind)
    export_gguf(model, path := tmp_path / "m.gguf", "f16")
    engine = EngineModel.open(path, model)
    given = list(dict.fromkeys(texts(1000)))
    assert len(given) > 950
    odd = [text for text in given if engine.tokenize(text) != model.encode(text)]
    assert not odd, (odd[0], engine.tokenize(odd[0]), model.encode(odd[0]))
    kinds = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()
    expected = 256 if kind in ("gemma", "llama 2") else 0  # or llama.cpp writes them as text
    assert kinds.count(gguf.TokenType.BYTE) == expected
    model.save(tmp_path / "saved")
    assert exportable(tmp_path / "saved")


def test_special_tokens_that_swallow_spaces(tmp_path: Path):
    """As Phi-3 has them, which llama.cpp knows by the model's name."""
    tokens = Tokenizer.from_str(TOKENIZERS["llama 2"]().to_str())
    tokens.add_special_tokens(["<|endoftext|>"])
    keep = ("<unk>", "<s>", "<|endoftext|>")
    every = [t.content for t in tokens.get_added_tokens_decoder().values()]
    model = make("phi3", "llama 2")

    def take(swallow: list[str]) -> None:
        again = [AddedToken(t, rstrip=t in swallow, special=True, normalized=False) for t in every]
        changed = Tokenizer.from_str(tokens.to_str())
        changed.add_special_tokens(again)
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=changed, bos_token="<s>")

    text = "<s> the</s> capital</s>  of\n\n France"
    for swallow in ([], [t for t in every if t not in keep]):
        take(swallow)
        for name in ("my phi-3", "mine"):
            model.name = name
            export_gguf(model, path := tmp_path / f"{len(swallow)} {name}.gguf", "f16")
            assert EngineModel.open(path, model).tokenize(text) == model.encode(text)
    take(["<pad>"])
    with pytest.raises(ModelError, match="the space beside '<pad>' belongs to that token"):
        export_gguf(model, tmp_path / "none.gguf", "f16")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("gpt2", {"activation_function": "relu"}, "activation_function is relu, and"),
    "untied": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "scale": ("gemma3", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7, .* with 32"),
    "capped": ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
    "not capped": ("gemma2", {"attn_logit_softcapping": None}, "without soft caps"),
    "windows": (
        "gemma3",
        {"layer_types": [*["full_attention"] * 3, *["sliding_attention"] * 4]},
        r"has no window in layers \[0, 1, 2\]",
    ),
    "scaled": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"rotary embedding is scaled \(dynamic\)",
    ),
    "scaled as Llama 3": (
        "qwen2",
        {"rope_parameters": LLAMA_3},
        r"scaled \(llama3\), which llama.cpp computes of llama and mistral alone, not of qwen2",
    ),
    "norms": ("phi", {"qk_layernorm": True}, r"normalises queries and keys \(qk_layernorm\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(what: str, tmp_path: Path):
    case, more, said = REFUSED[what]
    with pytest.raises(ModelError, match=said):
        export_gguf(make(case, **more), tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_does_not_know_ends_the_context(tmp_path: Path):
    model = make("mistral", sliding_window=24)
    export_gguf(model, path := tmp_path / "m.gguf", "f16")
    assert gguf.GGUFReader(path).fields["llama.context_length"].contents() == 24


def test_merges_that_sentencepiece_would_not_make_are_refused(tmp_path: Path):
    """llama.cpp has ranks of tokens alone: it would merge what this tokenizer leaves apart."""
    model = make("gemma3", "gemma")
    assert isinstance(model.tokenizer, PreTrainedTokenizerFast)
    whole = json.loads(model.tokenizer.backend_tokenizer.to_str())
    merges = whole["model"]["merges"]
    made = ["".join(m) for m in merges]
    token = next(t for t in made if made.count(t) > 1 and t != made[-1])
    several = [m for m in merges if "".join(m) == token]
    late = [m for m in merges if m != several[0]] + [several[0]]
    for changed in ([m for m in merges if m != several[0]], late):
        whole["model"]["merges"] = changed
        raw = Tokenizer.from_str(json.dumps(whole))
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
        with pytest.raises(ModelError, match="when SentencePiece and llama"):
            export_gguf(model, tmp_path / "m.gguf", "f16")


def test_more_tokens_than_rows_are_refused(tmp_path: Path):
    """Added ones, and those of the tokenizer itself."""
    model = make("llama", vocab_size=320)
    own = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    own.add_tokens(["Paris-Texas", "Lima-Ohio"])
    size, model.tokenizer = len(own), own
    said = rf"2 tokens beyond the 320 rows .* 'Paris-Texas': .*resize_token_embeddings\({size}\)"
    with pytest.raises(ModelError, match=said):
        export_gguf(model, tmp_path / "m.gguf", "f16")
    model = make("llama", vocab_size=300)
    with pytest.raises(ModelError, match="20 tokens beyond the 300 rows of the embedding"):
        export_gguf(model, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())
    model = make("llama", vocab_size=320)
    export_gguf(model, tmp_path / "m.gguf", "f16")  # as many as rows


def test_a_bpe_without_merges_is_refused(tmp_path: Path):
    model = make("llama")
    assert isinstance(model.tokenizer, PreTrainedTokenizerFast)
    whole = json.loads(model.tokenizer.backend_tokenizer.to_str())
    whole["model"]["merges"] = []
    raw = Tokenizer.from_str(json.dumps(whole))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    with pytest.raises(ModelError, match="a byte-level BPE without merges, which llama"):
        export_gguf(model, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())
