"""What a user gains: faithfulness of circuits against their size, as a picture.

    python benchmarks/curves.py        prints the points, writes docs/pictures/faithfulness.svg
    python benchmarks/curves.py --seed 1 --out FILE.svg    other pairs, another picture

Three cases: `capitals` and `countries` in the embedded model (1,055 edges), and a random Llama of
three layers (190 edges; `discovery.py`). Edges are scored on 96 pairs (random: 32), and circuits
measured by exact ablation on others of the same case that neither scores nor search saw. Series:

    random           edges in a random order
    EAP              ranked by EAP, which TransformerLens 4.3 has
    EAP-IG           ranked by EAP-IG, the default here; hannamw/EAP-IG gives the same scores
    EAP-IG, removal  and then edges left out by exact ablation, for several targets

Sizes are of what is left on paths from input to logits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from discovery import random_model, random_pairs

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.search.faithfulness import minimal_edges, strongest
from mansu_interp.circuits.search.removal import remove_edges
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.viz.plots import Axis
from mansu_interp.viz.svg import escape, open_svg

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "faithfulness.svg"
TRIES, HELD_OUT = 300, 100
TARGETS = (0.5, 0.7, 0.85, 0.95)
SERIES = {
    "random": ("quiet", "2 3"),
    "EAP": ("weakened", "6 3"),
    "EAP-IG": ("kept", ""),
    "EAP-IG, removal": ("recovered", ""),
}
"""Colour and dashes."""
WIDTH, HEIGHT, LEFT, TOP = 250, 190, 44, 44
Points = list[tuple[int, float]]


def make(case: str, seed: int) -> tuple[LanguageModel, PairSet, PairSet]:
    """A model, pairs to score and to search on, and held-out pairs."""
    if case == "random":
        pairs = random_pairs(64, seed).pairs
        return random_model(), PairSet(case, pairs[:32]), PairSet(case, pairs[32:])
    model = load_model("facts")
    forget = load_task(case, model).forget
    chosen = forget.sample(CircuitConfig().pairs, seed)
    seen = set(chosen)
    rest = PairSet(case, tuple(p for p in forget if p not in seen))
    return model, chosen, rest.sample(HELD_OUT, seed)


def sizes(n_edges: int) -> list[int]:
    """Numbers of edges to ask for, 15 % apart or one."""
    out = [4]
    while out[-1] < n_edges:
        out.append(min(n_edges, max(out[-1] + 1, round(1.15 * out[-1]))))
    return out


def measure(case: str, seed: int) -> dict[str, Points]:
    """(edges, faithfulness) of every series."""
    model, pairs, others = make(case, seed)
    graph, held_out = model.graph, Ablation(model, others)
    rng = np.random.default_rng(seed)
    scores = {
        "random": rng.random(graph.exists.shape),
        "EAP": attribute(model, pairs, config=AttributionConfig(method="eap")).scores,
        "EAP-IG": attribute(model, pairs).scores,
    }
    out: dict[str, Points] = {name: [] for name in SERIES}
    for name, values in scores.items():
        for n in sizes(graph.n_edges):
            edges = strongest(graph, values, n)
            if edges.any():
                out[name].append((int(edges.sum()), held_out.faithfulness(edges)))
    search = Ablation(model, pairs.sample(CircuitConfig().faithfulness_pairs, seed))
    for target in TARGETS:
        edges, _ = minimal_edges(graph, scores["EAP-IG"], search.faithfulness, target=target)
        less = remove_edges(search, edges, target=target, tries=TRIES).edges
        out["EAP-IG, removal"].append((int(less.sum()), held_out.faithfulness(less)))
    return out


def panel(case: str, found: dict[str, Points], left: float) -> list[str]:
    """One case as SVG."""
    most = max(n for points in found.values() for n, _ in points)
    x = Axis(3, most, left, left + WIDTH, True)
    y = Axis(0, 1.05, TOP + HEIGHT, TOP, False)
    out = [f'<text x="{left}" y="{TOP - 12}">{escape(case)}</text>']
    for f in (0, 0.25, 0.5, 0.75, 1):
        at = y.at(f)
        out += [
            f'<path class="axis" d="M{left},{at:.1f}H{left + WIDTH}"/>',
            f'<text class="soft" x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{f}</text>',
        ]
    out.append(f'<path class="target" d="M{left},{y.at(0.85):.1f}H{left + WIDTH}"/>')
    for n in (5, 10, 20, 50, 100, 200, 500, 1000):
        if n <= most:
            out.append(
                f'<text class="soft" x="{x.at(n):.1f}" y="{TOP + HEIGHT + 16}" '
                f'text-anchor="middle">{n:,}</text>'
            )
    for name, points in found.items():
        colour, dash = SERIES[name]
        stroke = f'style="stroke:var(--{colour});stroke-width:2;stroke-dasharray:{dash or "none"}"'
        places = [(x.at(n), y.at(f)) for n, f in sorted(points)]
        if name == "EAP-IG, removal":
            for (a, b), (n, f) in zip(places, sorted(points), strict=True):
                out.append(
                    f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="var(--{colour})">'
                    f"<title>{escape(name)}: {n} edges, {f:.3f}</title></circle>"
                )
        else:
            line = "L".join(f"{a:.1f},{b:.1f}" for a, b in places)
            out.append(f'<path d="M{line}" {stroke}><title>{escape(name)}</title></path>')
    return out


def draw(cases: dict[str, dict[str, Points]]) -> str:
    """All cases side by side."""
    step = WIDTH + LEFT + 12
    width, height = len(cases) * step + 8, TOP + HEIGHT + 62
    title = "Faithfulness of circuits on held-out pairs, by the number of their edges"
    out = [open_svg(width, height, title), f'<text class="soft" x="8" y="16">{title}</text>']
    for k, (case, found) in enumerate(cases.items()):
        out += panel(case, found, k * step + LEFT)
    at = LEFT
    base = TOP + HEIGHT + 48
    for name, (colour, dash) in SERIES.items():
        mark = (
            f'<circle cx="{at + 10}" cy="{base - 4}" r="4" fill="var(--{colour})"/>'
            if name == "EAP-IG, removal"
            else f'<path d="M{at},{base - 4}h20" style="stroke:var(--{colour});stroke-width:2;'
            f'stroke-dasharray:{dash or "none"}"/>'
        )
        out += [mark, f'<text x="{at + 26}" y="{base}">{escape(name)}</text>']
        at += 26 + 7 * len(name) + 24
    out.append(f'<text class="soft" x="{at}" y="{base}">dotted: the target, 0.85</text></svg>')
    return "\n".join(out)


def main() -> None:
    """Read the command line, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of pairs and of the random order")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for case in ("capitals", "countries", "random"):
        found = measure(case, args.seed)
        label = "random weights" if case == "random" else f"facts, {case}"
        cases[label] = found
        print(f"\n| {label} | edges: faithfulness on held-out pairs |\n|---|---|")
        for name, points in found.items():
            print(f"| {name} | " + ", ".join(f"{n}: {f:.2f}" for n, f in points) + " |", flush=True)
    args.out.write_text(draw(cases) + "\n", encoding="utf-8")
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
