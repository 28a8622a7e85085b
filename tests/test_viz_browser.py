"""Pages and widget in a real Chromium without a network: no error, no request, and it works."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import browser
import networkx as nx
import numpy as np
import pytest
from test_view import GROUPS, SHOWN, by_position, make_attributions, make_circuit

from mansu_interp.circuits.changes import CLASSES
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import GraphComparison
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.meta import CircuitMeta
from mansu_interp.circuits.search.stability import Stability
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.viz.data import EDGE_STYLES, Effect, GraphData, Judged, PromptData, is_gone
from mansu_interp.viz.layout import Layout, box_id, place
from mansu_interp.viz.page import inside_of_groups, lay_out, module_source
from mansu_interp.viz.svg import curve, move_curve
from mansu_interp.viz.view import View, attribution_view, changes_view, circuit_view

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-"),
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser.chromium() as driver:
        yield driver


def opened(driver: Any, path: Path) -> None:
    browser.complaints(driver), browser.requests(driver)
    driver.get(path.as_uri())
    settle(driver)


def settle(driver: Any) -> None:
    """Two frames: the first asks for a drawing, the second has drawn."""
    driver.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"
    )


def quiet(driver: Any, *pages: Path) -> None:
    assert browser.complaints(driver) == []
    assert set(browser.requests(driver)) <= {p.as_uri() for p in pages}


def view(driver: Any, expression: str) -> Any:
    return driver.execute_script(f"const v = window.mansuViews[0]; return {expression};")


CLICK = """
const [v, x, y] = [window.mansuViews[0], arguments[0], arguments[1]];
const c = v.canvases[0], r = c.getBoundingClientRect(), z = v.fit * v.view.k;
const at = {clientX: r.left + v.shift + v.view.x + x * z, clientY: r.top + v.view.y + y * z,
            bubbles: true, pointerId: 1, button: 0};
for (const name of ["pointermove", "pointerdown", "pointerup"])
  c.dispatchEvent(new PointerEvent(name, at));
"""


def test_circuit_page(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    page = circuit_view(circuit).to_html(tmp_path / "circuit.html")
    opened(driver, page)
    n = circuit.n_edges
    assert view(driver, "v.drawn.length") == n
    canvas = driver.find_element("css selector", "canvas")
    painted = driver.execute_script(
        "const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(new Uint32Array(d.buffer)).size", canvas,
    )  # fmt: skip
    assert painted > 20
    # the slider
    driver.execute_script(
        "const s = window.mansuViews[0].slider; s.value = 1000; s.dispatchEvent(new Event('input'))"
    )
    assert view(driver, "v.drawn.length") == 1
    assert driver.find_element("css selector", ".count").text.startswith("1 of ")
    (only,) = view(driver, "v.drawn.map((i) => [v.source[i], v.target[i]])")
    at = np.unravel_index(np.abs(circuit.scores).argmax(), circuit.scores.shape)
    assert circuit.graph.edge(*only) == at
    # top-k, then one kind of reader
    driver.execute_script(
        "const t = window.mansuViews[0].topInput;t.value = 25; t.dispatchEvent(new Event('change'))"
    )
    assert view(driver, "v.drawn.length") == 25
    for name in ("q", "k", "v", "mlp"):
        driver.find_element("xpath", f"//button[text()='{name}']").click()
    assert set(view(driver, "v.drawn.map((i) => v.target[i])")) <= {"logits"}
    quiet(driver, page)


def test_a_stable_circuit_and_its_heads(driver: Any, tmp_path: Path):
    """Edges fade with their frequency, which tip and list say; a head's card has its role and what
    makes its attention."""
    circuit = make_circuit()
    often = np.linspace(0, 1, circuit.scores.size).reshape(circuit.scores.shape)
    low, high, same = circuit.scores - 1, circuit.scores + 1, np.ones_like(often)
    stable = Stability(50, "facts", low, high, often, same, 0.8, 0.1, 0.9)
    shown = circuit_view(replace(circuit, stability=stable))
    head = {
        "roles": ["induction 0.93"],
        "attention": {"subject": 0.75, "self": 0.25},
        "looks_at": "subject",
        "logit": 2.5,
        "keys": [["m0", 1.5], ["input", 0.5]],
        "query": [["input", 2.0]],
        "effect": -0.25,
    }
    data = replace(shown.data, heads={"a1.h2": head})
    page = View(data).to_html(tmp_path / "stable.html")
    opened(driver, page)
    n = circuit.n_edges
    expected = data.edges.frequency or []
    alphas = view(driver, "v.drawn.map((i) => [v.edge[i], v.look(i, 0).alpha])")
    assert len(alphas) == n
    for k, alpha in alphas:
        assert alpha == pytest.approx(0.12 + 0.83 * expected[int(k)])
    legend = driver.find_element("css selector", ".legend").text
    assert "Opacity: share of 50 resamples of facts whose circuit has the edge" in legend
    left = data.total - len(data.edges.source)
    count = f"{n} of {data.total} edges" + (f", without the weakest {left}" if left else "")
    assert view(driver, "[v.list.table.className, v.countOut.textContent]") == ["held", count]
    heads = driver.find_elements("css selector", ".list th")
    assert [th.text.rstrip(" ▾▴") for th in heads] == [
        "from → to", "score", "frequency", "2.5 %", "97.5 %",
    ]  # fmt: skip
    heads[2].find_element("css selector", "button").click()
    found = view(driver, "v.list.items.map(({cells}) => cells[2])")
    assert found == sorted(found, reverse=True) and len(found) == n
    assert driver.find_elements("css selector", ".list td")[2].text == f"{found[0]:.0%}"
    words = view(driver, "v.describeEdge(v.drawn[0], false).map((x) => x.textContent).join(' ')")
    k = int(alphas[0][0])
    assert f"in the circuit of {expected[k]:.0%} of 50 resamples of facts; 95 % of them" in words
    box = place(circuit.graph.architecture).boxes["a1.h2"]
    driver.execute_script(CLICK, box.x, box.y)
    settle(driver)
    tip = driver.find_element("css selector", ".tip").text
    assert "induction 0.93; looks at subject 75%; answer − rival −0.25" in tip
    card = driver.find_element("css selector", ".detail").text
    assert "also at self 25%" in card and "attention logit to subject, above the mean: +2.5" in card
    assert "keys from" in card and "m0" in card and "+1.5" in card
    quiet(driver, page)


def test_hover_click_and_keys(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    page = circuit_view(circuit).to_html(tmp_path / "circuit.html")
    opened(driver, page)
    box = place(circuit.graph.architecture).boxes["a1.h2"]
    driver.execute_script(CLICK, box.x, box.y)
    settle(driver)
    assert view(driver, "[...v.selected]") == ["a1.h2"]
    tip = driver.find_element("css selector", ".tip")
    assert tip.is_displayed() and "a1.h2" in tip.text and "node score" in tip.text
    row = circuit.scores[circuit.graph.writer_index["a1.h2"]].sum()
    assert f"{abs(row):.4g}" in tip.text
    assert "strongest" in driver.find_element("css selector", ".detail").text
    driver.execute_script(CLICK, box.x, box.y)
    assert view(driver, "[...v.selected]") == []
    canvas = driver.find_element("css selector", "canvas")
    press = (
        "const [c, key] = arguments;"
        "c.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))"
    )
    for key in ("ArrowUp", "Enter"):
        driver.execute_script(press, canvas, key)
    (chosen,) = view(driver, "[...v.selected]")
    assert chosen.startswith("a0.h")
    driver.execute_script(press, canvas, "+")
    assert view(driver, "v.view.k") == pytest.approx(1.25)
    driver.execute_script(press, canvas, "0")
    driver.execute_script(press, canvas, "Escape")
    assert view(driver, "[v.view.k, v.selected.size]") == [1, 0]
    # an edge: its middle is on its curve
    i = view(driver, "v.drawn[0]")
    x, y = view(driver, f"[...v.curve({i}).line.slice(16, 18)]")
    driver.execute_script(CLICK, x, y)
    assert len(view(driver, "v.selectedEdge")) == 2
    quiet(driver, page)


def test_change_page(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    cad = Judged("suppressed", "Hidden.")
    made = changes_view(circuit, *make_attributions(circuit), cad=cad, comparison=SHOWN)
    page = made.to_html(tmp_path / "changes.html")
    opened(driver, page)
    panes = [c.text for c in driver.find_elements("css selector", "figcaption")]
    assert panes == ["before", "after", "quantized"]
    shown = driver.find_element("css selector", ".cad").text
    assert shown.lower().startswith("cad: suppressed. hidden.")
    assert "projected share" in shown and "−0.020" in shown
    names = set(view(driver, "v.drawn.map((i) => v.nameOf(i))"))
    assert names == {"kept", "silent", "weakened", "recovered", "new"}
    scores, looks = "v.panes.map((_, q) => v.score(i, q))", "v.look(i, p).dash"
    each = f"[0, 1, 2].map((p) => [v.nameOf(i), p, {scores}, {looks}])"
    looks = view(driver, f"v.drawn.flatMap((i) => {each})")
    for name, p, scores, dash in looks:  # what is lost is solid where it carries
        usual = [float(x) for x in EDGE_STYLES[name][2].split()]
        assert dash == ([] if is_gone(name, scores, p) is False else usual)
    driver.find_element("xpath", "//button[text()='changed only']").click()
    assert "kept" not in view(driver, "v.drawn.map((i) => v.nameOf(i))")
    driver.find_element("xpath", "//button[contains(., 'new: ')]").click()
    assert "new" not in view(driver, "v.drawn.map((i) => v.nameOf(i))")
    quiet(driver, page)


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)//", "</script x", '"><img src=x onerror=1>']
)
def test_hostile_text_stays_text(driver: Any, tmp_path: Path, hostile: str):
    circuit = replace(make_circuit(), meta=CircuitMeta(model=hostile))
    made = changes_view(
        circuit,
        *make_attributions(circuit),
        cad=Judged(hostile, hostile),
        comparison=GraphComparison({hostile: SHOWN.models["unlearned"]}),
    )
    page = made.to_html(tmp_path / "hostile.html")
    opened(driver, page)
    assert hostile in driver.find_element("css selector", ".title").text
    assert not driver.find_elements("css selector", "img")
    assert len(driver.find_elements("css selector", "script")) == 2
    quiet(driver, page)


def test_the_policy_stops_what_is_not_ours(driver: Any, tmp_path: Path):
    page = circuit_view(make_circuit()).to_html(tmp_path / "page.html")
    page.write_text(page.read_text("utf-8") + "<script>window.evil = 1</script>", "utf-8")
    opened(driver, page)
    assert driver.execute_script("return window.evil") is None
    assert any("Content Security Policy" in c for c in browser.complaints(driver))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 4, 4), (12, 12, 12), (5, 9, 3)])
def test_javascript_and_python_draw_the_same_curves(
    driver: Any, tmp_path: Path, sizes: tuple[int, int, int]
):
    graph = Graph(Architecture(*sizes))
    circuit = make_circuit(*sizes, n=4)
    page = circuit_view(circuit, limit=None).to_html(tmp_path / "curves.html")
    opened(driver, page)
    driver.execute_script("window.mansuViews[0].all = true; window.mansuViews[0].refilter()")
    found = view(driver, "v.source.map((_, i) => [v.source[i], v.target[i], ...v.curve(i).p])")
    assert len(found) == graph.n_edges
    layout = place(graph.architecture)
    for source, target, *points in found[:: max(1, len(found) // 4000)]:
        wanted = [c for point in curve(layout, source, target) for c in point]
        assert points == pytest.approx(wanted, abs=0.05), (source, target)


def boxes_of(layout: Layout) -> list[list[Any]]:
    return [[b.id, b.kind, b.label, b.x, b.y, b.width, b.height] for b in layout.boxes.values()]


@pytest.mark.parametrize("sizes", [(30, 9, 3), (12, 12, 12), (3, 4, 1)])
def test_javascript_and_python_fold_alike(driver: Any, tmp_path: Path, sizes: tuple[int, int, int]):
    circuit = make_circuit(*sizes, n=25)
    page = circuit_view(circuit).to_html(tmp_path / "folded.html")
    opened(driver, page)
    everything = place(circuit.graph.architecture)
    shown = set(view(driver, "[...v.active]"))
    assert len(shown) < len(everything.boxes)
    for wanted in (place(circuit.graph.architecture, shown), everything):
        whole = str(wanted is everything).lower()
        driver.execute_script(
            f"window.mansuViews[0].all = {whole}; window.mansuViews[0].refilter()"
        )
        found = view(
            driver, "v.boxes.map((b) => [b.id, b.kind, b.label, b.x, b.y, b.width, b.height])"
        )
        for mine, theirs in zip(found, boxes_of(wanted), strict=True):
            assert mine[:3] == theirs[:3] and mine[3:] == pytest.approx(theirs[3:])
        size = [wanted.width, wanted.height, wanted.margin]
        assert view(driver, "[v.layout.width, v.layout.height, v.layout.margin]") == (
            pytest.approx(size)
        )


@pytest.mark.parametrize("width", [1200, 1160, 430])
@pytest.mark.parametrize("sizes", [(30, 9, 3), (12, 12, 12), (4, 8, 4)])
def test_names_are_legible_and_none_is_cut(
    driver: Any, tmp_path: Path, sizes: tuple[int, int, int], width: int
):
    """Letters of 11 pixels on the screen, within a column; what has no room scrolls."""
    circuit = make_circuit(*sizes, n=60)
    page = changes_view(circuit, *make_attributions(circuit)).to_html(tmp_path / "wide.html")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(driver, page)
    driver.execute_script(
        "window.texts = []; const own = CanvasRenderingContext2D.prototype.fillText;"
        "CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {"
        "  const z = this.getTransform().a;"
        "  window.texts.push([text, parseFloat(this.font) * z, this.measureText(text).width * z]);"
        "  own.call(this, text, x, y); };"
        "window.mansuViews[0].draw()"
    )
    settle(driver)
    texts = driver.execute_script("return window.texts")
    named = {name for name, *_ in texts}
    wanted = {b["id"] for b in view(driver, "v.boxes") if b["label"]}
    assert wanted <= named and len(wanted) > 10
    column = view(driver, "v.layout.column * v.fit")
    for name, points, across in texts:
        assert points >= 10.9, name
        assert across <= column or name in ("input", "logits"), name
    cut = (
        "[...document.querySelectorAll('.mg figure')].filter((f) => "
        "f.firstChild.nextSibling.clientWidth > f.clientWidth + 1 && "
        "getComputedStyle(f).overflowX !== 'auto').length"
    )
    assert view(driver, cut) == 0
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


POINT = """
const [v, x, y] = [window.mansuViews[0], arguments[0], arguments[1]];
const c = v.canvases[0], r = c.getBoundingClientRect(), z = v.fit * v.view.k;
c.dispatchEvent(new PointerEvent("pointermove", {clientX: r.left + v.shift + x * z,
  clientY: r.top + y * z, bubbles: true, pointerId: 1}));
