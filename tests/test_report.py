"""The report and its pictures: complete, escaped, self-contained, and never stopped by a null."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mansu_interp.circuits.attribution import Attribution
from mansu_interp.circuits.circuit import Circuit, CircuitMeta
from mansu_interp.errors import CircuitError
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.report.__init__ import write_report
from mansu_interp.report.html import render_html
from mansu_interp.report.markdown import render_markdown
from mansu_interp.report.terminal import console_summary
from mansu_interp.report.values import figure, percent
from mansu_interp.utils.files import read_json
from mansu_interp.viz.layout import place
from mansu_interp.viz.svg import circuit_svg, curve_svg, escape
from mansu_interp.viz.view import changes_view

HOSTILE = ["<script>alert(1)</script>", '"onmouseover="alert(2)', "</svg>", "</td><img src=x>"]
MODELS = ("original", "original nf4", "unlearned", "unlearned nf4")


def make_circuit(layers: int = 2, heads: int = 4, kv: int = 4, n: int = 30) -> Circuit:
    """The n strongest of random edges; not pruned, which a picture does not need."""
    graph = Graph(Architecture(layers, heads, kv))
    rng = np.random.default_rng(0)
    scores = rng.standard_t(2, graph.exists.shape) * graph.exists * 0.05
    scores[:, -1] *= 4
    scores[0] *= 2
    edges = np.abs(scores) >= np.sort(np.abs(scores[graph.exists]))[-n]
    return Circuit(graph, scores, edges & graph.exists, CircuitMeta("facts"))


def make_report() -> dict[str, Any]:
    """What a run of the embedded model writes, shortened."""

    def scores(role: str, label: str, top1: list[float], choice: list[float]) -> dict[str, Any]:
        models = {m: {"top1": t, "choice": c} for m, t, c in zip(MODELS, top1, choice, strict=True)}
        return {"role": role, "label": label, "n": 150, "chance": 0.25, "models": models}

    def prop(name: str, passed: bool | None, value: float, target: float, unit: str) -> dict:
        return {
            "name": name,
            "passed": passed,
            "value": value,
            "target": target,
            "margin": target - value,
            "unit": unit,
            "sentence": f"A sentence on {name}, from 1.000 to {value:.3f} at worst.",
        }

    parts = {"mass": 0.12, "projection": 0.031, "alignment": 0.41, "outside": 0.22}
    return {
        "schema": 1,
        "versions": {"mansu_interp": "0.1.0", "torch": "2.13.0", "transformer-lens": "4.3.0"},
        "model": {
            "name": "facts",
            "sha256": "9f2c41d07b" * 6 + "abcd",
            "parameters": 1_836_288,
            "dtype": "bfloat16",
        },
        "task": {
            "name": "capitals",
            "title": "Forget the capitals of countries",
            "forget_facts": 150,
            "dropped": {"the model does not know it": 3},
        },
        "config": {"seed": 0, "mask": {"budget": 0.005}, "unlearning": {"steps": 120}},
        "command": "mansu run --model facts --task capitals --seed 0",
        "verdict": {"passed": False, "sentence": "3 of 4 properties hold; undecided: erasure."},
        "properties": [
            prop("meaningful forgetting", True, 0.287, 0.35, "four-way accuracy, worst unseen set"),
            prop("retain preservation", False, 0.031, 0.02, "largest fall of a retain score"),
            prop("no recovery under quantization", True, -0.007, 0.0, "nf4 minus full precision"),
            prop("structural erasure", None, 0.41, 0.25, "alignment with the original circuit"),
        ],
        "scores": [
            scores("forget", "capital", [1, 1, 0.007, 0], [1, 1, 0.287, 0.28]),
            scores("neighbour", "largest city", [1, 0.99, 0.96, 0.95], [1, 1, 0.98, 0.98]),
            scores("retain", "currency", [1, 1, 0.99, 0.99], [1, 1, 1, 1]),
            scores("retain", "language", [0.987, 0.98, 0.98, 0.973], [1, 1, 1, 1]),
        ],
        "perplexity": {"original": 3.21, "original nf4": 3.4, "unlearned": 3.2, "unlearned nf4": 3},
        "edit": {
            "edited": 1612,
            "share": 0.000878,
            "budget": 0.005,
            "survived": 1612,
            "collateral": 0,
            "update_over_bin": 1.17,
            "projection": 0.998,
            "by_weight": [
                {"weight": "model.layers.1.mlp.down_proj.weight", "edited": 1200, "of": 98304},
                {"weight": "model.layers.0.self_attn.v_proj.weight", "edited": 412, "of": 16384},
            ],
        },
        "circuit": {
            "edges": 30,
            "of": 231,
            "faithfulness": 0.871,
            "curve": [[231, 1.0], [1, 0.02], [16, 0.61], [30, 0.871], [8, 0.33], [64, 0.96]],
            "top_edges": [
                {"source": "input", "target": "a0.h1<v>", "score": 0.83},
                {"source": "m1", "target": "logits", "score": -0.41},
            ],
        },
        "cad": {
            "verdict": "undecided",
            "confidence": None,
            "sentence": "What is left flows partly along the old circuit.",
            "models": {"unlearned": parts, "unlearned nf4": parts, "twin (never taught)": parts},
        },
        "samples": [
            {
                "prompt": "Q: What is the capital of France?\nA:",
                "answer": " Paris",
                "original": " Paris.",
                "unlearned": " Oslo.",
                "unlearned nf4": " Oslo.",
            }
        ],
    }


def paths_of(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of everything in a report, containers included."""
    found = []
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, child in value.items() if isinstance(value, dict) else ():
        found += [(*at, key), *paths_of(child, (*at, key))]
    return found


