"""What several quantizers make of the same edit, over the seeds of a run.

    python research/scripts/quantizer_table.py smollm2-final-margin-0
    python research/scripts/quantizer_table.py runs/mine-0 runs/mine-1

Each argument is the name of a run in research/tables/runs.csv, whose seeds make one table, or a
finished folder of `mansu run`; all folders together make one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from condense_runs import FULL, TABLES, condensed, read_table, text

from mansu_interp.bench.scoreboard import spread

HEAD = (
    "quantizer | promised | edits that survive | other codes that change | share kept | "
    "four-way | worst set | PTQ gap, four-way | PTQ gap, top-1 | back / gone, by seed (p) | "
    "retained, lowest top-1 | largest loss"
)


def row(seeds: Sequence[dict[str, str]]) -> str:
    """One quantizer's figures over the seeds; - for what is not known."""

    def numbers(key: str) -> list[float]:
        return [float(r[key]) for r in seeds if r.get(key)]

    def gap(key: str) -> str:
        found = numbers(key)
        return f"{spread(found, sign='+')}, max {max(found):+.3f}" if found else "-"

    changed, others, share = map(numbers, ("codes_changed", "other_codes_changed", "share_kept"))
    worst, lowest, losses = map(
        numbers, ("forget_worst_set", "retain_lowest_top1", "retain_worst_loss")
    )
    flips = [f"{r['back']}/{r['gone']} ({float(r['p']):.2f})" for r in seeds if r.get("p")]
    cells = [
        f"`{seeds[0]['quantizer']}`",
        {"True": "yes", "False": "no"}.get(seeds[0]["promised"], "-"),
        f"{mean(changed):.1%}" if changed else "-",
        f"{mean(others):,.0f}" if others else "-",
        spread(share) if share else "-",
        spread(numbers("forget_choice")),
        f"{max(worst):.3f}" if worst else "-",
        gap("gap_choice"),
        gap("gap_top1"),
        ", ".join(flips) or "-",
        f"{min(lowest):.3f}" if lowest else "-",
        f"{max(losses):.3f}" if losses else "-",
    ]
    return f"| {' | '.join(cells)} |"


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """One line per quantizer, full precision first."""
    print(f"| {HEAD} |\n" + "|---" * (HEAD.count("|") + 1) + "|")
    names = dict.fromkeys(r["quantizer"] for r in rows)
    for name in sorted(names, key=lambda q: q != FULL):
        print(row([r for r in rows if r["quantizer"] == name]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A table of quantizers, from finished runs.")
    parser.add_argument("runs", nargs="+", help="names in runs.csv, or folders of `mansu run`")
    given = parser.parse_args().runs
    known = read_table(TABLES / "runs.csv")
    folders = [Path(name) for name in given if Path(name).exists()]
    made = [r for folder in folders for r in condensed(folder)[0]]
    if made:
        print_table([{k: text(v) for k, v in r.items()} for r in made])
    for name in (n for n in given if Path(n) not in folders):
        rows = [r for r in known if r["run"] == name]
        if not rows:
            parser.error(f"{name} is neither a folder nor a run of {TABLES.name}/runs.csv")
        print(f"\n{name}\n")
        print_table(rows)


if __name__ == "__main__":
    main()
