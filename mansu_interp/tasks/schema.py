"""What a task file may hold: one model over fact tables, one over rows.

`mansu_interp/data/task.schema.json` is made of these models (scripts/make_docs.py), so that an
editor completes and checks task files: name its path or address under ``"$schema"``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import TaskError
from ..utils.files import Json, expect
from ..utils.renamed import TASK_KEYS
from ..utils.words import half_pair, shown
from .data.rows import SPLITS

SCHEMA = 2
Strategy = Literal["swap", "any", "symbol", "rotate"]
Settings = dict[str, object]
"""Settings of a run; `runs.defaults` checks them."""


class _Part(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class Phrasings(_Part):
    """How a relation is asked: texts that hold {s}, the subject, once and end before the answer."""

    train: list[str] = []
    """What discovery and unlearning see."""
    dev: dict[str, list[str]] = {}
    """Label -> texts for choosing settings."""
    unseen: dict[str, list[str]] = {}
    """Label -> texts that every reported score is on."""


class Relation(_Part):
    """A table of facts, and how they are asked."""

    table: str
    """CSV file beside the task file, or a shipped one."""
    subject: str
    """Its column of subjects."""
    answer: str
    """Its column of answers."""
    description: str = ""
    """What an answer is to its subject, for the leak test, such as "capital" or "year of birth";
    default: the name of the answers' column."""
    phrasings: Phrasings
    """How the facts are asked."""


class Forget(_Part):
    """Which facts are forgotten."""

    relations: list[str] = []
    """Names of relations."""
    subjects: list[str] | None = None
    """Their subjects; null: all."""


class _AnyTask(_Part):
    """What both kinds of task file hold."""

    format: str | None = Field(default=None, alias="$schema")
    """Path or address of the JSON schema, for editors."""
    version: Literal[2] = Field(alias="schema")
    """Version of this format."""
    name: str
    """Of the task."""
    title: str = ""
    """What is forgotten, in one sentence; default: the name."""
    prefix: str = ""
    """Put before every prompt exactly as written, such as the model's first token."""
    text: dict[str, str] | None = None
    """Split (train, unseen) -> file of running text."""
    reference_models: list[str] = []
    """Embedded models that were never taught what is forgotten."""
    settings: Settings = {}
    """Settings that a run of this task starts from."""
    robust: Settings | None = None
    """Settings that come on top with --robust: what was found to resist relearning."""


class TableTask(_AnyTask):
    """A task over fact tables."""

    relations: dict[str, Relation]
    """What is asked, by name."""
    forget: Forget
    """What to forget."""
    retain: list[str]
    """Relations to retain; one that is also forgotten stands for all its other subjects."""
    retain_unscored: list[str] = []
    """Relations whose answers are retained but never scored."""
    neighbours: list[str] = []
    """Relations that are scored and never trained on."""


class RowTask(_AnyTask):
    """A task over rows; the fields from ``phrasings`` on are those of `RowOptions`."""

    rows: str
    """The .jsonl or .csv file beside the task file."""
    phrasings: dict[str, list[str]] = {}
    """Split -> texts around {s}, the row's prompt; a row without a split is asked in all."""
    chat: bool = False
    """The prompt is the user's turn in the tokenizer's chat template."""
    letters: bool = False
    """Ask for the letter of the right option."""
    corrupt: Strategy | None = None
    """How corrupt prompts are made; default: rotate with letters, else swap."""
    symbol: str = "_"
    """What stands for the subject (corrupt: symbol)."""
    normalise: bool = False
    """Compare choices by log-probability per token instead of by its sum."""
    seed: int = 0
    """Seed of every draw."""


TaskFile = TableTask | RowTask

OPTIONS = {
    "prefix": str,
    "phrasings": dict,
    "chat": bool,
    "letters": bool,
    "corrupt": (str, None),
    "symbol": str,
    "normalise": bool,
    "seed": int,
}
"""What a task file must hold for each field of `RowOptions`."""


