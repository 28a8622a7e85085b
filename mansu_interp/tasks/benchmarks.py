"""Rows of published unlearning benchmarks -> a task file over rows.

- TOFU (Maini et al. 2024, arXiv 2401.06121): ``question``, ``answer``; the perturbed sets add
  ``paraphrased_question`` and ``perturbed_answer`` (a list), which become unseen rows and
  distractors.
- MUSE (Shi et al. 2024, arXiv 2407.06460): knowmem ``question``, ``answer``; verbmem ``prompt``,
  ``gt``.
- WMDP (Li et al. 2024, arXiv 2403.03218) and MMLU: ``question``, ``choices`` (four), ``answer``
  (index from 0); asked with letters.
- ``rows``: rows of our own schema.

A question is trained on in one phrasing and scored in another, as everything here is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..errors import TaskError
from ..utils.files import write_json, write_text
from .rows import FIELDS, Row, as_list, parse_rows, records, sift
from .schema import SCHEMA

Record = Mapping[str, object]
PLAIN = {
    "train": ["Question: {s}\nAnswer:"],
    "dev": ["Q: {s}\nA:"],
    "unseen": ["Please answer this: {s}\nThe answer is:"],
}
CHAT = {"train": ["{s}"], "dev": ["Question: {s}"], "unseen": ["Please answer this: {s}"]}


@dataclass(frozen=True)
class TaskConfig:
    """Make a task file from rows: your own, or those of a published benchmark."""

    kind: Positional[Literal["rows", "tofu", "muse", "wmdp"]]
    """rows: our own schema (docs/tasks.md); wmdp reads MMLU, too."""
    forget: str
    """What to forget: .jsonl, .csv, .json or .parquet file, folder that `datasets` reads, or hub
    name (owner/name, owner/name:configuration or owner/name:configuration:split)."""
    retain: str
    """What to retain; likewise."""
    out: Path = Path("task.json")
    """The task file; its rows go beside it, with the ending .jsonl."""
    prefix: str = ""
    """Put before every prompt exactly as written, such as the model's first token."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""
    letters: bool = False
    """Ask for the letter of the right option (wmdp: always)."""
    corrupt: Literal["swap", "any", "symbol", "rotate"] | None = None
    """How corrupt prompts are made; default: rotate with letters, else swap."""
    normalise: bool = False
    """Compare choices by log-probability per token instead of by its sum."""
    seed: int = 0
    """Seed of the task's draws."""


def _listed(value: object) -> list[object]:
    """A list, also from numpy, or from CSV text that holds one as JSON."""
    found = json.loads(value) if isinstance(value, str) else as_list(value)
    if not isinstance(found, Iterable):
        raise TypeError(f"expected a list; got {type(found).__name__}")
    return list(found)


def _text(record: Record, key: str) -> str:
    found = record[key]
    if not isinstance(found, str):
        raise TypeError(f"{key} must be text; got {type(found).__name__}")
    return found


def tofu(record: Record) -> list[dict[str, object]]:
    """A row of TOFU."""
    row: dict[str, object]
    row = {"prompt": record["question"], "answer": record["answer"], "subject": record["question"]}
    if record.get("perturbed_answer") is not None:
        wrong = row["distractors"] = _listed(record["perturbed_answer"])
        # A wrong answer in the same words: the deciding token is then where the facts differ.
        row["counterfactual"] = wrong[0]
    other = record.get("paraphrased_question")
    return [row, {**row, "prompt": other, "split": "unseen"}] if other else [row]


def muse(record: Record) -> list[dict[str, object]]:
    """A row of MUSE, knowledge or verbatim memorisation."""
    if "gt" in record:
        return [
            {"prompt": _text(record, "prompt").rstrip(" "), "answer": _text(record, "gt").strip()}
        ]
    asked = record["question"]
    return [{"prompt": asked, "answer": record["answer"], "subject": asked}]


def wmdp(record: Record) -> list[dict[str, object]]:
    """A row of WMDP or MMLU."""
    choices, at = _listed(record["choices"]), int(float(str(record["answer"])))
    if len(choices) != 4 or not 0 <= at < 4:
        raise ValueError(f"{len(choices)} choices and answer {at}; expected four and 0 to 3")
    wrong = choices[:at] + choices[at + 1 :]
    asked = record["question"]
    return [{"prompt": asked, "answer": choices[at], "distractors": wrong, "subject": asked}]


ADAPTERS: dict[str, Callable[[Record], list[dict[str, object]]]] = {
    "tofu": tofu,
    "muse": muse,
    "wmdp": wmdp,
    "rows": lambda record: [dict(record)],
}


def adapt(kind: str, source: str | Path | Iterable[object], role: str) -> list[Row]:
    """Rows of a benchmark as rows of a role.

    Arguments:
        kind: tofu, muse, wmdp or rows.
        source: see `rows.records`.
        role: forget, retain, retain_unscored or neighbour.

    Raises:
        TaskError: unknown kind, or rows of another shape, listed with line and reason.
    """
    if kind not in ADAPTERS:
        raise TaskError(f"Unknown kind {kind!r}; expected {', '.join(ADAPTERS)}.")
    where = str(source) if isinstance(source, (str, Path)) else type(source).__name__

    def make(line: int, record: Record) -> list[tuple[int, object]]:
        try:
            return [(line, row) for row in ADAPTERS[kind](record)]
        except KeyError as missing:
            raise TaskError(f"{missing.args[0]} is missing; it has {', '.join(record)}") from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise TaskError(str(error)) from error

    good = [row for made in sift(records(source), make, where) for row in made]
    return parse_rows(good, where, role=role)


def make_task(config: TaskConfig) -> int:
    """Write ``config.out`` (a task file) and, beside it, its rows; returns how many.

    Raises:
        TaskError: see `adapt`; or a file of that name is there already.
    """
    out = config.out
    beside = out.with_suffix(".jsonl")
    if out.suffix != ".json":
        raise TaskError(f"--out names the task file, with the ending .json; got {out}.")
    if taken := [p for p in (out, beside) if p.exists()]:
        raise TaskError(f"{taken[0]} is there already. Name another --out.")
    rows = adapt(config.kind, config.forget, "forget") + adapt(config.kind, config.retain, "retain")
    spec: dict[str, object] = {"schema": SCHEMA, "name": out.stem, "rows": beside.name}
    spec |= {"prefix": config.prefix, "chat": config.chat, "seed": config.seed}
    spec |= {"letters": config.letters or config.kind == "wmdp", "normalise": config.normalise}
    if config.corrupt:
        spec["corrupt"] = config.corrupt
    if config.kind != "rows":
        spec["phrasings"] = CHAT if config.chat else PLAIN
    lines = [
        json.dumps({k: getattr(r, k) for k in FIELDS if getattr(r, k)}, ensure_ascii=False)
        for r in rows
    ]
    write_text(beside, "\n".join(lines) + "\n")
    write_json(out, spec)
    return len(rows)
