"""The benchmark: models x tasks x methods x quantizers x seeds, at the same forgetting.

For each model, task, level and method the first seed tries the same few step sizes, as multiples
of the method's usual one, each for the same number of steps at most. A try stops when its four-way
accuracy on the forget facts' dev phrasings reaches the level; of those that reach it the one that
retained best, on dev phrasings too, sets the step size of every seed (`best_retained`). Only
winners are measured on the unseen phrasings, on the checkpoint as saved and loaded again, before
and after each quantizer.

A try is one JSON file under ``cells``, named by a hash of its settings and of the model's weights,
and written whole or not at all: a benchmark that was killed goes on where it was. Checkpoints stay
in ``work``, so that another quantizer can be measured later; without them tries are run again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .artifacts import locked
from .cad import CAD, Divergence
from .cells import ORIGINAL, Cell, attempt, finish, make_cell, unmeasured
from .config import BenchConfig
from .defaults import default_config
from .distributed import launched
from .errors import ConfigError
from .evaluation import CHANCE, Scores, properties
from .floor import quantizer_set
from .models import LanguageModel, load_model
from .quantizers import get_quantizer
from .relearning import Relearning
from .report.scoreboard import write_scoreboard
from .sweep import Engine, engine
from .tasks import load_task

OnProgress = Callable[[str, int, int], None]


def best_retained(tries: Sequence[dict[str, Any]], level: float) -> tuple[int, bool]:
    """The fair stop: which of a method's tries stands for it.

    Arguments:
        tries: results with ``dev``: ``forget`` (four-way), ``retain`` (top-1) and
            ``retain_choice``, all on dev phrasings, smallest step first; failed ones without.
        level: four-way forget accuracy asked for.

    Returns:
        The position of the best retained of those that reach the level (ties: the smallest step),
        and True; where none does, of the one that forgot most, and False.
    """
    dev = [t.get("dev") or {"forget": 9.0, "retain": -1.0, "retain_choice": -1.0} for t in tries]
    there = [k for k, d in enumerate(dev) if d["forget"] <= level]
    if not there:
        return min(range(len(dev)), key=lambda k: dev[k]["forget"]), False
    return max(there, key=lambda k: (dev[k]["retain"], dev[k]["retain_choice"], -k)), True


@dataclass(frozen=True)
class Chosen:
    """A method's winning step size on one model, task and level, with a cell per seed."""

    cells: list[Cell]
    reached: bool
    """Whether the first seed's try reached the level."""


def run_bench(bench: BenchConfig, on_progress: OnProgress | None = None) -> list[dict[str, Any]]:
    """Run what is missing, and write ``table.csv``, ``scoreboard.md`` and ``scoreboard.html``.

    Arguments:
        bench: what to compare.
        on_progress: called with (stage, done, total).

    Returns:
        One row per model, task, level, method, seed and quantizer (see `tidy`).

    Raises:
        MansuError: an unknown model, task or quantizer, or Dask is needed and cannot be used,
            before any long work.
        ResourceError: disk or memory ran out, or another benchmark writes to the folder.
    """
    if launched() > 1:
        raise ConfigError("bench shares out whole cells: start it once, with --jobs.")
    for name in bench.quantizers:
        get_quantizer(name)
    quantizer_set(bench.survive)
    models = {name: load_model(name, bench.device) for name in bench.models}
    for model in models.values():
        for task in bench.tasks:
            load_task(task, model, default_config(model.name, task).score_pairs)
    jobs, scheduler = (1, None) if bench.table_only else (bench.jobs, bench.scheduler)
    with locked(bench.out), engine(jobs, scheduler) as compute:
        rows = _run_missing(bench, models, compute, on_progress or (lambda *_: None))
        write_scoreboard(bench.out, rows)
    return rows


def _run_missing(
    bench: BenchConfig, models: dict[str, LanguageModel], compute: Engine, note: OnProgress
) -> list[dict[str, Any]]:
    """Train and measure the cells that are not finished; the table's rows."""
    new = partial(make_cell, bench)
    grid = [(m, t) for m in models.values() for t in bench.tasks]
    strengths = sorted(bench.strengths)
    first, rest = bench.seeds[0], bench.seeds[1:]
    measured = partial(finish, bench=bench)

    originals = [new(m, t, ORIGINAL, first, 1.0, 1.0) for m, t in grid]

    def each(do: Callable[[Cell], Any], cells: Sequence[Cell], stage: str) -> None:
        if not cells or bench.table_only:
            return
        note(stage, 0, len(cells))
        for k, _ in enumerate(compute(do, cells)):
            note(stage, k + 1, len(cells))

    each(measured, _unmeasured(originals, bench), stage="the originals")
    tries = [
        (m, [new(m, t, method, first, level, s) for s in strengths])
        for m, t in grid
        for level in bench.levels
        for method in bench.methods
    ]
    todo = [c for _, cells in tries for c in cells if c.read() is None]
    each(attempt, todo, stage="choosing step sizes")
    chosen: list[Chosen] = []
    for model, cells in tries:
        if bench.table_only and any(c.read() is None for c in cells):
            continue
        best, reached = best_retained([c.read() or {} for c in cells], cells[0].level)
        for k, cell in enumerate(cells):
            if k != best and not bench.table_only:
                shutil.rmtree(cell.checkpoint, ignore_errors=True)
        won = cells[best]
        others = [new(model, won.task, won.method, x, won.level, won.strength) for x in rest]
        chosen.append(Chosen([won, *others], reached))
    winners = [c for group in chosen for c in group.cells]
    each(measured, _unmeasured(winners, bench), stage="measuring")
    return tidy(originals, chosen, bench.quantizers)


