"""The report and its pictures: complete, escaped, self-contained, and never stopped by a null."""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest

from mansu_interp.audit.cad import CAD
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import Divergence
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.meta import CircuitMeta
from mansu_interp.cli.main import main, parse
from mansu_interp.errors import ArtifactError, CircuitError
from mansu_interp.evaluation.properties import Property, Verdict
from mansu_interp.evaluation.scores import Flips, Perplexity, Score, ScoreRow
from mansu_interp.evaluation.versions import EDITED, NEVER_TAUGHT, ORIGINAL
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.quantizers.survival import Survival
from mansu_interp.report.card import model_card
from mansu_interp.report.html import explained, render_html, terms
from mansu_interp.report.markdown import render_markdown
from mansu_interp.report.records import (
    SCHEMA,
    CircuitEdge,
    CircuitSummary,
    ComparedGraph,
    CurvePoint,
    Edit,
    FinalMargin,
    ForgetScore,
    Output,
    QuantizationMargin,
    QuantizerRow,
    RelearningCurve,
    RelearningPoint,
    Report,
    ReportModel,
    ReportTask,
    Sample,
    WeightEdits,
)
from mansu_interp.report.story import gone, sections
from mansu_interp.report.terminal import Place, console_summary, next_steps
from mansu_interp.report.values import figure, percent
from mansu_interp.report.write import write_report
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.folder import config_json
from mansu_interp.unlearning.methods import get_method
from mansu_interp.utils.files import read_json
from mansu_interp.utils.words import number_of, p_value
from mansu_interp.viz.layout import place
from mansu_interp.viz.page import module_source
from mansu_interp.viz.plots import curve_svg
from mansu_interp.viz.svg import circuit_svg, escape
from mansu_interp.viz.view import changes_view

HOSTILE = ["<script>alert(1)</script>", '"onmouseover="alert(2)', "</svg>", "</td><img src=x>"]


def make_circuit(layers: int = 2, heads: int = 4, kv: int = 4, n: int = 30) -> Circuit:
    """The n strongest of random edges; not pruned, which a picture does not need."""
    graph = Graph(Architecture(layers, heads, kv))
    rng = np.random.default_rng(0)
    scores = rng.standard_t(2, graph.exists.shape) * graph.exists * 0.05
    scores[:, -1] *= 4
    scores[0] *= 2
    edges = np.abs(scores) >= np.sort(np.abs(scores[graph.exists]))[-n]
    return Circuit(graph, scores, edges & graph.exists, CircuitMeta(model="facts"))


VERSIONS = tuple(v.after(q) for v in (ORIGINAL, EDITED) for q in (None, "nf4"))
PARTS = Divergence(mass=0.12, projected_share=0.031, alignment=0.41, outside=0.22, metric=0.1)
SURVIVAL = Survival(1612, 1612, 0, 1612, 1.17, 0.998, 0.21)
NF4_ROW = QuantizerRow(
    "nf4", True, SURVIVAL, ForgetScore(1.0, 0.28, -0.007), ForgetScore(1.0, 0.0, -0.007),
    Flips(1, 3, 0.625), ForgetScore(0.0, 0.41, 0.01),
)  # fmt: skip
JUDGED = CAD(
    "suppressed", "Hidden.", 0.97, 0.0, {}, [], [], [], {}, {},
    facts={"capital: a": "erased", "capital: b": "suppressed", "capital: c": "suppressed"},
    interval=[0.0, 0.2],
)  # fmt: skip


def row(role: str, label: str, top1: list[float], choice: list[float]) -> ScoreRow:
    scores = [Score(v, t, c) for v, t, c in zip(VERSIONS, top1, choice, strict=True)]
    return ScoreRow(role, label, 150, 0.25, 0.01, tuple(scores))


def prop(name: str, passed: bool | None, value: float | None, target: float, unit: str) -> Property:
    headroom = None if value is None else target - value
    reason = {True: "", False: f"{name} went wrong", None: "it was left out"}[passed]
    sentence = f"A sentence on {name}, from 1.000 to {value or 0:.3f} at worst."
    return Property(name, passed, value, target, headroom, unit, sentence, reason)


SCORES = (
    row("forget", "capital", [1, 1, 0.007, 0], [1, 1, 0.287, 0.28]),
    row("neighbour", "largest city", [1, 0.99, 0.96, 0.95], [1, 1, 0.98, 0.98]),
    row("retain", "currency", [1, 1, 0.99, 0.99], [1, 1, 1, 1]),
    row("retain", "language", [0.987, 0.98, 0.98, 0.973], [1, 1, 1, 1]),
)
PROPERTIES = (
    prop("meaningful forgetting", True, 0.287, 0.35, "four-way accuracy, worst unseen set"),
    prop("retain preservation", False, 0.031, 0.02, "largest fall of a retain score"),
    prop("no recovery under quantization", True, -0.007, 0.0, "nf4 minus full precision"),
    prop("structural erasure", None, None, 0.4, "not tested"),
)
EDIT = Edit(
    edited=1612,
    embedding=0,
    share=0.000878,
    budget=0.005,
    candidates=9000,
    refused=17,
    final_margin=None,
    quantization_margin=None,
    by_weight=(
        WeightEdits("model.layers.1.mlp.down_proj.weight", 1200, 98304),
        WeightEdits("model.layers.0.self_attn.v_proj.weight", 412, 16384),
    ),
)
CURVE = ((231, 1.0), (1, 0.02), (16, 0.61), (30, 0.871), (8, 0.33), (64, 0.96))
CIRCUIT = CircuitSummary(
    edges=30,
    of=231,
    faithfulness=0.871,
    curve=tuple(CurvePoint(n, f) for n, f in CURVE),
    top_edges=(CircuitEdge("input", "a0.h1<v>", 0.83), CircuitEdge("m1", "logits", -0.41)),
)


