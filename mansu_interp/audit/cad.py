"""CAD of knowledge: a number and a verdict on whether an edit erased facts, without the attack.

CAD predicts what relearning would find (`audit.relearning`, where *erased* is defined) from weights
and states alone. The algorithm (all ours):

1. Leave out the facts that the original does not know (`known`); split the other forget subjects
   into halves A and B, and take the train phrasings of each.
2. Ask the original, the edited and, if given, the quantized model for half B: what do they predict,
   how often does the answer rank first of four, and how often last?
3. Probe the edited model's states at the last token and at the subject's: linear maps fitted on
   half A, asked for half B (`probes.probe_scores`).
4. Relearn half A in closed form on a copy of the edited model until half A is learnt, and ask for
   half B (`linearized.linearized_relearning`). Do the same with retained facts, about the subjects
   of half B where the task has them, unless the model has them still.
5. Read the edited model's last states with the original's final norm and unembedding
   (`probes.stitches`). From earlier blocks on, the original would answer by what its own later
   blocks know of the subject.
6. Decide (`verdict.decide`): compare these shares, the `Evidence`, with two levels for each sign.
   Erased needs all of them; one suffices for suppressed.
7. Resample the facts: a verdict that most resamplings do not share is undecided
   (`verdict.settle`). The middle 95 % of their CADs are its interval.
8. CAD itself is 1 - knowledge, from the largest sign (`verdict.number`). Every sign is put on the
   scale of shares that rank first, so that what counts as there, or as gone, does so at the same
   place; that scale runs from chance (0) to the original's own share (1). It lies in the verdict's
   own range: 0.8 to 1 where the facts are erased, below 0.733 where they are there, between where
   it is open.
9. Say of each fact of half B whether it is *intact* (predicted outright in most phrasings),
   *suppressed* (found by a sign of steps 2 to 4, see `known.Asked`) or *erased*. A sign that finds
   hardly more facts than guesses counts for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from ..errors import ModelError
from ..losses.accuracy import accuracy
from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet
from ..tasks.task import Task
from ..utils.files import Json
from ..utils.ranges import entrance
from ..utils.words import Shown
from .known import Asked, FactRanks, known_forget
from .linearized import LEARNT, LinearizedRelearning, few_prompts, linearized_relearning
from .probes import (
    CHUNK,
    answer_scores,
    check_alike,
    model_divergence,
    probe_scores,
    ranked,
    ranked_only,
    stages,
    stitches,
)
from .relearning import halves, of_subjects, rivals_within
from .transfer import gradient_transfer
from .verdict import (
    EDITED,
    ERASED,
    INTACT,
    ORIGINAL,
    QUANTIZED,
    SUPPRESSED,
    Found,
    decide,
    interval,
    most_telling,
    number,
    resampled,
    settle,
    tell,
)

PROBE_PROMPTS, STEP_PROMPTS, ASKED_PROMPTS = 400, 96, 180
"""Prompts of each half that are probed, and asked for facts; of half A that linearized relearning
is given; of half B that are asked after each of its steps, and stitched."""
RETAIN_PROMPTS, LOOKED_AT = 192, 24
"""Retained prompts that linearized relearning is given, and prompts of each retained relation that
are asked for damage."""

Quantized = LanguageModel | Callable[[], LanguageModel] | None


@dataclass(frozen=True, repr=False)
class CAD(Shown):
    """Whether the knowledge is gone, and where it sits if not."""

    verdict: str
    """unchanged, suppressed, erased, relocated, recovered or undecided."""
    sentence: str
    confidence: float
    """Share of resamplings of the prompts that give the same verdict; where less than half agree,
    the verdict is undecided and this the share that does not."""
    cad: float
    """0 = all the knowledge is there, 1 = none."""
    predicted: dict[str, float]
    """Share of half B's answers that each model ranks first of four, train phrasings, every fact
    alike; chance 0.25."""
    half_b: list[float]
    """The same of the edited model after each step of linearized relearning, on some prompts."""
    half_a: list[float]
    """The same on half A, which is relearned."""
    ranked_last: list[float]
    """Share of half B's answers that rank last of four: of the edited model itself, then after each
    step; chance 0.25."""
    probed: dict[str, list[float]]
    """Share of half B's answers that a probe finds: in the embedding, then after each block."""
    by_weight: dict[str, float]
    """Share of each weight in the gradient transfer between the halves (see `transfer`)."""
    subject: list[float] = field(default_factory=list)
    """What a probe of the edited model's states at the subject's last token finds."""
    outright: dict[str, float] = field(default_factory=dict)
    """Share of half B's answers that each model predicts, of all tokens."""
    after_retained: float | None = None
    """Share of half B's answers that rank first of four after linearized relearning of retained
    facts alone; None in reports of older versions."""
    facts: dict[str, str] = field(default_factory=dict)
    """Of each fact of half B (relation: subject): intact, suppressed or erased."""
    retained: dict[str, list[float]] = field(default_factory=dict)
    """Of each retained relation: top-1 of the original and of the edited model, on some prompts."""
    most_telling: str = ""
    """The sign that says most of what is there, with its share and levels, in words."""
    stitched_last: float | None = None
    """Share of half B's answers that the original's unembedding finds in the edited model's last
    states; None in reports of older versions, as ``interval`` is empty."""
    interval: list[float] = field(default_factory=list)
    """Where the middle 95 % of `cad` lie over resamplings of the facts, each with its own
    verdict."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        told = {"": self.verdict, "CAD": self.range, "confidence": f"{self.confidence:.2f}"}
        return {**told, **self.counts, "sentence": self.sentence}

    @property
    def range(self) -> str:
        """CAD and its interval as a text, such as "0.92 (0.86 to 1.00)"."""
        ends = f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else ""
        return f"{self.cad:.2f}{ends}"

    @property
    def counts(self) -> dict[str, int]:
        """How many facts of half B are erased, suppressed and intact."""
        found = Counter(self.facts.values())
        return {state: found[state] for state in (ERASED, SUPPRESSED, INTACT)}

    def to_json(self) -> dict[str, Json]:
        """For reports."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Plain text for the terminal."""
        blocks = len(self.subject) - 1
        head = " ".join(f"{name:>5}" for name in ["embed", *(f"b{k}" for k in range(blocks))])

        def row(name: str, own: float | None, shares: list[float]) -> str:
            first = "    -" if own is None else f"{own:5.2f}"
            return f"{name:<44} {first}  " + " ".join(f"{s:5.2f}" for s in shares)

        out = [
            f"{self.verdict} (confidence {self.confidence:.2f}), CAD {self.range} of 1 (0: all the "
            "knowledge is there, 1: none)",
            self.sentence,
            f"Most telling: {self.most_telling}",
            "",
            "Half B, first of four (chance 0.25): the model itself, then what is found in the "
            "states",
            f"{'':<44} model  {head}",
        ]
        out += [
            row(f"{n}, probe at the last token", v, self.probed.get(n, []))
            for n, v in self.predicted.items()
        ]
        out.append(row("edited, probe at the subject", None, self.subject))
        if self.stitched_last is not None:
            name = row("edited, last states read by the original", None, [])
            out.append(f"{name}{self.stitched_last:{6 * blocks + 5}.2f}")  # in the last column
        out += [row(f"{n}, predicted outright", v, []) for n, v in self.outright.items()]
        out += ["", "Edited, before and after each step of linearized relearning on half A"]
        out.append(row("half B, answer first of four", self.predicted[EDITED], self.half_b))
        out.append(row("half B, answer last of four", self.ranked_last[0], self.ranked_last[1:]))
        out.append(row("half A, answer first of four", None, self.half_a))
        if self.after_retained is not None:
            out.append(row("half B after relearning retained facts", None, [self.after_retained]))
        out += ["", "Retained facts, top-1 of the original and of the edited model"]
        out += [f"  {name:<42} {a:5.2f} {b:5.2f}" for name, (a, b) in self.retained.items()]
        top = sorted(self.by_weight.items(), key=lambda item: -item[1])[:5]
        out += ["", "Where relearning would bring it back from (share of gradient transfer):"]
        return out + [f"  {name}  {share:+.3f}" for name, share in top]


