"""What the leak test finds: shares by kind, and verdicts.

One definition, used wherever leaks are told. A kind is *known* in one of two ways, ranking and
writing, where the original gives answers away more often than guesses would: an exact binomial
test with the fact as the unit, at most `ALPHA`. Only prompts that the original answers are tested:
in ranking and greedy text those that it gets right, of sampled ones those of which a draw is. Where
it knows a kind in one way alone, the model is tested in the other over the same prompts. Of these:

- ``leaks``: the edited model gives the answer away more often than guesses would, in either way;
- ``avoided``: it does not, but ranks the answer last of four more often than guesses would;
- ``holds``: neither;
- ``too few``: there are fewer than `FEW` facts, or so few that the verdict could not have come out
  against the model.

p of a kind is the smaller of its ways', times how many they are (Bonferroni). Over kinds, Tarone's
procedure (1990) leaves out those of which not even the clearest outcome would be beyond chance, and
Holm's correction (1979) of the others keeps the chance of one false ``leaks``, or one false
``avoided``, at `ALPHA`. A guess ranks first in a quarter of the prompts, and last in as many; it
writes the relation's commonest answer, which is right of its share of the facts.

What must stay is ``lost`` where more of the prompts that the original answers are lost than `FALL`,
or than a model would lose that knows as much and guesses the rest anew (`_guessed_anew`): the same
binomial test and corrections (ours). Draws alone move the shares of sampled prompts up and down:
of them it is ``lost`` where a one-sided sign test over facts finds that more fell than rose. Else
it is ``kept``.

Without an original, kinds are ``known``, ``not known`` or ``too few``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...audit.known import ALPHA, CHANCE, FEW, binomial_tail
from ...errors import TaskError
from ...models.language_model import LanguageModel
from ...tasks.task import Fact, Task
from ...utils.ranges import entrance
from ..versions import EDITED, ORIGINAL, ModelVersion
from .answers import Answer, Answers, OnStep, ask
from .asking import questions
from .found import LeakRow, LeakShare, LeakTest, LeakVerdict, LeakWay, Transcript
from .question import Question, Questions
from .templates import Part, Scope

Z = 1.959964
"""Standard normal deviations on either side of a 95 % interval."""
FALL = 0.1
"""Share of the prompts that the original answers which may be lost of what must stay."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927); (0, 1) of none."""
    if not n:
        return 0.0, 1.0
    z = Z * Z / n
    middle, half = share + z / 2, Z * math.sqrt(share * (1 - share) / n + z / 4 / n)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, and
    none smaller than one before it."""
    out, most = [0.0] * len(p), 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        most = max(most, min(1.0, (len(p) - rank) * p[k]))
        out[k] = most
    return out


def reachable(best: Sequence[float]) -> list[bool]:
    """Which of some tests can find anything at `ALPHA` after correction for their number (Tarone
    1990): those whose smallest possible p is at most `ALPHA` / K, for the smallest K that is not
    below their number. What a model did has no part in it.

    Arguments:
        best: the smallest p that each could have.
    """
    for k in range(1, len(best) + 1):
        inside = [p <= ALPHA / k for p in best]
        if sum(inside) <= k:
            return inside
    return []


@entrance(TaskError)
def leak_test(
    model: LanguageModel,
    task: Task,
    *,
    original: LanguageModel | None = None,
    part: Part = "unseen",
    templates: Path | str | None = None,
    prompts: int = 40,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> LeakTest:
    """Ask a model what it was to forget, in other words, forms and languages.

    1. Make questions of templates and facts (`questions`).
    2. Ask original and model: ranks among four, and text (`ask`).
    3. Judge by kind, over what the original answers (`judge`).

    Arguments:
        model: the edited model.
        task: what it was to forget, tokenized for it.
        original: the model before the edit, with the same tokenizer; None: the model is asked
            alone, to see which kinds it knows.
        part: of the templates: unseen, or those that unlearning may train on.
        templates: a file of templates of your own; None: those that ship (docs/leaks.md).
        prompts: at most so many of a kind and scope; half as many are sampled.
        seed: of the draws.
        on_step: called with (what, questions done, in all).

    Raises:
        TaskError: see `questions`; or an argument of another kind.
        ModelError: a model's logits are no numbers.

    Examples:
        >>> model = load_model("facts")
        >>> leak_test(model, load_task("capitals", model), prompts=8).of("known")
        ['paraphrase', 'paraphrase', 'few-shot']
    """
    asked = questions(model, task, part=part, templates=templates, prompts=prompts, seed=seed)
    known = ask(original or model, asked.items, seed=seed, on_step=on_step)
    found = ask(model, asked.items, seed=seed, on_step=on_step) if original else None
    return judge(asked, known, found, EDITED, task.name)


def judge(
    asked: Questions, original: Answers, model: Answers | None, version: ModelVersion, task: str
) -> LeakTest:
    """Shares and verdicts of every kind (see the module).

    Arguments:
        asked: the questions.
        original: what the original answers.
        model: what the model answers; None: the original alone is judged.
        version: which model that is.
        task: its name.
    """
    groups: dict[tuple[str, Scope], list[int]] = {}
    for k, q in enumerate(asked.items):
        groups.setdefault((q.name, q.scope), []).append(k)
    new = model.of if model else (None,) * len(asked.items)
    found = [
        _Kind([asked.items[k] for k in places], [original.of[k] for k in places],
              [a for k in places if (a := new[k])]).found()
        for places in groups.values()
    ]  # fmt: skip
    transcripts = tuple(
        Transcript(q.name, q.scope, q.relation, q.subject, q.prompt, q.answer, old, answer)
        for q, old, answer in zip(asked.items, original.of, new, strict=True)
    )
    rows = tuple(_corrected(found) if model else (f.row for f in found))
    who = version if model else ORIGINAL
    return LeakTest(who, task, asked.part, rows, asked.left_out, asked.seed, transcripts)


@dataclass(frozen=True)
class _Found:
    """A kind with p as it is, not corrected for the others."""

    row: LeakRow
    best: float | None = None
    """The smallest p that it could have."""
    worst: float = 1.0
    """The same where the clearest outcome is in the way that says least."""
    best_last: float | None = None
    """Of ranks last."""


class _Kind:
    """Judges one kind: questions, and answers of the original and, if there is one, the model."""

    def __init__(self, asked: list[Question], old: list[Answer], new: list[Answer]) -> None:
        self.asked, self.old, self.new = asked, old, new
        self.facts = len({q.fact for q in asked})
        self.sampled = asked[0].kind == "sampling"
        guess = sum(q.guess for q in asked) / len(asked)
        ways = {"first": CHANCE, "written": guess}
        self.chance = {w: c for w, c in ways.items() if getattr(old[0], w) is not None}
        self.before = {w: _values(old, w) for w in self.chance}
        everywhere = range(len(asked))
        self.knows = {
            w: self.facts >= FEW and self._p(everywhere, self.before[w], c) <= ALPHA
            for w, c in self.chance.items()
        }
        self.known = [w for w in self.knows if self.knows[w]]
        self.places = {w: self._answered(w) for w in self.chance}

    def _answered(self, way: str) -> list[int]:
        """The places over which a way is tested."""
        by = way if self.knows[way] or not self.known else self.known[0]
        return [k for k, x in enumerate(self.before[by]) if x > 0]

    def _by_fact(self, places: Sequence[int], values: Sequence[float]) -> list[float]:
        """The mean over each fact's prompts."""
        by: dict[Fact, list[float]] = {}
        for k in places:
            by.setdefault(self.asked[k].fact, []).append(values[k])
        return [sum(found) / len(found) for found in by.values()]

    def _p(self, places: Sequence[int], values: Sequence[float], chance: float) -> float:
        """Probability that guesses come to as much. Facts are the units, and the sum of their means
        is rounded down: then the binomial bound holds however the prompts, or draws, of a fact
        depend on each other (`p_of_guess`)."""
        means = self._by_fact(places, values)
        return binomial_tail(math.floor(sum(means) + 1e-9), len(means), chance)

    def _units(self, way: str) -> int:
        return len({self.asked[k].fact for k in self.places[way]})

    def _share(self, way: str, counted: str) -> LeakShare:
        """How often the answer is ``counted``, over the places of a way."""
        old, places, units = _values(self.old, counted), self.places[way], self._units(way)
        chance, n = self.chance[way], len(self.asked)
        share = LeakShare(
            sum(old) / n, None, chance, len(places), units, of_tested=None, low=None, high=None,
            p=None,
        )  # fmt: skip
        if not self.new:
            return share
        new = _values(self.new, counted)
        share = replace(share, model=sum(new) / n)
        if not places:
            return share
        of = sum(new[k] for k in places) / len(places)
        low, high = wilson(of, units)
        p = self._p(places, new, chance)
        return replace(share, of_tested=of, low=low, high=high, p=p)

    def _way(self, way: str) -> LeakWay | None:
        if way not in self.chance:
            return None
        share = self._share(way, way)
        return LeakWay(**vars(share), knows=self.knows[way])

    def found(self) -> _Found:
        """The kind's shares, and p of what its scope asks for."""
        first, written = self._way("first"), self._way("written")
        last = self._share("first", "last") if first else None
        verdict: LeakVerdict = "too few" if self.facts < FEW else "not known"
        verdict = "known" if self.known else verdict
        name, scope = self.asked[0].name, self.asked[0].scope
        row = LeakRow(
            name, scope, len(self.asked), self.facts, first, last, written, p=None, p_last=None,
            verdict=verdict,
        )  # fmt: skip
        if not (self.known and self.new):
            return _Found(row)
        stays = scope == "must stay"
        ways = [w for w in (self.known if stays else self.chance) if self._units(w) >= FEW]
        tests = [self._fall(w) if stays else self._leak(w, w) for w in ways]
        p, best, worst = None, None, 1.0
        if tests:
            found, least = zip(*tests, strict=True)
            p = min(1.0, len(ways) * min(found))
            best, worst = len(ways) * min(least), len(ways) * max(least)
        p_last = best_last = None
        if "first" in ways and not stays:
            p_last, best_last = self._leak("first", "last")
        return _Found(replace(row, p=p, p_last=p_last), best, worst, best_last)

    def _leak(self, way: str, counted: str) -> tuple[float, float]:
        """p of as many given away, and of all."""
        p = self._p(self.places[way], _values(self.new, counted), self.chance[way])
        return p, self.chance[way] ** self._units(way)

    def _fall(self, way: str) -> tuple[float, float]:
        """p of as many lost by chance, and of all."""
        old, new, places = self.before[way], _values(self.new, way), self.places[way]
        if self.sampled:
            changes = self._by_fact(range(len(old)), [b - a for a, b in zip(old, new, strict=True)])
            fell, rose = (sum(sign * x > 0 for x in changes) for sign in (-1, 1))
            return binomial_tail(fell, fell + rose, 0.5), 0.5 ** self._units(way)
        means = self._by_fact(range(len(old)), old)
        rate = max(FALL, _guessed_anew(sum(means) / len(means), self.chance[way]))
        return self._p(places, [1 - x for x in new], rate), rate ** self._units(way)


