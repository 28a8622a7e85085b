"""The benchmark's table: one row a trial and quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..audit.known import CHANCE
from ..audit.relearning import Relearning
from ..evaluation.properties import properties
from ..evaluation.scores import Metric, Scores
from ..evaluation.versions import EDITED, ORIGINAL, ModelVersion
from .results import Judgement, Measured, TrialResult
from .trial import Trial


@dataclass(frozen=True)
class Chosen:
    """A method's winning step size on one model, task and level, with a trial per seed."""

    trials: list[Trial]
    reached: bool
    """Whether the first seed's try reached the level, or moved within the disruption budget."""
    tries: int
    """Settings that the first seed tried."""


@dataclass(frozen=True)
class TableRow:
    """A line of ``table.csv``, whose columns are these fields; None: not known.

    ``_q`` is after the quantizer, ``gap_`` the accuracy after it minus before. Headrooms are
    positive where a property is met.
    """

    model: str
    task: str
    level: float | None
    """Four-way forget accuracy on the dev phrasings at which training stops; None: a disruption
    budget instead."""
    method: str
    seed: int
    strength: float
    """Step size as a multiple of the method's usual one."""
    lr: float
    quantizer: str
    error: str | None = None
    """Why the trial could not be trained; the rest is then unknown."""
    tries: int | None = None
    """Settings that the seed which chose the step size tried."""
    reached: bool | None = None
    """This seed came down to the level, or has a step within the disruption budget."""
    searched: bool | None = None
    """The seed that chose the step size did."""
    disruption_budget: float | None = None
    """Nats a token."""
    disruption: float | None = None
    """Mean KL to the original on the text named next, nats a token."""
    disruption_text: str | None = None
    steps: int | None = None
    dev_forget: float | None = None
    """Four-way forget accuracy on the dev phrasings."""
    prompts: int | None = None
    """Forget prompts, unseen phrasings."""
    forget_choice_original: float | None = None
    forget_choice_original_q: float | None = None
    forget_choice: float | None = None
    forget_choice_q: float | None = None
    gap_choice: float | None = None
    retain_choice: float | None = None
    retain_choice_q: float | None = None
    forget_top1_original: float | None = None
    forget_top1_original_q: float | None = None
    forget_top1: float | None = None
    forget_top1_q: float | None = None
    gap_top1: float | None = None
    retain_top1: float | None = None
    retain_top1_q: float | None = None
    above_chance: float | None = None
    """forget_choice minus chance."""
    forgets: bool | None = None
    forget_headroom: float | None = None
    retains: bool | None = None
    retain_headroom: float | None = None
    """Of the largest fall of any retain score, against the original at the same precision; where
    another limit alone is passed (a neighbour's, perplexity's), of that."""
    stays: bool | None = None
    """Nothing came back under the quantizer."""
    gap_headroom: float | None = None
    back: int | None = None
    """With ``gone`` and ``p``: the prompts behind gap_choice (`Flips`)."""
    gone: int | None = None
    p: float | None = None
    erased: bool | None = None
    relearnt_choice: float | None = None
    """The most of half B that relearning half A brings back, four-way."""
    relearnt_top1: float | None = None
    cad: str | None = None
    """Verdict of CAD."""
    cad_score: float | None = None
    alignment: float | None = None
    """Cosine of the attribution graph with the original's, on the original's circuit."""
    edited_share: float | None = None
    """Parameters whose value differs, of all."""
    codes_changed: float | None = None
    """Edited weights whose code changed, of the edited."""
    collateral: int | None = None
    """Other weights whose code changed."""
    update_over_bin: float | None = None
    share_kept: float | None = None
    noise_over_signal: float | None = None
    seconds: float | None = None
    peak_gb: float | None = None


def tidy(
    originals: Sequence[Trial], chosen: Sequence[Chosen], quantizers: Sequence[str]
) -> list[TableRow]:
    """One row per trial and quantizer that is finished.

    Arguments:
        originals: a trial per model and task, on which nothing was trained.
        chosen: a method's trials on one model, task and level.
        quantizers: as in `BenchConfig`.
    """
    reference = {(t.model, t.task): t.read() for t in originals}
    rows = []
    for group in chosen:
        for trial in group.trials:
            found, original = trial.read(), reference[trial.model, trial.task]
            for q in quantizers:
                if found is None or original is None or q not in original.quantizers:
                    continue
                if found.error is not None or q in found.quantizers:
                    rows.append(table_row(trial, found, original, q, group))
    return rows