def make_report() -> Report:
    """What a run of the embedded model finds, shortened, without what is optional."""
    return Report(
        schema=SCHEMA,
        versions={"mansu_interp": "0.1.0", "torch": "2.13.0", "transformer-lens": "4.3.0"},
        provenance={"seed": 0},
        model=ReportModel("facts", "9f2c41d07b" * 6 + "abcd", 1_836_288, "bfloat16"),
        task=ReportTask(
            "capitals",
            "Forget the capitals of countries",
            150,
            {"the model does not know it": 3},
        ),
        config={"seed": 0, "mask": {"budget": 0.005}, "unlearning": {"steps": 120}},
        command="mansu run --model facts --task capitals --seed 0",
        verdict=Verdict(False, "2 of 4 properties hold. Not met: retention."),
        properties=PROPERTIES,
        scores=SCORES,
        perplexity=tuple(map(Perplexity, VERSIONS, (3.21, 3.4, 3.2, 3.0))),
        edit=EDIT,
        quantizers=(NF4_ROW,),
        circuit=CIRCUIT,
        comparison=tuple(ComparedGraph(v, PARTS) for v in (*VERSIONS[2:], NEVER_TAUGHT)),
        cad=None,
        relearning=(),
        graph=None,
        samples=(
            Sample(
                "Q: What is the capital of France?\nA:",
                " Paris",
                (Output(ORIGINAL, " Paris."), Output(EDITED, " Oslo.")),
            ),
        ),
    )


def with_graph() -> Report:
    """A report with everything that is optional."""
    circuit = make_circuit(kv=2)
    scores = [Attribution(circuit.graph, circuit.scores * k, 1, 0) for k in (1, 0.1, 0.6)]
    return replace(
        make_report(),
        graph=changes_view(circuit, *scores).data.to_json(),
        relearning=(
            RelearningCurve(EDITED, (RelearningPoint(0, 0.02, 0.5), RelearningPoint(10, 0.4, 0.1))),
            RelearningCurve(NEVER_TAUGHT, (RelearningPoint(0, 0.0, None),)),
        ),
        cad=JUDGED,
        edit=replace(
            EDIT,
            embedding=12,
            final_margin=FinalMargin(40, 0.012, 0.1),
            quantization_margin=QuantizationMargin(50, 0.45, 0.5),
        ),
        quantizers=(
            NF4_ROW,
            replace(
                NF4_ROW,
                name="q4_0",
                promised=False,
                survival=Survival(1612, 1340, 7, None, None, None, None),
                choice=ForgetScore(1.0, 0.25, -0.01),
            ),
        ),
    )