"""
INK = """
const c = window.mansuViews[0].canvases[0];
const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
let ink = 0;
for (let i = 0; i < d.length; i += 4) ink += 255 - Math.min(d[i], d[i + 1], d[i + 2]);
return ink;
"""


def on_paths(circuit: Circuit, box: str) -> dict[tuple[str, str], int]:
    """By networkx: edges from input through a box to the logits, and whether they touch it."""
    graph = circuit.to_networkx()
    own = {n for n in graph if n.split("<")[0] == box}
    after = own | {d for n in own for d in nx.descendants(graph, n)}
    before = own | {d for n in own for d in nx.ancestors(graph, n)}
    ends = nx.ancestors(graph, "logits") | {"logits"}
    begins = nx.descendants(graph, "input") | {"input"}
    found = {}
    for u, v, kind in graph.edges(data="kind"):
        if kind == "residual":
            near = u in own or v in own
            if near or (u in after and v in ends) or (v in before and u in begins):
                found[u, v] = 2 if near else 1
    return found


@pytest.mark.parametrize("kv", [4, 2])
def test_what_one_points_at_lights_its_paths(driver: Any, tmp_path: Path, kv: int):
    circuit = make_circuit(kv=kv, n=25)
    page = circuit_view(circuit).to_html(tmp_path / "paths.html")
    opened(driver, page)
    layout = place(circuit.graph.architecture)
    lit = "v.lit && [...v.lit.edges].map(([i, level]) => [v.source[i], v.target[i], level])"
    seen = []
    for name in ("m2", "m0", "a1.h2", "a2.h1", "a0.h1"):
        driver.execute_script(POINT, layout.boxes[name].x, layout.boxes[name].y)
        settle(driver)
        found = {(u, v): level for u, v, level in view(driver, lit)}
        assert found == on_paths(circuit, name), name
        seen.append(len(found))
    assert sum(0 < n < 25 for n in seen) > 2, seen
    # what is off the paths fades
    faded = driver.execute_script(INK)
    driver.execute_script("window.mansuViews[0].point(null)")
    settle(driver)
    assert view(driver, "v.lit") is None
    assert faded < 0.8 * driver.execute_script(INK)
    assert [c for c in browser.complaints(driver) if "readback" not in c] == []


def listed(driver: Any) -> list[list[str]]:
    return driver.execute_script(
        "return [...document.querySelectorAll('.list tbody tr')]"
        ".map((r) => [...r.cells].map((c) => c.textContent))"
    )


def test_the_list_sorts_and_follows_the_graph(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    page = circuit_view(circuit).to_html(tmp_path / "list.html")
    opened(driver, page)
    rows = listed(driver)
    strongest = [f"{e.source} → {e.target}" for e in circuit.top(40)]
    assert [name for name, _ in rows] == strongest
    assert rows[0][1] == f"{circuit.top(1)[0].score:+.4g}".replace("-", "−")
    score = driver.find_element("xpath", "//div[@class='list']//th[2]/button")
    score.click()
    assert [name for name, _ in listed(driver)] == strongest[::-1]
    assert driver.find_element("css selector", "th[aria-sort=ascending]").text == "score ▴"
    # a row lights its edge, and a click pins it
    row = driver.find_element("css selector", ".list tbody tr")
    row.find_element("css selector", "button").click()
    settle(driver)
    assert view(driver, "v.selectedEdge") == strongest[-1].split(" → ")
    assert view(driver, "v.hover.edge") == int(row.get_attribute("data-key"))
    driver.find_element("xpath", "//button[text()='nodes']").click()
    names = {name: rest for name, *rest in listed(driver)}
    assert set(names) == set(view(driver, "[...v.active]"))
    graph = circuit.to_networkx()
    assert names["m0"][1:] == [str(graph.in_degree("m0")), str(graph.out_degree("m0"))]
    driver.find_element("css selector", "tr[data-key=m0] button").click()
    settle(driver)
    assert view(driver, "[...v.selected]") == ["m0"]
    # and the graph marks its row
    box = place(circuit.graph.architecture).boxes["a1.h2"]
    driver.execute_script(POINT, box.x, box.y)
    settle(driver)
    marked = "[...document.querySelectorAll('.list tr.{}')].map((r) => r.dataset.key)"
    assert view(driver, marked.format("over")) == ["a1.h2"]
    assert view(driver, marked.format("on")) == ["m0"]
    quiet(driver, page)


@pytest.mark.parametrize("kind", ["edges", "nodes"])
def test_no_column_of_the_list_is_cut_on_a_telephone(driver: Any, tmp_path: Path, kind: str):
    """Numbers stand below the names, each under its title."""
    circuit = make_circuit()
    page = changes_view(circuit, *make_attributions(circuit)).to_html(tmp_path / "narrow.html")
    size = {"width": 430, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(driver, page)
    driver.find_element("xpath", f"//div[@class='list']//button[text()='{kind}']").click()
    settle(driver)
    assert len(listed(driver)[0]) > 4
    cut = "[...document.querySelectorAll('.rows, .rows th, .rows td')].filter("
    assert view(driver, f"{cut}(x) => x.scrollWidth > x.clientWidth).length") == 0
    ends = "[...document.querySelectorAll('.rows tr')].slice(0, 2).map((r) => [...r.cells].map("
    head, row = view(driver, f"{ends}(c) => c.getBoundingClientRect().right))")
    assert head == row and row[1] < row[0]  # the first number stands below the name
    size["width"] = 1280
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    quiet(driver, page)


def find(driver: Any, text: str) -> set[tuple[str, str]]:
    driver.execute_script(
        "const s = window.mansuViews[0].search; s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))", text,
    )  # fmt: skip
    return {(u, v) for u, v in view(driver, "v.drawn.map((i) => [v.source[i], v.target[i]])")}


def test_the_search_finds_any_label(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    made = changes_view(circuit, *make_attributions(circuit))
    weights = {"a1.h2": ["layers.1.attention rows 8–15"], "m0": ["layers.0.mlp rows 0–31"]}
    prompt = PromptData("so", ["so"], "", {}, {"m1": Effect(["Paris", "Rome"], [1.0, -1.0], 0.0)})
    data = replace(made.data, weights=weights, prompts=[prompt])
    page = View(data).to_html(tmp_path / "find.html")
    opened(driver, page)
    driver.execute_script("const v = window.mansuViews[0]; v.setThreshold(0);")
    everything = find(driver, "")

    def touching(name: str) -> set[tuple[str, str]]:
        return {(u, v) for u, v in everything if name in (u, v.split("<")[0])}

    assert find(driver, "attention") == touching("a1.h2") == find(driver, "A1.H2")
    assert find(driver, "paris") == touching("m1")
    one_way = {(u, v) for u, v in everything if u == "m0" and v.startswith("a2")}
    assert find(driver, "m0 → a2") == find(driver, "m0->a2") == one_way and one_way
    found = find(driver, "recovered")
    classes = set(view(driver, "v.drawn.map((i) => v.nameOf(i))"))
    assert found and "recovered" in classes
    driver.execute_script(
        "const v = window.mansuViews[0]; v.notes.m0 = 'copies subjects';v.group('verbs', ['a2.h3'])"
    )
    assert find(driver, "copies") == touching("m0")
    assert find(driver, "verbs") == touching("a2.h3")
    quiet(driver, page)


def with_prompts(data: GraphData) -> GraphData:
    prompts = [
        PromptData("the sea", ["the", " ", "sea"], "blue", {"a1.h2": [100, 25, 75, 5, 15, 80]},
                   {"a1.h2": Effect(["blue", "red"], [2.5, -1.5], 2.5)}),
        PromptData("<b>", ["<b>"], "red", {"a1.h2": [100]}, {}),
    ]  # fmt: skip
    return replace(data, prompts=prompts)


def test_the_card_shows_attention_and_direct_effect(driver: Any, tmp_path: Path):
    page = View(with_prompts(circuit_view(make_circuit()).data)).to_html(tmp_path / "card.html")
    opened(driver, page)
    canvas = driver.find_element("css selector", "canvas")
    driver.execute_script("const v = window.mansuViews[0]; v.focus = 'a1.h2';")
    press = "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))"
    driver.execute_script(press, canvas)
    settle(driver)
    assert view(driver, "[...v.selected]") == ["a1.h2"]
    cells = driver.find_elements("css selector", ".attention .cell")
    shares = [c.get_attribute("title") for c in cells]
    assert shares == [
        "the looks at the: 100%", "  looks at the: 25%", "  looks at  : 75%",
        "sea looks at the: 5%", "sea looks at  : 15%", "sea looks at sea: 80%",
    ]  # fmt: skip
    alphas = [c.value_of_css_property("background-color") for c in cells]
    assert " 0.25)" in alphas[1] and " 0.8)" in alphas[5]
    text = driver.find_element("css selector", ".detail").text
    assert "the sea →" in text and "on blue +2.5" in text
    effect = driver.find_element("css selector", ".effect table").text.split()
    assert effect == ["raises", "lowers", "blue", "+2.5", "red", "−1.5"]
    driver.find_element("xpath", "//div[@class='inside']//button[text()='red']").click()
    text = driver.find_element("css selector", ".detail").text
    assert "<b> →" in text and not driver.find_elements("css selector", ".effect")
    assert len(driver.find_elements("css selector", ".attention .cell")) == 1
    quiet(driver, page)


def saved(driver: Any, folder: Path, kind: str) -> Path:
    """The file that a button saves."""
    place = {"behavior": "allow", "downloadPath": str(folder)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", place)
    driver.find_element("xpath", f"//div[@class='foot']/button[text()='{kind}']").click()
    size = 0
    for _ in range(100):
        found = list(folder.glob(f"*.{kind.lower()}"))
        before, size = size, found[0].stat().st_size if found else 0
        if size and size == before:  # all of it is there
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no {kind} in {folder}")


@pytest.mark.slow
def test_what_is_saved(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    made = changes_view(circuit, *make_attributions(circuit), title="=of 'facts'/x")
    page = made.to_html(tmp_path / "save.html")
    opened(driver, page)
    driver.execute_script("const v = window.mansuViews[0]; v.notes.m0 = '=1'; v.pin(['m0'])")
    drawn = view(driver, "v.drawn.length")
    svg = ET.fromstring(saved(driver, tmp_path, "SVG").read_text("utf-8"))
    curves = [e for e in svg.iter() if e.tag.endswith("path") and "C" in e.get("d", "")]
    assert len(curves) == 3 * drawn
    words = [e.text for e in svg.iter() if e.tag.endswith("text")]
    assert {"before", "after", "quantized", "a2.h3", "=of 'facts'/x"} <= set(words)
    rows = list(csv.reader(saved(driver, tmp_path, "CSV").read_text("utf-8").splitlines()))
    assert rows[0] == ["from → to", "before", "after", "quantized", "became"]
    assert len(rows) == 1 + drawn
    top = view(driver, "v.order[0]")
    scores = view(driver, f"v.data.edges.scores.map((s) => s[{top}])")
    assert [float(x) for x in rows[1][1:4]] == scores
    again = View.from_json(saved(driver, tmp_path, "JSON")).data
    assert again.state == {"pinned": ["m0"], "notes": {"m0": "=1"}}
    assert replace(again, state={}) == made.data
    image = pytest.importorskip("PIL.Image").open(saved(driver, tmp_path, "PNG"))
    pixels = np.asarray(image.convert("RGB").resize((400, 300))).reshape(-1, 3)
    assert image.width > 1500 and len(np.unique(pixels, axis=0)) > 100
    driver.find_element("xpath", "//button[text()='nodes']").click()
    (tmp_path / "of-facts-x.csv").unlink()
    assert '"\'=1"' in saved(driver, tmp_path, "CSV").read_text("utf-8")  # no formula
    # the saved graph opens as it was left
    opened(driver, View(again).to_html(tmp_path / "again.html"))
    assert view(driver, "[[...v.selected], v.notes]") == [["m0"], {"m0": "=1"}]
    assert browser.complaints(driver) == []


STATE = (
    "[[...v.selected], v.query, v.rank(v.threshold), v.changedOnly, [...v.hidden], [...v.kinds],"
    " v.groups, v.notes, v.list.kind, v.list.by, v.list.up]"
)


def test_a_link_restores_the_view(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    page = changes_view(circuit, *make_attributions(circuit)).to_html(tmp_path / "link.html")
    opened(driver, page)
    fresh = view(driver, STATE)
    driver.execute_async_script(
        "const v = window.mansuViews[0]; v.pin(['a1.h2', 'm0']); v.group('x', ['a1.h2', 'm0']);"
        "v.notes.m0 = 'a & b'; v.setThreshold(v.atRank(30)); v.hidden.add('new');"
        "v.kinds.delete('q'); v.search.value = 'a1'; v.search.dispatchEvent(new Event('input'));"
        "v.changedButton.click(); v.list.show('nodes'); v.list.up = true; v.remember();"
        "setTimeout(arguments[0], 400)"
    )
    wanted, link = view(driver, STATE), driver.current_url
    assert wanted != fresh and "#graph=" in link
    driver.get("about:blank")
    driver.get(link)
    settle(driver)
    assert view(driver, STATE) == wanted
    assert driver.find_element("css selector", "input[type=search]").get_attribute("value") == "a1"
    pressed = "v.changedButton.getAttribute('aria-pressed')"
    assert view(driver, pressed) == "true"
    assert view(driver, "v.legend.querySelectorAll('[aria-pressed=false]').length") == 1
    # following a link in the same tab does the same, and an anchor of the page is none
    driver.execute_script("location.hash = 'part-1'")
    settle(driver)
    assert view(driver, STATE) == wanted
    driver.execute_async_script(
        "window.mansuViews[0].list.show('edges'); setTimeout(arguments[0], 400)"
    )
    assert "#graph=" in driver.current_url and "part-1" not in driver.current_url
    driver.execute_async_script(
        "location.hash = 'graph=' + encodeURIComponent('{\"pinned\":[\"m1\"]}');"
        "setTimeout(arguments[0], 50)"
    )
    assert view(driver, STATE) == [["m1"], *fresh[1:]]
    assert view(driver, pressed) == "false"
    assert browser.complaints(driver) == []


@pytest.mark.parametrize(
    "hostile",
    [
        "{", "null", "[]", '"x"', '{"pinned":5,"edge":[1],"find":{},"hide":["<b>"],"groups":[1]}',
        '{"pinned":["<img src=x>"],"edge":["a","b"],"threshold":1e400,"sort":[99,1],"at":7}',
        '{"notes":{"m0":"</script><img src=x onerror=1>"},"groups":{"<img>":["m0","zz"]}}',
        '{"unfolded":[-1,1e9,"x"],"all":"yes","notes":{"__proto__":"x"},"list":"x"}',
        '{"by_position":true,"tokens_of":9,"pinned":["m0@-1","m0@7","@"],"groups":{"a":["m0@x"]}}',
        '{"groups":{"\\ud800<img src=x>":["zz"],"x":5},"closed":["x","toString",5,"__proto__"]}',
    ],
)  # fmt: skip
def test_a_hostile_link_does_no_harm(driver: Any, tmp_path: Path, hostile: str):
    page = circuit_view(make_circuit()).to_html(tmp_path / "link.html")
    browser.complaints(driver), browser.requests(driver)
    driver.get(f"{page.as_uri()}#graph={quote(hostile)}")
    settle(driver)
    assert view(driver, "v.drawn.length") == 40
    assert set(view(driver, "[...v.selected]")) == set()
    assert not driver.find_elements("css selector", "img")
    driver.execute_script("window.mansuViews[0].pin(['m0'])")
    settle(driver)
    assert not driver.find_elements("css selector", "img")
    assert browser.complaints(driver) == []


def test_folded_layers_unfold(driver: Any, tmp_path: Path):
    circuit = make_circuit(30, 9, 9, n=12)
    page = circuit_view(circuit).to_html(tmp_path / "folds.html")
    opened(driver, page)
    folds = view(driver, "v.folds.map((f) => [f.layers, f.y, f.sign ?? null])")
    assert sorted(n for layers, *_ in folds for n in layers) == list(range(30))
    assert {sign for *_, sign in folds} == {"+", None}
    before = len(view(driver, "v.boxes"))
    layers, y, _ = max(folds, key=lambda f: len(f[0]))
    driver.execute_script(POINT, 15, y)
    tip = driver.find_element("css selector", ".tip").text
    assert tip.startswith(f"layers {layers[0]} to {layers[-1]} are folded")
    driver.execute_script(CLICK, 15, y)
    settle(driver)
    boxes = {b["id"] for b in view(driver, "v.boxes")}
    assert len(boxes) == before + 10 * len(layers)
    assert {f"a{layers[0]}.h8", f"m{layers[-1]}"} <= boxes
    # and fold again, from the keyboard
    canvas = driver.find_element("css selector", "canvas")
    for layer in layers:
        driver.execute_script(
            "window.mansuViews[0].focus = arguments[1];"
            "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'u'}))",
            canvas, f"a{layer}.h0",
        )  # fmt: skip
    assert len(view(driver, "v.boxes")) == before
    quiet(driver, page)


def test_token_positions(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    share = np.random.default_rng(3).dirichlet([1.0, 1.0, 1.0], circuit.scores.shape)
    by_position = np.moveaxis(share, -1, 0) * circuit.scores
    scores = Attribution(circuit.graph, circuit.scores, 1.0, 0.0, by_position)
    page = attribution_view(scores).to_html(tmp_path / "positions.html")
    opened(driver, page)
    titles = [
        c.get_attribute("title") for c in driver.find_elements("css selector", ".places .cell")
    ]
    drawn = view(driver, "v.drawn.map((i) => [v.source[i], v.target[i]])")
    for p in range(3):
        total = sum(by_position[p][circuit.graph.edge(u, v)] for u, v in drawn if u == "m0")
        (title,) = [t for t in titles if t.startswith(f"m0 at {p}: ")]
        assert float(title.split(": ")[1].replace("−", "-")) == pytest.approx(total, abs=2e-3)
    driver.find_element("css selector", "[aria-label='position 1: 1']").click()
    settle(driver)
    u, v = view(driver, "[v.source[v.order[0]], v.target[v.order[0]]]")
    at = np.unravel_index(np.abs(by_position[1]).argmax(), by_position[1].shape)
    assert circuit.graph.edge(u, v) == at
    assert listed(driver)[0][1] == f"{by_position[1][at]:+.4g}".replace("-", "−")
    # a closed group has a row: what its drawn edges carry to the outside
    driver.execute_script(CLOSE, GROUPS)
    settle(driver)
    (line,) = view(driver, "v.drawn.map((i) => [v.target[i], v.source[i], v.score(i, 0),"
                           " v.parts(i).map((k) => [v.data.writers[v.data.edges.source[k]],"
                           " v.data.readers[v.data.edges.target[k]]])])"
                           ".filter(([t, s]) => t === 'logits' && s === '⊞ early')")  # fmt: skip
    own = sum(by_position[1][circuit.graph.edge(*edge)] for edge in line[3])
    assert line[2] == pytest.approx(own, rel=1e-3)
    out = view(driver, "v.drawn.filter((i) => v.source[i] === '⊞ early').map((i) => v.score(i, 0))")
    titles = [
        c.get_attribute("title") for c in driver.find_elements("css selector", ".places .cell")
    ]
    assert not [t for t in titles if t.startswith("m0 at")]
    (title,) = [t for t in titles if t.startswith("⊞ early at 1: ")]
    assert float(title.split(": ")[1].replace("−", "-")) == pytest.approx(sum(out), abs=2e-3)
    driver.find_element("css selector", "[aria-label='all positions']").click()
    assert view(driver, "v.at") is None
    quiet(driver, page)


def test_groups_and_notes(driver: Any, tmp_path: Path):
    circuit = make_circuit()
    page = circuit_view(circuit).to_html(tmp_path / "groups.html")
    opened(driver, page)
    driver.execute_script("window.mansuViews[0].pin(['a1.h2', 'm0'])")
    name = driver.find_element("css selector", ".pins input")
    name.send_keys("early\n")
    assert view(driver, "v.groups") == {"early": ["a1.h2", "m0"]}
    total = sum(circuit.scores[circuit.graph.writer_index[n]].sum() for n in ("a1.h2", "m0"))
    shown = f"early: 2, {total:+.4g}".replace("-", "−")
    assert driver.find_element("css selector", "button.group").text == shown
    note = driver.find_element("css selector", "textarea")
    note.send_keys("moves the subject")
    settle(driver)
    assert view(driver, "v.notes") == {"a1.h2": "moves the subject"}
    driver.find_element("xpath", "//button[text()='nodes']").click()
    row = next(row for row in listed(driver) if row[0] == "a1.h2")
    assert row[-2:] == ["earlyclose", "moves the subject"]  # with the button that closes it
    driver.execute_script("window.mansuViews[0].click(null)")
    driver.find_element("css selector", "button.group").click()
    assert view(driver, "[...v.selected]") == ["a1.h2", "m0"]
    driver.find_element("css selector", "[aria-label='dissolve the group early']").click()
    assert view(driver, "v.groups") == {}
    quiet(driver, page)


def placed(driver: Any) -> list[list[Any]]:
    what = "b.id, b.kind, b.label, b.x, b.y, b.width, b.height"
    return sorted(view(driver, f"v.boxes.map((b) => [{what}])"))


def same(found: list[list[Any]], wanted: list[list[Any]]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[:3] == theirs[:3] and mine[3:] == pytest.approx(theirs[3:], abs=1e-6), mine[0]


TOKENS = ["<bos>", " the", "\n", " ", " " + "long" * 9, " is", " x", " y", " z"]


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("groups", [{}, GROUPS, {"x": ["m0@0", "a1.h2@3"], "y " * 9: ["logits"]}])
def test_javascript_and_python_lay_out_alike_by_position(
    driver: Any, tmp_path: Path, kv: int, groups: dict[str, list[str]]
):
    made = by_position(kv, len(TOKENS), n=80)
    assert made.data.positions is not None
    state = {"by_position": True, "groups": groups, "closed": list(groups)}
    data = replace(made.data, state=state, positions=replace(made.data.positions, tokens=TOKENS))
    page = View(data).to_html(tmp_path / "by-position.html")
    opened(driver, page)
    driver.execute_script("const v = window.mansuViews[0]; v.setThreshold(v.atRank(90))")
    settle(driver)
    drawing = lay_out(data, 90)
    layout = drawing.layout
    same(placed(driver), sorted(boxes_of(layout)))
    columns = view(driver, "v.layout.columns.map((k) => [k.positions, k.label, k.x, k.width])")
    for mine, theirs in zip(columns, layout.columns, strict=True):
        assert mine[:2] == [theirs.positions, theirs.label]
        assert mine[2:] == pytest.approx([theirs.x, theirs.width])
    size = "[v.layout.width, v.layout.height, v.layout.margin, v.layout.axisY]"
    wanted = [layout.width, layout.height, layout.margin, layout.axis_y]
    assert view(driver, size) == pytest.approx(wanted)
    lines = view(driver, "v.drawn.map((i) => [v.source[i], v.target[i], v.score(i, 0)])")
    scores = {(x.source, x.target): x.scores[0] for x in drawing.lines}
    assert {(u, v): s for u, v, s in lines} == pytest.approx(scores) and len(lines) == len(scores)
    curves = view(driver, "v.drawn.map((i) => [v.source[i], v.target[i], ...v.curve(i).p])")
    for source, target, *points in curves:
        own = [c for point in curve(layout, source, target) for c in point]
        assert points == pytest.approx(own, abs=0.05), (source, target)
    moves = view(driver, "v.moves.filter((m) => m.p).map((m) => [m.from, m.to, ...m.p])")
    assert sorted((a, b) for a, b, *_ in moves) == sorted(drawing.moves) and moves
    for start, end, *points in moves:
        own = [c for point in move_curve(layout, start, end) for c in point]
        assert points == pytest.approx(own, abs=0.05), (start, end)
    quiet(driver, page)


@pytest.mark.parametrize("kv", [4, 2])
def test_javascript_and_python_close_groups_alike(driver: Any, tmp_path: Path, kv: int):
    circuit = make_circuit(kv=kv, n=120)
    names = {**GROUPS, "w" * 40: ["a1.h1", "a1.h3"], "top": ["logits"]}
    data = replace(circuit_view(circuit).data, state={"groups": names, "closed": list(names)})
    page = View(data).to_html(tmp_path / "groups.html")
    opened(driver, page)
    drawing = lay_out(data, 200)
    same(placed(driver), sorted(boxes_of(drawing.layout)))
    inside = dict(view(driver, "[...v.inside]"))
    assert inside == inside_of_groups(circuit.graph.architecture, names)
    lines = view(driver, "v.drawn.map((i) => [v.source[i], v.target[i], v.score(i, 0)])")
    scores = {(x.source, x.target): x.scores[0] for x in drawing.lines}
    assert {(u, v): s for u, v, s in lines} == pytest.approx(scores) and len(lines) == len(scores)
    quiet(driver, page)


def touches(edge: tuple[str, str], component: str) -> bool:
    return component in (edge[0].split("@")[0], edge[1].split("@")[0])


@pytest.mark.slow
def test_the_layout_by_position(driver: Any, tmp_path: Path):
    """The two layouts, their list, pins, link and files."""
    made = by_position(2)
    circuit = make_circuit(kv=2)
    page = View(replace(with_prompts(made.data), state={})).to_html(tmp_path / "layouts.html")
    opened(driver, page)
    assert "a1.h2" in {b["id"] for b in view(driver, "v.boxes")}
    driver.execute_script("window.mansuViews[0].pin(['m0'])")
    before = driver.execute_script(INK)
    driver.find_element("xpath", "//button[text()='by position']").click()
    settle(driver)
    assert view(driver, "v.byPosition") and driver.execute_script(INK) != before
    boxes = {b["id"]: b for b in view(driver, "v.boxes")}
    assert all("@" in id for id in boxes) and not driver.find_elements("css selector", ".heat")
    n = min(100, made.data.top)
    assert view(driver, "v.drawn.length") == n
    # what carries it: the strongest edges at positions, each in its column
    at = made.data.positions
    assert at is not None
    scores = sorted((abs(s), k, p) for p, row in enumerate(at.scores) for k, s in enumerate(row))
    ids = made.data.edge_ids()
    wanted = {(f"{ids[k][0]}@{p}", f"{ids[k][1]}@{p}") for _, k, p in scores[-n:]}
    ends = view(driver, "v.drawn.map((i) => [v.source[i], v.target[i]])")
    assert {(u, v) for u, v in ends} == wanted
    (_, k, p) = scores[-1]
    first = listed(driver)[0]
    assert first[0] == f"{ids[k][0]} → {ids[k][1]}@{p}" and first[2] == str(p)
    assert first[1] == f"{at.scores[p][k]:+.4g}".replace("-", "−")
    # a pinned component is pinned at every token; a node, at its own
    lit = "[...v.lit.edges].filter(([, n]) => n === 2).map(([i]) => [v.source[i], v.target[i]])"
    assert {(u, v) for u, v in view(driver, lit)} == {e for e in wanted if touches(e, "m0")}
    node = next(id for id in boxes if id.startswith("a1.h"))
    driver.execute_script(CLICK, boxes[node]["x"], boxes[node]["y"])
    settle(driver)
    assert view(driver, "[...v.selected]") == [node]
    card = driver.find_element("css selector", ".detail").text
    row = circuit.graph.writer_index[node.split("@")[0]]
    own = at.nodes[int(node.split("@")[1])][row]
    assert node in card and f"{own:+.4g}".replace("-", "−") in card
    driver.find_element("xpath", "//button[text()='nodes']").click()
    settle(driver)
    marked = "[...document.querySelectorAll('.list tr.on')].map((r) => r.dataset.key)"
    assert view(driver, marked) == [node]
    driver.find_element("xpath", "//button[text()='edges']").click()
    # a node's token, and the name of a column, can be searched and pointed at
    assert {(u, v) for u, v in find(driver, "@3")} == {e for e in wanted if e[0].endswith("@3")}
    find(driver, "")
    column = view(driver, "(({x}) => [x, v.layout.axisY])(v.layout.columns.at(-1))")
    driver.execute_script(POINT, *column)
    assert driver.find_element("css selector", ".tip").text == "4: 4"
    driver.find_element("css selector", "[aria-label='tokens of prompt 1: the sea']").click()
    driver.execute_script(POINT, *view(driver, "[v.layout.columns[0].x, v.layout.axisY]"))
    assert driver.find_element("css selector", ".tip").text == "0: the"
    # files and link
    drawn = view(driver, "v.drawn.length")
    svg = ET.fromstring(saved(driver, tmp_path, "SVG").read_text("utf-8"))
    curves = [e for e in svg.iter() if e.tag.endswith("path") and "C" in e.get("d", "")]
    assert len(curves) == drawn + view(driver, "v.moves.filter((m) => m.p).length")
    assert {"the", "sea", "m0"} <= {e.text for e in svg.iter() if e.tag.endswith("text")}
    rows = list(csv.reader(saved(driver, tmp_path, "CSV").read_text("utf-8").splitlines()))
    assert rows[0] == ["from → to", "score", "token"] and len(rows) == 1 + drawn
    image = pytest.importorskip("PIL.Image").open(saved(driver, tmp_path, "PNG"))
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    again = View.from_json(saved(driver, tmp_path, "JSON")).data
    assert again.state == {"by_position": True, "pinned": [node], "tokens_of": 0}
    driver.execute_async_script("setTimeout(arguments[0], 400)")
    link = driver.current_url
    driver.get("about:blank")
    driver.get(link)
    settle(driver)
    state = "[v.byPosition, [...v.selected], v.tokensOf, v.drawn.length]"
    assert view(driver, state) == [True, [node], 0, drawn]
    pressed = "[...document.querySelectorAll('.bar [aria-pressed=true]')].map((b) => b.textContent)"
    assert "by position" in view(driver, pressed) and "by layer" not in view(driver, pressed)
    # back: the node's component is what is pinned
    driver.find_element("xpath", "//button[text()='by layer']").click()
    settle(driver)
    assert view(driver, "v.pins()") == [node.split("@")[0]]
    assert len(driver.find_elements("css selector", ".heat"))
    driver.execute_script("window.mansuViews[0].click({box: window.mansuViews[0].pins()[0]}, true)")
    assert view(driver, "v.selected.size") == 0
    assert [c for c in browser.complaints(driver) if "readback" not in c] == []


@pytest.mark.slow
@pytest.mark.parametrize("kv", [4, 2])
def test_paths_by_position_go_on_at_later_tokens_only(driver: Any, tmp_path: Path, kv: int):
    """By networkx: keys and values lead to their heads' writes there and later, a query there."""
    made = by_position(kv, n=60)
    page = made.to_html(tmp_path / "paths.html")
    opened(driver, page)
    graph: Any = nx.DiGraph()
    drawn = [(u, v) for u, v in view(driver, "v.drawn.map((i) => [v.source[i], v.target[i]])")]
    graph.add_edges_from(drawn)
    own: dict[str, set[str]] = {}
    for n in list(graph):
        own.setdefault(box_id(n), set()).add(n)
        name, at = n.split("@")
        layer, _, rest = name.partition(".")
        if not rest or "<" not in rest:
            continue
        kind, number = rest[-2], rest.partition("<")[0]
        for head in (h for h in list(graph) if "<" not in h and h.startswith(f"{layer}.h")):
            h, later = head.split(".h")[1].split("@")
            shared = number == f"kv{int(h) // 2}" if kv == 2 and kind != "q" else number == f"h{h}"
            if shared and (later == at if kind == "q" else int(later) >= int(at)):
                graph.add_edge(n, head, inside=True)
    ends = {n for n in graph if n.startswith("logits")}
    begins = {n for n in graph if n.startswith("input")}
    ends |= {n for end in ends for n in nx.ancestors(graph, end)}
    begins |= {n for start in begins for n in nx.descendants(graph, start)}
    lit = "v.lit && [...v.lit.edges].map(([i, level]) => [v.source[i], v.target[i], level])"
    partly = 0
    for box, nodes in own.items():
        after = nodes | {d for n in nodes for d in nx.descendants(graph, n)}
        before = nodes | {d for n in nodes for d in nx.ancestors(graph, n)}
        wanted = {}
        for u, v in drawn:
            near = u in nodes or v in nodes
            if near or (u in after and v in ends) or (v in before and u in begins):
                wanted[u, v] = 2 if near else 1
        driver.execute_script(f"window.mansuViews[0].point({{box: {box!r}}})")
        settle(driver)
        assert {(u, v): n for u, v, n in view(driver, lit)} == wanted, box
        partly += 2 < len(wanted) < len(drawn)
    assert partly > 5
    # of what heads move, too, and the tip says that it is not scored
    at = "[v.moves.find((m) => v.hit(pointer(m), 0)?.move === m)].map((m) => m && m.line[8])[0]"
    pointer = (
        "const pointer = (m) => { const r = v.canvases[0].getBoundingClientRect(), z = v.fit;"
        " const [x, y] = m.line[8] ?? [-9, -9];"
        " return {clientX: r.left + v.shift + x * z, clientY: r.top + y * z}; };"
    )
    found = driver.execute_script(f"const v = window.mansuViews[0]; {pointer} return {at};")
    driver.execute_script(POINT, *found)
    tip = driver.find_element("css selector", ".tip").text
    assert "⇢" in tip and "not scored" in tip and "looks at" in tip
    quiet(driver, page)


