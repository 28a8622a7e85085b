"""Settings of ``mansu task``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class TaskConfig:
    """Make a task file from rows: your own, or those of a published benchmark."""

    kind: Positional[Literal["rows", "tofu", "muse", "wmdp"]]
    """rows: our own schema (docs/tasks.md); wmdp reads MMLU, too."""
    forget: str
    """What to forget: .jsonl, .csv, .json or .parquet file, folder that `datasets` reads, or hub
    name (owner/name, owner/name:configuration or owner/name:configuration:split)."""
    retain: str
    """What to keep; likewise."""
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
