"""Loading, copying and saving models, and every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.errors import MansuError, ModelError
from mansu_interp.losses.gradients import gradient
from mansu_interp.models import language_model
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import EMBEDDED, embedded_models, empty_model, load_model
from mansu_interp.utils import hub, tensors
from mansu_interp.utils.tensors import plant


def test_unknown_model_names_what_ships():
    with pytest.raises(ModelError) as caught:
        load_model("fact")
    message = str(caught.value)
    assert message.startswith(f"Unknown model 'fact'. Shipped: {', '.join(embedded_models())}.")
    assert "path to a Hugging Face folder, or a hub name such as" in message
    assert isinstance(caught.value, MansuError) and "facts" in embedded_models()


@pytest.mark.parametrize("name", ["../facts", "/no/such/folder", "a/b/c", "facts/", "x" * 300, ""])
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


@pytest.mark.slow
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


def sharded(folder: Path) -> dict[str, str]:
    """The folder's weights in two files with an index; returns its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {n: f"model-{1 + (n > names[9])}.safetensors" for n in names}
    for file in set(where.values()):
        part = {n: t for n, t in tensors.items() if where[n] == file}
        save_file(part, folder / file, {"format": "pt"})
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def test_an_index_is_followed_only_where_it_is_true(folder: Path, facts: LanguageModel):
    where = sharded(folder)
    write_index(folder, where)
    model = load_model(folder)
    assert all(torch.equal(w, model.weights[n]) for n, w in facts.weights.items())
    (folder / "decoy.safetensors").write_bytes(b"x")
    assert load_model(folder).sha256 == model.sha256  # of what is loaded alone
    shutil.copy(folder / "model-1.safetensors", folder.parent / "outside.safetensors")
    first = min(where)
    for odd, said in (
        ({**where, first: "../outside.safetensors"}, "no safetensors file beside it"),
        ({**where, first: str(folder.parent / "outside.safetensors")}, "no safetensors file besi"),
        ({**where, first: "model-3.safetensors"}, "'model-3.safetensors' is not there"),
        (
            {**where, first: "model-2.safetensors"},
            f"not true of model-1.safetensors where '{first}",
        ),
        (
            {**where, "more": "model-2.safetensors"},
            "it is not true of model-2.safetensors where 'm",
        ),
        ({}, "it names no file"),
    ):
        write_index(folder, odd)
        with pytest.raises(ModelError, match=f"cannot be followed: .*{re.escape(said)}"):
            load_model(folder)