@pytest.mark.parametrize("width", [1200, 430])
def test_names_by_position_are_legible_and_none_is_cut(driver: Any, tmp_path: Path, width: int):
    made = by_position(2, 9, n=120)
    page = made.to_html(tmp_path / "legible.html")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(driver, page)
    driver.execute_script(
        "window.texts = []; const own = CanvasRenderingContext2D.prototype.fillText;"
        "CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {"
        "  const z = this.getTransform().a;"
        "  window.texts.push([text, parseFloat(this.font) * z, this.measureText(text).width * z]);"
        "  own.call(this, text, x, y); };"
        "window.mansuViews[0].draw()"
    )
    settle(driver)
    texts = driver.execute_script("return window.texts")
    wanted = {b["label"] for b in view(driver, "v.boxes")} | {"0", "8"}
    assert wanted <= {name for name, *_ in texts} and len(wanted) > 10
    column = view(driver, "v.layout.column * v.fit")
    for name, points, across in texts:
        assert points >= 10.9 and (across <= column or name in ("input", "logits")), name
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    size["width"] = 1280
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    quiet(driver, page)


CLOSE = (
    "const v = window.mansuViews[0];"
    "for (const [name, ids] of Object.entries(arguments[0])) v.group(name, ids);"
    "for (const name of Object.keys(arguments[0])) v.toggleGroup(name);"
)
DOUBLE_CLICK = (
    CLICK.replace('["pointermove", "pointerdown", "pointerup"]', '["down", "up", "down", "up"]')
    .replace("PointerEvent(name, at)", "PointerEvent('pointer' + name, at)")
    + "c.dispatchEvent(new MouseEvent('dblclick', at));"
)  # fmt: skip


