"""Circuits, masks and model cards as others receive them; the network is never touched."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED
from test_report import make_report
from transformers import GPT2Config, GPT2LMHeadModel

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.errors import ArtifactError, MaskError
from mansu_interp.export.deployed import licence_terms
from mansu_interp.masks.mask import Mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import EMBEDDED
from mansu_interp.report.card import model_card
from mansu_interp.utils import hub


def test_masks_and_circuits_survive_a_folder(tmp_path: Path):
    mask = Mask({"a.weight": torch.tensor([1, 5])}, {"budget": 0.1})
    mask.save_pretrained(tmp_path / "new")
    again = Mask.from_pretrained(tmp_path / "new")
    assert again.meta == mask.meta and torch.equal(again.indices["a.weight"], torch.tensor([1, 5]))
    circuit = Circuit.load(next(SHIPPED.rglob("*.json")))
    circuit.save_pretrained(tmp_path)
    assert Circuit.from_pretrained(str(tmp_path)).n_edges == circuit.n_edges
    with pytest.raises(ArtifactError):
        Circuit.from_pretrained(tmp_path / "new")


def test_a_dead_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    mask = Mask({"a.weight": torch.tensor([1])})
    start = time.monotonic()
    for call in (
        lambda: mask.push_to_hub("owner/name"),
        lambda: Mask.from_pretrained("owner/name"),
    ):
        with pytest.raises(ArtifactError, match="cannot be reached"):
            call()
    assert time.monotonic() - start < 5
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("touched the network"))
    for odd in ("no-such-folder", "../x/y", "a/b/c"):
        with pytest.raises(ArtifactError, match="neither a folder nor a name"):
            Mask.from_pretrained(odd)


def test_push_and_fetch_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The hub replaced by a folder: what is uploaded is what is fetched."""
    import huggingface_hub

    class Api:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            assert name == "owner/name" and private and exist_ok

        def upload_file(self, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
            (tmp_path / path_in_repo).write_bytes(Path(path_or_fileobj).read_bytes())

    def fetch(name: str, file: str, revision: str | None) -> str:
        if revision == "gone":
            raise OSError("404: no such revision\nlong text")
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "check_online", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    Mask({"a.weight": torch.tensor([3])}).push_to_hub("owner/name")
    assert Mask.from_pretrained("owner/name").indices["a.weight"].tolist() == [3]
    with pytest.raises(ArtifactError, match="could not be fetched: 404: no such revision"):
        Mask.from_pretrained("owner/name", revision="gone")


def test_booleans_follow_the_parameters_own_layout():
    """GPT-2 stores [in, out]: position 5 of [out, in] = [96, 32] is input 5 of output 0."""
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=4))
    name = "transformer.h.0.attn.c_attn.weight"
    found = Mask({name: torch.tensor([5, 33])}).booleans(hf)
    assert found.keys() == dict(hf.named_parameters()).keys()
    assert found[name].nonzero().tolist() == [[1, 1], [5, 0]]
    assert not any(b.any() for n, b in found.items() if n != name)
    model = LanguageModel("gpt2", hf, None)  # turned: [out, in]
    assert Mask({name: torch.tensor([5, 33])}).booleans(model.hf)[name].nonzero().tolist() == [
        [0, 5],
        [1, 1],
    ]
    with pytest.raises(MaskError, match="no parameter b"):
        Mask({"b": torch.tensor([1])}).booleans(hf)
    with pytest.raises(MaskError, match=f"see {name}"):
        Mask({name: torch.tensor([10**6])}).booleans(hf)


def test_the_card_carries_the_scorecard():
    report = make_report()
    report = replace(
        report,
        model=replace(report.model, name="owner/base"),
        task=replace(report.task, title="Forget <b>this</b>."),
        edit=replace(report.edit, edited=1234, share=0.00123),
        command="mansu run --model owner/base",
    )
    card = model_card(report)
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "base_model: owner/base" in head and "- unlearning" in head
    assert "1,234 parameters" in body and "0.123%" in body
    assert "| retain preservation | ✗ fail |" in body and "| capital | 150 |" in body
    assert "&lt;b&gt;" in body and "mansu run --model owner/base" in body
    assert "base_model" not in model_card(make_report()).partition("# ")[0]


def test_the_card_names_the_licence(tmp_path: Path):
    """That of the original's card; else its file; of a shipped model this package's."""

    def head() -> str:
        card = model_card(make_report(), licence_terms(tmp_path))
        return card.removeprefix("---\n").partition("\n---\n")[0]

    assert "license: unknown" in head()
    (tmp_path / "LICENSE").write_text("terms")
    assert "license: other" in head() and "license_link: LICENSE" in head()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    assert "license: apache-2.0" in head()
    (tmp_path / "README.md").write_text("---\n{{: [\n---\n")
    assert "license: other" in head()
    assert licence_terms(EMBEDDED / "facts") == {"license": "mit"}


def test_the_card_names_the_original_where_the_hub_has_it():
    for name, base in (
        ("/x/models--owner--base/snapshots/0a", "owner/base"),
        ("owner/base", "owner/base"),
        ("/x/owner/base", None),
    ):
        report = make_report()
        report = replace(report, model=replace(report.model, name=name))
        assert (f"base_model: {base}" in model_card(report)) == (base is not None)
