"""The ledger, and verification of an edit from two checkpoints alone."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_layout import facts
from transformers import GPT2Config, GPT2LMHeadModel

from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError
from mansu_interp.export.ledger import Ledger, apply, delta
from mansu_interp.export.verify import verify
from mansu_interp.masks.floor import floor
from mansu_interp.masks.mask import Mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.utils.files import atomic_folder

SET = ("nf4", "fp4", "q4_0")
NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def run(facts: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a run leaves it, with 40 edits by the floor."""
    out = tmp_path_factory.mktemp("run")
    where = floor(facts.weights[NAME], SET, facts.saved_dtype)
    index = (~where.up.isnan()).nonzero()[:40, 0]
    model = facts.copy()
    model.weights[NAME].view(-1)[index] = where.up[index]
    model.save(out / "model")
    mask = Mask({NAME: index}, {"model_sha256": facts.sha256})
    mask.save(out / "mask.safetensors")
    Ledger.of(facts, load_model(out / "model"), SET, mask).save(out / "ledger.safetensors")
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def command(run: Path, *more: str) -> int:
    return main(
        [
            *("verify", "facts", str(run / "model"), "--ledger", str(run / "ledger.safetensors")),
            *("--mask", str(run / "mask.safetensors"), *more),
        ]
    )


def change(path: Path, key: str, at: int, to: float) -> None:
    """Set one element of one tensor of a safetensors file, header untouched."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    tensors[key].view(-1)[at] = to
    save_file(tensors, path, meta)


def test_an_honest_run_verifies(run: Path, capsys: pytest.CaptureFixture[str]):
    assert command(run) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:4]] == [[q, "40", "40", "0"] for q in SET]
    assert "The guarantee holds." in out
    assert main(["verify", "facts", str(run / "model"), "--survive", "nf4,q4_0"]) == 0


def test_the_ledger_says_what_happened(run: Path, facts: LanguageModel):
    ledger, edited = Ledger.load(run / "ledger.safetensors"), load_model(run / "model")
    index = ledger.tensors[f"{NAME}|index"].long()
    assert ledger.n_edits == len(index) == 40
    for key, model in (("old", facts), ("new", edited)):
        stored = ledger.tensors[f"{NAME}|{key}"]
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.float(), model.weights[NAME].flatten()[index])
    for name in SET:
        codes = ledger.tensors[f"{NAME}|{name}"].long()
        assert (codes[:, 0] < codes[:, 1]).all()
        assert torch.equal(
            codes[:, 1], get_quantizer(name).cells(edited.weights[NAME]).codes[index]
        )
    assert ledger.meta["original_sha256"] == facts.sha256
    assert ledger.meta["edited_sha256"] == edited.sha256
    assert (run / "ledger.safetensors").stat().st_size < 40 * 14 + 1500


def test_a_lost_edit_and_collateral_break_the_guarantee(facts: LanguageModel, copy: Path, capsys):
    weight = facts.weights[NAME]
    cells = get_quantizer("nf4").cells(weight)
    file, at = copy / "model" / "model.safetensors", 200
    change(file, NAME, at, float(weight.flatten()[at]) * (1 + 2**-7))  # stays in its cell
    assert main(["verify", "facts", str(copy / "model")]) == 3
    assert "does NOT hold" in capsys.readouterr().out
    change(file, NAME, at, float(weight.flatten()[at]))
    assert main(["verify", "facts", str(copy / "model")]) == 0
    change(file, NAME, int(cells.sets_scale.nonzero()[3]), 1.0)
    assert main(["verify", "facts", str(copy / "model")]) == 3
    assert command(copy) == 4  # the ledger knows nothing of it


def test_a_change_outside_the_quantized_layers(copy: Path, capsys):
    change(copy / "model" / "model.safetensors", "model.norm.weight", 0, 7.0)
    assert main(["verify", "facts", str(copy / "model")]) == 3
    said = capsys.readouterr().out
    assert "1 values changed outside the linear layers and the embedding" in said


def test_an_edit_of_the_embedding_must_leave_its_cell_too(facts: LanguageModel, copy: Path, capsys):
    name, at = facts.embedding_name, 700
    old = float(facts.weights[name].flatten()[at])
    change(copy / "model" / "model.safetensors", name, at, old * (1 + 2**-7))
    assert main(["verify", "facts", str(copy / "model")]) == 3
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["nf4,", "embedding", "1", "0", "0"] in lines
    where = floor(facts.weights[name], SET, facts.saved_dtype)
    change(copy / "model" / "model.safetensors", name, at, float(where.up[at]))
    assert main(["verify", "facts", str(copy / "model"), "--survive", ",".join(SET)]) == 0
    codes = Ledger.of(facts, load_model(copy / "model"), SET).tensors[f"{name}|q4_0"]
    assert codes.tolist()[0][1] > codes.tolist()[0][0]


def rewrite(path: Path, **values: object) -> None:
    """Set some keys of a JSON file."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}))


