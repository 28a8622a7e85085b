"""What a report says, as sections, from which every rendering is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..audit.cad import CAD
from ..evaluation.leaks.found import LeakRow, LeakShare, LeakTest
from ..evaluation.leaks.templates import SCOPES
from ..evaluation.properties import Property
from ..evaluation.scores import METRICS, Metric, Score, ScoreRow
from ..evaluation.versions import ModelVersion
from ..utils.words import number_of
from ..viz.plots import lines_svg
from .blocks import Block, Cards, Code, Picture, Section, Table
from .graphs import circuit_blocks, graph_blocks
from .records import (
    MEASURED,
    Edit,
    QuantizerRow,
    Report,
    Sample,
    precision_name,
    worst_format,
)
from .values import count, figure, measured, percent, status_of

ROLES = ("forget", "neighbour", "retain")
LABELS: dict[Metric, str] = {"top1": "top-1", "choice": "choice"}
ACROSS = 5
"""Precisions side by side: with long names, as many as 1,200 pixels take."""
WEIGHTS = 10
"""Weights with the most edits that are shown; the others are folded away."""


@dataclass(frozen=True)
class Heading:
    """What stands on top."""

    title: str
    subtitle: str
    status: str
    """pass, fail or undecided."""
    passed: bool | None
    sentence: str
    summary: str
    """How many properties hold, and whether it is gone."""
    missed: tuple[Property, ...]
    """Those that do not, each with its reason."""


def heading(report: Report) -> Heading:
    """Title, model and verdict."""
    subtitle = f"{report.model.name}, {number_of(report.model.parameters, 'parameter')}"
    word, _ = status_of(report.verdict.passed)
    return Heading(
        report.task.title or report.task.name,
        subtitle,
        status=word,
        passed=report.verdict.passed,
        sentence=report.verdict.sentence,
        summary=f"{sum(p.passed is True for p in report.properties)} of {len(report.properties)} "
        "properties hold." + (f" {report.cad.verdict.capitalize()}." if report.cad else ""),
        missed=tuple(p for p in report.properties if not p.passed),
    )


def against(item: Property) -> str:
    """What a property is measured against."""
    headroom = measured(item.headroom, signed=True)
    return f"target {measured(item.target)}, headroom {headroom}"


def gone(cad: CAD) -> str:
    """Whether it is gone or only hidden, in words."""
    found = f"{cad.verdict.capitalize()}, CAD {cad.range} of 1"
    return f"{found}, confidence {percent(cad.confidence, 0)}: {cad.sentence}"


def sections(report: Report, svg: str = "") -> list[Section]:
    """The report as sections: what was measured, why, and how to make it again.

    Arguments:
        report: what a run found.
        svg: the circuit's picture, as it is; empty for none.
    """
    found = [
        Section(
            "Four properties",
            [Cards(report.properties), *([gone(report.cad)] if report.cad else [])],
        ),
        Section("Scores", scores_blocks(report)),
        Section("Is it erased?", _erasure(report)),
        Section("Leaks", leak_blocks(report.leaks)),
        Section("The edit and its survival", _edit(report.edit, report.quantizers)),
        Section("Attribution graphs", graph_blocks(report)),
        Section("The circuit", circuit_blocks(report.circuit, svg) if report.circuit else []),
        Section("Samples", _samples(report.samples)),
        Section("How to reproduce", _reproduce(report)),
    ]
    return [section for section in found if section.blocks]


def scores_blocks(report: Report) -> list[Block]:
    """Accuracies on every set, and perplexity."""
    groups = _by_precision(report)
    about = (
        "Share of answers that are right, on phrasings that unlearning did not see. “Choice” is "
        "picking the answer among four candidates; forgotten means down to its chance, not to zero."
    )
    if any(name.endswith(f", {MEASURED}") for name in groups):
        about += f" Of a format that is marked as {MEASURED} nothing was promised."
    blocks: list[Block] = [about]
    if groups:
        blocks += (_wide if len(groups) <= 2 else _by_metric)(report.scores, groups)
    if any(s.last is not None for row in report.scores for s in row.scores):
        blocks.append(
            "Answer ranked last of the four, original → unlearned; an answer that is avoided is "
            "given away as well:"
        )
        blocks += _across(report.scores, groups, lambda s: s.last)
    if report.perplexity:
        blocks.append("Perplexity of running text (lower is better):")
        rows = [[str(p.model), figure(p.value)] for p in report.perplexity]
        blocks.append(Table(["model", "perplexity"], rows))
    return blocks


Groups = dict[str, list[ModelVersion]]
"""Precision, in words -> the models in it, the original first."""


def _by_precision(report: Report) -> Groups:
    groups: Groups = {}
    for version in dict.fromkeys(v for r in report.scores for v in r.models):
        groups.setdefault(precision_name(report, version.quantizer), []).append(version)
    return groups


def _accuracy(row: ScoreRow, version: ModelVersion, metric: Metric) -> str:
    return percent(row[version].value(metric)) if version in row.models else percent(None)


def _by_role(
    entries: Sequence[ScoreRow], cells: Callable[[ScoreRow], list[str]]
) -> list[Sequence[str] | str]:
    """A row a set, with these cells after its name and size, under the name of its role; the usual
    roles first."""
    rows: list[Sequence[str] | str] = []
    for role in dict.fromkeys([*ROLES, *(e.role for e in entries)]):
        members = [e for e in entries if e.role == role]
        rows += [role] if members else []
        rows += [[e.label, count(e.n), *cells(e)] for e in members]
    return rows


def _wide(entries: Sequence[ScoreRow], groups: Groups) -> list[Block]:
    """One table, a column a model and metric."""
    head, spans = ["set", "n"], [("", 2)]
    for metric in METRICS:
        if metric == "choice":
            head.append("chance")
        for i, (precision, versions) in enumerate(groups.items()):
            head += [v.name for v in versions]
            chance = int(metric == "choice" and i == 0)
            spans.append((f"{LABELS[metric]}, {precision}", len(versions) + chance))

    def cells(e: ScoreRow) -> list[str]:
        row: list[str] = []
        for metric in METRICS:
            row += [percent(e.chance)] if metric == "choice" else []
            row += [_accuracy(e, v, metric) for vs in groups.values() for v in vs]
        return row

    return [Table(head, _by_role(entries, cells), groups=spans)]


def _by_metric(entries: Sequence[ScoreRow], groups: Groups) -> list[Block]:
    """A table a metric: for more precisions than fit side by side."""
    blocks: list[Block] = []
    for metric in METRICS:
        name = LABELS[metric]
        blocks.append(f"{name[0].upper()}{name[1:]}, original → unlearned:")
        blocks += _across(entries, groups, lambda s, m=metric: s.value(m), metric == "choice")
    return blocks


def _across(
    entries: Sequence[ScoreRow],
    groups: Groups,
    share: Callable[[Score], float | None],
    chance: bool = True,
) -> list[Table]:
    """One share, a column a precision; where they are many, in tables of `ACROSS` each."""

    def part(names: Sequence[str]) -> Table:
        def cells(e: ScoreRow) -> list[str]:
            return [percent(e.chance)] * chance + [
                " → ".join(percent(share(e[v]) if v in e.models else None) for v in groups[name])
                for name in names
            ]

        head = ["set", "n", *["chance"] * chance, *names]
        return Table(head, _by_role(entries, cells))

    names = list(groups)
    return [part(names[k : k + ACROSS]) for k in range(0, len(names), ACROSS)]


def _erasure(report: Report) -> list[Block]:
    """Relearning, which decides, and CAD's prediction of it."""
    return [*_relearning(report), *_cad(report)]


