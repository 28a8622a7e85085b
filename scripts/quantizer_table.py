"""What several quantizers make of the same edit: the table of docs/quantizers.md, from runs.

    python scripts/quantizer_table.py RUN [RUN ...]

Each RUN is a finished folder of `mansu run`; runs that differ in their seed alone make a row of
means, and every figure is read from their `report.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from mansu_interp.report.scoreboard import spread

HEAD = (
    "quantizer | promised | edits that survive | other codes that change | projection | "
    "four-way, after | PTQ gap, four-way | PTQ gap, top-1"
)


def row(found: list[dict[str, Any]]) -> str:
    """One quantizer's figures over the runs."""
    first = found[0]
    share = mean(f["survived"] / f["edited"] for f in found)
    projection = [f["projection"] for f in found if f["projection"] is not None]
    cells = [
        f"`{first['name']}`",
        "yes" if first["promised"] else "no",
        f"{share:.1%}",
        f"{mean(f['collateral'] for f in found):,.0f}",
        spread(projection) if projection else "-",
        spread([f["choice"]["unlearned"] for f in found]),
        spread([f["choice"]["gap"] for f in found], sign="+"),
        spread([f["top1"]["gap"] for f in found], sign="+"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A table of quantizers, from finished runs.")
    parser.add_argument("runs", nargs="+", type=Path)
    reports = [json.loads((run / "report.json").read_text()) for run in parser.parse_args().runs]
    print(f"| {HEAD} |")
    print("|---" * (HEAD.count("|") + 1) + "|")
    for found in zip(*(r["quantizers"] for r in reports), strict=True):
        if len({f["name"] for f in found}) > 1:
            parser.error("the runs name different quantizers")
        print(row(list(found)))


if __name__ == "__main__":
    main()
