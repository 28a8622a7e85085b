"""The ``mansu`` command: parses settings, shows progress, prints results."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro

from .commands import (
    ApplyConfig,
    CadConfig,
    DeltaConfig,
    ExportConfig,
    PlanConfig,
    RelearnRun,
    TaskConfig,
    VerifyConfig,
)
from .config import BenchConfig, RunConfig
from .defaults import HARDENED, default_config, default_task
from .errors import ConfigError, MansuError

HARDENED_FLAG = f"--{HARDENED}"
"""Of ``run`` alone; may stand anywhere after it."""


@dataclass(frozen=True)
class ListConfig:
    """Name the models, tasks, methods and quantizers that ship."""


def _time(seconds: float) -> str:
    """12 s, 3 min 05 s or 2 h 04 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return (
        f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
    )


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line per stage and per minute of it."""

    EVERY = 60.0

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self.stage, self.start = "", time.monotonic()
        self.said = self.start

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that a stage is at ``done`` of ``total`` (0 = unknown)."""
        if self.quiet:
            return
        now = time.monotonic()
        if stage != self.stage:
            self.close()
            self.stage, self.start, self.said = stage, now, now
            if not self.live:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        spent = now - self.start
        left = f", {_time(spent / done * (total - done))} left" if total and done else ""
        count = f"{done}/{total}" if total else f"{done}"
        line = f"{stage}  {count}  {_time(spent)}{left}"
        if not self.live and now - self.said >= self.EVERY:
            self.said = now
            print(line, file=sys.stderr, flush=True)
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the current line."""
        if self.live and self.stage:
            print(file=sys.stderr)


@dataclass(frozen=True)
class Output:
    """How results are printed; may stand anywhere on the command line."""

    quiet: bool = False
    """``--quiet``: nothing but the result."""
    json: bool = False
    """``--json``: the result as one JSON value on standard output."""

    @classmethod
    def split(cls, argv: list[str]) -> tuple[Output, list[str]]:
        """These two options, and the rest of the command line."""
        rest = [word for word in argv if word not in ("--quiet", "--json")]
        return cls("--quiet" in argv, "--json" in argv), rest


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _run(config: RunConfig, output: Output) -> int:
    from .distributed import group, rank
    from .pipeline import run
    from .planning import Plan
    from .report import console_summary

    def show(plan: Plan) -> None:
        if not (output.quiet or output.json or rank()):
            print("\n".join(plan.lines), flush=True)

    start = time.monotonic()
    with group():
        progress = Progress(output.quiet or rank() > 0)
        try:
            result = run(config, progress, show)
        finally:
            progress.close()
        if rank():
            return 0  # the first process says what came out
    if output.json:
        from .artifacts import read_json

        _print_json(read_json(result.folder / "report.json"))
        return 0
    print("" if output.quiet else "\n", end="")
    print(console_summary(result.report, min(100, shutil.get_terminal_size().columns)))
    if not output.quiet:
        print(f"\n{_time(time.monotonic() - start)}. Open {result.folder / 'report.html'}")
    return 0


def _bench(config: BenchConfig, output: Output) -> int:
    from .bench import run_bench

    progress = Progress(output.quiet)
    try:
        rows = run_bench(config, progress)
    finally:
        progress.close()
    print(f"{len(rows)} rows. Open {config.out / 'scoreboard.html'}")
    return 0


def _plan(config: PlanConfig, output: Output) -> int:
    from .planning import plan_lines

    if output.json:
        from .models import empty_model
        from .planning import estimate

        _print_json(asdict(estimate(empty_model(config.model), config.attribution, config.tokens)))
        return 0
    print("\n".join(plan_lines(config)))
    return 0


def _verify(config: VerifyConfig, _: Output) -> int:
    from .ledger import Ledger, verify
    from .masks import Mask
    from .models import load_model

    ledger = Ledger.load(config.ledger) if config.ledger else None
    mask = Mask.load(config.mask) if config.mask else None
    found = verify(
        load_model(config.original), load_model(config.edited), config.survive, ledger, mask
    )
    print(f"{'quantizer':18}{'edited':>10}{'survived':>10}{'collateral':>12}")
    for name, row in found.rows.items():
        print(f"{name:18}{row.edited:>10}{row.survived:>10}{row.collateral:>12}")
    for name, row in found.embedding.items():
        label = f"{name}, embedding"
        print(f"{label:18}{row.edited:>10}{row.survived:>10}{row.collateral:>12}")
    if found.outside:
        print(f"{found.outside} values changed outside the linear layers and the embedding.")
    for sentence in found.mismatches:
        print(f"Mismatch: {sentence}.")
    print("The guarantee holds." if not found.status else "The guarantee does NOT hold.")
    return found.status


def _delta(config: DeltaConfig, _: Output) -> int:
    from .ledger import delta
    from .models import load_model

    found = delta(load_model(config.original), load_model(config.edited))
    found.save(config.out)
    print(f"{found.n_edits} edits, {config.out.stat().st_size / 1000:.1f} kB: {config.out}")
    return 0


def _apply(config: ApplyConfig, _: Output) -> int:
    from .artifacts import new_folder
    from .ledger import Ledger, apply
    from .models import load_model

    with new_folder(config.out) as folder:
        ledger = Ledger.load(config.delta)
        apply(load_model(config.original), ledger).save(folder)
    print(f"{ledger.n_edits} edits applied: {config.out}")
    return 0


def _export(config: ExportConfig, _: Output) -> int:
    from pathlib import Path

    from .gguf_export import export_gguf
    from .models import load_model

    inside = Path(config.model) / "model"
    model = load_model(inside if (inside / "config.json").exists() else config.model)
    export_gguf(model, config.out, config.type)
    print(f"{config.out.stat().st_size / 1e6:.1f} MB: {config.out}")
    return 0


def _relearn(config: RelearnRun, output: Output) -> int:
    from .models import load_model
    from .relearning import relearn, relearning_lines
    from .tasks import load_task

    progress = Progress(output.quiet)
    model = load_model(config.model, config.device)
    task = load_task(config.task or default_task(config.original or config.model), model)
    names = {config.model: config.model}
    if config.original:
        names["original"] = config.original
    if task.twins:
        names["never taught"] = task.twins[0]
    found = {}
    try:
        for label, name in names.items():
            subject = model if label == config.model else load_model(name, model.device)
            if subject.architecture != model.architecture and label == "never taught":
                continue
            found[label] = relearn(
                subject,
                task,
                config.attack,
                config.split,
                lambda rate, d, n, label=label: progress(f"{label} at {rate:g}", d, n),
            )
    finally:
        progress.close()
    print("\n".join(relearning_lines(found)))
    return 0


def _cad(config: CadConfig, output: Output) -> int:
    from .erasure import judge_erasure
    from .models import load_model
    from .quantizers import quantize
    from .tasks import load_task

    original = load_model(config.original, config.device)
    edited = load_model(config.edited, original.device)
    task = load_task(config.task or default_task(config.original), original)
    quantized = None if config.quantizer == "none" else quantize(edited, config.quantizer)
    progress = Progress(output.quiet)
    try:
        found = judge_erasure(original, edited, task, quantized, config.seed, progress)
    finally:
        progress.close()
    print("\n".join(found.lines()))
    return 0


def _task(config: TaskConfig, _: Output) -> int:
    from .adapters import make_task

    n = make_task(config)
    print(f"{n} rows. Use it: mansu run --task {config.out}")
    return 0


def _list(_: ListConfig, output: Output) -> int:
    from .models import embedded_models
    from .quantizers import QUANTIZERS
    from .taskfiles import embedded_tasks, read_task_file
    from .unlearning import METHODS

    models = [m for m in embedded_models() if "twin" not in m]
    if output.json:
        tasks = {name: read_task_file(name)[0]["title"] for name in embedded_tasks()}
        found = {"models": models, "tasks": tasks, "methods": [*METHODS]}
        _print_json({**found, "quantizers": [*QUANTIZERS]})
        return 0
    print("models      " + ", ".join(models))
    for name in embedded_tasks():
        print(f"task        {name}: {read_task_file(name)[0]['title']}")
    print("methods     " + ", ".join(METHODS))
    print("quantizers  " + ", ".join(QUANTIZERS))
    return 0


ABOUT = """Make a language model forget something, and check that it stays forgotten.

