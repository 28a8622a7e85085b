"""The report as records: what ``report.json`` holds, and what every rendering is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..audit.cad import CAD
from ..circuits.compare import Divergence
from ..errors import ArtifactError
from ..evaluation.leaks.found import LeakTest
from ..evaluation.properties import Property, Verdict
from ..evaluation.scores import Flips, Perplexity, ScoreRow
from ..evaluation.versions import ModelVersion
from ..quantizers.survival import Survival
from ..utils.files import Json, read_json
from ..utils.records import from_json, to_json
from ..utils.words import Shown
from .values import count, figure

SCHEMA = 2
FULL = "full precision"
MEASURED = "measured"
"""Stands behind a format of which nothing was promised."""


@dataclass(frozen=True)
class ReportModel:
    """The model before the edit."""

    name: str
    sha256: str
    parameters: int
    dtype: str
    """Of the checkpoint, such as bfloat16."""


@dataclass(frozen=True)
class ReportTask:
    """What was to be forgotten."""

    name: str
    title: str
    forget_facts: int
    dropped: dict[str, int]
    """Reason -> prompts or facts that could not be used."""
    read: str = ""
    """How rows were read and split; empty for fact tables, and in reports of older versions."""


@dataclass(frozen=True)
class WeightEdits:
    """Edits in one weight."""

    weight: str
    edited: int
    of: int
    """Parameters of the weight."""


@dataclass(frozen=True)
class FinalMargin:
    """Edits after training, by which the answers were lowered to the final margin."""

    edits: int
    above: float | None
    """Nats by which the answers ended above the target."""
    margin: float
    """Nats below the mean of their relation's answers that were asked for."""

    def __str__(self) -> str:
        above, target = figure(self.above, 2), figure(0.0 - self.margin, 2)
        return f"{count(self.edits)} edits, {above} nats above a target of {target}"


@dataclass(frozen=True)
class QuantizationMargin:
    """Edits after training, by which every quantized model's answers were lowered."""

    edits: int
    reached: float | None
    """Nats of it that every format has."""
    margin: float
    """Nats that were asked for, of the format that scatters answers most."""

    def __str__(self) -> str:
        reached, asked = figure(self.reached, 2), figure(self.margin, 2)
        return f"{count(self.edits)} edits, {reached} of {asked} nats"


@dataclass(frozen=True)
class Edit:
    """What was changed in the weights."""

    edited: int
    """Parameters whose value differs."""
    embedding: int
    """Of these in the embedding, which is not quantized."""
    share: float
    """Edited of all parameters."""
    budget: float | None
    """Share that might be edited; None: a method that trains all weights."""
    candidates: int | None
    """Parameters that the mask was chosen among."""
    refused: int | None
    """Of these that no edit could move across a quantizer's boundary."""
    final_margin: FinalMargin | None
    quantization_margin: QuantizationMargin | None
    by_weight: tuple[WeightEdits, ...]
    """Most edits first."""


@dataclass(frozen=True)
class ForgetScore:
    """Mean forget accuracy, on unseen phrasings after a quantizer."""

    original: float
    unlearned: float
    gap: float
    """The unlearned model's after the quantizer minus the same in full precision."""


@dataclass(frozen=True)
class QuantizerRow:
    """What one quantizer makes of the edit."""

    name: str
    promised: bool
    """Every edit survives it by construction."""
    survival: Survival
    choice: ForgetScore
    top1: ForgetScore
    flips: Flips
    """The prompts behind the gap of choice."""
    last: ForgetScore | None = None
    """How often the answer ranks last of four; None in reports of older versions."""
    trained_through: bool = False
    """Training took turns with it, which promises nothing."""


@dataclass(frozen=True)
class CurvePoint:
    """A circuit that the search tried."""

    edges: int
    faithfulness: float | None


@dataclass(frozen=True)
class CircuitEdge:
    """An edge with its attribution score, in metric units; negative: it opposes the answer."""

    source: str
    target: str
    score: float


@dataclass(frozen=True)
class CircuitSummary:
    """The circuit that was found in the original."""

    edges: int
    of: int
    """Edges of the whole graph."""
    faithfulness: float | None
    """Share of the metric that is left when everything outside the circuit is ablated."""
    curve: tuple[CurvePoint, ...]
    top_edges: tuple[CircuitEdge, ...]
    """The strongest first."""
    caveat: str = ""
    """What else one must know of the scores; empty: nothing."""
    completeness: float | None = None
    """Share of the metric that is left when the circuit alone is ablated."""
    random_completeness: float | None = None
    """The same of as many edges at random."""


