"""Measuring the checkpoint of a trial: scores, survival, attribution graphs, relearning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..audit.cad import judge_erasure
from ..audit.config import RelearnConfig
from ..audit.relearning import relearn
from ..circuits.compare import Divergence, compare
from ..evaluation.scores import METRICS, Flips, evaluate
from ..export.ledger import changed_elements
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..quantizers.survival import quantize, survival
from ..runs.planning.seconds import CAD_PAIRS
from ..tasks.load import reference_model
from .config import BenchConfig
from .results import Judgement, Measured, QuantizedEdit, TrialResult
from .trial import ORIGINAL, Trial, attempt, find_circuit, loaded


def finish(trial: Trial, bench: BenchConfig) -> TrialResult:
    """Train a trial if that is not done, and measure it."""
    if trial.method != ORIGINAL and trial.read() is None:
        attempt(trial)
    return measure(trial, bench)


def unmeasured(trial: Trial, bench: BenchConfig) -> tuple[list[str], bool]:
    """What a trial lacks: quantizers by name, and whether it lacks the relearning attack."""
    found = trial.read() or trial.blank()
    if found.error is not None:
        return [], False
    quantizers = [q for q in bench.quantizers if q not in found.quantizers]
    if trial.method == ORIGINAL or not bench.relearn_steps:
        return quantizers, False
    points = found.relearning.points if found.relearning else []
    return quantizers, all(p.steps != bench.relearn_steps for p in points)


def measure(trial: Trial, bench: BenchConfig) -> TrialResult:
    """Measure what a trial lacks, on its checkpoint as saved.

    1. Train it again if its checkpoint is gone: everything is seeded.
    2. Attack it by relearning, and judge erasure without an attack.
    3. Score it on the unseen phrasings, in full precision and after each new quantizer.
    4. Compare its attribution graphs with the original's.
    """
    torch.set_num_threads(1)
    found = trial.read() or trial.blank()
    quantizers, attack = unmeasured(trial, bench)
    if not quantizers and not attack:
        return found
    model, task = loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
    untouched = trial.method == ORIGINAL
    if not untouched and not trial.checkpoint.exists():
        again = attempt(trial)
        found = replace(found, error=again.error, training=again.training, dev=again.dev)
    edited = model if untouched else load_model(trial.checkpoint, model.device)
    if attack:
        settings = RelearnConfig(steps=(bench.relearn_steps,), seed=trial.seed)
        judged = judge_erasure(model, edited, task, seed=trial.seed)
        found = replace(
            found,
            relearning=relearn(edited, task, config=settings),
            judgement=Judgement(judged.verdict, judged.cad),
        )
    if quantizers:
        found = replace(found, measured=_score(trial, found.measured, edited, quantizers))
    found.save(trial.file)
    return found


def _score(
    trial: Trial, before: Measured | None, edited: LanguageModel, quantizers: Sequence[str]
) -> Measured:
    """What was measured before, with what some more quantizers make of the checkpoint."""
    model, task = loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
    version = trial.name.version
    # Side by side, so that a calibrated one need not fit the same model twice.
    models, survived = {version: edited}, {}
    for q in quantizers:
        models[version.after(q)] = quantize(edited, q, task.calibration)
        survived[q] = survival(model, edited, q, task.calibration)
    new = evaluate(models, task)
    found = before.as_scores().beside(new) if before else new
    flips = {
        (q, m): Flips.between(new.right[version][m], new.right[version.after(q)][m])
        for q in survived
        for m in METRICS
    }
    edits = {
        q: QuantizedEdit(kept, flips[q, "choice"], flips[q, "top1"]) for q, kept in survived.items()
    }
    graphs = before.graphs if before else {}
    if not graphs and trial.method != ORIGINAL:
        graphs = _compare(trial, edited, quantizers[0], models[version.after(quantizers[0])])
    return Measured(
        scores=found.rows,
        perplexity=found.perplexity,
        quantizers={**(before.quantizers if before else {}), **edits},
        edited=sum(changed_elements(model, edited).values()),
        parameters=model.n_parameters,
        graphs=graphs,
    )


def _compare(
    trial: Trial, edited: LanguageModel, quantizer: str, quantized: LanguageModel
) -> dict[str, Divergence]:
    """How the attribution graphs of a checkpoint differ from the original's."""
    model, task = loaded(trial.model, trial.task, trial.config.score_pairs, trial.config.device)
    version = trial.name.version
    return compare(
        find_circuit(trial, model, task),
        model,
        {str(version): edited, str(version.after(quantizer)): quantized},
        task.held_out.sample(CAD_PAIRS, trial.seed),
        config=trial.config.circuit,
        reference=reference_model(task, model),
    ).models