Examples:
  mansu list                                    what ships
  mansu run --out runs/first                    the embedded model forgets capitals
  mansu run --task my-task.json --out runs/mine your own facts
  mansu plan --model Llama-3.1-8B/config.json   what it would cost

With every command: --quiet prints the result alone. run, plan and list: --json prints it as JSON.

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
        RunConfig,
        _run,
        "Discover, mask, unlearn, quantize, compare and report.\n\n"
        "--hardened starts from the task's settings against relearning: slower, and meant to erase "
        "where the usual ones may only hide. Options given beside it win.\n\n"
        "Example: mansu run --model facts --task capitals --out runs/first",
    ),
    Command(
        "bench",
        BenchConfig,
        _bench,
        "Compare methods at the same forgetting, before and after quantizers. A killed "
        "benchmark goes on where it was.\n\n"
        "Example: mansu bench --tasks capitals --methods mansu npo --seeds 0 1 --out runs/bench",
    ),
    Command(
        "plan",
        PlanConfig,
        _plan,
        "Say what scoring every edge of a model takes, from its config alone.\n\n"
        "Example: mansu plan --model Llama-3.1-8B/config.json --tokens 32 "
        "--attribution.batch-size 8",
    ),
    Command(
        "verify",
        VerifyConfig,
        _verify,
        "Recompute from two checkpoints what an edit's promise says.\n\n"
        "Exit status: 0 it holds; 1 a file is missing, damaged or changed; 3 an edit is lost or "
        "another code changed; 4 the ledger or mask does not belong to these checkpoints.\n\n"
        "Example: mansu verify facts runs/first/model --ledger runs/first/ledger.safetensors",
    ),
    Command(
        "relearn",
        RelearnRun,
        _relearn,
        "Fine-tune a copy on half of the forget facts; ask for the other half.\n\n"
        "Example: mansu relearn runs/latest/model --task capitals --original facts",
    ),
    Command(
        "cad",
        CadConfig,
        _cad,
        "Say whether an edited checkpoint erased what a task forgets, or hides it.\n\n"
        "Example: mansu cad facts runs/latest/model --task capitals",
    ),
    Command(
        "delta",
        DeltaConfig,
        _delta,
        "Write the edit alone, a few kilobytes.\n\n"
        "Example: mansu delta facts runs/latest/model --out capitals.safetensors",
    ),
    Command(
        "apply",
        ApplyConfig,
        _apply,
        "Make the edited checkpoint, bit for bit, from the original and its delta or "
        "ledger.\n\nExample: mansu apply facts capitals.safetensors --out edited",
    ),
    Command(
        "export",
        ExportConfig,
        _export,
        "Write one GGUF file (Llama, Mistral, Qwen2 and Qwen3).\n\n"
        "Example: mansu export runs/smollm2 --type q4_0 --out smollm2.gguf",
    ),
    Command(
        "task",
        TaskConfig,
        _task,
        "Make a task file from your own rows or those of TOFU, MUSE, WMDP and MMLU.\n\n"
        "Example: mansu task tofu --forget forget10.jsonl --retain retain90.jsonl --out tofu.json",
    ),
    Command("list", ListConfig, _list),
)
"""What the command line knows, in the order of its help."""


