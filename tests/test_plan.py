"""Costs said in advance, against published sizes and against what small models really take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pairs

from mansu_interp.circuits import attribution
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.errors import CircuitError, ConfigError, ModelError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import empty_model
from mansu_interp.runs.config import PlanConfig
from mansu_interp.runs.plan import estimate, passes, plan_lines

TinyModel = Callable[[int], LanguageModel]
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama-3.1-8b": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
        805_681,
    ),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, 124_439_808, 32_491),
    "pythia-70m": (
        {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "vocab_size": 50304,
            "tie_word_embeddings": False,
        },
        70_426_624,
        3_580,
    ),
}


def write(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(PUBLISHED[name][0]))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models_from_their_config(tmp_path: Path, name: str):
    model = empty_model(write(tmp_path, name))
    found = estimate(model, AttributionConfig(), 32)
    assert (found.parameters, found.edges) == PUBLISHED[name][1:]
    assert found.weights_gb == pytest.approx(found.parameters * 4e-9)
    assert all(w.device.type == "meta" for w in model.weights.values())


def test_what_eight_billion_parameters_take(tmp_path: Path):
    """By hand: 1,057 writers x 32 tokens x 4,096 x 4 bytes a pair, half as much again; 2 FLOP per
    weight and token, the input embedding's excepted."""
    how = AttributionConfig(pairs=20, batch_size=8, ig_steps=5)
    found = estimate(empty_model(write(tmp_path, "llama-3.1-8b")), how, 32)
    assert found.writers == 1 + 32 * 33
    assert found.readers == 32 * (32 + 8 + 8 + 1) + 1
    assert found.attribution_gb == pytest.approx(8 * 1.5 * 1057 * 32 * 4096 * 4 / 1e9)
    assert (found.batches, found.forward, found.backward) == (3, 21, 15)
    weights = 8_030_261_248 - 128256 * 4096
    assert found.pflop == pytest.approx(2 * weights * 32 * 20 * (7 + 5) / 1e15)
    tight = estimate(empty_model(write(tmp_path, "llama-3.1-8b")), replace(how, memory_gb=2.0), 32)
    assert tight.pairs_per_batch == 2
    assert tight.attribution_gb <= 2.0


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_passes_and_memory_are_those_of_a_real_run(
    tiny_model: TinyModel, method: str, monkeypatch: pytest.MonkeyPatch
):
    model, pairs = tiny_model(2), make_pairs((6,) * 5)
    how = AttributionConfig(method=method, ig_steps=3, batch_size=2, pairs=5)  # type: ignore[arg-type]
    expected = estimate(model, how, 6)
    counts = {"forward": 0, "backward": 0}
    sizes: list[int] = []
    forward, difference = attribution.Stream.logits, attribution._difference
    metric_grad = torch.autograd.grad

    def counted(self: Any, *args: Any) -> Any:
        counts["forward"] += 1
        return forward(self, *args)

    def measured(*args: Any) -> Any:
        out = difference(*args)
        sizes.append(out.nbytes)
        return out

    def grad(outputs: Any, *args: Any) -> Any:
        counts["backward"] += outputs.ndim == 0  # the metric's, not a norm's
        return metric_grad(outputs, *args)

    monkeypatch.setattr(attribution.Stream, "logits", counted)
    monkeypatch.setattr(attribution, "_difference", measured)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    attribution.attribute(model, pairs, config=how)
    assert counts == {"forward": expected.forward, "backward": expected.backward}
    assert 1.5 * max(sizes) / 1e9 == pytest.approx(expected.attribution_gb)
    assert len(sizes) == expected.batches
    assert expected.forward == passes(how)[0] * 3


def test_the_text_says_it_all(tmp_path: Path):
    path = write(tmp_path, "llama-3.1-8b")
    text = "\n".join(plan_lines(PlanConfig(str(path), 32)))
    for part in (
        "8,030,261,248 parameters",
        "805,681 edges",
        "1,057 writers",
        "32.1 GB of weights",
    ):
        assert part in text


def test_bad_input(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.json").write_text("{")
    for name in ("a.json", "b.json", "c.json"):
        with pytest.raises(ModelError, match=f"{name} is not the configuration of a "):
            empty_model(tmp_path / name)
    with pytest.raises(ModelError, match="Unknown model 'no such thing'"):
        empty_model("no such thing")
    with pytest.raises(CircuitError, match="One pair of 4096 tokens needs"):
        plan_lines(PlanConfig("facts", 4096, AttributionConfig(memory_gb=0.001)))
    with pytest.raises(ConfigError, match="tokens must be at least 1; got 0"):
        PlanConfig(tokens=0)
