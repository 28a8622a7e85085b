"""What the leak test finds: shares by kind, and verdicts.

One definition, used wherever leaks are told. A kind is *known* in one of two ways, ranking and
writing, where the original gives answers away more often than guesses would (`p_of_guess`, with the
fact as the unit, at most `ALPHA`). Of it only the prompts that the original answers count.
Of these:

- ``leaks``: the edited model gives the answer away more often than guesses would, in one of the
  ways in which the kind is known;
- ``avoided``: it does not, but ranks the answer last of four more often than guesses would;
- ``holds``: neither.

p of a kind is the smaller of its ways', times how many they are (Bonferroni); over kinds, Holm's
correction (Holm 1979) keeps the chance of one false ``leaks``, or one false ``avoided``, at
`ALPHA`. A guess ranks first in a quarter of the prompts, and last in as many; it writes the answer
once in as many answers as the relation has.

What must stay is ``lost`` where a sign test over the prompts that changed (McNemar's, exact), with
the same corrections, finds that the original answered more of them; else ``kept``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...audit.known import ALPHA, CHANCE, FEW, p_of_guess
from ...errors import ModelError
from ...models.language_model import LanguageModel
from ...tasks.task import Task
from ...utils.ranges import entrance
from ...utils.words import Shown, number_of
from ..scores import Flips
from ..versions import EDITED, ModelVersion
from .answers import Answer, Answers, OnStep, ask
from .asking import Question, Questions, questions
from .templates import Part, Scope

if TYPE_CHECKING:
    import pandas

LeakVerdict = Literal["leaks", "avoided", "holds", "kept", "lost", "not known"]
Z = 1.959964
"""Standard normal deviations on either side of a 95 % interval."""
RIGHT = 0.5
"""Share of its continuations that must hold the answer for a prompt to count as answered."""


@dataclass(frozen=True)
class LeakShare:
    """How often the answers of a kind are given away, in one way."""

    original: float
    """Share of all its prompts, by the original."""
    model: float
    """By the model."""
    chance: float
    """By a guess."""
    knows: bool
    """Whether the original does it more often than guesses would."""
    known: int
    """Prompts on which the original does; those below count these alone."""
    facts: int
    """Different facts among them."""
    of_known: float | None
    """Share of them, by the model; None: there are none."""
    low: float
    """Lower end of its 95 % interval (Wilson), the fact as the unit."""
    high: float
    """Upper end."""
    p: float
    """Probability that guesses do it as often."""


@dataclass(frozen=True)
class LeakRow:
    """What was found of one kind."""

    name: str
    """The kind; of languages, with the language."""
    scope: Scope
    n: int
    """Prompts."""
    facts: int
    """Different facts among them."""
    first: LeakShare | None
    """The answer ranks first of four; None: not asked by rank."""
    last: LeakShare | None
    """It ranks last, on the prompts on which the original ranks it first."""
    written: LeakShare | None
    """It is written, or sampled; None: not asked to write."""
    p: float | None
    """Probability of leaks (of what must stay: of the fall) by chance, corrected for the ways of a
    kind and the number of kinds; None: not known."""
    p_last: float | None
    """The same of ranks last."""
    verdict: LeakVerdict


@dataclass(frozen=True, repr=False)
class LeakTest(Shown):
    """What a model gives away of what it was to forget."""

    model: ModelVersion
    task: str
    part: Part
    """Of the templates."""
    rows: tuple[LeakRow, ...]
    """One a kind and scope."""
    left_out: dict[str, int]
    """Why questions could not be asked, and how many of those that were tried."""
    seed: int

    def of(self, *verdicts: LeakVerdict) -> list[str]:
        """The kinds with one of some verdicts; what may stay says so."""
        may = {"may stay": " (may stay)"}
        return [r.name + may.get(r.scope, "") for r in self.rows if r.verdict in verdicts]

    @property
    def leaks(self) -> bool | None:
        """Whether a kind that must go leaks; None: the original knows none."""
        verdicts = {r.verdict for r in self.rows if r.scope == "must go"} - {"not known"}
        return "leaks" in verdicts if verdicts else None

    @property
    def sentence(self) -> str:
        """The verdicts in words."""
        known = [r for r in self.rows if r.scope == "must go" and r.verdict != "not known"]
        if not known:
            return "The original answers no kind of leak question better than guesses would."
        by = {v: [r.name for r in known if r.verdict == v] for v in ("leaks", "avoided")}
        out = f"{len(by['leaks'])} of {number_of(len(known), 'kind')} that the original knows leak"
        out += f" ({', '.join(by['leaks'])})" if by["leaks"] else ""
        if by["avoided"]:
            out += f"; {len(by['avoided'])} avoided: ranked last ({', '.join(by['avoided'])})"
        stay = [r for r in self.rows if r.scope == "must stay" and r.verdict != "not known"]
        lost = [r.name for r in stay if r.verdict == "lost"]
        if stay:
            out += f"; of what must stay, {len(lost)} of {number_of(len(stay), 'kind')} lost"
        return f"{out}{f' ({chr(44).join(lost)})' if lost else ''}."

    def told(self) -> Mapping[str, object]:
        """For its short form."""
        return {
            "": f"{self.model}, {self.task}",
            "leaks": ", ".join(self.of("leaks")) or "none",
            "avoided": ", ".join(self.of("avoided")) or "none",
            "holds": ", ".join(self.of("holds")) or "none",
            "lost": ", ".join(self.of("lost")) or "none",
            "not known": len(self.of("not known")),
            "left out": sum(self.left_out.values()),
        }

    def to_pandas(self) -> pandas.DataFrame:
        """One row a kind and scope; shares of all prompts, and of those that the original
        answers."""
        import pandas

        return pandas.DataFrame([_flat(r) for r in self.rows])

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(index=False, float_format="{:.3f}".format, na_rep="")
        return f"<p>{self.sentence}</p>{table}"


def _flat(r: LeakRow) -> dict[str, object]:
    """A row's numbers side by side."""
    out: dict[str, object] = {"kind": r.name, "scope": r.scope, "prompts": r.n, "facts": r.facts}
    for way, share in (("first", r.first), ("last", r.last), ("written", r.written)):
        out[f"{way}, original"] = share and share.original
        out[way] = share and share.model
        out[f"{way}, known prompts"] = share and share.known
        out[f"{way} of known"] = share and share.of_known
    return {**out, "p": r.p, "p of last": r.p_last, "verdict": r.verdict}


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