def summed(data: GraphData, drawn: int) -> dict[tuple[str, str], list[int]]:
    """By the ends of a line: the edges that it stands for, of those drawn with GROUPS closed."""
    group_of = {id: f"⊞ {name}" for name, ids in GROUPS.items() for id in ids}
    heads, kv = data.architecture.n_heads, data.architecture.n_kv_heads
    for bar in range(kv if kv < heads else 0):
        for layer in range(data.architecture.n_layers):
            each = heads // kv
            own = {group_of.get(f"a{layer}.h{bar * each + h}") for h in range(each)}
            if len(own) == 1 and (one := own.pop()):
                group_of[f"a{layer}.kv{bar}"] = one
    lines: dict[tuple[str, str], list[int]] = {}
    for i, (u, v) in enumerate(data.edge_ids()[:drawn]):
        s, t = (group_of.get(x.split("<")[0], x) for x in (u, v))
        if s != t or s not in group_of.values():
            lines.setdefault((s, t), []).append(i)
    return lines


@pytest.mark.parametrize("kv", [4, 2])
def test_a_closed_group_is_one_node_whose_edges_are_sums(driver: Any, tmp_path: Path, kv: int):
    circuit = make_circuit(kv=kv, n=120)
    data = changes_view(circuit, *make_attributions(circuit)).data
    page = View(data).to_html(tmp_path / "closed.html")
    opened(driver, page)
    before = {b["id"]: b for b in view(driver, "v.boxes")}
    open_edges = view(driver, "v.drawn.length")
    driver.execute_script(CLOSE, GROUPS)
    settle(driver)
    lines = summed(data, open_edges)
    names = list(CLASSES)
    assert data.edges.classes is not None
    wanted = {
        ends: [len(own), names[data.edges.classes[own[0]]]]  # the strongest comes first
        for ends, own in lines.items()
    }
    assert max(n for n, _ in wanted.values()) > 2 and len(lines) < open_edges
    ends = "v.source[i], v.target[i]"
    found = view(driver, f"v.drawn.map((i) => [{ends}, v.parts(i).length, v.nameOf(i)])")
    assert {(u, v): rest for u, v, *rest in found} == wanted and len(found) == len(wanted)
    scores = view(driver, "v.drawn.map((i) => v.panes.map((_, p) => v.score(i, p)))")
    for (u, v, *_), shown in zip(found, scores, strict=True):
        sums = [sum(pane[i] for i in lines[u, v]) for pane in data.edges.scores]
        assert shown == pytest.approx(sums), (u, v)
    strength = [max(map(abs, s)) for s in scores]
    assert strength == sorted(strength, reverse=True)
    assert view(driver, "v.widest") == pytest.approx(max(*strength, view(driver, "v.largest")))
    # one box at the mean of the members', in the layer of the highest; nothing else moves
    after = {b["id"]: b for b in view(driver, "v.boxes")}
    gone = {id for ids in GROUPS.values() for id in ids}
    assert set(after) - set(before) == {f"⊞ {name}" for name in GROUPS}
    assert gone <= set(before) - set(after)
    assert set(before) - set(after) - gone == (set() if kv == 4 else {"a2.kv0"})
    assert all(after[id] == before[id] for id in set(before) & set(after))
    rows = view(driver, "[...v.layout.rows.values()]")
    early, late = after["⊞ early"], after["⊞ late <q>"]
    assert early["x"] == pytest.approx(np.mean([before[n]["x"] for n in GROUPS["early"]]))
    assert rows[1] > early["y"] > rows[2] and rows[2] > late["y"]
    assert driver.find_element("css selector", ".count").text.startswith(
        f"{open_edges} of {data.total} edges"
    )
    # a row of the list each
    listing = {r[0]: r[1:] for r in listed(driver)}
    assert set(listing) == {f"{u} → {v}" for u, v in lines}
    driver.find_element("xpath", "//button[text()='nodes']").click()
    listing = {r[0]: r[1:] for r in listed(driver)}
    assert not gone & set(listing) and {f"⊞ {name}open" for name in GROUPS} <= set(listing)
    members = [circuit.graph.writer_index[n] for n in GROUPS["early"]]
    total = sum(data.nodes.scores[0][m] for m in members)
    row = listing["⊞ earlyopen"]
    assert float(row[0].replace("−", "-")) == pytest.approx(total, rel=1e-3)
    into = sum(len(own) for (_, v), own in lines.items() if v == "⊞ early")
    assert row[3] == str(into) and row[-1] == "early"
    quiet(driver, page)


