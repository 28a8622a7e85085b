"""Circuits by this package's scores and by those of other tools, as `discovery.py` measures them.

    python benchmarks/peer_circuits.py gpt2                             beside TransformerLens' own
    python benchmarks/peer_circuits.py capitals countries --eap-ig FOLDER/src       hannamw/EAP-IG's
    python benchmarks/peer_circuits.py ioi --pairs 4 --model FOLDER --eap-ig FOLDER/src

Each tool scores the same pairs on the same model object, by its own settings; circuits of both are
measured by this package's ablation, and one of them by EAP-IG's own as well. `peers.py` says which
environments are needed. `gpt2`, whose every head has a key of its own, is for TransformerLens,
which refuses models whose heads share keys. Columns as in `discovery.py`; MB is the peak memory of
a process of its own, beyond the model and one pair scored before (Linux).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from attribution import figure_of, peak_beyond
from discovery import RESAMPLES, SMALL, configured, curve_of, jaccard, make

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.search.faithfulness import strongest
from mansu_interp.circuits.search.stability import Resamples
from mansu_interp.models.graph import Architecture
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet

THEIRS = ("EAP", "clean-corrupted", "EAP-IG-inputs", "EAP-IG-activations")
"""Methods of hannamw/EAP-IG; the last is not taken on larger models."""
OURS = ("EAP", "EAP, both ends", "EAP-IG")
Scorer = Callable[[PairSet], np.ndarray]


def scorers(model: LanguageModel, eap_ig: str | None) -> tuple[Any, dict[str, Scorer]]:
    """The model that another tool takes, and how it and this package score pairs."""
    there: Any = peers.as_hooked(model) if eap_ig else model
    found: dict[str, Scorer] = {
        f"here, {name}": partial(peers.ours, there, config=configured(name)) for name in OURS
    }
    if not eap_ig:
        found["TransformerLens, EAP"] = partial(of_transformer_lens, there)
    theirs = THEIRS if model.graph.n_edges <= SMALL else THEIRS[:-1]
    for method in theirs if eap_ig else ():
        found[f"EAP-IG, {method}"] = partial(of_eap_ig, there, model.architecture, method)
    return there, found


def of_transformer_lens(model: LanguageModel, pairs: PairSet) -> np.ndarray:
    """Scores by TransformerLens."""
    return peers.mean_over_pairs(model, peers.of_transformer_lens(model, pairs))


def of_eap_ig(model: Any, architecture: Architecture, method: str, pairs: PairSet) -> np.ndarray:
    """Scores by hannamw/EAP-IG."""
    return peers.in_our_order(peers.of_eap_ig(model, pairs, method), architecture)


def table(task: str, args: argparse.Namespace) -> None:
    """Print the rows of one task by this package and another tool."""
    n, seed = args.pairs, args.seed
    model, every = make(task, args.model, n, seed)
    pairs, others = PairSet(task, every.pairs[:n]), PairSet(task, every.pairs[n:])
    graph = model.graph
    if graph.n_edges > SMALL:
        others = PairSet(task, others.pairs[: max(2, n // 2)])
    there, found = scorers(model, args.eap_ig)
    ablation, least = Ablation(there, others), 0
    weights = Resamples(pairs, RESAMPLES, seed).weights(pairs)
    print(
        f"\n{task}: {model.name}, {graph.n_edges:,} edges, {len(pairs)} pairs to score, "
        f"{len(others)} other pairs to measure, seed {seed}\n\n"
        "| method | CPR | CMD | at 0.85 | stable | seconds | MB |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name, scored in found.items():
        scored(PairSet(task, pairs.pairs[:1]))  # warm up
        start = time.process_time()
        values = scored(pairs)
        took = time.process_time() - start
        one = np.stack([scored(PairSet(task, (pair,))) for pair in pairs])
        cpr, cmd, least = curve_of(ablation, graph, values)
        drawn = np.tensordot(weights, one, 1)
        stable = np.mean([jaccard(graph, values, x, least) for x in drawn])
        held = figure_of([__file__, *sys.argv[1:], "--job", name, task])
        print(
            f"| {name} | {cpr:.3f} | {cmd:.3f} | {least:,} | {stable:.2f} | {took:.2f} | "
            f"{held:.0f} |",
            flush=True,
        )
    if args.eap_ig:
        edges = strongest(graph, values, least)
        by_them = peers.metric_by_eap_ig(there, others, edges, model.architecture)
        print(f"\nThe metric of the last circuit: {ablation(edges):.6f}; by EAP-IG: {by_them:.6f}")


def peak(name: str, task: str, args: argparse.Namespace) -> float:
    """Peak memory (MB) of one method in this process."""
    model, every = make(task, args.model, args.pairs, args.seed)
    pairs = PairSet(task, every.pairs[: args.pairs])
    return peak_beyond(scorers(model, args.eap_ig)[1][name], pairs)


def main() -> None:
    """Read the command line and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", help="capitals, countries, random, gpt2, ioi, ...")
    parser.add_argument("--model", help="name or folder; default: the embedded one")
    parser.add_argument("--pairs", type=int, default=16, help="to score; as many to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eap-ig", help="the folder `src` of hannamw/EAP-IG")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path += [str(Path(__file__).parents[1] / "tests"), *filter(None, [args.eap_ig])]
    if args.job:
        print(peak(*args.job, args))
        return
    for task in args.tasks:
        table(task, args)


if __name__ == "__main__":
    main()
