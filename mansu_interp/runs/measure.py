"""The second half of a run: what the edited checkpoint is worth."""

from __future__ import annotations

import functools

import torch

from ..circuits.circuit import Circuit
from ..evaluation.properties import properties, verdict
from ..evaluation.scores import Flips, Metric, Scores, evaluate
from ..evaluation.versions import (
    EDITED,
    ORIGINAL,
    QUANTIZER,
    ModelVersion,
)
from ..models.language_model import LanguageModel
from ..quantizers.base import Quantizer
from ..quantizers.registry import get_quantizer
from ..quantizers.survival import quantize, survival
from ..report.records import (
    SCHEMA,
    CircuitEdge,
    CircuitSummary,
    CurvePoint,
    Edit,
    FinalMargin,
    ForgetScore,
    Output,
    QuantizationMargin,
    QuantizerRow,
    Report,
    ReportModel,
    ReportTask,
    Sample,
    WeightEdits,
)
from ..tasks.load import reference_model
from ..tasks.task import Task
from ..unlearning.history import StepRecord, read_history
from ..unlearning.methods import Mansu
from ..utils.records import Keep
from ..utils.tensors import dtype_name, tensors_sha256
from .command import command_line
from .config import deployed, scored
from .context import RunContext
from .edit import Edited
from .erasure import Models, attack, compare_graphs, curve
from .folder import HISTORY, Results, config_json
from .leaks import leak_tests

SAMPLES = 8
TOP_EDGES = 20
"""Edges of the circuit that the report lists."""


def measure(run: RunContext, edited: Edited) -> Report:
    """The report of an edited model.

    1. Score original and edited model, in full precision and after every quantizer that the edit is
       to survive or that is named beside.
    2. Ask what each quantizer makes of the edit.
    3. Attack by relearning, and judge erasure without an attack (CAD).
    4. Compare the attribution graphs, if there is a circuit: also of the model that relearned half
       of the facts, all on prompts of the other half, so that the picture shows what came back.
    5. Ask for what was forgotten in other words (`leak_tests`).
    6. Hold the four properties to their targets: after nf4 and what the edit is to survive.
    """
    torch.manual_seed(run.config.seed)
    run.note("quantizing", 0, 0)
    models: dict[ModelVersion, LanguageModel] = {
        ORIGINAL: run.model,
        EDITED: edited.model,
        EDITED.after(QUANTIZER): quantize(edited.model, QUANTIZER, sharing=True),
    }
    keep = Results(run.folder, tensors_sha256(edited.model.weights))
    scores = score(run, models, keep)
    rows = quantizer_rows(run, edited.model, scores, keep)
    run.clock.lap("evaluate")
    reference, asked = reference_model(run.task, run.model), run.config.relearn_steps
    attacked, cad = attack(run, models, reference, keep) if asked else ({}, None)
    compared, view = compare_graphs(run, edited, models, reference, attacked)
    run.clock.lap("compare")
    leaks = leak_tests(run, models, keep)
    run.clock.lap("leaks")
    held = properties(scores, deployed(run.config), attacked.get(EDITED))
    run.note("what the models write", 0, 0)
    return Report(
        schema=SCHEMA,
        versions=run.provenance["versions"],
        provenance=dict(run.provenance),
        model=model_facts(run.model),
        task=task_facts(run.task),
        config=config_json(run.config),
        command=command_line(run.config),
        verdict=verdict(held),
        properties=tuple(held),
        scores=scores.rows,
        perplexity=scores.perplexity,
        edit=edit_facts(run, edited),
        quantizers=rows,
        circuit=circuit_facts(edited.circuit) if edited.circuit else None,
        comparison=compared,
        cad=cad,
        relearning=tuple(curve(version, found) for version, found in attacked.items()),
        graph=view.data.to_json() if view else None,
        samples=samples(run.task, models),
        leaks=leaks,
    )


def score(run: RunContext, models: Models, keep: Keep) -> Scores:
    """Original and edited model on every unseen set, in full precision and after each quantizer
    that is looked at; what quantizers make of them one at a time, which need not fit into memory
    together."""

    def of_one(version: ModelVersion) -> Scores:
        model = models.get(version)
        if model is None:
            own = models[version.after(None)]
            model = quantize(own, str(version.quantizer), run.task.calibration, sharing=True)
        return evaluate({version: model}, run.task, on_step=run.note, keep=keep)

    every = [v.after(name) for name in (None, *scored(run.config)) for v in (ORIGINAL, EDITED)]
    first = [ORIGINAL, ORIGINAL.after(QUANTIZER), *models]
    scores, *others = (of_one(version) for version in dict.fromkeys((*first, *every)))
    return functools.reduce(Scores.beside, others, scores)


def quantizer_rows(
    run: RunContext, edited: LanguageModel, scores: Scores, keep: Keep
) -> tuple[QuantizerRow, ...]:
    """What each quantizer makes of the edit; nf4 first."""
    promised, through = run.config.unlearn.promised, run.config.unlearn.trained_through
    names = scored(run.config)
    rows = []
    for k, q in enumerate(names):
        run.note("what quantizers leave of the edit", k, len(names))
        made = functools.partial(
            quantizer_row,
            run.model,
            edited,
            quantizer=get_quantizer(q),
            task=run.task,
            promised=q in promised,
            trained_through=q in through,
            scores=scores,
        )
        rows.append(keep(f"what {q} leaves of the edit", QuantizerRow, made))
    return tuple(rows)


