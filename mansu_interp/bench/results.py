"""What a trial found: one JSON file, written whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..audit.relearning import Relearning
from ..circuits.compare import Divergence
from ..errors import ArtifactError
from ..evaluation.scores import Flips, Metric, Perplexity, ScoreRow, Scores
from ..evaluation.versions import EDITED, ORIGINAL, ModelVersion
from ..quantizers.survival import Survival
from ..utils.files import Json, read_json, write_json
from ..utils.records import from_json, to_json

SCHEMA = 2


@dataclass(frozen=True)
class TrialName:
    """Which try it was."""

    model: str
    task: str
    method: str
    """``original``: nothing was trained."""
    seed: int
    level: float | None
    """None: a disruption budget instead."""
    strength: float
    disruption: float | None = None
    """The budget, in nats a token."""

    @property
    def version(self) -> ModelVersion:
        """Whose scores a trial holds."""
        return ORIGINAL if self.method == ORIGINAL.name else EDITED


@dataclass(frozen=True)
class Training:
    """What training took."""

    steps: int
    """Of the checkpoint; with a disruption budget the run may have gone on."""
    seconds: float
    peak_gb: float


@dataclass(frozen=True)
class DevScores:
    """Of the saved checkpoint on the dev phrasings, which choose the step size."""

    forget: float
    """Four-way."""
    retain: float
    """Top-1."""
    retain_choice: float


@dataclass(frozen=True)
class Look:
    """What a look at a model while it is trained found."""

    steps: int
    kl: float
    """Nats a token (`disruption`)."""


@dataclass(frozen=True)
class Disruption:
    """How far the saved checkpoint is from the original where nothing should change."""

    kl: float | None
    """Nats a token; None: not finite."""
    text: str
    """On what: running text, or retained prompts."""
    looks: tuple[Look, ...] = ()
    """While it was trained, with a disruption budget."""


@dataclass(frozen=True)
class QuantizedEdit:
    """What one quantizer makes of the edit."""

    survival: Survival
    flips: Flips
    """Of four-way choice."""
    flips_top1: Flips | None = None
    """None: not counted (files of older versions)."""


@dataclass(frozen=True)
class Measured:
    """Of the saved checkpoint, on the unseen phrasings."""

    scores: tuple[ScoreRow, ...]
    """Of the trial's model in full precision and after each quantizer."""
    perplexity: tuple[Perplexity, ...]
    quantizers: dict[str, QuantizedEdit]
    edited: int
    """Parameters whose value differs from the original's."""
    parameters: int
    graphs: dict[str, Divergence]
    """How attribution graphs differ from the original's, by model; empty for the original."""

    def as_scores(self) -> Scores:
        """Scores, perplexity and what changed under quantizers."""
        counted: dict[tuple[ModelVersion, Metric], Flips] = {}
        for name, found in self.quantizers.items():
            for version in {v.after(name) for row in self.scores for v in row.models}:
                counted[version, "choice"] = found.flips
                if found.flips_top1:
                    counted[version, "top1"] = found.flips_top1
        return Scores(self.scores, self.perplexity, counted=counted)


@dataclass(frozen=True)
class Judgement:
    """What CAD says of the edit."""

    verdict: str
    cad: float


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial so far."""

    schema: int
    trial: TrialName
    config: dict[str, Json]
    """All settings of the run, as JSON values."""
    sha256: str
    """Of the original's weights."""
    error: str | None = None
    """Why it could not be trained."""
    training: Training | None = None
    dev: DevScores | None = None
    disruption: Disruption | None = None
    """None, too: not measured (files of older versions)."""
    measured: Measured | None = None
    relearning: Relearning | None = None
    judgement: Judgement | None = None

    @property
    def quantizers(self) -> frozenset[str]:
        """Those after which it is measured."""
        return frozenset(self.measured.quantizers if self.measured else ())

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        write_json(file, to_json(self))

    @classmethod
    def load(cls, file: Path) -> TrialResult:
        """Read it.

        Raises:
            ArtifactError: missing, damaged, or something else.
        """
        try:
            found = from_json(cls, read_json(file), str(file))
        except ArtifactError as error:
            raise ArtifactError(f"{error} Delete it to run the trial again.") from error
        if found.schema != SCHEMA:
            raise ArtifactError(
                f"{file} has schema {found.schema:.0f}, expected {SCHEMA}. Delete it to run the "
                "trial again."
            )
        return found
