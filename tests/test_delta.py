"""A delta is the edit alone, and gives the edited checkpoint back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_layout import facts
from transformers import GPT2Config, GPT2LMHeadModel

from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError
from mansu_interp.export.ledger import Ledger, apply, delta
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.utils.files import new_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bf16 GPT-2 in several files, and an edit of it, saved."""
    place = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(
        place / "original", max_shard_size="30KB"
    )
    facts().tokenizer.save_pretrained(place / "original")
    edited = load_model(place / "original").copy()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        edited.weights[name].view(-1)[torch.arange(3, 90, 7)] += 0.5
    edited.save(place / "edited")
    return place / "original", place / "edited"


def test_apply_gives_the_edited_checkpoint(folders: tuple[Path, Path], tmp_path: Path, capsys):
    original, edited = map(str, folders)
    file, out = tmp_path / "d.safetensors", tmp_path / "again"
    assert main(["delta", original, edited, "--out", str(file)]) == 0
    assert "26 edits" in capsys.readouterr().out
    assert file.stat().st_size < 3000
    assert main(["apply", original, str(file), "--out", str(out)]) == 0
    a, b = (load_file(Path(p) / "model.safetensors") for p in (edited, out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    assert main(["apply", original, str(file), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_another_original_is_refused(folders: tuple[Path, Path], tmp_path: Path, capsys):
    original, edited = map(load_model, folders)
    file = tmp_path / "d.safetensors"
    delta(original, edited).save(file)
    assert main(["apply", str(folders[1]), str(file), "--out", str(tmp_path / "x")]) == 1
    assert "belongs to another original" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_ledger_that_lies_is_refused(folders: tuple[Path, Path]):
    original, edited = map(load_model, folders)
    found = delta(original, edited)
    name = next(iter(found.tensors)).rpartition("|")[0]
    for key, value in {
        "index": found.tensors[f"{name}|index"] + 10**6,
        "new": found.tensors[f"{name}|new"][1:],
    }.items():
        broken = Ledger({**found.tensors, f"{name}|{key}": value}, found.meta)
        with pytest.raises(ArtifactError, match="does not fit"):
            apply(original, broken)
    other = Ledger({**found.tensors, f"{name}|new": found.tensors[f"{name}|old"]}, found.meta)
    with pytest.raises(ArtifactError, match="do not give the weights"):
        apply(original, other)
    with pytest.raises(ArtifactError, match="lacks the hash"):
        apply(original, Ledger(found.tensors, {}))


def test_delta_needs_an_edit_in_one_dtype(folders: tuple[Path, Path]):
    original = load_model(folders[0])
    with pytest.raises(ArtifactError, match="the same weights"):
        delta(original, original)
    wide = LanguageModel("wide", original.hf, None, torch.float32)
    with pytest.raises(ArtifactError, match="one dtype"):
        delta(original, wide)


def test_a_folder_is_whole_or_absent(tmp_path: Path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
