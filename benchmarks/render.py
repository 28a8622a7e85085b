"""How long drawing takes, in headless Chromium (software rendering), with 500 edges drawn.

    python benchmarks/render.py

Held are 30,000 edges of 12 layers x 12 heads, in one pane and in three; 30,000 of 30 layers x 9
heads; and 3,000 of those at each of 8 tokens, by position. Prints medians over 30 repetitions:
loading the page, one frame of the canvas, one move of the slider, one hover, its paths, the list,
and the same 500 edges as SVG elements.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402

from mansu_interp.circuits.circuit import Circuit  # noqa: E402
from mansu_interp.circuits.scores import Attribution  # noqa: E402
from mansu_interp.circuits.search.meta import CircuitMeta  # noqa: E402
from mansu_interp.models.graph import Architecture, Graph  # noqa: E402
from mansu_interp.viz.view import attribution_view, changes_view, circuit_view  # noqa: E402

MEASURE = """
const v = window.mansuViews[0], out = {}, n = 30;
const median = (f) => {
  const t = [];
  for (let i = 0; i < n; i++) { const s = performance.now(); f(i); t.push(performance.now() - s); }
  return t.sort((a, b) => a - b)[n >> 1];
};
const force = () => v.canvases.forEach((c, p) => {
  v.paint(p);
  c.getContext("2d").getImageData(0, 0, 1, 1); // waits until it is really painted
});
v.topInput.value = 500; v.topInput.dispatchEvent(new Event("change"));
out.drawn = v.drawn.length;
out.held = v.order.length;
out.frame = median(force);
out.slider = median((i) => { v.setThreshold(v.atRank(500 - i)); force(); });
v.setThreshold(v.atRank(500));
const r = v.canvases[0].getBoundingClientRect();
out.hover = median((i) => v.hit({clientX: r.left + 50 + 9 * i, clientY: r.top + 40 + 7 * i}, 0));
out.paths = median((i) => { v.hover = {box: v.boxes[i % v.boxes.length].id}; v.light(); });
v.hover = null;
v.light();
out.list = median(() => v.list.render());
const box = document.createElement("div");
document.body.append(box);
out.svg = median(() => {
  box.innerHTML = v.canvases.map(() => '<svg width="400" height="400">' + v.drawn.map((i) => {
    const p = v.curve(i).p;
    return `<path fill="none" stroke="#07b" d="M${p[0]} ${p[1]}C${p.slice(2).join(" ")}"/>`;
  }).join("") + "</svg>").join("");
  box.getBoundingClientRect();
});
box.remove();
return out;
"""


def make_circuit(*sizes: int) -> Circuit:
    """The strongest 500 edges of random scores."""
    graph = Graph(Architecture(*sizes))
    rng = np.random.default_rng(0)
    scores = (rng.standard_t(2, graph.exists.shape) * graph.exists).astype(np.float32)
    edges = graph.exists & (np.abs(scores) >= np.sort(np.abs(scores[graph.exists]))[-500])
    return Circuit(graph, scores, edges, CircuitMeta("benchmark"))


def main() -> None:
    """Measure each view."""
    if why := browser.missing():
        raise SystemExit(f"Cannot measure: {why}.")
    circuit, deep = make_circuit(12, 12, 12), make_circuit(30, 9, 3)
    made = [Attribution(circuit.graph, circuit.scores * k, 1, 0) for k in (1, 0.4, 0.7)]
    share = np.random.default_rng(1).dirichlet([0.2] * 8, deep.scores.shape)
    parts = (np.moveaxis(share, -1, 0) * deep.scores).astype(np.float32)
    placed = Attribution(deep.graph, deep.scores, 1, 0, parts)
    views = {
        "12 x 12, 1 pane": circuit_view(circuit, limit=30_000),
        "12 x 12, 3 panes": changes_view(circuit, *made, limit=30_000),
        "30 x 9, 1 pane": circuit_view(deep, limit=30_000),
        "30 x 9, by position": attribution_view(placed, by_position=True),
    }
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as driver:
        driver.set_script_timeout(300)
        for name, view in views.items():
            page = view.to_html(Path(folder) / "page.html")
            driver.get(page.as_uri())
            load = driver.execute_script(
                "const [n] = performance.getEntriesByType('navigation'); return n.loadEventEnd;"
            )
            m = driver.execute_script(MEASURE)
            size = page.stat().st_size / 1e6
            print(f"{name}: {m['held']:,} edges held, {m['drawn']} drawn, page {size:.1f} MB")
            print(
                f"  ms: load {load:.0f}, frame {m['frame']:.1f}, slider {m['slider']:.1f}, ", end=""
            )
            print(f"hover {m['hover']:.2f}, paths {m['paths']:.2f}, list {m['list']:.1f}; ", end="")
            print(f"SVG elements made, not painted, {m['svg']:.1f}")


if __name__ == "__main__":
    main()
