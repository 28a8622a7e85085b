"""The benchmark: the fair stop, resuming after a kill, side by side, and the table's figures."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import bench_script
import numpy as np
import pytest
import torch
from conftest import SHIPPED
from distributed import LocalCluster

from mansu_interp.audit.cad import judge_erasure
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.relearning import relearn
from mansu_interp.bench import disruption as disrupting
from mansu_interp.bench import measure as measuring
from mansu_interp.bench import trial as trials
from mansu_interp.bench.config import BenchConfig
from mansu_interp.bench.disruption import LastWithin, disruption, disruption_text
from mansu_interp.bench.results import DevScores, TrialResult
from mansu_interp.bench.run import best_retained, most_forgotten, run_bench
from mansu_interp.bench.scoreboard import spread, write_scoreboard
from mansu_interp.bench.table import TableRow
from mansu_interp.bench.trial import make_trial
from mansu_interp.bench.workers import engine
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.cli.main import parse
from mansu_interp.errors import ArtifactError, ConfigError, MansuError, MaskError
from mansu_interp.evaluation.scores import Flips
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import BASELINES, NPO, UNDO, get_method
from mansu_interp.unlearning.unlearn import unlearn
from mansu_interp.utils.shipped import DATA
from mansu_interp.utils.words import p_value

SCRIPT = Path(__file__).with_name("bench_script.py")


def try_(forget: float, retain: float, choice: float = 1.0) -> DevScores:
    return DevScores(forget, retain, choice)


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        # The best retained of those that reach the level, though another forgot more.
        ([try_(0.30, 0.9), try_(0.10, 0.8), try_(0.9, 1.0)], (0, True)),
        ([try_(0.29, 0.8), try_(0.30, 0.9), try_(0.31, 1.0)], (1, True)),
        # Ties: four-way retention, then the smallest step.
        ([try_(0.2, 0.9, 0.95), try_(0.1, 0.9, 0.97)], (1, True)),
        ([try_(0.2, 0.9), try_(0.1, 0.9)], (0, True)),
        # None reaches it: the one that forgot most, and said so.
        ([try_(0.9, 1.0), try_(0.5, 0.2)], (1, False)),
        # A failed try never wins over one that ran.
        ([None, try_(1.0, 0.1)], (1, False)),
    ],
)
def test_the_fair_stop(tries: list[DevScores | None], expected: tuple[int, bool]):
    assert best_retained(tries, 0.30) == expected


def test_the_try_that_forgot_most_within_a_budget():
    assert most_forgotten([try_(0.9, 1.0), try_(0.3, 0.2), None]) == 1
    assert most_forgotten([try_(0.3, 0.8), try_(0.3, 0.9), try_(0.3, 0.9)]) == 1


def test_disruption_by_hand(tiny_model: Callable[[int], LanguageModel]):
    """Token by token, without padding."""
    model, edited = tiny_model(2), tiny_model(2).copy()
    edited.weights["lm_head.weight"].mul_(1.2)
    text = [(3, 4, 5, 6), (7,), *[(k, 9) for k in range(1, 20)]]
    each = []
    for row in text:
        with torch.no_grad():
            p, q = (
                m.hf(torch.tensor([row])).logits[0].double().softmax(-1) for m in (model, edited)
            )
        each += (p * (p / q).log()).sum(-1).tolist()
    assert len(each) == 43
    assert disruption(model, edited, text) == pytest.approx(sum(each) / 43, rel=1e-4)
    assert disruption(model, model.copy(), text) == 0


def test_disruption_is_measured_on_text_that_is_not_trained_on(capitals: Task):
    kind, rows = disruption_text(capitals)
    prompts = {p.clean for s in capitals.scored["dev"]["retain"].values() for p in s}
    assert kind == "retained prompts" and len(rows) == 64 and set(rows) <= prompts
    assert not prompts & {p.clean for p in capitals.retain}
    text = {"train": ((1, 2),), "unseen": (tuple(range(200)), (5, 6))}
    assert disruption_text(replace(capitals, text=text)) == (
        "running text", [tuple(range(128)), (5, 6)],
    )  # fmt: skip


def test_the_last_step_within_a_budget(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """Also after steps beyond it; NaN is never within; the original, if none is."""
    path = {2: 0.0, 4: 0.02, 6: 0.01, 8: 0.5, 10: float("nan")}
    name, found = "model.norm.weight", []
    monkeypatch.setattr(disrupting, "disruption", lambda *_: found[-1])
    for budget, step in ((0.01, 6), (0.02, 6), (0.001, 2), (1.0, 8)):
        last = LastWithin(facts, capitals, budget)
        for done, kl in path.items():
            model = facts.copy()
            model.weights[name].fill_(done)
            found.append(kl)
            last.look(model, done)
        assert last.step == step and float(last.model.weights[name][0]) == step
        assert [look.steps for look in last.looks] == list(path)
    last = LastWithin(facts, capitals, 1e-9)
    found.append(0.5)
    last.look(facts.copy(), 2)
    assert last.step == 0 and last.model is facts


@pytest.mark.slow
@pytest.mark.parametrize("method", ["graddiff", "mansu"])
def test_a_trial_at_a_disruption_budget(
    facts: LanguageModel,
    capitals: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
):
    """The step chosen is within the budget, and no later one is; its checkpoint is that model."""
    monkeypatch.setattr(trials, "unlearn", unlearn)
    shipped = Circuit.load(SHIPPED / "facts-capitals.json")
    pairs = capitals.forget.sample(8, 0)
    monkeypatch.setattr(trials, "find_circuit", lambda *_: replace(shipped, pairs=pairs))
    bench = BenchConfig(out=tmp_path, disruption=0.003, steps=12)
    trial = make_trial(bench, facts, "capitals", method, 0, None, 3.0)
    found = trials.attempt(trial)
    assert found.training and found.dev and found.disruption and found.disruption.kl is not None
    looks, step = {x.steps: x.kl for x in found.disruption.looks}, found.training.steps
    assert list(looks) == [2, 4, 6, 8, 10, 12] and 0 < step < 12
    assert looks[step] <= 0.003 and all(kl > 0.003 for k, kl in looks.items() if k > step)
    assert found.disruption.kl == pytest.approx(looks[step], rel=1e-3)
    if method == "graddiff":  # whose steps do not depend on how many there will be
        config = replace(trial.config.unlearn, steps=step)
        alone = unlearn(facts, capitals, None, config, seed=0).model
        saved = load_model(trial.checkpoint)
        for n, w in alone.weights.items():
            assert torch.equal(w.bfloat16().float(), saved.weights[n]), n


@pytest.mark.slow
def test_a_benchmark_at_a_disruption_budget(tmp_path: Path):
    """As many tries for each method, said in the table; no level; what is done stays done."""
    settings: dict[str, Any] = {"disruption": 0.05, "relearn_steps": 0}
    rows = run_bench(bench_script.config(tmp_path, 1, 2, **settings))
    assert [(r.method, r.level, r.tries, r.disruption_budget) for r in rows] == [
        (m, None, 2, 0.05) for m in ("graddiff", "ga") for _ in range(2)
    ]
    # The stand-ins look at nothing but the end: graddiff's is far beyond, ga's within.
    assert [r.steps for r in rows] == [0, 0, 7, 7]
    assert [r.reached for r in rows] == [False, False, True, True]
    assert rows[0].disruption == 0 and rows[0].forget_choice == rows[0].forget_choice_original
    assert rows[2].disruption is not None and 0 < rows[2].disruption <= 0.05
    text = (tmp_path / "scoreboard.md").read_text()
    assert "## facts, capitals, disruption at most 0.05, nf4" in text
    assert "2 step sizes tried for each method. KL is measured on retained prompts." in text
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {line["level"] for line in table} == {""} and {line["tries"] for line in table} == {"2"}
    assert run_bench(bench_script.config(tmp_path, 1, 2, **settings)) == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table.csv", "scoreboard.html", "trials", "work", "bench.json"])
def test_a_folder_of_others_is_not_written_to(tmp_path: Path, name: str):
    mine = tmp_path / name
    if "." in name:
        mine.write_text("mine")
    else:
        mine.mkdir()
    with pytest.raises(ArtifactError, match=r"that no benchmark wrote|cannot be read as JSON"):
        run_bench(BenchConfig(out=tmp_path, table_only=True))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_a_benchmark_knows_its_own_folder(tmp_path: Path):
    config = BenchConfig(out=tmp_path, table_only=True)
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        assert run_bench(config) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "bench.json").write_text('{"kind": "other"}')
    with pytest.raises(ArtifactError, match="is no benchmark's"):
        run_bench(config)


FEW = ("npo", "sure", "original")


def test_a_trial_is_named_by_all_that_decides_it(facts: LanguageModel, tmp_path: Path):
    config = BenchConfig(out=tmp_path)
    trial = make_trial(config, facts, "capitals", "npo", 0, 0.3, 1.0)
    own = trial.config.unlearn
    assert isinstance(own, NPO) and own.retain_weight == 1.0
    assert own.lr == 1e-4 and own.stop_at == 0.3
    mansu = make_trial(config, facts, "capitals", "mansu", 0, 0.3, 3.0).config.unlearn
    assert mansu.lr == pytest.approx(3 * 0.06)  # of the task's own
    own = make_trial(config, facts, "countries", "mansu", 0, 0.3, 1.0).config.unlearn
    assert own.retain_weight == 3.0  # the task's own
    others = [
        make_trial(config, facts, "capitals", "npo", 1, 0.3, 1.0),
        make_trial(config, facts, "capitals", "ga", 0, 0.3, 1.0),
        make_trial(config, facts, "capitals", "npo", 0, 0.9, 1.0),
        make_trial(config, facts, "capitals", "npo", 0, 0.3, 3.0),
        make_trial(replace(config, steps=9), facts, "capitals", "npo", 0, 0.3, 1.0),
        make_trial(config, facts, "countries", "npo", 0, 0.3, 1.0),
        make_trial(replace(config, disruption=0.01), facts, "capitals", "npo", 0, None, 1.0),
        make_trial(replace(config, disruption=0.1), facts, "capitals", "npo", 0, None, 1.0),
        replace(trial, sha256="another"),
    ]
    assert len({c.key for c in [trial, *others]}) == 10
    same = replace(config, quantizers=("nf4",), seeds=(5,), methods=("npo",), jobs=3)
    assert make_trial(same, facts, "capitals", "npo", 0, 0.3, 1.0).key == trial.key


def test_what_a_task_says_of_mansu_leaves_trials_of_baselines_valid(
    facts: LanguageModel, tmp_path: Path
):
    """And of the original; its batch size and circuit concern them, too."""
    file, config = tmp_path / "task.json", BenchConfig(out=tmp_path)
    spec = json.loads((DATA / "tasks" / "capitals.json").read_text())

    def keys(**settings: Any) -> list[str]:
        file.write_text(json.dumps({**spec, "settings": settings}))
        trials = [make_trial(config, facts, str(file), m, 0, 0.3, 1.0) for m in ("mansu", *FEW)]
        return [c.key for c in trials]

    usual = keys()
    told = keys(damage_damping=7.0, subject_rows=True, unlearn={"training_margin": 1.0, "lr": 0.5})
    assert told[0] != usual[0] and told[1:] == usual[1:]
    for changed in (keys(unlearn={"batch_size": 8}), keys(circuit={"top": 9})):
        assert not set(changed) & set(usual)


def test_run_and_bench_train_the_same_baseline(facts: LanguageModel, tmp_path: Path):
    """At the same step size and steps the settings are equal, whatever the task says of MANSU."""
    bench = BenchConfig(out=tmp_path, steps=40)
    for task in ("capitals", "countries"):
        for method in BASELINES:
            trial = make_trial(bench, facts, task, method, 3, 0.3, 2.0)
            own = get_method(method)()
            words = (
                f"run --task {task} --method {method} --unlearn.lr {2 * own.lr} --unlearn.steps 40"
            )
            if isinstance(own, UNDO):  # a multiple of its noise, too
                words += f" --unlearn.noise {2 * own.noise}"
            run = parse([*words.split(), "--unlearn.stop-at", "0.3", "--seed", "3"])
            assert trial.config.unlearn == run.unlearn, (task, method)
            assert trial.config.seed == run.seed
        batch = default_config("facts", task).unlearn.batch_size
        assert run.unlearn.batch_size == batch


def test_a_new_setting_at_its_default_leaves_trials_valid():
    usual = {"a": 1, "nested": {"b": 2, "new": 0}, "other": 5}
    given = {"a": 9, "nested": {"b": 3, "new": 0}, "other": 5}
    assert trials._differences(given, usual) == {"a": 9, "nested": {"b": 3}}


def test_a_circuit_is_found_once_for_each_tokenizer(
    facts: LanguageModel, capitals: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that was found on another tokenizer is no error in the midst of a benchmark."""
    shipped, found = Circuit.load(SHIPPED / "facts-capitals.json"), []
    monkeypatch.setattr(trials, "discover", lambda *_, **__: found.append(1) or shipped)
    trial = make_trial(BenchConfig(out=tmp_path), facts, "capitals", "npo", 0, 0.3, 1.0)
    other = facts.copy()
    other.tokenizer = copy.deepcopy(facts.tokenizer)
    other.tokenizer.add_tokens(["unheard of"])
    for model in (facts, facts, other, other):
        bench_script.find_circuit(trial, model, capitals)
    assert len(found) == 2


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TableRow]]:
    out = tmp_path_factory.mktemp("bench")
    return out, run_bench(bench_script.config(out, 1, 2))


