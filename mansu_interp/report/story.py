"""What a report says, as sections, from which every rendering is made.

A property's ``unit`` says in words what its value is; ``margin`` is the distance to the target,
negative where the target is missed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..viz.svg import curve_svg, lines_svg
from .values import (
    count,
    deepened,
    figure,
    get,
    items,
    measured,
    number,
    pairs,
    parted,
    percent,
    status_of,
    text_of,
)

_ROLES = ("forget", "neighbour", "retain")
METRICS = {"top1": "top-1", "choice": "choice"}
CARD_NUMBERS = ("value", "target", "margin")


@dataclass(frozen=True)
class Table:
    """A table; a row that is a plain string is a heading across it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str] | str]
    words: int = 1
    """How many leading columns hold words; the others hold numbers."""
    groups: Sequence[tuple[str, int]] = ()
    """Headings above ``head``, each with the number of columns it spans."""


@dataclass(frozen=True)
class Code:
    """Verbatim text."""

    text: str
    folded: str = ""
    """Title of the fold that hides it in HTML; empty shows it."""


@dataclass(frozen=True)
class Picture:
    """An inline SVG, and the table that Markdown shows in its place."""

    svg: str
    instead: Table | None = None


@dataclass(frozen=True)
class Graph:
    """The interactive view of what became of the graph, and the table that stands in its place."""

    data: Mapping[str, Any]
    instead: Table


@dataclass(frozen=True)
class Cards:
    """The properties, as cards or as a table."""

    properties: Sequence[Any]


Block = str | Table | Code | Picture | Graph | Cards


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def _model_groups(entries: Sequence[Any]) -> dict[str, list[str]]:
    """Model names by precision, the original before the unlearned one."""
    names = dict.fromkeys(m for e in entries for m, _ in pairs(get(e, "models")))
    groups: dict[str, list[str]] = {}
    for name in names:
        stem, _, precision = name.partition(" ")
        known = stem in ("original", "unlearned")
        groups.setdefault(precision or "full precision" if known else "other", []).append(name)
    return {p: sorted(ms) for p, ms in groups.items()}


def _by_role(
    entries: Sequence[Any], cells: Callable[[Any], list[str]]
) -> list[Sequence[str] | str]:
    """A row a set, with these cells after its name and size, under the name of its role; the usual
    roles first."""
    rows: list[Sequence[str] | str] = []
    for role in dict.fromkeys([*_ROLES, *(text_of(get(e, "role")) for e in entries)]):
        members = [e for e in entries if text_of(get(e, "role")) == role]
        rows += [role] if members else []
        rows += [[text_of(get(e, "label")), count(get(e, "n")), *cells(e)] for e in members]
    return rows


def _wide(entries: Sequence[Any], groups: dict[str, list[str]], keys: Sequence[str]) -> list[Block]:
    """One table, a column a model and metric."""
    head, spans = ["set", "n"], [("", 2)]
    for key in keys:
        if key == "choice":
            head.append("chance")
        for i, (precision, models) in enumerate(groups.items()):
            head += [m.partition(" ")[0] if precision != "other" else m for m in models]
            chance = int(key == "choice" and i == 0)
            spans.append((f"{METRICS.get(key, key)}, {precision}", len(models) + chance))

    def cells(e: Any) -> list[str]:
        row: list[str] = []
        for key in keys:
            row += [percent(get(e, "chance"))] if key == "choice" else []
            row += [percent(get(e, "models", m, key)) for ms in groups.values() for m in ms]
        return row

    return [Table(head, _by_role(entries, cells), groups=spans)]


def _by_metric(
    entries: Sequence[Any], groups: dict[str, list[str]], keys: Sequence[str]
) -> list[Block]:
    """A table a metric, a column a precision: for more of them than fit side by side."""
    blocks: list[Block] = []
    for key in keys:
        chance = ["chance"] if key == "choice" else []

        def cells(e: Any, key: str = key, chance: list[str] = chance) -> list[str]:
            return [percent(get(e, c)) for c in chance] + [
                " → ".join(percent(get(e, "models", m, key)) for m in ms) for ms in groups.values()
            ]

        name = METRICS.get(key, key)
        blocks.append(f"{name[0].upper()}{name[1:]}, original → unlearned:")
        blocks.append(Table(["set", "n", *chance, *groups], _by_role(entries, cells)))
    return blocks


def _scores(report: Mapping[str, Any]) -> list[Block]:
    entries = items(get(report, "scores"))
    groups = _model_groups(entries)
    keys = list(
        dict.fromkeys(k for e in entries for _, m in pairs(get(e, "models")) for k, _ in pairs(m))
    )
    blocks: list[Block] = [
        "Share of answers that are right, on phrasings that unlearning did not see. “Choice” is "
        "picking the answer among candidates; forgotten means down to its chance, not to zero."
    ]
    fits = len(groups) <= 2 or any(len(models) != 2 for models in groups.values())
    blocks += (_wide if fits else _by_metric)(entries, groups, keys)
    perplexity = pairs(get(report, "perplexity"))
    if perplexity:
        blocks.append("Perplexity of running text (lower is better):")
        blocks.append(Table(["model", "perplexity"], [[m, figure(v)] for m, v in perplexity]))
    return blocks


