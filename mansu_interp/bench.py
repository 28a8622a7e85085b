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

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch

from .artifacts import atomic_folder, expect, locked, read_json, write_json
from .cad import CAD, Divergence, compare
from .circuit import Circuit, discover
from .config import BASELINES, BenchConfig, Method, RunConfig
from .defaults import default_config, is_embedded
from .distributed import launched
from .errors import ArtifactError, ConfigError, MansuError, ResourceError
from .evaluation import CHANCE, Scores, evaluate, properties
from .floor import quantizer_set
from .memory import enough_memory
from .models import LanguageModel, load_model
from .pairs import PairSet, Task
from .pipeline import make_mask
from .planning import CAD_PAIRS
from .quantizers import get_quantizer, quantize, survival
from .report.scoreboard import write_scoreboard
from .runfolder import config_json
from .sweep import Engine, engine
from .tasks import load_task
from .unlearning import dev_choice, unlearn

SCHEMA = 1
ORIGINAL = "original"
MAYBE = (float, None)
FILE = {
    "error?": str,
    "steps?": int,
    "seconds?": MAYBE,
    "peak_gb?": MAYBE,
    "dev?": {"forget": float, "retain": float, "retain_choice": float},
}
"""What is checked of a cell's file."""
SURVIVAL = ("update_over_bin", "projection", "noise_over_signal")
MEASURED = {
    "quantizers": {
        ...: {"edited": int, "survived": int, "collateral": int, **dict.fromkeys(SURVIVAL, MAYBE)}
    },
    "rows": [{"role": str, "n": int, "models": {...: {...: MAYBE}}}],
    "perplexity": ({...: MAYBE}, None),
    "edited": int,
    "parameters": int,
    "cad?": {"verdict": str, "sentence": str, "models": {...: {...: MAYBE}}},
}
"""And once it is measured."""
OnProgress = Callable[[str, int, int], None]