@pytest.mark.slow
def test_figures_are_those_of_the_saved_checkpoint(
    ran: tuple[Path, list[TableRow]], facts: LanguageModel, capitals: Task
):
    out, rows = ran
    assert [(r.method, r.seed) for r in rows] == [
        (m, s) for m in ("graddiff", "ga") for s in (0, 1)
    ]
    unseen = capitals.scored["unseen"]["forget"]["capital"]
    for row in rows:
        (folder,) = (out / "work" / "facts-capitals").glob(
            f"{row.method}-*x{row.strength:g}-s{row.seed}-*"
        )
        saved = load_model(folder)
        before, after = accuracy(saved, unseen), accuracy(quantize(saved), unseen)
        assert row.forget_choice == before.choice and row.forget_top1 == before.top1
        assert row.gap_choice == pytest.approx(after.choice - before.choice, abs=1e-12)
        assert row.gap_top1 == pytest.approx(after.top1 - before.top1, abs=1e-12)
        flips = Flips.between(before.first, after.first)
        assert (row.back, row.gone, row.p) == (flips.back, flips.gone, flips.p)
        assert row.back - row.gone == round(row.gap_choice * before.n)
        noise = saved.weights[bench_script.NAME] - facts.weights[bench_script.NAME]
        moved = int((noise != 0).sum())
        assert row.edited_share == pytest.approx(moved / facts.n_parameters)
        assert row.forgets == (max(before.choice, after.choice) <= 0.35)
        attack = RelearnConfig(steps=(2,), seed=row.seed)
        back = relearn(saved, capitals, config=attack).up_to(2)
        assert row.relearnt_choice == back and row.erased == (back <= 0.40)
        judged = judge_erasure(facts, saved, capitals, seed=row.seed)
        assert (row.cad, row.cad_score) == (judged.verdict, judged.cad)
    dense, weak = rows[0], rows[2]
    assert dense.reached and dense.forgets and not dense.retains
    assert not weak.reached and not weak.searched and not weak.forgets
    assert dense.update_over_bin > 10 and weak.update_over_bin < 1
    assert dense.noise_over_signal < 0.3 * weak.noise_over_signal
    # Only the winner of each search is kept, and the losers' results are.
    assert len(list((out / "work" / "facts-capitals").iterdir())) == 4
    assert len(list((out / "trials" / "facts-capitals").glob("*.json"))) == 1 + 4 + 2