def table_row(
    trial: Trial, found: TrialResult, original: TrialResult, quantizer: str, group: Chosen
) -> TableRow:
    """One line of the table.

    Arguments:
        trial: which try.
        found: what it found.
        original: the same of the original.
        quantizer: both are measured after it.
        group: the trials that it is one of.
    """
    row = TableRow(
        model=Path(trial.model).name,
        task=Path(trial.task).stem,
        level=trial.level,
        method=trial.method,
        seed=trial.seed,
        strength=trial.strength,
        lr=trial.config.unlearn.lr,
        quantizer=quantizer,
        error=found.error,
        tries=group.tries,
        disruption_budget=trial.disruption,
    )
    if found.error is not None or not found.measured or not original.measured:
        return row
    scores = original.measured.as_scores().beside(found.measured.as_scores())
    row = replace(_with_training(row, found), searched=group.reached)
    row = _with_accuracies(row, scores)
    row = _with_properties(row, scores, found.relearning)
    row = _with_judgement(row, found.judgement, found.measured)
    return _with_survival(row, found.measured)


def _with_training(row: TableRow, found: TrialResult) -> TableRow:
    training, dev, moved = found.training, found.dev, found.disruption
    if row.level is None:
        reached = training is not None and training.steps > 0
    else:
        reached = dev is not None and dev.forget <= row.level
    return replace(
        row,
        reached=reached,
        disruption=moved.kl if moved else None,
        disruption_text=moved.text if moved else None,
        dev_forget=dev.forget if dev else None,
        steps=training.steps if training else None,
        seconds=training.seconds if training else None,
        peak_gb=training.peak_gb if training else None,
    )


def _with_accuracies(row: TableRow, scores: Scores) -> TableRow:
    """Mean accuracies over the sets of a role, in full precision and after the quantizer."""

    def forget(metric: Metric, model: ModelVersion) -> float:
        return scores.mean("forget", metric, model)

    original, edited = ORIGINAL.after(row.quantizer), EDITED.after(row.quantizer)
    choice, top1 = forget("choice", EDITED), forget("top1", EDITED)
    choice_q, top1_q = forget("choice", edited), forget("top1", edited)
    return replace(
        row,
        prompts=sum(r.n for r in scores.of_role("forget")),
        forget_choice_original=forget("choice", ORIGINAL),
        forget_choice_original_q=forget("choice", original),
        forget_choice=choice,
        forget_choice_q=choice_q,
        gap_choice=choice_q - choice,
        retain_choice=scores.mean("retain", "choice", EDITED),
        retain_choice_q=scores.mean("retain", "choice", edited),
        forget_top1_original=forget("top1", ORIGINAL),
        forget_top1_original_q=forget("top1", original),
        forget_top1=top1,
        forget_top1_q=top1_q,
        gap_top1=top1_q - top1,
        retain_top1=scores.mean("retain", "top1", EDITED),
        retain_top1_q=scores.mean("retain", "top1", edited),
        above_chance=choice - CHANCE,
    )


def _with_properties(row: TableRow, scores: Scores, relearning: Relearning | None) -> TableRow:
    """Which properties hold, and by how much."""
    forgetting, retention, recovery, erasure = properties(scores, [row.quantizer], relearning)
    row = replace(
        row,
        forgets=forgetting.passed,
        forget_headroom=forgetting.headroom,
        retains=retention.passed,
        retain_headroom=retention.headroom,
        stays=recovery.passed,
        gap_headroom=recovery.headroom,
        erased=erasure.passed,
    )
    if relearning is None:
        return row
    last = relearning.marks[-1]
    return replace(
        row,
        relearnt_choice=relearning.up_to(last),
        relearnt_top1=relearning.up_to(last, "top1"),
    )


def _with_judgement(row: TableRow, judged: Judgement | None, measured: Measured) -> TableRow:
    graph = measured.graphs.get(str(EDITED))
    return replace(
        row,
        cad=judged.verdict if judged else None,
        cad_score=judged.cad if judged else None,
        alignment=graph.alignment if graph else None,
    )


def _with_survival(row: TableRow, measured: Measured) -> TableRow:
    """What the quantizer makes of the edit."""
    found = measured.quantizers[row.quantizer]
    survived, flips = found.survival, found.flips
    return replace(
        row,
        back=flips.back,
        gone=flips.gone,
        p=flips.p,
        edited_share=measured.edited / measured.parameters,
        codes_changed=survived.survived / survived.edited if survived.edited else None,
        collateral=survived.collateral,
        update_over_bin=survived.update_over_bin,
        share_kept=survived.share_kept,
        noise_over_signal=survived.noise_over_signal,
    )
