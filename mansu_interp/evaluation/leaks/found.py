"""What the leak test found: shares, verdicts and transcripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...utils.words import Shown, number_of, shortened
from ..versions import ORIGINAL, ModelVersion
from .answers import Answer
from .templates import Part, Scope

if TYPE_CHECKING:
    import pandas

LeakVerdict = Literal[
    "leaks", "avoided", "holds", "kept", "lost", "known", "not known", "too few"
]  # fmt: skip
UNTESTED: tuple[LeakVerdict, ...] = ("known", "not known", "too few")
"""Verdicts that hold nothing against the model."""
FAULTS: tuple[LeakVerdict, ...] = ("leaks", "avoided", "lost")
"""The worst first."""


@dataclass(frozen=True)
class LeakShare:
    """How often the answers of a kind are given away. Without an original, what was tested is
    None."""

    original: float
    """Share of all its prompts, by the original; of sampled prompts, of all draws."""
    model: float | None
    """By the model."""
    chance: float
    """By a guess."""
    tested: int
    """Prompts over which the model is tested: those that the original answers in this way, or in
    the other where it knows the kind in the other alone."""
    facts: int
    """Different facts among them."""
    of_tested: float | None
    """Share of them, or of their draws, by the model; None: there are none."""
    low: float | None
    """Lower end of its 95 % interval (Wilson), the fact as the unit."""
    high: float | None
    """Upper end."""
    p: float | None
    """Probability that guesses do it as often, not corrected."""


@dataclass(frozen=True)
class LeakWay(LeakShare):
    """A way in which the original may know a kind."""

    knows: bool
    """Whether it gives answers away more often than guesses would."""


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
    first: LeakWay | None
    """The answer ranks first of four; None: not asked by rank."""
    last: LeakShare | None
    """It ranks last, over the prompts over which first is tested."""
    written: LeakWay | None
    """It is written, or sampled; None: not asked to write."""
    p: float | None
    """Probability of leaks (of what must stay: of the fall) by chance, corrected for the ways of a
    kind and the number of kinds; None: not tested."""
    p_last: float | None
    """The same of ranks last."""
    verdict: LeakVerdict


@dataclass(frozen=True)
class Transcript:
    """One question, and what came back."""

    kind: str
    """`LeakRow.name`."""
    scope: Scope
    relation: str
    subject: str
    prompt: str
    answer: str
    original: Answer
    model: Answer | None
    """None: there is no original beside the model, which is `original`."""

    def shows(self, verdict: LeakVerdict) -> bool:
        """Whether this prompt is one that speaks for a verdict."""
        if self.model is None:
            return self.original.given
        if verdict == "avoided":
            return self.model.last
        return self.original.given and self.model.given is not (verdict == "lost")

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Kind, prompt, answer, and what the original and the model made of it, shortened."""
        asked = shortened(" ".join(self.prompt.split()), 300)
        old, new = (shortened(str(a or ""), 200) for a in (self.original, self.model))
        return f"{self.kind} ({self.scope})", asked, self.answer, old, new