@pytest.mark.slow
def test_results_round_trip_and_damaged_ones_are_refused(
    ran: tuple[Path, list[TableRow]], tmp_path: Path
):
    files = sorted((ran[0] / "trials" / "facts-capitals").glob("*.json"))
    for file in files:
        TrialResult.load(file).save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == json.loads(file.read_text())
    (original,) = [f for f in files if f.name.startswith("original")]
    data = json.loads(original.read_text())
    found = TrialResult.load(original)
    assert found.measured and not found.measured.graphs and found.training is None
    assert [str(v) for v in found.measured.scores[0].models] == ["original", "original nf4"]
    for key, value, message in (
        ("schema", 1, "has schema 1, expected 2. Delete it to run the trial again"),
        ("sha256", None, "sha256: .* Delete it to run the trial again"),
        ("measured", {"scores": []}, "measured.perplexity: Field required .and 4 more"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**data, key: value}))
        with pytest.raises(ArtifactError, match=message):
            TrialResult.load(tmp_path / "bad.json")


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    ran: tuple[Path, list[TableRow]], monkeypatch: pytest.MonkeyPatch
):
    out, rows = ran

    def never(*_: Any) -> None:
        raise AssertionError("trained or scored again")

    monkeypatch.setattr(trials, "unlearn", never)
    monkeypatch.setattr(trials, "evaluate", never)
    monkeypatch.setattr(measuring, "evaluate", never)
    assert run_bench(bench_script.config(out, 1, 2)) == rows