def _relearn(
    found: dict[str, FactRanks],
    edited: LanguageModel,
    given: dict[str, PairSet],
    asked: Asked,
    some_b: PairSet,
    note: Callable[[str, int, int], None],
) -> tuple[LinearizedRelearning, float]:
    """Step 4, into ``found``: half A's steps, and how much of both arms is learnt."""
    steps, trained = None, 1.0
    for name, pairs in given.items():
        note(f"relearning, linearized, {pairs.name}", 0, 0)
        if name == "retained" and float(ranked(edited, pairs)[0].float().mean()) >= LEARNT:
            found[name] = found["predicted"]
            continue
        arm = linearized_relearning(
            edited,
            pairs,
            some_b,
            on_step=lambda done, total: note("relearning, linearized", done, total),
        )
        found[name] = asked.ranks(answer_scores(arm.model, asked.pairs, asked.tokens)[0])
        trained = min(trained, float(arm.half_a[-1].float().mean()))
        steps = steps or arm
    assert steps is not None
    return steps, trained


def _split(task: Task, seed: int) -> tuple[PairSet, PairSet, PairSet]:
    """Step 1 for a task whose facts are known: prompts of half A, of half B, and retained ones."""
    first, second = halves(task.forget, seed)
    half_a, half_b = (
        few_prompts(rivals_within(of_subjects(task.forget, h)), PROBE_PROMPTS, seed)
        for h in (first, second)
    )
    about = tuple(p for p in task.retain if p.subject in second) or task.retain.pairs
    return half_a, half_b, PairSet("retained facts", about)


