"""What each command does: read its settings, call the library, print the result."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.config import BenchConfig
from ..errors import MansuError
from ..runs.config import PlanConfig, RunConfig
from ..runs.defaults import default_config
from ..tasks.data.benchmarks import TaskConfig
from ..utils.words import number_of
from .checkpoints import checkpoint_of, task_of
from .console import Output, keeps_nothing, say, say_json
from .progress import Progress, duration, stages
from .settings import (
    ApplyConfig,
    CadConfig,
    DeltaConfig,
    ListConfig,
    RelearnRun,
    ReportConfig,
    VerifyConfig,
)

if TYPE_CHECKING:
    from ..audit.relearning import Score
    from ..audit.suite import AttackResults, Cost, Suite
    from ..report.records import Report
    from ..report.terminal import Place

LOADING = "loading model and task"
"""The first stage of most commands, shown while the libraries are imported."""
NEVER_TAUGHT = "never taught"
SHOWN_SCORES: tuple[Score, ...] = ("choice", "last", "top1")


def do_run(config: RunConfig, output: Output) -> int:
    """Run the whole job, and summarise its report."""
    start = time.monotonic()
    env = os.environ  # of a process that torchrun may have started
    first = int(env.get("WORLD_SIZE", "1")) < 2 or int(env.get("RANK", "0")) == 0
    with stages(LOADING, output.quiet or not first) as progress:
        from ..runs.planning.cost import Plan
        from ..runs.run import run
        from ..utils.distributed import group

        def show(plan: Plan) -> None:
            if first and not (output.quiet or output.json):
                say("\n".join(plan.lines), flush=True)

        with group():
            result = run(config, progress, show)
    if not first:
        return 0  # the first process says what came out
    if not (output.quiet or output.json):
        now, total = time.monotonic() - start, sum(result.seconds.values())
        spent = duration(now) + (f" ({duration(total)} in all goes)" if total > now + 1 else "")
        say(f"\nDone in {spent}.")
    _show(result.folder, result.report, output)
    return 0


@keeps_nothing
def do_report(config: ReportConfig, output: Output) -> int:
    """Show a report again."""
    from ..report.records import Report

    _show(config.run, Report.load(config.run / "report.json"), output)
    return 0


def _show(folder: Path, report: Report, output: Output) -> None:
    """What a run found, and unless it is to be quiet what to do next."""
    from ..report.terminal import console_summary

    if output.json:
        say_json(report.to_json())
        return
    place = None if output.quiet else _place(folder, report)
    width = min(100, shutil.get_terminal_size().columns)
    say(console_summary(report, width, place=place))


def _place(folder: Path, report: Report) -> Place:
    """What can be done with a run on this machine."""
    from ..export.gguf import exportable
    from ..report.terminal import Place

    task = report.config.get("task")
    try:
        default_config(report.model.name, task if isinstance(task, str) else None, robust=True)
        robust = True
    except MansuError:
        robust = False
    names = {"darwin": "open", "win32": "start"}
    opener = names.get(sys.platform, "xdg-open")
    found = opener if sys.platform == "win32" or shutil.which(opener) else ""
    return Place(folder, _called(), found, robust, exportable(folder / "model"))


def _called() -> str:
    """The words that start this program as it was started, quoted for a shell."""
    called = sys.argv[0]
    if Path(called).stem != "mansu":  # python -m, or another program
        return shlex.join([sys.executable, "-m", "mansu_interp"])
    on_path = shutil.which("mansu")
    same = on_path and Path(called).exists() and os.path.samefile(on_path, called)
    return "mansu" if same else shlex.quote(called)


def do_bench(config: BenchConfig, output: Output) -> int:
    """Run what is missing of a benchmark."""
    with stages(LOADING, output.quiet) as progress:
        from ..bench.run import run_bench

        rows = run_bench(config, progress)
    say(f"{number_of(len(rows), 'row')}. Open {config.out / 'scoreboard.html'}")
    return 0


@keeps_nothing
def do_plan(config: PlanConfig, output: Output) -> int:
    """Say what scoring a model's edges takes."""
    from ..runs.planning.cost import plan_lines

    if output.json:
        from ..models.load import empty_model
        from ..runs.planning.cost import estimate

        model = empty_model(config.model, dtype=config.dtype)
        say_json(asdict(estimate(model, config.attribution, config.tokens)))
        return 0
    say("\n".join(plan_lines(config)))
    return 0


