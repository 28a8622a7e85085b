"""Reports of finished runs -> rows of research/tables/runs.csv and sets.csv.

    python research/scripts/condense_runs.py runs/mine-0 runs/mine-1
    python research/scripts/condense_runs.py runs/matched/facts-capitals/*.json

Each argument is a folder of `mansu run`, its `report.json`, or a trial that `results.py` keeps.
A row of runs.csv is one run in full precision (quantizer `none`) or after one quantizer; a row of
sets.csv is one scored set of it. `retain_worst_loss` is the largest fall of a retained set,
four-way or top-1, against the original in the same precision; `relearned` is how often the other
half's answers rank first or last of four, whichever is more often, after `relearn_steps` steps, and
`relearned_reference` the same of the reference model. Rows of the same run, model, task, method and
seed are replaced, all others stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mansu_interp.evaluation.scores import EDITED, ORIGINAL
from mansu_interp.utils.files import read_json, write_text

TABLES = Path(__file__).parents[1] / "tables"
KEYS = ("run", "model", "task", "method", "seed")
FULL = "none"
Row = dict[str, Any]


def full_report(path: Path) -> Row:
    """What a report of `mansu run` says, in the common form."""
    report = read_json(path)
    config, edit = report["config"], report["edit"] or {}
    relearned = report.get("relearning") or {}
    steps, back = (relearned.get(EDITED) or [[None, None]])[-1]
    never = [v[-1][1] for k, v in relearned.items() if k != EDITED]
    return {
        "run": re.sub(r"-\d+$", "", path.parent.name),
        "model": Path(config["model"]).name,
        "task": report["task"]["name"],
        "method": config["unlearn"]["method"],
        "seed": config["seed"],
        "sets": report["scores"],
        "perplexity": report["perplexity"] or {},
        "quantizers": report["quantizers"],
        "once": {
            "edited": edit.get("edited"),
            "edited_share": edit.get("share"),
            "edited_in_rows": edit.get("embedding"),
            "final_margin_edits": edit.get("deepening"),
            "quantization_margin_edits": edit.get("parting"),
            "quantization_margin": edit.get("apart"),
            "relearn_steps": steps,
            "relearned": back,
            "relearned_reference": never[0] if never else None,
            "attribution": (report.get("cad") or {}).get("verdict"),
            "seconds": sum((report.get("seconds") or {}).values()) or None,
            "command": report.get("command"),
        },
    }


def trial(path: Path) -> Row:
    """What a trial of `results.py` says, in the same form."""
    found, first = read_json(path), read_json(path.with_name("original.json"))
    names = {"fp": "", "nf4": " nf4"}
    sets = [
        {
            **old,
            "models": {
                label + names[q]: scores
                for label, row in ((ORIGINAL, old), (EDITED, new))
                for q, scores in row["models"].items()
            },
        }
        for old, new in zip(first["rows"], found["rows"], strict=True)
    ]
    texts = ((ORIGINAL, first["perplexity"] or {}), (EDITED, found["perplexity"] or {}))
    nf4 = {k: found[k] for k in ("survived", "collateral", "projection", "update_over_bin")}
    method, _, seed = path.stem.rpartition("-")
    model, task = found["model"], found["task"]
    return {
        "run": "matched",
        "model": model,
        "task": task,
        "method": method,
        "seed": int(seed),
        "sets": sets,
        "perplexity": {label + names[q]: v for label, by in texts for q, v in by.items()},
        "quantizers": [{"name": "nf4", "edited": found["edited_quantized"], **nf4}],
        "once": {
            "edited": found["edited"],
            "edited_share": found["share"],
            "dev_choice": found["dev_choice"],
            "attribution": found.get("cad", {}).get("verdict"),
            "steps": found.get("steps"),
            "lr": found.get("lr"),
            "seconds": found["seconds"],
            "command": f"python research/scripts/results.py --model {model} --task {task}",
        },
    }


def condensed(path: Path) -> tuple[list[Row], list[Row]]:
    """The rows of runs.csv and of sets.csv that one finished run makes."""
    path = path / "report.json" if path.is_dir() else path
    found = (full_report if path.name == "report.json" else trial)(path)
    key = {k: found[k] for k in KEYS}
    forget = [s for s in found["sets"] if s["role"] == "forget"]
    retain = [s for s in found["sets"] if s["role"] == "retain"]
    runs: list[Row] = []
    sets: list[Row] = []
    for q in [{}, *found["quantizers"]]:
        name = q.get("name", FULL)
        before, after = (m if name == FULL else f"{m} {name}" for m in (ORIGINAL, EDITED))
        row: Row = {**key, "quantizer": name, "promised": q.get("promised")}
        row["prompts"] = sum(s["n"] for s in forget)
        known = [s for s in found["sets"] if after in s["models"]]
        for what in ("choice", "top1"):
            old, now, full = (
                mean(s["models"].get(m, {}).get(what, math.nan) for s in forget)
                for m in (before, after, EDITED)
            )
            if math.isnan(now):  # of older reports, which score sets after NF4 alone
                old, now = q[what]["original"], q[what]["unlearned"]
            row |= {f"forget_{what}_original": old, f"forget_{what}": now}
            row[f"gap_{what}"] = now - full if q else None
        falls = [
            s["models"][before][what] - s["models"][after][what]
            for s in retain
            for what in ("top1", "choice")
            if s in known
        ]
        worst = [s["models"][after]["choice"] for s in forget if s in known]
        row["forget_worst_set"] = max(worst, default=None)
        row |= {k: q.get("flips", {}).get(k) for k in ("back", "gone", "p")}
        lowest = [s["models"][after]["top1"] for s in retain if s in known]
        row["retain_lowest_top1"] = min(lowest, default=None)
        row["retain_worst_loss"] = max(falls, default=None)
        row["perplexity_original"] = found["perplexity"].get(before)
        row["perplexity"] = found["perplexity"].get(after)
        edited = q.get("edited")
        row["codes_changed"] = q["survived"] / edited if edited else None
        row["other_codes_changed"] = q.get("collateral")
        row |= {k: q.get(k) for k in ("update_over_bin", "projection", "noise_over_signal")}
        runs.append(row | found["once"])
        for s in known:
            one = {"quantizer": name, "role": s["role"], "set": s["label"], "prompts": s["n"]}
            for what in ("choice", "top1"):
                one[f"{what}_original"] = s["models"][before][what]
                one[what] = s["models"][after][what]
            sets.append(key | one)
    return runs, sets


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def text(value: object) -> str:
    """A value as it stands in a table: six digits, and nothing for what is not known."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows; what one lacks stays empty."""
    out = io.StringIO()
    names = list(dict.fromkeys(k for row in rows for k in row))
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: text(v) for k, v in row.items()} for row in rows)
    write_text(path, out.getvalue())


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into a table, in the place of those of the same runs."""

    def of(row: Row) -> tuple[str, ...]:
        return tuple(str(row[k]) for k in KEYS)

    new = list(rows)
    there = {of(row) for row in new}
    kept = [row for row in read_table(path) if of(row) not in there]
    write_table(path, sorted([*kept, *new], key=of))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Condense reports of runs to rows of tables.")
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--name", help="of the run, for all; by default the folder's, without seed")
    parser.add_argument("--tables", type=Path, default=TABLES)
    given = parser.parse_args()
    named = {"run": given.name} if given.name else {}
    found = [condensed(path) for path in given.reports if path.name != "original.json"]
    for k, name in enumerate(("runs", "sets")):
        merge(given.tables / f"{name}.csv", (row | named for parts in found for row in parts[k]))


if __name__ == "__main__":
    main()
