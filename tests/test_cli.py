"""The command line from outside: it starts light, and bad input is one clear line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mansu_interp import __version__
from mansu_interp.audit.config import SUITE, RelearnConfig
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.scores import Attribution
from mansu_interp.cli import console
from mansu_interp.cli.checkpoints import checkpoint_of, task_of
from mansu_interp.cli.main import COMMANDS, main, parse
from mansu_interp.errors import ArtifactError, ConfigError, TaskError, printable
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.runs.command import command_line
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.folder import REPORTS, check_folder, config_json
from mansu_interp.tasks.load import load_task
from mansu_interp.unlearning.methods import METHODS, NPO, Mansu
from mansu_interp.utils import renamed
from mansu_interp.utils.shipped import DATA
from mansu_interp.viz.view import circuit_view

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
    words = "run,report,bench,discover,attribute,view,compare,convert,plan,verify,relearn,cad,delta"
    assert f"{{{words},apply,export,evaluate,task,teach,metrics,list}}" in mansu("--help").stdout
    text = mansu("run", "--help").stdout
    assert "Share of all parameters that may be edited, in (0, 1]" in " ".join(
        text.replace("│", " ").split()
    )
    for option in ("--model", "--task", "--out", "--budget", "--seed", "--method"):
        assert option in text


@pytest.mark.parametrize("words", ["run", "run --method satimp", "run --method ga", "bench"])
def test_help_is_short_and_help_all_shows_the_rest(words: str):
    short, long = (mansu(*words.split(), f"--{kind}").stdout for kind in ("help", "help-all"))
    options = [
        [w for w in line.replace("│", " ").split()[:1] if w.startswith("--")]
        for line in short.splitlines()
    ]
    shown = [w.rstrip(",") for found in options for w in found]
    assert 8 <= len(shown) <= 14
    assert short.count("Example: mansu") == 1 and "--help-all shows every setting" in short
    assert all(w in long for w in shown) and len(long) > 1.3 * len(short)
    hidden = "--scheduler" if words == "bench" else "--circuit.ig-steps"
    assert hidden in long and hidden not in short


def test_help_shows_the_settings_of_the_method():
    text = mansu("run", "--method", "satimp", "--help").stdout
    assert "--unlearn.beta2 FLOAT" in text and "--unlearn.survive" not in text
    assert "(default: 0.0001)" in text  # its own learning rate
    usual = mansu("run", "--help").stdout
    assert "--unlearn.survive" in usual and "beta" not in usual and "(default: 0.12)" in usual


def test_every_command_has_help_all():
    for name in ("list", "task", "plan"):
        assert mansu(name, "--help-all").stdout == mansu(name, "--help").stdout


def test_without_a_command_there_is_help():
    done = mansu()
    assert done.returncode == 0 and done.stdout == mansu("--help").stdout


def test_list_names_what_ships():
    done = mansu("list")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["models"] == "facts"
    assert lines["methods"].startswith("mansu, mansu-random-mask, ")
    assert lines["methods"].endswith(", sure, npo-sam, repselect, undo, lora, durableun")
    assert lines["quantizers"].startswith("nf4, ") and "q4_0" in lines["quantizers"]
    assert "task        capitals: Forget the capital of every country" in done.stdout
    assert "reference" not in done.stdout


@pytest.mark.slow
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
    plain("scores", 0, 2)
    plain("scores", 2, 2)
    assert capsys.readouterr().err == "scores ...\n"
    for done, line in ((1, "scores  1/2  40 s, 40 s left\n"), (2, "scores  2/2  40 s\n")):
        plain.printed = plain.start = time.monotonic() - 40
        plain("scores", done, 2)
        plain("scores", done, 2)
        assert capsys.readouterr().err == line
    plain("resumed", 14, 30)  # what was done before took none of this time
    plain.printed = plain.start = time.monotonic() - 40
    plain("resumed", 16, 30)
    assert capsys.readouterr().err == "resumed ...\nresumed  16/30  40 s, 4 min 40 s left\n"
    plain.close()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    bars = Progress()
    bars("reading [b]states[/b]", 1, 0)
    bars("unlearning", 1, 4)
    bars.close()
    text = capsys.readouterr().err
    assert "reading [b]states[/b]" in text and "unlearning" in text and "1/" in text
    assert " left" not in text.splitlines()[-1]


def test_lines_come_every_three_seconds_for_ten_minutes_and_then_less_often(
    capsys: pytest.CaptureFixture[str],
):
    from mansu_interp.cli.progress import Progress

    plain = Progress()
    plain.closed.set()  # its clock
    plain("unlearning", 1, 100)
    capsys.readouterr()
    early, late, last = ((590, 2.5), (590, 2)), ((3600, 16), (3600, 14)), ((90_000, 61), (9e4, 59))
    for k, (spent, silent) in enumerate((*early, *late, *last)):
        told = k % 2 == 0
        now = time.monotonic()
        plain.start, plain.printed = now - spent, now - silent
        plain.beat()
        assert bool(capsys.readouterr().err) == told, (spent, silent)


def test_progress_begins_before_the_libraries_are_imported():
    code = """
