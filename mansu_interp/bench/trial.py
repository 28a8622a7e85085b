"""Trials of the benchmark: one try of one method, trained, kept in files, and measured.

A trial's results are one JSON file under ``trials``, named by a hash of its settings and of the
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
from typing import Any

import torch

from ..audit.cad import judge_erasure
from ..audit.config import RelearnConfig
from ..audit.relearning import relearn
from ..circuits.circuit import Circuit
from ..circuits.compare import compare
from ..circuits.discover import discover
from ..errors import ArtifactError, MansuError, ResourceError
from ..evaluation.scores import Flips, Scores, evaluate
from ..export.ledger import changed_elements
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..models.provenance import tokenizer_sha256
from ..quantizers.survival import quantize, survival
from ..runs.config import RunConfig
from ..runs.defaults import default_config
from ..runs.folder import config_json
from ..runs.plan import CAD_PAIRS
from ..runs.run import make_mask
from ..tasks.load import load_task, reference_model
from ..tasks.task import Task
from ..unlearning.methods import BASELINES, Mansu
from ..unlearning.training import dev_choice
from ..unlearning.unlearn import unlearn
from ..utils.files import atomic_folder, expect, read_json, write_json
from ..utils.memory import enough_memory
from .config import BenchConfig

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
"""What is checked of a trial's file."""
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
    "cad?": {"models": {...: {...: MAYBE}}},
    "relearning?": {"points": [{...: float}], "facts": [int], "meta": dict},
    "erasure?": {"verdict": str, "cad": float},
}
"""And once it is measured."""


