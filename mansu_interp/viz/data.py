"""What a view shows, as one typed record, and its JSON (docs/viewing.md).

Columns, not records, and four significant digits, to stay small. What follows from the architecture
(node ids, layout) and the styles stand in the JSON for graph.js, and are not read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..circuits.changes import CLASSES, KEPT_SHARE, MEANING
from ..errors import ArtifactError
from ..models.graph import Architecture, Graph
from ..utils.files import Json, expect
from .layout import CONSTANTS

if TYPE_CHECKING:  # at run time only its fields are used, so pictures need no torch
    from ..circuits.compare import Divergence

SCHEMA = 2
"""2: edge classes silent and weakened, or suppressed and erased where a graph after relearning
tells them apart; ``comparison``."""

EDGE_STYLES: dict[str, tuple[str, str, str]] = {
    "pos": ("#0072B2", "#4BA3DB", ""),
    "neg": ("#D55E00", "#EC7A24", "6 3"),
    "kept": ("#0072B2", "#4BA3DB", ""),
    "silent": ("#000000", "#F2F2F2", "1 4"),
    "weakened": ("#E69F00", "#E69F00", "6 3"),
    "recovered": ("#D55E00", "#EC7A24", "12 3"),
    "suppressed": ("#E69F00", "#E69F00", "6 3"),
    "erased": ("#000000", "#F2F2F2", "1 4"),
    "new": ("#CC79A7", "#CC79A7", "8 3 2 3"),
    "other": ("#8A9099", "#7A828C", ""),
    "quiet": ("#8A9099", "#7A828C", ""),
}
"""How edges are drawn, here and in graph.js, by class: light colour, dark colour, dash pattern.

Colours are the colour-blind safe set of Okabe and Ito, and never the only cue: a positive edge (it
supports the answer) is solid blue, a negative one (it opposes) dashed vermillion."""

FADING = ("silent", "weakened", "suppressed", "erased")
"""Classes of what does not carry in every pane: dashed as their style says where less is left of it
than a half of the first pane's value, and solid elsewhere (`is_gone`; graph.js does the same)."""

GONE = 0.45
"""Opacity of an edge in a pane where it is gone, of what it has by its score."""

SOLID = "Solid: at least half of what it carries in the first pane; dashed and faint: less."


def is_gone(name: str | None, scores: Sequence[float], pane: int) -> bool | None:
    """Whether an edge of a class no longer carries in a pane; None: its class is no such."""
    if name not in FADING:
        return None
    return pane > 0 and scores[pane] * scores[0] < KEPT_SHARE * scores[0] ** 2


FILE = {
    "schema": int,
    "title": str,
    "facts": [str],
    "unit": str,
    "architecture": {"n_layers": int, "n_heads": int, "n_kv_heads": int, "parallel": bool},
    "total": int,
    "top": int,
    "panes": [str],
    "edges": {
        "source": [int],
        "target": [int],
        "in_circuit": [int],
        "scores": [[float]],
        "class?": [int],
        "frequency?": [float],
        "low?": [float],
        "high?": [float],
    },
    "resamples?": str,
    "heads?": {
        ...: {
            "roles": [str],
            "attention": {...: float},
            "looks_at": str,
            "logit": float,
            "keys": [[(str, float)]],
            "query": [[(str, float)]],
            "effect": float,
        }
    },
    "nodes": {"scores": [[float]], "class?": [int]},
    "weights": {...: [str]},
    "cad": ({"verdict": str, "sentence": str}, None),
    "comparison": ({...: dict}, None),
    "counts?": {f"{name}?": int for name in CLASSES[1:]},
    "present_from?": float,
    "prompts?": [
        {
            "text": str,
            "tokens": [str],
            "answer": str,
            "attention": {...: [int]},
            "effects": {...: {"tokens": [str], "values": [float], "answer": float}},
        }
    ],
    "positions?": {"tokens": [str], "scores": [[float]], "nodes": [[float]]},
    "state?": dict,
}
"""What is checked of a file."""


@dataclass(frozen=True)
class EdgeData:
    """The edges of a view, strongest in any pane first, in columns of one length."""

    source: list[int]
    """Row of the writer in the graph's writers."""
    target: list[int]
    """Column of the reader in the graph's readers."""
    in_circuit: list[int]
    """0 or 1."""
    scores: list[list[float]]
    """A list a pane, in metric units."""
    classes: list[int] | None = None
    """Index into ``CLASSES``; in change views alone."""
    frequency: list[float] | None = None
    """Share of resamples whose circuit has the edge, 0 to 1; of a circuit with a stability."""
    low: list[float] | None = None
    """2.5th percentile of the score over resamples, in metric units; as ``frequency``."""
    high: list[float] | None = None
    """97.5th percentile."""


@dataclass(frozen=True)
class NodeData:
    """The writers of a view, in the graph's order."""

    scores: list[list[float]]
    """A list a pane: the sum over a writer's outgoing edges, in metric units."""
    classes: list[int] | None = None
    """Index into ``CLASSES``; in change views alone."""


