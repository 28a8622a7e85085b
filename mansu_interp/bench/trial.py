"""Trials of the benchmark: one try of one method, trained and kept in files.

A trial's results are one JSON file under ``trials``, named by a hash of its settings and of the
model's weights, and written whole or not at all; its checkpoint stays in ``work``.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from ..audit.known import known_forget
from ..circuits.circuit import Circuit
from ..circuits.search.discover import discover
from ..errors import MansuError, ModelError, ResourceError
from ..evaluation.scores import evaluate
from ..evaluation.versions import EDITED
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..models.provenance import tokenizer_sha256
from ..runs.config import RunConfig
from ..runs.defaults import default_config
from ..runs.edit import make_mask
from ..runs.folder import config_json
from ..tasks.load import load_task
from ..tasks.task import Task
from ..unlearning.methods import BASELINES, Mansu
from ..unlearning.training import dev_choice
from ..unlearning.unlearn import unlearn
from ..utils.files import Json, atomic_folder
from ..utils.libraries import enough_memory
from .config import BenchConfig
from .disruption import LastWithin, disruption, disruption_text
from .results import SCHEMA, DevScores, Disruption, Look, Training, TrialName, TrialResult

ORIGINAL = "original"


def _differences(given: dict[str, Json], usual: dict[str, Json]) -> dict[str, Json]:
    """Settings that are not the default ones, so that a new setting leaves old trials valid."""
    return {
        k: _differences(v, usual[k]) if isinstance(v, dict) else v
        for k, v in given.items()
        if v != usual[k]
    }


@dataclass(frozen=True)
class Trial:
    """One try: a method on a model and task, with one seed, level and step size."""

    model: str
    task: str
    method: str
    seed: int
    level: float | None
    """None: a disruption budget instead."""
    strength: float
    config: RunConfig
    """Everything that decides what comes out."""
    sha256: str
    """Of the model's weights."""
    out: Path
    disruption: float | None = None
    """The budget, in nats a token."""

    @property
    def key(self) -> str:
        """Readable, with a hash of all settings."""
        given = {**config_json(self.config), "device": "auto"}  # it decides nothing
        usual = config_json(RunConfig(unlearn=type(self.config.unlearn)()))
        unusual = _differences(given, usual)
        what: list[Json] = [SCHEMA, self.sha256, self.method, unusual]
        what += [] if self.disruption is None else [self.disruption]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        group = f"{Path(self.model).name}-{Path(self.task).stem}"
        if self.method == ORIGINAL:
            return f"{group}/{ORIGINAL}-{digest}"
        at = f"kl{self.disruption:g}" if self.level is None else f"{self.level:g}"
        return f"{group}/{self.method}-{at}-x{self.strength:g}-s{self.seed}-{digest}"

    @property
    def file(self) -> Path:
        """Where its results are kept."""
        return self.out / "trials" / f"{self.key}.json"

    @property
    def checkpoint(self) -> Path:
        """Where its model is kept."""
        return self.out / "work" / self.key

    @property
    def name(self) -> TrialName:
        """Which try it is."""
        return TrialName(
            model=self.model,
            task=self.task,
            method=self.method,
            seed=self.seed,
            level=self.level,
            strength=self.strength,
            disruption=self.disruption,
        )

    def blank(self) -> TrialResult:
        """Results of nothing yet."""
        return TrialResult(SCHEMA, self.name, config_json(self.config), self.sha256)

    def read(self) -> TrialResult | None:
        """Its results so far."""
        return TrialResult.load(self.file) if self.file.exists() else None


def make_trial(
    bench: BenchConfig, model: LanguageModel, task: str, method: str, seed: int,
    level: float | None, strength: float,
) -> Trial:  # fmt: skip
    """A trial with all its settings: those that a run of the method starts from, at another step
    size and level (None: the benchmark's disruption budget).
    What a task says about masks and MANSU leaves trials of baselines valid."""
    original = method == ORIGINAL
    base = default_config(model.name, task, method=BASELINES[0] if original else method)
    own = base.unlearn
    if isinstance(own, Mansu):
        own = replace(own, survive=bench.survive)
    else:
        base = RunConfig(score_pairs=base.score_pairs, circuit=base.circuit)
    if not original:
        own = replace(own.at_strength(strength), steps=bench.steps, stop_at=level)
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
        disruption=bench.disruption if level is None and not original else None,
    )  # fmt: skip