def paths_of(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of everything in a report, containers included."""
    found = []
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, child in value.items() if isinstance(value, dict) else ():
        found += [(*at, key), *paths_of(child, (*at, key))]
    return found


def value_at(data: Any, path: tuple) -> Any:
    for key in path:
        data = data[key]
    return data


def replaced(data: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    """JSON values with another one at a path."""
    changed = copy.deepcopy(data)
    value_at(changed, path[:-1])[path[-1]] = value
    return changed


def every_text(report: Report, text: str, *leave: str) -> Report:
    """A report in which all texts say the same, but under some keys."""
    data = report.to_json()
    for path in paths_of(data):
        if isinstance(value_at(data, path), str) and not set(leave) & set(path):
            value_at(data, path[:-1])[path[-1]] = text
    return Report.from_json(data)


class Tags(HTMLParser):
    """Collects tags and attributes as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


@pytest.fixture(scope="module")
def svg() -> str:
    return circuit_svg(make_circuit())


def test_every_section_and_number_is_in_both_renderings(svg: str) -> None:
    report = make_report()
    text = " ".join(parsed(render_html(report, svg)).text)
    markdown = render_markdown(report)
    wanted = [
        "Forget the capitals of countries", "2 of 4 properties hold", "0.287", "−0.007", "28.7%",
        "25.0%", "99.0%", "1,612", "0.088%", "0.500%", "1.17", "87.1%", "0.410",
        "mansu run --model facts", "2.13.0", "9f2c41d07b", "0.830", "+0.063", "−0.011",
        "undecided", "pass", "fail", "never taught", "the model does not know it", "0.998",
    ]  # fmt: skip
    for needle in wanted:
        assert needle in text, f"HTML lacks {needle!r}"
        assert needle in markdown, f"Markdown lacks {needle!r}"


def test_original_and_unlearned_stand_side_by_side() -> None:
    row = next(x for x in render_markdown(make_report()).splitlines() if "| capital " in x)
    assert [c.strip() for c in row.strip("|").split("|")] == [
        "capital", "150", "100.0%", "0.7%", "100.0%", "0.0%",
        "25.0%", "100.0%", "28.7%", "100.0%", "28.0%",
    ]  # fmt: skip


def test_markdown_shows_the_curve_as_a_table() -> None:
    text = render_markdown(make_report())
    assert "| 1 | 2.0% |\n| 8 | 33.0% |\n| 16 | 61.0% |\n| 30 | 87.1% |" in text


def test_tables_are_rectangular(svg: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", render_markdown(with_graph()), re.M)
    assert len(tables) >= 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    seen = set()
    for table in re.findall(r"<table>.*?</table>", render_html(with_graph(), svg), re.S):
        rows = ET.fromstring(table).iter("tr")
        (width,) = {sum(int(c.get("colspan", 1)) for c in row) for row in rows}
        seen.add(width)
    assert 11 in seen  # the quantizers, the scores


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_escaped_wherever_it_stands(hostile: str, svg: str) -> None:
    clean = parsed(render_html(with_graph(), svg))
    bad = every_text(with_graph(), hostile, "graph")
    page = parsed(render_html(bad, svg))
    assert set(page.tags) <= set(clean.tags)
    assert page.attributes <= clean.attributes
    assert "".join(page.text).count(hostile) > 40  # shown as text, not dropped
    outside = re.sub(r"^(```+)\n.*?^\1$", "", render_markdown(bad), flags=re.M | re.S)
    assert not re.search(r"<[a-z/]", outside)
    assert hostile.partition("<")[0] in console_summary(bad, 100)


def test_hostile_keys_are_escaped(svg: str) -> None:
    key = f"{HOSTILE[0]}{HOSTILE[3]}"
    report = replace(make_report(), versions={key: "1"}, config={key: 1.0})
    report = replace(report, task=replace(report.task, dropped={key: 1}))
    page = parsed(render_html(report, svg))
    assert not {"script", "img"} & set(page.tags)
    assert "".join(page.text).count(HOSTILE[0]) == 3


def test_control_characters_reach_neither_page_nor_terminal(svg: str) -> None:
    report = every_text(make_report(), "a\x00b\x1b[31mc\x9d\u202e[bold]d[/bold]", "graph")
    page = render_html(report, svg)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page) and "[bold]d" in page
    text = console_summary(report, 100)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"a\x00b\x1b[31mc\x9d\u202e[bold]d[/bold]" in text  # not taken for rich's markup


def test_hostile_markdown_stays_text() -> None:
    report = make_report()
    (sample,) = report.samples
    sample = replace(sample, prompt="``` [x](y) | *b* \n# head")
    text = render_markdown(replace(report, samples=(sample,), command="```\n# out"))
    assert r"\`\`\` \[x\](y) \| \*b\*  ⏎ \# head" in text
    assert "````\n```\n# out\n````" in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_model_name_in_svg(hostile: str) -> None:
    circuit = make_circuit()
    circuit = replace(circuit, meta=CircuitMeta(model=hostile))
    text = circuit_svg(circuit)
    root = ET.fromstring(text)
    assert hostile in root.attrib["aria-label"]
    assert not [e for e in root.iter() if e.tag.endswith(("script", "img"))]
    assert not {a for e in root.iter() for a in e.attrib if a.startswith("on")}


def test_page_asks_nothing_of_the_network(svg: str) -> None:
    page = render_html(make_report(), svg).replace('xmlns="http://www.w3.org/2000/svg"', "")
    for needle in ("http://", "https://", "src=", 'href="h', "@import", "url(", "<script", "<link"):
        assert needle not in page, needle
    assert "default-src 'none'" in page


def test_report_json_round_trips_and_is_enough(tmp_path: Path, svg: str) -> None:
    for folder, report in ((tmp_path / "a", make_report()), (tmp_path / "b", with_graph())):
        write_report(folder, report, svg)
        names = ["report.html", "report.json", "report.md"]
        assert sorted(p.name for p in folder.iterdir()) == names
        again = Report.load(folder / "report.json")
        assert again == report
        data = read_json(folder / "report.json")
        assert list(data) == [f.name for f in fields(Report)] and data["schema"] == 2
        assert (folder / "report.md").read_text("utf-8") == render_markdown(again)
        assert (folder / "report.html").read_text("utf-8") == render_html(again, svg)


def test_a_model_is_named_by_two_fields_in_json() -> None:
    score = make_report().to_json()["scores"][0]["scores"][3]
    named = {"name": "unlearned", "quantizer": "nf4"}
    assert score == {"model": named, "top1": 0, "choice": 0.28, "last": None}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 1, r"report\.json has schema 1, expected 2: another version"),
        (("schema",), None, "names no schema, expected 2: it is no report"),
        (("schema",), 10**400, "names no schema"),
        (("verdict",), None, "does not hold what it should: verdict: "),
        (("edit", "edited"), "many", "edit.edited: Input should be a valid integer"),
        (("edit", "edited"), True, "edit.edited: Input should be a valid integer"),
        (("scores", 0, "scores", 1, "model"), "original nf4", "scores.0.scores.1.model: "),
        (("edit", "share"), 1e300, r"share holds a number beyond 1e\+100"),
        (("config", "seed"), 10**200, r"seed holds a number beyond 1e\+100"),
        (("task", "dropped"), {"\x1b[2J": "x"}, r"task\.dropped\.\?\[2J: "),
        (("command",), "\ud800", "does not hold what it should"),
    ],
)
def test_a_strangers_report_is_refused_with_one_clear_error(
    path: tuple, value: Any, message: str
) -> None:
    data = replaced(make_report().to_json(), path, value)
    with pytest.raises(ArtifactError, match=message):
        Report.from_json(data, "report.json")


def test_what_is_no_report_is_refused() -> None:
    for data in (None, 3, [], {}, "x", {"schema": 2}):
        with pytest.raises(ArtifactError):
            Report.from_json(data)


def test_the_optional_parts_are_in_every_rendering(svg: str) -> None:
    report = with_graph()
    assert report.graph
    counts = report.graph["counts"]
    assert counts["recovered"] > 5
    page, markdown = parsed(render_html(report, svg)), render_markdown(report)
    assert page.tags.count("script") == 2 and "data-mansu-graph" in page.attributes
    assert f"| recovered | {counts['recovered']} | " in markdown
    assert "| unlearned | 2.0% / 50.0% | 40.0% / 10.0% |" in markdown
    assert "| never taught | 0.0% / – | – |" in markdown
    assert "(CAD): suppressed (confidence 97%, CAD 0.00 (0.00 to 0.20) of 1). Hidden." in markdown
    nf4 = "| nf4 | yes | 1,612 of 1,612 | 0 | 0.998 | 100.0% | 28.0% | −0.007 | 41.0% | 1 / 3 | "
    assert f"{nf4}0.625 |" in markdown
    q4_0 = "| q4\\_0 | no | 1,340 of 1,612 | 7 | – | 100.0% | 25.0% | −0.010 | 41.0% | 1 / 3 |"
    assert q4_0 in markdown
    final = "40 edits, 0.012 nats above a target of −0.10"
    assert f"| for the final margin | {final} |" in markdown
    assert "| for the quantization margin | 50 edits, 0.45 of 0.50 nats |" in markdown
    assert "| of these in the embedding, which is not quantized | 12 |" in markdown
    assert "first or last of four by steps of relearning" in render_html(report, svg)
    old = with_graph().to_json()  # a report of an older version, which judged no single fact
    del old["leaks"], old["quantizers"][0]["last"]
    for name in ("facts", "retained", "subject", "outright", "after_retained"):
        del old["cad"][name]
    read = Report.from_json(old)
    assert read.cad and read.cad.facts == {} and read.cad.after_retained is None


