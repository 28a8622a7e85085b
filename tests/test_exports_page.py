"""The code of docs/exports.md does what the page says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layout import facts
from transformers import AutoModelForCausalLM

from mansu_interp.masks.mask import Mask
from mansu_interp.models.load import EMBEDDED

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
