"""GGUF files, loaded again by transformers' own reader."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conftest import SHIPPED, VOCAB
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_layout import facts
from test_report import make_report
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError, ConfigError, MaskError, ModelError
from mansu_interp.evaluation.scores import WORDS, Scores
from mansu_interp.evaluation.versions import EDITED
from mansu_interp.export.deployed import card_formats, licence_terms
from mansu_interp.export.gguf import export_gguf, exportable
from mansu_interp.export.ledger import Ledger, apply, delta
from mansu_interp.export.verify import verify
from mansu_interp.masks.floor import floor
from mansu_interp.masks.mask import Mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import EMBEDDED, load_model
from mansu_interp.quantizers.gguf import EXACT, MIXES, gguf_names
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.quantizers.torchao import Int4
from mansu_interp.report.card import model_card
from mansu_interp.utils import hub
from mansu_interp.utils.files import atomic_folder
from mansu_interp.utils.libraries import gguf_lacks

TEXT = ["the capital of France is Paris", "the capital of Peru is Lima, in 1535"] * 3


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")


def make(
    kind: str,
    tied: bool,
    width: int = 64,
    inner: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
) -> LanguageModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=304,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    hf = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return LanguageModel(kind.lower(), hf, tokenizer())


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(
    ("family", "tied"), [("Llama", True), ("Llama", False), ("Qwen2", True), ("Qwen3", False)]
)
def test_transformers_reads_back_what_was_written(
    family: str, tied: bool, kind: str, tmp_path: Path
):
    model = make(family, tied)
    export_gguf(model, tmp_path / "m.gguf", kind)
    model.save(tmp_path / "saved")
    assert exportable(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    expected = model.copy() if kind == "f16" else quantize(model, kind)
    outer = {id(m.get_input_embeddings().weight) for m in [expected.hf]}
    outer.add(id(expected.hf.get_output_embeddings().weight))
    for weight in expected.weights.values():
        if kind == "f16" and weight.ndim == 2:
            weight.copy_(weight.half().float())
        elif id(weight) in outer:
            q8 = gguf.GGMLQuantizationType.Q8_0
            back = gguf.dequantize(gguf.quantize(weight.numpy(), q8), q8)
            weight.copy_(torch.from_numpy(back.copy()))
    read = dict(again.named_parameters())
    assert read.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(read[name], weight), name
    reader = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXT[:2]:
        ids = model.encode(text)
        assert reader(text, add_special_tokens=False).input_ids == ids
        tokens = torch.tensor([ids])
        assert torch.allclose(again(tokens).logits, expected.all_logits(tokens), atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [*EXACT, *MIXES])
def test_a_file_holds_the_quantizer_s_values(kind: str, tied: bool, tmp_path: Path):
    """Of linear layers, bit for bit; the embedding is finer. Rows of 320 fall back in a mix."""
    if kind in MIXES:
        pytest.importorskip("xllamacpp", reason="llama.cpp's own code: needs the wheel xllamacpp")
    model = make("Llama", tied, width=320, inner=256)
    export_gguf(model, tmp_path / "m.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {t.name: t for t in reader.tensors}
    expected, names = quantize(model, kind), gguf_names(model)
    for name in model.linear_names:
        if name.split(".")[-2] not in ("q_proj", "k_proj"):  # their rows stand in another order
            tensor = found[names[name]]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(torch.from_numpy(values.copy()), expected.weights[name]), name
    outer = found["token_embd.weight" if tied else "output.weight"].tensor_type.name
    assert outer == "Q8_0"
    named = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name
    assert named == ("MOSTLY_MXFP4_MOE" if kind == "mxfp4" else f"MOSTLY_{kind.upper()}")


@pytest.mark.parametrize(("tied", "sharing"), [(True, 2), (False, 4)])
@pytest.mark.parametrize("kind", [*sorted(set(EXACT) - {"mxfp4"}), *MIXES])
def test_llama_cpp_makes_the_same_file(kind: str, tied: bool, sharing: int, tmp_path: Path):
    """From one of 16 bits: the same types and, where it was given the same values, the same bytes.
    Of a fixed grid, embedding and unembedding are written otherwise."""
    reason = "llama.cpp's own quantize: needs llama-cpp-python"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    pytest.importorskip("xllamacpp", reason="llama.cpp's own code: needs the wheel xllamacpp")
    model = make("Llama", tied, width=320, inner=256, layers=17, heads=8, kv_heads=8 // sharing)
    for weight in model.weights.values():
        weight.copy_(weight.half().float())
    plain, ours, theirs = (tmp_path / f"{n}.gguf" for n in ("plain", "ours", "theirs"))
    export_gguf(model, plain, "f16")
    export_gguf(model, ours, kind)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}").value
    settings.nthread = 1
    assert not llama_cpp.llama_model_quantize(bytes(plain), bytes(theirs), settings)
    found, expected = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if kind in EXACT and name in ("token_embd.weight", "output.weight"):
            continue
        assert found[name].tensor_type == tensor.tensor_type, name
        assert (found[name].data == tensor.data).all(), name
    if kind == "q4_k_m":
        assert {t.tensor_type.name for t in expected.values()} == {
            "F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"
        }  # fmt: skip


@pytest.mark.parametrize("adds", [False, True])
def test_bos_and_chat_template_are_those_of_the_folder(adds: bool, tmp_path: Path):
    model = make("Llama", True)
    own = model.get_tokenizer()
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    if adds:
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
        )
    export_gguf(model, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is adds
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == own.chat_template


def test_a_type_that_the_edit_was_not_made_for_is_said(tmp_path: Path, capsys):
    """With how many edits survive it, as `survival` counts them from both checkpoints."""
    original = make("Llama", False)
    original.saved_dtype = torch.bfloat16
    for weight in original.weights.values():
        weight.copy_(weight.bfloat16().float())
    edited, name = original.copy(), "model.layers.1.mlp.down_proj.weight"
    where = floor(original.weights[name], ("nf4",), torch.bfloat16)
    index = (~where.up.isnan()).nonzero()[:200, 0]
    edited.weights[name].view(-1)[index] = where.up[index]
    edited.save(tmp_path / "model")
    edited = load_model(tmp_path / "model")
    Ledger.of(original, edited, ("nf4", "q8_0")).save(tmp_path / "ledger.safetensors")

    def said(place: Path, kind: str) -> str:
        out = tmp_path / f"{place.name}-{kind}.gguf"
        assert main(["export", str(place), "--type", kind, "--out", str(out)]) == 0
        return capsys.readouterr().err

    kept = survival(original, edited, "q4_0").survived
    assert 0 < kept < 200
    for place in (tmp_path, tmp_path / "model"):
        text = said(place, "q4_0")
        assert f"not made to survive q4_0; {kept} of its 200 weights do." in text
        assert "unlearn with --unlearn.survive q4_0" in text and "--task TASK)" in text
        assert said(place, "q8_0") == said(place, "f16") == ""
    (tmp_path / "config.json").write_text(json.dumps({"model": "facts", "task": None}))
    (tmp_path / f"{tmp_path.name}-q4_0.gguf").unlink()
    text = said(tmp_path, "q4_0")  # evaluate then asks the run's own task
    assert f"--checkpoint {tmp_path / 'model'})" in text and "--task" not in text
    if find_spec("xllamacpp"):
        text = said(tmp_path, "Q4_K_M")  # of narrow layers: Q5_0 and Q8_0
        kept = survival(original, edited, "q4_k_m").survived
        assert f"not made to survive q4_k_m; {kept} of its 200 weights do." in text
        assert "nothing can be promised" in text and "--unlearn.survive" not in text
        Ledger.of(original, edited, ("q5_0", "q8_0")).save(tmp_path / "ledger.safetensors")
        assert said(tmp_path / "model", "q4_k_m") == ""
    card = "---\nmansu:\n  survive:\n  - nf4\n  - q8_0\n---\n# It\n"
    (tmp_path / "model" / "README.md").write_text(card)
    shutil.copytree(
        tmp_path / "model", away := tmp_path / "away" / "b \u00fc"
    )  # without the ledger
    text = said(away, "q4_0")
    assert "not made to survive q4_0. What was forgotten may come back" in text
    assert f"evaluate '{tmp_path / away.name}-q4_0.gguf' --engine" in text
    assert f"--checkpoint '{away}' --task TASK)" in text
    assert "unlearn with --unlearn.survive q4_0" in text
    assert said(away, "q8_0") == said(away, "f16") == ""
    for other in ("---\nmansu: {survive: q4_0}\n---\n", "---\nlicense: mit\n---\n"):
        (away / "README.md").write_text(other)
        assert said(away, "q5_0") == ""
        (tmp_path / f"{away.name}-q5_0.gguf").unlink()
    wrong = ["export", str(tmp_path), "--type", "q4", "--out", str(tmp_path / "none.gguf")]
    assert main(wrong) == 1
    assert "type: got 'q4', expected one of f16, q4_0, " in capsys.readouterr().err
    again = ["export", str(tmp_path), "--type", "f16", "--out", str(tmp_path / "model-f16.gguf")]
    assert main(again) == 1 and "exists already" in capsys.readouterr().err


def test_a_missing_package_is_said_before_any_work(tmp_path: Path, capsys, monkeypatch):
    out = str(tmp_path / "m.gguf")

    def said(kind: str) -> str:
        assert main(["export", "no-such-model", "--type", kind, "--out", out]) == 1
        return capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    needed = "GGUF files of type q4_k_m, by llama.cpp's own code, need: pip install \"mansu-interp"
    assert f"{needed}[llama-cpp]" in said("q4_k_m")
    assert gguf_lacks("q4_0") == gguf_lacks("f16") == "" and "Unknown model" in said("f16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for kind in ("f16", "q4_0"):
        assert 'GGUF files need: pip install "mansu-interp[gguf]"' in said(kind)
    assert "[llama-cpp]" in gguf_lacks("q4_k_m") and "[gguf]" in gguf_lacks()
    with pytest.raises(ConfigError, match="GGUF files need: "):
        export_gguf(facts(), tmp_path / "m.gguf", "f16")
    assert exportable(EMBEDDED / "facts")  # once that package is here


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path: Path, capsys):
    assert exportable(EMBEDDED / "facts") and not exportable(tmp_path / "none")
    odd = facts()
    assert isinstance(odd.tokenizer, PreTrainedTokenizerFast)
    odd.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="this one is WordLevel with another rule"):
        export_gguf(odd, tmp_path / "m.gguf")
    odd.save(tmp_path / "odd")
    assert not exportable(tmp_path / "odd")
    with pytest.raises(ConfigError, match="GGUF types: got 'q4', expected f16, q4_0, "):
        export_gguf(odd, tmp_path / "m.gguf", "q4")
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48
    )
    opt = LanguageModel("opt", transformers.OPTForCausalLM(config), tokenizer())
    with pytest.raises(ModelError, match="this model is of type 'opt'"):
        export_gguf(opt, tmp_path / "m.gguf")
    assert main(["export", str(tmp_path / "odd"), "--out", str(tmp_path / "m.gguf")]) == 1
    assert "WordLevel" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]


# The code of docs/exports.md does what the page says.

PAGE = (Path(__file__).parents[1] / "docs/exports.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAME = "model.layers.1.mlp.down_proj.weight"


def run(word: str) -> dict[str, Any]:
    """What the page's only block that holds a word leaves behind."""
    (block,) = [b for b in BLOCKS if word in b]
    hf = AutoModelForCausalLM.from_pretrained(EMBEDDED / "facts", dtype=torch.float32)
    space: dict[str, Any] = {"hf": hf, "mask": Mask({NAME: torch.tensor([7, 9])})}
    exec(block, space)
    return space