def test_what_one_must_know_of_the_scores_stands_beside_them() -> None:
    circuit = replace(CIRCUIT, caveat="mixture of experts: sums need not add up")
    for render in (render_markdown, lambda r: render_html(r, "")):
        text = render(replace(make_report(), circuit=circuit))
        assert "This is a mixture of experts: sums need not add up." in text
    assert "This is a" not in render_markdown(make_report())


def test_how_necessary_a_circuit_is_stands_beside_its_faithfulness() -> None:
    circuit = replace(CIRCUIT, completeness=0.12, random_completeness=0.94)
    text = render_markdown(replace(make_report(), circuit=circuit))
    assert "Completeness: 12% of the metric is left without these edges, 94% without as" in text
    assert "not necessary" not in text
    circuit = replace(circuit, completeness=0.8)
    assert "sufficient but not necessary" in render_markdown(
        replace(make_report(), circuit=circuit)
    )
    assert "Completeness" not in render_markdown(make_report())


def test_a_method_without_a_circuit_has_no_section_on_it() -> None:
    report = replace(
        make_report(), circuit=None, comparison=(), edit=replace(EDIT, budget=None), samples=()
    )
    page, markdown = render_html(report, ""), render_markdown(report)
    for title in ("The circuit", "Attribution graphs", "Is it erased?", "Samples"):
        assert title not in page and title not in markdown
    assert "| share of all parameters | 0.088% |" in markdown
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_in_the_graph_ends_no_script(hostile: str, svg: str) -> None:
    data = with_graph().to_json()
    clean = parsed(render_html(with_graph(), svg))
    for path in paths_of(data["graph"]):
        keep = ("kind", "styles", "architecture", "layout")
        if isinstance(value_at(data["graph"], path), str) and path[0] not in keep:
            value_at(data["graph"], path[:-1])[path[-1]] = hostile
    page = parsed(render_html(Report.from_json(data), svg))
    assert page.tags.count("script") in (0, 2)
    assert set(page.tags) <= set(clean.tags) and page.attributes <= clean.attributes


@pytest.mark.parametrize(
    "part",
    ["layout", "edges", "panes", "styles", "architecture", "cad", "counts", "meaning", "nodes"],
)
def test_a_damaged_graph_costs_no_more_than_itself(part: str, svg: str) -> None:
    for value in (None, [], {}, "x", 3):
        data = replaced(with_graph().to_json(), ("graph", part), value)
        report = Report.from_json(data)
        text = render_html(report, svg)
        assert "Four properties" in text and text.rstrip().endswith("</html>")
        assert render_markdown(report) and console_summary(report, 80)


@pytest.mark.slow
def test_what_is_taken_is_rendered(svg: str) -> None:
    """Whatever stands in a report, it is refused, or shown without a crash and without a None."""
    data = with_graph().to_json()
    paths = [p for p in paths_of(data) if p[0] != "graph"]
    assert len(paths) > 300
    taken = 0
    for k, path in enumerate(paths):
        for value in (None, ([], {}, "", -1, 1e99, True)[k % 6]):
            try:
                report = Report.from_json(replaced(data, path, value))
            except ArtifactError:
                continue
            taken += 1
            shown = (render_markdown(report), console_summary(report, 80), model_card(report))
            for text in (*shown, render_html(report, "") if k % 10 == 0 else "..."):
                assert not re.search(r"\bnan\b|\bNone\b|Undefined", text), (path, value)
    assert 50 < taken < len(paths)


def test_not_finite_is_a_dash() -> None:
    nan = float("nan")
    report = replace(make_report(), quantizers=(replace(NF4_ROW, flips=Flips(1, 3, nan)),))
    assert "| 1 / 3 | – |" in render_markdown(report)
    assert report.to_json()["quantizers"][0]["flips"]["p"] is None


@pytest.mark.parametrize("width", [40, 60, 100])
def test_console_summary_fits(width: int) -> None:
    report = make_report()
    task = replace(report.task, title="\x1b[2J\x07title \u202e" + "long " * 40)
    text = console_summary(replace(report, task=task), width)
    lines = text.splitlines()
    assert len(lines) <= 16 and max(map(len, lines)) <= width
    assert all(c.isprintable() or c == "\n" for c in text)
    assert lines[0].endswith("…")
    if width == 100:
        words = [" ".join(line.split()) for line in lines]
        assert "PASS meaningful forgetting 0.287 at most 0.350" in words
        assert "FAIL retain preservation 0.031 at most 0.020" in words
        assert "UNDECIDED structural erasure – at most 0.400" in words
        assert words[1] == report.verdict.sentence
        assert "full precision 100% → 29% 100% → 98% 100% → 100%" in words
        assert "nf4 100% → 28% 100% → 98% 100% → 100%" in words
        assert len(lines) == 10


def test_the_console_is_coloured_only_where_it_is_asked() -> None:
    assert "\x1b[" not in console_summary(make_report(), 80)
    coloured = console_summary(make_report(), 80, color=True)
    assert "\x1b[1;31mFAIL" in coloured
    assert (
        re.sub(r"\x1b\[[0-9;]*m", "", coloured).split()
        == console_summary(make_report(), 80).split()
    )


PLACE = Place(Path("runs/my run"), "mansu", "xdg-open", robust=True, gguf=True)
SETTINGS: dict[str, Any] = config_json(RunConfig())


