"""Loading, copying and saving models, and every kind of bad input."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.errors import MansuError, ModelError
from mansu_interp.losses.gradients import gradient
from mansu_interp.models import language_model
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import EMBEDDED, embedded_models, load_model
from mansu_interp.utils import hub


def test_unknown_model_names_what_ships():
    with pytest.raises(ModelError) as caught:
        load_model("fact")
    message = str(caught.value)
    assert message.startswith(f"Unknown model 'fact'. Shipped: {', '.join(embedded_models())}.")
    assert "path to a Hugging Face folder, or a hub name such as" in message
    assert isinstance(caught.value, MansuError) and "facts" in embedded_models()


@pytest.mark.parametrize("name", ["../facts", "/no/such/folder", "a/b/c", "facts/", ""])
def test_names_that_are_no_path_and_no_hub_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("touched the network"))
    if name:
        with pytest.raises(ModelError, match="Unknown model"):
            load_model(name)
    else:
        with pytest.raises(ModelError, match=r"holds no config\.json"):
            load_model(name)  # the current folder


def offline_error(name: str) -> str:
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert time.monotonic() - start < 5
    return str(caught.value)


def test_remote_name_without_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    message = offline_error("nobody/no-such-model")
    assert "\n" not in message
    assert message.startswith("Model 'nobody/no-such-model' is not on this machine, and the hub ")
    assert message.endswith("Give a local one, or try again with a network.")


def test_remote_name_and_a_closed_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "cannot be reached" in offline_error("nobody/no-such-model")


def test_a_network_that_never_answers(monkeypatch: pytest.MonkeyPatch):
    """Name lookup may hang for longer than any socket timeout."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def hang(*args: object, **kwargs: object) -> None:
        time.sleep(8)
        raise OSError("at last")

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "cannot be reached" in offline_error("nobody/no-such-model")


def test_offline_mode_is_not_probed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("touched the network"))
    assert "cannot be reached" in offline_error("nobody/no-such-model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped model's folder, to be spoilt."""
    return Path(shutil.copytree(EMBEDDED / "facts", tmp_path / "model"))


def test_a_checkpoint_packed_to_4_bits(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is already quantized \(bitsandbytes\)\. Unlearning n"):
        load_model(folder)


def test_a_folder_without_safetensors(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file\. Only safetensors are re"):
        load_model(folder)


def test_a_folder_without_config(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json\. Give a Hugging Face model fo"):
        load_model(folder)


def test_copies_are_independent(facts: LanguageModel):
    name = facts.linear_names[0]
    copy = facts.copy()
    copy.weights[name].zero_()
    assert facts.weights[name].abs().sum() > 0
    assert (copy.sha256, copy.saved_dtype) == (facts.sha256, facts.saved_dtype)


def test_shape_of_the_shipped_model(facts: LanguageModel):
    a = facts.architecture
    assert a.n_kv_heads < a.n_heads  # grouped queries
    assert 1e6 <= facts.n_parameters <= 4e6
    assert facts.saved_dtype == torch.bfloat16
    assert facts.weights["lm_head.weight"].dtype == torch.float32
    assert len(facts.linear_names) == 7 * a.n_layers
    assert not any("embed" in n or "lm_head" in n for n in facts.linear_names)


def test_save_gives_back_the_same_bits(facts: LanguageModel, tmp_path: Path):
    facts.save(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.weights.keys() == facts.weights.keys()
    assert all(torch.equal(w, again.weights[n]) for n, w in facts.weights.items())
    assert again.encode("the capital of") == facts.encode("the capital of")
    assert again.saved_dtype == facts.saved_dtype


def test_the_bridge_shares_weights_and_logits(tiny_model):
    model = tiny_model(2).copy()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.allclose(model.bridge(tokens), model.all_logits(tokens), atol=1e-4)
        model.weights["model.layers.0.mlp.down_proj.weight"] *= 3  # in place
        before = model.all_logits(tokens)
        assert torch.allclose(model.bridge(tokens), before, atol=1e-4)
    assert not torch.allclose(before, tiny_model(2).all_logits(tokens), atol=1e-2)


def test_last_logits_are_those_of_the_row(tiny_model):
    model = tiny_model(2)
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    last = torch.tensor([2, 3])
    with torch.no_grad():
        expected = model.all_logits(tokens)[torch.arange(2), last]
        assert torch.allclose(model.last_logits(tokens, last), expected, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_shared_prefix_changes_neither_logits_nor_gradients(
    tiny_model, kv_heads: int, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(kv_heads).copy()
    rows = [[7, 3, 9, 4, 1, 0], [7, 3, 9, 5, 2, 6], [7, 3, 9, 5, 8, 1], [7, 3, 9, 4, 0, 0]]
    tokens, last = torch.tensor(rows), torch.tensor([4, 5, 5, 3])
    names = model.linear_names
    calls: list[tuple[int, ...]] = []
    model.hf.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )

    def both(least: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        monkeypatch.setattr(language_model, "MIN_SHARED", least)
        logits = []

        def loss() -> torch.Tensor:
            logits.append(model.last_logits(tokens, last))
            return logits[0].log_softmax(-1)[:, 5].sum()

        return logits, gradient(model, names, [loss])

    (apart,), g_apart = both(10**9)
    (shared,), g_shared = both(0)
    assert calls[-3:] == [(4, 6), (1, 3), (4, 3)]  # before: a try on three tokens
    assert torch.allclose(apart, shared, atol=1e-5)
    for a, b in zip(g_apart, g_shared, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


def test_the_model_knows_its_facts(facts: LanguageModel):
    assert facts.generate("<bos>the capital of France is", 1).strip() == "Paris"


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_has_one_name(tied: bool):
    """A tied one is listed once, and is the unembedding, too."""
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LanguageModel("tiny", LlamaForCausalLM(config).eval(), None)
    name = model.embedding_name
    assert name == "model.embed_tokens.weight" and name not in model.linear_names
    same = model.hf.get_output_embeddings().weight is model.weights[name]
    assert same == tied and ("lm_head.weight" in model.weights) != tied
