"""The report of a run. ``report.json`` is the truth; Markdown and HTML are rendered from it only.

Both renderings walk the same list of sections, so they cannot tell different stories. A value that
is null or absent is shown as a dash and never stops a render.

Units of a property: ``share`` (0 to 1, shown as a percentage), ``points`` (a difference of shares,
shown as signed percentage points), ``%`` (already a percentage); anything else is printed after
the number. ``margin`` is the distance to the target, negative where the target is missed.

The page is self-contained: no script, no font, no image, no request. Whatever a model or a prompt
says is escaped, and a content security policy forbids everything but the page's own styles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .viz import curve_svg

DASH = "–"
_STATUS = {True: ("pass", "✓"), False: ("fail", "✗"), None: ("undecided", "?")}
_ROLES = ("forget", "neighbour", "retain")
_METRICS = {"top1": "top-1", "choice": "choice"}
_UNCALIBRATED = (
    "The thresholds of this first CAD are not calibrated: read its verdict as a description of "
    "the numbers below, not as a proof of erasure."
)


# Values ------------------------------------------------------------------------------------------


def _get(value: Any, *keys: str) -> Any:
    """A nested value, None where anything on the way is missing or null."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _items(value: Any) -> list[Any]:
    """The non-null entries of a list; none for anything else."""
    return [v for v in value if v is not None] if isinstance(value, (list, tuple)) else []