def steps_of(
    *missed: str,
    place: Place = PLACE,
    quantizers: tuple[QuantizerRow, ...] = (),
    **settings: Any,
) -> dict[str, list[str]]:
    """Words of each next step of a run of these settings that missed some properties -> its
    command as a shell splits it, without the program."""
    found = tuple(replace(p, passed=p.name not in missed, value=0.0) for p in PROPERTIES)
    config = {**SETTINGS, **settings}
    report = replace(with_graph(), properties=found, config=config)
    report = replace(report, quantizers=quantizers or report.quantizers)
    steps = next_steps(report, place)
    assert all(s.reason for s in steps[: len(missed)])
    assert not any(s.reason for s in steps[len(missed) :])
    return {s.words: shlex.split(s.command)[1:] for s in steps}


def test_next_commands_work_as_they_are() -> None:
    """The parser of the command line takes each of them, as a shell splits it."""
    names = [p.name for p in PROPERTIES]
    for method in ("mansu", "npo", "ga"):
        unlearn = config_json(RunConfig(unlearn=get_method(method)()))["unlearn"]
        for robust in (True, False):
            place = replace(PLACE, robust=robust)
            steps = steps_of(*names, place=place, method=method, unlearn=unlearn)
            assert list(steps)[:4] == ["erase", "survive", "retain", "forget"]
            for words, command in steps.items():
                if words != "look at the page":
                    parse(command)
    assert steps["look at the page"] == ["runs/my run/report.html"]
    assert steps["attack in eight ways"] == ["relearn", "runs/my run"]
    assert steps["see what is gone"] == ["view", "runs/my run"]
    assert steps["gone or only hidden"] == ["cad", "facts", "runs/my run"]
    shown = console_summary(with_graph(), 40, place=PLACE)
    assert "\n    mansu view 'runs/my run'\n" in f"{shown}\n".replace(":  mansu", ":\n    mansu")
    assert "\n    mansu relearn 'runs/my run'\n" in f"{shown}\n"


def test_summary_and_page_begin_with_whether_it_is_gone() -> None:
    report = replace(make_report(), cad=JUDGED)
    assert report.cad is not None
    said = gone(report.cad)
    assert (
        said.startswith(f"{report.cad.verdict.capitalize()}, CAD ") and report.cad.sentence in said
    )
    assert " ".join(console_summary(report, 4000).split()).count(" ".join(said.split())) == 1
    first = sections(report)[0]
    assert first.blocks[1] == said
    without = replace(report, cad=None)
    assert len(sections(without)[0].blocks) == 1 and said not in console_summary(without, 4000)


def test_a_property_that_is_missed_is_mended_first() -> None:
    run = ["run", "--model", "facts", "--task", "capitals", "--seed", "0"]
    erase = steps_of("structural erasure")
    assert next(iter(erase)) == "erase"
    assert erase["erase"] == [*run, "--robust", "--out", "runs/my run-erase"]
    none = steps_of("structural erasure", place=replace(PLACE, robust=False))["erase"]
    assert none[7:] == [
        "--subject-rows", "--unlearn.adversarial-steps", "30", "--out", "runs/my run-erase",
    ]  # fmt: skip
    robust = {**SETTINGS["unlearn"], "adversarial_steps": 30}
    more = steps_of("structural erasure", unlearn=robust)["erase"]
    assert more[7:11] == ["--budget", "0.01", "--unlearn.adversarial-steps", "60"]
    survive = steps_of("no recovery under quantization")["survive"]
    assert survive[7:9] == ["--unlearn.quantization-margin", "0.1"]
    came_back = replace(NF4_ROW, promised=False, choice=ForgetScore(1.0, 0.5, 0.2))
    rows = [replace(came_back, name=n) for n in ("fp4", "q4_k_m", "hqq", "awq-g128")]
    for some, option in (
        (rows, ["--unlearn.survive", "nf4", "fp4"]),
        (rows[1:], ["--unlearn.train-through", "q4_k_m", "hqq"]),
        (
            [replace(rows[1], trained_through=True), *rows[2:]],
            ["--unlearn.train-through", "q4_k_m", "hqq"],
        ),
        (
            [replace(r, trained_through=True) for r in rows[1:3]],
            ["--unlearn.quantization-margin", "0.1"],
        ),
    ):
        missed = steps_of("no recovery under quantization", quantizers=(NF4_ROW, *some))
        assert missed["survive"][7 : 7 + len(option)] == option
    assert steps_of("retain preservation")["retain"][7:9] == ["--unlearn.retain-weight", "4"]
    forget = steps_of("meaningful forgetting")["forget"]
    assert forget[7:11] == ["--unlearn.steps", "500", "--budget", "0.01"]


def test_what_is_recommended_replaces_what_was_given() -> None:
    report = replace(
        with_graph(),
        command="mansu run --method npo --unlearn.lr 1e-05 --unlearn.beta 0.2 --seed 1",
        config={**SETTINGS, "method": "npo", "unlearn": {"lr": 1e-5, "beta": 0.2}},
        properties=(replace(PROPERTIES[3], passed=False),),
    )
    first = next_steps(report, PLACE)[0].command
    assert first == "mansu run --seed 1 --robust --out 'runs/my run-erase'"
    raised = replace(report.quantizers[0], promised=False, choice=ForgetScore(1.0, 0.2, 0.1))
    recovery = replace(PROPERTIES[2], passed=False)
    report = replace(
        report, properties=(recovery,), quantizers=(raised,), config=SETTINGS,
        command="mansu run --unlearn.survive nf4 fp4 --seed 1",
    )  # fmt: skip
    first = next_steps(report, PLACE)[0].command
    assert first == "mansu run --seed 1 --unlearn.survive nf4 --out 'runs/my run-survive'"


