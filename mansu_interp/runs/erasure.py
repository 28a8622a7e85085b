"""What is asked of an edited checkpoint beyond its scores: relearning, CAD, attribution graphs.

Where a card cannot hold all models of a run beside what these take, those that are not in use rest
in the host's memory (`resting`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..audit.cad import CAD, judge_erasure
from ..audit.config import RelearnConfig
from ..audit.relearning import Relearning, other_half, relearn, relearned
from ..circuits.compare import compare
from ..circuits.config import fit_memory
from ..circuits.scores import Attribution
from ..evaluation.versions import (
    EDITED,
    NEVER_TAUGHT,
    NEVER_TAUGHT_RELEARNED,
    ORIGINAL,
    QUANTIZER,
    RELEARNED,
    ModelVersion,
)
from ..losses.descent import WIDE, room
from ..losses.resting import activation_bytes, resting
from ..models.language_model import LanguageModel
from ..report.records import ComparedGraph, RelearningCurve, RelearningPoint
from ..tasks.pairs import PairSet
from ..utils.records import Keep
from ..viz.view import View, changes_view
from .context import RunContext
from .edit import Edited
from .planning.seconds import CAD_PAIRS

GRAPH_LIMIT = 1500
"""Edges that the report's graph holds; all else in report.json is a few kilobytes."""

Models = Mapping[ModelVersion, LanguageModel]


def compare_graphs(
    run: RunContext,
    edited: Edited,
    models: Models,
    reference: LanguageModel | None,
    attacked: Mapping[ModelVersion, Relearning],
) -> tuple[tuple[ComparedGraph, ...], View | None]:
    """Numbers and view of the attribution graphs: original, edited, edited after nf4 and, where it
    was attacked, after relearning half of the facts; nothing without a circuit."""
    if edited.circuit is None:
        return (), None
    quantized, pairs = EDITED.after(QUANTIZER), run.task.held_out
    relearned_ones: dict[ModelVersion, LanguageModel] = {}
    if attacked:
        settings = attacked[EDITED].meta.settings
        pairs = other_half(run.task, pairs, seed=settings.seed)
        both = {RELEARNED: models[EDITED], NEVER_TAUGHT_RELEARNED: reference}
        relearned_ones = {v: m for v, m in both.items() if m is not None}
    pairs = pairs.sample(CAD_PAIRS, run.config.seed)
    graphs: dict[str, Attribution] = {}
    held = [run.model, *(models[v] for v in (EDITED, quantized))]
    with resting(held, compare_room(run, pairs, bool(attacked))) as awake:

        @contextmanager
        def there(model: LanguageModel) -> Iterator[LanguageModel]:
            with awake(model):
                yield model

        @contextmanager
        def attacked_copy(version: ModelVersion, model: LanguageModel) -> Iterator[LanguageModel]:
            run.note(f"relearning for the graph of {version}", 0, 0)
            rate = attacked[EDITED].worst_rate()
            with awake(model):
                copy = relearned(model, run.task, rate=rate, config=settings)
            yield copy

        compared = {v: there(models[v]) for v in (EDITED, quantized)}
        compared |= {v: attacked_copy(v, m) for v, m in relearned_ones.items()}
        found = compare(
            edited.circuit,
            there(run.model),
            {str(v): m for v, m in compared.items()},
            pairs,
            config=run.config.circuit,
            on_step=lambda name, d, n: run.note(f"attribution of {name}", d, n),
            reference=reference,
            on_scores=graphs.__setitem__,
        )
    view = changes_view(
        edited.circuit,
        before=graphs[str(ORIGINAL)],
        after=graphs[str(EDITED)],
        quantized=graphs[str(quantized)],
        relearned=graphs.get(str(RELEARNED)),
        never_taught=graphs.get(str(NEVER_TAUGHT_RELEARNED)),
        model=run.model,
        mask=edited.mask,
        pairs=pairs,
        limit=GRAPH_LIMIT,
    )
    versions = {str(v): v for v in (*compared, NEVER_TAUGHT)}
    return tuple(ComparedGraph(versions[n], d) for n, d in found.models.items()), view


def compare_room(run: RunContext, pairs: PairSet, attacked: bool) -> float:
    """Bytes that attribution takes besides the models of a run, and a copy that was attacked."""
    longest, model = max(len(p.clean) for p in pairs), run.model
    size, one, _ = fit_memory(model.graph, model.d_model, longest, run.config.circuit)
    kept = activation_bytes(model, longest, WIDE) * size * longest
    return one * 1e9 * size + kept + (2 if attacked else 0) * WIDE * model.n_parameters


def attack_room(run: RunContext) -> float:
    """Bytes that the attack takes besides the edited model: a copy to train, and `room`."""
    longest = max(len(p.clean) for p in run.task.forget)
    found = room(run.model, RelearnConfig().batch_size * longest, longest)
    return WIDE * run.model.n_parameters + found


def attack(
    run: RunContext, models: Models, reference: LanguageModel | None, keep: Keep
) -> tuple[dict[ModelVersion, Relearning], CAD]:
    """Relearning of the edited model and of the reference model, and CAD's judgement."""
    config = run.config
    quantized = models[EDITED.after(QUANTIZER)]
    judged = functools.partial(
        judge_erasure,
        run.model,
        models[EDITED],
        run.task,
        quantized=quantized,
        seed=config.seed,
        on_step=run.note,
    )
    cad = keep("CAD", CAD, judged)
    settings = RelearnConfig(steps=relearning_marks(config.relearn_steps), seed=config.seed)
    targets = {EDITED: models[EDITED], **({NEVER_TAUGHT: reference} if reference else {})}
    found: dict[ModelVersion, Relearning] = {}
    for version, target in targets.items():

        def note(rate: float, done: int, total: int, version: ModelVersion = version) -> None:
            run.note(f"relearning {version} at {rate:g}", done, total)

        made = functools.partial(relearn, target, run.task, config=settings, on_step=note)
        with resting([run.model, quantized], attack_room(run), beside=target):
            found[version] = keep(f"relearning of {version}", Relearning, made)
    run.clock.lap("relearn")
    return found, cad


def relearning_marks(steps: int) -> tuple[int, ...]:
    """Where a run's attack is measured: after a quarter of its steps, and after all."""
    return tuple(dict.fromkeys((max(1, steps // 4), steps)))


def curve(version: ModelVersion, found: Relearning) -> RelearningCurve:
    """What relearning brought back, step by step; the worst of the learning rates."""
    points = [RelearningPoint(m, found.at(m), found.at(m, "last")) for m in found.marks]
    return RelearningCurve(version, tuple(points))