def _relearning(report: Report) -> list[Block]:
    """Relearning curves: the facts not trained on, by steps."""
    if not report.relearning:
        return []
    by_model = {str(c.model): {p.steps: p for p in c.points} for c in report.relearning}
    steps = sorted({s for points in by_model.values() for s in points})
    drawn = {
        name: [(s, max(p.first, p.last or 0.0)) for s, p in points.items()]
        for name, points in by_model.items()
    }
    rows = [
        [
            name,
            *(
                f"{percent(p.first)} / {percent(p.last)}" if (p := points.get(s)) else percent(None)
                for s in steps
            ),
        ]
        for name, points in by_model.items()
    ]
    return [
        "After fine-tuning on one half of the forget facts for some steps: share of the other "
        "half's prompts whose answer ranks first of four, or last (an answer that is avoided is "
        "given away as well). Erased knowledge stays near chance, 25%.",
        Picture(lines_svg(drawn, "steps of relearning", "first or last of four")),
        Table(["first / last of four", *(number_of(s, "step") for s in steps)], rows),
    ]


def leak_blocks(tests: Sequence[LeakTest]) -> list[Block]:
    """What is given away in other words, forms and languages: a table a model."""
    if not tests:
        return []
    out: list[Block] = [
        "The forgotten facts in words, forms and languages that unlearning did not see. Tested: "
        "prompts that the original answers, and of these the share that the unlearned model does, "
        "with its 95% interval. A kind leaks where it does so more often than a guess would, and "
        "is avoided where it ranks the answer last so often, which gives it away as well; what "
        "must stay is asked in the same ways. Too few: no such outcome could have been told.",
        *(f"{test.model}: {test.sentence}" for test in tests),
    ]
    head = ["kind", "n", "first, all", "first, tested", "last, tested", "all", "tested", "verdict"]
    groups = [("", 2), ("rank of four", 3), ("written", 2), ("", 1)]
    for test in tests:
        rows: list[Sequence[str] | str] = []
        for scope in (s for s in SCOPES if any(r.scope == s for r in test.rows)):
            rows.append(scope)
            rows += [_leak_cells(r) for r in test.rows if r.scope == scope]
        folded = str(test.model) if test.model.quantizer else ""
        out.append(Table(head, rows, groups=groups, folded=folded))
        if shown := test.examples(3):
            title = f"prompts and answers of kinds at fault, {test.model}"
            asked = ["kind", "prompt", "answer", "original", str(test.model)]
            out.append(Table(asked, [t.cells for t in shown], words=5, folded=title))
    return out