@dataclass(frozen=True)
class Effect:
    """What a component adds to the logits by itself: the tokens it raises most, then those it
    lowers most."""

    tokens: list[str]
    values: list[float]
    """By token, in logits; the mean over all tokens is 0."""
    answer: float
    """The effect on the answer's own token."""


@dataclass(frozen=True)
class PromptData:
    """What happens inside the components on one prompt."""

    text: str
    tokens: list[str]
    answer: str
    attention: dict[str, list[int]]
    """By head, in percent: the first token's attention to itself, the second's to the first and to
    itself, and so on."""
    effects: dict[str, Effect]
    """By component."""


@dataclass(frozen=True)
class PositionData:
    """The edges' scores by token position, in metric units."""

    tokens: list[str]
    """What stands at each position."""
    scores: list[list[float]]
    """A list a position, by edge."""
    nodes: list[list[float]]
    """A list a position, by writer: the sum over its outgoing edges."""


@runtime_checkable
class Verdict(Protocol):
    """What is shown of `audit.cad.CAD`."""

    @property
    def verdict(self) -> str:
        """One word."""
        ...

    @property
    def sentence(self) -> str:
        """The same as a sentence."""
        ...


@dataclass(frozen=True)
class Judged:
    """The verdict on an edit, as it is shown on top of a view."""

    verdict: str
    sentence: str


@dataclass(frozen=True)
class GraphData:
    """Everything that a view shows."""

    title: str
    architecture: Architecture
    panes: list[str]
    """Their names; an empty one for a single pane."""
    edges: EdgeData
    nodes: NodeData
    total: int
    """Edges of the whole graph."""
    top: int
    """Edges drawn at first."""
    facts: list[str] = field(default_factory=list)
    """Short texts beside the title."""
    unit: str = "in metric units"
    weights: dict[str, list[str]] = field(default_factory=dict)
    """By component: the weights behind it, in words; empty without a model."""
    cad: Judged | None = None
    comparison: dict[str, Divergence] | None = None
    """By model: how its graph differs from the original's."""
    counts: dict[str, int] = field(default_factory=dict)
    """Edges of each class over the whole graph, without ``quiet``; in change views alone."""
    resamples: str = ""
    """How many resamples of what ``edges.frequency`` is of."""
    heads: dict[str, dict[str, Json]] = field(default_factory=dict)
    """What heads do, by id (`ExplainedHead.to_json`)."""
    present_from: float | None = None
    """|score| from which an edge counts as present, in metric units; in change views alone."""
    prompts: list[PromptData] = field(default_factory=list)
    """A few prompts, and what the components do on them."""
    positions: PositionData | None = None
    """Scores by token position; in views of one pane."""
    state: dict[str, Json] = field(default_factory=dict)
    """Layout, pins, groups, closed groups, notes and filters to restore, as `GraphWidget.state`."""

    def edge_ids(self) -> list[tuple[str, str]]:
        """Node ids of every edge, in order."""
        graph = Graph(self.architecture)
        ends = zip(self.edges.source, self.edges.target, strict=True)
        return [(graph.writers[i].id, graph.readers[j].id) for i, j in ends]

    def to_json(self) -> dict[str, Json]:
        """The documented JSON values."""
        graph = Graph(self.architecture)
        edges, nodes = asdict(self.edges), asdict(self.nodes)
        for part in (edges, nodes):
            if (classes := part.pop("classes")) is not None:
                part["class"] = classes
        edges = {name: column for name, column in edges.items() if column is not None}
        out: dict[str, Json] = {
            "schema": SCHEMA,
            "title": self.title,
            "facts": list(self.facts),
            "unit": self.unit,
            "architecture": asdict(self.architecture),
            "total": self.total,
            "top": self.top,
            "panes": list(self.panes),
            "writers": [n.id for n in graph.writers],
            "readers": [n.id for n in graph.readers],
            "edges": edges,
            "nodes": nodes,
            "weights": {k: list(v) for k, v in self.weights.items()},
            "layout": dict(CONSTANTS),
            "styles": {name: list(style) for name, style in EDGE_STYLES.items()},
            "fading": {
                "classes": list(FADING),
                "below": KEPT_SHARE,
                "opacity": GONE,
                "note": SOLID,
            },
            "cad": asdict(self.cad) if self.cad else None,
            "comparison": {k: asdict(v) for k, v in self.comparison.items()}
            if self.comparison is not None
            else None,
        }
        if self.counts:
            meaning = {name: MEANING[name] for name in self.counts}
            out |= {"classes": list(CLASSES), "meaning": meaning, "counts": dict(self.counts)}
            out["present_from"] = self.present_from
        more = {
            "prompts": [asdict(p) for p in self.prompts],
            "positions": asdict(self.positions) if self.positions else None,
            "state": dict(self.state),
            "resamples": self.resamples,
            "heads": {k: dict(v) for k, v in self.heads.items()},
        }
        return out | {name: value for name, value in more.items() if value}

    @classmethod
    def from_json(cls, data: object) -> GraphData:
        """What `to_json` wrote, checked: every edge exists, every column has its length.

        Raises:
            ArtifactError: another schema, or damaged.
        """
        try:
            expect(data, {"schema": int}, "the graph")
            assert isinstance(data, Mapping)
            if data["schema"] != SCHEMA:
                raise ArtifactError(
                    f"The graph has schema {data['schema']}; this version reads {SCHEMA}. Run it "
                    "again."
                )
            expect(data, FILE, "the graph")
            return _checked(data)
        except ArtifactError:
            raise
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"The graph is damaged: {error}.") from error


