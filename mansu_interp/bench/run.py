"""The benchmark: models x tasks x methods x quantizers x seeds, at one forgetting or disruption.

For each model, task, level and method the first seed tries the same few step sizes, as multiples
of the method's usual one, each for the same number of steps at most. A try stops when its four-way
accuracy on the forget facts' dev phrasings reaches the level; of those that reach it the one that
retained best, on dev phrasings too, sets the step size of every seed (`best_retained`). Only
winners are measured on the unseen phrasings, on the checkpoint as saved and loaded again, before
and after each quantizer.

A try is one JSON file under ``trials``, named by a hash of its settings and of the model's weights,
and written whole or not at all: a benchmark that was killed goes on where it was. Checkpoints stay
in ``work``, so that another quantizer can be measured later; without them tries are run again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from ..audit.known import known_forget
from ..errors import ArtifactError, ConfigError
from ..masks.floor import quantizer_set
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..quantizers.registry import get_quantizer
from ..runs.defaults import default_config
from ..tasks.load import load_task
from ..utils.distributed import launched
from ..utils.files import locked, read_json, write_json
from .config import BenchConfig
from .measure import finish, unmeasured
from .results import SCHEMA, DevScores, TrialResult
from .scoreboard import SCOREBOARD, write_scoreboard
from .table import Chosen, TableRow, tidy
from .trial import ORIGINAL, Trial, attempt, make_trial
from .workers import Engine, engine

MARK = "bench.json"
"""What says that a folder is a benchmark's."""
WRITTEN = ("trials", "work", *SCOREBOARD)
"""What else a benchmark writes there."""
OnProgress = Callable[[str, int, int], None]


def best_retained(tries: Sequence[DevScores | None], level: float) -> tuple[int, bool]:
    """The fair stop: which of a method's tries stands for it.

    Arguments:
        tries: their scores on the dev phrasings, smallest step first; None: it failed.
        level: four-way forget accuracy asked for.

    Returns:
        The position of the best retained of those that reach the level (ties: the smallest step),
        and True; where none does, of the one that forgot most, and False.
    """
    dev = [d or DevScores(forget=9.0, retain=-1.0, retain_choice=-1.0) for d in tries]
    there = [k for k, d in enumerate(dev) if d.forget <= level]
    if not there:
        return min(range(len(dev)), key=lambda k: dev[k].forget), False
    return max(there, key=lambda k: (dev[k].retain, dev[k].retain_choice, -k)), True


def most_forgotten(tries: Sequence[DevScores | None]) -> int:
    """Which of a method's tries stands for it where all are within a disruption budget.

    Arguments:
        tries: their scores on the dev phrasings, smallest step first; None: it failed.

    Returns:
        The position of the one that forgot most, four-way (ties: the best retained, then the
        smallest step).
    """
    dev = [d or DevScores(forget=9.0, retain=-1.0, retain_choice=-1.0) for d in tries]
    return min(range(len(dev)), key=lambda k: (dev[k].forget, -dev[k].retain, k))


