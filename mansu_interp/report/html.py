"""The report as one self-contained page: no font, no image, no request. Terms are explained where
they stand.

Whatever a model or a prompt says is escaped by the templates, and a content security policy forbids
everything but the page's own styles and, where it holds a graph, the graph's script.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..utils.files import read_json
from ..utils.shipped import DATA
from ..viz.data import GraphData
from ..viz.page import graph_element, policy, script_element
from ..viz.svg import legal
from .blocks import Block, Cards, Code, Graph, Picture, Section, Table
from .records import Report
from .story import against, heading, sections
from .values import measured, status_of

_ALONE = {"outside"}
"""Terms that are ordinary words in a sentence."""


@dataclass(frozen=True)
class _Drawn:
    """A graph as the page holds it."""

    element: Markup


_KINDS = {"table": Table, "code": Code, "picture": Picture, "drawn": _Drawn, "cards": Cards}


@cache
def terms() -> Mapping[str, str]:
    """What a report's terms mean, by name, as in docs/glossary.md."""
    return read_json(DATA / "terms.json")


@cache
def _any_term() -> re.Pattern[str]:
    words = sorted((re.escape(t) for t in terms() if t not in _ALONE), key=len, reverse=True)
    return re.compile(rf"(?<![\w.-])({'|'.join(words)})(?![\w-]|\.\w)", re.IGNORECASE)


def _pieces(text: str) -> Iterator[Markup]:
    """Text, escaped, with each of its terms marked once."""
    names = {name.lower(): name for name in terms()}
    end, seen = 0, set()
    for found in _any_term().finditer(text):
        name = names[found[0].lower()]
        if name not in seen:
            seen.add(name)
            yield escape(text[end : found.start()])
            yield Markup('<abbr title="{}">{}</abbr>').format(terms()[name], found[0])
            end = found.end()
    yield escape(text[end:])


def explained(text: str) -> Markup:
    """Escaped text in which hovering a term shows its meaning."""
    if text in _ALONE:
        return Markup('<abbr title="{}">{}</abbr>').format(terms()[text], text)
    return Markup("").join(_pieces(text))


@cache
def _environment() -> Environment:
    """The templates: every value is escaped unless it is `Markup`, which only our own SVG is."""
    found = Environment(
        loader=PackageLoader("mansu_interp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else legal(str(value)),
    )
    for name, kind in _KINDS.items():
        found.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    found.filters["trusted"] = Markup
    found.filters["explained"] = lambda text: explained(legal(str(text)))
    found.globals.update(status_of=status_of, measured=measured, against=against, terms=terms())
    return found


def _drawn(block: Block) -> Block | _Drawn:
    """A graph as an element, or its table where its data are damaged; other blocks as they are."""
    if not isinstance(block, Graph):
        return block
    try:
        return _Drawn(Markup(graph_element(GraphData.from_json(block.data))))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return block.instead  # damaged data must not cost the whole report


def render_page(template: str, title: str, parts: Sequence[Section], **values: object) -> str:
    """Sections as one page under the policy that forbids every request.

    Arguments:
        template: ``report.html`` or ``scoreboard.html``.
        title: of the window.
        parts: what stands on the page.
        values: what else the template asks for.
    """
    shown = [
        {"title": p.title, "anchor": f"part-{k}", "blocks": [_drawn(b) for b in p.blocks]}
        for k, p in enumerate(parts, 1)
    ]
    scripted = any(isinstance(b, _Drawn) for part in shown for b in part["blocks"])
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            sections=shown,
            policy=Markup(policy(script=scripted)),
            script=Markup(script_element() if scripted else ""),
            **values,
        )
    )


def render_html(report: Report, svg: str) -> str:
    """The report as one page that asks nothing of the network.

    Arguments:
        report: what a run found.
        svg: the circuit's picture from `circuit_svg`, inlined as it is; empty for none.
    """
    top = heading(report)
    title = f"{top.title}: unlearning report"
    return render_page("report.html", title, sections(report, svg), top=top)