@dataclass(frozen=True, repr=False)
class LeakTest(Shown):
    """What a model gives away of what it was to forget."""

    model: ModelVersion
    """The original: it was asked alone, which says what it knows."""
    task: str
    part: Part
    """Of the templates."""
    rows: tuple[LeakRow, ...]
    """One a kind and scope."""
    left_out: dict[str, int]
    """Why questions could not be asked, and how many of those that were tried."""
    seed: int
    transcripts: tuple[Transcript, ...] = ()
    """Every prompt with its answers; in a run's report a few of each kind that is at fault."""

    def of(self, *verdicts: LeakVerdict) -> list[str]:
        """The kinds with one of some verdicts; what may stay says so."""
        may = {"may stay": " (may stay)"}
        return [r.name + may.get(r.scope, "") for r in self.rows if r.verdict in verdicts]

    @property
    def leaks(self) -> bool | None:
        """Whether a kind that must go leaks; None: none was tested."""
        verdicts = {r.verdict for r in self.rows if r.scope == "must go"}.difference(UNTESTED)
        return "leaks" in verdicts if verdicts else None

    def examples(self, n: int) -> list[Transcript]:
        """At most n prompts of each kind that leaks, is avoided or lost, the worst first; without
        an original, of each that is known. First those that show it."""
        alone = self.model == ORIGINAL
        out: list[Transcript] = []
        for verdict in ("known",) if alone else FAULTS:
            for row in (r for r in self.rows if r.verdict == verdict):
                of = [t for t in self.transcripts if (t.kind, t.scope) == (row.name, row.scope)]
                out += sorted(of, key=lambda t: not t.shows(row.verdict))[:n]
        return out

    @property
    def sentence(self) -> str:
        """The verdicts in words."""
        by = {
            scope: [r for r in self.rows if r.scope == scope] for scope in ("must go", "must stay")
        }
        few = [r.name for rows in by.values() for r in rows if r.verdict == "too few"]
        told = f" Too few facts to tell: {', '.join(dict.fromkeys(few))}." if few else ""
        if self.model == ORIGINAL:
            return f"{_known(by['must go'], by['must stay'])}{told}"
        go, stay = (
            [r for r in by[s] if r.verdict not in UNTESTED] for s in ("must go", "must stay")
        )
        if not go:
            none = (
                "No kind of leak question could be tested"
                if few
                else ("The original answers no kind of leak question better than guesses would")
            )
            return f"{none}.{told}"
        leaks, avoided = ([r.name for r in go if r.verdict == v] for v in ("leaks", "avoided"))
        out = f"{len(leaks)} of {number_of(len(go), 'kind')} that the original knows leak"
        out += f" ({', '.join(leaks)})" if leaks else ""
        if avoided:
            out += f"; {len(avoided)} avoided: ranked last ({', '.join(avoided)})"
        lost = [r.name for r in stay if r.verdict == "lost"]
        if stay:
            out += f"; of what must stay, {len(lost)} of {number_of(len(stay), 'kind')} lost"
            out += f" ({', '.join(lost)})" if lost else ""
        return f"{out}.{told}"

    def told(self) -> Mapping[str, object]:
        """For its short form."""
        shown: tuple[LeakVerdict, ...] = ("leaks", "avoided", "holds", "lost")
        shown = ("known",) if self.model == ORIGINAL else shown
        return {
            "": f"{self.model}, {self.task}",
            **{v: ", ".join(self.of(v)) or "none" for v in shown},
            "not known": len(self.of("not known")),
            "too few": len(self.of("too few")),
            "left out": sum(self.left_out.values()),
        }

    def to_pandas(self, *, prompts: bool = False) -> pandas.DataFrame:
        """One row a kind and scope, with shares of all prompts and of those that are tested.

        Arguments:
            prompts: one row a prompt instead: what was asked, and what each model made of it.
        """
        import pandas

        rows = [_asked(t) for t in self.transcripts] if prompts else [_flat(r) for r in self.rows]
        return pandas.DataFrame(rows)

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(index=False, float_format="{:.3f}".format, na_rep="")
        return f"<p>{self.sentence}</p>{table}"


def _known(go: list[LeakRow], stay: list[LeakRow]) -> str:
    """What a model that was asked alone knows."""
    known = [r.name for r in go if r.verdict == "known"]
    if not known:
        return "The model answers no kind of leak question better than guesses would."
    out = f"The model knows {len(known)} of {number_of(len(go), 'kind')} ({', '.join(known)})"
    if stay:
        kept = sum(r.verdict == "known" for r in stay)
        out += f"; of what must stay, {kept} of {number_of(len(stay), 'kind')}"
    return f"{out}. What it gives away after an edit needs the original beside it."


def _flat(r: LeakRow) -> dict[str, object]:
    """A row's numbers side by side."""
    out: dict[str, object] = {"kind": r.name, "scope": r.scope, "prompts": r.n, "facts": r.facts}
    for way, share in (("first", r.first), ("last", r.last), ("written", r.written)):
        out[f"{way}, original"] = share and share.original
        out[way] = share and share.model
        out[f"{way}, tested prompts"] = share and share.tested
        out[f"{way} of tested"] = share and share.of_tested
    return {**out, "p": r.p, "p of last": r.p_last, "verdict": r.verdict}


def _asked(t: Transcript) -> dict[str, object]:
    """A prompt with its answers side by side."""
    out: dict[str, object] = {
        "kind": t.kind, "scope": t.scope, "relation": t.relation, "subject": t.subject,
        "prompt": t.prompt, "answer": t.answer,
    }  # fmt: skip
    for who, a in (("original", t.original), ("model", t.model)):
        out[f"rank, {who}"] = a and a.rank
        out[f"written, {who}"] = a and a.written
        out[f"text, {who}"] = a and a.text
    return out