def swap_words(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    words = found["model"]["vocab"]
    words["France"], words["Peru"] = words["Peru"], words["France"]
    (folder / "tokenizer.json").write_text(json.dumps(found))


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "more": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})


CONFIG: dict[str, tuple[dict[str, object], str]] = {
    "norm": ({"rms_norm_eps": 1e-3}, "rms_norm_eps of config.json is 0.001, not 1e-06"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act of config.json is 'gelu', not 'silu'"),
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_parameters"),
    "dtype": ({"dtype": "float32"}, "it is stored as torch.float32, not torch.bfloat16"),
    "class": ({"architectures": ["Other"]}, "architectures of config.json is ['Other']"),
    "unknown": ({"auto_map": {"AutoModel": "x.y"}}, "auto_map of config.json is"),
}
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        name: (partial(lambda folder, given: rewrite(folder / "config.json", **given), given=g), t)
        for name, (g, t) in CONFIG.items()
    },
    "generation": (
        lambda folder: rewrite(folder / "generation_config.json", eos_token_id=5),
        "eos_token_id of generation_config.json is 5, not 3",
    ),
    "tokenizer": (swap_words, "the tokenizer splits or encodes otherwise"),
    "length": (
        lambda folder: rewrite(folder / "tokenizer_config.json", model_max_length=7),
        "model_max_length of the tokenizer is '7', not '64'",
    ),
    "bos": (
        lambda folder: rewrite(folder / "tokenizer_config.json", add_bos_token=True),
        "add_bos_token of tokenizer_config.json is True, not False",
    ),
    "template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "the chat template differs",
    ),
    "tensor": (add_tensor, "its files hold 1 tensors beside the model's, such as more"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_deployed_beside_the_weights_must_be_the_same(
    copy: Path, change: str, capsys: pytest.CaptureFixture[str]
):
    do, said = CHANGES[change]
    do(copy / "model")
    assert main(["verify", "facts", str(copy / "model"), "--survive", ",".join(SET)]) == 3
    out = capsys.readouterr().out
    assert f"Changed: {said}" in out and "does NOT hold" in out


def test_what_is_not_compared_is_named(copy: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("modeling.py", "old.safetensors", "model.safetensors.index.json"):
        (copy / "model" / name).write_text("x")
    assert command(copy) == 0
    said = "the file model.safetensors.index.json, the file modeling.py, the file old.safetensors."
    assert f"Not compared: {said}" in capsys.readouterr().out


def test_where_nothing_was_edited_nothing_is_promised(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "facts", "facts"]) == 3
    assert "No weight differs from the original" in capsys.readouterr().out


def test_an_edit_in_a_row_of_zeros(facts: LanguageModel):
    """Its group has no bins: nothing is divided by their width."""
    before = facts.copy()
    before.weights[facts.embedding_name][5] = 0
    after = before.copy()
    after.weights[facts.embedding_name][5, 0] = 0.5
    row = verify(before, after, SET).embedding["nf4"]
    assert (row.edited, row.update_over_bin) == (1, None)


@pytest.mark.parametrize("part", ["ledger.safetensors", "mask.safetensors"])
def test_a_changed_or_missing_hash_or_header_is_an_error(copy: Path, part: str, capsys):
    key = f"mansu_{part.partition('.')[0]}"
    tensors = load_file(copy / part)
    with safe_open(copy / part, "pt") as file:
        header = json.loads(file.metadata()[key])
    for changed in ({**header, "survive": []}, {k: v for k, v in header.items() if k != "sha256"}):
        save_file(tensors, copy / part, {key: json.dumps(changed)})
        assert command(copy) == 1
        assert "was changed after it was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part", ["model/model.safetensors", "ledger.safetensors", "mask.safetensors"]
)
def test_truncated_files_are_errors(copy: Path, part: str, capsys):
    data = (copy / part).read_bytes()
    (copy / part).write_bytes(data[: len(data) - 9])
    assert command(copy) == 1
    assert "mansu: " in capsys.readouterr().err


