"""Does the circuit matter to the edit? Masks of different circuits, at the same budget.

    python research/scripts/mask_circuits.py --tasks capitals countries --seeds 0 1 2

Everything but the circuit is what `mansu run` does with the same seed. The circuits: the ranking's
(`circuit`), the same after removal by exact ablation (`pruned`), all edges (`whole model`), and
paths from the input to the logits drawn at random until there are as many edges (`random paths`).
Columns, one row a circuit and seed; scores are on unseen phrasings:

    edges           of the circuit
    share to edit   parameters of its components, of all of the model's
    Jaccard         of its mask and the circuit's: parameters in both, over those in either
    edited          share of the model's parameters
    forget, nf4     four-way accuracy, mean over the sets; chance 0.25
    retain          the largest fall of a retained or neighbouring set, four-way or top-1, before or
                    after NF4, against the original in the same precision

Two circuits whose masks are equal have one edit, which is made once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from statistics import mean, stdev

import numpy as np
import torch
from jaxtyping import Bool

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.search.discover import discover
from mansu_interp.evaluation.scores import Scores, evaluate
from mansu_interp.evaluation.versions import EDITED, ORIGINAL
from mansu_interp.export.ledger import changed_elements
from mansu_interp.masks.components import region
from mansu_interp.masks.mask import Mask
from mansu_interp.models.graph import Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.unlearn import unlearn

REMOVAL_TRIES = 300
"""As in `mansu discover`."""
VERSIONS = (ORIGINAL, EDITED)


@dataclass(frozen=True)
class Edited:
    """What one mask led to."""

    edited: float
    forget: float
    forget_nf4: float
    retain: float


def random_paths(graph: Graph, edges: int, seed: int) -> Bool[np.ndarray, "writers readers"]:
    """Whole paths from input to logits, drawn step by step, until there are so many edges."""
    rng, out = np.random.default_rng(seed), np.zeros_like(graph.exists)
    while out.sum() < edges:
        writer, last = 0, False
        while not last:
            reader = int(rng.choice(np.flatnonzero(graph.exists[writer])))
            out[writer, reader] = True
            last = graph.readers[reader].kind == "logits"
            writer = writer if last else int(rng.choice(graph.feeds[reader]))
    return out


def jaccard(a: Mask, b: Mask) -> float:
    """Parameters that both masks have, over those that either has."""
    names = {*a.indices, *b.indices}
    none = torch.zeros(0, dtype=torch.int64)
    both = sum(len(np.intersect1d(a.indices.get(n, none), b.indices.get(n, none))) for n in names)
    return both / (a.n_parameters + b.n_parameters - both)


def share_to_edit(circuit: Circuit, model: LanguageModel) -> float:
    """Parameters of a circuit's components, of all."""
    inside = region(model, circuit.components())
    return sum(int(rows.sum()) for rows in inside.values()) / model.n_parameters


def edit(
    model: LanguageModel, task: Task, mask: Mask, config: object, seed: int, before: Scores
) -> Edited:
    """Unlearn with a mask, and score."""
    edited = unlearn(model, task, mask, config, seed=seed).model  # type: ignore[arg-type]
    after = {EDITED: edited, EDITED.after("nf4"): quantize(edited)}
    scores = before.beside(evaluate(after, task))
    pairs = [(EDITED.after(q), ORIGINAL.after(q)) for q in (None, "nf4")]
    return Edited(
        sum(changed_elements(model, edited).values()) / model.n_parameters,
        scores.mean("forget", "choice", EDITED),
        scores.mean("forget", "choice", EDITED.after("nf4")),
        max(scores.largest_fall(role, pairs).by for role in ("retain", "neighbour")),
    )


def measure(name: str, seeds: list[int]) -> None:
    """Print the rows of one task, and their means."""
    model = load_model("facts")
    task = load_task(name, model, default_config("facts", name).score_pairs)
    before = evaluate({ORIGINAL: model, ORIGINAL.after("nf4"): quantize(model)}, task)
    print(
        f"\n| {name}, seed | circuit | edges | share to edit | Jaccard | edited | forget | nf4 | "
        "retain |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in seeds:
        config = replace(default_config("facts", name), seed=seed)
        more = replace(config.circuit, removal_tries=REMOVAL_TRIES)
        found, pruned = (
            discover(model, task.forget, config=c, retain=task.retain, seed=seed)
            for c in (config.circuit, more)
        )
        every = replace(found, edges=model.graph.exists)
        drawn = replace(found, edges=random_paths(model.graph, int(found.edges.sum()), seed))
        circuits = {"circuit": found, "pruned": pruned, "whole model": every, "random paths": drawn}
        made: list[tuple[Mask, Edited]] = []
        for label, circuit in circuits.items():
            mask = make_mask(config, model, task, circuit)
            same = next((e for m, e in made if jaccard(m, mask) == 1), None)
            result = same or edit(model, task, mask, config.unlearn, seed, before)
            made.append((mask, result))
            cells = (int(circuit.edges.sum()), share_to_edit(circuit, model))
            values = (*cells, jaccard(made[0][0], mask), *vars(result).values())
            rows.setdefault(label, []).append(values)
            print(f"| {seed} | {label} | " + " | ".join(shown(values)) + " |", flush=True)
    for label, several in rows.items():
        columns = list(zip(*several, strict=True))
        spread = [stdev(c) if len(c) > 1 else 0.0 for c in columns]
        cells = zip(shown([mean(c) for c in columns]), shown(spread), strict=True)
        print(f"| mean | {label} | " + " | ".join(f"{m} ± {s}" for m, s in cells) + " |")


def shown(values: list[float] | tuple[float, ...]) -> list[str]:
    """The cells of a row."""
    ways = ("{:.0f}", "{:.1%}", "{:.2f}", "{:.2%}", "{:.3f}", "{:.3f}", "{:.3f}")
    return [way.format(v) for way, v in zip(ways, values, strict=True)]


def main() -> None:
    """Read the command line and measure every task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["capitals", "countries"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for task in args.tasks:
        measure(task, args.seeds)


if __name__ == "__main__":
    main()