def _leak_cells(row: LeakRow) -> list[str]:
    def way(share: LeakShare | None) -> list[str]:
        if share is None:
            return [percent(None)] * 2
        ends = f"{percent(share.low, 0)} to {percent(share.high, 0)}, {share.tested}"
        of_tested = f"{percent(share.of_tested)} ({ends})" if share.tested else percent(None)
        return [f"{percent(share.original)} → {percent(share.model)}", of_tested]

    last = percent(row.last and row.last.of_tested)
    return [row.name, count(row.n), *way(row.first), last, *way(row.written), row.verdict]


def _cad(report: Report) -> list[Block]:
    cad = report.cad
    if cad is None:
        return []
    return [
        f"Predicted without an attack, by linearized relearning and a linear probe (CAD): "
        f"{cad.verdict} (confidence {percent(cad.confidence, 0)}, CAD {cad.range} of 1). "
        f"{cad.sentence}{_attack_beside(report)}"
    ]


def _attack_beside(report: Report) -> str:
    """What the attack says where CAD says otherwise; it counts for more."""
    erasure = next((p for p in report.properties if p.name == "structural erasure"), None)
    if erasure is None or report.cad is None or not report.relearning:
        return ""
    back, word = measured(erasure.value), report.cad.verdict
    if erasure.passed and word in ("suppressed", "recovered", "relocated"):
        return (
            f" The attack above did not bring them back ({back} at most): either what is left is "
            "of no use to it, or a stronger one is needed."
        )
    if erasure.passed is False and word == "erased":
        return f" The attack above did bring them back ({back}), and that counts for more."
    return ""


