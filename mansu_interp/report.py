"""The report of a run. ``report.json`` is the truth; Markdown and HTML are rendered from it only.

Both renderings walk the same list of sections, so they cannot tell different stories. A value that
is null or absent is shown as a dash and never stops a render.

A property's ``unit`` says in words what its value is; ``margin`` is the distance to the target,
negative where the target is missed.

The page is self-contained: no script, no font, no image, no request. Whatever a model or a prompt
says is escaped, and a content security policy forbids everything but the page's own styles.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifacts import write_json, write_text
from .viz import curve_svg, escape

DASH = "–"
_STATUS = {True: ("pass", "✓"), False: ("fail", "✗"), None: ("undecided", "?")}
_ROLES = ("forget", "neighbour", "retain")
_METRICS = {"top1": "top-1", "choice": "choice"}
_CARD_NUMBERS = ("value", "target", "margin")
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


def measured(value: Any, signed: bool = False) -> str:
    """A score or ratio, with the three decimals that the sentences use."""
    n = number(value)
    return DASH if n is None else f"{n:{'+' if signed else ''}.3f}".replace("-", "−")


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
    folded: str = ""
    """Title of the fold that hides it in HTML; empty shows it."""


@dataclass(frozen=True)
class Picture:
    """An inline SVG, and the table that Markdown shows in its place."""

    svg: str
    instead: Table | None = None


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
    share, budget = (percent(_get(edit, k), 3) for k in ("share", "budget"))
    rows = [
        ["parameters edited", count(edited)],
        ["share of all parameters", f"{share} of a budget of {budget}"],
        ["edits whose 4-bit code changed", f"{count(survived)}{kept}"],
        ["other weights whose code changed", count(_get(edit, "collateral"))],
        ["typical update, in quantizer bins", figure(_get(edit, "update_over_bin"))],
        ["update that quantization leaves (projection)", figure(_get(edit, "projection"))],
    ]
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
        rows = [[count(a), percent(b)] for a, b in sorted(curve)]
        instead = Table(["edges", "faithfulness"], rows, words=0)
        blocks.append(Picture(curve_svg(curve, chosen), instead))
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
    rows = [[m, *(measured(_get(v, p)) for p in parts)] for m, v in _pairs(_get(cad, "models"))]
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
        settings = json.dumps(_get(report, "config"), indent=2, ensure_ascii=False)
        blocks.append(Code(settings, folded="All settings"))
    return blocks


def sections(report: Mapping[str, Any], svg: str = "") -> list[Section]:
    """The report as sections, from which every rendering is made."""
    samples = _items(_get(report, "samples"))
    columns = list(dict.fromkeys(k for s in samples for k, _ in _pairs(s)))
    rows = [[_text(_get(s, c)).strip() for c in columns] for s in samples]
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


def _against(item: Any) -> str:
    """What a property is measured against."""
    target, margin = measured(_get(item, "target")), measured(_get(item, "margin"), signed=True)
    return f"target {target}, margin {margin}"


# Markdown ----------------------------------------------------------------------------------------


def _md(text: Any) -> str:
    """Text on one line in which nothing is markup."""
    line = " ⏎ ".join(str(text).strip().splitlines())
    line = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _md_table(table: Table) -> str:
    spans = [group for group, width in table.groups for _ in range(width)]
    head = [
        f"{name} ({spans[i]})" if spans and spans[i] and name != "chance" else name
        for i, name in enumerate(table.head)
    ]
    rule = ["---" if i < table.words else "---:" for i in range(len(head))]
    lines = [[_md(h) for h in head], rule]
    for row in table.rows:
        if isinstance(row, str):
            lines.append([f"**{_md(row)}**", *[""] * (len(head) - 1)])
        else:
            lines.append([_md(cell) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md_block(block: Block) -> str:
    if isinstance(block, Picture):
        return _md_table(block.instead) if block.instead else ""
    if isinstance(block, Table):
        return _md_table(block)
    if isinstance(block, Code):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        title = f"{_md(block.folded)}:\n\n" if block.folded else ""
        return f"{title}{fence}\n{block.text}\n{fence}"
    if isinstance(block, Cards):
        rows = []
        for item in block.properties:
            word, icon = _status(_get(item, "passed"))
            row = [_text(_get(item, "name")), f"{icon} {word}", _text(_get(item, "unit"))]
            row += [measured(_get(item, k), k == "margin") for k in _CARD_NUMBERS]
            rows.append([*row, _text(_get(item, "sentence"))])
        head = ["property", "result", "measured", *_CARD_NUMBERS, "meaning"]
        return _md_table(Table(head, rows, words=len(head)))
    return _md(block)


def render_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown (GitHub's tables)."""
    title, subtitle, word, sentence = _heading(report)
    parts = [f"# {_md(title)}", f"**{word.capitalize()}.** {_md(sentence)}", _md(subtitle)]
    for section in sections(report):
        parts.append(f"## {section.title}")
        parts += [text for block in section.blocks if (text := _md_block(block))]
    return "\n\n".join(parts) + "\n"