def _pairs(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _text(value: Any) -> str:
    return DASH if value is None else str(value)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def count(value: Any) -> str:
    """12345 -> 12,345."""
    n = number(value)
    return DASH if n is None else f"{n:,.0f}"


def percent(value: Any, digits: int = 1) -> str:
    """0.1234 -> 12.3%."""
    n = number(value)
    return DASH if n is None else f"{100 * n:.{digits}f}%".replace("-", "−")


def figure(value: Any, digits: int = 3) -> str:
    """A number with this many significant digits and no exponent in the common range."""
    n = number(value)
    if n is None:
        return DASH
    if n and not 1e-4 <= abs(n) < 1e6:
        return f"{n:.{digits - 1}e}".replace("-", "−")
    decimals = digits - 1 - math.floor(math.log10(abs(n))) if n else 2
    return f"{n:,.{max(0, min(decimals, 6))}f}".replace("-", "−")


def duration(value: Any) -> str:
    """Seconds as 0.4 s, 12 s or 3 min 05 s."""
    n = number(value)
    if n is None:
        return DASH
    if n < 60:
        return f"{n:.1f} s" if n < 10 else f"{n:.0f} s"
    return f"{round(n) // 60} min {round(n) % 60:02d} s"


def measured(value: Any, unit: Any, signed: bool = False) -> str:
    """A property's number in its unit; see the module's docstring."""
    n = number(value)
    if n is None:
        return DASH
    sign = "+" if n >= 0 and (signed or unit == "points") else ""
    if unit in ("share", "points"):
        tail = " points" if unit == "points" or signed else "%"
        return f"{sign}{100 * n:.1f}{tail}".replace("-", "−")
    if unit == "%":
        return f"{sign}{n:.1f}%".replace("-", "−")
    return f"{sign}{figure(n)}{f' {unit}' if unit else ''}"


def _status(passed: Any) -> tuple[str, str]:
    return _STATUS[passed if isinstance(passed, bool) else None]


# The story, once ---------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Picture:
    """An inline SVG; Markdown leaves it out."""

    svg: str


@dataclass(frozen=True)
class Cards:
    """The properties, as cards or as a table."""

    properties: Sequence[Any]


Block = str | Table | Code | Picture | Cards


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def _model_groups(entries: Sequence[Any]) -> dict[str, list[str]]:
    """Model names by precision, the original before the unlearned one."""
    names = dict.fromkeys(m for e in entries for m, _ in _pairs(_get(e, "models")))
    groups: dict[str, list[str]] = {}
    for name in names:
        stem, _, precision = name.partition(" ")
        known = stem in ("original", "unlearned")
        groups.setdefault(precision or "full precision" if known else "other", []).append(name)
    return {p: sorted(ms) for p, ms in groups.items()}


def _scores(report: Mapping[str, Any]) -> list[Block]:
    entries = _items(_get(report, "scores"))
    groups = _model_groups(entries)
    keys = dict.fromkeys(
        k for e in entries for _, m in _pairs(_get(e, "models")) for k, _ in _pairs(m)
    )
    head, spans = ["set", "n"], [("", 2)]
    for key in keys:
        if key == "choice":
            head.append("chance")
        for i, (precision, models) in enumerate(groups.items()):
            head += [m.partition(" ")[0] if precision != "other" else m for m in models]
            chance = int(key == "choice" and i == 0)
            spans.append((f"{_METRICS.get(key, key)}, {precision}", len(models) + chance))
    rows: list[Sequence[str] | str] = []
    roles = dict.fromkeys([*_ROLES, *(_text(_get(e, "role")) for e in entries)])
    for role in roles:
        members = [e for e in entries if _text(_get(e, "role")) == role]
        rows += [role] if members else []
        for e in members:
            row = [_text(_get(e, "label")), count(_get(e, "n"))]
            for key in keys:
                row += [percent(_get(e, "chance"))] if key == "choice" else []
                row += [percent(_get(e, "models", m, key)) for ms in groups.values() for m in ms]
            rows.append(row)
    blocks: list[Block] = [
        "Share of answers that are right, on phrasings that unlearning did not see. “Choice” is "
        "picking the answer among candidates; forgotten means down to its chance, not to zero."
    ]
    blocks.append(Table(head, rows, groups=spans))
    perplexity = _pairs(_get(report, "perplexity"))
    if perplexity:
        blocks.append("Perplexity of running text (lower is better):")
        blocks.append(Table(["model", "perplexity"], [[m, figure(v)] for m, v in perplexity]))
    return blocks


def _edit(report: Mapping[str, Any]) -> list[Block]:
    edit = _get(report, "edit")
    edited, survived = number(_get(edit, "edited")), number(_get(edit, "survived"))
    kept = f" ({percent(survived / edited)} of the edited)" if edited and survived else ""
    rows = [
        ["parameters edited", count(edited)],
        ["share of all parameters", f"{percent(_get(edit, 'share'), 3)} of a budget of "
         f"{percent(_get(edit, 'budget'), 3)}"],
        ["edits whose 4-bit code changed", f"{count(survived)}{kept}"],
        ["other weights whose code changed", count(_get(edit, "collateral"))],
        ["typical update, in quantizer bins", figure(_get(edit, "update_over_bin"))],
        ["update that quantization leaves (projection)", figure(_get(edit, "projection"))],
    ]  # fmt: skip
    weights = [
        [_text(_get(w, "weight")), count(_get(w, "edited")), count(_get(w, "of"))]
        for w in _items(_get(edit, "by_weight"))
    ]
    blocks: list[Block] = [Table(["the edit", "value"], rows)]
    if weights:
        blocks.append(Table(["weight", "edited", "of"], weights))
    return blocks


def _circuit(report: Mapping[str, Any], svg: str) -> list[Block]:
    circuit = _get(report, "circuit")
    n, faithfulness = number(_get(circuit, "edges")), number(_get(circuit, "faithfulness"))
    blocks: list[Block] = [
        f"{count(n)} of {count(_get(circuit, 'of'))} edges keep {percent(faithfulness)} of the "
        "answer's margin when everything outside them is ablated (faithfulness)."
    ]
    if svg:
        blocks.append(Picture(svg))
    curve = [
        (a, b)
        for p in _items(_get(circuit, "curve"))
        if isinstance(p, (list, tuple)) and len(p) == 2
        if (a := number(p[0])) is not None and (b := number(p[1])) is not None
    ]
    if curve:
        chosen = (n, faithfulness) if n is not None and faithfulness is not None else None
        blocks.append("Faithfulness of the circuits that the search tried:")
        blocks.append(Picture(curve_svg(curve, chosen)))
    edges = [
        [_text(_get(e, "source")), _text(_get(e, "target")), figure(_get(e, "score"))]
        for e in _items(_get(circuit, "top_edges"))
    ]
    if edges:
        blocks.append("The strongest edges; a negative score opposes the answer:")
        blocks.append(Table(["from", "to", "score"], edges, words=2))
    return blocks


def _cad(report: Mapping[str, Any]) -> list[Block]:
    cad = _get(report, "cad")
    parts = ("mass", "alignment", "projection", "outside")
    confidence = _get(cad, "confidence")
    sure = f" (confidence {percent(confidence)})" if number(confidence) is not None else ""
    rows = [[m, *(figure(_get(v, p)) for p in parts)] for m, v in _pairs(_get(cad, "models"))]
    blocks: list[Block] = [
        f"Verdict: {_text(_get(cad, 'verdict'))}{sure}. {_get(cad, 'sentence') or ''}".strip(),
        _UNCALIBRATED,
    ]
    if rows:
        blocks.append(Table(["model", *parts], rows))
        blocks.append(
            "Relative to the original model's circuit. Mass: how much attribution is left on it. "
            "Alignment: whether what is left points the same way (cosine). Projection: mass and "
            "direction together. Outside: attribution that has moved elsewhere."
        )
    return blocks


def _reproduce(report: Mapping[str, Any]) -> list[Block]:
    model = _get(report, "model")
    facts = [
        ["model", _text(_get(model, "name"))],
        ["model sha256", _text(_get(model, "sha256"))],
        ["parameters", count(_get(model, "parameters"))],
        ["dtype", _text(_get(model, "dtype"))],
        ["task", _text(_get(report, "task", "name"))],
        ["facts to forget", count(_get(report, "task", "forget_facts"))],
    ]
    facts += [
        [f"dropped: {why}", count(n)] for why, n in _pairs(_get(report, "task", "dropped")) if n
    ]
    facts += [[f"{k} version", _text(v)] for k, v in _pairs(_get(report, "versions"))]
    blocks: list[Block] = [Code(_text(_get(report, "command")))]
    blocks.append(Table(["what", "value"], facts, words=2))
    if _get(report, "config"):
        blocks.append("Settings:")
        blocks.append(Code(json.dumps(_get(report, "config"), indent=2, ensure_ascii=False)))
    return blocks


def sections(report: Mapping[str, Any], svg: str = "") -> list[Section]:
    """The report as sections, from which every rendering is made."""
    samples = _items(_get(report, "samples"))
    columns = list(dict.fromkeys(k for s in samples for k, _ in _pairs(s)))
    rows = [[_text(_get(s, c)) for c in columns] for s in samples]
    seconds = _pairs(_get(report, "seconds"))
    times = [[stage, duration(s)] for stage, s in seconds]
    times.append(["all", duration(sum(number(s) or 0.0 for _, s in seconds))])
    return [
        Section("Four properties", [Cards(_items(_get(report, "properties")))]),
        Section("Scores", _scores(report)),
        Section("The edit and its survival", _edit(report)),
        Section("The circuit", _circuit(report, svg)),
        Section("Circuit attribution divergence (CAD)", _cad(report)),
        Section("Samples", [Table(columns, rows, words=len(columns))] if rows else ["None."]),
        Section("How to reproduce", _reproduce(report)),
        Section("Time spent", [Table(["stage", "time"], times)]),
    ]


def _heading(report: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Title, subtitle, status word and verdict sentence."""
    task = _get(report, "task", "title") or _get(report, "task", "name") or "Unlearning"
    model = _get(report, "model")
    subtitle = f"{_text(_get(model, 'name'))}, {count(_get(model, 'parameters'))} parameters"
    word, _ = _status(_get(report, "verdict", "passed"))
    return str(task), subtitle, word, _text(_get(report, "verdict", "sentence"))