@dataclass(frozen=True)
class ComparedGraph:
    """How one model's attribution graph differs from the original's."""

    model: ModelVersion
    divergence: Divergence


@dataclass(frozen=True)
class RelearningPoint:
    """Half B after some steps on half A; the worst of the learning rates."""

    steps: int
    first: float
    """Share of prompts whose answer ranks first of four; chance 0.25."""
    last: float | None
    """Last of four; chance 0.25."""


@dataclass(frozen=True)
class RelearningCurve:
    """What relearning brings back of one model's knowledge."""

    model: ModelVersion
    points: tuple[RelearningPoint, ...]
    """By steps."""


@dataclass(frozen=True)
class Output:
    """What one model writes after a prompt."""

    model: ModelVersion
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt and what the models write after it."""

    prompt: str
    answer: str
    """The right one."""
    outputs: tuple[Output, ...]


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """Everything a run found."""

    schema: int
    versions: dict[str, str]
    """Of the packages that decide what comes out."""
    provenance: dict[str, Json]
    """Hashes of what the run was made from."""
    model: ReportModel
    task: ReportTask
    config: dict[str, Json]
    """All settings, as JSON values."""
    command: str
    """The shortest one that makes this run."""
    verdict: Verdict
    properties: tuple[Property, ...]
    scores: tuple[ScoreRow, ...]
    perplexity: tuple[Perplexity, ...]
    """Empty if the task has no running text."""
    edit: Edit
    quantizers: tuple[QuantizerRow, ...]
    circuit: CircuitSummary | None
    """None: the method needs no circuit."""
    comparison: tuple[ComparedGraph, ...]
    """Attribution graphs; empty without a circuit."""
    cad: CAD | None
    """None: relearning was left out."""
    relearning: tuple[RelearningCurve, ...]
    """Empty if it was left out."""
    graph: dict[str, Json] | None
    """Data of the interactive view (docs/viewing.md); None without a circuit."""
    samples: tuple[Sample, ...]
    leaks: tuple[LeakTest, ...] = ()
    """The leak test of the unlearned model, perhaps also after quantizers; empty: not made."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        return {"model": self.model.name, "task": self.task.name, "verdict": self.verdict.sentence}

    def to_json(self) -> dict[str, Json]:
        """``report.json``."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: object, where: str = "The report") -> Report:
        """What `to_json` wrote.

        Arguments:
            data: JSON values, of anybody's.
            where: what the data are called in the message, such as the file's path.

        Raises:
            ArtifactError: another schema, or a field that is missing or of another type.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int) or abs(schema) > 1000:
            raise ArtifactError(f"{where} names no schema, expected {SCHEMA}: it is no report.")
        if schema != SCHEMA:
            raise ArtifactError(
                f"{where} has schema {schema}, expected {SCHEMA}: another version of this package "
                "wrote it. Read it with that version, or run again."
            )
        return from_json(cls, data, where)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read ``report.json``.

        Raises:
            ArtifactError: it cannot be read, or see `from_json`.
        """
        return cls.from_json(read_json(path), str(path))


def precision_name(report: Report, quantizer: str | None) -> str:
    """A precision in words: of a format whether it was measured without a promise."""
    if quantizer is None:
        return FULL
    alone = any(row.name == quantizer and not row.promised for row in report.quantizers)
    return f"{quantizer}, {MEASURED}" if alone else quantizer


def worst_format(quantizers: Sequence[QuantizerRow]) -> QuantizerRow:
    """Of the formats that were promised the one that leaves the smallest share of the edits, or
    changes the most other codes; of none that was promised, the first."""

    def order(row: QuantizerRow) -> tuple[float, int]:
        found = row.survival
        return (found.survived / found.edited if found.edited else 1.0), -found.collateral

    return min((row for row in quantizers if row.promised), key=order, default=quantizers[0])


def kept_promise(row: QuantizerRow) -> bool:
    """Whether every edit survives a format, and no other code changes."""
    return row.survival.survived == row.survival.edited and not row.survival.collateral