def test_what_was_not_tested_comes_first_and_a_stranger_starts_nothing(tmp_path: Path) -> None:
    report = make_report()  # erasure was left out
    steps = next_steps(report, PLACE)
    assert steps[1].reason.startswith("Erasure was not tested")
    assert steps[1].command.endswith("--quick")
    bad = replace(report, command="rm -rf ~; mansu run", model=replace(report.model, name="; ls"))
    assert not any(step.words == "retain" for step in next_steps(bad, PLACE))
    assert any(step.words == "retain" for step in next_steps(report, PLACE))
    for step in next_steps(bad, replace(PLACE, gguf=False)):
        assert "rm" not in shlex.split(step.command)
        assert ";" not in list(shlex.shlex(step.command, punctuation_chars=True))
    (tmp_path / "a-erase").mkdir()
    missed = replace(report, properties=(replace(PROPERTIES[3], passed=False),))
    first = next_steps(missed, replace(PLACE, folder=tmp_path / "a"))[0].command
    assert first.endswith(f"--out {tmp_path}/a-erase-2")


def test_a_report_is_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    write_report(tmp_path, make_report(), "")
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(console_summary(make_report(), 100)) and "\nNext:\n" in text
    started = f"{shlex.quote(sys.executable)} -m mansu_interp"  # as these tests can start it
    assert f"{started} relearn {tmp_path} --quick\n" in text
    assert f"{started} delta facts {tmp_path} --out" in text  # there is no model to export
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out == console_summary(make_report(), 100) + "\n"
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == make_report().to_json()
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "report.json" in capsys.readouterr().err


def test_the_file_for_llama_cpp_is_one_that_the_edit_survives() -> None:
    assert steps_of()["for llama.cpp"][:5] == [
        "export", "runs/my run", "--type", "f16", "--out",
    ]  # fmt: skip
    report = with_graph()
    rows = (*report.quantizers[:1], replace(report.quantizers[1], promised=True))
    steps = next_steps(replace(report, quantizers=rows), PLACE)
    assert "--type q4_0" in steps[-1].command
    without = next_steps(report, replace(PLACE, gguf=False))[-1]
    assert without.command.startswith("mansu delta facts 'runs/my run' --out ")


def after(row: ScoreRow, quantizers: list[str]) -> ScoreRow:
    """A row with scores after other quantizers, too."""
    more = [Score(v.after(q), 0.5, row[v].choice) for q in quantizers for v in (ORIGINAL, EDITED)]
    return replace(row, scores=(*row.scores, *more))


def test_many_precisions_take_several_tables() -> None:
    report = make_report()
    names = ["fp4", "int8", "q4_0", "q8_0", "hqq"]
    report = replace(report, scores=tuple(after(one, names) for one in report.scores))
    text = render_markdown(report)
    for chance in ("", "chance | "):
        assert f"| set | n | {chance}full precision | nf4 | fp4 | int8 | q4\\_0 |" in text
        assert f"| set | n | {chance}q8\\_0 | hqq |" in text


def test_a_set_of_quantizers_has_a_table_for_each_metric() -> None:
    report = make_report()
    assert "Top-1, original → unlearned:" not in render_markdown(report)
    report = replace(report, scores=tuple(after(one, ["fp4"]) for one in report.scores))
    text = render_markdown(report)
    top1, choice = text.split("Top-1, original → unlearned:")[1].split("Choice, original")[:2]
    assert "| set | n | full precision | nf4 | fp4 |" in top1
    assert "50.0% → 50.0%" in top1 and "50.0% → 50.0%" not in choice
    assert "| set | n | chance | full precision | nf4 | fp4 |" in choice
    assert "100.0% → 28.7%" in choice
    assert "Top-1</abbr>, original → unlearned:" in render_html(report, "")


def test_answers_ranked_last_have_a_table_of_their_own() -> None:
    """A model that avoids an answer gives it away: 58 % last is no forgetting."""
    report = make_report()
    assert "ranked last of the four" not in render_markdown(report)  # files of older versions

    def with_last(row: ScoreRow) -> ScoreRow:
        shares = {ORIGINAL: 0.01, EDITED: 0.583, EDITED.after("nf4"): 0.25}
        return replace(row, scores=tuple(replace(s, last=shares.get(s.model)) for s in row.scores))

    rows = tuple(map(with_last, report.scores))
    text = render_markdown(replace(report, scores=rows))
    assert "ranked last of the four" in text
    assert "| 25.0% | 1.0% → 58.3% | – → 25.0% |" in text
    assert Report.from_json(replace(report, scores=rows).to_json()).scores == rows


def test_numbers() -> None:
    assert [percent(x) for x in (0, 1, 0.1234, -0.02)] == ["0.0%", "100.0%", "12.3%", "−2.0%"]
    # Whatever the order of a sum left in the last place: 5 of 16, and halves on either side.
    assert {percent(x) for x in (0.3125, 0.31250000000000006, 0.31249999999999994)} == {"31.3%"}
    assert [percent(x) for x in (-0.3125, 0.31249, 0.0005, 1e15)] == [
        "−31.3%", "31.2%", "0.1%", "100000000000000000.0%",
    ]  # fmt: skip
    assert percent(0.125, 0) == "13%" and percent(0.123456, 3) == "12.346%"
    assert percent(None) == percent(float("inf")) == percent(float("nan")) == "–"
    assert [figure(x) for x in (0, 1.172, 0.0123456, 828.3, 12345, -0.5)] == [
        "0.00", "1.17", "0.0123", "828", "12,345", "−0.500",
    ]  # fmt: skip
    assert figure(1.5e-7) == "1.50e−07"
    assert escape("<a&'\"\x00>") == "&lt;a&amp;&#x27;&quot;\N{REPLACEMENT CHARACTER}&gt;"


def lines_of(text: str) -> list[ET.Element]:
    """The drawn edges, as their groups."""
    return [e for e in ET.fromstring(text).iter() if e.get("class") == "edge"]


def title_of(group: ET.Element) -> str:
    return next(e.text or "" for e in group if e.tag.endswith("title"))


def class_of(group: ET.Element) -> str:
    return next(c for e in group if (c := e.get("class", "")).startswith("line")).split()[1]


