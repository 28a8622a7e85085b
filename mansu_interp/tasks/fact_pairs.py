"""Fact tables and phrasings -> clean/corrupt pairs of equal token length."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import TaskError
from ..models.language_model import LanguageModel
from .files import read_facts
from .pairs import N_CHOICES, Pair, Tokens, gap
from .schema import Phrasings, TableTask, TaskFile

MAX_PAIRS = 1_000_000
"""Rows x phrasings of all relations together."""


def _mentions(phrasing: str, name: str) -> bool:
    """Whether a phrasing holds a name as a whole word (the symbol N is not in "Name")."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", phrasing) is not None


def _scored(phrasings: Phrasings) -> list[list[str]]:
    """The phrasings of both scored splits, by label."""
    return [*phrasings.dev.values(), *phrasings.unseen.values()]


def prefix(model: LanguageModel, spec: TaskFile) -> str:
    """What stands before every prompt: the task's prefix; where that is a special token that the
    model's tokenizer does not have, the model's own token for a beginning, if it has one."""
    special = re.fullmatch(r"<\S+>", spec.prefix)
    if special and spec.prefix not in model.get_tokenizer().get_vocab():
        return str(model.get_tokenizer().bos_token or "")
    return spec.prefix


class FactPairs:
    """Turns facts and phrasings into pairs for one tokenizer."""

    def __init__(self, model: LanguageModel, spec: TableTask, folder: Path) -> None:
        self.model = model
        self.prefix = prefix(model, spec)
        self.dropped: dict[str, int] = {}
        self.facts = {name: read_facts(folder, name, rel) for name, rel in spec.relations.items()}
        items = sum(
            len(self.facts[n]) * (len(p.train) + sum(map(len, _scored(p))))
            for n, p in ((n, rel.phrasings) for n, rel in spec.relations.items())
        )
        if items > MAX_PAIRS:
            raise TaskError(
                f"Task {spec.name!r} has {items:,} (fact, phrasing) items, more than "
                f"{MAX_PAIRS:,}. Leave out facts or phrasings."
            )
        self._firsts: dict[tuple[str, str], tuple[Tokens, int] | None] = {}
        for answer in dict.fromkeys(a for facts in self.facts.values() for _, a in facts):
            self._first("", answer)

    def _first(self, phrasing: str, answer: str) -> tuple[Tokens, int] | None:
        """The answer's first token behind a phrasing, and the lone space that comes before it in
        some tokenizers (which then ends the prompts); None: the tokenizer joins prompt and answer.

        Raises:
            TaskError: the tokenizer does not know it.
        """
        between = gap(phrasing, answer)
        before = "" if between else phrasing.rpartition("{s}")[2] or "x"
        if (before, answer) not in self._firsts:
            self._firsts[before, answer] = self._find_first(before, between, answer)
        return self._firsts[before, answer]

    def _find_first(self, before: str, between: str, answer: str) -> tuple[Tokens, int] | None:
        ids, begun = self.model.encode(before + between + answer), self.model.encode(before)
        if between and len(ids) > 1 and self._is_blank(ids[0]):
            # Llama 2 and its like put a space of their own before a text: look behind a letter.
            begun = self.model.encode("x")
            ids = self.model.encode("x" + between + answer)
        if begun and ids[: len(begun)] != begun:
            return None
        ids = ids[len(begun) :]
        blanks = 0
        while blanks + 1 < len(ids) and self._is_blank(ids[blanks]):
            blanks += 1
        if not ids or ids[blanks] == self.model.get_tokenizer().unk_token_id:
            raise TaskError(
                f"The tokenizer of {self.model.name} does not know {answer!r}: this task is made "
                "for another model."
            )
        return tuple(ids[:blanks]), ids[blanks]

    def _is_blank(self, token: int) -> bool:
        return not str(self.model.get_tokenizer().decode([token])).strip()

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _encode(self, phrasing: str, subject: str) -> tuple[int, ...]:
        return tuple(self.model.encode(self.prefix + phrasing.replace("{s}", subject)))

    def pairs(self, relation: str, phrasings: Sequence[str], only: set[str] | None) -> list[Pair]:
        """All pairs of a relation; ``only`` restricts the clean subjects."""
        facts = self.facts[relation]
        wanted = [f for f in facts if only is None or f[0] in only]
        out = []
        for phrasing in phrasings:
            if phrasing.count("{s}") != 1:
                raise TaskError(f"Relation {relation!r}: {phrasing!r} needs {{s}} exactly once.")
            tokens = {s: self._encode(phrasing, s) for s, _ in facts}
            firsts = {a: self._first(phrasing, a) for _, a in facts}
            for subject, answer in wanted:
                if _mentions(phrasing, subject) or _mentions(phrasing, answer):
                    self._drop("the phrasing's own examples give the fact away")
                    continue
                # The draw depends on the fact alone, so that all phrasings share its distractors.
                rng = random.Random(f"{relation}|{subject}")
                own = firsts[answer]
                if own is None:
                    self._drop("the tokenizer joins the prompt's end with the answer")
                    continue
                space, first = own
                other = {a: f[1] for a, f in firsts.items() if f is not None and f[0] == space}
                rivals = [f for f in rng.sample(facts, len(facts)) if f[1] in other]
                # Other facts' answers, so that a common answer is as common among distractors:
                # a model that knows only how common answers are then scores near chance.
                pool = [t for t in dict.fromkeys(other[a] for _, a in rivals) if t != first]
                corrupt = next(
                    (
                        (s, a)
                        for s, a in rivals
                        if len(tokens[s]) == len(tokens[subject])
                        and other[a] != first
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
                        clean=tokens[subject] + space,
                        corrupt=tokens[corrupt[0]] + space,
                        answer=first,
                        counterfactual=other[corrupt[1]],
                        distractors=tuple(pool[: N_CHOICES - 1]),
                        relation=relation,
                        subject=subject,
                        phrasing=phrasing,
                        prompt=self.prefix + phrasing.replace("{s}", subject),
                        answer_text=answer,
                    )
                )
        return out