# HTML --------------------------------------------------------------------------------------------

_CSS = """
:root{color-scheme:light dark;--paper:#fcfcfa;--card:#fff;--ink:#20262c;--soft:#5a646e;
--line:#dfe3e6;--pass:#00704f;--fail:#b04a00;--undecided:#5a646e;--tint:#f2f4f5}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15191d;--card:#1b2025;--ink:#e4e8eb;
--soft:#a3adb7;--line:#333b43;--pass:#3fc79c;--fail:#f08a3c;--undecided:#a3adb7;--tint:#20262c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:48px 0 12px;padding-top:16px;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:0}
p{margin:10px 0;max-width:46em;overflow-wrap:anywhere}
.soft{color:var(--soft)}
.verdict{margin:24px 0 0;padding:14px 18px;border:1px solid var(--line);background:var(--card);
border-left:5px solid var(--undecided);border-radius:6px;font-size:1.08rem;max-width:none}
.verdict.pass{border-left-color:var(--pass)}.verdict.fail{border-left-color:var(--fail)}
.state{font-weight:650;color:var(--undecided);white-space:nowrap}
.pass .state{color:var(--pass)}.fail .state{color:var(--fail)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px}
.card{border:1px solid var(--line);border-radius:8px;background:var(--card);padding:14px 16px;
break-inside:avoid}
.card p{margin:6px 0 0;font-size:.9rem}
.card .value{font-size:1.7rem;line-height:1.3;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:14px 0;border:1px solid var(--line);border-radius:8px;
background:var(--card);width:fit-content;max-width:100%}
.scroll:focus-visible{outline:2px solid var(--soft)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
thead tr:first-child th{border-top:0}
thead th{font-weight:600;color:var(--soft);white-space:nowrap}
td{white-space:pre-wrap;overflow-wrap:break-word;max-width:30em}
td:first-child{min-width:8.5em}
.num{text-align:right;white-space:nowrap}
.group{text-align:center;border-left:1px solid var(--line)}
.first{border-left:1px solid var(--line)}
tr.role th{background:var(--tint);font-weight:650;text-transform:capitalize}
figure.scroll{padding:12px}
figure .mansu{display:block;background:none}
pre{background:var(--tint);border-radius:8px;padding:12px 16px;font-size:.85rem;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer}
@media (max-width:600px){main{padding:24px 14px 48px}h1{font-size:1.5rem}
th,td{padding:5px 9px}}
@media print{main{max-width:none;padding:0}body{font-size:10.5pt;background:#fff}
.scroll{overflow:visible;border:0}h2{break-after:avoid}tr,figure,.card{break-inside:avoid}
table{font-size:8pt}th,td{padding:3px 6px}figure .mansu{max-width:100%;height:auto;max-height:20cm}
.cards{grid-template-columns:1fr 1fr}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _state(passed: Any) -> str:
    word, icon = _status(passed)
    return f'<span class="state"><span aria-hidden="true">{icon}</span> {word}</span>'


def _html_table(table: Table) -> str:
    starts, column = set(), 0
    for _, width in table.groups:
        starts.add(column)
        column += width

    def cells(tag: str, row: Sequence[str]) -> str:
        out = []
        for i, cell in enumerate(row):
            names = ["num"] if i >= table.words else []
            names += ["first"] if i in starts and i else []
            css = f' class="{" ".join(names)}"' if names else ""
            out.append(f"<{tag}{css}>{escape(cell)}</{tag}>")
        return "<tr>" + "".join(out) + "</tr>"

    groups = "".join(
        f'<th class="group" colspan="{width}">{escape(name)}</th>'
        if name
        else f'<th colspan="{width}"></th>'
        for name, width in table.groups
    )
    body = [
        f'<tr class="role"><th colspan="{len(table.head)}">{escape(row)}</th></tr>'
        if isinstance(row, str)
        else cells("td", row)
        for row in table.rows
    ]
    top = f"<tr>{groups}</tr>" if groups else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{top}{cells("th", table.head)}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _card(item: Any) -> str:
    word, _ = _status(_get(item, "passed"))
    return (
        f'<article class="card {word}"><h3>{escape(_text(_get(item, "name"))).capitalize()}</h3>'
        f"<p>{_state(_get(item, 'passed'))}</p>"
        f'<p class="value">{escape(measured(_get(item, "value")))}</p>'
        f'<p class="soft">{escape(_get(item, "unit") or "")}<br>{escape(_against(item))}</p>'
        f"<p>{escape(_get(item, 'sentence') or '')}</p></article>"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Code):
        code = f"<pre>{escape(block.text)}</pre>"
        if block.folded:
            return f"<details><summary>{escape(block.folded)}</summary>{code}</details>"
        return code
    if isinstance(block, Picture):
        return f'<figure class="scroll" tabindex="0">{block.svg}</figure>'
    if isinstance(block, Cards):
        return f'<div class="cards">{"".join(_card(item) for item in block.properties)}</div>'
    return f"<p>{escape(block)}</p>"


def render_html(report: dict[str, Any], svg: str) -> str:
    """The report as one page that asks nothing of the network.

    Arguments:
        report: the report.
        svg: the circuit's picture from ``viz.circuit_svg``, inlined as it is; empty for none.
    """
    title, subtitle, word, sentence = _heading(report)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(subtitle)}</p>',
        f'<p class="verdict {word}">{_state(_get(report, "verdict", "passed"))} '
        f"&nbsp;{escape(sentence)}</p>",
    ]
    for section in sections(report, svg):
        blocks = "\n".join(_html_block(block) for block in section.blocks)
        body.append(f"<section>\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: unlearning report</title>\n<style>{_CSS}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


# Terminal and files ------------------------------------------------------------------------------


def _role_means(report: Mapping[str, Any]) -> list[list[str]]:
    """A row a role under a row of model names: scores averaged over all the role's facts."""
    entries = _items(_get(report, "scores"))
    models = list(dict.fromkeys(m for e in entries for m, _ in _pairs(_get(e, "models"))))
    rows = [["", *models]]
    for role in list(dict.fromkeys(_text(_get(e, "role")) for e in entries))[:3]:
        members = [e for e in entries if _text(_get(e, "role")) == role]
        cells = []
        for model in models:
            means = []
            for key in _METRICS:
                got = [
                    (number(_get(e, "n")) or 1.0, v)
                    for e in members
                    if (v := number(_get(e, "models", model, key))) is not None
                ]
                total = sum(n for n, _ in got)
                means.append(percent(sum(n * v for n, v in got) / total) if got else DASH)
            cells.append(" / ".join(means))
        rows.append([role, *cells])
    return rows