def _checked(data: Mapping[str, Json]) -> GraphData:
    """The record of JSON values that have the right types."""
    from ..circuits.compare import Divergence

    edges, nodes = data["edges"], data["nodes"]
    made = GraphData(
        title=data["title"],
        architecture=Architecture(**data["architecture"]),
        panes=data["panes"],
        edges=EdgeData(
            edges["source"],
            edges["target"],
            edges["in_circuit"],
            edges["scores"],
            edges.get("class"),
            edges.get("frequency"),
            edges.get("low"),
            edges.get("high"),
        ),
        nodes=NodeData(nodes["scores"], nodes.get("class")),
        total=data["total"],
        top=data["top"],
        facts=data["facts"],
        unit=data["unit"],
        weights=data["weights"],
        cad=Judged(**data["cad"]) if data["cad"] else None,
        counts=data.get("counts", {}),
        present_from=data.get("present_from"),
        prompts=[_prompt(p) for p in data.get("prompts", ())],
        positions=PositionData(**_only(PositionData, p)) if (p := data.get("positions")) else None,
        state=data.get("state", {}),
        resamples=data.get("resamples", ""),
        heads=data.get("heads", {}),
    )
    graph, n = Graph(made.architecture), len(made.edges.source)
    _same_length("edges", n, [made.edges.target, made.edges.in_circuit, *made.edges.scores])
    _same_length("nodes", len(graph.writers), made.nodes.scores)
    _same_length("panes", len(made.panes), [made.edges.scores, made.nodes.scores])
    if at := made.positions:
        _same_length("positions", n, at.scores)
        _same_length("positions", len(graph.writers), at.nodes)
        _same_length("positions", len(at.scores), [at.tokens, at.nodes])
        _same_length("panes", 1, [made.panes])
    held = [made.edges.frequency, made.edges.low, made.edges.high]
    if len({bool(made.resamples), *(column is not None for column in held)}) > 1:
        raise ValueError("resamples, frequency, low and high must come together")
    _same_length("edges", n, [column for column in held if column is not None])
    if not all(0 <= x <= 1 for x in made.edges.frequency or ()):
        raise ValueError("a frequency is no share from 0 to 1")
    for part, length in ((made.edges.classes, n), (made.nodes.classes, len(graph.writers))):
        if (part is not None) != bool(made.counts):
            raise ValueError("classes and counts must come together")
        if part is not None:
            _same_length("classes", length, [part])
            if not all(0 <= k < len(CLASSES) for k in part):
                raise ValueError(f"a class is none of the {len(CLASSES)}")
    for i, j in zip(made.edges.source, made.edges.target, strict=True):
        if not (0 <= j < len(graph.readers) and 0 <= i < len(graph.writers)):
            raise ValueError(f"no edge {i} -> {j} in {made.architecture}")
        graph.edge(graph.writers[i].id, graph.readers[j].id)
    if data["comparison"] is None:
        return made
    names = [f.name for f in fields(Divergence)]
    for model, parts in data["comparison"].items():
        expect(parts, {name: (float, None) for name in names}, f"comparison.{model[:40]}")
    shown = {
        model: Divergence(**{k: float("nan") if parts[k] is None else parts[k] for k in names})
        for model, parts in data["comparison"].items()
    }
    return replace(made, comparison=shown)


def _only(record: type, values: Mapping[str, Json]) -> dict[str, Json]:
    """The values that are fields of a record."""
    return {f.name: values[f.name] for f in fields(record)}


def _prompt(values: Mapping[str, Json]) -> PromptData:
    """A prompt whose patterns have a share for every token that may be looked at."""
    effects = {name: Effect(**_only(Effect, e)) for name, e in values["effects"].items()}
    made = PromptData(**{**_only(PromptData, values), "effects": effects})
    n = len(made.tokens)
    _same_length("attention", n * (n + 1) // 2, list(made.attention.values()))
    for effect in effects.values():
        _same_length("effects", len(effect.tokens), [effect.values])
    return made


def _same_length(what: str, n: int, columns: Sequence[Sequence[object]]) -> None:
    """Raise ValueError unless all columns have ``n`` entries."""
    if odd := [len(c) for c in columns if len(c) != n]:
        raise ValueError(f"{what} has a column of {odd[0]} entries, expected {n}")
