"""Does the circuit matter to the edit? Masks of different circuits, at the same budget and steps.

    python research/scripts/mask_circuits.py --tasks capitals countries --seeds 0 1 2
    python research/scripts/mask_circuits.py --circuits circuit "whole model" --seeds 0 1 \
      --tasks language currency continent symbol number
    python research/scripts/mask_circuits.py --seeds           # prints the table; trains nothing

A task that is not shipped is a relation of `capitals.json`: the same file with that relation as the
one to forget, the others as those to retain, and no settings of its own, so that `mansu run` has
its defaults. Everything but the circuit is what `mansu run` does with the same seed. The circuits:
the ranking's (`circuit`), the same after removal by exact ablation (`pruned`), all edges (`whole
model`), and paths from the input to the logits drawn at random until there are as many edges
(`random paths`). `drawn weights` is a mask of as many weights as the circuit's, drawn from those of
all components, with the same embedding rows: what its Jaccard is by chance. Rows go to
research/tables/masks.csv, scores on unseen phrasings:

    edges           of the circuit
    share           parameters of its components, of all of the model's
    jaccard         of its mask and the circuit's: parameters in both, over those in either
    edited          share of the model's parameters
    known           four-way accuracy of the original on the forget sets; chance 0.25
    forget, nf4     the same of the edited model, mean over the sets; after NF4
    retain          the largest fall of a retained or neighbouring set, four-way or top-1, before or
                    after NF4, against the original in the same precision
    steps           until dev forget accuracy in full precision is at most 0.35; empty: never

Two circuits whose masks are equal have one edit, which is made once. Below the table: whole model
minus circuit, with a 95 % interval over tasks (Student's t on their means over seeds), and how many
pairs of task and seed lie on either side (sign test, two-sided, without ties).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Bool

from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.search.discover import discover
from mansu_interp.evaluation.properties import FORGET_TARGET
from mansu_interp.evaluation.scores import Scores, evaluate, sign_test
from mansu_interp.evaluation.versions import EDITED, ORIGINAL
from mansu_interp.export.ledger import changed_elements
from mansu_interp.masks.components import region
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import random_mask
from mansu_interp.models.graph import Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.training import dev_choice
from mansu_interp.unlearning.unlearn import unlearn
from mansu_interp.utils.shipped import DATA

TABLE = Path(__file__).parents[1] / "tables/masks.csv"
REMOVAL_TRIES = 300
"""As in `mansu discover`."""
CIRCUIT, PRUNED, WHOLE, PATHS, DRAWN = (
    "circuit", "pruned", "whole model", "random paths", "drawn weights",
)  # fmt: skip
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5th percentile, for 1, 2, ... degrees of freedom."""
SHOWN = {
    "edges": "{:.0f}", "share": "{:.1%}", "jaccard": "{:.2f}", "edited": "{:.2%}",
    "known": "{:.3f}", "forget": "{:.3f}", "nf4": "{:.3f}", "retain": "{:.3f}", "steps": "{:.0f}",
}  # fmt: skip


@dataclass(frozen=True)
class Edited:
    """What one mask led to."""

    edited: float = math.nan
    known: float = math.nan
    forget: float = math.nan
    nf4: float = math.nan
    retain: float = math.nan
    steps: float = math.nan


@dataclass(frozen=True)
class Row:
    """A row of the table; NaN is an empty cell."""

    task: str
    seed: int
    circuit: str
    edges: float
    share: float
    jaccard: float
    edited: Edited

    def cells(self) -> dict[str, str]:
        """As text."""
        out = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "edited"}
        out |= {k: str(v) for k, v in vars(self.edited).items()}
        numbers = {k: f"{float(v):.6g}" for k, v in out.items() if k in SHOWN and v != "nan"}
        return {k: numbers.get(k, "" if k in SHOWN else v) for k, v in out.items()}


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


def read_task(name: str, model: LanguageModel) -> tuple[Task, RunConfig]:
    """A shipped task, or `capitals` with another relation to forget; and a run's settings."""
    with TemporaryDirectory() as folder:
        path = name
        if not (DATA / "tasks" / f"{name}.json").exists():
            spec = json.loads((DATA / "tasks/capitals.json").read_text("utf-8"))
            spec |= {"name": name, "title": f"Forget every {name}.", "reference_models": []}
            spec |= {"retain": [r for r in spec["relations"] if r != name]}
            spec |= {"forget": {"relations": [name], "subjects": None}, "settings": {}}
            path = str(Path(folder, f"{name}.json"))
            Path(path).write_text(json.dumps(spec), "utf-8")
        config = default_config("facts", path)
        return load_task(path, model, config.score_pairs), config


def edit(
    model: LanguageModel, task: Task, mask: Mask, config: RunConfig, seed: int, before: Scores
) -> Edited:
    """Unlearn with a mask, and score."""
    reached: list[int] = []

    def look(now: LanguageModel, done: int) -> None:
        if not reached and dev_choice(now, task) <= FORGET_TARGET:
            reached.append(done)

    edited = unlearn(model, task, mask, config.unlearn, seed=seed, on_look=look).model
    after = {EDITED: edited, EDITED.after("nf4"): quantize(edited)}
    scores = before.beside(evaluate(after, task))
    pairs = [(EDITED.after(q), ORIGINAL.after(q)) for q in (None, "nf4")]
    return Edited(
        sum(changed_elements(model, edited).values()) / model.n_parameters,
        scores.mean("forget", "choice", ORIGINAL),
        scores.mean("forget", "choice", EDITED),
        scores.mean("forget", "choice", EDITED.after("nf4")),
        max(scores.largest_fall(role, pairs).by for role in ("retain", "neighbour")),
        reached[0] if reached else math.nan,
    )


