"""All metrics of a model on questions and answers, in full precision and after quantizers.

1. Ask each row: score its answer, the paraphrased and the perturbed ones in one pass, and let the
   model answer greedily.
2. Ask a reference model that was never taught the forget rows for the forget and held-out rows,
   after the same quantizer.
3. Compute every metric whose rows are there; of the others say what they lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from ...errors import ConfigError, ModelError, TaskError
from ...models.language_model import LanguageModel
from ...quantizers.registry import get_quantizer
from ...quantizers.survival import quantize
from ...utils.files import Json, finite
from ...utils.ranges import entrance, expect_kind
from ...utils.words import Shown, shown
from .metrics import (
    auc,
    exact_memorization,
    extraction_strength,
    forget_quality,
    forget_truth_ratio,
    has_entity,
    min_k,
    model_utility,
    normalized_probability,
    privleak,
    probability,
    retain_truth_ratio,
    truth_ratio,
    zlib_score,
)
from .rouge import rouge_l_recall
from .rows import Prompts, QARow
from .scoring import AnswerScores, greedy_answers, score_answers

SETS = ("forget", "retain", "real_authors", "world_facts", "holdout")
"""Sets of rows; those of model utility are the three in the middle."""
UTILITY = SETS[1:4]
FULL = "full precision"
CALIBRATION_ROWS = 64
"""Rows whose questions calibrated quantizers see: retained ones where there are any."""
NO_REFERENCE = "no reference model was given"
NO_HOLDOUT = "no held-out rows were given"
NO_PERTURBED = "the rows have no perturbed_answer"
NO_ENTITY = "the rows have no entity"
PERFECT = "the reference's min-k AUC is 1, which leaves nothing to divide by"

OnStep = Callable[[str, int, int], object]
"""on_step(stage, done, in all)."""


@dataclass(frozen=True)
class QAMetric:
    """One metric of one model."""

    name: str
    """Such as ``forget quality``."""
    rows: str
    """The set that it is of; ``utility``: the three sets of model utility together."""
    value: float | None
    """None: it could not be computed."""
    n: int = 0
    """Rows that it is of."""
    reason: str = ""
    """Why it could not be computed."""


@dataclass(frozen=True, repr=False)
class QAMetrics(Shown):
    """All metrics of a model."""

    model: str
    """Its name."""
    asked: str
    """How it was asked: by its ``chat template``, or the words around a question."""
    reference: str
    """Name of the reference model; empty without one."""
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
        return finite({**{k: getattr(self, k) for k in ("model", "asked", "reference")},
                       "versions": rows})  # fmt: skip


@dataclass(frozen=True)
class _Answered:
    """What a model predicts of one row."""

    row: QARow
    own: AnswerScores
    right: AnswerScores
    """Of the answer that the perturbed ones are compared with."""
    wrong: tuple[AnswerScores, ...]
    text: str | None = None
    """Its own answer, where it was asked for one."""

    @property
    def ratio(self) -> float:
        return truth_ratio(-self.right.loss, [-w.loss for w in self.wrong])

    @property
    def normalized(self) -> float:
        return normalized_probability(-self.own.loss, [-w.loss for w in self.wrong])


def _ask(
    model: LanguageModel,
    prompts: Prompts,
    rows: Sequence[QARow],
    *,
    new_tokens: int,
    on_step: OnStep,
    what: str,
) -> list[_Answered]:
    """Step 1 of the module; without new tokens nothing is generated."""
    texts = [tuple(dict.fromkeys((r.answer, r.right, *r.perturbed))) for r in rows]
    asked = [
        [prompts.answer(row.question, text) for text in some]
        for row, some in zip(rows, texts, strict=True)
    ]
    scores = score_answers(model, asked, partial(on_step, f"probabilities of {what}"))
    said: Sequence[str | None] = [None] * len(rows)
    if new_tokens:
        questions = [row.question for row in rows]
        note = partial(on_step, f"answers to {what}")
        said = greedy_answers(model, prompts, questions, new_tokens=new_tokens, on_step=note)
    out = []
    for row, some, found, text in zip(rows, texts, scores, said, strict=True):
        of = dict(zip(some, found, strict=True))
        wrong = tuple(of[t] for t in row.perturbed)
        out.append(_Answered(row, of[row.answer], of[row.right], wrong, text))
    return out


def _metric(name: str, of: str, value: float | None, n: int, lacking: str) -> QAMetric:
    """A metric, or why there is none."""
    if value is None:
        return QAMetric(name, of, None, 0, lacking)
    return QAMetric(name, of, value, n)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rouge(found: Sequence[_Answered]) -> float | None:
    return _mean([rouge_l_recall(a.text or "", a.row.answer) for a in found])


def _of_forget(found: Sequence[_Answered]) -> list[QAMetric]:
    """What is computed of the forget rows alone."""
    n, inside = len(found), [a.own.inside().greedy for a in found]
    ratios = [a.ratio for a in found if a.wrong]
    told = [has_entity(a.text or "", a.row.entity) for a in found if a.row.entity]
    ratio = forget_truth_ratio(ratios) if ratios else None
    made = (
        ("ROUGE-L recall", _rouge(found), n, ""),
        ("probability", _mean([probability(a.own.logp) for a in found]), n, ""),
        ("entity generation", _mean([float(t) for t in told]), len(told), NO_ENTITY),
        ("exact memorization", _mean([exact_memorization(g) for g in inside]), n, ""),
        ("extraction strength", _mean([extraction_strength(g) for g in inside]), n, ""),
        ("truth ratio", ratio, len(ratios), NO_PERTURBED),
    )
    return [_metric(name, "forget", value, k, lacking) for name, value, k, lacking in made]


ATTACKS: dict[str, Callable[[_Answered], float]] = {
    "loss": lambda a: a.own.loss,
    "zlib": lambda a: zlib_score(a.own.loss, a.row.answer),
    "min-k": lambda a: min_k(a.own.inside().logp),
    "min-k++": lambda a: min_k(a.own.inside().standing),
}
"""Membership attacks: a score of a row, high = less likely a member."""


def _auc(attack: str, forget: Sequence[_Answered], holdout: Sequence[_Answered]) -> float:
    score = ATTACKS[attack]
    return auc([score(a) for a in forget], [score(a) for a in holdout])


def _beside_others(
    found: Mapping[str, Sequence[_Answered]], reference: Mapping[str, Sequence[_Answered]] | None
) -> list[QAMetric]:
    """What compares the forget rows with held-out rows, or with a reference model."""
    forget, holdout = found["forget"], found.get("holdout")
    ratios = [a.ratio for a in forget if a.wrong]
    p, log_p = None, None
    if ratios and reference:
        p, log_p = forget_quality(ratios, [a.ratio for a in reference["forget"] if a.wrong])
    lacking = NO_REFERENCE if ratios else NO_PERTURBED
    out = [
        _metric("forget quality", "forget", p, len(ratios), lacking),
        _metric("log10 forget quality", "forget", log_p, len(ratios), lacking),
    ]
    n = len(forget) + len(holdout or ())
    for attack in ATTACKS:
        value = _auc(attack, forget, holdout) if holdout else None
        out.append(_metric(f"{attack} AUC", "forget", value, n, NO_HOLDOUT))
    leak, lacking = None, NO_REFERENCE if holdout else NO_HOLDOUT
    if holdout and reference:
        beside = _auc("min-k", reference["forget"], reference["holdout"])
        leak, lacking = privleak(_auc("min-k", forget, holdout), beside), PERFECT
    return [*out, _metric("PrivLeak", "forget", leak, n, lacking)]


def _of_utility(found: Mapping[str, Sequence[_Answered]]) -> list[QAMetric]:
    """The nine numbers of model utility, as far as they are there, and their harmonic mean."""
    out: list[QAMetric] = []
    for of in UTILITY:
        answered = found.get(of, ())
        lacking = NO_PERTURBED if answered else f"no {of.replace('_', ' ')} rows were given"
        perturbed = [a for a in answered if a.wrong]
        name, known, some = "normalized probability", [a.normalized for a in perturbed], perturbed
        if of == "retain":
            name, known, some = "probability", [probability(a.own.logp) for a in answered], answered
        ratios = [a.ratio for a in perturbed]
        ratio = retain_truth_ratio(ratios) if ratios else None
        out += [
            _metric("ROUGE-L recall", of, _rouge(answered), len(answered), lacking),
            _metric(name, of, _mean(known), len(some), lacking),
            _metric("truth ratio", of, ratio, len(ratios), lacking),
        ]
    without = next((m for m in out if m.value is None), None)
    utility, lacking = None, ""
    if without is None:
        utility = model_utility([m.value for m in out if m.value is not None])
    else:
        which = f"{without.name} of {without.rows.replace('_', ' ')}"
        lacking = f"it needs {which}: {without.reason}"
    total = sum(len(found.get(of, ())) for of in UTILITY)
    return [_metric("model utility", "utility", utility, total, lacking), *out]


def _check_sets(sets: Mapping[str, Sequence[QARow]]) -> None:
    expect_kind(TaskError, "sets", sets, Mapping)
    if unknown := [name for name in sets if name not in SETS]:
        raise TaskError(f"sets: got {shown(unknown[0])}, expected some of {', '.join(SETS)}.")
    if not sets.get("forget"):
        raise TaskError("sets: there are no forget rows, of which most metrics are. Give some.")
    for name, rows in sets.items():
        for row in rows:
            expect_kind(TaskError, f"a row of {name}", row, QARow)
    taught = {(row.question, row.answer) for row in sets["forget"]}
    if both := [r for r in sets.get("holdout", ()) if (r.question, r.answer) in taught]:
        raise TaskError(
            f"holdout, line {both[0].line}: this row is among the forget rows as well, and attacks "
            "would be asked to tell a row from itself. Give rows that were never taught."
        )


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
        TaskError: no forget rows, an unknown set, a held-out row that is to be forgotten, or a row
            that exceeds the context.
        ConfigError: an unknown quantizer, or new_tokens below 1.
        ModelError: a model has no tokenizer, or weights or logits that are not finite.
    """
    _check_sets(sets)
    if new_tokens < 1:
        raise ConfigError(f"new_tokens must be at least 1; got {new_tokens}.")
    for name in quantizers:
        get_quantizer(name)
    sets = {name: sets[name] for name in SETS if sets.get(name)}
    models = [model] if reference is None else [model, reference]
    prompts = [Prompts(one) for one in models]
    for one, how in zip(models, prompts, strict=True):
        one.check_finite()
        for name, rows in sets.items():
            how.check_fit(rows, name.replace("_", " "))
    say = on_step or (lambda *_: None)
    versions: dict[str, tuple[QAMetric, ...]] = {}
    for version in (FULL, *dict.fromkeys(quantizers)):
        found: list[dict[str, list[_Answered]]] = []
        for k, (one, how) in enumerate(zip(models, prompts, strict=True)):
            seen = sets.get("retain", sets["forget"])[:CALIBRATION_ROWS]
            calibration = [how.question(row.question) for row in seen]
            made = one if version == FULL else quantize(one, version, calibration, sharing=True)
            end = f"{', reference' if k else ''}{'' if version == FULL else f', {version}'}"
            asked = {n: r for n, r in sets.items() if not k or n in ("forget", "holdout")}
            found.append({
                name: _ask(made, how, rows, on_step=say, what=name.replace("_", " ") + end,
                           new_tokens=0 if k or name == "holdout" else new_tokens)
                for name, rows in asked.items()
            })  # fmt: skip
        ours, theirs = found[0], found[1] if reference is not None else None
        versions[version] = (
            *_of_forget(ours["forget"]),
            *_beside_others(ours, theirs),
            *_of_utility(ours),
        )
    return QAMetrics(
        model.name, prompts[0].how, reference.name if reference is not None else "", versions
    )
