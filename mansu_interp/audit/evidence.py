"""What is found of half B of a task's forget facts: the evidence on an edit (steps 1 to 5 of
`audit.cad`)."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ModelError
from ..losses.accuracy import accuracy
from ..losses.descent import WIDE
from ..losses.gradients import CHUNK
from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet
from ..tasks.task import Task
from ..utils.ranges import expect_kind
from .known import Asked, FactRanks
from .linearized import (
    LEARNT,
    LinearizedRelearning,
    few_prompts,
    linearized_relearning,
    step_room,
)
from .probes import (
    answer_scores,
    model_divergence,
    probe_scores,
    ranked,
    ranked_only,
    stages,
    stitches,
)
from .relearning import halves, of_subjects, rivals_within
from .verdict import EDITED, ORIGINAL, QUANTIZED, Compared, Found

PROBE_PROMPTS, STEP_PROMPTS, ASKED_PROMPTS = 400, 96, 180
"""Prompts of each half that are probed, and asked for facts; of half A that linearized relearning
is given; of half B that are asked after each of its steps, and stitched."""
RETAIN_PROMPTS, LOOKED_AT = 192, 24
"""Retained prompts that linearized relearning is given, and prompts of each retained relation that
are asked for damage."""

GIVEN = {"relearned": "half A", "retained": "retained facts"}
"""Signs by closed-form steps -> what is relearned."""

Quantized = LanguageModel | Callable[[], LanguageModel] | None
"""The edited model's quantized form, or what makes it."""


def made_model(given: LanguageModel | Callable[[], LanguageModel], argument: str) -> LanguageModel:
    """A model, or what a function makes, which must be one.

    Raises:
        ModelError: it makes something else.
    """
    found: object = given if isinstance(given, LanguageModel) else given()
    expect_kind(ModelError, f"what {argument}() returns", found, LanguageModel)
    assert isinstance(found, LanguageModel)
    return found


def _relearn(
    found: dict[str, FactRanks],
    edited: LanguageModel,
    given: dict[str, PairSet],
    asked: Asked,
    some_b: PairSet,
    note: Callable[[str, int, int], None],
    seen: Callable[[LanguageModel], None],
) -> tuple[LinearizedRelearning, float]:
    """Step 4, into ``found``: half A's steps, and how much of both arms is learnt. ``seen`` is
    called with the copy that half A was relearned on, which is not held on to."""
    steps, trained = None, 1.0
    for name, pairs in given.items():
        stage = f"relearning {GIVEN[name]} in closed form"
        note(stage, 0, 0)
        if name == "retained" and float(ranked(edited, pairs)[0].float().mean()) >= LEARNT:
            found[name] = found["predicted"]
            continue
        arm, moved = linearized_relearning(
            edited,
            pairs,
            some_b,
            on_step=lambda done, _, stage=stage: note(stage, done, 0),
        )
        found[name] = asked.ranks(answer_scores(moved, asked.pairs, asked.tokens)[0])
        trained = min(trained, float(arm.half_a[-1].float().mean()))
        if steps is None:
            seen(moved)
            steps = arm
        del moved
    assert steps is not None
    return steps, trained


def split(task: Task, seed: int) -> tuple[PairSet, PairSet, PairSet]:
    """Step 1 for a task whose facts are known: prompts of half A, of half B, and retained ones."""
    first, second = halves(task.forget, seed)
    half_a, half_b = (
        few_prompts(rivals_within(of_subjects(task.forget, h)), PROBE_PROMPTS, seed)
        for h in (first, second)
    )
    about = tuple(p for p in task.retain if p.subject in second) or task.retain.pairs
    return half_a, half_b, PairSet("retained facts", about)


def compare(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    seed: int,
    quantized: Quantized,
    note: Callable[[str, int, int], None],
) -> Compared:
    """Steps 1, 2 and 5; arguments as in `audit.cad.judge_erasure`."""
    half_a, half_b, retain = split(task, seed)
    asked = Asked([p for part in half_b.parts(CHUNK) for p in part])
    note("asking the models", 0, 0)
    models = {ORIGINAL: original, EDITED: edited}
    scores = {n: answer_scores(m, asked.pairs, asked.tokens) for n, m in models.items()}
    if quantized is not None:
        made = made_model(quantized, "quantized")
        scores[QUANTIZED] = answer_scores(made, asked.pairs, asked.tokens)
        del made, quantized
    some_b = half_b.sample(ASKED_PROMPTS, seed)
    retained = ranked_only(original, few_prompts(retain, RETAIN_PROMPTS, seed))
    return Compared(
        half_a=half_a,
        half_b=half_b,
        some_b=some_b,
        asked=asked,
        given={"relearned": half_a.sample(STEP_PROMPTS, seed), "retained": retained},
        ranks={name: asked.ranks(found) for name, (found, _) in scores.items()},
        outright={name: asked.by_fact(right) for name, (_, right) in scores.items()},
        stitched=stitches(edited, original, some_b, since=-1)[0],
        divergence=model_divergence(original, edited, some_b.sample(STEP_PROMPTS, seed)),
        retained=_retained(original, edited, task),
    )


def search_room(edited: LanguageModel, compared: Compared) -> float:
    """Bytes that `search` takes besides the edited model."""
    longest = max(len(p.clean) for pairs in compared.given.values() for p in pairs)
    return WIDE * edited.n_parameters + step_room(edited, longest)


def search(
    edited: LanguageModel,
    compared: Compared,
    note: Callable[[str, int, int], None],
    on_relearned: Callable[[LanguageModel], None] = lambda _: None,
) -> Found:
    """Steps 3 and 4, of the edited model alone."""
    asked, half_a = compared.asked, compared.half_a
    note("probing states", 0, 0)
    cuts = len(stages(edited))
    read = probe_scores(edited, half_a, asked.pairs, asked.tokens, subject=True)
    probes = [asked.ranks(found) for found in read]
    shares = [float(found.first.mean()) for found in probes]
    best = max(range(cuts), key=lambda k: shares[k])
    best_subject = max(range(cuts, 2 * cuts), key=lambda k: shares[k])
    signs = {
        "predicted": compared.ranks[EDITED],
        "probed": probes[best],
        "subject": probes[best_subject],
    }
    steps, trained = _relearn(
        signs, edited, compared.given, asked, compared.some_b, note, on_relearned
    )
    return Found(
        **vars(compared),
        signs=signs,
        probed=shares[:cuts],
        subject=shares[cuts:],
        steps=steps,
        trained=trained,
    )


def look(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    seed: int,
    quantized: Quantized = None,
    on_relearned: Callable[[LanguageModel], None] = lambda _: None,
) -> Found:
    """Steps 1 to 5: what is found of half B.

    Arguments:
        original: the model before the edit.
        edited: the model after it.
        task: without facts that the original does not know.
        seed: of the split and of the samples.
        quantized: see `judge_erasure`.
        on_relearned: called with the copy on which half A was relearned in closed form.
    """

    def note(*_: object) -> None: ...

    compared = compare(original, edited, task, seed, quantized, note)
    return search(edited, compared, note, on_relearned)


def _retained(original: LanguageModel, edited: LanguageModel, task: Task) -> dict[str, list[float]]:
    """`CAD.retained`."""
    by_relation: dict[str, list[Pair]] = {}
    for pair in task.retain:
        by_relation.setdefault(pair.relation, []).append(pair)
    some = {r: PairSet(r, tuple(p)).sample(LOOKED_AT, 0) for r, p in by_relation.items()}
    return {r: [accuracy(m, pairs).top1 for m in (original, edited)] for r, pairs in some.items()}