def value_at(report: Any, path: tuple) -> Any:
    for key in path:
        report = report[key]
    return report


def replaced(report: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    parent: Any = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return changed


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
        "Forget the capitals of countries", "3 of 4 properties hold", "0.287", "−0.007", "28.7%",
        "25.0%", "99.0%", "1,612", "0.088%", "0.500%", "1.17", "87.1%", "not calibrated", "0.410",
        "mansu run --model facts", "2.13.0", "9f2c41d07b", "0.830",
        "undecided", "pass", "fail", "twin (never taught)", "the model does not know it",
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
    tables = re.findall(r"(?:^\|.*\n)+", render_markdown(make_report()), re.M)
    assert len(tables) >= 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    seen = set()
    for table in re.findall(r"<table>.*?</table>", render_html(make_report(), svg)):
        rows = ET.fromstring(table).iter("tr")
        (width,) = {sum(int(c.get("colspan", 1)) for c in row) for row in rows}
        seen.add(width)
    assert 11 in seen  # the scores


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_escaped_wherever_it_stands(hostile: str, svg: str) -> None:
    report = make_report()
    clean = parsed(render_html(report, svg))
    bad = report
    for path in paths_of(report):
        if isinstance(value_at(report, path), str):
            bad = replaced(bad, path, hostile)
    page = parsed(render_html(bad, svg))
    assert set(page.tags) <= set(clean.tags)
    assert page.attributes <= clean.attributes
    assert "".join(page.text).count(hostile) > 40  # shown as text, not dropped
    outside = re.sub(r"^(```+)\n.*?^\1$", "", render_markdown(bad), flags=re.M | re.S)
    assert not re.search(r"<[a-z/]", outside)


def test_hostile_keys_are_escaped(svg: str) -> None:
    report = make_report()
    for section in ("versions", "config", "perplexity"):
        report[section] = {f"{HOSTILE[0]}{HOSTILE[3]}": 1.0}
    report["scores"][0]["models"] = {HOSTILE[0]: {HOSTILE[3]: 0.5}}
    page = parsed(render_html(report, svg))
    assert not {"script", "img"} & set(page.tags)


def test_hostile_markdown_stays_text() -> None:
    prompt = "``` [x](y) | *b* \n# head"
    report = replaced(make_report(), ("samples", 0, "prompt"), prompt)
    report["command"] = "```\n# out"
    text = render_markdown(report)
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
    for needle in ("http://", "https://", "src=", "href=", "@import", "url(", "<script", "<link"):
        assert needle not in page, needle
    assert "default-src 'none'" in page


def test_report_json_round_trips_and_is_enough(tmp_path: Path, svg: str) -> None:
    report = make_report()
    write_report(tmp_path, report, svg)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    again = read_json(tmp_path / "report.json")
    assert again == report and list(again) == list(report)
    assert (tmp_path / "report.md").read_text("utf-8") == render_markdown(again)
    assert (tmp_path / "report.html").read_text("utf-8") == render_html(again, svg)


def with_graph() -> dict[str, Any]:
    """A report with everything that is optional."""
    report, circuit = make_report(), make_circuit(kv=2)
    scores = [Attribution(circuit.graph, circuit.scores * k, 1, 0) for k in (1, 0.1, 0.6)]
    report["graph"] = changes_view(circuit, *scores).data.to_json()
    report["relearning"] = {"unlearned": [[10, 0.4], [0, 0.02]], "never taught": [[0, 0.0]]}
    report["erasure"] = {
        "verdict": "suppressed",
        "sentence": "Hidden.",
        "confidence": 0.97,
        "cad": 0,
    }
    report["quantizers"] = [
        {"name": "nf4", "promised": True, "edited": 1612, "survived": 1612, "collateral": 0},
        {
            "name": "q4_0",
            "promised": False,
            "edited": 1612,
            "survived": 1340,
            "collateral": 7,
            "choice": {"original": 1.0, "unlearned": 0.25, "gap": -0.01},
            "flips": {"back": 1, "gone": 3, "p": 0.625},
        },
    ]
    return report


def test_the_optional_parts_are_in_every_rendering(svg: str) -> None:
    report = with_graph()
    counts = report["graph"]["counts"]
    assert counts["recovered"] > 5
    page, markdown = parsed(render_html(report, svg)), render_markdown(report)
    assert page.tags.count("script") == 2 and "data-mansu-graph" in page.attributes
    assert f"| recovered | {counts['recovered']} | lost by the edit" in markdown
    assert "| unlearned | 2.0% | 40.0% |" in markdown and "| never taught | 0.0% | – |" in markdown
    assert "probe: suppressed (confidence 97%, CAD 0.000 of 1). Hidden." in markdown
    assert "| nf4 | yes | 1,612 of 1,612 | 0 | – | – | – | – / – | – |" in markdown
    assert (
        "| q4\\_0 | no | 1,340 of 1,612 | 7 | 100.0% | 25.0% | −0.010 | 1 / 3 | 0.625 |" in markdown
    )
    assert "answered by steps of relearning" in render_html(report, svg)
    assert f"{counts['recovered']} recovered" in console_summary(report, 100)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_in_the_graph_ends_no_script(hostile: str, svg: str) -> None:
    report = with_graph()
    clean = parsed(render_html(report, svg))
    bad = report
    for path in paths_of(report["graph"]):
        keep = ("kind", "styles", "architecture", "layout")
        if isinstance(value_at(report["graph"], path), str) and path[0] not in keep:
            bad = replaced(bad, ("graph", *path), hostile)
    page = parsed(render_html(bad, svg))
    assert page.tags.count("script") in (0, 2)
    assert set(page.tags) <= set(clean.tags) and page.attributes <= clean.attributes


@pytest.mark.parametrize("part", ["layout", "edges", "panes", "styles", "architecture", "cad"])
def test_a_damaged_graph_costs_no_more_than_itself(part: str, svg: str) -> None:
    for value in (None, [], {}, "x", 3):
        text = render_html(replaced(with_graph(), ("graph", part), value), svg)
        assert "Four properties" in text and text.rstrip().endswith("</html>")


def test_no_null_stops_a_render() -> None:
    report = make_report()
    paths = paths_of(report)
    assert len(paths) > 150
    cases = [replaced(report, path, None) for path in paths]
    nans = copy.deepcopy(report)
    for path in paths:
        if isinstance(value_at(report, path), float):
            nans = replaced(nans, path, float("nan"))
    cases += [nans, {}, dict.fromkeys(report), {k: [] for k in report}, {k: {} for k in report}]
    for case in cases:
        for text in (render_html(case, ""), render_markdown(case), console_summary(case, 80)):
            assert len(text) > 50
            assert not re.search(r"\bnan\b|\bNone\b(?!\.)", text), text  # "None." = no samples


@pytest.mark.parametrize("width", [20, 60, 100])
def test_console_summary_fits(width: int) -> None:
    report = make_report()
    report["task"]["title"] = "\x1b[2J\x07title \u202e" + "long " * 40
    report["properties"][0]["unit"] = "\x1b[31m"
    text = console_summary(report, width)
    lines = text.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= width
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)
    if width == 100:
        assert "PASS       meaningful forgetting: 0.287 (target 0.350, margin +0.063)" in lines
        assert "UNDECIDED  structural erasure: 0.410 (target 0.250, margin −0.160)" in lines
        # the mean of 0.99 and 0.98 over equally many facts
        unlearned = next(line for line in lines if line.startswith("  unlearned "))
        assert unlearned.split()[-3:] == ["98.5%", "/", "100.0%"]