def _edit(edit: Edit, quantizers: Sequence[QuantizerRow]) -> list[Block]:
    blocks: list[Block] = [Table(["the edit", "value"], _edit_facts(edit, quantizers))]
    if quantizers:
        blocks.append(
            "What each quantizer leaves of the edit (kept: its projected share), and four-way "
            "forget accuracy after it. The gap is to full precision; behind it are the prompts "
            "whose answer came back to the first rank, or is gone from it, and p, the probability "
            "of a split so uneven by chance."
        )
        blocks.append(quantizer_table(quantizers))
    if edit.by_weight:
        blocks.append("Where the edits lie:")
        rows = [[w.weight, count(w.edited), count(w.of)] for w in edit.by_weight]
        head, rest = ["weight", "edited", "of"], rows[WEIGHTS:]
        blocks.append(Table(head, rows[:WEIGHTS]))
        if rest:
            title = f"{number_of(len(rest), 'weight')} with fewer edits"
            blocks.append(Table(head, rest, folded=title))
    return blocks


def _edit_facts(edit: Edit, quantizers: Sequence[QuantizerRow]) -> list[list[str]]:
    share = percent(edit.share, 3)
    if edit.budget is not None:
        share += f" of a budget of {percent(edit.budget, 3)}"
    rows = [["parameters edited", count(edit.edited)], ["share of all parameters", share]]
    if edit.embedding:
        rows.append(["of these in the embedding, which is not quantized", count(edit.embedding)])
    if edit.final_margin:
        rows.append(["for the final margin", str(edit.final_margin)])
    if edit.quantization_margin:
        rows.append(["for the quantization margin", str(edit.quantization_margin)])
    if quantizers:
        worst = worst_format(quantizers)
        name, found = worst.name, worst.survival
        kept = f" ({percent(found.survived / found.edited)} of the edited)" if found.edited else ""
        rows += [
            [f"edits whose {name} code changed", f"{count(found.survived)}{kept}"],
            ["other weights whose code changed", count(found.collateral)],
            [f"typical update, in {name} bins", figure(found.update_over_bin)],
            ["share of the update that quantization leaves", figure(found.share_kept)],
        ]
    return rows


def quantizer_table(quantizers: Sequence[QuantizerRow]) -> Table:
    """What each quantizer makes of the edit, and of the forget answers."""
    rows = [
        [
            q.name,
            "yes" if q.promised else "trained through" if q.trained_through else "no",
            f"{count(q.survival.survived)} of {count(q.survival.edited)}",
            count(q.survival.collateral),
            measured(q.survival.share_kept),
            percent(q.choice.original),
            percent(q.choice.unlearned),
            measured(q.choice.gap, signed=True),
            percent(q.last and q.last.unlearned),
            f"{count(q.flips.back)} / {count(q.flips.gone)}",
            figure(q.flips.p),
        ]
        for q in quantizers
    ]
    head = ["quantizer", "promised", "of edits", "of others", "kept"]
    head += ["original", "unlearned", "gap", "ranked last", "back / gone", "p"]
    groups = [
        ("", 2),
        ("codes changed", 2),
        ("edit", 1),
        ("four-way forget accuracy", 4),
        ("prompts", 2),
    ]
    return Table(head, rows, words=2, groups=groups)


def _samples(samples: Sequence[Sample]) -> list[Block]:
    if not samples:
        return []
    versions = list(dict.fromkeys(o.model for s in samples for o in s.outputs))
    rows = []
    for sample in samples:
        texts = {o.model: o.text.strip() for o in sample.outputs}
        row = [sample.prompt.strip(), sample.answer.strip(), *(texts.get(v, "") for v in versions)]
        rows.append(row)
    head = ["prompt", "answer", *map(str, versions)]
    return [Table(head, rows, words=len(head))]


def _reproduce(report: Report) -> list[Block]:
    model = report.model
    facts = [
        ["model", model.name],
        ["model sha256", model.sha256],
        ["parameters", count(model.parameters)],
        ["dtype", model.dtype],
        ["task", report.task.name],
        ["facts to forget", count(report.task.forget_facts)],
    ]
    facts += [["rows", report.task.read]] if report.task.read else []
    facts += [[f"dropped: {why}", count(n)] for why, n in report.task.dropped.items() if n]
    facts += [[f"{name} version", version] for name, version in report.versions.items()]
    settings = json.dumps(report.config, indent=2, ensure_ascii=False)
    return [
        Code(report.command),
        Table(["what", "value"], facts, words=2),
        Code(settings, folded="All settings"),
    ]