import contextlib, sys
from mansu_interp.cli import circuits, commands, deployed, main
from mansu_interp.errors import MansuError
@contextlib.contextmanager
def stages(first, quiet=False):
    print(first, "torch" in sys.modules or "transformers" in sys.modules)
    raise MansuError("enough")
    yield
circuits.stages = commands.stages = deployed.stages = stages
for words in ("run", "bench", "discover", "attribute", "relearn m", "cad a b", "verify a b",
              "delta a b", "apply a b", "export a", "evaluate a"):
    assert main.main(words.split()) == 1, words
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 11 and all(line.endswith("False") for line in lines), lines


def test_a_stage_that_says_nothing_is_seen_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from mansu_interp.cli.progress import Progress

    monkeypatch.setattr(Progress, "OFTEN", 0.5)
    plain = Progress()
    plain("choosing parameters", 0, 0)
    assert capsys.readouterr().err == ""  # what fails at once is one line
    time.sleep(2.5)  # no call in between
    plain.close()
    first, *later = capsys.readouterr().err.splitlines()
    assert first == "choosing parameters ..." and later
    assert all(re.fullmatch(r"choosing parameters  \d s", line) for line in later)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "fact"], "mansu: Unknown model 'fact'. Shipped: facts"),
        (["--task", "capital"], "mansu: Unknown task 'capital'. Shipped: capitals, countries"),
        (["--budget", "0"], "The budget is a share of all parameters in (0, 1]; got 0.0."),
        (["--budget", "1.5"], "The budget is a share of all parameters in (0, 1]; got 1.5."),
        (["--unlearn.steps", "0"], "steps must be at least 1; got 0."),
        (["--unlearn.lr", "nan"], "lr must be above 0; got nan."),
        (["--method", "nop"], "Unknown method 'nop'; available: mansu, mansu-random-mask, "),
        (["--method", "mansu-whole"], "'mansu-whole' is now called 'mansu-whole-model'."),
        (["--method", "npo", "--robust"], "--robust chooses settings of mansu; leave it out with"),
        (["--unlearn.push", "1"], "--unlearn.push is now --unlearn.ranking-weight."),
        (["--hold=2"], "--hold is now --retain-gradient-weight."),
        (["--hardened"], "--hardened is now --robust."),
        (["--unlearn.method", "npo"], "--unlearn.method is now --method."),
        (
            ["--unlearn.baseline.npo-beta", "0.2"],
            "--unlearn.baseline.npo-beta is now --unlearn.beta of the method npo.",
        ),
        (["--unlearn.seed", "1"], "--unlearn.seed is now --seed, one for the whole run."),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, args: list[str], message: str):
    done = mansu("run", "--out", str(tmp_path / "run"), *args)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert message in lines[-1]
    assert all(line.startswith("loading model and task ") for line in lines[:-1])  # if it is slow
    assert not (tmp_path / "run").exists()


