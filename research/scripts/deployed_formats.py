"""Who comes back where: methods at matched forgetting, format by format, from a benchmark's table.

    python research/scripts/deployed_formats.py            # of research/tables/deployed.csv
    python research/scripts/deployed_formats.py runs/bench/table.csv --model facts --task capitals

Of each method and format, over the seeds: the mean gap (four-way forget accuracy after the format,
minus before), the prompts whose answer comes to the first rank of four there and those that leave
it, and p of a two-sided sign test on their sums. Prompts of several seeds are the same ones, and
those that ask for one fact depend on each other, so that p is rather too small than too large.
Bold: more comes back than chance would bring (p < 0.05). Of a method whose edits were made to
survive formats, a second table says what they keep of it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from condense_runs import TABLES

from mansu_interp.bench.scoreboard import spread
from mansu_interp.evaluation.scores import sign_test

Row = dict[str, str]
ALPHA = 0.05


def numbers(rows: Iterable[Row], key: str) -> list[float]:
    """A column, where it is known."""
    return [float(r[key]) for r in rows if r[key]]


def came_back(rows: Iterable[Row]) -> str:
    """Gap, prompts back and gone, and p, over some seeds."""
    rows = list(rows)
    if not numbers(rows, "gap_choice"):
        return "–"
    back, gone = (int(sum(numbers(rows, key))) for key in ("back", "gone"))
    p = sign_test(back, gone)
    told = f"{mean(numbers(rows, 'gap_choice')):+.3f}, {back} / {gone}"
    shown = "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")
    return f"**{told} ({shown})**" if back > gone and p < ALPHA else f"{told} ({shown})"


def print_table(head: list[str], rows: Iterable[list[str]]) -> None:
    """In Markdown."""
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def print_task(rows: list[Row]) -> None:
    """The tables of one model and task."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    formats = list(dict.fromkeys(r["quantizer"] for r in rows))
    of = {m: [r for r in rows if r["method"] == m] for m in methods}
    seeds = {m: {r["seed"]: r for r in of[m]}.values() for m in methods}
    before = {m: list(seeds[m]) for m in methods}
    told: list[list[str]] = [
        [
            "seeds; forget before",
            *(f"{len(s)}; {spread(numbers(s, 'forget_choice'))}" for s in before.values()),
        ],
        [
            "mean retained top-1, lowest",
            *(f"{min(numbers(of[m], 'retain_top1')):.3f}" for m in methods),
        ],
    ]
    for q in formats:
        told.append(
            [f"`{q}`", *(came_back(r for r in of[m] if r["quantizer"] == q) for m in methods)]
        )
    counted = [[r for r in of[m] if r["gap_choice"]] for m in methods]
    worse = [
        sum(int(r["back"]) > int(r["gone"]) and float(r["p"]) < ALPHA for r in some)
        for some in counted
    ]
    told.append(
        [
            "trials with p < .05",
            *(f"{n} of {len(some)}" for n, some in zip(worse, counted, strict=True)),
        ]
    )
    print_table(["", *methods], told)
    for m in methods:
        if not m.startswith("mansu"):
            continue
        kept = []
        for q in formats:
            some = [r for r in of[m] if r["quantizer"] == q]
            survived, others = numbers(some, "codes_changed"), numbers(some, "collateral")
            if survived:
                share = spread(numbers(some, "share_kept"))
                kept.append([f"`{q}`", f"{min(survived):.1%}", f"{max(others):,.0f}", share])
        print_table([m, "edits that survive, least", "other codes, most", "share kept"], kept)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Methods format by format.")
    parser.add_argument("table", nargs="?", type=Path, default=TABLES / "deployed.csv")
    parser.add_argument("--model", help="only this one")
    parser.add_argument("--task", help="only this one")
    given = parser.parse_args()
    with given.table.open(newline="") as lines:
        rows = [
            r
            for r in csv.DictReader(lines)
            if given.model in (None, r["model"]) and given.task in (None, r["task"])
        ]
    for model, task in dict.fromkeys((r["model"], r["task"]) for r in rows):
        print(f"\n{model}, {task}\n")
        print_task([r for r in rows if (r["model"], r["task"]) == (model, task)])


if __name__ == "__main__":
    main()
