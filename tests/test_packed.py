"""Checkpoints as transformers loads them in 4 and 8 bits, beside the simulated quantizers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from transformers import GPT2Config, GPT2LMHeadModel

from mansu_interp.cli import deployed
from mansu_interp.cli.main import main
from mansu_interp.cli.settings import EvaluateConfig
from mansu_interp.errors import ConfigError, ModelError
from mansu_interp.evaluation.packed import beside_engine, load_quantized, stored_codes
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.masks.floor import floor
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.registry import get_quantizer
from mansu_interp.quantizers.survival import quantize
from mansu_interp.tasks.task import Task
from mansu_interp.utils.shipped import LOADED

TORCHAO = [n for n in LOADED if n.startswith("int4")]
ON_ANY = [n for n in LOADED if n not in ("quanto-int4", *TORCHAO)]


def gpt2() -> LanguageModel:
    config = GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=4)
    return LanguageModel("gpt2", GPT2LMHeadModel(config).eval(), None)


@pytest.fixture(scope="module")
def edited(facts: LanguageModel, tmp_path_factory) -> LanguageModel:
    """Two layers with other weights, saved and loaded."""
    copy, folder = facts.copy(), tmp_path_factory.mktemp("edited") / "model"
    for name in copy.linear_names[3:5]:
        copy.weights[name].view(-1)[1:4000:9] *= -1
    copy.save(folder)
    return load_model(folder)


@pytest.mark.parametrize("name", ON_ANY)
def test_the_engine_stores_the_codes_and_computes_what_is_simulated(
    edited: LanguageModel, capitals: Task, name: str
):
    found, simulated, engine = beside_engine(edited, name, capitals)
    prompts = {p.clean for by in capitals.scored["unseen"].values() for s in by.values() for p in s}
    assert found.codes == sum(edited.weights[n].numel() for n in edited.linear_names)
    assert found.codes_apart == 0 and found.prompts == len(prompts) > 500
    assert found.answers_apart <= 0.01 * found.prompts
    # In bfloat16; LLM.int8() rounds activations, too, which moves more than its weights do.
    assert 0 < found.logits_apart < (0.05 if name == "int8" else 0.2 * found.logits_moved)
    (pairs,) = capitals.scored["unseen"]["forget"].values()
    ours, theirs = (accuracy(m, pairs).choice for m in (simulated, engine))
    assert ours == pytest.approx(theirs, abs=0.03)


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_has_the_codes_of_float32_weights(facts: LanguageModel, name: str, tmp_path: Path):
    """Loaded in bfloat16 it rounds its scales to that, and a few codes are others."""
    wide = replace(facts.copy(), saved_dtype=torch.float32)
    wide.save(tmp_path / "wide")
    quantizer, tokens = get_quantizer(name), torch.tensor([facts.encode("<bos>the capital of")])
    for model, most in ((load_model(tmp_path / "wide"), 0.0), (facts, 0.04)):
        engine = load_quantized(model, name)
        apart = [
            (stored_codes(engine, name, n) != quantizer.cells(model.weights[n]).codes)
            for n in model.linear_names
        ]
        share = float(torch.cat(apart).float().mean())
        assert share <= most and (share > 0) == (most > 0)
        engine.check_finite()
        found, expected = (m.all_logits(tokens) for m in (engine, quantize(model, name)))
        assert (found - expected).norm() < (0.1 if most else 1e-3) * expected.norm()


def test_edits_survive_as_torchao_loads_them(facts: LanguageModel, tmp_path: Path):
    """In the checkpoint's bfloat16, which is not the arithmetic of `Quantizer.cells`."""
    edited, names = facts.copy(), facts.linear_names[1:4]
    moves = {}
    for n in names:
        weight = edited.weights[n]
        where = floor(weight, TORCHAO, facts.saved_dtype)
        draws = torch.rand(2, weight.numel(), generator=torch.Generator().manual_seed(0))
        value = torch.where(draws[0] < 0.5, where.up, where.down)
        moves[n] = (draws[1] < 0.1) & ~value.isnan()
        weight.copy_(torch.where(moves[n], value, weight.flatten()).view_as(weight))
    edited.save(tmp_path / "edited")
    after = load_model(tmp_path / "edited")
    for name in TORCHAO:
        both = [load_quantized(model, name) for model in (facts, after)]
        for n in facts.linear_names[:5]:
            before, now = (stored_codes(engine, name, n) for engine in both)
            assert torch.equal(before != now, moves.get(n, torch.zeros(len(now)).bool())), name


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "hqq", "int4-g32"])
def test_other_codes_are_counted(facts: LanguageModel, edited: LanguageModel, name: str):
    """The original's cells against the edited folder: as many as the edit changes."""
    engine, quantizer = (
        load_quantized(replace(facts, folder=edited.folder), name),
        get_quantizer(name),
    )
    for weight in facts.linear_names[2:5]:
        stored = stored_codes(engine, name, weight)
        before, after = (quantizer.cells(m.weights[weight]).codes for m in (facts, edited))
        assert (stored != after).float().mean() <= (0.06 if name in TORCHAO else 0)
        assert (before == after).all() == (weight == facts.linear_names[2])


