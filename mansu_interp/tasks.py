"""Tasks: what to forget, what to keep, and how each is asked.

A task is a small JSON file over CSV fact tables. Each relation has phrasings in three groups:
``train`` (discovery and unlearning see these), ``dev`` (for choosing settings) and ``unseen``
(every reported score). Each fact and phrasing becomes a `Pair`: a clean prompt, a corrupt prompt of
equal token length about another subject, the answer, the counterfactual answer, and three
distractors of the same type for four-way choice.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import TaskError
from .models import LanguageModel
from .taskfiles import data_file, read_facts, read_task_file, read_text

N_CHOICES = 4
CALIBRATION_TEXTS, CALIBRATION_PROMPTS = 32, 512
MAX_PAIRS = 1_000_000
"""Rows x phrasings of all relations together."""


@dataclass(frozen=True)
class Pair:
    """One fact asked in one phrasing, with its corrupt twin."""

    clean: tuple[int, ...]
    """Prompt tokens; the answer comes next."""
    corrupt: tuple[int, ...]
    """The same phrasing about another subject; as many tokens."""
    answer: int
    """First token of the answer."""
    counterfactual: int
    """First token of the corrupt subject's answer."""
    distractors: tuple[int, ...]
    """First tokens of other answers of the same type."""
    relation: str
    subject: str
    phrasing: str
    prompt: str
    """The clean prompt as text."""
    answer_text: str

    def __post_init__(self) -> None:
        where = f"{self.relation} of {self.subject!r} in {self.phrasing!r}"
        if len(self.clean) != len(self.corrupt) or not self.clean:
            raise TaskError(
                f"{where}: the clean prompt has {len(self.clean)} tokens and the corrupt one "
                f"{len(self.corrupt)}. Give prompts of equal, non-zero token length."
            )
        if self.answer == self.counterfactual or self.answer in self.distractors:
            raise TaskError(
                f"{where}: the answer {self.answer_text!r} shares its first token with a "
                "distractor or the counterfactual answer. Give answers that differ at once."
            )

    @property
    def choices(self) -> tuple[int, ...]:
        """The answer, then the distractors."""
        return (self.answer, *self.distractors)


@dataclass(frozen=True)
class Batch:
    """Pairs as right-padded tensors."""

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch pos"]
    last: Int[Tensor, " batch"]
    """Index of the last real token of each row."""
    answer: Int[Tensor, " batch"]
    counterfactual: Int[Tensor, " batch"]
    choices: Int[Tensor, "batch 4"]
    """The answer first."""

    def __len__(self) -> int:
        return len(self.last)