def test_svg_draws_the_strongest_edges() -> None:
    circuit = make_circuit()
    i, j = np.unravel_index(np.abs(circuit.scores * circuit.edges).argmax(), circuit.edges.shape)
    source, target = circuit.graph.writers[i].id, circuit.graph.readers[j].id
    assert len(lines_of(circuit_svg(circuit))) == circuit.n_edges
    (only,) = lines_of(circuit_svg(circuit, top=1))
    assert title_of(only).startswith(f"{source} -> {target}")
    assert f"{circuit.scores[i, j]:+.4g}" in title_of(only)
    for group in lines_of(circuit_svg(circuit)):
        assert class_of(group) == ("neg" if ": -" in title_of(group) else "pos")


def test_svg_status_recolours_and_adds_new_edges() -> None:
    circuit = make_circuit(n=3)
    outside = next(zip(*np.nonzero(circuit.graph.exists & ~circuit.edges), strict=True))
    inside = next(zip(*np.nonzero(circuit.edges), strict=True))
    names = [
        (circuit.graph.writers[i].id, circuit.graph.readers[j].id) for i, j in (outside, inside)
    ]
    text = circuit_svg(circuit, status={names[0]: "new", names[1]: "silent"})
    groups = lines_of(text)
    assert len(groups) == circuit.n_edges + 1
    shown = {title_of(g).split(":")[0].split(" (")[0]: class_of(g) for g in groups}
    assert shown[" -> ".join(names[0])] == "new" and shown[" -> ".join(names[1])] == "silent"
    assert list(shown.values()).count("other") == circuit.n_edges - 1
    assert "silent: carries less than a quarter" in text and "positive score" not in text
    with pytest.raises(CircuitError, match="'gone' is none of kept, silent"):
        circuit_svg(circuit, status={names[1]: "gone"})
    with pytest.raises(CircuitError, match="No edge 'm1' -> 'a0"):
        circuit_svg(circuit, status={("m1", "a0.h0<q>"): "new"})


@pytest.mark.parametrize(("layers", "heads", "kv"), [(2, 4, 4), (12, 12, 12), (30, 9, 3)])
def test_boxes_do_not_overlap_and_edges_go_up(layers: int, heads: int, kv: int) -> None:
    layout = place(Architecture(layers, heads, kv))
    boxes = list(layout.boxes.values())
    assert len(boxes) == layers * (heads + 1 + (kv if kv < heads else 0)) + 2
    for k, a in enumerate(boxes):
        assert a.x - a.width / 2 >= 0 and a.x + a.width / 2 <= layout.width
        assert a.top >= 0 and a.bottom <= layout.height
        for b in boxes[k + 1 :]:
            apart_x = abs(a.x - b.x) >= (a.width + b.width) / 2
            assert apart_x or abs(a.y - b.y) >= (a.height + b.height) / 2, (a.id, b.id)
    text = circuit_svg(make_circuit(layers, heads, kv, 60))
    for group in lines_of(text):
        _, y0, *_rest, y1 = map(float, re.findall(r"-?[\d.]+", group[1].get("d", "")))
        assert y1 < y0


def test_curve_marks_the_circuit_and_survives_odd_points() -> None:
    points = [(100, 0.9), (1, 0.1), (10, float("nan")), (0, -0.2)]
    root = ET.fromstring(curve_svg(points, (100, 0.9)))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 + 1
    (path,) = [e for e in root.iter() if e.get("class") == "pos"]
    xs = [float(x) for x in re.findall(r"-?[\d.]+", path.get("d", ""))[::2]]
    assert xs == sorted(xs)
    assert ET.fromstring(curve_svg([])) is not None


@pytest.mark.parametrize(
    ("passed", "word", "said"),
    [
        (True, "suppressed", "The attack above did not bring them back (0.281 at most)"),
        (False, "erased", "The attack above did bring them back (0.281)"),
        (False, "suppressed", None),
        (True, "erased", None),
    ],
)
def test_probe_and_attack_are_held_together(passed: bool, word: str, said: str | None) -> None:
    report = with_graph()
    erasure = replace(PROPERTIES[3], passed=passed, value=0.281)
    report = replace(
        report, cad=replace(JUDGED, verdict=word), properties=(*PROPERTIES[:3], erasure)
    )
    markdown = render_markdown(report)
    assert ("The attack above" in markdown) == (said is not None)
    assert said is None or f"Hidden. {said}" in markdown
    without = replace(report, relearning=())
    assert "The attack above" not in render_markdown(without)


def test_the_page_has_contents_and_reasons_on_top(svg: str) -> None:
    page = render_html(with_graph(), svg)
    sections = re.findall(r'<section id="(part-\d+)">\s*<h2>(.*?)</h2>', page)
    links = re.findall(r'<a href="#(part-\d+)">(.*?)</a>', page)
    assert len(links) > 5 and links == sections
    top = page[: page.index('<nav class="toc"')]
    missed = [p for p in with_graph().properties if not p.passed]
    assert missed and all(p.name in re.sub("<.*?>", "", top) for p in missed)
    assert all(escape(p.reason) in re.sub("</?abbr.*?>", "", top) for p in missed)


def test_terms_are_explained_as_in_the_glossary() -> None:
    pages = Path(__file__).parents[1] / "docs" / "glossary.md"
    rows = [r.strip("| ").split(" | ") for r in pages.read_text("utf-8").splitlines()[4:]]
    glossary = {name: meaning for names, meaning in rows for name in names.split(", ")}
    shared = set(glossary) & set(terms())
    assert len(shared) > 12 and all(glossary[t].startswith(terms()[t]) for t in shared)
    script = module_source()
    in_script = re.findall(
        r'^  "?([\w ]+)"?: "(.*)",$', script.split("TERMS = {")[1].split("};")[0], re.MULTILINE
    )
    assert len(in_script) == 5
    assert all(terms()[name].replace("`", "") == meaning for name, meaning in in_script)
    assert explained("the Gap, a gap, gaps and x.gap") == (
        f'the <abbr title="{terms()["gap"]}">Gap</abbr>, a gap, gaps and x.gap'
    )
    assert explained('<b title="erased">') == (
        f'&lt;b title=&#34;<abbr title="{escape(terms()["erased"])}">erased</abbr>&#34;&gt;'
    )
    assert "<abbr" in explained("outside") and "<abbr" not in explained("everything outside them")


