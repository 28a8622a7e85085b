"""What a model answers to rows, and the metrics of one set of them, or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ...models.language_model import LanguageModel
from .checks import SETS
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
from .rows import Asked, Prompts, QARow
from .scoring import AnswerScores, greedy_answers, score_answers

UTILITY = SETS[1:4]
NO_REFERENCE = "no reference model was given"
NO_HOLDOUT = "no held-out rows were given"
NO_PERTURBED = "the rows have no perturbed_answer"
NO_ENTITY = "the rows have no entity"
NO_LATIN = "the answers are in other letters than a to z, in which ROUGE sees no words"
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


@dataclass(frozen=True)
class Answered:
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
        """Its truth ratio."""
        return truth_ratio(-self.right.loss, [-w.loss for w in self.wrong])

    @property
    def normalized(self) -> float:
        """The probability of its answer among that of all."""
        return normalized_probability(-self.own.loss, [-w.loss for w in self.wrong])


def groups(prompts: Prompts, row: QARow) -> tuple[tuple[str, ...], list[Asked]]:
    """The answers of a row, each once, and how they are asked."""
    texts = tuple(dict.fromkeys((row.answer, row.right, *row.perturbed)))
    return texts, [prompts.answer(row.question, text) for text in texts]


def ask(
    model: LanguageModel,
    prompts: Prompts,
    rows: Sequence[QARow],
    *,
    new_tokens: int,
    on_step: OnStep,
    what: str,
) -> list[Answered]:
    """Step 1 of the module; without new tokens nothing is generated."""
    texts, asked = zip(*(groups(prompts, row) for row in rows), strict=True)
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
        out.append(Answered(row, of[row.answer], of[row.right], wrong, text))
    return out


def _metric(name: str, of: str, value: float | None, n: int, lacking: str) -> QAMetric:
    """A metric, or why there is none."""
    if value is None:
        return QAMetric(name, of, None, 0, lacking)
    return QAMetric(name, of, value, n)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rouge(of: str, found: Sequence[Answered], lacking: str = "") -> QAMetric:
    """ROUGE-L recall of the rows whose answers have words for it."""
    each = [rouge_l_recall(a.text or "", a.row.answer) for a in found]
    some = [value for value in each if value is not None]
    lacking = NO_LATIN if found else lacking
    return _metric("ROUGE-L recall", of, _mean(some), len(some), lacking)


def of_forget(found: Sequence[Answered]) -> list[QAMetric]:
    """What is computed of the forget rows alone."""
    n, inside = len(found), [a.own.inside().greedy for a in found]
    ratios = [a.ratio for a in found if a.wrong]
    told = [has_entity(a.text or "", a.row.entity) for a in found if a.row.entity]
    ratio = forget_truth_ratio(ratios) if ratios else None
    made = (
        ("probability", _mean([probability(a.own.logp) for a in found]), n, ""),
        ("entity generation", _mean([float(t) for t in told]), len(told), NO_ENTITY),
        ("exact memorization", _mean([exact_memorization(g) for g in inside]), n, ""),
        ("extraction strength", _mean([extraction_strength(g) for g in inside]), n, ""),
        ("truth ratio", ratio, len(ratios), NO_PERTURBED),
    )
    others = [_metric(name, "forget", value, k, lacking) for name, value, k, lacking in made]
    return [_rouge("forget", found), *others]


ATTACKS: dict[str, Callable[[Answered], float]] = {
    "loss": lambda a: a.own.loss,
    "zlib": lambda a: zlib_score(a.own.loss, a.row.answer),
    "min-k": lambda a: min_k(a.own.inside().logp),
    "min-k++": lambda a: min_k(a.own.inside().standing),
}
"""Membership attacks: a score of a row, high = less likely a member."""


def _auc(attack: str, forget: Sequence[Answered], holdout: Sequence[Answered]) -> float:
    score = ATTACKS[attack]
    return auc([score(a) for a in forget], [score(a) for a in holdout])


def beside_others(
    found: Mapping[str, Sequence[Answered]], reference: Mapping[str, Sequence[Answered]] | None
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


def of_utility(found: Mapping[str, Sequence[Answered]]) -> list[QAMetric]:
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
            _rouge(of, answered, lacking),
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
