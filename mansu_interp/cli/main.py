"""The ``mansu`` command: parses settings, shows progress, prints results."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro

from .. import __version__
from ..bench.config import BenchConfig
from ..errors import ConfigError, MansuError
from ..runs.config import PlanConfig
from ..runs.defaults import default_config
from ..tasks.data.benchmarks import TaskConfig
from ..tasks.files import ROBUST
from ..utils.renamed import renamed_option
from . import console
from .circuits import do_attribute, do_compare, do_convert, do_discover, do_view
from .commands import (
    do_apply,
    do_bench,
    do_cad,
    do_delta,
    do_list,
    do_plan,
    do_relearn,
    do_report,
    do_run,
    do_task,
    do_verify,
)
from .console import Output
from .deployed import do_evaluate, do_export
from .qa import MetricsConfig, TeachRun, do_metrics, do_teach
from .settings import (
    BENCH,
    HELP_ALL,
    ApplyConfig,
    AttributeConfig,
    CadConfig,
    CompareConfig,
    ConvertConfig,
    DeltaConfig,
    DiscoverConfig,
    EvaluateConfig,
    ExportConfig,
    ListConfig,
    RelearnRun,
    ReportConfig,
    RunCommand,
    VerifyConfig,
    ViewConfig,
    shortened,
    shown_of_run,
)

ROBUST_FLAG = f"--{ROBUST}"
"""Of ``run`` alone."""

INTERRUPTED = "mansu: interrupted; run the same command again to continue."
ABOUT = """Make a language model forget something, and check that it stays forgotten.

Examples:
  mansu list                                    what ships
  mansu discover --pairs my.jsonl --model gpt2  a circuit, and a page to look at
  mansu run --out runs/first                    the embedded model forgets countries
  mansu run --task my-task.json --out runs/mine your own facts
  mansu run --method npo --out runs/npo         a baseline
  mansu plan --model Llama-3.1-8B/config.json   what it would cost

With every command: --quiet prints the result alone. run, report, plan,
list, discover, attribute, compare, relearn, evaluate, teach and metrics:
--json prints it as JSON.
mansu --version.
run and bench: --help-all shows every setting.

Colours follow NO_COLOR.

Completion: mansu --tyro-print-completion bash (or zsh)."""


@dataclass(frozen=True)
class Command:
    """One word after ``mansu``."""

    name: str
    settings: type
    do: Callable[[Any, Output], int]
    """Returns the exit status."""
    about: str | None = None
    """Its help; default: the docstring of its settings."""


COMMANDS = (
    Command(
        "run",
        RunCommand,
        do_run,
        "Discover, mask, unlearn, quantize, compare and report. --help-all shows every setting.\n\n"
        "Example: mansu run --model facts --task capitals --out runs/first",
    ),
    Command(
        "report",
        ReportConfig,
        do_report,
        "Say again what a run found, and what to do next.\n\nExample: mansu report runs/latest",
    ),
    Command(
        "bench",
        BenchConfig,
        do_bench,
        "Compare methods at the same forgetting, before and after quantizers. A killed "
        "benchmark goes on where it was. --help-all shows every setting.\n\n"
        "Example: mansu bench --tasks capitals --methods mansu npo --seeds 0 1 --out runs/bench",
    ),
    Command(
        "discover",
        DiscoverConfig,
        do_discover,
        "Find the circuit that carries some answers, and draw it.\n\n"
        "Example: mansu discover --model gpt2 --pairs my.jsonl --out runs/my-circuit",
    ),
    Command(
        "attribute",
        AttributeConfig,
        do_attribute,
        "Score every edge of a model.\n\n"
        "Example: mansu attribute --model gpt2 --pairs my.jsonl --out scores.safetensors",
    ),
    Command(
        "view",
        ViewConfig,
        do_view,
        "Draw a circuit, edge scores, or what a run changed, as a page that needs no network."
        "\n\nExample: mansu view runs/my-circuit",
    ),
    Command(
        "compare",
        CompareConfig,
        do_compare,
        "Say how two circuits, or the edge scores of two models, differ.\n\n"
        "Example: mansu compare before.safetensors after.safetensors",
    ),
    Command(
        "convert",
        ConvertConfig,
        do_convert,
        "Write a circuit as another tool reads it, or read one of another tool. Which one is read "
        "is seen from the file.\n\n"
        "Example: mansu convert runs/my-circuit --to eap-ig --out circuit.pt",
    ),
    Command(
        "plan",
        PlanConfig,
        do_plan,
        "Say what scoring every edge of a model takes, from its config alone.\n\n"
        "Example: mansu plan --model Llama-3.1-8B/config.json --tokens 32 "
        "--attribution.batch-size 8",
    ),
    Command(
        "verify",
        VerifyConfig,
        do_verify,
        "Recompute from two checkpoints what an edit's promise says.\n\n"
        "Exit status: 0 it holds; 1 a file is missing, damaged or changed; 3 an edit is lost or "
        "another code changed; 4 the ledger or mask does not belong to these checkpoints.\n\n"
        "Example: mansu verify facts runs/first --ledger runs/first/ledger.safetensors",
    ),
    Command(
        "relearn",
        RelearnRun,
        do_relearn,
        "Fine-tune copies on half of the forget facts, in several ways; ask for the other half. A "
        "killed command goes on where it was.\n\n"
        "Example: mansu relearn runs/latest --original facts",
    ),
    Command(
        "cad",
        CadConfig,
        do_cad,
        "Say whether an edited checkpoint erased what a task forgets, or hides it.\n\n"
        "Example: mansu cad facts runs/latest",
    ),
    Command(
        "delta",
        DeltaConfig,
        do_delta,
        "Write the edit alone, a few kilobytes.\n\n"
        "Example: mansu delta facts runs/latest --out countries.safetensors",
    ),
    Command(
        "apply",
        ApplyConfig,
        do_apply,
        "Make the edited checkpoint, bit for bit, from the original and its delta or "
        "ledger.\n\nExample: mansu apply facts countries.safetensors --out edited",
    ),
    Command(
        "export",
        ExportConfig,
        do_export,
        "Write one GGUF file for llama.cpp (which models: docs/exports.md).\n\n"
        "Example: mansu export runs/smollm2 --type q4_k_m --out smollm2.gguf",
    ),
    Command(
        "evaluate",
        EvaluateConfig,
        do_evaluate,
        "Ask a task of a checkpoint, or of a GGUF file in the running llama.cpp.\n\n"
        "Example: mansu evaluate model.gguf --engine llama.cpp --checkpoint runs/latest "
        "--task countries",
    ),
    Command(
        "task",
        TaskConfig,
        do_task,
        "Make a task file from your own rows or those of TOFU, MUSE, WMDP and MMLU.\n\n"
        "Example: mansu task tofu --forget forget10.jsonl --retain retain90.jsonl --out tofu.json",
    ),
    Command(
        "teach",
        TeachRun,
        do_teach,
        "Teach a model rows of questions and answers: one to unlearn from, or the reference that "
        "was never taught what is forgotten. A killed command goes on where it was.\n\n"
        "Example: mansu teach --model SmolLM2 --rows retain90.jsonl --out models/reference",
    ),
    Command(
        "metrics",
        MetricsConfig,
        do_metrics,
        "Say TOFU's metrics of a checkpoint and those beside them: ROUGE-L, truth ratio, forget "
        "quality, model utility, extraction, membership.\n\n"
        "Example: mansu metrics runs/latest --forget forget10.jsonl --reference models/reference",
    ),
    Command("list", ListConfig, do_list),
)
"""What the command line knows, in the order of its help."""
JSON = (
    "run", "report", "plan", "list", "discover", "attribute", "compare", "relearn", "evaluate",
    "teach", "metrics",
)  # fmt: skip
"""Commands whose result can be printed as JSON."""


def _start(argv: list[str]) -> RunCommand:
    """The settings that ``run`` starts from: they depend on its model, task and method."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default="facts")
    early.add_argument("--task")
    early.add_argument("--method", default="mansu")
    known, _ = early.parse_known_args(argv)
    return RunCommand.of(
        default_config(known.model, known.task, ROBUST_FLAG in argv, method=known.method)
    )


