"""How small circuits get: the ranking alone, and with edges left out by exact ablation.

    python benchmarks/circuit_size.py              the embedded model, and random ones (minutes)
    python benchmarks/circuit_size.py --speed      what one circuit costs, alone and among several

Held-out pairs are forget pairs of the same task that neither scores nor search saw. "Without" is
completeness: the metric that is left when the circuit alone is ablated, beside that of as many
random edges. The random models are Llamas of three layers with random weights, on random tokens:
there is nothing to generalize, so they have no held-out pairs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import CircuitError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet

HELD_OUT, VOCAB = 200, 50


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


def sizes(seeds: int, tries: int) -> None:
    """The table."""
    settings = {"ranking": CircuitConfig(), "removal": CircuitConfig(removal_tries=tries)}
    print("| model, pairs, seed | search | edges | faithfulness | held out | without | random |")
    print("|---|---|---|---|---|---|---|")
    model = load_model("facts")
    for name in ("capitals", "countries"):
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
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    speed(given.repeats) if given.speed else sizes(given.seeds, given.tries)