def by_chance(model: LanguageModel, mask: Mask, config: RunConfig, seed: int) -> Mask:
    """As many weights drawn at random, with the mask's own rows of the embedding."""
    drawn = random_mask(model, config.budget, seed, config.unlearn.promised)
    own = {n: i for n, i in mask.indices.items() if n == model.embedding_name}
    return replace(drawn, indices={**drawn.indices, **own})


def measure(name: str, seed: int, labels: list[str], keep: Callable[[Row], None]) -> None:
    """The rows of one task and seed."""
    model = load_model("facts")
    task, config = read_task(name, model)
    before = evaluate({ORIGINAL: model, ORIGINAL.after("nf4"): quantize(model)}, task)
    config = replace(config, seed=seed)

    def found(tries: int) -> Circuit:
        settings = replace(config.circuit, removal_tries=tries)
        return discover(model, task.forget, config=settings, retain=task.retain, seed=seed)

    first = found(0)
    paths = random_paths(model.graph, int(first.edges.sum()), seed)
    make: dict[str, Callable[[], Circuit]] = {
        CIRCUIT: lambda: first,
        PRUNED: lambda: found(REMOVAL_TRIES),
        WHOLE: lambda: replace(first, edges=model.graph.exists),
        PATHS: lambda: replace(first, edges=paths),
    }
    made: list[tuple[Mask, Edited]] = []
    for label in (x for x in make if x in labels):
        circuit = make[label]()
        mask = make_mask(config, model, task, circuit)
        same = next((e for m, e in made if jaccard(m, mask) == 1), None)
        made.append((mask, same or edit(model, task, mask, config, seed, before)))
        share, shared = share_to_edit(circuit, model), jaccard(made[0][0], mask)
        keep(Row(name, seed, label, int(circuit.edges.sum()), share, shared, made[-1][1]))
    drawn = by_chance(model, made[0][0], config, seed)
    nothing = (math.nan, math.nan)
    keep(Row(name, seed, DRAWN, *nothing, jaccard(made[0][0], drawn), Edited()))


Table = dict[tuple[str, str, str], dict[str, str]]
"""Cells by task, seed and circuit."""


def read_table() -> Table:
    """The rows so far."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {(r["task"], r["seed"], r["circuit"]): r for r in csv.DictReader(file)}


def write_row(row: Row) -> None:
    """Put a row into the table, in the place of an earlier one of its task, seed and circuit."""
    cells = row.cells()
    table = {**read_table(), (row.task, str(row.seed), row.circuit): cells}
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(cells), lineterminator="\n")
        out.writeheader()
        out.writerows(table.values())
    print(", ".join(f"{k} {v}" for k, v in cells.items()), flush=True)


def values(table: Table, task: str, circuit: str, column: str) -> dict[str, float]:
    """Seed -> value, of the cells that are not empty."""
    found = {s: r[column] for (t, s, c), r in table.items() if (t, c) == (task, circuit)}
    return {s: float(v) for s, v in found.items() if v}


def print_means(table: Table) -> None:
    """Mean ± standard deviation over seeds."""
    print(f"\n| task | circuit | seeds | {' | '.join(SHOWN)} |\n|---|---|---|{'---|' * len(SHOWN)}")
    for task, circuit in dict.fromkeys((t, c) for t, _, c in table):
        cells, seeds = [], [s for t, s, c in table if (t, c) == (task, circuit)]
        for column, way in SHOWN.items():
            given = list(values(table, task, circuit, column).values())
            spread = f" ± {way.format(stdev(given))}" if len(given) > 1 else ""
            less = f" ({len(given)} of {len(seeds)})" if 0 < len(given) < len(seeds) else ""
            cells.append(way.format(mean(given)) + spread + less if given else "")
        print(f"| {task} | {circuit} | {' '.join(seeds)} | {' | '.join(cells)} |")


def print_differences(table: Table) -> None:
    """Whole model minus circuit, paired by task and seed."""
    print("\n| difference | tasks | mean, 95 % interval | above / equal / below | p |")
    print("|---|---|---|---|---|")
    for column in ("forget", "nf4", "retain", "steps"):
        every, by_task = [], {}
        for task in dict.fromkeys(t for t, _, _ in table):
            one, other = (values(table, task, c, column) for c in (CIRCUIT, WHOLE))
            pairs = [other[s] - one[s] for s in one if s in other]
            every += pairs
            by_task |= {task: mean(pairs)} if pairs else {}
        if len(by_task) < 2:
            continue
        means = list(by_task.values())
        half = T95[len(means) - 2] * stdev(means) / len(means) ** 0.5
        sides = [sum(d > 1e-9 for d in every), sum(abs(d) <= 1e-9 for d in every)]
        sides.append(len(every) - sum(sides))
        middle, way = mean(means), "{:+.1f}" if column == "steps" else "{:+.3f}"
        low, high = way.format(middle - half), way.format(middle + half)
        p = sign_test(sides[0], sides[2])
        print(
            f"| {column} | {len(means)} | {way.format(middle)} [{low}, {high}] | "
            f"{' / '.join(map(str, sides))} | {p:.3f} |"
        )


def main() -> None:
    """Read the command line, measure, and print what the table holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["capitals", "countries"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    every = [CIRCUIT, PRUNED, WHOLE, PATHS]
    parser.add_argument("--circuits", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    if CIRCUIT not in args.circuits:
        parser.error(f"--circuits needs {CIRCUIT}, with which the others are compared")
    for seed in args.seeds:
        for task in args.tasks:
            measure(task, seed, args.circuits, write_row)
    table = read_table()
    print_means(table)
    print_differences(table)


if __name__ == "__main__":
    main()