def test_a_closed_group_says_what_its_edges_became(driver: Any, tmp_path: Path):
    circuit = make_circuit(n=120)
    data = changes_view(circuit, *make_attributions(circuit)).data
    page = View(data).to_html(tmp_path / "said.html")
    opened(driver, page)
    drawn = view(driver, "v.drawn.length")
    driver.execute_script(CLOSE, GROUPS)
    settle(driver)
    assert data.edges.classes is not None
    seen, ids = set(), data.edge_ids()
    for ends, own in summed(data, drawn).items():
        if not any(end.startswith("⊞") for end in ends):
            continue
        line = f"v.drawn.find((i) => v.source[i] === {ends[0]!r} && v.target[i] === {ends[1]!r})"
        text = view(driver, f"v.describeEdge({line}).map((x) => x.textContent).join(' ')")
        became = [list(CLASSES)[data.edges.classes[i]] for i in own]
        one = " → ".join(ids[own[0]])
        assert (f"sum of {len(own)} drawn edges;" if len(own) > 1 else f"for {one};") in text
        inside = sum(data.edges.in_circuit[i] for i in own)
        assert ("outside the circuit" in text) == (inside == 0)
        if len(set(became)) > 1:
            assert "edges differ" in text and f"{became.count(became[0])} {became[0]}" in text
            assert text.endswith(f"drawn as {became[0]}, the class of the strongest, {one}")
        else:
            assert text.endswith(f"all {became[0]}" if len(own) > 1 else became[0])
        seen.add((len(own) > 1, len(set(became)) > 1))
    assert seen == {(False, False), (True, False), (True, True)}
    # classes that are hidden are not summed
    driver.find_element("xpath", "//button[contains(., 'new: ')]").click()
    left = view(driver, "v.drawn.flatMap((i) => v.parts(i)).map((i) => v.nameOf(i))")
    assert "new" not in left and len(set(left)) > 2
    quiet(driver, page)


