"""How small circuits get: the ranking alone, and with edges left out by exact ablation.

    python benchmarks/circuit_size.py              the embedded model, and random ones (minutes)
    python benchmarks/circuit_size.py --greedy     beside plain greedy removal, and one edge less
    python benchmarks/circuit_size.py --speed      what one circuit costs, alone and among several

Held-out pairs are forget pairs of the same task that neither scores nor search saw. "Without" is
completeness: the metric that is left when the circuit alone is ablated, beside that of as many
random edges. The random models are Llamas of three layers with random weights, on random tokens:
there is nothing to generalize, so they have no held-out pairs.

With ``--greedy``, in the embedded model, the search of removal stands beside plain greedy removal:
from twice as many of the top-ranked edges as reach the target, leave out the edge without which
most of the metric is left, one at a time and exactly, until the target would be missed. "One less"
is the most faithful circuit of one edge less than the smaller of the two that exchanges find: leave
out what costs least, then exchange any one edge for any of the `OUTSIDE` most promising by their
gradient, as long as that gains.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.circuits.ablation import Ablation, Edges
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.circuits.search.faithfulness import minimal_edges, strongest
from mansu_interp.circuits.search.removal import remove_edges
from mansu_interp.errors import CircuitError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet

HELD_OUT, VOCAB = 200, 50
TARGET = CircuitConfig().faithfulness
OUTSIDE = 40
"""Edges outside a circuit that are tried in an exchange."""


def random_model(seed: int) -> LanguageModel:
    """A Llama of three layers with four heads, random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
        architectures=["LlamaForCausalLM"],
    )
    return LanguageModel(f"random-{seed}", LlamaForCausalLM(config).eval(), None)


def random_pairs(seed: int) -> PairSet:
    """Eight pairs of six random tokens."""
    rng = random.Random(seed)

    def draw() -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(6))

    made = []
    for k in range(8):
        answer, *wrong = rng.sample(range(VOCAB), 4)
        made.append(
            Pair(draw(), draw(), answer, wrong[0], tuple(wrong), "random", f"s{k}", "", "", "")
        )
    return PairSet("random", tuple(made))


def row(label: str, how: str, circuit: Circuit, held: str) -> None:
    """One line of the table."""
    m = circuit.meta
    print(
        f"| {label} | {how} | {circuit.n_edges} | {m.faithfulness:.3f} | {held} | "
        f"{m.completeness:.2f} | {m.random_completeness:.2f} |",
        flush=True,
    )


def sizes(seeds: int, tries: int, tasks: list[str]) -> None:
    """The table: some tasks in the embedded model, and the random models."""
    settings = {"ranking": CircuitConfig(), "removal": CircuitConfig(removal_tries=tries)}
    print("| model, pairs, seed | search | edges | faithfulness | held out | without | random |")
    print("|---|---|---|---|---|---|---|")
    model = load_model("facts")
    for name in tasks:
        forget = load_task(name, model).forget
        for seed in range(seeds):
            seen = set(forget.sample(CircuitConfig().pairs, seed))
            rest = PairSet("held out", tuple(p for p in forget if p not in seen))
            held_out = Ablation(model, rest.sample(HELD_OUT, seed))
            for how, config in settings.items():
                found = discover(model, forget, config=config, seed=seed)
                held = f"{held_out.faithfulness(found.edges):.3f}"
                row(f"facts, {name}, {seed}", how, found, held)
    for seed in range(2 * seeds):
        for how, config in settings.items():
            try:
                found = discover(random_model(seed), random_pairs(seed), config=config)
            except CircuitError:  # the clean prompts must give more of the metric
                continue
            row(f"random, {seed}", how, found, "")


def faithful(ablation: Ablation, circuits: list[Edges]) -> np.ndarray:
    """Faithfulness of some circuits."""
    full, empty = ablation.ends
    return (np.array(ablation.many(circuits)) - empty) / (full - empty)


def each_without(ablation: Ablation, edges: Edges, lost: Edges) -> list[Edges]:
    """A circuit without each of some edges, and without what is then on no path."""
    out = [edges.copy() for _ in range(int(lost.sum()))]
    for less, edge in zip(out, np.argwhere(lost), strict=True):
        less[tuple(edge)] = False
    return [ablation.graph.prune(less) for less in out]


def greedy(ablation: Ablation, edges: Edges, *, least: int = 0) -> tuple[Edges, int]:
    """Plain greedy removal down to the target, or to a size; and how many circuits it tried."""
    tried = 0
    while edges.sum() > least:
        circuits = each_without(ablation, edges, edges)
        values = faithful(ablation, circuits)
        tried += len(circuits)
        best = int(values.argmax())
        if not least and values[best] < TARGET:
            break
        edges = circuits[best]
    return edges, tried


