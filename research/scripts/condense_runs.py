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
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from mansu_interp.evaluation.scores import METRICS, Flips, Perplexity, ScoreRow, Scores
from mansu_interp.evaluation.versions import EDITED, NEVER_TAUGHT, ORIGINAL
from mansu_interp.quantizers.survival import Survival
from mansu_interp.report.records import ForgetScore, QuantizerRow, Report
from mansu_interp.utils.files import read_json, write_text
from mansu_interp.utils.records import from_json

TABLES = Path(__file__).parents[1] / "tables"
KEYS = ("run", "model", "task", "method", "seed")
FULL = "none"
UNUSED = ForgetScore(math.nan, math.nan, math.nan)
"""Of a quantizer after which every set is scored: its means are made from these."""
Row = dict[str, Any]


def full_report(path: Path) -> Row:
    """What a report of `mansu run` says, in the common form."""
    report = Report.load(path)
    config, edit = report.config, report.edit
    last = {curve.model: curve.points[-1] for curve in report.relearning}
    back = {model: max(point.first, point.last or 0.0) for model, point in last.items()}
    final, quantized = edit.final_margin, edit.quantization_margin
    return {
        "run": re.sub(r"-\d+$", "", path.parent.name),
        "model": Path(config["model"]).name,
        "task": report.task.name,
        "method": config["unlearn"]["method"],
        "seed": config["seed"],
        "scores": Scores(report.scores, report.perplexity),
        "quantizers": report.quantizers,
        "once": {
            "edited": edit.edited,
            "edited_share": edit.share,
            "edited_in_rows": edit.embedding,
            "final_margin_edits": final.edits if final else None,
            "quantization_margin_edits": quantized.edits if quantized else None,
            "quantization_margin": quantized.reached if quantized else None,
            "relearn_steps": last[EDITED].steps if EDITED in last else None,
            "relearned": back.get(EDITED),
            "relearned_reference": back.get(NEVER_TAUGHT),
            "command": report.command,
        },
    }


def trial(path: Path) -> Row:
    """What a trial of `results.py` says, in the same form."""
    found, first = read_json(path), read_json(path.with_name("original.json"))
    original, scores = (
        Scores(
            from_json(tuple[ScoreRow, ...], given["scores"], str(path)),
            from_json(tuple[Perplexity, ...], given["perplexity"], str(path)),
        )
        for given in (first, found)
    )
    method, _, seed = path.stem.rpartition("-")
    model, task = found["model"], found["task"]
    return {
        "run": "matched",
        "model": model,
        "task": task,
        "method": method,
        "seed": int(seed),
        "scores": original.beside(scores),
        "quantizers": [
            QuantizerRow(
                "nf4",
                promised=method == "mansu",
                survival=from_json(Survival, found["survival"], str(path)),
                choice=UNUSED,
                top1=UNUSED,
                flips=from_json(Flips, found["flips"], str(path)),
            )
        ],
        "once": {
            "edited": found["edited"],
            "edited_share": found["share"],
            "dev_choice": found["dev_choice"],
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
    scores: Scores = found["scores"]
    runs: list[Row] = []
    sets: list[Row] = []
    for q in [None, *found["quantizers"]]:
        name = q.name if q else None
        row: Row = {**key, "quantizer": name or FULL, "promised": q.promised if q else None}
        row |= forgotten(scores, q) | retained(scores, name)
        row |= survived(q) if q else {}
        runs.append(row | found["once"])
        for s in of_quantizer(scores, name):
            one = {"quantizer": name or FULL, "role": s.role, "set": s.label, "prompts": s.n}
            for what in METRICS:
                one[f"{what}_original"] = s[ORIGINAL.after(name)].value(what)
                one[what] = s[EDITED.after(name)].value(what)
            sets.append(key | one)
    return runs, sets


def of_quantizer(scores: Scores, name: str | None, *roles: str) -> list[ScoreRow]:
    """The sets that are scored after a quantizer (None: in full precision), of some roles."""
    return [
        s for s in scores.rows if EDITED.after(name) in s.models and (not roles or s.role in roles)
    ]


def forgotten(scores: Scores, q: QuantizerRow | None) -> Row:
    """Forget accuracy, in full precision or after a quantizer."""
    name = q.name if q else None
    row: Row = {"prompts": sum(s.n for s in scores.of_role("forget"))}
    for what in METRICS:
        full = mean(s[EDITED].value(what) for s in scores.of_role("forget"))
        sets = of_quantizer(scores, name, "forget")
        if sets:
            old, now = (
                mean(s[m.after(name)].value(what) for s in sets) for m in (ORIGINAL, EDITED)
            )
        else:  # a quantizer outside the set: only the means are known
            only = q.choice if what == "choice" else q.top1
            old, now = only.original, only.unlearned
        row |= {f"forget_{what}_original": old, f"forget_{what}": now}
        row[f"gap_{what}"] = now - full if q else None
    worst = [s[EDITED.after(name)].choice for s in of_quantizer(scores, name, "forget")]
    row["forget_worst_set"] = max(worst, default=None)
    return row


def retained(scores: Scores, name: str | None) -> Row:
    """What is retained, and perplexity."""
    sets = of_quantizer(scores, name, "retain")
    before, after = ORIGINAL.after(name), EDITED.after(name)
    falls = [s[before].value(what) - s[after].value(what) for s in sets for what in METRICS]
    perplexity = {p.model: p.value for p in scores.perplexity}
    return {
        "retain_lowest_top1": min((s[after].top1 for s in sets), default=None),
        "retain_worst_loss": max(falls, default=None),
        "perplexity_original": perplexity.get(before),
        "perplexity": perplexity.get(after),
    }


def survived(q: QuantizerRow) -> Row:
    """What a quantizer leaves of the edit."""
    found = q.survival
    return {
        **asdict(q.flips),
        "codes_changed": found.survived / found.edited if found.edited else None,
        "other_codes_changed": found.collateral,
        "update_over_bin": found.update_over_bin,
        "share_kept": found.share_kept,
        "noise_over_signal": found.noise_over_signal,
    }


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