def test_a_checkpoint_answers_in_transformers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(EMBEDDED / "facts", tmp_path / "runs" / "latest" / "model")
    monkeypatch.chdir(tmp_path)
    run("runs/latest/model")
    assert capsys.readouterr().out.strip() == "Asuncion"  # of the original


def test_a_loop_changes_nothing_outside_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    Mask({NAME: torch.tensor([7, 9])}).save(tmp_path / "runs" / "latest" / "mask.safetensors")
    monkeypatch.chdir(tmp_path)
    after, before = run("register_hook")["model"].weights, facts().weights
    moved = {n: (w != before[n]).flatten().nonzero()[:, 0].tolist() for n, w in after.items()}
    assert moved.pop(NAME) == [7, 9]
    assert not any(moved.values())


def test_a_mask_takes_what_load_model_gives():
    mask, model = Mask({NAME: torch.tensor([7, 9])}), facts()
    one, other = mask.booleans(model), mask.booleans(model.hf)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_adapters_sit_on_the_masks_layers():
    pytest.importorskip("peft", reason='needs pip install "mansu-interp[peft]"')
    adapted = run("LoraConfig")["adapted"]
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all(f"{NAME.removesuffix('.weight')}.lora_" in n for n in trained)


def test_lm_evaluation_harness_reads_the_folder(tmp_path: Path):
    lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "mansu-interp[lm-eval]"')
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "model"
    facts().save(folder)
    rows = [
        {"text": "<bos> the capital of france is", "choices": [" paris", " lima"], "gold": 0},
        {"text": "<bos> the capital of peru is", "choices": [" paris", " lima"], "gold": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    assert 0 <= found["results"]["tiny"]["acc,none"] <= 1
    assert found["n-samples"]["tiny"]["effective"] == 2


# Circuits, masks and model cards as others receive them; the network is never touched.


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


def test_the_card_s_results_are_the_hub_s_own():
    """Written and read by huggingface_hub; one per role, metric and precision."""
    report, scores = make_report(), Scores(make_report().scores)
    data = ModelCard(model_card(report)).data
    assert data.license == "unknown" and "machine-unlearning" in data.tags
    assert isinstance(data.eval_results, list)
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert len(found) == len(data.eval_results)
    forget = f"{report.task.name}: forget, unseen phrasings"
    for metric, word in WORDS.items():
        for version in (EDITED, EDITED.after("nf4")):
            after = f", after {version.quantizer}" if version.quantizer else ""
            value = found[forget, f"{word} accuracy{after}"]
            assert value == pytest.approx(scores.mean("forget", metric, version), abs=1e-4)


def test_the_card_says_which_formats_were_looked_at(tmp_path: Path):
    report = make_report()
    first = report.quantizers[0]
    kept = replace(first.survival, edited=9, survived=9, collateral=0)
    rows = (
        replace(first, name="nf4", promised=True, survival=kept),
        replace(first, name="q4_k_m", promised=False, survival=kept),
        replace(first, name="iq4_nl", promised=False, survival=kept, trained_through=True),
    )
    card = model_card(replace(report, quantizers=rows))
    assert "made to survive nf4: every edited weight" in card
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert card_formats(tmp_path) == ["nf4"] and card_formats(EMBEDDED / "facts") is None
    assert "that is quantized there (9 of 1,612) changes its code, and no other weight does" in card
    assert "That holds of this checkpoint" in card and "embedding" not in card
    embedded = replace(report.edit, edited=14, embedding=5)
    card = model_card(replace(report, quantizers=rows, edit=embedded))
    assert ": 9 in the layers, 5 in rows of the embedding), nothing else." in card
    assert "(9 of 14) changes its code" in card
    assert "Of the edits 5 are in rows of the embedding, which these formats leave alone" in card
    assert "`mansu export` writes the embedding of a GGUF file as Q8_0" in card
    assert "Nothing is promised of q4_k_m, which were measured. No other format" in card
    assert "Training went through iq4_nl as well, which promises nothing there." in card
    assert re.search(r"\n\| q4\S*_k\S*_m \| no \| 9 of 9 \| 0 ", card)
    assert re.search(r"\n\| iq4\S*_nl \| trained through \| 9 of 9 \| 0 ", card)
    lost = (replace(rows[0], survival=replace(kept, survived=8)),)
    card = model_card(replace(report, quantizers=lost))
    assert "does NOT hold" in card and "which were measured" not in card
    assert "## Formats" not in model_card(replace(report, quantizers=()))


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


# The ledger, and verification of an edit from two checkpoints alone.

SET = ("nf4", "fp4", "q4_0")
DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def left_by_a_run(facts: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a run leaves it, with 40 edits by the floor."""
    out = tmp_path_factory.mktemp("run")
    where = floor(facts.weights[DOWN], SET, facts.saved_dtype)
    index = (~where.up.isnan()).nonzero()[:40, 0]
    model = facts.copy()
    model.weights[DOWN].view(-1)[index] = where.up[index]
    model.save(out / "model")
    mask = Mask({DOWN: index}, {"model_sha256": facts.sha256})
    mask.save(out / "mask.safetensors")
    Ledger.of(facts, load_model(out / "model"), SET, mask).save(out / "ledger.safetensors")
    return out


@pytest.fixture
def copy(left_by_a_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(left_by_a_run, tmp_path / "run"))


def command(left_by_a_run: Path, *more: str) -> int:
    return main(
        [
            *(
                "verify",
                "facts",
                str(left_by_a_run / "model"),
                "--ledger",
                str(left_by_a_run / "ledger.safetensors"),
            ),
            *("--mask", str(left_by_a_run / "mask.safetensors"), *more),
        ]
    )


def change(path: Path, key: str, at: int, to: float) -> None:
    """Set one element of one tensor of a safetensors file, header untouched."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    tensors[key].view(-1)[at] = to
    save_file(tensors, path, meta)


def test_an_honest_run_verifies(left_by_a_run: Path, capsys: pytest.CaptureFixture[str]):
    assert command(left_by_a_run) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:4]] == [[q, "40", "40", "0"] for q in SET]
    assert "The guarantee holds." in out
    assert main(["verify", "facts", str(left_by_a_run / "model"), "--survive", "nf4,q4_0"]) == 0


def test_the_ledger_says_what_happened(left_by_a_run: Path, facts: LanguageModel):
    ledger, edited = (
        Ledger.load(left_by_a_run / "ledger.safetensors"),
        load_model(left_by_a_run / "model"),
    )
    index = ledger.tensors[f"{DOWN}|index"].long()
    assert ledger.n_edits == len(index) == 40
    for key, model in (("old", facts), ("new", edited)):
        stored = ledger.tensors[f"{DOWN}|{key}"]
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.float(), model.weights[DOWN].flatten()[index])
    for name in SET:
        codes = ledger.tensors[f"{DOWN}|{name}"].long()
        assert (codes[:, 0] < codes[:, 1]).all()
        assert torch.equal(
            codes[:, 1], get_quantizer(name).cells(edited.weights[DOWN]).codes[index]
        )
    assert ledger.meta["original_sha256"] == facts.sha256
    assert ledger.meta["edited_sha256"] == edited.sha256
    assert (left_by_a_run / "ledger.safetensors").stat().st_size < 40 * 14 + 1500