def exchanged(ablation: Ablation, edges: Edges) -> float:
    """The faithfulness that exchanges of one edge end at, never with more edges."""
    value, here = faithful(ablation, [edges])[0], int(edges.sum())
    while True:
        useful = np.abs(ablation.gradient(edges)) * ~edges
        circuits = []
        for at in np.argsort(-useful, axis=None, kind="stable")[:OUTSIDE]:
            wider = edges.copy()
            wider.flat[at] = True
            circuits += each_without(ablation, wider, edges)
        values = faithful(ablation, circuits)
        best = int(values.argmax())
        if values[best] <= value + 1e-6:
            return float(value)
        edges, value = circuits[best], values[best]
        assert edges.sum() <= here


def beside_greedy(label: str, model: LanguageModel, pairs: PairSet, seed: int, tries: int) -> None:
    """The row of one model: the ranking, removal, greedy removal, and one edge less."""
    config = CircuitConfig()
    scores, graph = attribute(model, pairs, config=config).scores, model.graph
    ablation = Ablation(model, pairs.sample(config.faithfulness_pairs, seed))
    ranked, _ = minimal_edges(graph, scores, ablation.faithfulness, target=TARGET)
    start = time.process_time()
    found = remove_edges(ablation, ranked, target=TARGET, tries=tries)
    took = time.process_time() - start
    wide = strongest(graph, scores, min(graph.n_edges, 2 * int(ranked.sum())))
    start = time.process_time()
    plain, tried = greedy(ablation, wide)
    took_plain = time.process_time() - start
    small = min(found.edges, plain, key=lambda edges: int(edges.sum()))
    less, _ = greedy(ablation, small, least=int(small.sum()) - 1)
    values = (ablation.faithfulness(found.edges), ablation.faithfulness(plain))
    print(
        f"| {label} | {ranked.sum()} | {found.edges.sum()} | {values[0]:.3f} | {found.tried} | "
        f"{took:.1f} | {plain.sum()} | {values[1]:.3f} | {tried:,} | {took_plain:.1f} | "
        f"{exchanged(ablation, less):.3f} |",
        flush=True,
    )


def greedy_table(seeds: int, tries: int) -> None:
    """Removal beside plain greedy removal."""
    print(
        "| model, pairs, seed | ranking | removal | faithfulness | tried | seconds | greedy | "
        "faithfulness | tried | seconds | one less |\n" + "|---" * 11 + "|"
    )
    model = load_model("facts")
    for name in ("capitals", "countries"):
        forget = load_task(name, model).forget
        for seed in range(seeds):
            chosen = forget.sample(CircuitConfig().pairs, seed)
            beside_greedy(f"facts, {name}, {seed}", model, chosen, seed, tries)


def speed(repeats: int) -> None:
    """Seconds a circuit, as a ratio to a bare forward pass of the same pairs in the same run."""
    model = load_model("facts")
    pairs = load_task("capitals", model).forget.sample(32, 0)
    ablation = Ablation(model, pairs)
    circuit = discover(model, pairs).edges
    circuits = [circuit.copy() for _ in range(32)]
    for k, edge in enumerate(np.argwhere(circuit)[:32]):
        circuits[k][tuple(edge)] = False

    def bare() -> None:
        for base in ablation.bases:
            ablation.stream.logits(base.batch.clean, base.batch.last)

    work = {
        "bare": (bare, 1),
        "one circuit a call": (lambda: ablation(circuit), 1),
        "of 32 in one call": (lambda: ablation.many(circuits), 32),
        "all edges": (lambda: ablation(model.graph.exists), 1),
        "gradient": (lambda: ablation.gradient(circuit), 1),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for run in range(repeats + 1):
        for name, (job, n) in work.items():
            start = time.process_time()
            with torch.no_grad():
                job()
            if run:  # the first warms up
                times[name].append((time.process_time() - start) / n)
    took = {name: statistics.median(t) for name, t in times.items()}
    for name, t in took.items():
        print(f"{name}: {1e3 * t:.1f} ms, {t / took['bare']:.2f} x bare")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--tasks", nargs="*", default=["capitals", "countries"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.speed:
        speed(given.repeats)
    elif given.greedy:
        greedy_table(given.seeds, given.tries)
    else:
        sizes(given.seeds, given.tries, given.tasks)