def test_closed_groups_open_by_mouse_key_and_button(driver: Any, tmp_path: Path):
    page = circuit_view(make_circuit(n=80)).to_html(tmp_path / "open.html")
    opened(driver, page)
    driver.execute_script(CLOSE, GROUPS)
    driver.execute_script("window.mansuViews[0].pin(['m1'])")
    settle(driver)
    at = "(({x, y}) => [x, y])(v.layout.box['⊞ early'])"
    # a click pins the members, and unpins them
    driver.execute_script(CLICK, *view(driver, at))
    assert view(driver, "[...v.selected]") == GROUPS["early"]
    card = driver.find_element("css selector", ".detail").text
    assert "4 components: a0.h1, a0.h3, m0, a1.h0" in card and "of it within" in card
    pins = driver.find_elements("css selector", ".pins [aria-label^=unpin]")
    assert [p.text for p in pins] == ["⊞ early ×"]
    driver.execute_script(CLICK, *view(driver, at))
    assert view(driver, "[...v.selected]") == []
    # two open it, and leave the pins
    driver.execute_script("window.mansuViews[0].pin(['m1'])")
    settle(driver)
    driver.execute_script(DOUBLE_CLICK, *view(driver, at))
    assert view(driver, "[[...v.closed], [...v.selected], v.view.k]") == [["late <q>"], ["m1"], 1]
    settle(driver)
    driver.execute_script(DOUBLE_CLICK, *view(driver, "(({x, y}) => [x, y])(v.layout.box.m0)"))
    assert view(driver, "[...v.closed].sort()") == ["early", "late <q>"]
    canvas = driver.find_element("css selector", "canvas")
    press = "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'g'}))"
    driver.execute_script("const v = window.mansuViews[0]; v.point(null); v.focus = '⊞ early'")
    driver.execute_script(press, canvas)
    assert view(driver, "[[...v.closed], v.focus]") == [["late <q>"], "a0.h1"]
    driver.execute_script(press, canvas)
    assert view(driver, "[v.closed.size, v.focus]") == [2, "⊞ early"]
    # the buttons beside the groups, and in the list
    driver.find_element("css selector", ".pins [aria-label='open the group early']").click()
    assert view(driver, "[...v.closed]") == ["late <q>"]
    driver.find_element("xpath", "//button[text()='nodes']").click()
    driver.find_element("css selector", ".list [aria-label='open the group late <q>']").click()
    assert view(driver, "[...v.closed]") == []
    settle(driver)
    driver.find_element("css selector", ".list [aria-label='close the group early']").click()
    assert view(driver, "[...v.closed]") == ["early"]
    settle(driver)
    # a group that is dissolved is not closed any more
    driver.find_element("css selector", "[aria-label='dissolve the group early']").click()
    assert view(driver, "[v.closed.size, v.boxes.filter((b) => b.kind === 'group').length]") == [
        0, 0,
    ]  # fmt: skip
    assert view(driver, "v.drawn.length") == 80
    quiet(driver, page)


