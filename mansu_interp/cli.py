"""The ``mansu`` command: parses settings, shows progress, prints results."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from .config import BenchConfig, CadConfig, PlanConfig, RelearnRun, RunConfig, VerifyConfig
from .defaults import default_config, default_task
from .errors import MansuError


@dataclass(frozen=True)
class ListConfig:
    """Name the models, tasks, methods and quantizers that ship."""


class Progress:
    """One line that is rewritten on a terminal, and one line per stage elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.stage, self.start = "", time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that a stage is at ``done`` of ``total`` (0 = unknown)."""
        now = time.monotonic()
        if stage != self.stage:
            self.close()
            self.stage, self.start = stage, now
            if not self.live:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        if self.live:
            spent = now - self.start
            left = f", {spent / done * (total - done):.0f} s left" if total and done else ""
            count = f"{done}/{total}" if total else f"{done}"
            line = f"{stage}  {count}  {spent:.0f} s{left}"
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the current line."""
        if self.live and self.stage:
            print(file=sys.stderr)


def _run(config: RunConfig) -> int:
    from .pipeline import run
    from .planning import Plan
    from .report import console_summary

    progress = Progress()

    def show(plan: Plan) -> None:
        print("\n".join(plan.lines), flush=True)

    start = time.monotonic()
    try:
        result = run(config, progress, show)
    finally:
        progress.close()
    print()
    print(console_summary(result.report, min(100, shutil.get_terminal_size().columns)))
    print(f"\n{time.monotonic() - start:.0f} s. Open {result.folder / 'report.html'}")
    return 0


def _bench(config: BenchConfig) -> int:
    from .bench import run_bench

    progress = Progress()
    try:
        rows = run_bench(config, progress)
    finally:
        progress.close()
    print(f"{len(rows)} rows. Open {config.out / 'scoreboard.html'}")
    return 0


def _plan(config: PlanConfig) -> int:
    from .planning import plan_lines

    print("\n".join(plan_lines(config)))
    return 0


def _verify(config: VerifyConfig) -> int:
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
    if found.outside:
        print(f"{found.outside} values changed outside the quantized layers.")
    for sentence in found.mismatches:
        print(f"Mismatch: {sentence}.")
    print("The guarantee holds." if not found.status else "The guarantee does NOT hold.")
    return found.status


def _relearn(config: RelearnRun) -> int:
    from .models import load_model
    from .relearning import relearn, relearning_lines
    from .tasks import load_task

    progress = Progress()
    model = load_model(config.model)
    task = load_task(config.task or default_task(config.original or config.model), model)
    names = {config.model: config.model}
    if config.original:
        names["original"] = config.original
    if task.twins:
        names["never taught"] = task.twins[0]
    found = {}
    try:
        for label, name in names.items():
            subject = model if label == config.model else load_model(name)
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


def _cad(config: CadConfig) -> int:
    from .erasure import judge_erasure
    from .models import load_model
    from .quantizers import quantize
    from .tasks import load_task

    original, edited = load_model(config.original), load_model(config.edited)
    task = load_task(config.task or default_task(config.original), original)
    quantized = None if config.quantizer == "none" else quantize(edited, config.quantizer)
    progress = Progress()
    try:
        found = judge_erasure(original, edited, task, quantized, config.seed, progress)
    finally:
        progress.close()
    print("\n".join(found.lines()))
    return 0


def _list() -> int:
    from .models import embedded_models
    from .quantizers import QUANTIZERS
    from .tasks import embedded_tasks, read_task_file
    from .unlearning import METHODS

    print("models      " + ", ".join(m for m in embedded_models() if "twin" not in m))
    for name in embedded_tasks():
        print(f"task        {name}: {read_task_file(name)[0]['title']}")
    print("methods     " + ", ".join(METHODS))
    print("quantizers  " + ", ".join(QUANTIZERS))
    return 0


ABOUT = "Make a language model forget something, and check that it stays forgotten."


def _command(argv: list[str]) -> Any:
    """What the command line may say; the defaults of ``run`` depend on its model and task."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default="facts")
    early.add_argument("--task")
    known, _ = early.parse_known_args(argv)
    run = tyro.conf.subcommand(
        "run",
        default=default_config(known.model, known.task),
        description="Discover, mask, unlearn, quantize, compare and report.\n\n"
        "Example: mansu run --model facts --task capitals --out runs/first",
    )
    planning = tyro.conf.subcommand(
        "plan",
        description="Say what scoring every edge of a model takes, from its config alone.\n\n"
        "Example: mansu plan --model Llama-3.1-8B/config.json --tokens 32 "
        "--attribution.batch-size 8",
    )
    bench = tyro.conf.subcommand(
        "bench",
        description="Compare methods at the same forgetting, before and after quantizers. A killed "
        "benchmark goes on where it was.\n\n"
        "Example: mansu bench --tasks capitals --methods mansu npo --seeds 0 1 --out runs/bench",
    )
    verification = tyro.conf.subcommand(
        "verify",
        description="Recompute from two checkpoints what an edit's promise says.\n\n"
        "Exit status: 0 it holds; 1 a file is missing, damaged or changed; 3 an edit is lost or "
        "another code changed; 4 the ledger or mask does not belong to these checkpoints.\n\n"
        "Example: mansu verify facts runs/first/model --ledger runs/first/ledger.safetensors",
    )
    attack = tyro.conf.subcommand(
        "relearn",
        description="Fine-tune a copy on half of the forget facts; ask for the other half.\n\n"
        "Example: mansu relearn runs/latest/model --task capitals --original facts",
    )
    comparing = tyro.conf.subcommand(
        "cad",
        description="Say whether an edited checkpoint erased what a task forgets, or hides it.\n\n"
        "Example: mansu cad facts runs/latest/model --task capitals",
    )
    listing = tyro.conf.subcommand("list")
    return (
        Annotated[RunConfig, run]
        | Annotated[BenchConfig, bench]
        | Annotated[PlanConfig, planning]
        | Annotated[VerifyConfig, verification]
        | Annotated[tyro.conf.PositionalRequiredArgs[RelearnRun], attack]
        | Annotated[tyro.conf.PositionalRequiredArgs[CadConfig], comparing]
        | Annotated[ListConfig, listing]
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status (0 fine, 1 bad input, 130 interrupted; verify: more)."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        config = tyro.cli(_command(argv), args=argv, prog="mansu", description=ABOUT)
        if isinstance(config, RunConfig):
            return _run(config)
        if isinstance(config, BenchConfig):
            return _bench(config)
        if isinstance(config, VerifyConfig):
            return _verify(config)
        if isinstance(config, RelearnRun):
            return _relearn(config)
        if isinstance(config, CadConfig):
            return _cad(config)
        return _plan(config) if isinstance(config, PlanConfig) else _list()
    except MansuError as error:
        print(f"mansu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmansu: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
