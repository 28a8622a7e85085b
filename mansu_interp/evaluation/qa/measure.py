"""All metrics of a model on questions and answers, in full precision and after quantizers.

1. Leave out what cannot be asked (`checks`).
2. Ask each row: score its answer, the paraphrased and the perturbed ones in one pass, and let the
   model answer greedily.
3. Ask a reference model that was never taught the forget rows for the forget and held-out rows,
   after the same quantizer.
4. Compute every metric whose rows are there; of the others say what they lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ...errors import ConfigError, ModelError
from ...models.language_model import LanguageModel
from ...quantizers.registry import get_quantizer
from ...quantizers.survival import quantize
from ...utils.files import Json, finite
from ...utils.ranges import entrance
from ...utils.words import Shown, shown
from .answered import (
    Answered,
    OnStep,
    QAMetric,
    ask,
    beside_others,
    groups,
    of_forget,
    of_utility,
)
from .checks import SETS, check_models, check_sets, kept_rows
from .rows import Prompts, QARow
from .scoring import answer_seconds, score_seconds

BOTH = ("forget", "holdout")
"""Sets that the reference is asked as well."""
FULL = "full precision"
CALIBRATION_ROWS = 64
"""Rows whose questions calibrated quantizers see: retained ones where there are any."""


@dataclass(frozen=True, repr=False)
class QAMetrics(Shown):
    """All metrics of a model."""

    model: str
    """Its name."""
    asked: str
    """How it was asked: by its ``chat template``, or the words around a question."""
    reference: str
    """Name of the reference model; empty without one."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was done to rows that are not measured as given: left out, or counted once -> rows."""
    versions: Mapping[str, tuple[QAMetric, ...]] = field(default_factory=dict)
    """By quantizer, ``full precision`` first; the same metrics in each, in the same order."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        found = {m.name: m.value for m in self.versions[FULL] if m.rows in ("forget", "utility")}
        kept = {name: value for name, value in found.items() if value is not None}
        return {"": repr(self.model), "asked by": self.asked, **kept}

    def value(self, name: str, rows: str = "forget", version: str = FULL) -> float | None:
        """One number; None if it could not be computed.

        Raises:
            ConfigError: there is no such metric.
        """
        found = {(m.name, m.rows): m.value for m in self.versions.get(version, ())}
        if (name, rows) not in found:
            raise ConfigError(
                f"There is no {shown(name)} of {shown(rows)}, {shown(version)}; expected one of "
                f"{', '.join(f'{m} of {of}' for m, of in found) or ', '.join(self.versions)}."
            )
        return found[name, rows]

    def to_json(self) -> dict[str, Json]:
        """For files and tables."""
        rows = {version: [asdict(m) for m in found] for version, found in self.versions.items()}
        told = {k: getattr(self, k) for k in ("model", "asked", "reference")}
        return finite({**told, "notes": dict(self.notes), "versions": rows})


@dataclass(frozen=True)
class QACost:
    """What measuring takes."""

    scored: int
    """Answers whose probabilities are computed."""
    written: int
    """Answers that are generated."""
    seconds: float
    """Of both, at most: answers that end early take less. Quantizing comes on top."""


class Measuring:
    """A model that is to be measured, and how; the arguments are those of `qa_metrics`."""

    def __init__(
        self,
        model: LanguageModel,
        sets: Mapping[str, Sequence[QARow]],
        *,
        reference: LanguageModel | None = None,
        quantizers: Sequence[str] = (),
        new_tokens: int = 200,
    ) -> None:
        check_sets(sets)
        if new_tokens < 1:
            raise ConfigError(f"new_tokens must be at least 1; got {new_tokens}.")
        names = [get_quantizer(name).name for name in quantizers]
        self.versions, self.new_tokens = (FULL, *dict.fromkeys(names)), new_tokens
        self.models = [model] if reference is None else [model, reference]
        self.prompts = [Prompts(one) for one in self.models]
        for one in self.models:
            one.check_finite()
        self.sets: dict[str, tuple[QARow, ...]] = {}
        self.notes: dict[str, int] = {}
        for name in (name for name in SETS if sets.get(name)):
            what = name.replace("_", " ")
            asking = self.prompts if name in BOTH else self.prompts[:1]
            self.sets[name], notes = kept_rows(sets[name], asking, what)
            self.notes |= notes
            for how in asking:
                how.check_fit(self.sets[name], what)
        check_models(model, reference, self.sets)

    def _asked(self, k: int) -> dict[str, tuple[tuple[QARow, ...], int]]:
        """The sets that a model is asked, by its number, and tokens that it generates for each."""
        return {
            name: (rows, 0 if k or name == "holdout" else self.new_tokens)
            for name, rows in self.sets.items()
            if not k or name in BOTH
        }

    def cost(self) -> QACost:
        """Estimate what it takes, by timing one batch of each kind on the model."""
        scored, written, seconds = 0, 0, 0.0
        for k in range(len(self.models)):
            for rows, new_tokens in self._asked(k).values():
                answers = [groups(self.prompts[k], row)[1] for row in rows]
                scored += sum(map(len, answers))
                seconds += score_seconds(self.models[k], answers)
                if new_tokens:
                    written += len(rows)
                    asked = [self.prompts[k].question(row.question) for row in rows]
                    seconds += answer_seconds(self.models[k], asked, new_tokens)
        n = len(self.versions)
        return QACost(scored * n, written * n, seconds * n)

    def run(self, on_step: OnStep | None = None) -> QAMetrics:
        """Measure.

        Raises:
            ModelError: logits that are not finite.
        """
        say = on_step or (lambda *_: None)
        versions: dict[str, tuple[QAMetric, ...]] = {}
        for version in self.versions:
            ours, *theirs = (self._answers(k, version, say) for k in range(len(self.models)))
            versions[version] = (
                *of_forget(ours["forget"]),
                *beside_others(ours, theirs[0] if theirs else None),
                *of_utility(ours),
            )
        beside = self.models[1].name if len(self.models) > 1 else ""
        how = self.prompts[0].how
        return QAMetrics(self.models[0].name, how, beside, self.notes, versions)

    def _answers(self, k: int, version: str, say: OnStep) -> dict[str, list[Answered]]:
        """What a model, by its number, predicts after a quantizer."""
        one, how = self.models[k], self.prompts[k]
        seen = self.sets.get("retain", self.sets["forget"])[:CALIBRATION_ROWS]
        calibration = [how.question(row.question) for row in seen]
        made = one if version == FULL else quantize(one, version, calibration, sharing=True)
        end = ", reference" if k else ""
        if len(self.versions) > 1:
            at = self.versions.index(version) + 1
            end += f", {version} ({at} of {len(self.versions)})"
        return {
            name: ask(
                made, how, rows, new_tokens=new, on_step=say, what=name.replace("_", " ") + end
            )
            for name, (rows, new) in self._asked(k).items()
        }


@entrance(ModelError)
def qa_metrics(
    model: LanguageModel,
    sets: Mapping[str, Sequence[QARow]],
    *,
    reference: LanguageModel | None = None,
    quantizers: Sequence[str] = (),
    new_tokens: int = 200,
    on_step: OnStep | None = None,
) -> QAMetrics:
    """All metrics of a model (see the module for the steps, and docs/questions.md for each).

    Arguments:
        model: not changed.
        sets: rows by ``forget`` (needed), ``retain``, ``real_authors``, ``world_facts``, of which
            model utility is, and ``holdout``, which neither model was taught.
        reference: a model that was taught everything but the forget rows.
        quantizers: names, after which all is measured again; the reference goes through the same.
        new_tokens: tokens of the longest answer that is generated.
        on_step: called with (stage, done, in all).

    Returns:
        Each metric with the rows that it is of, or the reason why it could not be computed.

    Raises:
        TaskError: no forget rows, an unknown set, a held-out row that is in another set or that a
            model was taught, a forget row that the reference was taught, a row that exceeds the
            context, or a set of which the tokenizer can read no row.
        ConfigError: an unknown quantizer, new_tokens below 1, or a reference that is the model.
        ModelError: a model has no tokenizer, or weights or logits that are not finite.
    """
    return Measuring(
        model, sets, reference=reference, quantizers=quantizers, new_tokens=new_tokens
    ).run(on_step)