@pytest.mark.parametrize("kv", [4, 2])
def test_paths_and_search_reach_into_closed_groups(driver: Any, tmp_path: Path, kv: int):
    circuit = make_circuit(kv=kv, n=30)
    made = circuit_view(circuit)
    page = made.to_html(tmp_path / "inside.html")
    opened(driver, page)
    drawn = view(driver, "v.drawn.length")
    lit = "[...v.lit.edges].map(([i, level]) => [v.source[i], v.target[i], level])"
    driver.execute_script(CLOSE, GROUPS)
    lines, ids = summed(made.data, drawn), made.data.edge_ids()

    def pointed(what: str) -> dict[tuple[str, str], int]:
        driver.execute_script(f"window.mansuViews[0].point({what})")
        settle(driver)
        return {(u, v): level for u, v, level in view(driver, lit)}

    partly = 0
    for name in ("a0.h0", "m1", "a1.h2"):
        alone = on_paths(circuit, name)
        wanted = {e: max(alone.get(ids[i], 0) for i in own) for e, own in lines.items()}
        assert pointed(f"{{box: {name!r}}}") == {e: n for e, n in wanted.items() if n}, name
        partly += 0 < sum(map(bool, wanted.values())) < len(lines)
    assert partly
    each = [on_paths(circuit, name) for name in GROUPS["early"]]
    wanted = {e: max(p.get(ids[i], 0) for p in each for i in own) for e, own in lines.items()}
    found = pointed("{box: '⊞ early'}")
    assert found == {e: n for e, n in wanted.items() if n}
    assert all(n == 2 for e, n in found.items() if "⊞ early" in e)
    assert "⊞ early" in view(driver, "[...v.lit.boxes]")
    # a line: itself, and what leads to its sources
    graph, own = circuit.to_networkx(), lines["⊞ early", "logits"]
    number = "v.drawn.find((i) => v.source[i] === '⊞ early' && v.target[i] === 'logits')"
    before = {n for i in own for n in nx.ancestors(graph, ids[i][0]) | {ids[i][0]}}
    begins = nx.descendants(graph, "input") | {"input"}
    wanted = {
        e: max(2 if i in own else int(ids[i][1] in before and ids[i][0] in begins) for i in parts)
        for e, parts in lines.items()
    }
    assert pointed(f"{{edge: {view(driver, number)}}}") == {e: n for e, n in wanted.items() if n}
    # names of group and members find all of its lines
    touching = {e for e in lines if "⊞ early" in e}
    assert find(driver, "early") == find(driver, "a1.h0") == touching
    assert find(driver, "⊞ early → ") == {e for e in lines if e[0] == "⊞ early"}
    assert find(driver, "a0.h1 → logits") == {e for e in lines if e == ("⊞ early", "logits")}
    quiet(driver, page)


@pytest.mark.slow
def test_closed_groups_are_saved_and_restored(driver: Any, tmp_path: Path):
    circuit = make_circuit(n=60)
    made = changes_view(circuit, *make_attributions(circuit), title="closed")
    page = made.to_html(tmp_path / "page.html")
    opened(driver, page)
    driver.execute_script(CLOSE, GROUPS)
    driver.execute_script("const v = window.mansuViews[0]; v.click({edge: v.drawn.find("
                          "(i) => v.source[i] === '⊞ early')})")  # fmt: skip
    driver.execute_async_script("setTimeout(arguments[0], 400)")
    state = "[v.drawn.map((i) => [v.source[i], v.target[i]]), v.selectedEdge, [...v.closed]]"
    wanted, link = view(driver, state), driver.current_url
    assert wanted[1][0] == "⊞ early" and wanted[2] == list(GROUPS)
    svg = ET.fromstring(saved(driver, tmp_path, "SVG").read_text("utf-8"))
    curves = [e for e in svg.iter() if e.tag.endswith("path") and "C" in e.get("d", "")]
    assert len(curves) == 3 * len(wanted[0])
    words = {e.text for e in svg.iter() if e.tag.endswith("text")}
    assert {"early", "late <q>", "m1"} <= words and not {"m0", "a0.h1"} & words
    rows = list(csv.reader(saved(driver, tmp_path, "CSV").read_text("utf-8").splitlines()))
    assert len(rows) == 1 + len(wanted[0])
    again = View.from_json(saved(driver, tmp_path, "JSON")).data
    assert again.state == {"edge": wanted[1], "groups": GROUPS, "closed": list(GROUPS)}
    assert saved(driver, tmp_path, "PNG").stat().st_size > 10_000
    for where in (link, View(again).to_html(tmp_path / "again.html").as_uri()):
        driver.get("about:blank")
        driver.get(where)
        settle(driver)
        assert view(driver, state) == wanted
    # opened: the line is gone, and with it its selection
    driver.execute_script("window.mansuViews[0].toggleGroup('early')")
    assert view(driver, "[v.selectedEdge, [...v.closed]]") == [[], ["late <q>"]]
    assert browser.complaints(driver) == []