def test_a_lost_edit_and_collateral_break_the_guarantee(facts: LanguageModel, copy: Path, capsys):
    weight = facts.weights[DOWN]
    cells = get_quantizer("nf4").cells(weight)
    file, at = copy / "model" / "model.safetensors", 200
    change(file, DOWN, at, float(weight.flatten()[at]) * (1 + 2**-7))  # stays in its cell
    assert main(["verify", "facts", str(copy / "model")]) == 3
    assert "does NOT hold" in capsys.readouterr().out
    change(file, DOWN, at, float(weight.flatten()[at]))
    assert main(["verify", "facts", str(copy / "model")]) == 0
    change(file, DOWN, int(cells.sets_scale.nonzero()[3]), 1.0)
    assert main(["verify", "facts", str(copy / "model")]) == 3
    assert command(copy) == 4  # the ledger knows nothing of it


def test_a_change_outside_the_quantized_layers(copy: Path, capsys):
    change(copy / "model" / "model.safetensors", "model.norm.weight", 0, 7.0)
    assert main(["verify", "facts", str(copy / "model")]) == 3
    said = capsys.readouterr().out
    assert "1 value changed outside the linear layers and the embedding" in said


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
    "dtype": ({"dtype": "float32"}, "dtype of config.json is 'float32', not 'bfloat16'"),
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


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_libraries_that_compute_in_the_checkpoint_s_dtype_are_asked(
    facts: LanguageModel, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Of edits that the floor made for float32 alone some are lost there."""
    names, first = ("nf4", "torchao-int4-g128"), facts.linear_names[2]
    before = replace(facts.copy(), saved_dtype=stored)

    def edited() -> LanguageModel:
        after = before.copy()
        up = floor(after.weights[first], names, stored).up
        put = after.weights[first].view(-1)
        put.copy_(torch.where(up.isnan() | (torch.arange(len(up)) % 3 > 0), put, up))
        return after

    good = verify(before, edited(), names)
    narrow = "torchao-int4-g128 in bfloat16"
    assert good.holds and list(good.rows) == [*names, *([narrow] * (stored == torch.bfloat16))]
    monkeypatch.setattr(Int4, "elsewhere", lambda *_: {})
    bad = edited()
    monkeypatch.undo()
    found = verify(before, bad, names)
    assert all(found.rows[n].survived == found.rows[n].edited > 1000 for n in names)
    if stored == torch.bfloat16:
        row = found.rows[narrow]
        assert 0 < row.edited - row.survived < 0.05 * row.edited and not row.collateral
        assert not found.holds and found.status == 3


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
    key = f"{DOWN}|index" if part.startswith("ledger") else DOWN
    change(copy / part, key, 39, 3)
    assert command(copy) == 1
    assert "was changed after it was written" in capsys.readouterr().err


def test_a_forged_ledger_or_another_mask_does_not_belong(facts: LanguageModel, copy: Path):
    """Written anew, hash and all, but not what the checkpoints show."""
    ledger, edited = Ledger.load(copy / "ledger.safetensors"), load_model(copy / "model")
    forged = dict(ledger.tensors)
    forged[f"{DOWN}|new"] = forged[f"{DOWN}|new"] * 2
    found = verify(facts, edited, (), Ledger(forged, ledger.meta))
    assert found.status == 4 and "not the same" in found.mismatches[0]
    other = verify(facts, edited, (), Ledger(ledger.tensors, ledger.meta | {"edited_sha256": "0"}))
    assert other.status == 4 and "another edited checkpoint" in other.mismatches[0]
    few = Mask({DOWN: Mask.load(copy / "mask.safetensors").indices[DOWN][:30]})
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