def test_a_folder_without_a_tokenizer_is_told_what_it_lacks(folder: Path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer .* Copy the original checkpoint's"):
        load_model(folder)


@pytest.mark.parametrize("name", ["x.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_only_looks_like_a_file_is_refused_at_once(folder: Path, name: str, kind: str):
    (folder / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nowhere")
    with pytest.raises(ModelError, match=rf"{name} is no regular file\. Remove it from the"):
        load_model(folder)


def test_weights_that_are_not_there_or_lie_elsewhere(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    del tensors[name]
    whole = (folder / "model.safetensors").read_bytes()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 weights, such as {name}, which would be random"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter .* Merge it into the model first"):
        load_model(folder)
    (folder / "adapter_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names weights in other files"):
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
    assert calls[-3:] == [(4, 6), (1, 3), (4, 3)]  # before: a try on eight
    assert torch.allclose(apart, shared, atol=1e-5)
    for a, b in zip(g_apart, g_shared, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_trees_change_neither_logits_nor_gradients(tiny_model, kv_heads: int):
    """What prompts begin alike with is computed once, though all of them begin alike with little;
    and only up to the positions that are read."""
    rows = [[7, 3, 9, 4, 1, 0], [7, 3, 9, 5, 2, 6], [7, 8, 9, 5, 8, 1], [7, 3, 9, 4, 0, 0]]
    tokens, row = torch.tensor(rows), torch.tensor([0, 1, 2, 3, 1])
    at = torch.tensor([4, 5, 5, 3, 3])
    apart = tiny_model(kv_heads).copy()
    model, names = replace(apart, in_trees=True), apart.linear_names
    calls: list[tuple[int, ...]] = []
    apart.hf.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )

    def both(of: LanguageModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = []

        def loss() -> torch.Tensor:
            logits.append(of.logits_at(tokens, row, at))
            return logits[0].log_softmax(-1)[:, 5].sum()

        slopes = gradient(of, names, [loss])
        return logits[0], slopes

    (one, slope), (other, same) = both(apart), both(model)
    assert calls[-1] == (1, 13)
    assert torch.allclose(one, other, atol=1e-5)
    for a, b in zip(slope, same, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_tree_spells_every_prompt(size: int, monkeypatch: pytest.MonkeyPatch):
    """Each position that is read sees the tokens of its own prompt up to itself, each once and at
    its depth, and no others; rows are about as long as asked for."""
    monkeypatch.setattr(tensors, "TREE", size)
    rng = random.Random(size)
    prompts = [[rng.randrange(3) for _ in range(6)] for _ in range(40)]
    asked = [(rng.randrange(40), rng.randrange(6)) for _ in range(60)]
    trees = plant(prompts, *zip(*asked, strict=True))
    for (row, at), tree, node in zip(asked, trees.tree, trees.at, strict=True):
        seen = trees.seen[tree, node].nonzero()[:, 0]
        in_order = seen[trees.depth[tree, seen].argsort()]
        assert trees.tokens[tree, in_order].tolist() == prompts[row][: at + 1]
        assert trees.depth[tree, in_order].tolist() == list(range(at + 1))
    lengths = {row: max(at for r, at in asked if r == row) + 1 for row, _ in asked}
    starts = {tuple(prompts[row][:k]) for row, n in lengths.items() for k in range(1, n + 1)}
    found, width = trees.tokens.shape
    assert found <= max(1, round(len(starts) / size)) and width < 1.5 * size + 12


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


def test_the_stored_dtype_counts_not_the_named_one(folder: Path, tmp_path: Path):
    """float32 weights under a config.json that says bfloat16 are saved as float32 again."""
    file = folder / "model.safetensors"
    tensors = {k: v.float() + 1e-4 for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = load_model(folder)
    assert model.saved_dtype == torch.float32
    model.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[k], tensors[k]) for k in again)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].bfloat16()}, file, {"format": "pt"})
    assert load_model(folder).saved_dtype == torch.float32


def lay(cache: Path, name: str, commit: str, reference: str = "") -> Path:
    """The shipped model as a snapshot in a cache of huggingface_hub."""
    home = cache / f"models--{name.replace('/', '--')}"
    if reference:
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / reference).write_text(commit)
    return Path(shutil.copytree(EMBEDDED / "facts", home / "snapshots" / commit))


def test_cached_models_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plain names, revisions, and caches without refs/main."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("touched the network"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    lay(tmp_path, "gpt2", "a" * 40, "main")
    lay(tmp_path, "owner/name", "b" * 40)
    lay(tmp_path, "owner/two", "c" * 40)
    lay(tmp_path, "owner/two", "d" * 40, "v1.0")
    found = load_model("facts").sha256
    for name in ("gpt2", "owner/name", "owner/two@v1.0", "owner/two@" + "c" * 8):
        assert load_model(name).sha256 == found
        assert empty_model(name).architecture.n_layers > 0
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    half = lay(tmp_path, "owner/half", "e" * 40)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (
        "owner/two",
        "owner/two@v2",
        "gpt2@" + "f" * 40,
        "owner/half",
    ):  # which, or not all
        with pytest.raises(ModelError, match=f"{name}' is not on this machine"):
            load_model(name)
    for odd in ("owner/two@../../x", "gpt2@", "gpt2@a b"):
        with pytest.raises(ModelError, match="Unknown model"):
            load_model(odd)


class FakeHub(BaseHTTPRequestHandler):
    """The shipped model as repository ``gpt2`` of a hub, or behind a proxy; notes what is asked."""

    asked: ClassVar[list[str]] = []
    files: ClassVar[list[Path]] = sorted(p for p in (EMBEDDED / "facts").iterdir() if p.is_file())

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("//")[-1].partition("/")[2] if "//" in self.path else self.path[1:]
        body, kind = b"", "application/json"
        if path.startswith("api/models/gpt2/tree/"):
            files = [(p.name, p.stat().st_size, hashlib.sha1(p.read_bytes())) for p in self.files]
            tree = [
                {"type": "file", "path": name, "size": size, "oid": oid.hexdigest()}
                for name, size, oid in files
            ]
            body = json.dumps(tree).encode()
        elif path.startswith("api/models/gpt2"):
            names = [{"rfilename": p.name} for p in self.files]
            body = json.dumps({"id": "gpt2", "sha": "a" * 40, "siblings": names}).encode()
        elif path.startswith("gpt2/resolve/"):
            body, kind = (EMBEDDED / "facts" / path.split("/")[-1]).read_bytes(), "text/plain"
        elif path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("ETag", f'"{hashlib.sha1(body).hexdigest()}"'),
            ("X-Repo-Commit", "a" * 40),
        ):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("how", ["endpoint", "proxy"])
def test_huggingface_hub_asks_where_it_is_told(how: str, tmp_path: Path):
    """HF_ENDPOINT, HTTP_PROXY and HF_HOME, in a process of its own; another host is never asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    drop = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_PROXY", "no_proxy")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    env |= (
        {"HF_ENDPOINT": here}
        if how == "endpoint"
        else {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": here, "http_proxy": here}
    )
    code = (
        "from mansu_interp import load_model, MansuError\n"
        "print(load_model('gpt2').sha256)\n"
        "try: load_model('nobody/no-such')\n"
        "except MansuError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    server.shutdown()
    sha, _, told = done.stdout.partition("\n")
    assert sha == load_model("facts").sha256, done.stderr
    assert "does not give the model 'nobody/no-such'" in told and "\n" not in told.strip()
    assert (tmp_path / "hub" / "models--gpt2").is_dir()
    assert all(p.startswith("http://hub.invalid") for p in FakeHub.asked[-3:]) == (how == "proxy")
