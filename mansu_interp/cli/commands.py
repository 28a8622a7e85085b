"""What each command does: read its settings, call the library, print the result."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict

from ..bench.config import BenchConfig
from ..runs.config import PlanConfig, RunConfig
from ..runs.defaults import default_task
from ..tasks.data.benchmarks import TaskConfig
from ..utils.words import number_of
from .console import Output, say, say_json, warn
from .progress import Progress, duration
from .settings import (
    ApplyConfig,
    CadConfig,
    DeltaConfig,
    ExportConfig,
    ListConfig,
    RelearnRun,
    VerifyConfig,
)


def do_run(config: RunConfig, output: Output) -> int:
    """Run the whole job, and summarise its report."""
    from ..report.terminal import console_summary
    from ..runs.plan import Plan
    from ..runs.run import run
    from ..utils.distributed import group, rank

    def show(plan: Plan) -> None:
        if not (output.quiet or output.json or rank()):
            say("\n".join(plan.lines), flush=True)

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
        from ..utils.files import read_json

        say_json(read_json(result.folder / "report.json"))
        return 0
    say("" if output.quiet else "\n", end="")
    say(console_summary(result.report, min(100, shutil.get_terminal_size().columns)))
    if not output.quiet:
        now, total = time.monotonic() - start, sum(result.seconds.values())
        spent = duration(now) + (f" ({duration(total)} in all goes)" if total > now + 1 else "")
        say(f"\n{spent}. Open {result.folder / 'report.html'}")
    return 0


def do_bench(config: BenchConfig, output: Output) -> int:
    """Run what is missing of a benchmark."""
    from ..bench.run import run_bench

    progress = Progress(output.quiet)
    try:
        rows = run_bench(config, progress)
    finally:
        progress.close()
    say(f"{number_of(len(rows), 'row')}. Open {config.out / 'scoreboard.html'}")
    return 0


def do_plan(config: PlanConfig, output: Output) -> int:
    """Say what scoring a model's edges takes."""
    from ..runs.plan import plan_lines

    if output.json:
        from ..models.load import empty_model
        from ..runs.plan import estimate

        say_json(asdict(estimate(empty_model(config.model), config.attribution, config.tokens)))
        return 0
    say("\n".join(plan_lines(config)))
    return 0


def do_verify(config: VerifyConfig, _: Output) -> int:
    """Verify an edit from two checkpoints; returns the verdict as exit status."""
    from ..export.ledger import Ledger
    from ..export.verify import verify
    from ..masks.mask import Mask
    from ..models.load import load_model

    ledger = Ledger.load(config.ledger) if config.ledger else None
    mask = Mask.load(config.mask) if config.mask else None
    found = verify(
        load_model(config.original), load_model(config.edited), config.survive, ledger, mask
    )
    say(f"{'quantizer':18}{'edited':>10}{'survived':>10}{'collateral':>12}")
    for name, row in found.rows.items():
        say(f"{name:18}{row.edited:>10}{row.survived:>10}{row.collateral:>12}")
    for name, row in found.embedding.items():
        label = f"{name}, embedding"
        say(f"{label:18}{row.edited:>10}{row.survived:>10}{row.collateral:>12}")
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


def do_delta(config: DeltaConfig, _: Output) -> int:
    """Write an edit alone."""
    from ..export.ledger import delta
    from ..models.load import load_model
    from ..utils.files import atomic_path

    with atomic_path(config.out, new=True) as file:
        found = delta(load_model(config.original), load_model(config.edited))
        found.save(file)
    size = f"{config.out.stat().st_size / 1000:.1f} kB"
    say(f"{number_of(found.n_edits, 'edit')}, {size}: {config.out}")
    return 0


def do_apply(config: ApplyConfig, _: Output) -> int:
    """Make an edited checkpoint from its delta."""
    from ..export.deployed import save_edited
    from ..export.ledger import Ledger, apply
    from ..models.load import load_model
    from ..utils.files import atomic_folder

    with atomic_folder(config.out, new=True) as folder:
        ledger, original = Ledger.load(config.delta), load_model(config.original)
        save_edited(apply(original, ledger), original, folder)
    say(f"{number_of(ledger.n_edits, 'edit')} applied: {config.out}")
    return 0


