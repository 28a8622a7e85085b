"""Every decoder family through the whole path: load, discover, mask, unlearn, save, quantize."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_families import EACH, FAMILIES, make
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mansu_interp.circuits.compare import compare
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.discover import discover
from mansu_interp.errors import ModelError
from mansu_interp.export.ledger import Ledger
from mansu_interp.export.verify import verify
from mansu_interp.masks.components import component_slices
from mansu_interp.masks.select import circuit_mask
from mansu_interp.models.graph import Node
from mansu_interp.models.language_model import LanguageModel, unpack_4bit
from mansu_interp.models.layout import check_layout
from mansu_interp.models.load import load_model
from mansu_interp.models.stream import Stream
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.load import load_task
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn


@EACH
def test_slices_are_what_transformer_lens_reads(family: str):
    model = make(family)
    stream, arch = Stream(model), model.architecture
    for layer in (0, 2):
        for reading in stream.readings(layer):
            for head in range(arch.n_heads if reading.kind == "q" else arch.n_kv_heads):
                [(name, axis, where)] = component_slices(
                    model, Node(reading.kind, layer, head), False
                )
                assert axis == "rows"
                assert torch.equal(model.weights[name][where], reading.weight[head]), reading.kind
        for head in range(arch.n_heads):
            [(name, axis, where)] = component_slices(model, Node("head", layer, head), True)
            assert axis == "cols"
            assert torch.equal(model.weights[name][:, where], stream.output_weight(layer)[:, head])


@lru_cache
def facts() -> LanguageModel:
    return load_model("facts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder(family, tied, dtype)``: a random two-layer model with the tokenizer of `facts`."""

    def build(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        config_name, model_name, settings = FAMILIES[family]
        path = tmp_path_factory.mktemp(family.replace(" ", "-"))
        torch.manual_seed(2)
        layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
        words = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        changed = {"vocab_size": len(facts().tokenizer), layers: 2, **words}
        config = getattr(transformers, f"{config_name}Config")(
            **{**settings, **changed, "tie_word_embeddings": tied}
        )
        hf = getattr(transformers, model_name)(config).to(dtype)
        hf.save_pretrained(path, max_shard_size="40KB")
        facts().tokenizer.save_pretrained(path)
        return path

    return build


CIRCUIT = CircuitConfig(pairs=4, ig_steps=1, faithfulness_pairs=2)


@pytest.mark.parametrize(
    ("family", "tied"),
    [*((f, False) for f in FAMILIES if f != "llama mqa"), ("gpt2", True), ("gemma3", True)],
)
def test_the_whole_path(family: str, tied: bool, folder: Any, tmp_path: Path):
    dtype = torch.bfloat16 if tied else torch.float32
    place = folder(family, tied, dtype)
    assert len(list(place.glob("*.safetensors"))) > 1
    model = load_model(place)
    model.tokenizer = facts().tokenizer  # qwen2 would not read it with its own rules
    assert model.saved_dtype == dtype
    task = load_task("capitals", model, 4)
    circuit = discover(model, task.forget, config=CIRCUIT)
    mask = circuit_mask(
        circuit, model, budget=0.01, retain=task.retain_sets, forget=task.forget, n_pairs=4
    )
    result = unlearn(model, task, mask, Mansu(steps=2, batch_size=4, lr=0.3))
    result.model.save(tmp_path / "model")
    edited = load_model(tmp_path / "model")
    row = survival(model, edited, NF4())
    assert row.edited == row.survived > 0 and not row.collateral
    assert not verify(model, edited, ledger=Ledger.of(model, edited, ["nf4"], mask)).status
    # What transformers itself loads is what was measured, in the layout that it was given in.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.tensor([task.forget[0].clean])
    assert torch.allclose(theirs(ids).logits, edited.all_logits(ids), atol=1e-4)
    stored = {n: w.shape for n, w in theirs.named_parameters()}
    original = AutoModelForCausalLM.from_pretrained(place)
    assert stored == {n: w.shape for n, w in original.named_parameters()}
    found = compare(
        circuit, model, {"nf4": quantize(edited)}, task.forget.sample(3, 0), config=CIRCUIT
    )
    assert found.models["nf4"].mass >= 0


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "opt", "phi", "gemma3"])
def test_nf4_is_what_bitsandbytes_stores(family: str, folder: Any):
    """Block for block: transformers' own 4-bit loading and ours restore the same weights."""
    place = folder(family)
    ours = quantize(load_model(place), "nf4")
    packed = AutoModelForCausalLM.from_pretrained(
        place,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    )
    layers = {
        f"{n}.weight": m
        for n, m in packed.named_modules()
        if getattr(getattr(m, "weight", None), "quant_state", None) is not None
    }
    assert set(layers) == set(ours.linear_names)
    for name, layer in layers.items():
        assert torch.equal(unpack_4bit(layer).weight, ours.weights[name]), name


def test_a_fused_weight_of_unknown_order_is_named():
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = LanguageModel("falcon", transformers.FalconForCausalLM(config).eval(), None)
    with pytest.raises(ModelError, match=r"query_key_value\.weight holds q, k and v .* 'falcon'"):
        check_layout(model.hf, model.linear_names, 4, 4)


def test_an_mlp_of_unknown_names_is_named():
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = LanguageModel("mixtral", transformers.MixtralForCausalLM(config).eval(), None)
    with pytest.raises(ModelError, match="No weight of layer 0 is known as its MLP; the layer has"):
        check_layout(model.hf, model.linear_names, 4, 2)