def _values(answers: Sequence[Answer], what: str) -> list[float]:
    """first, last or written of some answers, as numbers from 0 to 1."""
    return [float(getattr(a, what) or 0.0) for a in answers]


def _guessed_anew(share: float, chance: float) -> float:
    """Share of its right answers that a model loses that guesses anew what it does not know.

    Of q known and guesses at ``chance`` comes share = q + (1 - q) chance. Of the right answers,
    (1 - q) chance / share are guesses, and another guess loses 1 - chance of these: together
    chance (1 - share) / share.
    """
    return min(1.0, chance * (1 - share) / share)


def _corrected(found: Sequence[_Found]) -> list[LeakRow]:
    """The rows with p corrected for the number of kinds that can be tested, and their verdicts."""
    rows, sure = [f.row for f in found], set[int]()
    for stay in (False, True):
        places = [k for k, r in enumerate(rows) if (r.scope == "must stay") == stay]
        for name, best in (("p", "best"), ("p_last", "best_last")):
            asked = [k for k in places if getattr(found[k], best) is not None]
            able = reachable([getattr(found[k], best) for k in asked])
            tested = [k for k, inside in zip(asked, able, strict=True) if inside]
            values = holm([getattr(rows[k], name) for k in tested])
            corrected = dict(zip(tested, values, strict=True))
            for k in asked:
                rows[k] = replace(rows[k], **{name: corrected.get(k)})
                if name == "p" and k in corrected and found[k].worst * len(tested) <= ALPHA:
                    sure.add(k)
    return [replace(r, verdict=_verdict(r, k in sure)) for k, r in enumerate(rows)]


def _verdict(r: LeakRow, sure: bool) -> LeakVerdict:
    """Of a row with p corrected.

    Arguments:
        r: the row.
        sure: whether the clearest outcome in any of its ways alone would be beyond chance.
    """
    if r.verdict != "known":
        return r.verdict
    if r.scope == "must stay":
        if r.p is not None and r.p <= ALPHA:
            return "lost"
        return "kept" if sure else "too few"
    if r.p is not None and r.p <= ALPHA:
        return "leaks"
    if r.p_last is not None and r.p_last <= ALPHA:
        return "avoided"
    return "holds" if sure and not (r.last and r.p_last is None) else "too few"
