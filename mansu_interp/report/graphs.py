"""What a report says of circuits and attribution graphs."""

from __future__ import annotations

from ..circuits.search.meta import necessity
from ..utils.words import number_of
from ..viz.plots import curve_svg
from .blocks import Block, Graph, Picture, Table
from .records import CircuitSummary, Report
from .values import count, figure, known, measured, percent


def graph_blocks(report: Report) -> list[Block]:
    """How the attribution graphs differ: numbers, and every edge."""
    blocks: list[Block] = []
    if report.comparison:
        rows = [
            [str(c.model)]
            + [measured(x) for x in (d.mass, d.alignment, d.projected_share, d.outside)]
            for c in report.comparison
            for d in [c.divergence]
        ]
        head = ["model", "mass", "alignment", "projected share", "outside"]
        blocks += [
            "Relative to the original model's circuit, on forget prompts that unlearning never "
            "saw. Mass: how much attribution is left on it. Alignment: whether what is left "
            "points the same way (cosine). Projected share: mass and direction together. Outside: "
            "attribution that flows elsewhere. These numbers describe; relearning decides.",
            Table(head, rows),
        ]
    if report.graph:
        blocks += [
            "What became of every edge of the graph. Drag to move, click to select; the graphs "
            "share it. Where relearning was tried, the prompts are of the half that was not "
            "relearned: an edge that comes back with the other half was only suppressed.",
            Graph(report.graph, _edge_counts(report)),
        ]
    return blocks


def edge_counts(report: Report) -> dict[str, int]:
    """How many edges there are of each class; empty without a graph."""
    counts = (report.graph or {}).get("counts")
    if not isinstance(counts, dict):
        return {}
    return {str(k): n for k, n in counts.items() if isinstance(n, int)}


def _edge_counts(report: Report) -> Table:
    """The counts with what each class means, for where the view does not run."""
    meaning = (report.graph or {}).get("meaning")
    meaning = meaning if isinstance(meaning, dict) else {}
    rows = [
        [name, count(n), str(meaning.get(name, "")).partition(": ")[2]]
        for name, n in edge_counts(report).items()
    ]
    return Table(["edges that are", "number", "meaning"], rows, words=3)


def circuit_blocks(circuit: CircuitSummary, svg: str) -> list[Block]:
    """The circuit that was found, as a picture and as its strongest edges."""
    blocks: list[Block] = [
        f"{count(circuit.edges)} of {number_of(circuit.of, 'edge')} leave "
        f"{percent(circuit.faithfulness)} of the difference between the answer and its rival when "
        "everything outside them is ablated (faithfulness)."
    ]
    if (left := known(circuit.completeness)) is not None:
        blocks.append(necessity(left, known(circuit.random_completeness), circuit.faithfulness))
    if circuit.caveat:
        blocks.append(f"This is a {circuit.caveat}.")
    if svg:
        blocks.append(Picture(svg))
    curve = sorted((p.edges, f) for p in circuit.curve if (f := known(p.faithfulness)) is not None)
    if curve:
        faithfulness = known(circuit.faithfulness)
        chosen = None if faithfulness is None else (circuit.edges, faithfulness)
        blocks.append("Faithfulness of the circuits that the search tried:")
        instead = Table(
            ["edges", "faithfulness"], [[count(n), percent(f)] for n, f in curve], words=0
        )
        blocks.append(Picture(curve_svg(curve, chosen), instead))
    if circuit.top_edges:
        blocks.append(
            "The strongest edges; a negative score opposes the answer. Names are as in Python: "
            "a1.h2 is head 2 of layer 1, with <q>, <k> or <v> what it reads (kv: shared by several "
            "heads), and m1 the MLP of layer 1."
        )
        rows = [[e.source, e.target, figure(e.score)] for e in circuit.top_edges]
        blocks.append(Table(["from", "to", "score"], rows, words=2))
    return blocks