def _commands(argv: list[str], brief: bool) -> Any:
    """What the command line may say; of ``brief`` help, what it shows."""
    words: list[object] = []
    for c in COMMANDS:
        start: RunCommand | BenchConfig | None = None
        if c.settings is RunCommand:
            start = _start(argv if c.name in argv[:1] else [])
            start = shortened(start, shown_of_run(start.unlearn)) if brief else start
        if brief and c.settings is BenchConfig:
            start = shortened(BenchConfig(), BENCH)
        word = tyro.conf.subcommand(c.name, description=c.about)
        if start:
            word = tyro.conf.subcommand(c.name, description=c.about, default=start)
        words.append(Annotated[type(start) if start else c.settings, word])
    return reduce(or_, words)


def parse(argv: list[str]) -> object:
    """The settings that a command line gives; without any, the help.

    Raises:
        ConfigError: an option that has another name now, an unknown method, or --robust, which
            chooses what ``run`` starts from, with another command.
    """
    if old := renamed_option(argv):
        raise ConfigError(f"{old}.")
    if ROBUST_FLAG in argv and argv[0] != "run":
        raise ConfigError(f"{ROBUST_FLAG} is for run; leave it out here.")
    words = ["--help" if word == HELP_ALL else word for word in argv] or ["--help"]
    brief = HELP_ALL not in argv and bool({"-h", "--help"} & {*words})
    commands = _commands(argv, brief)
    told = io.StringIO()  # tyro prints help and errors itself
    try:
        with console.writing(), contextlib.redirect_stderr(told):
            config = tyro.cli(commands, args=words, prog="mansu", description=ABOUT)
    except SystemExit:
        if told.getvalue():
            console.warn(told.getvalue().rstrip("\n"))
        raise
    return config.run_config() if isinstance(config, RunCommand) else config


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status (0 fine, 1 bad input, 130 interrupted, 141 nobody reads
    the output any more; verify: more)."""
    console.prepare()
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            console.finish()
    except BrokenPipeError:  # such as head, which has seen enough
        console.give_up("stdout")
        return 141
    except MansuError as error:
        console.warn(f"mansu: {error}")
        return 1


def _main(argv: list[str]) -> int:
    try:
        output, argv = Output.split(argv)
        if "--version" in argv:
            console.say(f"mansu {__version__}")
            return 0
        config = parse(argv)
        (command,) = [c for c in COMMANDS if issubclass(c.settings, type(config))]
        if output.json and command.name not in JSON:
            raise ConfigError(f"--json is for {', '.join(JSON)}; leave it out here.")
        return command.do(config, output)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        raise ConfigError(
            f"The name {name[:40]}...{name[-20:]} has {len(name)} characters, more than the file "
            "system takes in one part (255 bytes): give a shorter one."
        ) from error
    except KeyboardInterrupt:
        console.warn(f"\n{INTERRUPTED}")
        return 130
