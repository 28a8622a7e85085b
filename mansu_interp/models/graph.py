"""The attribution graph of a decoder: who writes the residual stream, who reads it, and when.

Knows nothing of torch. A node id names one place in the model:

======================  ==========================================================
``input``               the embedding (writer)
``a3.h5``               output of attention head 5 in layer 3 (writer)
``a3.h5<q>``            query input of that head (reader)
``a3.kv1<k>``           key input of key/value head 1, shared by its query heads (reader);
                        ``a3.h5<k>`` where every head has its own keys and values
``m3``                  the MLP of layer 3 (reader and writer)
``logits``              the final norm and unembedding (reader)
======================  ==========================================================

An edge ``u -> v`` exists where ``u`` writes before ``v`` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from ..errors import CircuitError

MAX_CELLS = 10**9
"""Writers x readers of the largest model that is believed (Llama 3.1 405B has 3 x 10^8)."""


@dataclass(frozen=True)
class Architecture:
    """What the graph needs to know of a model."""

    n_layers: int
    """Decoder layers."""
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    """Key/value heads per layer; fewer than ``n_heads`` with grouped-query attention."""
    parallel: bool = False
    """Whether attention and MLP read the same residual (GPT-NeoX), so that no head feeds its
    own layer's MLP."""

    def __post_init__(self) -> None:
        if min(self.n_layers, self.n_heads, self.n_kv_heads) < 1 or self.n_heads % self.n_kv_heads:
            raise CircuitError(
                f"An architecture needs n_layers, n_heads, n_kv_heads >= 1 and n_kv_heads dividing "
                f"n_heads; got {self.n_layers}, {self.n_heads}, {self.n_kv_heads}."
            )
        readers = self.n_heads + 2 * self.n_kv_heads + 1
        if self.n_layers**2 * (self.n_heads + 1) * readers > MAX_CELLS:
            raise CircuitError(
                f"{self.n_layers} layers of {self.n_heads} heads are larger than any model."
            )


@dataclass(frozen=True)
class Node:
    """One writer or reader."""

    kind: str
    """``input``, ``head``, ``q``, ``k``, ``v``, ``mlp`` or ``logits``."""
    layer: int
    """Layer; -1 for ``input``, the number of layers for ``logits``."""
    head: int = -1
    """Head (``head``, ``q``) or key/value head (``k``, ``v``); -1 elsewhere."""
    grouped: bool = False
    """Whether key/value heads are shared, which changes their id."""

    @property
    def id(self) -> str:
        """The documented node id."""
        if self.kind in ("input", "logits"):
            return self.kind
        if self.kind == "mlp":
            return f"m{self.layer}"
        if self.kind == "head":
            return f"a{self.layer}.h{self.head}"
        name = "kv" if self.grouped and self.kind in "kv" else "h"
        return f"a{self.layer}.{name}{self.head}<{self.kind}>"


@dataclass(frozen=True)
class Graph:
    """All edges of an architecture, as a boolean matrix of writers by readers."""

    architecture: Architecture

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """Writers in the order in which they write."""
        a = self.architecture
        nodes = [Node("input", -1)]
        for layer in range(a.n_layers):
            nodes += [Node("head", layer, h) for h in range(a.n_heads)] + [Node("mlp", layer)]
        return tuple(nodes)

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        """Readers in the order in which they read."""
        a = self.architecture
        grouped = a.n_kv_heads < a.n_heads
        nodes: list[Node] = []
        for layer in range(a.n_layers):
            nodes += [Node("q", layer, h) for h in range(a.n_heads)]
            nodes += [Node(c, layer, h, grouped) for c in "kv" for h in range(a.n_kv_heads)]
            nodes.append(Node("mlp", layer))
        return (*nodes, Node("logits", a.n_layers))

    @property
    def readers_per_layer(self) -> int:
        """q, k, v readers and one MLP reader."""
        return self.architecture.n_heads + 2 * self.architecture.n_kv_heads + 1

    def writers_before(self, layer: int, mlp: bool = False) -> int:
        """How many writers precede a layer's attention, or with ``mlp`` its MLP."""
        a = self.architecture
        heads = a.n_heads if mlp and not a.parallel else 0
        return 1 + layer * (a.n_heads + 1) + heads

    @cached_property
    def exists(self) -> Bool[np.ndarray, "writers readers"]:
        """True where an edge exists."""
        matrix = np.zeros((len(self.writers), len(self.readers)), dtype=bool)
        for j, v in enumerate(self.readers):
            matrix[: self.writers_before(v.layer, v.kind == "mlp"), j] = True
        return matrix

    @property
    def n_edges(self) -> int:
        """Number of edges; see the closed form in the tests."""
        return int(self.exists.sum())

    @cached_property
    def writer_index(self) -> dict[str, int]:
        """Row of each writer id."""
        return {node.id: i for i, node in enumerate(self.writers)}

    @cached_property
    def reader_index(self) -> dict[str, int]:
        """Column of each reader id."""
        return {node.id: j for j, node in enumerate(self.readers)}

    def edge(self, source: str, target: str) -> tuple[int, int]:
        """Row and column of an edge named by its ids.

        Raises:
            CircuitError: if no such edge exists.
        """
        i, j = self.writer_index.get(source), self.reader_index.get(target)
        v = self.readers[j or 0]
        if i is None or j is None or i >= self.writers_before(v.layer, v.kind == "mlp"):
            raise CircuitError(f"No edge {source!r} -> {target!r} in {self.architecture}.")
        return i, j

    def reading_heads(self, reader: Node) -> range:
        """Query heads that a q, k or v reader feeds."""
        if reader.kind == "q":
            return range(reader.head, reader.head + 1)
        group = self.architecture.n_heads // self.architecture.n_kv_heads
        return range(reader.head * group, (reader.head + 1) * group)

    @cached_property
    def feeds(self) -> tuple[tuple[int, ...], ...]:
        """For each reader, the rows of the writers that compute from it."""
        rows = []
        for v in self.readers:
            if v.kind == "logits":
                rows.append(())
            elif v.kind == "mlp":
                rows.append((self.writer_index[v.id],))
            else:
                rows.append(
                    tuple(self.writer_index[f"a{v.layer}.h{h}"] for h in self.reading_heads(v))
                )
        return tuple(rows)

    def prune(self, edges: Bool[np.ndarray, "writers readers"]) -> Bool[np.ndarray, "w r"]:
        """Keep only the edges that lie on a path from ``input`` to ``logits``."""
        edges = edges & self.exists
        reached = np.zeros(len(self.writers), dtype=bool)  # can be reached from input
        reached[0] = True
        for j in range(len(self.readers)):  # readers come in computation order
            if (edges[:, j] & reached).any():
                reached[list(self.feeds[j])] = True
        useful = np.zeros(len(self.writers), dtype=bool)  # reaches logits
        live = np.zeros(len(self.readers), dtype=bool)
        for j in reversed(range(len(self.readers))):
            live[j] = self.readers[j].kind == "logits" or useful[list(self.feeds[j])].any()
            if live[j]:
                useful |= edges[:, j]
        return edges & reached[:, None] & live[None, :]