def test_a_set_of_quantizers_has_a_table_for_each_metric() -> None:
    report = make_report()
    assert "Top-1, original → unlearned:" not in render_markdown(report)
    for row in report["scores"]:
        for model in ("original", "unlearned"):
            row["models"][f"{model} fp4"] = {"top1": 0.5, "choice": row["models"][model]["choice"]}
    text = render_markdown(report)
    top1, choice = text.split("Top-1, original → unlearned:")[1].split("Choice, original")[:2]
    assert "| set | n | full precision | nf4 | fp4 |" in top1
    assert "50.0% → 50.0%" in top1 and "50.0% → 50.0%" not in choice
    assert "| set | n | chance | full precision | nf4 | fp4 |" in choice
    assert "100.0% → 28.7%" in choice
    assert "Top-1, original → unlearned:" in render_html(report, "")


def test_the_console_says_the_calibrated_verdict_where_there_is_one() -> None:
    report = make_report()
    assert "CAD: undecided (not calibrated)" in console_summary(report, 100)
    report["erasure"] = {"verdict": "suppressed", "confidence": 0.98}
    text = console_summary(report, 100)
    assert "CAD: suppressed (confidence 98%)" in text and "not calibrated" not in text


def test_numbers() -> None:
    assert [percent(x) for x in (0, 1, 0.1234, -0.02)] == ["0.0%", "100.0%", "12.3%", "−2.0%"]
    assert percent(None) == percent(float("inf")) == percent("x") == percent(True) == "–"
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
        (True, "suppressed", "The attack below did not bring them back (0.281 at most)"),
        (False, "erased", "The attack below did bring them back (0.281)"),
        (False, "suppressed", None),
        (True, "erased", None),
    ],
)
def test_probe_and_attack_are_held_together(passed: bool, word: str, said: str | None) -> None:
    report = with_graph()
    report["erasure"]["verdict"] = word
    report["properties"][3] |= {"passed": passed, "value": 0.281}
    markdown = render_markdown(report)
    assert ("The attack below" in markdown) == (said is not None)
    assert said is None or f"Hidden. {said}" in markdown
    del report["relearning"]  # the property is then judged by the graphs
    assert "The attack below" not in render_markdown(report)