def do_export(config: ExportConfig, _: Output) -> int:
    """Write a GGUF file."""
    from pathlib import Path

    from ..export.gguf import export_gguf
    from ..export.ledger import Ledger, unpromised
    from ..models.load import load_model
    from ..utils.files import check_free

    check_free(config.out)
    inside = Path(config.model) / "model"
    place = inside if (inside / "config.json").exists() else Path(config.model)
    model = load_model(place if place.is_dir() else config.model)
    lost, ledger = None, place.parent / "ledger.safetensors"
    if config.type != "f16" and place.is_dir() and ledger.exists():
        lost = unpromised(model, Ledger.load(ledger), config.type)
    export_gguf(model, config.out, config.type, new=True)
    say(f"{config.out.stat().st_size / 1e6:.1f} MB: {config.out}")
    if lost:
        warn(
            f"Careful: this edit was not made to survive {config.type}; {lost.survived:,} of its "
            f"{lost.edited:,} weights do. What was forgotten may come back in this file. Measure "
            f"it, or unlearn with --unlearn.survive {config.type}."
        )
    return 0


def do_relearn(config: RelearnRun, output: Output) -> int:
    """Attack models by relearning."""
    from ..audit.relearning import relearn, relearning_lines
    from ..models.load import load_model
    from ..tasks.load import load_task

    progress = Progress(output.quiet)
    model = load_model(config.model, config.device)
    task = load_task(config.task or default_task(config.original or config.model), model)
    names = {config.model: config.model}
    if config.original:
        names["original"] = config.original
    if task.reference_models:
        names["never taught"] = task.reference_models[0]
    found = {}
    try:
        for label, name in names.items():
            subject = model if label == config.model else load_model(name, model.device)
            if subject.architecture != model.architecture and label == "never taught":
                continue
            found[label] = relearn(
                subject,
                task,
                config=config.attack,
                split=config.split,
                on_step=lambda rate, d, n, label=label: progress(f"{label} at {rate:g}", d, n),
            )
    finally:
        progress.close()
    say("\n".join(relearning_lines(found)))
    return 0


def do_cad(config: CadConfig, output: Output) -> int:
    """Judge an edited checkpoint."""
    from ..audit.cad import judge_erasure
    from ..models.load import load_model
    from ..quantizers.survival import quantize
    from ..tasks.load import load_task

    original = load_model(config.original, config.device)
    edited = load_model(config.edited, original.device)
    task = load_task(config.task or default_task(config.original), original)
    quantized = None if config.quantizer == "none" else quantize(edited, config.quantizer)
    progress = Progress(output.quiet)
    try:
        found = judge_erasure(
            original, edited, task, quantized=quantized, seed=config.seed, on_step=progress
        )
    finally:
        progress.close()
    say("\n".join(found.lines()))
    return 0


def do_task(config: TaskConfig, _: Output) -> int:
    """Make a task file."""
    from ..tasks.data.benchmarks import make_task

    say("\n".join(make_task(config)))
    return 0


def do_list(_: ListConfig, output: Output) -> int:
    """Name what ships."""
    from ..models.load import embedded_models
    from ..quantizers.registry import QUANTIZERS
    from ..tasks.files import embedded_tasks, read_task_file
    from ..unlearning.methods import METHODS

    models = [m for m in embedded_models() if "reference" not in m]
    if output.json:
        tasks = {name: read_task_file(name)[0].title for name in embedded_tasks()}
        found = {"models": models, "tasks": tasks, "methods": [*METHODS]}
        say_json({**found, "quantizers": [*QUANTIZERS]})
        return 0
    say("models      " + ", ".join(models))
    for name in embedded_tasks():
        say(f"task        {name}: {read_task_file(name)[0].title}")
    say("methods     " + ", ".join(METHODS))
    say("quantizers  " + ", ".join(QUANTIZERS))
    return 0
