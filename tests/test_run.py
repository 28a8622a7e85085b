"""A whole run in small: its files, what it refuses, and that it can be interrupted."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import make_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.known import Known, known_forget
from mansu_interp.bench.config import BenchConfig
from mansu_interp.circuits import attribution
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import (
    ArtifactError,
    CircuitError,
    ConfigError,
    ModelError,
    ResourceError,
    TaskError,
)
from mansu_interp.evaluation import scores
from mansu_interp.evaluation.scores import Perplexity
from mansu_interp.evaluation.versions import (
    EDITED,
    NEVER_TAUGHT,
    NEVER_TAUGHT_RELEARNED,
    ORIGINAL,
    RELEARNED,
)
from mansu_interp.export.ledger import Ledger
from mansu_interp.export.verify import verify
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import empty_model, load_model
from mansu_interp.report.records import Report
from mansu_interp.report.values import figure
from mansu_interp.runs import erasure as erasing
from mansu_interp.runs import measure as measuring
from mansu_interp.runs.command import settings_lines
from mansu_interp.runs.config import PlanConfig, RunConfig
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.runs.folder import Results, RunFolder
from mansu_interp.runs.planning import cost, memory, seconds, timing
from mansu_interp.runs.planning.cost import Plan, estimate, plan_lines
from mansu_interp.runs.planning.knowledge import what_is_known
from mansu_interp.runs.planning.memory import Job
from mansu_interp.runs.planning.memory import stages as memory_by_stage
from mansu_interp.runs.planning.seconds import Stages, measure_speed, passes
from mansu_interp.runs.planning.timing import Cost, Units
from mansu_interp.runs.run import RunResult, run
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import by_phrasing
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import METHODS, GradDiff, Mansu
from mansu_interp.unlearning.unlearn import unlearn
from mansu_interp.utils.files import LOCK, read_json, write_json
from mansu_interp.utils.shipped import DATA
from mansu_interp.utils.tensors import tensors_sha256

CIRCUIT = CircuitConfig(pairs=8, ig_steps=2, faithfulness=0.5, faithfulness_pairs=4)
UNLEARN = Mansu(steps=6, lr=0.1, batch_size=8)
FILES = {
    "config.json",
    "provenance.json",
    "seconds.json",
    "written.json",
    "circuit.json",
    "circuit.graphml",
    "mask.safetensors",
    "ledger.safetensors",
    "history.json",
    "model",
    "report.json",
    "report.md",
    "report.html",
}


def settings(out: Path) -> RunConfig:
    return RunConfig(
        model="facts", task="capitals", out=out, circuit=CIRCUIT, unlearn=UNLEARN, relearn_steps=4
    )


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasing, "CAD_PAIRS", 4)
        yield


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return []


@pytest.fixture(scope="module")
def stages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, plans: list[Plan], stages: list[str]
) -> RunResult:
    out = tmp_path_factory.mktemp("run") / "first"
    return run(settings(out), lambda stage, done, total: stages.append(stage), plans.append)


@pytest.mark.slow
def test_every_artefact_is_there(finished: RunResult):
    assert {p.name for p in finished.folder.iterdir()} == FILES


@pytest.mark.slow
def test_python_gives_the_edits_of_the_command(finished: RunResult, facts: LanguageModel):
    """The lines of the README, with the run's settings."""
    config = settings(finished.folder)
    task = load_task("capitals", facts, config.score_pairs)
    circuit = discover(facts, task.forget, config=config.circuit, retain=task.retain)
    mask = make_mask(config, facts, task, circuit)
    edited = unlearn(facts, task, mask, config.unlearn).model
    assert all(torch.equal(edited.weights[n], w) for n, w in finished.model.weights.items())
    assert mask.indices.keys() == finished.mask.indices.keys()  # type: ignore[union-attr]


@pytest.mark.slow
def test_erasure_is_judged_by_the_attack(finished: RunResult):
    """What half A brings back decides, not the attribution graph; the reference model stands
    beside it."""
    report = finished.report
    assert report.cad and report.cad.verdict in ("suppressed", "unchanged")
    curves = {c.model: c.points for c in report.relearning}
    assert list(curves) == [EDITED, NEVER_TAUGHT]
    assert all([p.steps for p in curve] == [0, 1, 4] for curve in curves.values())
    (erasure,) = [p for p in report.properties if p.name == "structural erasure"]
    worst = max(p.first for p in curves[EDITED])
    assert erasure.value == worst > 0.9  # three steps of unlearning erase nothing
    assert erasure.passed is False and erasure.headroom == pytest.approx(0.4 - worst)
    assert max(p.first for p in curves[NEVER_TAUGHT]) < erasure.target == 0.4
    assert f"structural erasure ({erasure.reason})" in report.verdict.sentence