def look(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    seed: int,
    quantized: Quantized = None,
    note: Callable[[str, int, int], None] = lambda *_: None,
) -> Found:
    """Steps 2 to 5: what is found of half B.

    Arguments:
        original: the model before the edit.
        edited: the model after it.
        task: without facts that the original does not know.
        seed: of the split and of the samples.
        quantized: see `judge_erasure`.
        note: called with (stage, done, total).
    """
    half_a, half_b, retain = _split(task, seed)
    asked = Asked([p for part in half_b.parts(CHUNK) for p in part])
    note("asking the models", 0, 0)
    models = {ORIGINAL: original, EDITED: edited}
    scores = {n: answer_scores(m, asked.pairs, asked.tokens) for n, m in models.items()}
    if quantized is not None:
        made = quantized if isinstance(quantized, LanguageModel) else quantized()
        scores[QUANTIZED] = answer_scores(made, asked.pairs, asked.tokens)
        del made, quantized
    ranks = {name: asked.ranks(found) for name, (found, _) in scores.items()}
    note("probing states", 0, 0)
    cuts = len(stages(edited))
    read = probe_scores(edited, half_a, asked.pairs, asked.tokens, subject=True)
    probes = [asked.ranks(found) for found in read]
    shares = [float(found.first.mean()) for found in probes]
    best = max(range(cuts), key=lambda k: shares[k])
    best_subject = max(range(cuts, 2 * cuts), key=lambda k: shares[k])
    signs = {
        "predicted": ranks[EDITED],
        "probed": probes[best],
        "subject": probes[best_subject],
    }
    some_b = half_b.sample(ASKED_PROMPTS, seed)
    retained = ranked_only(original, few_prompts(retain, RETAIN_PROMPTS, seed))
    given = {"relearned": half_a.sample(STEP_PROMPTS, seed), "retained": retained}
    steps, trained = _relearn(signs, edited, given, asked, some_b, note)
    return Found(
        half_a=half_a,
        half_b=half_b,
        asked=asked,
        first={name: found.first for name, found in ranks.items()},
        outright={name: asked.by_fact(right) for name, (_, right) in scores.items()},
        signs=signs,
        probed=shares[:cuts],
        subject=shares[cuts:],
        steps=steps,
        trained=trained,
        stitched=stitches(edited, original, some_b, since=-1)[0],
        divergence=model_divergence(original, edited, some_b.sample(STEP_PROMPTS, seed)),
    )