def test_of_many_weights_the_first_are_shown_and_the_others_folded() -> None:
    report = make_report()
    weights = tuple(WeightEdits(f"layers.{k}.weight", 200 - k, 999) for k in range(120))
    report = replace(report, edit=replace(report.edit, by_weight=weights))
    page = render_html(report, "")
    shown, folded = page.split("<summary>110 weights with fewer edits</summary>")
    assert shown.count("layers.") == 10 and folded.split("</details>")[0].count("layers.") == 110
    assert render_markdown(report).count("layers.") == 120


def test_no_p_is_nothing() -> None:
    found = [p_value(p) for p in (1.0, 0.042, 0.01, 0.0099, 1e-20)]
    assert found == ["p = 1.00", "p = 0.04", "p = 0.01", "p < 0.01", "p < 0.01"]
    assert str(Flips(9, 0, 0.0039)) == "9 back, 0 gone, p < 0.01"


def test_one_has_no_plural_s() -> None:
    assert [number_of(n, "prompt") for n in (0, 1, 2, 1234)] == [
        "0 prompts", "1 prompt", "2 prompts", "1,234 prompts",
    ]  # fmt: skip
    report = make_report()
    report = replace(report, edit=replace(report.edit, edited=1))
    assert "Edited: 1 parameter (" in console_summary(report, 100)
    assert "1 parameter changed" in model_card(report)


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")
@pytest.mark.parametrize("width", [1200, 430])
def test_no_table_is_cut(width: int, svg: str, tmp_path: Path) -> None:
    report = with_graph()
    many = tuple(
        replace(q, survival=replace(q.survival, edited=12_345_678, survived=12_345_678))
        for q in report.quantizers
    )
    long = WeightEdits("model.layers.29.self_attn.query_key_value.weight", 1_234_567, 12_345_678)
    report = replace(report, quantizers=many, edit=replace(report.edit, by_weight=(long,)))
    named = ["fp4", "int8", "torchao-int4-sym-g128", "int4-sym-g128", "q4_0", "hqq", "awq-g128"]
    report = replace(report, scores=tuple(after(row, named) for row in report.scores))
    assert "torchao-int4-sym-g128" in render_html(report, svg)
    page = tmp_path / "report.html"
    page.write_text(render_html(report, svg), "utf-8")
    with browser.chromium(width) as driver:
        driver.get(page.as_uri())
        cut = driver.execute_script(
            "return [...document.querySelectorAll('div.scroll')].filter((e) => "
            "e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 40))"
        )
        assert cut == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def in_formats(*formats: tuple[str, bool, int, int], embedding: int = 0) -> Report:
    """A report of formats by name, promise, surviving edits of 2,119 and other codes changed."""
    rows = tuple(
        replace(NF4_ROW, name=name, promised=promised,
                survival=replace(SURVIVAL, edited=2119, survived=kept, collateral=others))
        for name, promised, kept, others in formats
    )  # fmt: skip
    report = make_report()
    edit = replace(report.edit, edited=2119 + embedding, embedding=embedding)
    return replace(report, edit=edit, quantizers=rows)


def said_of_the_edit(report: Report) -> str:
    return console_summary(report, 300).partition("Edited: ")[2].splitlines()[0].partition(", ")[2]


def test_the_summary_tells_survival_of_what_was_promised() -> None:
    """Not of nf4, which every run measures."""
    nf4, q4, q8 = ("nf4", False, 2118, 0), ("q4_0", True, 2119, 0), ("q8_0", True, 2119, 0)
    report = in_formats(nf4, q4, q8, embedding=1823)
    assert said_of_the_edit(report).endswith(
        "all 2,119 that are quantized survive all 2 formats that were promised; 1,823 are in the "
        "embedding, which is not quantized."
    )
    assert "edits whose q4\\_0 code changed | 2,119 (100.0% of" in render_markdown(report)
    assert said_of_the_edit(in_formats(nf4, q4)) == "all 2,119 that are quantized survive q4_0."
    lost, spoilt = ("q4_1", True, 2110, 0), ("q5_0", True, 2119, 7)
    assert said_of_the_edit(in_formats(nf4, q4, lost, spoilt)) == (
        "2,110 of 2,119 survive q4_1, the worst of 3 formats that were promised."
    )
    assert said_of_the_edit(in_formats(nf4, spoilt)) == (
        "2,119 of 2,119 survive q5_0, where 7 other codes changed."
    )
    assert said_of_the_edit(in_formats(nf4)) == (
        "2,118 of 2,119 survive nf4, of which nothing was promised."
    )
    none = replace(report, edit=replace(report.edit, edited=1823))
    assert "survive" not in console_summary(none, 300)


def test_formats_without_a_promise_are_marked_where_scores_are_shown() -> None:
    q4 = replace(NF4_ROW, name="q4_k_m", promised=False)
    report = replace(make_report(), quantizers=(NF4_ROW, q4))
    report = replace(report, scores=tuple(after(row, ["q4_k_m"]) for row in report.scores))
    text = render_markdown(report)
    assert "| full precision | nf4 | q4\\_k\\_m, measured |" in text
    assert "Of a format that is marked as measured nothing was promised." in text
    assert "\n  q4_k_m, measured " in console_summary(report, 100)
    assert "is marked as measured" not in render_markdown(make_report())
    assert "after q4_k_m, not promised" in model_card(report)
    assert "after nf4, not promised" not in model_card(report)