@keeps_nothing
def do_verify(config: VerifyConfig, output: Output) -> int:
    """Verify an edit from two checkpoints; returns the verdict as exit status."""
    with stages("comparing two checkpoints", output.quiet):
        from ..export.ledger import Ledger
        from ..export.verify import verify
        from ..masks.mask import Mask
        from ..models.load import load_model

        ledger = Ledger.load(config.ledger) if config.ledger else None
        mask = Mask.load(config.mask) if config.mask else None
        original, edited = load_model(config.original), load_model(checkpoint_of(config.edited))
        found = verify(original, edited, config.survive, ledger, mask)
    rows = found.rows | {f"{name}, embedding": row for name, row in found.embedding.items()}
    wide = max(18, *(len(name) + 1 for name in rows))
    say(f"{'quantizer':{wide}}{'edited':>10}{'survived':>10}{'collateral':>12}")
    for name, row in rows.items():
        say(f"{name:{wide}}{row.edited:>10}{row.survived:>10}{row.collateral:>12}")
    if found.outside:
        outside = number_of(found.outside, "value")
        say(f"{outside} changed outside the linear layers and the embedding.")
    for sentence in found.changed:
        say(f"Changed: {sentence}.")
    for sentence in found.mismatches:
        say(f"Mismatch: {sentence}.")
    if found.uncovered:
        say(f"Not compared: {', '.join(found.uncovered)}.")
    if not found.edited:
        say("No weight differs from the original: there is no edit to promise anything of.")
    say("The guarantee holds." if not found.status else "The guarantee does NOT hold.")
    return found.status


@keeps_nothing
def do_delta(config: DeltaConfig, output: Output) -> int:
    """Write an edit alone."""
    with stages("comparing two checkpoints", output.quiet):
        from ..export.ledger import delta
        from ..models.load import load_model
        from ..utils.files import atomic_path

        with atomic_path(config.out, new=True) as file:
            found = delta(load_model(config.original), load_model(checkpoint_of(config.edited)))
            found.save(file)
    size = f"{config.out.stat().st_size / 1000:.1f} kB"
    say(f"{number_of(found.n_edits, 'edit')}, {size}: {config.out}")
    return 0


@keeps_nothing
def do_apply(config: ApplyConfig, output: Output) -> int:
    """Make an edited checkpoint from its delta."""
    with stages("applying the edit", output.quiet):
        from ..export.deployed import save_edited
        from ..export.ledger import Ledger, apply
        from ..models.load import load_model
        from ..utils.files import atomic_folder

        with atomic_folder(config.out, new=True) as folder:
            ledger, original = Ledger.load(config.delta), load_model(config.original)
            save_edited(apply(original, ledger), original, folder)
    say(f"{number_of(ledger.n_edits, 'edit')} applied: {config.out}")
    return 0


def do_relearn(config: RelearnRun, output: Output) -> int:
    """Attack models by relearning."""
    with stages(LOADING, output.quiet) as progress:
        found = _attack(config, output, progress)
    if output.json:
        say_json({label: one.to_json() for label, one in found.items()})
    else:
        say("\n".join(attack_lines(found)))
    return 0


def _attack(config: RelearnRun, output: Output, progress: Progress) -> Mapping[str, AttackResults]:
    """What the attacks brought back, by model; tells the plan first."""
    from ..audit.attacks import ARMS
    from ..audit.suite import Suite
    from ..bench.workers import engine
    from ..models.load import load_model, use_threads
    from ..tasks.load import load_task

    model = load_model(checkpoint_of(config.model), config.device)
    use_threads(model)
    task = load_task(task_of(config.task, config.model, config.original), model)
    models = {config.model: model}
    if config.original:
        models["original"] = load_model(checkpoint_of(config.original), model.device)
    if task.reference_models and task.reference_models[0] != config.model:
        reference = load_model(task.reference_models[0], model.device)
        if reference.architecture == model.architecture:
            models[NEVER_TAUGHT] = reference
    arms = config.arms or tuple(ARMS)
    suite = Suite(models, task, config.attack, arms, config.split, config.out)
    cost = suite.cost()
    processes = config.processes or _processes(cost, model.device.type)
    if not (output.quiet or output.json):
        say("\n".join(_plan_of_attacks(suite, cost, processes)), flush=True)
    with engine(processes) as compute:
        note = partial(progress, f"steps of {number_of(cost.attacks, 'attack')}")
        return suite.run(compute if processes > 1 else None, note if cost.attacks else None)


def _processes(cost: Cost, device: str) -> int:
    """How many attacks are made at a time unless that is said: one where it is soon done, on an
    accelerator, and where Dask is not installed."""
    if cost.seconds < 60 or device != "cpu" or find_spec("distributed") is None:
        return 1
    from ..utils.distributed import cores

    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError):  # not on every system
        return 1
    return max(1, min(cores(), cost.attacks, int(memory / cost.memory_gb)))