def _command(argv: list[str]) -> Any:
    """What the command line may say; the defaults of ``run`` depend on its model and task."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default="facts")
    early.add_argument("--task")
    known, _ = early.parse_known_args(argv)
    start = default_config(known.model, known.task, HARDENED_FLAG in argv)
    usual: dict[str, Any] = {"default": start}
    words: list[Any] = []
    for c in COMMANDS:
        given = usual if c.settings is RunConfig else {}
        word = tyro.conf.subcommand(c.name, description=c.about, **given)
        words.append(Annotated[c.settings, word])
    return reduce(or_, words)


def parse(argv: list[str]) -> Any:
    """The settings that a command line gives.

    Raises:
        ConfigError: --hardened, which chooses what ``run`` starts from, with another command.
    """
    words = [word for word in argv if word != HARDENED_FLAG]
    config = tyro.cli(_command(argv), args=words, prog="mansu", description=ABOUT)
    if words != argv and not isinstance(config, RunConfig):
        raise ConfigError(f"{HARDENED_FLAG} is for run; leave it out here.")
    return config


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status (0 fine, 1 bad input, 130 interrupted, 141 nobody reads
    the output any more; verify: more)."""
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # such as head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: list[str]) -> int:
    try:
        output, argv = Output.split(argv)
        config = parse(argv)
        if output.json and not isinstance(config, (RunConfig, PlanConfig, ListConfig)):
            raise ConfigError("--json is for run, plan and list; leave it out here.")
        (command,) = [c for c in COMMANDS if c.settings is type(config)]
        return command.do(config, output)
    except MansuError as error:
        print(f"mansu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmansu: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