def _retained(original: LanguageModel, edited: LanguageModel, task: Task) -> dict[str, list[float]]:
    """`CAD.retained`."""
    by_relation: dict[str, list[Pair]] = {}
    for pair in task.retain:
        by_relation.setdefault(pair.relation, []).append(pair)
    some = {r: PairSet(r, tuple(p)).sample(LOOKED_AT, 0) for r, p in by_relation.items()}
    return {r: [accuracy(m, pairs).top1 for m in (original, edited)] for r, pairs in some.items()}


@entrance(ModelError)
def judge_erasure(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    *,
    quantized: Quantized = None,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> CAD:
    """Judge whether an edited checkpoint has erased a task's forget facts, or hides them.

    See the module for the steps. Only train phrasings are looked at, so that scores on unseen ones
    stay independent evidence.

    Arguments:
        original: the model before the edit.
        edited: the model after it; it is not changed.
        task: its forget facts are split in two by subject.
        quantized: the edited model's quantized form, for ``recovered``; or what makes it, which
            need not be held for the whole time.
        seed: of the split and of the resamplings.
        on_step: called with (stage, done, total).

    Returns:
        The verdict, CAD and the shares behind them.

    Raises:
        ModelError: the checkpoints cannot be compared.
        TaskError: fewer than two forget subjects, or the original does not know the facts.
    """
    original.check_editable()
    edited.check_editable()
    check_alike(original, edited)
    task, _ = known_forget(original, task)
    note = on_step or (lambda *_: None)
    found = look(original, edited, task, seed, quantized, note)
    note("confidence of the verdict", 0, 0)
    return conclude(found, original, edited, task, seed)


def conclude(
    found: Found, original: LanguageModel, edited: LanguageModel, task: Task, seed: int
) -> CAD:
    """Steps 6 to 9, from what was found.

    Arguments:
        found: by `look`, of the same models, task and seed.
        original: the model before the edit.
        edited: the model after it.
        task: without facts that the original does not know.
        seed: of the split and of the resamplings.
    """
    evidence = found.evidence(torch.arange(len(found.asked.facts)))
    word, reason = decide(evidence)
    again = resampled(found, seed)
    agree = sum(other == word for other, _ in again) / len(again)
    word, reason, confidence = settle(word, reason, agree)
    cad = number(word, evidence)
    facts, retained = found.states(), _retained(original, edited, task)
    some_a, some_b = (half.sample(STEP_PROMPTS, seed) for half in (found.half_a, found.half_b))
    steps = found.steps
    return CAD(
        verdict=word,
        sentence=tell(reason, facts, retained),
        confidence=confidence,
        cad=cad,
        most_telling=most_telling(evidence),
        stitched_last=found.stitched,
        interval=interval(cad, [value for _, value in again]),
        predicted={name: float(v.mean()) for name, v in found.first.items()},
        half_b=steps.half_b.float().mean(1).tolist(),
        half_a=steps.half_a.float().mean(1).tolist(),
        ranked_last=[
            float(found.signs["predicted"].last.mean()),
            *steps.ranked_last.float().mean(1).tolist(),
        ],
        probed={EDITED: found.probed},
        by_weight=gradient_transfer(edited, some_a, some_b).by_weight,
        subject=found.subject,
        outright={name: float(v.mean()) for name, v in found.outright.items()},
        after_retained=evidence.retained,
        facts=facts,
        retained=retained,
    )