def _edit(report: Mapping[str, Any]) -> list[Block]:
    edit = get(report, "edit")
    edited, survived = number(get(edit, "edited")), number(get(edit, "survived"))
    rows_of_embedding = number(get(edit, "embedding")) or 0
    coded = (edited or 0) - rows_of_embedding
    kept = f" ({percent(survived / coded)} of the edited)" if coded and survived else ""
    share, budget = (percent(get(edit, k), 3) for k in ("share", "budget"))
    rows = [
        ["parameters edited", count(edited)],
        ["share of all parameters", f"{share} of a budget of {budget}"],
    ]
    if rows_of_embedding:
        rows += [["of these in the embedding, which is not quantized", count(rows_of_embedding)]]
    if deepened(report):
        rows += [["to final_margin it", deepened(report)]]
    if parted(report):
        rows += [["for the quantization_margin", parted(report)]]
    rows += [
        ["edits whose 4-bit code changed", f"{count(survived)}{kept}"],
        ["other weights whose code changed", count(get(edit, "collateral"))],
        ["typical update, in quantizer bins", figure(get(edit, "update_over_bin"))],
        ["update that quantization leaves (projection)", figure(get(edit, "projection"))],
    ]
    weights = [
        [text_of(get(w, "weight")), count(get(w, "edited")), count(get(w, "of"))]
        for w in items(get(edit, "by_weight"))
    ]
    blocks: list[Block] = [Table(["the edit", "value"], rows)]
    rows = [
        [
            text_of(get(q, "name")),
            "yes" if get(q, "promised") is True else "no",
            f"{count(get(q, 'survived'))} of {count(get(q, 'edited'))}",
            count(get(q, "collateral")),
            percent(get(q, "choice", "original")),
            percent(get(q, "choice", "unlearned")),
            measured(get(q, "choice", "gap"), signed=True),
            f"{count(get(q, 'flips', 'back'))} / {count(get(q, 'flips', 'gone'))}",
            figure(get(q, "flips", "p")),
        ]
        for q in items(get(report, "quantizers"))
    ]
    if rows:
        head = ["quantizer", "promised", "codes changed", "other codes changed"]
        head += ["forget, original", "forget, unlearned", "gap", "came back / went", "p"]
        blocks.append(
            "What each quantizer leaves of the edit, and four-way forget accuracy after it. The "
            "gap is to full precision; behind it are the prompts whose answer came back to the "
            "first rank, or went from it, and p, the probability of a split so uneven by chance."
        )
        blocks.append(Table(head, rows, words=2))
    if weights:
        blocks.append("Where the edits lie:")
        blocks.append(Table(["weight", "edited", "of"], weights))
    return blocks


def _graph(report: Mapping[str, Any]) -> list[Block]:
    """What became of every edge, as a view and as counts."""
    data = get(report, "graph")
    meaning = get(data, "meaning")
    counts = [
        [name, count(n), text_of(get(meaning, name)).partition(": ")[2]]
        for name, n in pairs(get(data, "counts"))
    ]
    if not counts:
        return []
    return [
        "What became of every edge of the attribution graph, on forget prompts that unlearning "
        "never saw. Drag to move, click to select; the three graphs share it.",
        Graph(data, Table(["edges that were", "number", "meaning"], counts, words=3)),
    ]


def _relearning(report: Mapping[str, Any]) -> list[Block]:
    """Relearning curves: model -> [[steps, accuracy on the facts not trained on], ...]."""
    curves = {
        name: [
            (x, number(p[1]))
            for p in items(points)
            if isinstance(p, (list, tuple)) and len(p) == 2 and (x := number(p[0])) is not None
        ]
        for name, points in pairs(get(report, "relearning"))
    }
    steps = sorted({x for ps in curves.values() for x, _ in ps})
    if not steps:
        return []
    table = Table(
        ["model", *(f"{s:g} steps" for s in steps)],
        [[name, *(percent(dict(points).get(s)) for s in steps)] for name, points in curves.items()],
    )
    return [
        "After fine-tuning on one half of the forget facts for some steps: share of the other "
        "half that is answered again. Erased knowledge stays away.",
        Picture(lines_svg(curves, "steps of relearning", "answered")),
        table,
    ]


def _circuit(report: Mapping[str, Any], svg: str) -> list[Block]:
    circuit = get(report, "circuit")
    n, faithfulness = number(get(circuit, "edges")), number(get(circuit, "faithfulness"))
    blocks: list[Block] = [
        f"{count(n)} of {count(get(circuit, 'of'))} edges keep {percent(faithfulness)} of the "
        "answer's margin when everything outside them is ablated (faithfulness)."
    ]
    if svg:
        blocks.append(Picture(svg))
    curve = [
        (a, b)
        for p in items(get(circuit, "curve"))
        if isinstance(p, (list, tuple)) and len(p) == 2
        if (a := number(p[0])) is not None and (b := number(p[1])) is not None
    ]
    if curve:
        chosen = (n, faithfulness) if n is not None and faithfulness is not None else None
        blocks.append("Faithfulness of the circuits that the search tried:")
        rows = [[count(a), percent(b)] for a, b in sorted(curve)]
        instead = Table(["edges", "faithfulness"], rows, words=0)
        blocks.append(Picture(curve_svg(curve, chosen), instead))
    edges = [
        [text_of(get(e, "source")), text_of(get(e, "target")), figure(get(e, "score"))]
        for e in items(get(circuit, "top_edges"))
    ]
    if edges:
        blocks.append("The strongest edges; a negative score opposes the answer:")
        blocks.append(Table(["from", "to", "score"], edges, words=2))
    return blocks