def quantizer_row(
    model: LanguageModel,
    edited: LanguageModel,
    quantizer: Quantizer,
    task: Task,
    promised: bool,
    scores: Scores,
    trained_through: bool = False,
) -> QuantizerRow:
    """What one quantizer makes of an edit: survival, and forget accuracy on unseen phrasings.

    Arguments:
        model: the original.
        edited: the edited model.
        quantizer: what both go through.
        task: whose prompts calibrate it.
        promised: whether every edit survives it by construction.
        scores: of the unlearned model in full precision, and of both after the quantizer.
        trained_through: whether training took turns with it.
    """
    before, after = ORIGINAL.after(quantizer.name), EDITED.after(quantizer.name)

    def forget(metric: Metric) -> ForgetScore:
        old, new = (scores.mean("forget", metric, v) for v in (before, after))
        return ForgetScore(old, new, new - scores.mean("forget", metric, EDITED))

    def ranked_last() -> ForgetScore | None:
        old, new = (scores.mean_last("forget", v) for v in (before, after))
        full = scores.mean_last("forget", EDITED)
        if old is None or new is None or full is None:
            return None
        return ForgetScore(old, new, new - full)

    return QuantizerRow(
        name=quantizer.name,
        promised=promised,
        survival=survival(model, edited, quantizer, task.calibration),
        choice=forget("choice"),
        top1=forget("top1"),
        flips=Flips.between(scores.right[EDITED]["choice"], scores.right[after]["choice"]),
        last=ranked_last(),
        trained_through=trained_through,
    )


def model_facts(model: LanguageModel) -> ReportModel:
    """The original, for the report."""
    dtype = dtype_name(model.saved_dtype)
    return ReportModel(model.name, model.sha256, model.n_parameters, dtype)


def task_facts(task: Task) -> ReportTask:
    """The task, for the report."""
    facts = len({p.fact for p in task.forget})
    return ReportTask(task.name, task.title, facts, task.dropped, task.read)


def edit_facts(run: RunContext, edited: Edited) -> Edit:
    """What was changed in the weights."""
    model, mask = run.model, edited.mask
    edits = {
        name: int((model.weights[name] != edited.model.weights[name]).sum())
        for name in (mask.indices if mask else model.weights)
    }
    total = sum(edits.values())
    last = read_history(run.out / HISTORY)[-1]
    return Edit(
        edited=total,
        embedding=edits.get(model.embedding_name, 0),
        share=total / model.n_parameters,
        budget=run.config.budget if mask else None,
        candidates=mask.meta.get("candidates") if mask else None,
        refused=mask.meta.get("refused") if mask else None,
        final_margin=final_margin(run, last),
        quantization_margin=quantization_margin(run, last),
        by_weight=tuple(
            WeightEdits(name, k, model.weights[name].numel())
            for name, k in sorted(edits.items(), key=lambda item: -item[1])
            if k
        ),
    )


def final_margin(run: RunContext, last: StepRecord) -> FinalMargin | None:
    """From the last record of unlearning's history; None where it was not asked for."""
    method = run.config.unlearn
    asked = method.final_margin if isinstance(method, Mansu) else None
    if asked is None or last.final_margin_edits is None or last.above_target is None:
        return None
    return FinalMargin(int(last.final_margin_edits), last.above_target, asked)


def quantization_margin(run: RunContext, last: StepRecord) -> QuantizationMargin | None:
    """From the last record of unlearning's history; None where it was not asked for."""
    made, reached = last.quantization_margin_edits, last.quantization_margin_reached
    if made is None or reached is None or not isinstance(run.config.unlearn, Mansu):
        return None
    return QuantizationMargin(int(made), reached, run.config.unlearn.quantization_margin)


def circuit_facts(circuit: Circuit) -> CircuitSummary:
    """The circuit, for the report."""
    return CircuitSummary(
        edges=circuit.n_edges,
        of=circuit.graph.n_edges,
        faithfulness=circuit.meta.faithfulness,
        curve=tuple(CurvePoint(n, f) for n, f in circuit.meta.curve),
        top_edges=tuple(CircuitEdge(e.source, e.target, e.score) for e in circuit.top(TOP_EDGES)),
        caveat=circuit.meta.caveat,
        completeness=circuit.meta.completeness,
        random_completeness=circuit.meta.random_completeness,
    )


def samples(task: Task, models: Models) -> tuple[Sample, ...]:
    """What the models write on a few forget and retain prompts, those first that the original
    answers."""
    return tuple(s for role in ("forget", "retain") for s in _samples_of(task, role, models))


def _samples_of(task: Task, role: str, models: Models) -> list[Sample]:
    """Half of the samples, spread over the sets of a role."""
    sets = list(task.scored["unseen"][role].values())
    tried = [p for k in range(SAMPLES) for s in sets for p in s[k * 7 : k * 7 + 1]]
    answered, others = [], []
    for pair in tried[: 3 * SAMPLES]:
        text = models[ORIGINAL].generate(pair.prompt)
        right = text.strip().startswith(pair.answer_text)
        (answered if right else others).append((pair, Output(ORIGINAL, text)))
        if len(answered) == SAMPLES // 2:
            break
    return [
        Sample(
            pair.prompt,
            pair.answer_text,
            (first, *(Output(v, m.generate(pair.prompt)) for v, m in models.items()
                      if v != ORIGINAL)),
        )
        for pair, first in (answered + others)[: SAMPLES // 2]
    ]  # fmt: skip