@pytest.mark.parametrize("sizes", [(3, 4, 2), (12, 12, 12), (30, 9, 3), (4, 8, 8)])
@pytest.mark.parametrize("parallel", [False, True])
def test_closed_groups_cover_nothing(
    driver: Any, tmp_path: Path, sizes: tuple[int, int, int], parallel: bool
):
    """Also three in a row, with names of any length, an MLP beside them, and either end in one."""
    graph = Graph(Architecture(*sizes, parallel=parallel))
    shape = graph.exists.shape
    scores = np.random.default_rng(0).standard_t(2, shape) * graph.exists
    edges = np.abs(scores) >= np.sort(np.abs(scores[graph.exists]))[-80]
    page = circuit_view(Circuit(graph, scores, edges & graph.exists)).to_html(tmp_path / "c.html")
    opened(driver, page)
    last = sizes[0] - 1
    driver.execute_script("window.mansuViews[0].all = true; window.mansuViews[0].refilter()")
    groups = {
        "x" * 40: ["a0.h0", f"a{last}.h0"], "three long names in one row": [f"a{last}.h1", "m0"],
        "y": ["a0.h3", f"a{last}.h3"], "low": ["a0.h1", "a0.h2"], "top": ["logits", f"m{last}"],
        "start": ["input"], "z" * 40: [f"a1.h{sizes[1] - 1}"],
    }  # fmt: skip
    driver.execute_script(CLOSE, groups)
    settle(driver)
    boxes = [b for b in view(driver, "v.boxes")]
    closed = [b for b in boxes if b["kind"] == "group"]
    assert {b["label"] for b in closed} == set(groups)
    size = view(driver, "[v.layout.width, v.layout.height]")
    for one in closed:
        assert one["x"] - one["width"] / 2 >= 0 and one["x"] + one["width"] / 2 <= size[0]
        assert one["y"] - one["height"] / 2 >= 0 and one["y"] + one["height"] / 2 <= size[1]
        for other in boxes:
            across = (one["width"] + other["width"]) / 2 - abs(one["x"] - other["x"])
            down = (one["height"] + other["height"]) / 2 - abs(one["y"] - other["y"])
            assert one is other or across <= 0.01 or down <= 0.01, (one["id"], other["id"])
    quiet(driver, page)


WIDGET = """<!doctype html><meta charset="utf-8"><body><div id="w" style="width:1000px"></div>
<script type="application/json" id="d">DATA</script>
<script type="module">MODULE
const state = {data: JSON.parse(document.getElementById("d").textContent), selected: [],
               selected_edge: [], threshold: null, changed_only: false};
const calls = {};
window.saved = [];
window.model = {
  get: (k) => state[k], set: (k, v) => { state[k] = v; },
  save_changes: () => window.saved.push(structuredClone({...state, data: 0})),
  on: (k, f) => (calls[k] ??= []).push(f), off: (k, f) => {},
  fromPython: (k, v) => { state[k] = v; for (const f of calls["change:" + k] ?? []) f(); },
};
window.mansuViews = [mount(document.createElement("div"), state.data)];
const render = DEFAULT.render;
window.stop = render({model: window.model, el: document.getElementById("w")});
</script>"""


def test_the_widget_module_speaks_to_its_model(driver: Any, tmp_path: Path):
    """anywidget's contract with a stand-in for the kernel; a real kernel: scripts/check_lab.py."""
    made = circuit_view(make_circuit())
    module = module_source().replace("export default {", "const DEFAULT = {")
    page = tmp_path / "widget.html"
    data = json.dumps(made.data.to_json()).replace("<", "\\u003c")
    page.write_text(WIDGET.replace("MODULE", module).replace("DATA", data), "utf-8")
    opened(driver, page)
    layout = place(make_circuit().graph.architecture)
    box = layout.boxes["a0.h1"]
    driver.execute_script(
        "const c = document.querySelector('#w canvas'), r = c.getBoundingClientRect();"
        "const [x, y, w] = arguments, f = Math.min(r.width / w, 1.5, r.height / arguments[3]);"
        "const at = {clientX: r.left + (r.width - w * f) / 2 + x * f, clientY: r.top + y * f,"
        " pointerId: 1, button: 0};"
        "for (const n of ['pointerdown', 'pointerup']) c.dispatchEvent(new PointerEvent(n, at));",
        box.x, box.y, layout.width, layout.height,
    )  # fmt: skip
    assert driver.execute_script("return window.saved.at(-1).selected") == ["a0.h1"]
    driver.execute_script("window.model.fromPython('threshold', 1e9)")
    assert driver.find_element("css selector", "#w .count").text.startswith("0 of")
    driver.execute_script("window.model.fromPython('selected', ['m1'])")
    assert "m1" in driver.find_element("css selector", "#w .detail").text
    driver.execute_async_script("setTimeout(arguments[0], 400)")
    assert driver.execute_script("return window.saved.at(-1).state") == {
        "pinned": ["m1"], "threshold": 1e9,
    }  # fmt: skip
    driver.execute_script("window.model.fromPython('state', {find: 'a1', notes: {m0: 'so'}})")
    last = driver.execute_script("return window.saved.at(-1)")
    assert last["selected"] == [] and last["threshold"] is None
    find = driver.find_element("css selector", "#w input[type=search]")
    assert find.get_attribute("value") == "a1"
    assert not driver.find_element("css selector", "#w .count").text.startswith("0 of")
    # a closed group: Python hears of its members and its line, and may close one, too
    driver.execute_script(
        "window.model.fromPython('state', {groups: {x: ['m0', 'a0.h1']}, closed: ['x'], all: true})"
    )
    assert ", as " in driver.find_element("css selector", "#w .count").text
    driver.find_element("css selector", "#w [aria-label='pin the group x']").click()
    assert driver.execute_script("return window.saved.at(-1).selected") == ["m0", "a0.h1"]
    rows = driver.find_elements("css selector", "#w .list tbody td:first-child button")
    next(r for r in rows if r.text.startswith("⊞ x → ")).click()
    assert driver.execute_script("return window.saved.at(-1).selected_edge")[0] == "⊞ x"
    driver.find_element("css selector", "#w [aria-label='open the group x']").click()
    driver.execute_async_script("setTimeout(arguments[0], 400)")
    assert "closed" not in driver.execute_script("return window.saved.at(-1).state")
    assert driver.execute_script("return window.saved.at(-1).selected_edge") == []
    driver.execute_script("window.stop()")
    assert browser.complaints(driver) == []


PAINTED = """
return [...document.querySelectorAll(".mg canvas")].map((c) => {
  const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return [[...d.slice(0, 3)].join(), new Set(new Uint32Array(d.buffer)).size];
});"""
LIGHT, DARK = "255,255,255", "21,25,29"
NOTEBOOK = """<!doctype html><meta charset="utf-8"><body data-jp-theme-light="true">
<div id="lab"></div>
<script type="application/json" id="d">DATA</script>
<script type="module">MODULE
const data = JSON.parse(document.getElementById("d").textContent);
const el = document.createElement("div");
window.mansuViews = [mount(el, data)];
window.attach = () => document.getElementById("lab").append(el);
window.detach = () => el.remove();
window.theme = (light) => { // as JupyterLab: the attribute, then all is hidden for a frame
  const lab = document.getElementById("lab");
  document.body.dataset.jpThemeLight = String(light);
  queueMicrotask(() => { // after those who watch the attribute
    lab.style.display = "none";
    requestAnimationFrame(() => { lab.style.display = ""; });
  });
};
</script>"""


def test_a_notebook_that_renders_while_detached_and_switches_themes(driver: Any, tmp_path: Path):
    """What JupyterLab 4 does; the real one: scripts/check_lab.py."""
    circuit = make_circuit()
    made = changes_view(circuit, *make_attributions(circuit))
    module = module_source().replace("export default {", "const DEFAULT = {")
    page = tmp_path / "notebook.html"
    data = json.dumps(made.data.to_json()).replace("<", "\\u003c")
    page.write_text(NOTEBOOK.replace("MODULE", module).replace("DATA", data), "utf-8")
    opened(driver, page)

    def painted(paper: str) -> bool:
        driver.execute_async_script("setTimeout(arguments[0], 250)")
        found = driver.execute_script(PAINTED)
        return len(found) == 3 and all(p == paper and n > 100 for p, n in found)

    driver.execute_script("window.attach()")
    assert painted(LIGHT)
    for light in (False, True, False):
        driver.execute_script(f"window.theme({str(light).lower()})")
        assert painted(LIGHT if light else DARK)
    driver.execute_script("window.detach(); document.body.dataset.jpThemeLight = 'true'")
    settle(driver)
    driver.execute_script("window.attach()")
    assert painted(LIGHT)
    assert [c for c in browser.complaints(driver) if "readback" not in c] == []


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("jupyterlab"), reason="jupyterlab is not installed"
)
def test_a_real_jupyterlab_shows_the_widget_in_its_theme():
    script = Path(__file__).parents[1] / "scripts" / "check_lab.py"
    done = subprocess.run(
        [sys.executable, script], check=False, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pixels: those of the theme" in done.stdout and "Python heard" in done.stdout