def test_the_settings_that_differ_are_named(tmp_path: Path):
    """At most three, with both values, and what goes on with the old ones."""
    old = replace(default_config("facts", "capitals"), out=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json(old)))
    check_folder(old)
    one = replace(old, seed=1, device="cpu")
    with pytest.raises(ArtifactError) as error:
        check_folder(one)
    assert str(error.value) == (
        f"{tmp_path} already holds another run, with other settings: seed was 0, now 1. The same "
        "command as before goes on with it; for this one, name another --out."
    )
    circuit, unlearn = replace(old.circuit, pairs=7), replace(old.unlearn, survive=("q4_0",))
    many = replace(one, budget=0.5, task="countries", circuit=circuit, unlearn=unlearn)
    with pytest.raises(ArtifactError, match=r"budget was .*; seed was 0, now 1; and 2 more\. The"):
        check_folder(many)
    nested = replace(old, circuit=circuit, unlearn=unlearn)
    was = rf'pairs was {old.circuit.pairs}, now 7; unlearn.survive was \["nf4"\], now \["q4_0"\]'
    with pytest.raises(ArtifactError, match=was):
        check_folder(nested)
    for name in REPORTS:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match=r"seed was 0, now 1\. Name another --out\.$"):
        check_folder(one)


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = mansu("run", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"mansu: {tmp_path} already holds another run or other files. Name another --out."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
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


@pytest.mark.parametrize("method", METHODS)
def test_the_command_of_a_report_names_the_method(method: str):
    config = parse(["run", "--method", method, "--unlearn.lr", "0.5", "--task", "countries"])
    assert type(config.unlearn) is METHODS[method] and config.unlearn.lr == 0.5
    words = shlex.split(command_line(config))
    assert ("--method" in words) == (method != "mansu")
    assert parse(words[1:]) == config


def test_what_a_task_says_of_mansu_is_not_for_baselines():
    """A step in units of a block's absmax would destroy the model as AdamW's learning rate."""
    mansu, npo = (default_config("facts", "countries", method=m) for m in ("mansu", "npo"))
    assert mansu.unlearn.lr == 0.12 and npo.unlearn == NPO(batch_size=96)
    variant = default_config("facts", "countries", method="mansu-no-projection").unlearn
    assert isinstance(variant, Mansu) and variant.lr == 0.12 and variant.projection == 0.0
    assert replace(mansu.unlearn, projection=0.0) == Mansu(**vars(variant))


def test_a_variant_has_no_setting_for_what_it_lacks():
    with pytest.raises(
        ConfigError, match=r"projection is always 0 in mansu-no-projection; got 1\.0"
    ):
        parse(["run", "--method", "mansu-no-projection", "--unlearn.projection", "1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"damping": 3.0}}, "damping is now damage_damping."),
        ({"settings": {"unlearn": {"push": 3.0}}}, "unlearn.push is now unlearn.ranking_weight."),
        ({"settings": {"circuit": {"seed": 1}}}, "circuit.seed is now seed, one for the whole run"),
        ({"robust": {"unlearn": {"attack": 3}}}, "unlearn.attack is now unlearn.adversarial_steps"),
        ({"hardened": {}}, "of an older version: hardened is now robust"),
        ({"guard": []}, "of an older version: guard is now retain_unscored"),
        ({"twins": []}, "of an older version: twins is now reference_models"),
        ({"schema": 1}, "has schema 1; expected 2"),
    ],
)
def test_an_old_task_file_is_told_the_new_name(
    tmp_path: Path, facts: LanguageModel, change: dict[str, Any], message: str
):
    spec = json.loads((DATA / "tasks" / "capitals.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(TaskError, match=re.escape(message)):
        default_config("facts", str(tmp_path / "task.json"))
        load_task(tmp_path / "task.json", facts)


def test_the_folder_of_an_old_run_is_told_apart(tmp_path: Path):
    old = {"model": "facts", "damping": 100.0, "unlearn": {"method": "mansu", "push": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(
        ArtifactError, match=r"older version \(in its config.json, damping is now damage_damping\)"
    ):
        check_folder(RunConfig(out=tmp_path))


def test_new_names_are_settings_that_exist():
    """And no old name is one of them."""
    known = {f.name for f in fields(RunConfig)} | {"method", "robust"}
    known |= {f"circuit.{f.name}" for f in fields(CircuitConfig)}
    known |= {f"unlearn.{f.name}" for kind in METHODS.values() for f in fields(kind)}
    for old, new in renamed.SETTINGS.items():
        assert new.split(",")[0].split(" ")[0] in known, new
        assert old not in known, old
    assert set(renamed.METHODS.values()) <= set(METHODS) and not set(renamed.METHODS) & set(METHODS)


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


# Consoles of every kind, and what strangers wrote on them.

EVIL = "\x1b[31mred\x9b\u202e\ud800\r"


def test_every_error_and_printed_text_is_escaped(capsys: pytest.CaptureFixture[str]):
    shown = r"\x1b[31mred\x9b\u202e\ud800\r"
    assert str(TaskError(f"{EVIL}\n\tit")) == f"{shown}\n\tit"
    console.say(EVIL)
    console.warn(EVIL)
    console.say_json({EVIL: "\x7f", "left": float("inf")})
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == err.strip() == shown and out.isascii()
    assert json.loads(out.partition("\n")[2]) == {EVIL: "\x7f", "left": None}
    assert not set(out + err) - set("\n") & {c for c in EVIL if not c.isprintable()}
    assert printable("Zürich 东京 👩\u200d🚀 a\xa0b") == "Zürich 东京 👩\u200d🚀 a\xa0b"


@pytest.mark.parametrize("words", [[f"--x{EVIL}"], ["--seed", EVIL], [EVIL]])
def test_words_that_no_command_knows_are_escaped(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["run", *words])
    out, err = capsys.readouterr()
    assert not out and "\\x1b[31m" in err
    assert not set(err) - set("\n") & {c for c in EVIL if not c.isprintable()}


def test_only_the_console_prints():
    """So that nothing passes it by."""
    for path in (ROOT / "mansu_interp").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "console.py":
            assert not re.search(r"(?<![\w.])print\(|sys\.std(out|err)\.write", text), path


NASTY = "\x1b[31m"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("x.jsonl", json.dumps({NASTY: 1})),
        ("x.jsonl", json.dumps({"role": "forget", "prompt": "p", "answer": "a", NASTY: "b"})),
        ("x.csv", f"role,prompt,answer,{NASTY}\nforget,p,a,b\n"),
        ("x.json", json.dumps({"schema": 2, "name": "x", "relations": {NASTY: 3}})),
        (f"{NASTY}.json", "{"),
        (f"{NASTY}.csv", f"{NASTY}\n"),
    ],
)
def test_no_field_header_relation_or_file_name_steers_the_terminal(
    tmp_path: Path, file: str, text: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert main(["run", "--task", str(tmp_path / file), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "\x1b" not in told and r"\x1b[31m" in told


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $MANSU is the command."""
    command = f"{shlex.quote(sys.executable)} -m mansu_interp"
    return subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "MANSU": command, **env},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_closed_output_is_no_error():
    done = shell("$MANSU list >&-; echo $?; $MANSU list --nonsense 2>&-; echo $?")
    assert done.stdout.splitlines() == ["0", "2"] and done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_output_is_one_clear_error():
    done = shell("for x in 'list --json' --help; do $MANSU $x >/dev/full; echo $?; done")
    first, second = done.stderr.splitlines()
    assert first == second and done.stdout == "1\n1\n"
    assert first.startswith("mansu: The output cannot be written: the disk is full. What the")
    done = shell("$MANSU list --robust 2>/dev/full")
    assert done.returncode == 1 and not done.stdout


@pytest.mark.slow
def test_a_console_that_knows_ascii_alone():
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell("$MANSU plan --tokens 8 && $MANSU run --task $'caf\\xc3\\xa9'", **plain)
    assert done.stdout.startswith("model    facts") and done.returncode == 1
    assert r"mansu: Unknown task 'caf\xe9'. Shipped: capitals" in done.stderr


SIGNALS = ("SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow))

INTERRUPTED = """
import os, signal, sys
number = getattr(signal, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
from mansu_interp import __main__
from mansu_interp.cli import commands, main
def twice(*_):
    try:
        os.kill(os.getpid(), number)
    finally:
        os.kill(os.getpid(), number)  # while what was begun is being removed
        print("removed")
main.COMMANDS[-1].__dict__["do"] = twice
sys.argv = ["mansu", "list"]
status = __main__.main()
os.kill(os.getpid(), signal.SIGINT)  # while the process ends
sys.exit(status)
"""


@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_interrupt_does_not_stop_the_cleaning_up(name: str):
    done = python("-c", INTERRUPTED, name)
    assert done.stdout == "removed\n" and done.returncode == 130, done.stderr
    assert done.stderr == "\nmansu: interrupted; run the same command again to continue.\n"


GO_ON = {"run", "bench", "discover", "relearn", "teach"}
"""Commands that keep what they have made so far."""


def stopped(kind: type) -> Any:
    """Settings at whose first look somebody presses Ctrl-C."""

    def look(self: object, name: str) -> Any:
        raise KeyboardInterrupt

    return object.__new__(type("Stopped", (kind,), {"__getattribute__": look}))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_only_what_keeps_something_says_that_it_goes_on(command: Any, capsys):
    kinds = [kind for name, kind in get_type_hints(command.do).items() if name != "return"]
    if command.name in GO_ON:
        with pytest.raises(KeyboardInterrupt):
            command.do(*map(stopped, kinds))
        return
    assert command.do(*map(stopped, kinds)) == 130
    assert "nothing is kept, and the same command begins anew" in capsys.readouterr().err


IN_DEL = """
import os, signal, sys, time
number = getattr(signal, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
from mansu_interp import __main__
from mansu_interp.cli import main
class Dying:
    def __del__(self):
        os.kill(os.getpid(), number)
def work(*_):
    Dying()
    time.sleep(20)
    return 0
main.COMMANDS[-1].__dict__["do"] = work
sys.argv = ["mansu", "list"]
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("name", SIGNALS)
def test_an_interrupt_while_something_is_freed_is_not_lost(name: str):
    """Python ignores what is raised in a ``__del__``."""
    done = python("-c", IN_DEL, name)
    assert done.returncode == 130
    assert done.stderr == "\nmansu: interrupted; run the same command again to continue.\n"


KILLED = """
import os, signal, sys, time
from pathlib import Path
from mansu_interp import __main__
from mansu_interp.export import ledger
def killed(*_):
    assert len(list(Path(sys.argv[-1]).parent.iterdir())) == 1
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
ledger.delta = killed
sys.exit(__main__.main())
"""


@pytest.mark.slow
def test_a_polite_kill_in_the_midst_of_writing_leaves_nothing_half_written(tmp_path: Path):
    done = python("-c", KILLED, "delta", "facts", "facts", "--out", str(tmp_path / "d"))
    assert done.returncode == 130 and "interrupted" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_too_long_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for option in ("--task", "--out", "--model"):
        assert main(["run", option, str(tmp_path / ("x" * 300))]) == 1
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1
        assert re.search("has 3.. characters, more than|Unknown|long", told), told


@pytest.mark.slow
def test_a_circuit_from_pairs_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Discover, attribute, view and compare, each as a command."""
    asked = "<bos>the capital of {} is"
    rows = [("Malta", "Rwanda", "Valletta", "Kigali"), ("Ghana", "Kenya", "Accra", "Nairobi")]
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "\n".join(
            json.dumps(
                {"clean": asked.format(s), "corrupt": asked.format(o), "answer": a, "wrong": w}
            )
            for s, o, a, w in rows
        )
    )
    out, scores = tmp_path / "c", tmp_path / "s.safetensors"
    assert main(["discover", "--pairs", str(file), "--out", str(out), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "It is the smallest found: no single" in told and "\nCompleteness: " in told
    made = {"circuit.json", "circuit.graphml", "circuit.html", "scores.safetensors"}
    assert {p.name for p in out.iterdir()} == made
    assert not (tmp_path / "c.unfinished").exists()
    assert main(["discover", "--pairs", str(file), "--out", str(out)]) == 1  # never overwritten
    assert main(["attribute", "--pairs", str(file), "--out", str(scores), "--quiet"]) == 0
    assert (
        main(["attribute", "--pairs", str(file), "--out", str(tmp_path / "s.csv"), "--quiet"]) == 0
    )
    assert (tmp_path / "s.csv").read_text().startswith("source,target,score\n")
    assert "does not know these answers" not in capsys.readouterr().out
    turned = file.read_text().replace('"answer"', '"x"').replace('"wrong"', '"answer"')
    (tmp_path / "turned.jsonl").write_text(turned.replace('"x"', '"wrong"'))
    words = ["attribute", "--pairs", str(tmp_path / "turned.jsonl"), "--quiet"]
    assert main([*words, "--out", str(tmp_path / "t.csv")]) == 0
    assert "facts does not know these answers" in capsys.readouterr().out
    assert main(["view", str(out), "--out", str(tmp_path / "p.html")]) == 0
    for words in (
        ["view", str(out), "--out", str(tmp_path / "p.html")],
        ["attribute", "--pairs", str(file), "--out", str(scores)],
    ):
        assert main(words) == 1  # nothing is written over
    circuit_view(Circuit.load(out / "circuit.json")).to_json(tmp_path / "saved.json")
    for name in ("saved.html", "saved-2.html"):  # a second time beside the first
        assert main(["view", str(tmp_path / "saved.json")]) == 0 and (tmp_path / name).exists()
    assert '"prompts"' in (out / "circuit.html").read_text()
    assert main(["view", str(scores), "--out", str(tmp_path / "p.svg")]) == 0
    assert (tmp_path / "p.svg").read_text().lstrip().startswith("<svg")
    words = ["attribute", "--pairs", str(file), "--positions", "--quiet", "--out"]
    assert main([*words, str(tmp_path / "tokens.html")]) == 0  # named after the prompts' tokens
    assert re.search(r'"tokens": ?\[', (tmp_path / "tokens.html").read_text())
    assert main([*words, str(tmp_path / "tokens.safetensors")]) == 0
    assert (
        main(["view", str(tmp_path / "tokens.safetensors"), "--out", str(tmp_path / "t.svg")]) == 0
    )
    assert "@" in (tmp_path / "t.svg").read_text()


@pytest.mark.slow
def test_attribution_by_rules_and_pairs_that_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["attribute", "--quiet", "--attribution.pairs", "3", "--attribution.method", "eap"]
    for name, rule in (("plain", "gradient"), ("gim", "gim")):
        out = str(tmp_path / f"{name}.safetensors")
        assert main([*words, "--attribution.rules", rule, "--out", out]) == 0
    plain, gim = (Attribution.load(tmp_path / f"{n}.safetensors") for n in ("plain", "gim"))
    assert plain.clean == gim.clean
    assert abs(plain.scores - gim.scores).max() > 0.1 * abs(plain.scores).max()
    capsys.readouterr()
    assert main([*words, "--pairs", "ioi", "--out", str(tmp_path / "i.csv")]) == 1
    assert "ioi: the tokenizer of facts gives 0 of the words Mary" in capsys.readouterr().err


def test_compared_circuits_and_scores(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    one, other = (str(ROOT / "circuits" / f"facts-{n}.json") for n in ("capitals", "countries"))
    assert main(["compare", one, other, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = (Circuit.load(Path(p)) for p in (one, other))
    both = int((first.edges & second.edges).sum())
    assert found == {
        "both": both,
        "first only": first.n_edges - both,
        "second only": second.n_edges - both,
        "overlap": both / (first.n_edges + second.n_edges - both),
    }
    scores = tmp_path / "s.safetensors"
    Attribution(first.graph, first.scores, 1.0, 0.0).save(scores)
    assert main(["compare", str(scores), str(scores), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["change"] for row in table} == {"kept"}
    assert main(["compare", one, str(scores)]) == 1
    assert "of different kinds" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mansu {__version__}\n"


def test_a_run_is_asked_of_its_own_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Given as its folder or as the checkpoint in it; another task is asked with a warning."""
    for name, task in (("mine", "my-task.json"), ("default", None)):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        settings = {"model": "facts", "task": task}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    mine, default = (str(tmp_path / name) for name in ("mine", "default"))
    assert checkpoint_of(mine) == tmp_path / "mine" / "model"
    assert checkpoint_of(f"{mine}/model") == tmp_path / "mine" / "model"
    for given in (mine, f"{mine}/model"):
        assert task_of(None, given) == "my-task.json" == task_of("my-task.json", given)
    assert task_of(None, default) == "countries" and not capsys.readouterr().err
    assert task_of("capitals", default) == "capitals"
    assert "was made to forget countries; this asks for capitals" in capsys.readouterr().err
    assert task_of(None, "facts", "facts") == "countries"
    assert task_of(None, str(tmp_path), "SmolLM2") == "world-capitals"
    (tmp_path / "mine" / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="JSON"):
        task_of(None, mine)


def test_relearn_runs_the_suite_or_the_quick_attack():
    whole, quick = parse(["relearn", "m"]), parse(["relearn", "m", "--quick"])
    assert whole.attack == SUITE and len(SUITE.rates) == 5 and SUITE.steps[-1] == 200
    assert whole.arms == () and whole.processes is None
    assert quick.attack == RelearnConfig() and quick.arms == ("half-a",)
    words = ["--attack.steps", "3", "--attack.seed", "2", "--arms", "noise,lora"]
    mine = parse(["relearn", "m", "--quick", *words])
    assert mine.attack == RelearnConfig(steps=(3,), seed=2) and mine.arms == ("noise", "lora")
    with pytest.raises(ConfigError, match="processes must be at least 1; got 0"):
        parse(["relearn", "m", "--processes", "0"])


@pytest.mark.slow
def test_relearn_says_what_it_does_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["relearn", "facts-capitals-reference-1", "--task", "capitals", "--attack.steps", "1"]
    words += ["--attack.rates", "1e-3", "--arms", "half-a", "few-shot", "--out", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "beside it never taught (facts-capitals-reference-0)" in out
    assert "arms     half-a, few-shot\ncost     4 attacks, about " in out
    assert "in 1 process of one thread\n" in out
    assert "facts-capitals-reference-1: erased. Strongest arm: " in out
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "cost     0 attacks, about 0 s" in again and "; 4 finished before\n" in again
    table = out[out.index("Half B: 89 prompts asked, unseen phrasings") :]
    assert again.endswith(table)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts-capitals-reference-1"]["erased"] is True
    assert list(found["never taught"]["arms"]) == ["half-a", "few-shot"]