@pytest.mark.slow
def test_artefacts_say_the_same(finished: RunResult, facts: LanguageModel):
    folder = finished.folder
    report = Report.load(folder / "report.json")
    assert report == Report.from_json(finished.report.to_json())
    assert report.model.sha256 == facts.sha256
    assert read_json(folder / "config.json") == report.config
    circuit = Circuit.load(folder / "circuit.json")
    graph = nx.read_graphml(folder / "circuit.graphml")
    residual = {(u, v) for u, v, d in graph.edges(data=True) if d["kind"] == "residual"}
    assert finished.circuit and report.circuit and report.graph
    assert report.circuit.edges == circuit.n_edges == len(residual)
    assert (circuit.edges == finished.circuit.edges).all()
    mask = Mask.load(folder / "mask.safetensors")
    mask.check_fits(facts)
    edit, (nf4,) = report.edit, report.quantizers
    assert 0 < edit.edited == sum(w.edited for w in edit.by_weight)
    assert nf4.name == "nf4" and nf4.promised
    assert nf4.survival.survived == nf4.survival.edited == edit.edited
    assert nf4.survival.collateral == 0
    assert edit.share == edit.edited / facts.n_parameters <= 0.005
    assert {w.weight for w in edit.by_weight} <= mask.indices.keys()
    assert len(report.properties) == 4
    every = {v.after(q) for v in (ORIGINAL, EDITED) for q in (None, "nf4")}
    assert set(report.scores[0].models) == every
    assert report.cad and report.cad.verdict in (folder / "report.md").read_text(encoding="utf-8")
    assert [c.model for c in report.comparison] == [
        EDITED,
        EDITED.after("nf4"),
        RELEARNED,
        NEVER_TAUGHT_RELEARNED,
        NEVER_TAUGHT,
    ]
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_checkpoint_loads_in_transformers(finished: RunResult):
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "model")
    assert model.dtype == torch.bfloat16
    ids = tokenizer("<bos>the capital of France is", add_special_tokens=False).input_ids
    assert ids == finished.model.encode("<bos>the capital of France is")
    edited = dict(model.named_parameters())
    for name, weight in finished.model.weights.items():
        assert torch.equal(edited[name].float(), weight), name


def test_samples_are_first_those_that_the_original_answers(capitals: Task):
    """A stub that answers one prompt of a set, the third that is tried."""
    (forget,) = capitals.scored["unseen"]["forget"].values()
    knows = forget[14]

    class Stub(LanguageModel):
        def __init__(self) -> None:
            pass

        def generate(self, prompt: str) -> str:
            return f" {knows.answer_text} ." if prompt == knows.prompt else "?"

    shown = measuring.samples(capitals, {ORIGINAL: Stub(), EDITED: Stub()})
    first = shown[0]
    assert len(shown) == measuring.SAMPLES
    assert (first.prompt, first.answer) == (knows.prompt, knows.answer_text)
    assert [o.model for o in first.outputs] == [ORIGINAL, EDITED]
    assert [s.prompt for s in shown[1:3]] == [forget[0].prompt, forget[7].prompt]


@pytest.mark.slow
def test_the_plan_comes_first(finished: RunResult, plans: list[Plan], stages: list[str]):
    (plan,) = plans
    text = "\n".join(plan.lines)
    assert "1,033,344 parameters" in text and "at most 5,166 parameters (0.50%), 6 steps" in text
    assert "known    179 of 179 facts known, 0 partly, 0 unknown\n" in text
    assert "100% first of four, 100% predicted: '<bos>" in text and "(unseen)\n" in text
    assert "         100.0%, 100.0% after nf4 of the unseen prompts\nretain   100.0% " in text
    assert "settings " in text and "--unlearn.steps 6" in text and "(given)" in text
    assert "cost     about" in text and "stages   discover " in text
    assert str(finished.folder) in text
    assert plan.stages.keys() <= finished.seconds.keys() and plan.seconds > 0 and plan.memory_gb > 0
    order = list(dict.fromkeys(stages))
    wanted = ["attribution of forget pairs", "choosing parameters", "unlearning"]
    assert [s for s in order if s in wanted] == wanted