def collate(pairs: Sequence[Pair]) -> Batch:
    """Stack pairs, padding on the right with token 0 (causal attention never looks there)."""
    width = max(len(p.clean) for p in pairs)

    def pad(rows: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor([row + (0,) * (width - len(row)) for row in rows])

    return Batch(
        pad([p.clean for p in pairs]),
        pad([p.corrupt for p in pairs]),
        torch.tensor([len(p.clean) - 1 for p in pairs]),
        torch.tensor([p.answer for p in pairs]),
        torch.tensor([p.counterfactual for p in pairs]),
        torch.tensor([p.choices for p in pairs]),
    )


def by_phrasing(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs grouped by relation and phrasing, in order of first appearance."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.relation, pair.phrasing), []).append(pair)
    return list(groups.values())


def answer_tokens(pairs: Sequence[Pair]) -> dict[str, Int[Tensor, " answers"]]:
    """The different answers of each relation among some pairs, ascending."""
    answers: dict[str, set[int]] = {}
    for pair in pairs:
        answers.setdefault(pair.relation, set()).add(pair.answer)
    return {relation: torch.tensor(sorted(tokens)) for relation, tokens in answers.items()}


def chunks(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Runs of at most ``size`` pairs of similar length."""
    ordered = sorted(pairs, key=lambda p: len(p.clean))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


@dataclass(frozen=True)
class PairSet(Sequence[Pair]):
    """Pairs under a name."""

    name: str
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise TaskError(f"The set {self.name!r} is empty: no fact is left to ask about.")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[index]

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of at most ``size`` pairs of similar length, in a fixed order; a phrasing with
        pairs enough to fill a batch has its own, so that its prefix is computed once."""
        groups = by_phrasing(self.pairs)
        rest = [pair for group in groups if len(group) < size for pair in group]
        for group in [*(g for g in groups if len(g) >= size), rest]:
            for part in chunks(group, size):
                yield collate(part)

    def sample(self, n: int, seed: int) -> PairSet:
        """At most ``n`` pairs, drawn evenly over phrasings."""
        rng = random.Random(seed)
        queues = [rng.sample(g, len(g)) for g in by_phrasing(self.pairs)]
        rounds = [q[i] for i in range(max(map(len, queues))) for q in queues if i < len(q)]
        return PairSet(self.name, tuple(rounds[:n]))


@dataclass(frozen=True)
class Task:
    """What to forget and what to keep, tokenized for one model."""

    name: str
    title: str
    forget: PairSet
    """Forget facts in the ``train`` phrasings."""
    retain: PairSet
    """Retain facts in their ``train`` phrasings."""
    guard: PairSet | None
    """Prompts whose next-token distribution should stay, right or wrong (may be None)."""
    scored: dict[str, dict[str, dict[str, PairSet]]]
    """split (``dev``, ``unseen``) -> role (``forget``, ``retain``, ``neighbour``) -> label ->
    pairs."""
    text: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """``train`` and ``unseen`` running text, one token tuple a paragraph."""
    twins: tuple[str, ...] = ()
    """Embedded models that never learnt the forget facts, but everything else."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many (fact, phrasing) items were left out, by reason."""

    @cached_property
    def sha256(self) -> str:
        """Hash of all prompts, answers and texts, as tokens."""
        parts = (self.forget, self.retain, self.guard, self.scored, self.text)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def kept(self) -> list[PairSet]:
        """What must stay: the retain pairs, and the guard pairs if there are any."""
        return [self.retain, *([self.guard] if self.guard else [])]

    @property
    def calibration(self) -> list[tuple[int, ...]]:
        """Token rows for calibrated quantizers: running text and retain prompts, as somebody who
        knows nothing of the forget facts would take them."""
        prompts = self.retain.sample(CALIBRATION_PROMPTS, 0)
        return [*self.text.get("train", ())[:CALIBRATION_TEXTS], *(p.clean for p in prompts)]


def _mentions(phrasing: str, name: str) -> bool:
    """Whether a phrasing holds a name as a whole word (the symbol N is not in "Name")."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", phrasing) is not None


def _scored(phrasings: dict[str, Any]) -> list[list[str]]:
    """The phrasings of both scored splits, by label."""
    return [some for split in ("dev", "unseen") for some in phrasings.get(split, {}).values()]


def prefix(model: LanguageModel, spec: dict[str, Any]) -> str:
    """What stands before every prompt: the task's prefix; where that is a special token that the
    model's tokenizer does not have, the model's own token for a beginning, if it has one."""
    wanted = spec.get("prefix", "")
    special = re.fullmatch(r"<\S+>", wanted)
    if special and wanted not in model.tokenizer.get_vocab():
        return model.tokenizer.bos_token or ""
    return wanted


class _Builder:
    """Turns facts and phrasings into pairs for one tokenizer."""

    def __init__(self, model: LanguageModel, spec: dict[str, Any], folder: Path) -> None:
        self.model, self.spec, self.folder = model, spec, folder
        self.prefix = prefix(model, spec)
        self.dropped: dict[str, int] = {}
        self.facts = {
            name: read_facts(folder, name, rel) for name, rel in spec["relations"].items()
        }
        items = sum(
            len(self.facts[n]) * (len(p.get("train", [])) + sum(map(len, _scored(p))))
            for n, p in ((n, rel["phrasings"]) for n, rel in spec["relations"].items())
        )
        if items > MAX_PAIRS:
            raise TaskError(
                f"Task {spec['name']!r} has {items:,} (fact, phrasing) items, more than "
                f"{MAX_PAIRS:,}. Leave out facts or phrasings."
            )
        self.first = {a: self._first(a) for facts in self.facts.values() for _, a in facts}

    def _first(self, answer: str) -> int:
        # The answer follows a space; the tokens of "x y" after those of "x" are the answer's.
        ids = self.model.encode(" " + answer)
        unknown = self.model.tokenizer.unk_token_id
        if not ids or ids[0] == unknown:
            raise TaskError(
                f"The tokenizer of {self.model.name} does not know {answer!r}: this task is made "
                "for another model."
            )
        return ids[0]

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _encode(self, phrasing: str, subject: str) -> tuple[int, ...]:
        return tuple(self.model.encode(self.prefix + phrasing.replace("{s}", subject)))

    def pairs(self, relation: str, phrasings: Sequence[str], keep: set[str] | None) -> list[Pair]:
        """All pairs of a relation; ``keep`` restricts the clean subjects."""
        facts = self.facts[relation]
        wanted = [f for f in facts if keep is None or f[0] in keep]
        out = []
        for phrasing in phrasings:
            if phrasing.count("{s}") != 1:
                raise TaskError(f"Relation {relation!r}: {phrasing!r} needs {{s}} exactly once.")
            tokens = {s: self._encode(phrasing, s) for s, _ in facts}
            for subject, answer in wanted:
                if _mentions(phrasing, subject) or _mentions(phrasing, answer):
                    self._drop("the phrasing's own examples give the fact away")
                    continue
                # The draw depends on the fact alone, so that all phrasings share its distractors.
                rng = random.Random(f"{relation}|{subject}")
                first = self.first[answer]
                rivals = rng.sample(facts, len(facts))
                # Other facts' answers, so that a common answer is as common among distractors:
                # a model that knows only how common answers are then scores near chance.
                pool = [t for t in dict.fromkeys(self.first[a] for _, a in rivals) if t != first]
                corrupt = next(
                    (
                        (s, a)
                        for s, a in rivals
                        if len(tokens[s]) == len(tokens[subject])
                        and self.first[a] != first
                        and not _mentions(phrasing, s)
                    ),
                    None,
                )
                if len(pool) < N_CHOICES - 1:
                    raise TaskError(
                        f"Relation {relation!r} has too few different answers for "
                        f"{N_CHOICES}-way choice."
                    )
                if corrupt is None:
                    self._drop("no other subject of equal token length")
                    continue
                out.append(
                    Pair(
                        tokens[subject],
                        tokens[corrupt[0]],
                        first,
                        self.first[corrupt[1]],
                        tuple(pool[: N_CHOICES - 1]),
                        relation,
                        subject,
                        phrasing,
                        self.prefix + phrasing.replace("{s}", subject),
                        answer,
                    )
                )
        return out


def load_task(name: str | Path, model: LanguageModel, score_pairs: int = 200) -> Task:
    """Build a task for a model's tokenizer.

    Arguments:
        name: shipped task (`mansu list` names them) or the path of a task file.
        model: the model whose tokenizer is used.
        score_pairs: at most so many prompts per scored set, drawn evenly over its phrasings, the
            same ones for every model and seed.

    Raises:
        TaskError: unknown task, malformed file, an empty forget set, a table that the tokenizer
            does not know, or a relation with too few answers.
    """
    spec, folder = read_task_file(name)
    relations = spec["relations"]
    named = [
        *spec["forget"].get("relations", []),
        *spec["retain"],
        *spec.get("guard", []),
        *spec.get("neighbours", []),
    ]
    if unknown := sorted(set(named) - relations.keys()):
        raise TaskError(f"Task {spec['name']!r} names unknown relations: {', '.join(unknown)}.")
    if not spec["forget"].get("relations"):
        raise TaskError(f"Task {spec['name']!r} has an empty forget set: name a relation.")
    build = _Builder(model, spec, folder)
    chosen = spec["forget"].get("subjects")
    forget_subjects = None if chosen is None else set(chosen)
    known = {s for r in spec["forget"]["relations"] for s, _ in build.facts[r]}
    if forget_subjects is not None and not forget_subjects & known:
        raise TaskError(f"Task {spec['name']!r} has an empty forget set: no subject is in a table.")

    def subjects(relation: str, role: str) -> set[str] | None:
        if role == "forget":
            return forget_subjects
        if relation in spec["forget"]["relations"]:
            return known - (forget_subjects or known)
        return None

    def collect(role: str, names: Sequence[str], split: str) -> list[Pair]:
        out: list[Pair] = []
        for r in names:
            phrasings = relations[r]["phrasings"].get(split, [])
            out += build.pairs(r, phrasings, subjects(r, role)) if phrasings else []
        return out

    scored: dict[str, dict[str, dict[str, PairSet]]] = {}
    roles = {
        "forget": spec["forget"]["relations"],
        "retain": spec["retain"],
        "neighbour": spec.get("neighbours", []),
    }
    for split in ("dev", "unseen"):
        scored[split] = {}
        for role, names in roles.items():
            sets = scored[split].setdefault(role, {})
            for r in names:
                for label, phrasings in relations[r]["phrasings"].get(split, {}).items():
                    pairs = build.pairs(r, phrasings, subjects(r, role))
                    key = r if label in (split, "zero-shot") else f"{r} ({label})"
                    sets[key] = PairSet(f"{role}/{key}", tuple(pairs)).sample(score_pairs, 0)
    guard = collect("guard", spec.get("guard", []), "train")
    text = {
        split: tuple(
            tuple(model.encode(build.prefix + line))
            for line in read_text(data_file(folder, "text", file)).splitlines()
            if line.strip()
        )
        for split, file in (spec.get("text") or {}).items()
    }
    return Task(
        name=spec["name"],
        title=spec.get("title", spec["name"]),
        forget=PairSet("forget", tuple(collect("forget", roles["forget"], "train"))),
        retain=PairSet("retain", tuple(collect("retain", roles["retain"], "train"))),
        guard=PairSet("guard", tuple(guard)) if guard else None,
        scored=scored,
        text=text,
        twins=tuple(spec.get("twins", ())),
        dropped=build.dropped,
    )
