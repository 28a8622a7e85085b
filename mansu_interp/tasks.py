"""Tasks: what to forget, what to keep, and how each is asked.

A task is a small JSON file over CSV fact tables. Each relation has phrasings in three groups:
``train`` (discovery and unlearning see these), ``dev`` (for choosing settings) and ``unseen``
(every reported score). Each fact and phrasing becomes a `Pair`: a clean prompt, a corrupt prompt of
equal token length about another subject, the answer, the counterfactual answer, and three
distractors of the same type for four-way choice. Rows of the user (`rows`, `pairing`) are the
other kind of task; both are loaded by `load_task`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .defaults import HARDENED, is_embedded
from .errors import TaskError
from .models import LanguageModel, load_model
from .pairing import RowOptions, task_from_rows
from .pairs import N_CHOICES, Pair, PairSet, Task
from .rows import SUFFIXES, read_rows
from .taskfiles import data_file, read_facts, read_task_file, read_text

MAX_PAIRS = 1_000_000
"""Rows x phrasings of all relations together."""
ROW_KEYS = {"schema", "name", "title", "rows", "text", "twins", "settings", HARDENED}
"""Keys of a task file over rows, beside those of `RowOptions`."""


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


def _running_text(
    spec: dict[str, Any], folder: Path, model: LanguageModel
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Split -> the paragraphs of its text file as tokens."""
    begin = prefix(model, spec)
    return {
        split: tuple(
            tuple(model.encode(begin + line))
            for line in read_text(data_file(folder, "text", file)).splitlines()
            if line.strip()
        )
        for split, file in (spec.get("text") or {}).items()
    }


def _load_rows(spec: dict[str, Any], folder: Path, model: LanguageModel, score_pairs: int) -> Task:
    """`load_task` of a task file over rows."""
    keys = {f.name for f in fields(RowOptions)}
    if unknown := sorted(spec.keys() - keys - ROW_KEYS):
        raise TaskError(
            f"Task {spec['name']!r}: unknown key {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(keys | ROW_KEYS))}."
        )
    file = str(spec["rows"])
    if Path(file).suffix not in SUFFIXES:
        raise TaskError(f"rows must name a .jsonl or .csv file beside the task file; got {file!r}.")
    options = RowOptions(**{k: v for k, v in spec.items() if k in keys})
    rows = read_rows(data_file(folder, "rows", file))
    task = task_from_rows(
        rows, model, options, score_pairs, spec["name"], spec.get("title"), spec.get("twins", ())
    )
    return replace(task, text=_running_text(spec, folder, model))


def load_task(name: str | Path, model: LanguageModel, score_pairs: int = 200) -> Task:
    """Build a task for a model's tokenizer.

    Arguments:
        name: shipped task (`mansu list` names them), or the path of a task file or of rows.
        model: the model whose tokenizer is used.
        score_pairs: at most so many prompts per scored set, drawn evenly over its phrasings, the
            same ones for every model and seed.

    Raises:
        TaskError: unknown task, malformed file, an empty forget set, a table that the tokenizer
            does not know, or a relation with too few answers.
    """
    spec, folder = read_task_file(name)
    if "rows" in spec:
        return _load_rows(spec, folder, model, score_pairs)
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
    return Task(
        name=spec["name"],
        title=spec.get("title", spec["name"]),
        forget=PairSet("forget", tuple(collect("forget", roles["forget"], "train"))),
        retain=PairSet("retain", tuple(collect("retain", roles["retain"], "train"))),
        guard=PairSet("guard", tuple(guard)) if guard else None,
        scored=scored,
        text=_running_text(spec, folder, model),
        twins=tuple(spec.get("twins", ())),
        dropped=build.dropped,
    )


def first_twin(task: Task, model: LanguageModel) -> LanguageModel | None:
    """The first model that was never taught what a task forgets; None where none ships that fits
    ``model``, on its device."""
    fits = task.twins and is_embedded(model.name)
    return load_model(task.twins[0], model.device) if fits else None
