"""Cells of the benchmark: one try of one method, trained, kept in files, and measured.

A cell's results are one JSON file under ``cells``, named by a hash of its settings and of the
model's weights, and written whole or not at all; its checkpoint stays in ``work``.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from .artifacts import atomic_folder, expect, read_json, write_json
from .cad import compare
from .circuit import Circuit, discover
from .config import BASELINES, BenchConfig, Method, RelearnConfig, RunConfig, UnlearnConfig
from .defaults import default_config
from .erasure import judge_erasure
from .errors import ArtifactError, MansuError, ResourceError
from .evaluation import Flips, Scores, evaluate
from .ledger import changed_elements
from .memory import enough_memory
from .models import LanguageModel, load_model
from .pairs import Task
from .pipeline import make_mask
from .planning import CAD_PAIRS
from .provenance import tokenizer_sha256
from .quantizers import quantize, survival
from .relearning import relearn
from .runfolder import config_json
from .tasks import first_twin, load_task
from .unlearning import dev_choice, unlearn

SCHEMA = 1
ORIGINAL = "original"
RELEARNING = "relearning"
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
        ...: {
            "edited": int,
            "survived": int,
            "collateral": int,
            "flips?": {"back": int, "gone": int, "p": float},
            **dict.fromkeys(SURVIVAL, MAYBE),
        }
    },
    "rows": [{"role": str, "n": int, "models": {...: {...: MAYBE}}}],
    "perplexity": ({...: MAYBE}, None),
    "edited": int,
    "parameters": int,
    "cad?": {"verdict": str, "sentence": str, "models": {...: {...: MAYBE}}},
    "relearning?": {"points": [{...: float}], "facts": [int], "meta": dict},
    "erasure?": {"verdict": str, "cad": float},
}
"""And once it is measured."""


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
        given = {**config_json(self.config), "device": "auto"}  # it decides nothing
        unusual = _differences(given, config_json(RunConfig()))
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
    """A cell with all its settings: the task's own for MANSU and its variants. Dense methods have
    the usual ones (the retain loss weighs as much as the forget loss) and their own step size, so
    that what a task says about MANSU leaves their cells valid."""
    base = default_config(model.name, task)
    base = replace(base, seed=seed, out=Path("."), threads=1, device=bench.device)
    own = replace(base.unlearn, survive=bench.survive)
    if method == ORIGINAL or method in BASELINES:
        own = UnlearnConfig(lr=bench.lr, retain_weight=1.0, batch_size=own.batch_size)
        base = RunConfig(
            base.model, task, base.out, seed=seed, threads=1, device=bench.device,
            score_pairs=base.score_pairs, circuit=base.circuit, unlearn=own,
        )  # fmt: skip
    if method == ORIGINAL:
        return Cell(model.name, task, method, seed, 1.0, 1.0, base, model.sha256, bench.out)
    own = replace(
        own,
        method=cast(Method, method),
        seed=seed,
        steps=bench.steps,
        stop_at=level,
        lr=own.lr * strength,
    )
    config = replace(base, unlearn=own)
    return Cell(model.name, task, method, seed, level, strength, config, model.sha256, bench.out)


@lru_cache(maxsize=2)
def _loaded(name: str, task: str, score_pairs: int, device: str) -> tuple[LanguageModel, Task]:
    model = load_model(name, device)
    return model, load_task(task, model, score_pairs)


def _circuit(cell: Cell, model: LanguageModel, task: Task) -> Circuit:
    """The circuit of a model, its tokenizer, a task and a seed: found once, then read."""
    settings = replace(cell.config.circuit, seed=cell.seed)
    which = cell.sha256, tokenizer_sha256(model.tokenizer), settings
    digest = hashlib.sha256(repr(which).encode()).hexdigest()[:10]
    name = f"{Path(cell.model).name}-{task.name}-s{cell.seed}-{digest}.json"
    path = cell.out / "work" / "circuits" / name
    if not path.exists():
        discover(model, task.forget, settings, task.retain).save(path)
    sample = task.forget.sample(settings.pairs, settings.seed)
    return replace(Circuit.load(path), pairs=sample)


def _reset_peak(device: torch.device) -> None:
    """Start the count of peak memory anew (Linux; elsewhere it covers the whole process)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb(device: torch.device) -> float:
    """Of the device that computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def attempt(cell: Cell) -> dict[str, Any]:
    """Train one cell, keep its checkpoint, and score that on the dev phrasings."""
    torch.set_num_threads(1)
    model, task = _loaded(cell.model, cell.task, cell.config.score_pairs, cell.config.device)
    torch.manual_seed(cell.seed)
    circuit = None if cell.method in BASELINES else _circuit(cell, model, task)
    place = cell.checkpoint.with_name(f"{cell.checkpoint.name}.state")
    _reset_peak(model.device)
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
            "peak_gb": _peak_gb(model.device),
        }
        with atomic_folder(cell.checkpoint) as partial_:
            result.model.save(partial_)
        place.unlink(missing_ok=True)
        saved = load_model(cell.checkpoint, model.device)
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


def unmeasured(cell: Cell, found: dict[str, Any], bench: BenchConfig) -> list[str]:
    """What a trained cell lacks: quantizers by name, and ``relearning``."""
    if "error" in found:
        return []
    lacks = [q for q in bench.quantizers if q not in found.get("quantizers", {})]
    if cell.method != ORIGINAL and bench.relearn_steps:
        points = found.get("relearning", {}).get("points", [])
        lacks += [] if any(p["steps"] == bench.relearn_steps for p in points) else [RELEARNING]
    return lacks


def measure(cell: Cell, bench: BenchConfig) -> dict[str, Any]:
    """Score a cell's checkpoint on the unseen phrasings, for the quantizers not yet measured, and
    attack it by relearning."""
    torch.set_num_threads(1)
    model, task = _loaded(cell.model, cell.task, cell.config.score_pairs, cell.config.device)
    found = cell.read() or {}
    lacks = unmeasured(cell, found, bench)
    todo = [q for q in lacks if q != RELEARNING]
    if not lacks:
        return found
    untouched = cell.method == ORIGINAL
    if not untouched and not cell.checkpoint.exists():
        found |= attempt(cell)  # the same again: everything is seeded
    edited = model if untouched else load_model(cell.checkpoint, model.device)
    if RELEARNING in lacks:
        attack = RelearnConfig(steps=(bench.relearn_steps,), seed=cell.seed)
        found["relearning"] = relearn(edited, task, attack).to_json()
        judged = judge_erasure(model, edited, task, seed=cell.seed)
        found["erasure"] = {"verdict": judged.verdict, "cad": judged.cad}
    if todo:
        _score(cell, found, edited, todo)
    write_json(cell.file, found)
    return found


def _score(cell: Cell, found: dict[str, Any], edited: LanguageModel, todo: Sequence[str]) -> None:
    """Add to a cell's results what some quantizers make of its checkpoint, and its graphs."""
    model, task = _loaded(cell.model, cell.task, cell.config.score_pairs, cell.config.device)
    models, lived = {"fp": edited}, {}
    for q in todo:  # side by side, so that a calibrated one need not fit the same model twice
        models[q] = quantize(edited, q, task.calibration)
        lived[q] = asdict(survival(model, edited, q, task.calibration))
    scores = evaluate(models, task)
    for q in todo:
        lived[q]["flips"] = asdict(Flips.between(scores.first["fp"], scores.first[q]))
    known = Scores(found.get("rows", scores.rows), found.get("perplexity")).beside(scores)
    found["rows"], found["perplexity"] = known.rows, known.perplexity
    found["quantizers"] = {**found.get("quantizers", {}), **lived}
    found["edited"] = sum(changed_elements(model, edited).values())
    found["parameters"] = model.n_parameters
    if "cad" not in found and cell.method != ORIGINAL:
        cad = compare(
            _circuit(cell, model, task),
            model,
            {"unlearned": edited, f"unlearned {todo[0]}": models[todo[0]]},
            task.held_out.sample(CAD_PAIRS, cell.seed),
            replace(cell.config.circuit, seed=cell.seed),
            reference=first_twin(task, model),
        )
        found["cad"] = cad.to_json()


def finish(cell: Cell, bench: BenchConfig) -> dict[str, Any]:
    """Train a cell if that is not done, and measure it."""
    if cell.method != ORIGINAL and cell.read() is None:
        attempt(cell)
    return measure(cell, bench)