def _plan_of_attacks(suite: Suite, cost: Cost, processes: int) -> list[str]:
    """What is about to be attacked, and what it costs."""
    beside = [f"{label} ({m.name})" for label, m in suite.models.items() if label != m.name]
    before = f"; {cost.kept} finished before" if cost.kept else ""
    first = next(iter(suite.models.values()))
    return [
        f"model    {first.name}: {first.n_parameters:,} parameters"
        + (f"; beside it {', '.join(beside)}" if beside else ""),
        f"task     {suite.task.name}: {suite.task.title}",
        f"arms     {', '.join(suite.arms)}",
        f"cost     {number_of(cost.attacks, 'attack')}, about "
        f"{duration(cost.seconds / processes)} and {processes * cost.memory_gb:.1f} GB in "
        f"{number_of(processes, 'process')} of one thread{before}",
        f"output   {suite.out}",
    ]


def attack_lines(found: Mapping[str, AttackResults]) -> list[str]:
    """Tables in plain text, one a model: what each arm brings back after each mark, the strongest
    arm first, and beside it the most that it teaches a model that was never taught."""
    from ..audit.known import CHANCE
    from ..audit.relearning import ERASED_LEVEL

    one = next(iter(next(iter(found.values())).arms.values()))
    asked, reference = number_of(one.facts[1], "prompt"), found.get(NEVER_TAUGHT)
    out = [
        f"Half B: {asked} asked, {one.meta.split} phrasings, which no arm trains on. Chance "
        f"{CHANCE:.2f}, erased up to {ERASED_LEVEL:.2f}.",
        "Ranked first of four / last of four / top-1, the largest over learning rates.",
    ]
    for label, results in found.items():
        said = "erased" if results.erased else "NOT erased"
        beside = reference if reference and results is not reference else None
        never = f"; {NEVER_TAUGHT}: {beside.most():.2f}, {beside.strongest}" if beside else ""
        column = NEVER_TAUGHT if beside else ""
        marks = sorted({m for r in results.arms.values() for m in r.marks})
        out += [
            "",
            f"{label}: {said}. Strongest arm: {results.strongest}, {results.most():.2f}{never}",
            ("steps".ljust(16) + "".join(f"{m:<17}" for m in marks) + column).rstrip(),
        ]
        for arm in sorted(results.arms, key=results.most, reverse=True):
            r = results.arms[arm]
            cells = [
                "/".join(f"{r.at(m, key):.2f}" for key in SHOWN_SCORES) if m in r.marks else ""
                for m in marks
            ]
            most = f"{beside.most(arm):.2f}" if beside and arm in beside.arms else ""
            out.append((arm.ljust(16) + "".join(f"{c:<17}" for c in cells) + most).rstrip())
        out += [f"{arm:16}left out: {why}" for arm, why in results.skipped.items()]
    return out


@keeps_nothing
def do_cad(config: CadConfig, output: Output) -> int:
    """Judge an edited checkpoint."""
    with stages(LOADING, output.quiet) as progress:
        from ..audit.cad import judge_erasure
        from ..models.load import load_model, use_threads
        from ..quantizers.survival import quantize
        from ..tasks.load import load_task

        edited = load_model(checkpoint_of(config.edited), config.device)
        use_threads(edited)
        original = partial(load_model, config.original, edited.device)  # held while it is needed
        task = load_task(task_of(config.task, config.edited, config.original), edited)
        made = None if config.quantizer == "none" else partial(quantize, edited, config.quantizer)
        found = judge_erasure(
            original, edited, task, quantized=made, seed=config.seed, on_step=progress
        )
    say("\n".join(found.lines()))
    return 0


@keeps_nothing
def do_task(config: TaskConfig, _: Output) -> int:
    """Make a task file."""
    from ..tasks.data.benchmarks import make_task

    say("\n".join(make_task(config)))
    return 0


@keeps_nothing
def do_list(_: ListConfig, output: Output) -> int:
    """Name what ships."""
    from ..models.load import embedded_models
    from ..quantizers.registry import QUANTIZERS
    from ..tasks.files import embedded_tasks, read_task_file
    from ..unlearning.methods import METHODS
    from ..utils.shipped import ENGINES

    models = [m for m in embedded_models() if "reference" not in m]
    if output.json:
        tasks = {name: read_task_file(name)[0].title for name in embedded_tasks()}
        found = {"models": models, "tasks": tasks, "methods": [*METHODS]}
        engines = {name: asdict(formats) for name, formats in ENGINES.items()}
        say_json({**found, "quantizers": [*QUANTIZERS], "engines": engines})
        return 0
    say("models      " + ", ".join(models))
    for name in embedded_tasks():
        say(f"task        {name}: {read_task_file(name)[0].title}")
    say("methods     " + ", ".join(METHODS))
    say("quantizers  " + ", ".join(QUANTIZERS))
    for name, formats in ENGINES.items():
        fitted = ", ".join(formats.fitted)
        say(f"engine      {name}: {', '.join(formats.exact)}; measured alone: {fitted}")
    return 0
