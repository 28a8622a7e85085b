"""Pages and widget in a real Chromium without a network: no error, no request, and it works."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from test_view import SHOWN, make_attributions, make_circuit

from mansu_interp.circuits.circuit import CircuitMeta
from mansu_interp.circuits.compare import GraphComparison
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.viz.data import Judged
from mansu_interp.viz.layout import Layout, curve, place
from mansu_interp.viz.page import module_source
from mansu_interp.viz.view import changes_view, circuit_view

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")


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
