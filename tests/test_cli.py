"""The command line from outside: it starts light, and bad input is one clear line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mansu_interp.cli.main import parse
from mansu_interp.runs.command import command_line
from mansu_interp.runs.defaults import default_config

ROOT = Path(__file__).resolve().parents[1]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *args], env=env, cwd=ROOT, check=False, capture_output=True, text=True
    )


def mansu(*args: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "mansu_interp", *args)


def test_importing_loads_no_library():
    heavy = "torch transformers transformer_lens networkx numpy tyro"
    code = f"import sys, mansu_interp; print([m for m in {heavy.split()} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_every_public_name_can_be_had():
    code = "import mansu_interp as m; [getattr(m, n) for n in m.__all__]; m.nonsense"
    error = python("-c", code).stderr
    assert error.strip().endswith("module 'mansu_interp' has no attribute 'nonsense'")


def test_help_loads_no_heavy_library():
    code = (
        "import sys\nfrom mansu_interp.cli.main import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'transformer_lens') if m in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_help_explains_itself():
    assert (
        "{run,bench,plan,verify,relearn,cad,delta,apply,export,task,list}" in mansu("--help").stdout
    )
    text = mansu("run", "--help").stdout
    assert "Share of all parameters that may be edited, in (0, 1]" in " ".join(
        text.replace("│", " ").split()
    )
    for option in ("--model", "--task", "--out", "--budget", "--seed", "--unlearn.method"):
        assert option in text


def test_list_names_what_ships():
    done = mansu("list")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["models"] == "facts"
    assert lines["methods"].startswith("mansu, mansu-random-mask, ")
    assert lines["methods"].endswith(", satimp, task-vector, sure")
    assert lines["quantizers"].startswith("nf4, ") and "q4_0" in lines["quantizers"]
    assert "task        capitals: Forget the capital of every country" in done.stdout
    assert "reference" not in done.stdout


def test_json_output_is_json_and_nothing_else():
    found = json.loads(mansu("list", "--json").stdout)
    assert found["models"] == ["facts"] and "mansu" in found["methods"]
    assert found["tasks"]["capitals"].startswith("Forget the capital")
    cost = json.loads(mansu("plan", "--json", "--tokens", "8").stdout)
    assert cost["edges"] == 1055 and cost["backward"] > 0


def test_help_teaches_by_example_and_without_colour():
    done = mansu("--help")
    assert "mansu run --task my-task.json" in done.stdout and "--json" in done.stdout
    assert "\x1b[" not in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion(shell: str):
    done = mansu("--tyro-print-completion", shell)
    assert done.returncode == 0, done.stderr
    assert "mansu" in done.stdout and "--budget" in done.stdout


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from mansu_interp.cli.progress import Progress, duration

    assert [duration(s) for s in (3.4, 65, 7440)] == ["3 s", "1 min 05 s", "2 h 04 min"]
    quiet, plain = Progress(quiet=True), Progress()
    quiet("scores", 1, 2)
    assert capsys.readouterr().err == ""
    plain("scores", 1, 2)
    plain("scores", 2, 2)
    assert capsys.readouterr().err == "scores ...\n"
    plain.printed -= plain.EVERY
    plain("scores", 2, 2)
    plain("scores", 2, 2)
    assert capsys.readouterr().err == "scores  2/2  0 s, 0 s left\n"
    plain.close()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    bars = Progress()
    bars("reading [b]states[/b]", 1, 0)
    bars("unlearning", 1, 4)
    bars.close()
    text = capsys.readouterr().err
    assert "reading [b]states[/b]" in text and "unlearning" in text and "1/" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "fact"], "mansu: Unknown model 'fact'. Shipped: facts"),
        (["--task", "capital"], "mansu: Unknown task 'capital'. Shipped: capitals, countries"),
        (["--budget", "0"], "The budget is a share of all parameters in (0, 1]; got 0.0."),
        (["--budget", "1.5"], "The budget is a share of all parameters in (0, 1]; got 1.5."),
        (["--unlearn.steps", "0"], "steps and batch_size must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, args: list[str], message: str):
    done = mansu("run", "--out", str(tmp_path / "run"), *args)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = mansu("run", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"mansu: {tmp_path} already holds another run or other files. Name another --out."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("words", ["run --help", "list"])
def test_a_reader_that_has_seen_enough(words: str):
    """mansu run --help | head -1, and one that reads nothing at all: no stack trace."""
    for reader in ("head -1", "true"):
        line = f"{sys.executable} -u -m mansu_interp {words} | {reader}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        done = subprocess.run(
            line, shell=True, env=env, check=False, capture_output=True, text=True
        )
        assert done.stderr == ""


def test_unknown_option():
    done = mansu("run", "--no-such-option", "1")
    assert done.returncode == 2
    assert "no-such-option" in done.stderr


@pytest.mark.parametrize("task", ["capitals", "countries"])
def test_a_report_names_the_command_that_makes_it(task: str):
    """Every kind of setting, read back by the command line itself."""
    config = default_config("facts", task)
    config = replace(
        config,
        subject_rows=not config.subject_rows,
        by_layer=True,
        budget=0.02,
        quantizers=("fp4", "q4_0"),
        circuit=replace(config.circuit, top=800),
        unlearn=replace(
            config.unlearn, survive=("nf4", "fp4"), adversarial_steps=30, training_margin=-1.5
        ),
    )
    _, *words = shlex.split(command_line(config))
    assert parse(words) == config


def test_robust_settings_of_a_task(tmp_path: Path):
    """What the task file says, options beside it winning; a report names the short command."""
    config = parse(["run", "--robust", "--unlearn.steps", "9"])
    assert config == replace(
        default_config(robust=True),
        unlearn=replace(default_config(robust=True).unlearn, steps=9),
    )
    assert (
        config.subject_rows and config.unlearn.adversarial_steps == 30 and config.unlearn.lr == 0.03
    )
    assert command_line(config) == "mansu run --robust --model facts --unlearn.steps 9"
    both = parse(["run", "--robust", "--task", "countries"])
    assert (
        both.unlearn.adversarial_steps == 30 and both.unlearn.probe_weight == 0.1
    )  # of its usual settings


def test_robust_where_there_is_no_such_thing(tmp_path: Path):
    done = mansu("run", "--task", "world-capitals", "--robust", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "Task 'world-capitals' has no settings against relearning" in done.stderr
    done = mansu("list", "--robust")
    assert done.returncode == 1
    assert done.stderr.strip() == "mansu: --robust is for run; leave it out here."
    rows = tmp_path / "my.jsonl"
    rows.write_text("{}\n")
    done = mansu("run", "--task", str(rows), "--robust", "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "no settings against relearning" in done.stderr