@pytest.mark.slow
def test_another_attack_is_measured_without_training_or_scoring_again(
    ran: tuple[Path, list[TableRow]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done, rows = ran
    out = Path(shutil.copytree(done, tmp_path / "bench"))

    def never(*_: Any) -> None:
        raise AssertionError("trained or scored again")

    monkeypatch.setattr(trials, "unlearn", never)
    monkeypatch.setattr(trials, "evaluate", never)
    monkeypatch.setattr(measuring, "evaluate", never)
    again = run_bench(bench_script.config(out, 1, 2, relearn_steps=1))
    assert [r.forget_choice for r in again] == [r.forget_choice for r in rows]
    assert [r.relearnt_choice for r in again] != [r.relearnt_choice for r in rows]


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_is_trained_again_and_nothing_measured_is_lost(
    ran: tuple[Path, list[TableRow]], tmp_path: Path
):
    done, rows = ran
    out = Path(shutil.copytree(done, tmp_path / "bench"))
    shutil.rmtree(out / "work")
    again = run_bench(bench_script.config(out, 1, 2, relearn_steps=1))
    own = ("relearnt_choice", "relearnt_top1", "erased", "seconds", "peak_gb")
    blank = dict.fromkeys(own)
    assert [replace(r, **blank) for r in again] == [replace(r, **blank) for r in rows]


@pytest.mark.slow
def test_a_failed_try_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(model: Any, task: Any, mask: Any, config: Any, **given: Any) -> Any:
        if config.method == "ga":
            raise MaskError("nothing to edit.")
        return bench_script.fake_unlearn(model, task, mask, config, **given)

    monkeypatch.setattr(trials, "unlearn", fails)
    rows = run_bench(bench_script.config(tmp_path, 1, 1, strengths=(1.0,)))
    assert rows[1].error == "nothing to edit." and rows[0].error is None
    assert rows[1].forget_choice is None and rows[1].lr > 0
    assert "failed: nothing to edit." in (tmp_path / "scoreboard.md").read_text()


def start(out: Path, jobs: int, seeds: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(out), str(jobs), str(seeds)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_any_moment_and_side_by_side_the_table_is_the_same(
    ran: tuple[Path, list[TableRow]], tmp_path: Path
):
    """A run with two workers, killed each time another trial has come, then left to finish."""
    trials = tmp_path / "trials"

    def whole() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in trials.rglob("[!.]*.json")}

    for wanted in (1, 4):
        process = start(tmp_path, 2, 2)
        end = time.monotonic() + 600
        while len(whole()) < wanted and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert all(json.loads(text) for text in whole().values())
    kept = {k: json.loads(v) for k, v in whole().items()}
    assert len(kept) > 0
    process = start(tmp_path, 2, 2)
    assert process.communicate(timeout=900)[0].split() == ["4", "2"]
    for name, found in kept.items():  # tries that were done have not been done again
        assert json.loads(Path(name).read_text())["training"] == found["training"]
    ours, theirs = (
        list(csv.DictReader((folder / "table.csv").open())) for folder in (tmp_path, ran[0])
    )
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() - {"seconds", "peak_gb"}:
            assert a[key] == b[key], key


@pytest.mark.slow
def test_pages(ran: tuple[Path, list[TableRow]], tmp_path: Path):
    _, rows = ran
    write_scoreboard(tmp_path, [replace(r, method=f"<b>{r.method}") for r in rows])
    page = (tmp_path / "scoreboard.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;graddiff" in page
    assert page.count("<svg") == 5
    assert "default-src 'none'" in page
    assert not [w for w in ("<script", "src=", "href=", "url(") if w in page]
    assert "@media (max-width:600px)" in page  # tables become lists there
    text = (tmp_path / "scoreboard.md").read_text()
    (line,) = [x for x in text.splitlines() if "graddiff" in x and "e-0" in x]
    assert spread([r.forget_choice for r in rows[:2]]) in line
    counts = ", ".join(f"{r.back}/{r.gone}" for r in rows[:2])
    assert f"{counts} ({p_value(min(r.p for r in rows[:2]))})" in line
    write_scoreboard(tmp_path, [replace(r, p=None) for r in rows])
    assert "(p " not in (tmp_path / "scoreboard.md").read_text()
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert list(table[0]) == [f.name for f in fields(TableRow)]
    assert len(table) == 4 and float(table[0]["forget_choice"]) == rows[0].forget_choice


def test_spread_by_hand():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert spread([0.5, None], 1, 100) == "50.0"
    assert spread([None]) == "–"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seeds": ()}, "seeds needs one or more different values"),
        ({"levels": (0.3, 0.3)}, "levels needs one or more different values"),
        ({"methods": ("magic",)}, "Unknown method 'magic'; available: mansu"),
        ({"disruption": 0.0}, "disruption must be above 0; got 0.0"),
        (
            {"disruption": 0.01, "levels": (0.2,)},
            "Nothing stops at a level with a disruption budget; got levels",
        ),
        ({"strengths": (0.0,)}, r"strengths must be above 0; got \(0\.0,\)"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        BenchConfig(**settings)


def test_unknown_quantizer_before_any_work(tmp_path: Path):
    with pytest.raises(ConfigError, match="Unknown quantizer 'q9'"):
        run_bench(BenchConfig(quantizers=("q9",), out=tmp_path))
    assert not list(tmp_path.iterdir())


# Where a sweep is computed: here, on workers of our own, on a running cluster, or nowhere.


def work(item: int) -> tuple[int, int]:
    """An item, squared, and who did it."""
    if item < 0:
        raise MansuError(f"{item} is negative")
    if item == 0:
        os._exit(1)
    return item * item, os.getpid()


def squares(found: list[tuple[int, int]]) -> list[int]:
    return sorted(square for square, _ in found)


def test_one_process_does_all_itself():
    with engine() as compute:
        assert list(compute(work, [3, 1])) == [(9, os.getpid()), (1, os.getpid())]


@pytest.mark.slow
def test_workers_of_our_own_and_what_they_raise():
    with engine(2) as compute:
        found = list(compute(work, [1, 2, 3, 4]))
        assert squares(found) == [1, 4, 9, 16]
        assert os.getpid() not in {pid for _, pid in found}
        with pytest.raises(MansuError, match="-1 is negative"):
            list(compute(work, [-1]))
        with pytest.raises(MansuError, match=r"Workers died.*What is finished is kept"):
            list(compute(work, [0]))


def test_a_running_cluster_by_address_or_file(tmp_path: Path):
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        file = tmp_path / "scheduler.json"
        file.write_text(f'{{"address": "{cluster.scheduler_address}"}}')
        for scheduler in (cluster.scheduler_address, str(file)):
            with engine(scheduler=scheduler) as compute:
                assert squares(list(compute(work, [2, 3]))) == [4, 9]


def test_workers_with_threads_are_refused():
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        pytest.raises(ConfigError, match="Start the workers with --nthreads 1"),
        engine(scheduler=cluster.scheduler_address),
    ):
        pass


@pytest.mark.parametrize("scheduler", ["nonsense://x", "no-such-file.json"])
def test_no_scheduler_there(scheduler: str):
    with (
        pytest.raises(ConfigError, match=f"No Dask scheduler answers at '{scheduler}'"),
        engine(scheduler=scheduler),
    ):
        pass


def test_without_dask_one_process_works_and_more_name_the_install_line(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with engine() as compute:
        assert squares(list(compute(work, [2]))) == [4]
    with (
        pytest.raises(
            ConfigError, match=r'Working side by side needs.*pip install "mansu-interp\[sweep\]"'
        ),
        engine(2),
    ):
        pass


def test_bench_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it once, with --jobs"):
        run_bench(BenchConfig(out=tmp_path))


@pytest.mark.slow
def test_a_table_needs_no_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "distributed", None)
    config: dict[str, Any] = {"methods": ("ga",), "out": tmp_path, "jobs": 2}
    assert run_bench(BenchConfig(table_only=True, **config)) == []


@pytest.mark.slow
def test_a_run_and_the_benchmark_have_one_mask_of_the_whole_model(
    facts: LanguageModel, capitals: Task
):
    """That of a circuit of every edge, though no circuit is looked for."""
    config = default_config("facts", "capitals", method="mansu-whole-model")
    assert "circuit" not in config.unlearn.needs
    trial = make_trial(BenchConfig(), facts, "capitals", "mansu-whole-model", 0, 0.35, 1.0)
    every = Circuit(facts.graph, np.zeros(facts.graph.exists.shape, np.float32), facts.graph.exists)
    of_run, of_bench = (make_mask(c, facts, capitals) for c in (config, trial.config))
    own = default_config("facts", "capitals")
    of_circuit = make_mask(own, facts, capitals, Circuit.load(SHIPPED / "facts-capitals.json"))
    for mask in (of_bench, make_mask(own, facts, capitals, every)):
        assert mask.indices.keys() == of_run.indices.keys()
        assert all(torch.equal(i, of_run.indices[n]) for n, i in mask.indices.items())
    assert of_circuit.n_parameters == of_run.n_parameters
    assert of_circuit.indices.keys() < of_run.indices.keys()  # some weights are in no circuit
