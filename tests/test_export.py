"""GGUF files, loaded again by transformers' own reader."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conftest import VOCAB
from test_layout import facts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mansu_interp.cli.main import main
from mansu_interp.errors import ModelError
from mansu_interp.export.gguf import export_gguf
from mansu_interp.export.ledger import Ledger
from mansu_interp.masks.floor import floor
from mansu_interp.masks.mask import Mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import EMBEDDED, load_model
from mansu_interp.quantizers.survival import quantize, survival

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


def make(kind: str, tied: bool) -> LanguageModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=304,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
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
        assert "unlearn with --unlearn.survive q4_0" in text
        assert said(place, "q8_0") == said(place, "f16") == ""
    again = ["export", str(tmp_path), "--type", "f16", "--out", str(tmp_path / "model-f16.gguf")]
    assert main(again) == 1 and "exists already" in capsys.readouterr().err


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path: Path, capsys):
    with pytest.raises(ModelError, match="this one is WordLevel"):
        export_gguf(facts(), tmp_path / "m.gguf")
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4)
    gpt2 = LanguageModel("gpt2", transformers.GPT2LMHeadModel(config), tokenizer())
    with pytest.raises(ModelError, match="this model is of type 'gpt2'"):
        export_gguf(gpt2, tmp_path / "m.gguf")
    assert main(["export", "facts", "--out", str(tmp_path / "m.gguf")]) == 1
    assert "WordLevel" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
    assert capsys.readouterr().out.strip() == "Paris"  # the original; an edited one says otherwise


def test_gradients_stay_inside_the_mask():
    space = run("register_hook")
    hf = space["hf"]
    before = {n: p.detach().clone() for n, p in hf.named_parameters()}
    hf(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    torch.optim.Adam(hf.parameters(), lr=0.1).step()
    moved = {n: (p != before[n]).flatten().nonzero()[:, 0] for n, p in hf.named_parameters()}
    assert moved.pop(NAME).tolist() == [7, 9]
    assert not any(len(m) for m in moved.values())


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
