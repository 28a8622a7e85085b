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
from ..losses.advantage import gradient_transfer
from ..losses.resting import resting
from ..models.language_model import LanguageModel
from ..tasks.task import Task
from ..utils.files import Json
from ..utils.ranges import entrance
from ..utils.words import Shown
from .evidence import STEP_PROMPTS, Quantized, compare, made_model, search, search_room
from .known import known_forget
from .probes import check_alike
from .verdict import (
    EDITED,
    ERASED,
    INTACT,
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
    """Share of each weight in the gradient transfer between the halves (see
    `losses.advantage`)."""
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


@entrance(ModelError)
def judge_erasure(
    original: LanguageModel | Callable[[], LanguageModel],
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
        original: the model before the edit; or what loads it, and then it is not held while the
            edited model is probed and relearned.
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
    before = made_model(original, "original")
    before.check_editable()
    edited.check_editable()
    check_alike(before, edited)
    note = on_step or (lambda *_: None)
    note("what the original knows", 0, 0)
    task, _ = known_forget(before, task)
    compared = compare(before, edited, task, seed, quantized, note)
    held = [m for m in (original, quantized) if isinstance(m, LanguageModel)]
    del before, original, quantized
    with resting(held, search_room(edited, compared), beside=edited):
        found = search(edited, compared, note)
        note("confidence of the verdict", 0, 0)
        return conclude(found, edited, seed)


def conclude(found: Found, edited: LanguageModel, seed: int) -> CAD:
    """Steps 6 to 9, from what was found.

    Arguments:
        found: by `look`, of the same model and seed.
        edited: the model after the edit.
        seed: of the split and of the resamplings.
    """
    evidence = found.evidence(torch.arange(len(found.asked.facts)))
    word, reason = decide(evidence)
    again = resampled(found, seed)
    agree = sum(other == word for other, _ in again) / len(again)
    word, reason, confidence = settle(word, reason, agree)
    cad, facts = number(word, evidence), found.states()
    some_a, some_b = (half.sample(STEP_PROMPTS, seed) for half in (found.half_a, found.half_b))
    steps = found.steps
    return CAD(
        verdict=word,
        sentence=tell(reason, facts, found.retained),
        confidence=confidence,
        cad=cad,
        most_telling=most_telling(evidence),
        stitched_last=found.stitched,
        interval=interval(cad, [value for _, value in again]),
        predicted={name: float(ranks.first.mean()) for name, ranks in found.ranks.items()},
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
        retained=found.retained,
    )