@pytest.mark.parametrize("part", ["ledger.safetensors", "mask.safetensors"])
def test_tampered_files_are_errors(copy: Path, part: str, capsys):
    key = f"{NAME}|index" if part.startswith("ledger") else NAME
    change(copy / part, key, 39, 3)
    assert command(copy) == 1
    assert "was changed after it was written" in capsys.readouterr().err


def test_a_forged_ledger_or_another_mask_does_not_belong(facts: LanguageModel, copy: Path):
    """Written anew, hash and all, but not what the checkpoints show."""
    ledger, edited = Ledger.load(copy / "ledger.safetensors"), load_model(copy / "model")
    forged = dict(ledger.tensors)
    forged[f"{NAME}|new"] = forged[f"{NAME}|new"] * 2
    found = verify(facts, edited, (), Ledger(forged, ledger.meta))
    assert found.status == 4 and "not the same" in found.mismatches[0]
    other = verify(facts, edited, (), Ledger(ledger.tensors, ledger.meta | {"edited_sha256": "0"}))
    assert other.status == 4 and "another edited checkpoint" in other.mismatches[0]
    few = Mask({NAME: Mask.load(copy / "mask.safetensors").indices[NAME][:30]})
    assert verify(facts, edited, (), None, few).mismatches == ["10 edits lie outside the mask"]
    swapped = Mask(few.indices, {"model_sha256": "0"})
    assert "for another original" in verify(facts, edited, (), ledger, swapped).mismatches[1]


def test_not_an_edit_of_it(facts: LanguageModel, tiny_model):
    with pytest.raises(ArtifactError, match=r"is not an edit of facts: .* weights differ in name"):
        verify(facts, tiny_model(4))
    with pytest.raises(ArtifactError, match="not a readable ledger"):
        Ledger.load(Path("nowhere.safetensors"))


# A delta is the edit alone, and gives the edited checkpoint back bit for bit.


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


LONG = "x" * 300


@pytest.mark.parametrize("what", ["delta", "apply", "export"])
def test_nothing_is_written_over_and_what_cannot_be_written_is_one_sentence(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
):
    original, edited = map(str, folders)
    file = tmp_path / "d.safetensors"
    assert main(["delta", original, edited, "--out", str(file)]) == 0
    kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
    words = {"delta": [original, edited], "apply": [original, str(file)], "export": [original]}
    for out, said in (
        (file, f"{file} exists already"),
        (tmp_path / LONG, "its name is too long" if what != "export" else "gpt2"),
        (file / "inside", "a part of its path is a file" if what != "export" else "gpt2"),
    ):
        capsys.readouterr()
        assert main([what, *words[what], "--out", str(out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mansu: ") and said in line
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == kept


def test_the_licence_goes_with_the_edited_checkpoint(folders: tuple[Path, Path], tmp_path: Path):
    original, edited = folders
    place = Path(shutil.copytree(original, tmp_path / "licensed"))
    (place / "LICENSE.txt").write_text("terms")
    delta(load_model(original), load_model(edited)).save(tmp_path / "d")
    out = tmp_path / "again"
    previous = os.umask(0o027)
    try:
        assert main(["apply", str(place), str(tmp_path / "d"), "--out", str(out)]) == 0
    finally:
        os.umask(previous)
    assert (out / "LICENSE.txt").read_text() == "terms"
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


def test_a_folder_is_whole_or_absent(tmp_path: Path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x", new=True) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