def _differences(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Settings that are not the default ones, so that a new setting leaves old trials valid."""
    return {
        k: _differences(v, usual[k]) if isinstance(v, dict) else v
        for k, v in given.items()
        if v != usual[k]
    }


def read_trial(file: Path) -> dict[str, Any]:
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
            f"{file} is no trial of a benchmark: {error}. Delete it to run it again."
        ) from error
    return found


@dataclass(frozen=True)
class Trial:
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
        usual = config_json(RunConfig(unlearn=type(self.config.unlearn)()))
        unusual = _differences(given, usual)
        what = [SCHEMA, self.sha256, self.method, unusual]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        group = f"{Path(self.model).name}-{Path(self.task).stem}"
        if self.method == ORIGINAL:
            return f"{group}/{ORIGINAL}-{digest}"
        return f"{group}/{self.method}-{self.level:g}-x{self.strength:g}-s{self.seed}-{digest}"

    @property
    def file(self) -> Path:
        """Where its results are kept."""
        return self.out / "trials" / f"{self.key}.json"

    @property
    def checkpoint(self) -> Path:
        """Where its model is kept."""
        return self.out / "work" / self.key

    def read(self) -> dict[str, Any] | None:
        """Its results so far."""
        return read_trial(self.file) if self.file.exists() else None


def make_trial(
    bench: BenchConfig, model: LanguageModel, task: str, method: str, seed: int,
    level: float, strength: float,
) -> Trial:  # fmt: skip
    """A trial with all its settings: those that a run of the method starts from, at another step
    size and level. What a task says about masks and MANSU leaves trials of baselines valid."""
    original = method == ORIGINAL
    base = default_config(model.name, task, method=BASELINES[0] if original else method)
    own = base.unlearn
    if isinstance(own, Mansu):
        own = replace(own, survive=bench.survive)
    else:
        base = RunConfig(score_pairs=base.score_pairs, circuit=base.circuit)
    if not original:
        own = replace(own, steps=bench.steps, stop_at=level, lr=own.lr * strength)
    return Trial(
        model=model.name,
        task=task,
        method=method,
        seed=seed,
        level=1.0 if original else level,
        strength=1.0 if original else strength,
        config=replace(
            base, model=model.name, task=task, out=Path("."), seed=seed, threads=1,
            device=bench.device, unlearn=own,
        ),
        sha256=model.sha256,
        out=bench.out,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _loaded(name: str, task: str, score_pairs: int, device: str) -> tuple[LanguageModel, Task]:
    model = load_model(name, device)
    return model, load_task(task, model, score_pairs)


def _circuit(trial: Trial, model: LanguageModel, task: Task) -> Circuit:
    """The circuit of a model, its tokenizer, a task and a seed: found once, then read."""
    settings = trial.config.circuit
    which = trial.sha256, tokenizer_sha256(model.tokenizer), settings, trial.seed
    digest = hashlib.sha256(repr(which).encode()).hexdigest()[:10]
    name = f"{Path(trial.model).name}-{task.name}-s{trial.seed}-{digest}.json"
    path = trial.out / "work" / "circuits" / name
    if not path.exists():
        discover(model, task.forget, settings, task.retain, seed=trial.seed).save(path)
    sample = task.forget.sample(settings.pairs, trial.seed)
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


def attempt(trial: Trial) -> dict[str, Any]:
    """Train one trial, keep its checkpoint, and score that on the dev phrasings."""
    torch.set_num_threads(1)
    model, task = _loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
    torch.manual_seed(trial.seed)
    needs = trial.config.unlearn.needs
    circuit = _circuit(trial, model, task) if "circuit" in needs else None
    resume = trial.checkpoint.with_name(f"{trial.checkpoint.name}.state")
    _reset_peak(model.device)
    started = time.perf_counter()
    try:
        with enough_memory("training a trial", "Fewer --jobs take less."):
            mask = make_mask(trial.config, model, task, circuit) if "mask" in needs else None
            result = unlearn(
                model, task, mask, trial.config.unlearn, seed=trial.seed, resume=resume
            )
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
        with atomic_folder(trial.checkpoint) as partial_:
            result.model.save(partial_)
        resume.unlink(missing_ok=True)
        saved = load_model(trial.checkpoint, model.device)
        scores = evaluate({"fp": saved}, task, "dev")
        found["dev"] = {
            "forget": dev_choice(saved, task),
            "retain": scores.mean("retain", "top1", "fp"),
            "retain_choice": scores.mean("retain", "choice", "fp"),
        }
    settings = {
        "trial": [trial.model, trial.task, trial.method, trial.seed, trial.level, trial.strength]
    }
    found = {**settings, **found, "config": config_json(trial.config), "sha256": trial.sha256}
    write_json(trial.file, found)
    return found


def unmeasured(trial: Trial, found: dict[str, Any], bench: BenchConfig) -> list[str]:
    """What a trained trial lacks: quantizers by name, and ``relearning``."""
    if "error" in found:
        return []
    lacks = [q for q in bench.quantizers if q not in found.get("quantizers", {})]
    if trial.method != ORIGINAL and bench.relearn_steps:
        points = found.get("relearning", {}).get("points", [])
        lacks += [] if any(p["steps"] == bench.relearn_steps for p in points) else [RELEARNING]
    return lacks


def measure(trial: Trial, bench: BenchConfig) -> dict[str, Any]:
    """Score a trial's checkpoint on the unseen phrasings, for the quantizers not yet measured, and
    attack it by relearning."""
    torch.set_num_threads(1)
    model, task = _loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
    found = trial.read() or {}
    lacks = unmeasured(trial, found, bench)
    todo = [q for q in lacks if q != RELEARNING]
    if not lacks:
        return found
    untouched = trial.method == ORIGINAL
    if not untouched and not trial.checkpoint.exists():
        found |= attempt(trial)  # the same again: everything is seeded
    edited = model if untouched else load_model(trial.checkpoint, model.device)
    if RELEARNING in lacks:
        attack = RelearnConfig(steps=(bench.relearn_steps,), seed=trial.seed)
        found["relearning"] = relearn(edited, task, attack).to_json()
        judged = judge_erasure(model, edited, task, seed=trial.seed)
        found["erasure"] = {"verdict": judged.verdict, "cad": judged.cad}
    if todo:
        _score(trial, found, edited, todo)
    write_json(trial.file, found)
    return found


def _score(trial: Trial, found: dict[str, Any], edited: LanguageModel, todo: Sequence[str]) -> None:
    """Add to a trial's results what some quantizers make of its checkpoint, and its graphs."""
    model, task = _loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
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
    if "cad" not in found and trial.method != ORIGINAL:
        cad = compare(
            _circuit(trial, model, task),
            model,
            {"unlearned": edited, f"unlearned {todo[0]}": models[todo[0]]},
            task.held_out.sample(CAD_PAIRS, trial.seed),
            trial.config.circuit,
            reference=reference_model(task, model),
        )
        found["cad"] = cad.to_json()


def finish(trial: Trial, bench: BenchConfig) -> dict[str, Any]:
    """Train a trial if that is not done, and measure it."""
    if trial.method != ORIGINAL and trial.read() is None:
        attempt(trial)
    return measure(trial, bench)