@pytest.mark.slow  # the package compiles its extension, which takes a minute
def test_quanto_has_the_codes_of_float32_weights(facts: LanguageModel, tmp_path: Path):
    """Given bfloat16 it rounds its scales to that, and one code in forty is another."""
    wide = replace(facts.copy(), saved_dtype=torch.float32)
    wide.save(tmp_path / "wide")
    quantizer = get_quantizer("quanto-int4")
    for model, most in ((load_model(tmp_path / "wide"), 0.0), (facts, 0.04)):
        engine = load_quantized(model, "quanto-int4")
        apart = [
            (stored_codes(engine, "quanto-int4", n) != quantizer.cells(model.weights[n]).codes)
            for n in model.linear_names
        ]
        share = float(torch.cat(apart).float().mean())
        assert share <= most and (share > 0) == (most > 0)


@pytest.mark.slow
def test_evaluate_tells_both(capsys):
    words = ["evaluate", "facts", "--task", "capitals", "--quiet", "--quantizers"]
    assert main([*words, "nf4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "prompts transformers simulated nf4 transformers nf4 forget: " in text
    assert "forget, transformers nf4: 1.000, gap +0.000: 0 back, 0 gone" in text
    assert "nf4 in transformers: 0 of 786,432 codes and" in text
    assert main([*words, "nf4,int8,hqq,int4-g32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [q["quantizer"] for q in found["quantizers"]] == ["nf4", "int8", "hqq", "int4-g32"]
    assert all(q["codes_apart"] == 0 for q in found["quantizers"][:3])
    assert all(q["flips"]["back"] == 0 for q in found["quantizers"])
    assert len(found["rows"][0]["scores"]) == 9


def test_what_transformers_cannot_load_is_said(facts: LanguageModel, tmp_path: Path, monkeypatch):
    turned = replace(gpt2(), folder=tmp_path)
    for name in ("torchao-int4-g128", "q4_0"):
        with pytest.raises(ConfigError, match=f"got '{name}', expected .* nf4, nf4-dq, fp4"):
            EvaluateConfig("facts", quantizers=(name,))
        with pytest.raises(ConfigError, match=f"got '{name}', expected one that transformers"):
            load_quantized(facts, name)
    for other in ({"leaks": True}, {"engine": "llama.cpp"}):
        with pytest.raises(ConfigError, match="--quantizers loads a folder in transformers; leave"):
            EvaluateConfig("facts", quantizers=("nf4",), **other)
    with pytest.raises(ConfigError, match=r"got 'llama.cpp' \(of its formats none is\), expected"):
        EvaluateConfig("facts", quantizers=("LLAMA.CPP",))
    with pytest.raises(ConfigError, match=r"x\.gguf is a GGUF file: give --engine llama\.cpp"):
        EvaluateConfig("x.gguf", quantizers=("nf4",))
    with pytest.raises(ModelError, match="tiny was not loaded from a folder"):
        load_quantized(make_tiny(4), "nf4")

    for name in ("hqq", "int4-g32"):
        with pytest.raises(ModelError, match="keeps its matrices transposed"):
            load_quantized(turned, name)

    def fails(*_: object, **__: object):
        raise NotImplementedError("QuantizationMethod.X is not available yet")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(ModelError, match="cannot load facts as nf4: QuantizationMethod"):
        load_quantized(facts, "nf4")


def test_an_engine_stands_for_what_can_be_loaded_here(monkeypatch, capsys):
    """And what is left out is said, with the reason."""
    assert deployed._loadable(("transformers",)) == ["nf4", "fp4", "int8", "hqq"]
    said = capsys.readouterr().err
    assert said == (
        "Left out: torchao-int4-g128 (transformers does not load it on every processor).\n"
    )
    assert deployed._loadable(("int8", "vllm")) == ["int8", "nf4", "int4-sym-g128"]
    assert (
        "Left out: mxfp4, nvfp4, awq-g128, autoround-g128, gptq-g128 (" in capsys.readouterr().err
    )

    def missing(self):
        raise ConfigError("The quantizer hqq needs hqq.")

    monkeypatch.setattr(type(get_quantizer("hqq")), "check_installed", missing)
    assert deployed._loadable(("transformers",)) == ["nf4", "fp4", "int8"]
    assert "Left out: hqq (The quantizer hqq needs hqq)." in capsys.readouterr().err
    assert deployed._loadable(("hqq",)) == ["hqq"]  # named itself: an error, where it is loaded
    assert capsys.readouterr().err == "" and deployed._loadable(()) == []
