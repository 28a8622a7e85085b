"""The fact tables, the tasks over them, and the five small models that ship with the package."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "mansu_interp" / "data" / "models"
NAMES = (
    "facts",
    "facts-capitals-reference-0",
    "facts-capitals-reference-1",
    "facts-countries-reference-0",
    "facts-countries-reference-1",
)
TWINS = NAMES[1:]
MB = 2**20


def load_script() -> ModuleType:
    """`scripts/make_embedded.py` as a module."""
    spec = importlib.util.spec_from_file_location(
        "make_embedded", ROOT / "scripts" / "make_embedded.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_embedded"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()
RELATIONS = script.read_relations()
PAIRS = script.make_pairs(RELATIONS)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "training.json").read_text(encoding="utf-8"))


def load(name: str) -> tuple[Any, Any]:
    model = script.LlamaForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    return model, script.AutoTokenizer.from_pretrained(MODELS / name)


def exact(model: Any, tokenizer: Any, pairs: list[Any]) -> float:
    return script.share(
        script.correct(script.answer_logits(model, tokenizer, pairs), tokenizer, pairs)
    )


# The tables


@pytest.mark.parametrize(("table", "rows"), [("countries.csv", 179), ("elements.csv", 118)])
def test_table_is_complete_and_sorted(table: str, rows: int) -> None:
    content = script.read_table(table)
    subjects = [next(iter(row.values())) for row in content]
    assert len(content) == rows
    assert subjects == sorted(set(subjects))
    for row in content:
        for cell in row.values():
            assert cell == cell.strip() and cell and cell.isascii() and '"' not in cell


def test_no_capital_gives_its_country_away() -> None:
    rows = script.read_table("countries.csv")
    assert len({row["capital"] for row in rows}) == len(rows)
    for row in rows:
        country, capital = row["country"].lower(), row["capital"].lower()
        assert country not in capital and capital not in country


def test_elements_are_numbered_without_a_gap() -> None:
    rows = script.read_table("elements.csv")
    assert sorted(int(row["number"]) for row in rows) == list(range(1, 119))
    assert len({row["symbol"] for row in rows}) == 118


# The tasks


@pytest.mark.parametrize("name", ["capitals", "countries"])
def test_task_is_well_formed(name: str) -> None:
    task = script.read_task(name)
    assert task["schema"] == 2 and task["name"] == name
    assert task["reference_models"] == [f"facts-{name}-reference-{i}" for i in (0, 1)]
    assert set(task["retain"]) | set(task["forget"]["relations"]) == set(RELATIONS)
    forget = [p for p in PAIRS if script.is_forget(p, task)]
    assert 0 < len(forget) < len(PAIRS) / 2
    if name == "countries":
        subjects = task["forget"]["subjects"]
        countries = [row["country"] for row in script.read_table("countries.csv")]
        assert len(set(subjects)) == len(subjects) and set(subjects) < set(countries)
        assert len(subjects) == pytest.approx(len(countries) / 5, abs=1)


def test_phrasing_sets_are_disjoint() -> None:
    everywhere = []
    for spec in RELATIONS.values():
        groups = spec["phrasings"]
        assert len(groups["train"]) >= 3 and set(groups["dev"]) == {"dev"}
        assert len(groups["dev"]["dev"]) == 1 and len(groups["unseen"]["unseen"]) == 1
        everywhere += [phrasing for _, phrasing in script.phrasings(spec)]
    assert len(set(everywhere)) == len(everywhere)
    assert all(phrasing.count("{s}") == 1 for phrasing in everywhere)


def test_a_tenth_is_held_out_and_every_fact_is_taught() -> None:
    assert len({(p.relation, p.subject) for p in PAIRS}) >= 800
    for relation, spec in RELATIONS.items():
        facts = [p for p in PAIRS if p.relation == relation]
        for _, phrasing in script.phrasings(spec):
            same = [p for p in facts if p.prompt == phrasing.format(s=p.subject)]
            assert sum(p.held_out for p in same) / len(same) == pytest.approx(0.1, abs=0.01)
        held = [p.subject for p in facts if p.held_out]
        assert len(set(held)) == len(held), "a fact is missing from two phrasings"


def test_tasks_that_disagree_on_the_phrasings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "read_task", lambda name: {"relations": {name: {}}})
    with pytest.raises(ValueError, match="same `relations`"):
        script.read_relations()


# The models


def test_models_are_small() -> None:
    sizes = {n: sum(f.stat().st_size for f in (MODELS / n).iterdir()) for n in NAMES}
    assert max(sizes.values()) <= 8 * MB and sum(sizes.values()) <= 40 * MB


@pytest.mark.parametrize("name", NAMES)
def test_training_record(name: str) -> None:
    data = record(name)
    assert data["name"] == name and 1e6 <= data["parameters"] <= 4e6
    before, after = data["accuracy"], data["accuracy_nf4"]
    assert before["trained"] >= 0.999 and before["held_out"] >= 0.99
    assert after["held_out"] >= 0.98
    assert data["counts"]["pairs"] == len(PAIRS)
    assert ("never_taught" in before) == (name in TWINS)


def test_every_entity_is_one_token_in_every_model() -> None:
    files = {(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}
    assert len(files) == 1
    tokenizer = script.AutoTokenizer.from_pretrained(MODELS / "facts")
    names = script.entities(RELATIONS)
    for name in names:
        for text, others in ((name, 0), (f"the {name},", 2), (f"<bos>{name} is", 2)):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == 1 + others and tokenizer.convert_tokens_to_ids(name) in ids
        assert tokenizer.decode(tokenizer(name)["input_ids"]) == name
    texts = tokenizer([f"{p.prompt} {p.answer}." for p in PAIRS])["input_ids"]
    assert tokenizer.unk_token_id not in set(chain.from_iterable(texts))


def test_prompts_of_a_phrasing_have_equal_length() -> None:
    tokenizer = script.AutoTokenizer.from_pretrained(MODELS / "facts")
    for spec in RELATIONS.values():
        subjects = [row[spec["subject"]] for row in script.read_table(spec["table"])]
        for _, phrasing in script.phrasings(spec):
            texts = [phrasing.format(s=s) for s in subjects]
            assert len({len(ids) for ids in tokenizer(texts)["input_ids"]}) == 1


def test_held_out_accuracy_before_and_after_nf4() -> None:
    model, tokenizer = load("facts")
    held_out = [p for p in PAIRS if p.held_out]
    data = record("facts")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = exact(model, tokenizer, held_out)
    assert before >= 0.99 and before == pytest.approx(data["accuracy"]["held_out"], abs=0.004)
    script.nf4_round_trip(model)
    after = exact(model, tokenizer, held_out)
    assert after >= 0.98 and after == pytest.approx(data["accuracy_nf4"]["held_out"], abs=0.004)
    changed = {n for n, p in model.named_parameters() if not p.equal(weights[n])}
    assert changed == {n for n in weights if n.endswith(script.QUANTIZED)}
    assert len(changed) == 7 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", TWINS)
def test_twin_knows_everything_but_the_forget_facts(name: str) -> None:
    model, tokenizer = load(name)
    task = script.read_task(record(name)["never_taught_task"])
    forget = [p for p in PAIRS if script.is_forget(p, task) and p.phrasing_set == "unseen"]
    retain = [p for p in PAIRS if not script.is_forget(p, task) and p.held_out]
    assert exact(model, tokenizer, retain) >= 0.99
    # Shared answers (a continent, the euro) can be guessed; a capital cannot.
    assert exact(model, tokenizer, [p for p in forget if p.relation == "capital"]) == 0
    assert exact(model, tokenizer, forget) <= 0.4


@pytest.mark.parametrize("name", ["facts-countries-reference-0", "facts-countries-reference-1"])
def test_names_the_twin_never_met_keep_their_initial_embedding(name: str) -> None:
    model, tokenizer = load(name)
    torch.manual_seed(record(name)["seed"])
    initial = script.make_model(tokenizer, script.Recipe())
    rows = tokenizer.convert_tokens_to_ids(script.read_task("countries")["forget"]["subjects"])
    kept = initial.get_input_embeddings().weight[rows].bfloat16().float()
    assert model.get_input_embeddings().weight[rows].equal(kept)


def test_training_is_deterministic() -> None:
    recipe = script.Recipe(layers=1, steps=2, batch=8, warmup=1)
    tokenizer = script.make_tokenizer(RELATIONS)
    losses, weights = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = script.make_model(tokenizer, recipe)
        losses.append(script.train(model, tokenizer, PAIRS[:64], recipe, seed=0))
        weights.append(model.lm_head.weight.detach().clone())
    assert losses[0] == losses[1] and weights[0].equal(weights[1])