def _attacked(report: Mapping[str, Any]) -> str:
    """What the attack says where the verdict says otherwise; it counts for more."""
    found = [p for p in items(get(report, "properties")) if get(p, "name") == "structural erasure"]
    if not (found and pairs(get(report, "relearning"))):
        return ""
    back, word = measured(get(found[0], "value")), get(report, "erasure", "verdict")
    if get(found[0], "passed") and word in ("suppressed", "recovered", "relocated"):
        return (
            f" The attack below did not bring them back ({back} at most): either what is left is "
            "of no use to it, or a stronger one is needed."
        )
    if get(found[0], "passed") is False and word == "erased":
        return f" The attack below did bring them back ({back}), and that counts for more."
    return ""


def _cad(report: Mapping[str, Any]) -> list[Block]:
    cad = get(report, "cad")
    parts = ("mass", "alignment", "projected_share", "outside")
    rows = [[m, *(measured(get(v, p)) for p in parts)] for m, v in pairs(get(cad, "models"))]
    blocks: list[Block] = []
    erasure = get(report, "erasure")
    if get(erasure, "verdict"):
        blocks.append(
            f"By linearized relearning and a linear probe: {text_of(get(erasure, 'verdict'))} "
            f"(confidence {percent(get(erasure, 'confidence'), 0)}, "
            f"CAD {measured(get(erasure, 'cad'))} of 1). "
            f"{get(erasure, 'sentence') or ''}{_attacked(report)}"
        )
    if rows:
        blocks.append(Table(["model", "mass", "alignment", "projected share", "outside"], rows))
        blocks.append(
            "Relative to the original model's circuit. Mass: how much attribution is left on it. "
            "Alignment: whether what is left points the same way (cosine). Projected share: mass and "
            "direction together. Outside: attribution that has moved elsewhere."
        )
    return blocks


def _reproduce(report: Mapping[str, Any]) -> list[Block]:
    model = get(report, "model")
    facts = [
        ["model", text_of(get(model, "name"))],
        ["model sha256", text_of(get(model, "sha256"))],
        ["parameters", count(get(model, "parameters"))],
        ["dtype", text_of(get(model, "dtype"))],
        ["task", text_of(get(report, "task", "name"))],
        ["facts to forget", count(get(report, "task", "forget_facts"))],
    ]
    facts += [
        [f"dropped: {why}", count(n)] for why, n in pairs(get(report, "task", "dropped")) if n
    ]
    facts += [[f"{k} version", text_of(v)] for k, v in pairs(get(report, "versions"))]
    blocks: list[Block] = [Code(text_of(get(report, "command")))]
    blocks.append(Table(["what", "value"], facts, words=2))
    if get(report, "config"):
        settings = json.dumps(get(report, "config"), indent=2, ensure_ascii=False)
        blocks.append(Code(settings, folded="All settings"))
    return blocks


def sections(report: Mapping[str, Any], svg: str = "") -> list[Section]:
    """The report as sections, from which every rendering is made."""
    relearning = _relearning(report)
    samples = items(get(report, "samples"))
    columns = list(dict.fromkeys(k for s in samples for k, _ in pairs(s)))
    rows = [[text_of(get(s, c)).strip() for c in columns] for s in samples]
    return [
        Section("Four properties", [Cards(items(get(report, "properties")))]),
        Section("Circuit attribution divergence (CAD)", [*_cad(report), *_graph(report)]),
        Section("Scores", _scores(report)),
        *([Section("Relearning", relearning)] if relearning else []),
        Section("The edit and its survival", _edit(report)),
        Section("The circuit", _circuit(report, svg)),
        Section("Samples", [Table(columns, rows, words=len(columns))] if rows else ["None."]),
        Section("How to reproduce", _reproduce(report)),
    ]


def heading(report: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Title, subtitle, status word and verdict sentence."""
    task = get(report, "task", "title") or get(report, "task", "name") or "Unlearning"
    model = get(report, "model")
    subtitle = f"{text_of(get(model, 'name'))}, {count(get(model, 'parameters'))} parameters"
    word, _ = status_of(get(report, "verdict", "passed"))
    return str(task), subtitle, word, text_of(get(report, "verdict", "sentence"))


def against(item: Any) -> str:
    """What a property is measured against."""
    target, margin = measured(get(item, "target")), measured(get(item, "margin"), signed=True)
    return f"target {target}, margin {margin}"