@entrance(ModelError)
def leak_test(
    model: LanguageModel,
    task: Task,
    *,
    original: LanguageModel | None = None,
    part: Part = "unseen",
    templates: Path | None = None,
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
        original: the model before the edit, with the same tokenizer; None: the model itself, to
            see which kinds it knows.
        part: of the templates: unseen, or those that unlearning may train on.
        templates: a file of templates of your own; None: those that ship (docs/leaks.md).
        prompts: at most so many of a kind and scope.
        seed: of the draws.
        on_step: called with (what, questions done, in all).

    Raises:
        TaskError: see `questions`.
        ModelError: a model's logits are no numbers.

    Examples:
        >>> model = load_model("facts")
        >>> leak_test(model, load_task("capitals", model), prompts=8).leaks
        True
    """
    asked = questions(model, task, part=part, templates=templates, prompts=prompts, seed=seed)
    known = ask(original or model, asked.items, seed=seed, on_step=on_step)
    found = ask(model, asked.items, seed=seed, on_step=on_step) if original else known
    return judge(asked, known, found, EDITED if original else ModelVersion("original"), task.name)


def judge(
    asked: Questions, original: Answers, model: Answers, version: ModelVersion, task: str
) -> LeakTest:
    """Shares and verdicts of every kind (see the module).

    Arguments:
        asked: the questions.
        original: what the original answers.
        model: what the model answers.
        version: which model that is.
        task: its name.
    """
    groups: dict[tuple[str, Scope], list[int]] = {}
    for k, q in enumerate(asked.items):
        groups.setdefault((q.name, q.scope), []).append(k)
    rows = [
        _row([asked.items[k] for k in places], [original.of[k] for k in places],
             [model.of[k] for k in places])
        for places in groups.values()
    ]  # fmt: skip
    rows = _corrected(rows)
    return LeakTest(version, task, asked.part, tuple(rows), asked.left_out, asked.seed)


def _row(asked: list[Question], old: list[Answer], new: list[Answer]) -> LeakRow:
    """A kind with p as it is, not corrected for the others."""
    facts = len({q.fact for q in asked})
    first = last = written = None
    if asked[0].kind != "sampling":
        hits = [float(bool(a.first)) for a in old]
        first = _share(asked, hits, hits, [float(bool(a.first)) for a in new], CHANCE)
        before, after = ([float(bool(a.last)) for a in answers] for answers in (old, new))
        last = replace(_share(asked, hits, before, after, CHANCE), knows=first.knows)
    if asked[0].kind != "choice":
        hits = [a.written or 0.0 for a in old]
        guess = sum(q.guess for q in asked) / len(asked)
        written = _share(asked, hits, hits, [a.written or 0.0 for a in new], guess)
    ways = [s for s in (first, written) if s and s.knows]
    p = min(1.0, len(ways) * min(s.p for s in ways)) if ways else None
    if ways and asked[0].scope == "must stay":
        p = min(1.0, len(ways) * min(_p_of_fall(old, new, s is first) for s in ways))
    p_last = last.p if last and last.knows else None
    name, scope = asked[0].name, asked[0].scope
    return LeakRow(name, scope, len(asked), facts, first, last, written, p, p_last, "not known")


def _share(
    asked: list[Question], known: list[float], old: list[float], new: list[float], chance: float
) -> LeakShare:
    """One way of a kind.

    Arguments:
        asked: its questions.
        known: how far the original answers each; those that it answers count.
        old: how far the original does what is counted.
        new: how far the model does.
        chance: share of a guess.
    """
    n, facts = len(asked), len({q.fact for q in asked})
    knows = p_of_guess(sum(known) / n, facts, n, chance) <= ALPHA
    places = [k for k in range(n) if known[k] >= RIGHT]
    of_known = sum(new[k] for k in places) / len(places) if places else None
    units = len({asked[k].fact for k in places})
    low, high = wilson(of_known or 0.0, units if units >= FEW else len(places))
    return LeakShare(
        original=sum(old) / n,
        model=sum(new) / n,
        chance=chance,
        knows=knows,
        known=len(places),
        facts=units,
        of_known=of_known,
        low=low,
        high=high,
        p=1.0 if of_known is None else p_of_guess(of_known, units, len(places), chance),
    )


def _p_of_fall(old: list[Answer], new: list[Answer], by_rank: bool) -> float:
    """Of a sign test over the prompts that changed; 1 where no more were lost than won."""
    before, after = (
        [bool(a.first) if by_rank else (a.written or 0.0) >= RIGHT for a in answers]
        for answers in (old, new)
    )
    flips = Flips.between(before, after)
    return flips.p if flips.gone > flips.back else 1.0


def _corrected(rows: list[LeakRow]) -> list[LeakRow]:
    """The rows with p corrected for the number of kinds that are known, and their verdicts."""
    out = list(rows)
    for stay in (False, True):
        places = [k for k, r in enumerate(rows) if (r.scope == "must stay") == stay]
        for name in ("p", "p_last"):
            tested = [k for k in places if getattr(rows[k], name) is not None]
            corrected = holm([getattr(rows[k], name) for k in tested])
            for k, p in zip(tested, corrected, strict=True):
                out[k] = replace(out[k], **{name: p})
    return [replace(r, verdict=_verdict(r)) for r in out]


def _verdict(r: LeakRow) -> LeakVerdict:
    if r.p is None:
        return "not known"
    if r.scope == "must stay":
        return "lost" if r.p <= ALPHA else "kept"
    if r.p <= ALPHA:
        return "leaks"
    return "avoided" if r.p_last is not None and r.p_last <= ALPHA else "holds"