@dataclass(frozen=True)
class RowOptions:
    """How rows are asked; the keys of a task file over rows."""

    prefix: str = ""
    """Put before every prompt exactly as written (not with ``chat``)."""
    phrasings: dict[str, list[str]] = field(default_factory=dict)
    """Split -> texts around ``{s}``, the row's prompt; a row without a split is asked in all."""
    chat: bool = False
    """The prompt is the user's turn in the tokenizer's chat template; the answer begins the
    assistant's."""
    letters: bool = False
    """The prompt lists the answer and its distractors as A to D in an order drawn for each prompt;
    the answer is its letter."""
    corrupt: Strategy | None = None
    """How corrupt prompts are made; default: rotate with letters, else swap."""
    symbol: str = "_"
    """What stands for the subject (``symbol``)."""
    normalise: bool = False
    """Compare choices by log-probability per token instead of by its sum."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        for name, shape in OPTIONS.items():
            value = getattr(self, name)
            try:
                expect(value, shape)
            except ValueError as error:
                wanted = shape[0] if isinstance(shape, tuple) else shape
                raise TaskError(f"{name} must be {wanted.__name__}; got {value!r}.") from error
        if self.corrupt is not None and self.corrupt not in get_args(Strategy):
            raise TaskError(
                f"corrupt is {self.corrupt!r}; expected {', '.join(get_args(Strategy))}."
            )
        if half := half_pair(json.dumps(asdict(self), ensure_ascii=False)):
            raise TaskError(
                f"Options of rows: {half} is half of a surrogate pair, which is no text: remove it."
            )
        if self.corrupt == "rotate" and not self.letters:
            raise TaskError("corrupt: rotate needs letters.")
        for split, texts in self.phrasings.items():
            good = isinstance(texts, list) and all(
                isinstance(t, str) and t.count("{s}") == 1 for t in texts
            )
            if split not in SPLITS or not good:
                raise TaskError(
                    f"phrasings: expected {', '.join(SPLITS)}, each a list of texts with {{s}} "
                    f"exactly once; got {split!r}: {texts!r}."
                )

    @property
    def strategy(self) -> Strategy:
        """``corrupt``, or its default."""
        return self.corrupt or ("rotate" if self.letters else "swap")


def parse_task(value: Json) -> TaskFile:
    """A task file from its JSON value.

    Raises:
        ValueError: it is something else; says where, what was given and what is expected.
    """
    if not isinstance(value, dict):
        raise ValueError(f"the file is {shown(value)}, expected dict")
    renamed = ", ".join(f"{old} is now {new}" for old, new in TASK_KEYS.items() if old in value)
    if renamed:
        raise ValueError(f"it is of an older version: {renamed}, and its schema {SCHEMA}")
    version = value.get("schema")
    if version is not None and version != SCHEMA:
        raise ValueError(f"it has schema {shown(version)}; expected {SCHEMA}")
    kind = RowTask if "rows" in value else TableTask
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(_told(error, kind)) from error


def json_schema() -> dict[str, object]:
    """The JSON schema of task files."""
    schema = TypeAdapter(TaskFile).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Task file of mansu-interp",
        **schema,
    }


def _told(error: ValidationError, kind: type[TaskFile]) -> str:
    """The first problem in the style of this package; of missing and unknown keys, all."""
    found = error.errors(include_url=False)
    first = found[0]
    place = first["loc"][:-1]
    same = [
        str(e["loc"][-1]) for e in found if (e["type"], e["loc"][:-1]) == (first["type"], place)
    ]
    if first["type"] == "missing":
        return f"{_where(place)} lacks {', '.join(sorted(same))}"
    if first["type"] == "extra_forbidden":
        known = "" if place else f"; expected some of {', '.join(_keys(kind))}"
        return f"{_where(place)} has the unknown key {', '.join(sorted(same))}{known}"
    expected = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{_where(first['loc'])} is {shown(first['input'])}, expected {expected}"


def _where(place: tuple[int | str, ...]) -> str:
    parts = [f"[{p}]" if isinstance(p, int) else f".{shown(p)[1:-1]}" for p in place]
    return "the file" + "".join(parts)


def _keys(kind: type[TaskFile]) -> list[str]:
    return sorted(f.alias or name for name, f in kind.model_fields.items())