def _differences(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Settings that are not the default ones, so that a new setting leaves old cells valid."""
    return {
        k: _differences(v, usual[k]) if isinstance(v, dict) else v
        for k, v in given.items()
        if v != usual[k]
    }


def read_cell(file: Path) -> dict[str, Any]:
    """The results of a try, as `attempt` and `measure` write them.

    Raises:
        ArtifactError: missing, damaged, or something else.
    """
    found = read_json(file)
    try:
        expect(found, FILE, "it")
        if "quantizers" in found:
            expect(found, MEASURED, "it")
    except ValueError as error:
        raise ArtifactError(
            f"{file} is no cell of a benchmark: {error}. Delete it to run it again."
        ) from error
    return found


@dataclass(frozen=True)
class Cell:
    """One try: a method on a model and task, with one seed, level and step size."""

    model: str
    task: str
    method: str
    seed: int
    level: float
    strength: float
    config: RunConfig
    """Everything that decides what comes out."""
    sha256: str
    """Of the model's weights."""
    out: Path

    @property
    def key(self) -> str:
        """Readable, with a hash of all settings."""
        unusual = _differences(config_json(self.config), config_json(RunConfig()))
        what = [SCHEMA, self.sha256, self.method, unusual]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        group = f"{Path(self.model).name}-{Path(self.task).stem}"
        if self.method == ORIGINAL:
            return f"{group}/{ORIGINAL}-{digest}"
        return f"{group}/{self.method}-{self.level:g}-x{self.strength:g}-s{self.seed}-{digest}"

    @property
    def file(self) -> Path:
        """Where its results are kept."""
        return self.out / "cells" / f"{self.key}.json"

    @property
    def checkpoint(self) -> Path:
        """Where its model is kept."""
        return self.out / "work" / self.key

    def read(self) -> dict[str, Any] | None:
        """Its results so far."""
        return read_cell(self.file) if self.file.exists() else None


def make_cell(
    bench: BenchConfig, model: LanguageModel, task: str, method: str, seed: int,
    level: float, strength: float,
) -> Cell:  # fmt: skip
    """A cell with all its settings: the task's own, but dense methods have the usual equal weight
    of the retain loss, and their own step size."""
    base = replace(default_config(model.name, task), seed=seed, out=Path("."), threads=1)
    if method == ORIGINAL:
        return Cell(model.name, task, method, seed, 1.0, 1.0, base, model.sha256, bench.out)
    own, dense = base.unlearn, method in BASELINES
    own = replace(
        own,
        method=cast(Method, method),
        seed=seed,
        steps=bench.steps,
        stop_at=level,
        lr=(bench.lr if dense else own.lr) * strength,
        retain_weight=1.0 if dense else own.retain_weight,
        survive=own.survive if dense else bench.survive,
    )
    config = replace(base, unlearn=own)
    return Cell(model.name, task, method, seed, level, strength, config, model.sha256, bench.out)


@lru_cache(maxsize=2)
def _loaded(name: str, task: str, score_pairs: int) -> tuple[LanguageModel, Task]:
    model = load_model(name)
    return model, load_task(task, model, score_pairs)


def _circuit(cell: Cell, model: LanguageModel, task: Task) -> Circuit:
    """The circuit of a model, task and seed: found once, then read."""
    settings = replace(cell.config.circuit, seed=cell.seed)
    digest = hashlib.sha256(repr((cell.sha256, settings)).encode()).hexdigest()[:10]
    name = f"{Path(cell.model).name}-{task.name}-s{cell.seed}-{digest}.json"
    path = cell.out / "work" / "circuits" / name
    if not path.exists():
        discover(model, task.forget, settings, task.retain).save(path)
    sample = task.forget.sample(settings.pairs, settings.seed)
    return replace(Circuit.load(path), pairs=sample)


def _reset_peak() -> None:
    """Start the count of peak memory anew (Linux; elsewhere it covers the whole process)."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def attempt(cell: Cell) -> dict[str, Any]:
    """Train one cell, keep its checkpoint, and score that on the dev phrasings."""
    torch.set_num_threads(1)
    model, task = _loaded(cell.model, cell.task, cell.config.score_pairs)
    torch.manual_seed(cell.seed)
    circuit = None if cell.method in BASELINES else _circuit(cell, model, task)
    place = cell.checkpoint.with_name(f"{cell.checkpoint.name}.state")
    _reset_peak()
    started = time.perf_counter()
    try:
        with enough_memory("training a cell", "Fewer --jobs take less."):
            mask = make_mask(cell.config, model, task, circuit) if circuit else None
            result = unlearn(model, task, mask, cell.config.unlearn, resume=place)
    except ResourceError:
        raise  # says nothing of the method
    except MansuError as error:
        found: dict[str, Any] = {"error": str(error)}
    else:
        found = {
            "steps": result.stopped_at,
            "seconds": round(time.perf_counter() - started, 2),
            "peak_gb": _peak_gb(),
        }
        with atomic_folder(cell.checkpoint) as partial_:
            result.model.save(partial_)
        place.unlink(missing_ok=True)
        saved = load_model(cell.checkpoint)
        scores = evaluate({"fp": saved}, task, "dev")
        found["dev"] = {
            "forget": dev_choice(saved, task),
            "retain": scores.mean("retain", "top1", "fp"),
            "retain_choice": scores.mean("retain", "choice", "fp"),
        }
    settings = {"cell": [cell.model, cell.task, cell.method, cell.seed, cell.level, cell.strength]}
    found = {**settings, **found, "config": config_json(cell.config), "sha256": cell.sha256}
    write_json(cell.file, found)
    return found


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


def measure(cell: Cell, quantizers: Sequence[str]) -> dict[str, Any]:
    """Score a cell's checkpoint on the unseen phrasings, for the quantizers not yet measured."""
    torch.set_num_threads(1)
    model, task = _loaded(cell.model, cell.task, cell.config.score_pairs)
    found = cell.read() or {}
    have = found.get("quantizers", {})
    todo = [q for q in quantizers if q not in have]
    if not todo or "error" in found:
        return found
    untouched = cell.method == ORIGINAL
    if not untouched and not cell.checkpoint.exists():
        found = attempt(cell)  # the same again: everything is seeded
    edited = model if untouched else load_model(cell.checkpoint)
    models, lived = {}, {}
    for q in todo:  # side by side, so that a calibrated one need not fit the same model twice
        models[q] = quantize(edited, q, task.calibration)
        lived[q] = asdict(survival(model, edited, q, task.calibration))
    scores = evaluate(models if have else {"fp": edited, **models}, task)
    rows = found.get("rows", scores.rows)
    for row, new in zip(rows, scores.rows, strict=True):
        row["models"].update(new["models"])
    found["rows"] = rows
    perplexity = {**(found.get("perplexity") or {}), **(scores.perplexity or {})}
    found["perplexity"] = perplexity or None
    found["quantizers"] = {**have, **lived}
    found["edited"] = sum(int((model.weights[n] != w).sum()) for n, w in edited.weights.items())
    found["parameters"] = model.n_parameters
    if "cad" not in found and not untouched:
        unseen = [p for s in task.scored["unseen"]["forget"].values() for p in s]
        twin = load_model(task.twins[0]) if task.twins and is_embedded(cell.model) else None
        cad = compare(
            _circuit(cell, model, task),
            model,
            {"unlearned": edited, f"unlearned {todo[0]}": models[todo[0]]},
            PairSet("held out", tuple(unseen)).sample(CAD_PAIRS, cell.seed),
            replace(cell.config.circuit, seed=cell.seed),
            reference=twin,
        )
        found["cad"] = cad.to_json()
    write_json(cell.file, found)
    return found


def finish(cell: Cell, quantizers: Sequence[str]) -> dict[str, Any]:
    """Train a cell if that is not done, and measure it."""
    if cell.method != ORIGINAL and cell.read() is None:
        attempt(cell)
    return measure(cell, quantizers)


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
    models = {name: load_model(name) for name in bench.models}
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
    measured = partial(finish, quantizers=bench.quantizers)

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
    """Cells that lack one of the quantizers."""
    out = []
    for cell in cells:
        found = cell.read() or {}
        if "error" not in found and set(bench.quantizers) - set(found.get("quantizers", {})):
            out.append(cell)
    return out


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
        row = {**mine, "models": {}}
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
    forget, retain, gap, erased = properties(scores, verdict, quantizer)
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
        "erased": erased["passed"],
        "cad": cad["verdict"] if cad else None,
        "cad_alignment": erased["value"] if cad else None,
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
    the original at the same precision. ``reached`` says whether this seed came down to the level,
    ``searched`` whether the seed that chose the step size did.
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
