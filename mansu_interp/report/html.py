"""The report as one self-contained page: no font, no image, no request.

Whatever a model or a prompt says is escaped, and a content security policy forbids everything but
the page's own styles and, where it holds a graph, the graph's script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..viz.data import GraphData
from ..viz.page import graph_element, policy, script_element
from ..viz.svg import escape
from .story import Block, Cards, Code, Graph, Picture, Table, against, heading, sections
from .values import get, measured, status_of, text_of

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


def _state(passed: Any) -> str:
    word, icon = status_of(passed)
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
    word, _ = status_of(get(item, "passed"))
    return (
        f'<article class="card {word}"><h3>{escape(text_of(get(item, "name"))).capitalize()}</h3>'
        f"<p>{_state(get(item, 'passed'))}</p>"
        f'<p class="value">{escape(measured(get(item, "value")))}</p>'
        f'<p class="soft">{escape(get(item, "unit") or "")}<br>{escape(against(item))}</p>'
        f"<p>{escape(get(item, 'sentence') or '')}</p></article>"
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
    if isinstance(block, Graph):
        try:
            return graph_element(GraphData.from_json(block.data))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return _html_table(block.instead)  # damaged data must not cost the whole report
    if isinstance(block, Cards):
        return f'<div class="cards">{"".join(_card(item) for item in block.properties)}</div>'
    return f"<p>{escape(block)}</p>"


def render_html(report: dict[str, Any], svg: str) -> str:
    """The report as one page that asks nothing of the network.

    Arguments:
        report: the report.
        svg: the circuit's picture from ``viz.circuit_svg``, inlined as it is; empty for none.
    """
    title, subtitle, word, sentence = heading(report)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(subtitle)}</p>',
        f'<p class="verdict {word}">{_state(get(report, "verdict", "passed"))} '
        f"&nbsp;{escape(sentence)}</p>",
    ]
    for section in sections(report, svg):
        blocks = "\n".join(_html_block(block) for block in section.blocks)
        body.append(f"<section>\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>")
    return page(f"{title}: unlearning report", body)


def page(title: str, body: Sequence[str]) -> str:
    """Blocks of HTML as one page under the policy that forbids every request."""
    drawn = any("data-mansu-graph" in part for part in body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(script=drawn)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        "<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n{script_element() if drawn else ''}\n</body>\n</html>\n"
    )