def console_summary(report: dict[str, Any], width: int) -> str:
    """At most 25 plain lines for the terminal, none wider than ``width``.

    Control characters are dropped, so that no prompt can steer the terminal.
    """
    width = max(width, 20)

    def printable(text: str) -> str:
        return "".join(c if c.isprintable() else " " for c in text)

    def lines(text: str, limit: int = 2, indent: str = "") -> list[str]:
        return textwrap.wrap(
            printable(text), width, max_lines=limit, placeholder=" …", subsequent_indent=indent
        )

    title, subtitle, word, sentence = _heading(report)
    out = [*lines(f"{word.upper()}  {title} ({subtitle})", 1), *lines(sentence, 3)]
    for item in _items(_get(report, "properties"))[:4]:
        state = _status(_get(item, "passed"))[0].upper()
        value = measured(_get(item, "value"))
        name = _text(_get(item, "name"))
        out += lines(f"{state:<9}  {name}: {value} ({_against(item)})", 2, " " * 11)
    scores = _role_means(report)
    if len(scores) > 1:
        out += lines("Scores, top-1 / choice:", 1)
        widths = [max(map(len, column)) for column in zip(*scores, strict=True)]
        if sum(widths) + 2 * len(widths) <= width:
            aligned = [
                "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in scores
            ]
            out += [printable(f"  {row}".rstrip()) for row in aligned]
        else:
            for role, *cells in scores[1:]:
                named = zip(scores[0][1:], cells, strict=True)
                text = "; ".join(f"{model} {cell}" for model, cell in named)
                out += lines(f"{role}: {text}", 2, "  ")
    edit, circuit = _get(report, "edit"), _get(report, "circuit")
    out += lines(
        f"Edit: {count(_get(edit, 'edited'))} parameters ({percent(_get(edit, 'share'), 3)}), "
        f"{count(_get(edit, 'survived'))} survive quantization. "
        f"Circuit: {count(_get(circuit, 'edges'))} of {count(_get(circuit, 'of'))} edges.",
    )
    out += lines(f"CAD: {_text(_get(report, 'cad', 'verdict'))} (not calibrated)", 1)
    return "\n".join(out)


def write_report(folder: Path, report: dict[str, Any], svg: str) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``, each whole or not at all."""
    folder = Path(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report, svg))
