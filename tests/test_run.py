"""A whole run in small: its files, what it refuses, and that it can be interrupted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.errors import ArtifactError, ModelError
from mansu_interp.export.ledger import Ledger
from mansu_interp.export.verify import verify
from mansu_interp.masks.mask import Mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.report.terminal import console_summary
from mansu_interp.report.values import figure
from mansu_interp.runs import run as pipeline
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.plan import Plan
from mansu_interp.runs.run import RunResult, run
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.utils.files import read_json

CIRCUIT = CircuitConfig(pairs=8, ig_steps=2, faithfulness=0.5, faithfulness_pairs=4)
UNLEARN = Mansu(steps=6, lr=0.1, batch_size=8)
FILES = {
    "config.json",
    "provenance.json",
    "seconds.json",
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
    return RunConfig(model="facts", out=out, circuit=CIRCUIT, unlearn=UNLEARN, relearn_steps=4)


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CAD_PAIRS", 4)
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


def test_every_artefact_is_there(finished: RunResult):
    assert {p.name for p in finished.folder.iterdir()} == FILES


def test_erasure_is_judged_by_the_attack(finished: RunResult):
    """What half A brings back decides, not the attribution graph; the twin stands beside it."""
    assert finished.report["erasure"]["verdict"] in ("suppressed", "unchanged")
    curves = finished.report["relearning"]
    assert list(curves) == ["unlearned", "never taught"]
    assert all([steps for steps, _ in curve] == [0, 1, 4] for curve in curves.values())
    (erasure,) = [p for p in finished.report["properties"] if p["name"] == "structural erasure"]
    worst = max(choice for _, choice in curves["unlearned"])
    assert erasure["value"] == worst > 0.9  # three steps of unlearning erase nothing
    assert erasure["passed"] is False
    assert max(choice for _, choice in curves["never taught"]) < erasure["target"] == 0.4


def test_artefacts_say_the_same(finished: RunResult, facts: LanguageModel):
    folder = finished.folder
    report = read_json(folder / "report.json")
    assert report["model"]["sha256"] == facts.sha256
    assert read_json(folder / "config.json") == report["config"]
    circuit = Circuit.load(folder / "circuit.json")
    graph = nx.read_graphml(folder / "circuit.graphml")
    residual = {(u, v) for u, v, d in graph.edges(data=True) if d["kind"] == "residual"}
    assert report["circuit"]["edges"] == circuit.n_edges == len(residual)
    assert (circuit.edges == finished.circuit.edges).all()
    mask = Mask.load(folder / "mask.safetensors")
    mask.check_fits(facts)
    edit = report["edit"]
    assert 0 < edit["edited"] == edit["survived"] == sum(w["edited"] for w in edit["by_weight"])
    assert edit["collateral"] == 0
    assert edit["share"] == edit["edited"] / facts.n_parameters <= 0.005
    assert {w["weight"] for w in edit["by_weight"]} <= mask.indices.keys()
    assert len(report["properties"]) == 4
    assert {"original", "unlearned", "original nf4", "unlearned nf4"} == report["scores"][0][
        "models"
    ].keys()
    assert report["cad"]["verdict"] in (folder / "report.md").read_text(encoding="utf-8")
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


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

    class Stub:
        def generate(self, prompt: str) -> str:
            return f" {knows.answer_text} ." if prompt == knows.prompt else "?"

    shown = pipeline._samples(capitals, {"original": Stub(), "unlearned": Stub()})  # type: ignore[dict-item]
    first = shown[0]
    assert len(shown) == pipeline.SAMPLES
    assert (first["prompt"], first["answer"]) == (knows.prompt, knows.answer_text)
    assert [s["prompt"] for s in shown[1:3]] == [forget[0].prompt, forget[7].prompt]


def test_the_plan_comes_first(finished: RunResult, plans: list[Plan], stages: list[str]):
    (plan,) = plans
    text = "\n".join(plan.lines)
    assert "1,033,344 parameters" in text and "at most 5,166 parameters (0.50%), 6 steps" in text
    assert "cost     about" in text and str(finished.folder) in text
    assert plan.seconds > 0 and plan.memory_gb > 0
    order = list(dict.fromkeys(stages))
    wanted = ["attribution of forget pairs", "choosing parameters", "unlearning"]
    assert [s for s in order if s in wanted] == wanted


def test_a_finished_folder_is_refused(finished: RunResult):
    before = (finished.folder / "report.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"already holds this run, finished \(see .*html\)"):
        run(settings(finished.folder))
    assert (finished.folder / "report.json").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(finished: RunResult):
    with pytest.raises(ArtifactError, match=r"already holds another run or other files\. Name"):
        run(replace(settings(finished.folder), seed=1))


def test_a_foreign_folder_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    stages: list[str] = []
    with pytest.raises(ArtifactError, match="already holds another run or other files"):
        run(settings(tmp_path), lambda stage, *_: stages.append(stage))
    assert stages == [] and [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_input_leaves_no_folder(tmp_path: Path):
    with pytest.raises(ModelError, match="Unknown model 'fact'"):
        run(replace(settings(tmp_path / "run"), model="fact"))
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_continues_to_the_same_model(finished: RunResult, tmp_path: Path):
    config = settings(tmp_path / "second")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "unlearning" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, stop)
    kept = {p.name for p in config.out.iterdir()}
    begun = {"config.json", "provenance.json", "seconds.json"}
    assert kept == begun | {"circuit.json", "circuit.graphml", "mask.safetensors"}
    stages: list[str] = []
    again = run(config, lambda stage, *_: stages.append(stage))
    assert "attribution of forget pairs" not in stages and "unlearning" in stages
    name = "model/model.safetensors"
    assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes()
    same = ("verdict", "scores", "edit", "cad", "samples", "circuit")
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
    assert again.report["edit"] == finished.report["edit"]
    assert {p.name for p in out.iterdir()} == FILES


@pytest.mark.slow
def test_edits_of_the_embedding_are_counted_apart(tmp_path: Path):
    out = tmp_path / "rows"
    found = run(replace(settings(out), subject_rows=True, relearn_steps=0))
    edit, ledger = found.report["edit"], Ledger.load(out / "ledger.safetensors")
    assert 0 < edit["embedding"] < edit["edited"] == ledger.n_edits
    assert edit["survived"] == edit["edited"] - edit["embedding"]
    assert edit["share"] == ledger.n_edits / found.model.n_parameters <= edit["budget"]
    own = {t for p in load_task("capitals", found.model).forget for t in p.clean}
    rows = ledger.tensors[f"{found.model.embedding_name}|index"] // found.model.d_model
    assert set(rows.tolist()) <= own
    text = (out / "report.md").read_text()
    assert f"| of these in the embedding, which is not quantized | {edit['embedding']:,} |" in text
    kept = verify(load_model("facts"), load_model(out / "model"), (), ledger, found.mask)
    assert kept.status == 0 and kept.embedding["nf4"].edited == edit["embedding"]


@pytest.mark.slow
def test_the_report_says_what_the_margins_took_and_reached(tmp_path: Path):
    config = settings(tmp_path / "quantization_margin")
    unlearning = replace(
        config.unlearn, final_margin=0.1, quantization_margin=0.5, margin_budget=0.25
    )
    found = run(replace(config, relearn_steps=0, unlearn=unlearning))
    edit = found.report["edit"]
    assert (
        0.45 <= edit["quantization_margin_reached"] < 0.55
        and 0 < edit["quantization_margin_edits"] <= found.mask.limit / 8
    )
    assert 0 < edit["final_margin_edits"] <= found.mask.limit / 8
    reached = figure(edit["quantization_margin_reached"], 2)
    said = f"{edit['quantization_margin_edits']:,} edits, {reached} of 0.50 nats"
    assert (
        f"| for the quantization_margin | {said} |"
        in (tmp_path / "quantization_margin/report.md").read_text()
    )
    summary = console_summary(found.report, 100)
    assert f"Reserve: {said}." in summary
    above = figure(edit["above_target"], 2)
    said = f"{edit['final_margin_edits']:,} edits, {above} nats above a target of"
    assert (
        f"| to final_margin it | {said} −0.10 |"
        in (tmp_path / "quantization_margin/report.md").read_text()
    )
    assert f"Deepened: {said} −0.10." in " ".join(summary.split())


@pytest.mark.slow
def test_every_quantizer_of_the_set_is_scored_in_full(tmp_path: Path):
    """Retention after each of them, too; one that nothing is promised for on forget prompts."""
    survive = replace(UNLEARN, survive=("fp4", "int4-g32"), steps=2)
    config = replace(settings(tmp_path / "set"), unlearn=survive, relearn_steps=0)
    report = run(replace(config, quantizers=("q8_0",))).report
    precisions = ("", " nf4", " fp4", " int4-g32")
    every = {f"{m}{p}" for p in precisions for m in ("original", "unlearned")}
    assert all(row["models"].keys() == every for row in report["scores"])
    gap = report["properties"][2]
    assert gap["sentence"].startswith("nf4, fp4 and int4-g32 changed")
    listed = {q["name"]: q for q in report["quantizers"]}
    assert list(listed) == ["nf4", "fp4", "int4-g32", "q8_0"]
    forget = [r["models"] for r in report["scores"] if r["role"] == "forget"]
    for key in ("choice", "top1"):
        now = sum(m["unlearned fp4"][key] for m in forget) / len(forget)
        assert listed["fp4"][key]["unlearned"] == now
    assert gap["value"] == pytest.approx(
        max(listed[q][k]["gap"] for q in ("nf4", "fp4", "int4-g32") for k in ("choice", "top1"))
    )
