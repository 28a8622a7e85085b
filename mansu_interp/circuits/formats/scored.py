"""Scores of every edge, as a circuit of them all: what `mansu attribute` writes, as a table or as
tensors."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import ArtifactError, CircuitError
from ...models.graph import Architecture, Graph
from ...utils.words import decode
from ..circuit import Circuit
from ..scores import MAX_SCORE, Attribution
from ..search.meta import CircuitMeta

COLUMNS = ["source", "target", "score"]
MADE_BY = "scores of edges"


def whole(found: Attribution) -> Circuit:
    """All edges of a model, with their scores."""
    meta = CircuitMeta(
        made_by=MADE_BY,
        metric_clean=found.clean,
        metric_corrupt=found.corrupt,
        caveat=found.caveat,
    )
    return Circuit(found.graph, found.scores, found.graph.exists, meta)


def save_scores(found: Circuit, path: Path) -> None:
    """Write the scores that a circuit was chosen by, of all edges, as `Attribution.save` does."""
    ends = (found.meta.metric_clean or 0.0, found.meta.metric_corrupt or 0.0)
    Attribution(found.graph, found.scores, *ends, caveat=found.meta.caveat).save(path)


def with_scores(circuit: Circuit, path: Path) -> Circuit:
    """A circuit from a file, whose other edges have no score, with the scores of all edges.

    Raises:
        ArtifactError: they are of another circuit.
    """
    found, edges = Attribution.load(path), circuit.edges
    same = found.graph == circuit.graph
    if not same or not np.allclose(found.scores[edges], circuit.scores[edges], rtol=1e-4):
        raise ArtifactError(f"{path} has not the scores of the circuit beside it. Remove it.")
    return replace(circuit, scores=np.where(edges, circuit.scores, found.scores))


def is_table(path: Path, begin: bytes) -> bool:
    """Whether a file is such a table: by its first line, or by its name."""
    return path.suffix.casefold() == ".csv" or begin.lstrip(b"\xef\xbb\xbf").startswith(
        ",".join(COLUMNS).encode()
    )


def is_tensors(begin: bytes) -> bool:
    """Whether a file is one of safetensors: the length of a JSON header, and the header."""
    return begin[6:9] == b"\0\0{"


def read_table(data: bytes, known: Architecture | None) -> Circuit:
    """The edges of a table with the columns source, target and score, as `Attribution.to_pandas`
    has them.

    Arguments:
        data: the CSV file.
        known: architecture of the model; the table does not tell it.

    Raises:
        ValueError: what is wrong with the table, with its line, or no architecture.
    """
    rows = csv.reader(decode(data).splitlines())
    if (header := next(rows, [])) != COLUMNS:
        raise ValueError(
            f"its first line must be {','.join(COLUMNS)}, as mansu attribute writes it; it is "
            f"{','.join(header)[:80]!r}"
        )
    if known is None:
        raise ValueError(
            "a table does not say how many layers and heads there are: name its model (mansu "
            "convert --model, read_circuit(path, model))"
        )
    graph = Graph(known)
    scores, edges = np.zeros(graph.exists.shape, np.float32), np.zeros_like(graph.exists)
    for line, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            source, target, text = row
            at, score = graph.edge(source, target), float(text)
        except (CircuitError, ValueError) as error:
            raise ValueError(f"line {line}: {error}") from error
        if edges[at] or not (math.isfinite(score) and abs(score) <= MAX_SCORE):
            what = "is there twice" if edges[at] else f"has the score {text[:40]}"
            raise ValueError(f"line {line}: {source} -> {target} {what}")
        scores[at], edges[at] = score, True
    if not edges.any():
        raise ValueError("it holds no edge")
    missing = int((graph.exists & ~edges).sum())
    caveat = f"{missing:,} of the model's edges are not in its table" if missing else ""
    return Circuit(graph, scores, edges, CircuitMeta(made_by=MADE_BY, caveat=caveat))