def check_folder(out: Path) -> None:
    """Raise ArtifactError if a folder holds things of others that a benchmark would write over."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file. Name a folder with --out.")
    if (out / MARK).exists():
        found = read_json(out / MARK)
        if isinstance(found, dict) and found.get("kind") == "bench":
            return
        raise ArtifactError(f"{out / MARK} is no benchmark's. Name another --out.")
    trials = sorted((out / "trials").glob("*/*.json"))
    if trials and TrialResult.load(trials[0]).schema == SCHEMA:
        return  # of before there was such a mark
    if taken := [name for name in WRITTEN if os.path.lexists(out / name)]:
        raise ArtifactError(
            f"{out} holds a {taken[0]} that no benchmark wrote. Name another --out."
        )


def run_bench(bench: BenchConfig, on_progress: OnProgress | None = None) -> list[TableRow]:
    """Run what is missing, and write ``table.csv``, ``scoreboard.md`` and ``scoreboard.html``.

    Arguments:
        bench: what to compare.
        on_progress: called with (stage, done, total).

    Returns:
        One row per model, task, level, method, seed and quantizer (see `tidy`).

    Raises:
        MansuError: an unknown model, task or quantizer, a model that does not know what it is to
            forget, or Dask is needed and cannot be used, before any long work.
        ResourceError: disk or memory ran out, or another benchmark writes to the folder.
    """
    if launched() > 1:
        raise ConfigError("bench shares out whole trials: start it once, with --jobs.")
    quantizer_set(bench.survive)
    for name in (*bench.survive, *bench.quantizers):
        get_quantizer(name).check_installed()
    models = {name: load_model(name, bench.device) for name in bench.models}
    for model in models.values():
        for task in bench.tasks:
            pairs = default_config(model.name, task).score_pairs
            known_forget(model, load_task(task, model, pairs))
    jobs, scheduler = (1, None) if bench.table_only else (bench.jobs, bench.scheduler)
    check_folder(bench.out)
    with locked(bench.out), engine(jobs, scheduler) as compute:
        write_json(bench.out / MARK, {"kind": "bench", "schema": SCHEMA})
        rows = _run_missing(bench, models, compute, on_progress or (lambda *_: None))
        write_scoreboard(bench.out, rows)
    return rows


def _run_missing(
    bench: BenchConfig, models: dict[str, LanguageModel], compute: Engine, note: OnProgress
) -> list[TableRow]:
    """Train and measure the trials that are not finished; the table's rows.

    1. Measure the originals.
    2. Let the first seed of every method try each step size.
    3. Choose the step size that retained best at the level; the other seeds take it over.
    4. Measure the winners of every seed.
    """
    new = partial(make_trial, bench)
    grid = [(m, t) for m in models.values() for t in bench.tasks]
    strengths = sorted(bench.strengths)
    first = bench.seeds[0]

    def each(do: Callable[[Trial], TrialResult], trials: Sequence[Trial], stage: str) -> None:
        if not trials or bench.table_only:
            return
        note(stage, 0, len(trials))
        for k, _ in enumerate(compute(do, trials)):
            note(stage, k + 1, len(trials))

    measured = partial(finish, bench=bench)
    originals = [new(m, t, ORIGINAL, first, 1.0, 1.0) for m, t in grid]
    each(measured, _unmeasured(originals, bench), stage="the originals")
    tries = [
        (m, [new(m, t, method, first, level, s) for s in strengths])
        for m, t in grid
        for level in bench.stops
        for method in bench.methods
    ]
    todo = [c for _, trials in tries for c in trials if c.read() is None]
    each(attempt, todo, stage="choosing step sizes")
    chosen = [c for m, trials in tries if (c := _choose(bench, m, trials)) is not None]
    winners = [trial for group in chosen for trial in group.trials]
    each(measured, _unmeasured(winners, bench), stage="measuring")
    return tidy(originals, chosen, bench.quantizers)


def _choose(bench: BenchConfig, model: LanguageModel, trials: Sequence[Trial]) -> Chosen | None:
    """The best retained of a method's tries, for every seed; the others' checkpoints are deleted.
    None while only a table is asked for and tries are missing."""
    found = [trial.read() for trial in trials]
    if bench.table_only and None in found:
        return None
    dev, level = [f.dev if f else None for f in found], trials[0].level
    if level is None:
        best = most_forgotten(dev)
        training = won.training if (won := found[best]) else None
        reached = training is not None and training.steps > 0
    else:
        best, reached = best_retained(dev, level)
    for k, trial in enumerate(trials):
        if k != best and not bench.table_only:
            shutil.rmtree(trial.checkpoint, ignore_errors=True)
    won = trials[best]
    others = [
        make_trial(
            bench,
            model,
            task=won.task,
            method=won.method,
            seed=seed,
            level=won.level,
            strength=won.strength,
        )
        for seed in bench.seeds[1:]
    ]
    return Chosen([won, *others], reached, len(trials))


def _unmeasured(trials: Iterable[Trial], bench: BenchConfig) -> list[Trial]:
    """Trials that lack something that is to be measured."""
    return [trial for trial in trials if any(unmeasured(trial, bench))]