@pytest.mark.slow
def test_a_finished_folder_is_refused(finished: RunResult):
    before = (finished.folder / "report.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"already holds this run, finished \(see .*html\)"):
        run(settings(finished.folder))
    assert (finished.folder / "report.json").read_bytes() == before


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(finished: RunResult):
    with pytest.raises(ArtifactError, match=r"with other settings: seed was 0, now 1\. Name"):
        run(replace(settings(finished.folder), seed=1))


def test_a_foreign_folder_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    stages: list[str] = []
    with pytest.raises(ArtifactError, match="already holds another run or other files"):
        run(settings(tmp_path), lambda stage, *_: stages.append(stage))
    assert stages == [] and [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


ASKED = {
    "train": "<bos>the capital of {} is",
    "unseen": "<bos>question: what is the capital of {}? answer:",
}
KEPT = {
    "train": "<bos>the language of {} is",
    "unseen": "<bos>question: which language is spoken in {}? answer:",
}


def write_rows(file: Path, capitals: Callable[[int, list[str]], str], turn: int = 0) -> str:
    """Rows of 40 countries: the k-th is said to have some capital, and the language of the country
    ``turn`` places further."""
    with (DATA / "facts" / "countries.csv").open(encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))[:40]
    right = [c["capital"] for c in table]
    rows = [
        {"role": role, "split": split, "prompt": text.format(c["country"]), "answer": answer,
         "subject": c["country"]}
        for k, c in enumerate(table)
        for role, asked, answer in (
            ("forget", ASKED, capitals(k, right)),
            ("retain", KEPT, table[(k + turn) % 40]["language"]),
        )
        if answer
        for split, text in asked.items()
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def test_what_was_not_known_is_not_forgotten(tmp_path: Path):
    """Six wrong capitals beside known languages; random weights; wrong languages: refused before
    there is a folder."""
    out = tmp_path / "out"

    def refused(message: str, **changed: str) -> None:
        with pytest.raises(TaskError, match=message):
            run(replace(settings(out), **changed))
        assert not out.exists()

    wrong = write_rows(tmp_path / "w.jsonl", lambda k, right: right[(k + 1) % 6] if k < 6 else "")
    refused(
        r"facts does not know what task 'w' is to forget: four-way accuracy 0\.\d+ on 6 facts, and "
        r"guesses do as well with p = 0\.\d+ \(at most 0\.05 .* What was not known cannot be forg",
        task=wrong,
    )
    languages = write_rows(tmp_path / "l.jsonl", lambda k, right: right[k], turn=7)
    refused("facts does not know what task 'l' is to retain.*cannot be retained", task=languages)
    model = load_model("facts")
    torch.manual_seed(0)
    for weight in model.weights.values():
        if weight.ndim > 1:
            weight.copy_(torch.randn_like(weight) * weight.std())
    model.save(tmp_path / "random")
    refused("random does not know what task 'capitals' is to forget: four-way accuracy 0.2",
            model=str(tmp_path / "random"), task="capitals")  # fmt: skip


def test_the_plan_says_where_each_setting_comes_from(facts: LanguageModel):
    config = default_config("facts", "capitals")
    first, second = settings_lines(config, facts)
    assert first == (
        "settings --unlearn.lr 0.06 --unlearn.quantization-margin 0.1 (of task capitals)"
    )
    assert second.startswith("         --budget 0.005 --unlearn.batch-size 48 ")
    assert "--unlearn.lr" not in second and "--device cpu (" in second
    given = replace(config, budget=0.02, unlearn=replace(config.unlearn, lr=0.01))
    lines = settings_lines(given, facts)
    assert lines[1] == "         --budget 0.02 --unlearn.lr 0.01 (given)"
    robust = default_config("facts", "capitals", robust=True)
    lines = settings_lines(replace(robust, seed=3), facts)
    assert lines[0].endswith("(of task capitals with --robust)")
    assert "--subject-rows" in lines[0] and lines[1] == "         --seed 3 (given)"
    baseline = default_config("facts", "capitals", method="npo")
    assert settings_lines(baseline, facts)[0].startswith("settings --budget 0.005 --unlearn.lr ")


def test_unknown_facts_are_left_out_of_a_run(facts: LanguageModel, tmp_path: Path):
    """Six wrong capitals among forty: they are neither trained on nor scored, and are counted."""
    file = write_rows(tmp_path / "t.jsonl", lambda k, right: right[(k + 1) % 6 if k < 6 else k])
    task, known = what_is_known(facts, load_task(file, facts), ["nf4"], 0, lambda *_: None)
    # One of the six is right by chance, in the one phrasing: not known, and not left out either.
    assert str(known.forget) == "34 of 40 facts known, 1 partly, 5 unknown"
    first, *phrasings, last, retain = known.lines()
    assert ", 5 unknown, left out: " in first
    assert last == "         100.0%, 100.0% after nf4 of the unseen prompts"
    assert retain == "retain   100.0% first of four, 40 prompts sampled"
    assert len(phrasings) == len(known.phrasings) == 2
    trained, unseen = known.phrasings
    assert (
        not trained.unseen
        and unseen.unseen
        and unseen.choice == 1
        and unseen.top1 == pytest.approx(34 / 35)
    )
    asked = Known.of(facts, [p for p in load_task(file, facts).forget])
    assert trained.choice == pytest.approx(sum(asked.right.values()) / 40)
    assert trained.top1 == pytest.approx(sum(asked.predicted.values()) / 40) == 34 / 40
    assert phrasings[1].startswith("         88% first of four, 85% predicted: '<bos>")
    assert known.retain.unknown == set()
    assert len(task.forget) == len(task.held_out) == 35
    assert task.dropped == {"the original does not know the fact": 5}
    assert known_forget(facts, task)[0] is task  # asked again, nothing more is left out


def test_bad_input_leaves_no_folder(tmp_path: Path):
    with pytest.raises(ModelError, match="Unknown model 'fact'"):
        run(replace(settings(tmp_path / "run"), model="fact"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_model(finished: RunResult, tmp_path: Path):
    config = settings(tmp_path / "second")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "unlearning" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, stop)
    kept = {p.name for p in config.out.iterdir()}
    begun = {"config.json", "provenance.json", "seconds.json", "written.json"}
    assert kept == begun | {"circuit.json", "circuit.graphml", "mask.safetensors"}
    stages: list[str] = []
    again = run(config, lambda stage, *_: stages.append(stage))
    assert "attribution of forget pairs" not in stages and "unlearning" in stages
    name = "model/model.safetensors"
    assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes()
    same = ("verdict", "scores", "edit", "cad", "comparison", "samples", "circuit")
    reports = [read_json(r.folder / "report.json") for r in (again, finished)]
    for key in same:
        assert reports[0][key] == reports[1][key], key


@pytest.mark.slow
def test_a_run_stopped_before_its_report_keeps_the_model(finished: RunResult, tmp_path: Path):
    out = tmp_path / "third"
    shutil.copytree(finished.folder, out)
    for name in ("report.json", "report.md", "report.html"):
        (out / name).unlink()
    stages: list[str] = []
    again = run(settings(out), lambda stage, *_: stages.append(stage))
    assert "unlearning" not in stages
    assert again.report.edit == finished.report.edit
    assert {p.name for p in out.iterdir()} == FILES


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped while scoring, and in the midst of the attack: at most one result is lost."""
    out, did = tmp_path / "run", Counter[str]()
    shutil.copytree(finished.folder, out)
    for name in ("report.json", "report.md", "report.html"):
        (out / name).unlink()

    def counted(module: Any, name: str) -> None:
        true = getattr(module, name)

        def call(*given: Any, **more: Any) -> Any:
            did[name] += 1
            return true(*given, **more)

        monkeypatch.setattr(module, name, call)

    counted(scores, "accuracy")
    counted(erasing, "relearn")
    counted(erasing, "judge_erasure")

    def go(stop: tuple[str, int] | None = None) -> RunResult | None:
        """One go, which ends there; counts what is done after the check of what is known."""

        def step(stage: str, done: int, total: int) -> None:
            if stage == "quantizing":
                did.clear()
            if (stage, done) == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            return run(settings(out), step)

    go((f"scores of {EDITED}", 3))  # of the third version, after six scores of each before it
    kept = read_json(out / "results.json")["results"]
    assert len(kept) == did["accuracy"] == 15
    go((f"relearning {NEVER_TAUGHT} at 0.001", 2))
    n = len(finished.report.scores) * 4
    assert did == {"accuracy": n - 15, "judge_erasure": 1, "relearn": 2}
    again = go()
    assert did == {"relearn": 1} and {p.name for p in out.iterdir()} == FILES
    assert again and again.report == replace(finished.report, config=again.report.config)
    assert "results.json" not in read_json(out / "written.json")["files"]


def test_results_of_another_model_or_of_others_are_not_used(tmp_path: Path):
    folder = RunFolder(tmp_path)
    (tmp_path / LOCK).write_text(str(os.getpid()))
    keep = Results(folder, "a")
    first, second = (Perplexity(ORIGINAL, x) for x in (3.25, None))
    assert keep("p", Perplexity, lambda: first) == first
    assert keep("p", Perplexity, lambda: second) == first
    assert Results(folder, "a")("p", Perplexity, lambda: second) == first
    folder.check()
    assert Results(folder, "b")("p", Perplexity, lambda: second) == second
    altered(tmp_path / "results.json")
    with pytest.raises(ArtifactError, match=r"results\.json was changed after this run wrote it"):
        RunFolder(tmp_path).check()
    write_json(tmp_path / "results.json", {"of": "b", "results": {"p": {"value": "high"}}})
    with pytest.raises(ArtifactError, match="does not hold what it should"):
        Results(folder, "b")("p", Perplexity, lambda: second)
    folder.remove("results.json")
    assert "results.json" not in RunFolder(tmp_path).files


def altered(file: Path) -> None:
    """One byte, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


OURS = sorted(
    {*FILES} - {"config.json", "seconds.json", "model", "written.json", "provenance.json"}
) + [f"model/{name}.json" for name in ("config", "tokenizer", "generation_config")]


@pytest.mark.slow
def test_a_later_go_trusts_only_what_the_run_wrote(finished: RunResult, tmp_path: Path):
    """Every file, altered, replaced by another of the run, or put there."""
    begun = tmp_path / "begun"
    shutil.copytree(finished.folder, begun)
    (begun / "report.html").unlink()
    out = tmp_path / "run"

    def refused(change: Callable[[Path], object]) -> str:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        change(out)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        folder = RunFolder(out)
        with pytest.raises(ArtifactError) as caught:
            folder.check()
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        return str(caught.value)

    for name in {*OURS} - {"report.html"}:
        changed = f"{out / name} was changed after this run wrote it. Delete "
        assert changed in refused(lambda o, name=name: altered(o / name))
        assert changed in refused(lambda o, name=name: shutil.copy(o / "config.json", o / name))
    more = refused(lambda o: (o / "model" / "modeling.py").write_text("x"))
    assert f"model/modeling.py was not written by this run. Delete {out / 'model'} and run" in more
    assert "lacks model/tokenizer.json" in refused(lambda o: (o / "model/tokenizer.json").unlink())
    assert "html was changed after this" in refused(lambda o: (o / "report.html").write_text("x"))
    assert "not written by this run" in refused(lambda o: (o / "written.json").unlink())
    shutil.rmtree(out)
    shutil.copytree(begun, out)
    altered(out / "written.json")
    with pytest.raises(ArtifactError, match=r"written\.json (is not this run's|cannot be read)"):
        RunFolder(out)
    with pytest.raises(ArtifactError, match=r"written\.json (is not this run's|cannot be read)"):
        run(settings(out))


@pytest.mark.slow
def test_a_folder_that_is_removed_meanwhile_is_said(tmp_path: Path):
    config = settings(tmp_path / "run")

    def remove(stage: str, done: int, total: int) -> None:
        shutil.rmtree(config.out, ignore_errors=True)

    with pytest.raises(ResourceError, match=r"was removed (or taken over )?while"):
        run(config, remove)
    assert not config.out.exists()


def test_no_setting_may_be_infinite_or_no_number():
    """JSON has no such numbers: a run with one could never go on."""
    kinds = (*METHODS.values(), RunConfig, CircuitConfig, AttributionConfig, RelearnConfig)
    seen = 0
    for kind in (*kinds, BenchConfig):
        for item in fields(kind):
            usual = getattr(kind(), item.name)
            some = usual[0] if isinstance(usual, tuple) and usual else usual
            words = "Literal" in str(item.type)  # such as "float32"
            if not (isinstance(some, float) or ("float" in str(item.type) and not words)):
                continue
            for odd in (math.nan, math.inf, -math.inf):
                seen += 1
                with pytest.raises(ConfigError):
                    kind(**{item.name: (odd,) if isinstance(usual, tuple) else odd})
    assert seen > 100
    for seed in (1 << 64, -(1 << 64), 10**400):
        for kind, name in ((RunConfig, "seed"), (RelearnConfig, "seed"), (BenchConfig, "seeds")):
            with pytest.raises(ConfigError, match="must be at least"):
                kind(**{name: (seed,) if name == "seeds" else seed})


@pytest.mark.slow
def test_edits_of_the_embedding_are_counted_apart(tmp_path: Path):
    out = tmp_path / "rows"
    found = run(replace(settings(out), subject_rows=True, relearn_steps=0))
    edit, ledger = found.report.edit, Ledger.load(out / "ledger.safetensors")
    nf4 = found.report.quantizers[0].survival
    assert edit.budget and 0 < edit.embedding < edit.edited == ledger.n_edits
    assert nf4.survived == nf4.edited == edit.edited - edit.embedding
    assert edit.share == ledger.n_edits / found.model.n_parameters <= edit.budget
    own = {t for p in load_task("capitals", found.model).forget for t in p.clean}
    rows = ledger.tensors[f"{found.model.embedding_name}|index"] // found.model.d_model
    assert set(rows.tolist()) <= own
    text = (out / "report.md").read_text()
    assert f"| of these in the embedding, which is not quantized | {edit.embedding:,} |" in text
    kept = verify(load_model("facts"), load_model(out / "model"), (), ledger, found.mask)
    assert kept.status == 0 and kept.embedding["nf4"].edited == edit.embedding


@pytest.mark.slow
def test_the_report_says_what_the_margins_took_and_reached(tmp_path: Path):
    config = settings(tmp_path / "margins")
    unlearning = replace(
        config.unlearn, final_margin=0.1, quantization_margin=0.5, margin_budget=0.25
    )
    found = run(replace(config, relearn_steps=0, unlearn=unlearning))
    final, quantized = found.report.edit.final_margin, found.report.edit.quantization_margin
    assert found.mask and final and quantized and final.above is not None
    assert quantized.reached and 0.45 <= quantized.reached < 0.55
    assert 0 < quantized.edits <= found.mask.limit / 8
    assert 0 < final.edits <= found.mask.limit / 8
    markdown = (tmp_path / "margins/report.md").read_text()
    said = f"{quantized.edits:,} edits, {figure(quantized.reached, 2)} of 0.50 nats"
    assert f"| for the quantization margin | {said} |" in markdown
    said = f"{final.edits:,} edits, {figure(final.above, 2)} nats above a target of −0.10"
    assert f"| for the final margin | {said} |" in markdown


@pytest.mark.slow
def test_a_baseline_needs_no_circuit_and_no_mask(tmp_path: Path):
    unlearning = GradDiff(lr=1e-3, steps=2, batch_size=UNLEARN.batch_size)
    config = replace(settings(tmp_path / "dense"), unlearn=unlearning, relearn_steps=0)
    stages: list[str] = []
    found = run(config, lambda stage, *_: stages.append(stage))
    made = {"circuit.json", "circuit.graphml", "mask.safetensors"}
    assert {p.name for p in config.out.iterdir()} == FILES - made
    assert not [s for s in stages if "attribution" in s or "choosing" in s]
    report = found.report
    assert found.circuit is found.mask is report.circuit is report.graph is None
    assert report.comparison == () and report.edit.budget is None
    assert report.edit.edited > 0.5 * found.model.n_parameters
    assert not report.quantizers[0].promised
    text = (config.out / "report.html").read_text()
    assert "The circuit" not in text and "Attribution graphs" not in text
    with pytest.raises(ArtifactError, match="already holds this run, finished"):
        run(config)


@pytest.mark.slow
def test_the_plan_tells_what_training_through_costs(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """On its turns; each quantizer is timed once."""
    known = what_is_known(facts, capitals, (), 0, lambda *_: None)[1]
    asked: list[str] = []

    def slow(model: LanguageModel, name: str, *_: Any, **__: Any) -> LanguageModel:
        asked.append(name)
        time.sleep(0.1)
        return model

    monkeypatch.setattr(seconds, "quantize", slow)
    method = replace(UNLEARN, steps=3000, train_through=("q4_k_m", "hqq"))
    config = RunConfig(task="capitals", unlearn=method)
    plain = replace(config, unlearn=replace(method, train_through=()))
    found, without = (cost.plan(c, facts, capitals, known) for c in (config, plain))
    assert asked == ["q4_k_m", "hqq"]
    assert "through  q4_k_m, hqq, each quantized anew on its turns, 750 at most" in found.lines
    assert found.stages["unlearn"] > 150
    assert not any(line.startswith("through") for line in without.lines)


@pytest.mark.slow
def test_formats_that_training_goes_through_have_a_row(tmp_path: Path):
    unlearn = replace(UNLEARN, train_through=("q4_k_m",), steps=3)
    config = replace(settings(tmp_path / "through"), unlearn=unlearn, relearn_steps=0)
    nf4, q4 = run(config).report.quantizers
    assert (nf4.promised, nf4.trained_through) == (True, False)
    assert (q4.name, q4.promised, q4.trained_through) == ("q4_k_m", False, True)
    assert q4.survival.share_kept is not None
    wrong = replace(UNLEARN, train_through=("q4_0",))
    with pytest.raises(ConfigError, match="An edit can be made to survive q4_0: name it under"):
        run(replace(config, out=tmp_path / "wrong", unlearn=wrong))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_every_quantizer_of_the_set_is_scored_in_full(tmp_path: Path):
    """Retention after each of them, too, and after one that nothing is promised for, by which no
    property is judged."""
    survive = replace(UNLEARN, survive=("fp4", "int4-g32"), steps=2)
    config = replace(settings(tmp_path / "set"), unlearn=survive, relearn_steps=0)
    report = run(replace(config, quantizers=("q8_0",))).report
    precisions = (None, "nf4", "fp4", "int4-g32")
    every = {v.after(q) for q in (*precisions, "q8_0") for v in (ORIGINAL, EDITED)}
    assert all(set(row.models) == every for row in report.scores)
    assert all(p.sentence.endswith("not judged here: q8_0.") for p in report.properties[:3])
    card = (tmp_path / "set" / "model" / "README.md").read_text()
    assert card.count("name: four-way accuracy, after q8_0, not promised") == 2  # forget, retain
    gap = report.properties[2]
    assert "nf4, fp4 and int4-g32 changed" in gap.sentence
    listed = {q.name: q for q in report.quantizers}
    assert list(listed) == ["nf4", "fp4", "int4-g32", "q8_0"]
    assert [q.promised for q in report.quantizers] == [False, True, True, False]
    forget = [row for row in report.scores if row.role == "forget"]
    fp4 = EDITED.after("fp4")
    choice = sum(row[fp4].choice for row in forget) / len(forget)
    top1 = sum(row[fp4].top1 for row in forget) / len(forget)
    assert (listed["fp4"].choice.unlearned, listed["fp4"].top1.unlearned) == (choice, top1)
    gaps = [
        g for q in ("nf4", "fp4", "int4-g32") for g in (listed[q].choice.gap, listed[q].top1.gap)
    ]
    assert gap.value == pytest.approx(max(gaps))


# Costs said in advance, against published sizes and against what small models really take.

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
    """By hand: 1,057 writers x 32 tokens x 4,096 x 4 bytes a pair, 8 times 49 readers; 2 FLOP per
    weight and token, the input embedding's excepted."""
    how = AttributionConfig(pairs=20, batch_size=8, ig_steps=5)
    found = estimate(empty_model(write(tmp_path, "llama-3.1-8b")), how, 32)
    assert found.writers == 1 + 32 * 33
    assert found.readers == 32 * (32 + 8 + 8 + 1) + 1
    assert found.attribution_gb == pytest.approx(8 * (1057 + 8 * 49) * 32 * 4096 * 4 / 1e9)
    assert (found.batches, found.forward, found.backward) == (3, 21, 15)
    weights = 8_030_261_248 - 128256 * 4096
    assert found.pflop == pytest.approx(2 * weights * 32 * 20 * (7 + 5) / 1e15)
    tight = estimate(empty_model(write(tmp_path, "llama-3.1-8b")), replace(how, memory_gb=2.0), 32)
    assert tight.pairs_per_batch == 2
    assert tight.attribution_gb <= 2.0
    tight = estimate(empty_model(write(tmp_path, "llama-3.1-8b")), replace(how, memory_gb=0.4), 32)
    assert (tight.pairs_per_batch, tight.layers_at_once) == (1, 7)
    assert 0.38 < tight.attribution_gb <= 0.4


@pytest.mark.parametrize(
    ("method", "at"),
    [("eap", "corrupt"), ("eap", "both"), ("eap-ig", "corrupt"), ("eap-ig-activations", "corrupt")],
)
def test_passes_and_memory_are_those_of_a_real_run(
    tiny_model: TinyModel, method: Any, at: Any, monkeypatch: pytest.MonkeyPatch
):
    model, pairs = tiny_model(2), make_pairs((6,) * 5)
    how = AttributionConfig(method=method, at=at, ig_steps=3, batch_size=2, pairs=5)
    expected = estimate(model, how, 6)
    counts = {"forward": 0, "backward": 0}
    sizes: list[int] = []
    forward, difference = attribution.Stream.logits, attribution.difference
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

    # One pair is run some times to see that the model is rebuilt exactly; not counted.
    monkeypatch.setattr(attribution, "check_exact", lambda *_: None)
    monkeypatch.setattr(attribution.Stream, "logits", counted)
    monkeypatch.setattr(attribution, "difference", measured)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    attribution.attribute(model, pairs, config=how)
    assert counts == {"forward": expected.forward, "backward": expected.backward}
    rows = expected.writers + 8 * (expected.readers - 1) // 3  # three layers
    assert max(sizes) / 1e9 * rows / expected.writers == pytest.approx(expected.attribution_gb)
    assert len(sizes) == expected.batches
    assert expected.forward == passes(how, 3)[0] * 3


def test_memory_stage_by_stage(tmp_path: Path, facts: LanguageModel):
    """Of an 8B model, from its sizes; more quantizers cost codes, adversarial steps copies."""
    model = empty_model(write(tmp_path, "llama-3.1-8b"))
    whole, linear = 4 * 8.030, 4 * 6.979  # GB of all weights, and of the layers' linear ones

    def found(**how: Any) -> dict[str, float]:
        return {s.name: s.gb for s in memory_by_stage(model, Job(tokens=32, budget=0.0005, **how))}

    one, four = found(), found(method=Mansu(survive=("nf4", "fp4", "int4-g32", "q4_0")))
    assert one["mask"] == pytest.approx(whole + 3 * linear + 0.25 * linear, rel=0.1)
    assert found(by_layer=True)["mask"] < 0.5 * one["mask"]
    passes = 9.1  # 16 prompts of 32 tokens
    assert one["unlearning"] - passes == pytest.approx(2 * whole + linear, rel=0.05)
    assert four["unlearning"] - one["unlearning"] == pytest.approx(4 * 0.65 * 6.979, rel=0.2)
    hardened = found(method=Mansu(adversarial_steps=4))
    assert hardened["unlearning"] - one["unlearning"] == pytest.approx(3 * whole, rel=0.01)
    stages = {s.name: s for s in memory_by_stage(model, Job(tokens=32, budget=0.0005))}
    attack = stages["relearning"]
    assert attack.gb - attack.least > 3 * whole + linear  # other models, moments, activations
    assert attack.least < 0.5 * attack.gb and attack.on_device(attack.gb - 1) == attack.least
    assert attack.on_device(None) == attack.on_device(attack.gb) == attack.gb
    assert stages["unlearning"].least == stages["unlearning"].gb
    assert "relearning" not in found(attacked=False)
    assert list(found(method=GradDiff())) == [n for n in one if n not in ("circuit", "mask")]
    small = memory_by_stage(facts, Job(tokens=15))
    assert all(s.gb < 0.9 for s in small)


@pytest.mark.slow
def test_tokens_of_a_plan_are_those_that_pass_through_the_models(
    facts: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    """Of unlearning with eight steps; calls and tokens, forwards alone and with gradients."""
    task = load_task("capitals", facts, 20)
    how = Mansu(steps=8, batch_size=32, survive=("nf4", "q4_0"))
    config = RunConfig(model="facts", task="capitals", unlearn=how)
    passed = {name: 0 for name in ("forward_calls", "forward", "both_calls", "both")}
    own = torch.nn.Embedding.forward

    def forward(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        name = "both" if torch.is_grad_enabled() else "forward"
        passed[f"{name}_calls"] += 1
        passed[name] += ids.numel()
        return own(module, ids)

    mask = random_mask(facts, 0.001, survive=how.survive)
    assert facts.keeps_keys  # which takes some passes to find out
    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    unlearn(facts, task, mask, how)
    found = Stages(config, task, facts).unlearn()
    for name, n in passed.items():
        assert getattr(found, name) == pytest.approx(n, rel=0.15), name


@pytest.mark.slow
def test_work_by_stage(facts: LanguageModel):
    task = load_task("capitals", facts, 200)

    def found(**how: Any) -> dict[str, Units]:
        return Stages(RunConfig(model="facts", **how), task, facts).all()

    one, longer = found(), found(unlearn=Mansu(steps=500))
    assert found(relearn_steps=0)["relearn"] == Units()
    dense = found(unlearn=GradDiff())
    assert dense["discover"] == dense["mask"] == dense["compare"] == Units()
    short = found(unlearn=Mansu(steps=250))
    per_step = (longer["unlearn"].both - short["unlearn"].both) / 250
    before = found(unlearn=Mansu(steps=1))["unlearn"].both - per_step
    assert short["unlearn"].both == pytest.approx(250 * per_step + before)
    more = found(unlearn=Mansu(steps=250, final_margin=1.0))["unlearn"]
    assert more.both > short["unlearn"].both and more.forward > short["unlearn"].forward
    layered = found(by_layer=True)["mask"]
    assert layered.both == pytest.approx(3 * one["mask"].both)  # four layers, half way each
    fewer = found(relearn_steps=0)["compare"]  # without the two relearned graphs
    assert one["compare"].scored > 1.4 * fewer.scored
    speed = Units(forward=0.1, both=0.3, scored=0.5)
    assert (Units(forward=2, both=1) + Units(both=1, scored=3) * 2).seconds(speed) == (
        pytest.approx(4.1)
    )


def test_cost_counts_a_shared_prefix_once(facts: LanguageModel):
    pairs = list(load_task("capitals", facts, 20).forget)
    group = max(by_phrasing(pairs), key=len)
    lengths = [len(p.clean) for p in group]
    few, many = group[:2], group[:64]
    longest = max(lengths[:2])
    assert timing.cost(facts, [few]) == Cost(1, 2 * longest)  # too few to share
    found, longest = timing.cost(facts, [many]), max(lengths[:64])
    common = next(k for k, ids in enumerate(zip(*(p.clean for p in many), strict=False))
                  if len(set(ids)) > 1)  # fmt: skip
    common = min(common, min(lengths[:64]) - 1)
    assert common and found == Cost(2, 64 * (longest - common) + common, 1)
    assert timing.cost(facts, [few, many]) == timing.cost(facts, [few]) + found


@pytest.mark.slow
def test_speed_leaves_the_model_as_it_was(facts: LanguageModel):
    before = tensors_sha256(facts.weights)
    config = RunConfig(model="facts", circuit=CircuitConfig(batch_size=8))
    speed, _ = measure_speed(config, facts, load_task("capitals", facts, 20))
    assert speed.forward_calls < speed.both_calls and speed.scored_calls + speed.scored > 0
    assert min(speed.floored, speed.quantized, speed.coded, speed.stepped, speed.kept) > 0
    assert all(w.grad is None and not w.requires_grad for w in facts.weights.values())
    assert tensors_sha256(facts.weights) == before


def test_what_cannot_fit_is_refused_before_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "machine_gb", lambda device: 0.1)
    monkeypatch.setattr("mansu_interp.runs.run.what_is_known", never)
    with pytest.raises(ResourceError, match=r"needs about 0\.[78] GB, and this machine has 0\.1"):
        run(settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_card_lends_from_the_host_and_the_host_may_lack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """8B on a card of 80 GB: relearning leaves 117 GB to the host."""
    path = Path(write(tmp_path, "llama-3.1-8b"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    model = empty_model(str(path), dtype="bfloat16")
    job = Job(tokens=32, budget=0.0005, circuit=AttributionConfig(batch_size=8), by_layer=True)
    host = 200.0
    monkeypatch.setattr(memory, "machine_gb", lambda d: host if d.type == "cpu" else 80.0)
    assert model.device.type == "meta"  # in the place of a card
    memory.check_memory(model, job)
    assert memory.peak(model, job).on_device(80.0) < 80
    host = 64.0
    with pytest.raises(ResourceError, match=r"Relearning needs about 12\d\.\d GB, and beside meta"):
        memory.check_memory(model, job)


def test_the_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (limit, tmp_path / "none"))
    limit.write_text("max\n")
    whole = memory.machine_gb(cpu)
    assert whole is not None and whole > 0.5
    limit.write_text("500000000\n")
    assert memory.machine_gb(cpu) == 0.5
    assert memory.machine_gb(torch.device("meta")) is None


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("long work was begun")


def test_the_text_says_it_all(tmp_path: Path):
    path = write(tmp_path, "llama-3.1-8b")
    text = "\n".join(plan_lines(PlanConfig(str(path), 32)))
    for part in (
        "8,030,261,248 parameters",
        "805,681 edges",
        "1,057 writers",
        "32.1 GB of weights",
        "run      circuit ",
        "with 1 quantizer to survive and the settings of mansu run",
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
        plan_lines(PlanConfig("facts", 4096, attribution=AttributionConfig(memory_gb=0.001)))
    with pytest.raises(ConfigError, match="tokens must be at least 1; got 0"):
        PlanConfig(tokens=0)