def _unmeasured(cells: Iterable[Cell], bench: BenchConfig) -> list[Cell]:
    """Cells that lack something that is to be measured."""
    return [c for c in cells if unmeasured(c, c.read() or {}, bench)]


def _complete(cell: Cell, quantizer: str) -> bool:
    found = cell.read() or {}
    return "error" in found or quantizer in found.get("quantizers", {})


def _row(
    cell: Cell, found: dict[str, Any], original: dict[str, Any], quantizer: str, reached: bool
) -> dict[str, Any]:
    """One line of the table."""
    out: dict[str, Any] = {
        "model": Path(cell.model).name,
        "task": Path(cell.task).stem,
        "level": cell.level,
        "method": cell.method,
        "seed": cell.seed,
        "strength": cell.strength,
        "lr": cell.config.unlearn.lr,
        "quantizer": quantizer,
    }
    if "error" in found:
        return {**out, "error": found["error"]}
    rows = []
    for mine, theirs in zip(found["rows"], original["rows"], strict=True):
        # The original's, so that cells of older versions are judged as the others are.
        row = {**mine, "chance_top1": theirs.get("chance_top1", 0.0), "models": {}}
        for name, models in (("original", theirs["models"]), ("unlearned", mine["models"])):
            row["models"][name] = models["fp"]
            row["models"][f"{name} {quantizer}"] = models[quantizer]
        rows.append(row)
    perplexity = None
    if found["perplexity"]:
        perplexity = {
            name + suffix: source["perplexity"][key]
            for name, source in (("original", original), ("unlearned", found))
            for suffix, key in (("", "fp"), (f" {quantizer}", quantizer))
        }
    scores = Scores(rows, perplexity)
    cad = found.get("cad")
    parts = {k: Divergence(**d) for k, d in cad["models"].items()} if cad else {}
    verdict = CAD(cad["verdict"], cad["sentence"], parts) if cad else CAD("-", "-", {"": _NONE})
    attack = Relearning.from_json(found["relearning"]) if "relearning" in found else None
    forget, retain, gap, erased = properties(scores, verdict, [quantizer], attack)
    lived = found["quantizers"][quantizer]
    after = f"unlearned {quantizer}"
    out |= {
        "reached": found.get("dev", {}).get("forget", 9.0) <= cell.level,
        "searched": reached,
        "steps": found.get("steps"),
        "dev_forget": found.get("dev", {}).get("forget"),
        "prompts": sum(r["n"] for r in rows if r["role"] == "forget"),
    }
    for key in ("choice", "top1"):
        out[f"forget_{key}_original"] = scores.mean("forget", key, "original")
        out[f"forget_{key}_original_q"] = scores.mean("forget", key, f"original {quantizer}")
        out[f"forget_{key}"] = scores.mean("forget", key, "unlearned")
        out[f"forget_{key}_q"] = scores.mean("forget", key, after)
        out[f"gap_{key}"] = out[f"forget_{key}_q"] - out[f"forget_{key}"]
        out[f"retain_{key}"] = scores.mean("retain", key, "unlearned")
        out[f"retain_{key}_q"] = scores.mean("retain", key, after)
    out |= {
        "above_chance": out["forget_choice"] - CHANCE,
        "forgets": forget["passed"],
        "forget_margin": forget["margin"],
        "retains": retain["passed"],
        "retain_margin": retain["margin"],
        "stays": gap["passed"],
        "gap_margin": gap["margin"],
        **{key: lived.get("flips", {}).get(key) for key in ("back", "gone", "p")},
        "erased": erased["passed"],
        "relearnt_choice": attack.up_to(attack.marks[-1]) if attack else None,
        "relearnt_top1": attack.up_to(attack.marks[-1], "top1") if attack else None,
        "cad": found.get("erasure", {}).get("verdict"),
        "cad_score": found.get("erasure", {}).get("cad"),
        "attribution": cad["verdict"] if cad else None,
        "alignment": parts["unlearned"].alignment if cad else None,
        "edited_share": found["edited"] / found["parameters"],
        "codes_changed": lived["survived"] / lived["edited"] if lived["edited"] else None,
        "collateral": lived["collateral"],
        "update_over_bin": lived["update_over_bin"],
        "projection": lived["projection"],
        "noise_over_signal": lived["noise_over_signal"],
        "seconds": found.get("seconds"),
        "peak_gb": found.get("peak_gb"),
    }
    return out


_NONE = Divergence(0.0, 0.0, 0.0, 0.0, 0.0)


def tidy(
    originals: Sequence[Cell], chosen: Sequence[Chosen], quantizers: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per cell and quantizer.

    ``gap_*`` is accuracy after minus before the quantizer; margins are positive where a property is
    met (see `properties`); ``retain_margin`` counts the largest change of any retain score against
    the original at the same precision. ``back``, ``gone`` and ``p`` are the prompts behind
    ``gap_choice`` (`Flips`); cells of older versions lack them. ``reached`` says whether this seed
    came down to the level, ``searched`` whether the seed that chose the step size did.
    """
    reference = {(c.model, c.task): c.read() or {} for c in originals}
    return [
        _row(cell, cell.read() or {}, reference[cell.model, cell.task], quantizer, group.reached)
        for group in chosen
        for cell in group.cells
        for quantizer in quantizers
        if _complete(cell, quantizer)
        and quantizer in reference[cell.model, cell.task].get("quantizers", {})
    ]
