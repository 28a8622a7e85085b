"""What several quantizers make of the same edit: the tables of docs, from runs.

    python scripts/quantizer_table.py REPORT [REPORT ...] [--keep FOLDER]

Each REPORT is the `report.json` of `mansu run`; reports that differ in their seed alone make a row
of means. `--keep` writes what they say of scores and edits, without graph and samples, to FOLDER,
as REPORT's folder is named; such a file is read as the whole is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from mansu_interp.artifacts import read_json, write_json
from mansu_interp.evaluation import EDITED, ORIGINAL, Scores
from mansu_interp.report.scoreboard import spread

HEAD = (
    "quantizer | promised | edits that survive | other codes that change | projection | "
    "four-way, after | PTQ gap, four-way | PTQ gap, top-1 | back / gone, by seed (p) | "
    "retained, lowest top-1 | largest loss"
)
KEPT = ("command", "versions", "properties", "scores", "perplexity", "quantizers", "relearning")


def gap(found: list[dict[str, Any]], key: str) -> str:
    """Mean and spread over seeds, and the largest of single seeds."""
    values = [f[key]["gap"] for f in found]
    return f"{spread(values, sign='+')}, max {max(values):+.3f}"


def retained(reports: list[dict[str, Any]], precision: str) -> list[str]:
    """The lowest top-1 of a retained relation, and the most that top-1 or choice of one fell by,
    against the original at the same precision; over all seeds."""
    before, after = ORIGINAL + precision, EDITED + precision
    models = [r["models"] for x in reports for r in x["scores"] if r["role"] == "retain"]
    if not all(after in m for m in models):
        return ["-", "-"]
    fell = max(m[before][k] - m[after][k] for m in models for k in ("top1", "choice"))
    return [f"{min(m[after]['top1'] for m in models):.3f}", f"{fell:.3f}"]


def full(reports: list[dict[str, Any]]) -> str:
    """The row of the edited model before any quantizer."""
    choice = [Scores(x["scores"], None).mean("forget", "choice", EDITED) for x in reports]
    cells = ["none", *["-"] * 4, spread(choice), *["-"] * 3, *retained(reports, "")]
    return f"| {' | '.join(cells)} |"


def row(found: list[dict[str, Any]], reports: list[dict[str, Any]]) -> str:
    """One quantizer's figures over the runs."""
    first = found[0]
    share = mean(f["survived"] / f["edited"] for f in found)
    projection = [f["projection"] for f in found if f["projection"] is not None]
    flips = [f["flips"] for f in found]
    cells = [
        f"`{first['name']}`",
        "yes" if first["promised"] else "no",
        f"{share:.1%}",
        f"{mean(f['collateral'] for f in found):,.0f}",
        spread(projection) if projection else "-",
        spread([f["choice"]["unlearned"] for f in found]),
        gap(found, "choice"),
        gap(found, "top1"),
        ", ".join(f"{f['back']}/{f['gone']} ({f['p']:.2f})" for f in flips),
        *retained(reports, f" {first['name']}"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A table of quantizers, from finished runs.")
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    reports = [read_json(path) for path in given.reports]
    print(f"| {HEAD} |")
    print("|---" * (HEAD.count("|") + 1) + "|")
    print(full(reports))
    for found in zip(*(r["quantizers"] for r in reports), strict=True):
        if len({f["name"] for f in found}) > 1:
            parser.error("the reports name different quantizers")
        print(row(list(found), reports))
    for path, report in zip(given.reports, reports, strict=True):
        if given.keep:
            edit = {k: v for k, v in report["edit"].items() if k != "by_weight"}
            kept = {k: report[k] for k in KEPT if k in report} | {"edit": edit}
            write_json(given.keep / f"{path.parent.name}.json", kept)


if __name__ == "__main__":
    main()