@lru_cache(maxsize=2)
def loaded(name: str, task: str, score_pairs: int, device: str) -> tuple[LanguageModel, Task]:
    """A model and what it knows of a task, kept for the next trial."""
    model = load_model(name, device)
    return model, known_forget(model, load_task(task, model, score_pairs))[0]


def find_circuit(trial: Trial, model: LanguageModel, task: Task) -> Circuit:
    """The circuit of a model, its tokenizer, a task and a seed: found once, then read."""
    settings = trial.config.circuit
    which = trial.sha256, tokenizer_sha256(model.tokenizer), settings, trial.seed
    digest = hashlib.sha256(repr(which).encode()).hexdigest()[:10]
    name = f"{Path(trial.model).name}-{task.name}-s{trial.seed}-{digest}.json"
    path = trial.out / "work" / "circuits" / name
    if not path.exists():
        discover(model, task.forget, config=settings, retain=task.retain, seed=trial.seed).save(
            path
        )
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


def attempt(trial: Trial) -> TrialResult:
    """Train one trial, keep its checkpoint, and score that on the dev phrasings.

    With a disruption budget the checkpoint is the last measured step within it, and a killed trial
    begins anew.
    """
    torch.set_num_threads(1)
    model, task = loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
    torch.manual_seed(trial.seed)
    _reset_peak(model.device)
    started = time.perf_counter()
    resume = trial.checkpoint.with_name(f"{trial.checkpoint.name}.state")
    try:
        with enough_memory("training a trial", "Fewer --jobs take less."):
            edited, steps, looks = _train(trial, model, task, resume)
    except ResourceError:
        raise  # says nothing of the method
    except MansuError as error:
        found = replace(trial.blank(), error=str(error))
    else:
        seconds = round(time.perf_counter() - started, 2)
        training = Training(steps, seconds, _peak_gb(model.device))
        with atomic_folder(trial.checkpoint) as partial_:
            edited.save(partial_)
        resume.unlink(missing_ok=True)
        saved = load_model(trial.checkpoint, model.device)
        dev, moved = _dev_scores(saved, task), _disruption(model, saved, task, looks)
        found = replace(trial.blank(), training=training, dev=dev, disruption=moved)
    found.save(trial.file)
    return found


def _train(
    trial: Trial, model: LanguageModel, task: Task, resume: Path
) -> tuple[LanguageModel, int, tuple[Look, ...]]:
    """The model that a trial comes to, its steps, and what was measured on the way."""
    config = trial.config.unlearn
    circuit = find_circuit(trial, model, task) if "circuit" in config.needs else None
    mask = make_mask(trial.config, model, task, circuit) if "mask" in config.needs else None
    if trial.disruption is None:
        made = unlearn(model, task, mask, config, seed=trial.seed, resume=resume)
        return made.model, made.stopped_at, ()
    last = LastWithin(model, task, trial.disruption)
    try:
        made = unlearn(model, task, mask, config, seed=trial.seed, on_look=last.look)
        last.look(made.model, made.stopped_at)
    except ModelError:
        if not last.looks:
            raise
        # It diverged later: what was within the budget before stands.
    return last.model, last.step, tuple(last.looks)


def _disruption(
    model: LanguageModel, saved: LanguageModel, task: Task, looks: tuple[Look, ...]
) -> Disruption:
    """Of a checkpoint."""
    kind, text = disruption_text(task)
    return Disruption(disruption(model, saved, text), kind, looks)


def _dev_scores(saved: LanguageModel, task: Task) -> DevScores:
    """Of a checkpoint, on the phrasings that choose the step size."""
    scores = evaluate({EDITED: saved}, task, "dev")
    return DevScores(
        forget=dev_choice(saved, task),
        retain=scores.mean("retain", "top1", EDITED),
        retain_choice=scores.mean("retain", "choice", EDITED),
    )
