"""How long drawing takes: 30,000 edges held, 500 drawn, in headless Chromium (software rendering).

    python benchmarks/render.py

Prints medians over 30 repetitions: loading the page, one frame of the canvas, one move of the
slider, one hover, its paths, the list, and the same 500 edges as SVG elements, for one pane and for
three.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402

from mansu_interp.circuits.circuit import Circuit, CircuitMeta  # noqa: E402
from mansu_interp.circuits.scores import Attribution  # noqa: E402
from mansu_interp.models.graph import Architecture, Graph  # noqa: E402
from mansu_interp.viz.view import changes_view, circuit_view  # noqa: E402

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


def main() -> None:
    """Measure one pane and three."""
    if why := browser.missing():
        raise SystemExit(f"Cannot measure: {why}.")
    graph = Graph(Architecture(12, 12, 12))
    rng = np.random.default_rng(0)
    scores = (rng.standard_t(2, graph.exists.shape) * graph.exists).astype(np.float32)
    edges = graph.exists & (np.abs(scores) >= np.sort(np.abs(scores[graph.exists]))[-500])
    circuit = Circuit(graph, scores, edges, CircuitMeta("benchmark"))
    made = [Attribution(graph, scores * k, 1, 0) for k in (1, 0.4, 0.7)]
    views = {"1 pane": circuit_view(circuit, limit=30_000)}
    views["3 panes"] = changes_view(circuit, *made, limit=30_000)
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as driver:
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
