"""Rows of published unlearning benchmarks, or your own, -> a task file over rows.

`shapes` says what is known of TOFU, MUSE, WMDP and MMLU. A question is trained on in one phrasing
and scored in another, as everything here is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ...errors import TaskError
from ...utils.files import write_json, write_text
from ..schema import SCHEMA
from .rows import FIELDS, Reading, read
from .shapes import KINDS

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
    """rows: any known shape (docs/tasks.md); wmdp reads MMLU and ARC, too."""
    forget: str
    """What to forget: .jsonl, .json, .csv, .tsv or .parquet file, folder that `datasets` reads, or
    hub name (owner/name, owner/name:configuration or owner/name:configuration:split)."""
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


def adapt(kind: str, source: str | Path | Iterable[object], role: str) -> Reading:
    """Rows of a benchmark as rows of a role, and how they were read.

    Arguments:
        kind: tofu, muse, wmdp or rows.
        source: see `sources.records`.
        role: forget, retain, retain_unscored or neighbour.

    Raises:
        TaskError: unknown kind, rows of another shape, listed with line and reason, or one that
            has another role of its own.
    """
    if kind not in KINDS:
        raise TaskError(f"Unknown kind {kind!r}; expected {', '.join(KINDS)}.")
    return read(source, kind, role=role)


def make_task(config: TaskConfig) -> list[str]:
    """Write ``config.out`` (a task file) and, beside it, its rows.

    Returns:
        How the rows were read, and how many there are, as lines.

    Raises:
        TaskError: see `adapt`; or a file of that name is there already.
    """
    out = config.out
    beside = out.with_suffix(".jsonl")
    if out.suffix != ".json":
        raise TaskError(f"--out names the task file, with the ending .json; got {out}.")
    if taken := [p for p in (out, beside) if os.path.lexists(p)]:
        raise TaskError(f"{taken[0]} is there already. Name another --out.")
    forget = adapt(config.kind, config.forget, "forget")
    retain = adapt(config.kind, config.retain, "retain")
    rows = forget.rows + retain.rows
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
    return [forget.told, retain.told, f"{len(rows)} rows. Use it: mansu run --task {out}"]
