"""The calibration zoo as a table: research/tables/zoo.csv, one row a model.

What was measured at several steps or cuts stands in one field, separated by spaces; ``into`` and
``from`` are the stitches, ``*_by_prompt`` holds one digit a prompt, and ``judged_*`` are the
numbers that the verdict of `mansu cad` rests on. `make_zoo.py` writes it, `judge_zoo.py` reads it.
"""

from __future__ import annotations

from condense_runs import TABLES, Row, read_table, write_table

PATH = TABLES / "zoo.csv"
LISTS = ("choice", "last", "top1", "linearized", "linearized_last", "into", "from")
TEXTS = ("verdict", "probe_by_prompt", "linearized_by_prompt")
JUDGED = "judged_"


def read_zoo(task: str) -> dict[str, Row]:
    """The rows of a task, by ``family: variant #seed``."""
    return {
        f"{row['name']} #{row['seed']}": _from_text(row)
        for row in read_table(PATH)
        if row["task"] == task
    }


def write_zoo(task: str, rows: dict[str, Row]) -> None:
    """Write a task's rows in the place of those that are there."""
    others = [row for row in read_table(PATH) if row["task"] != task]
    own = []
    for name, row in sorted(rows.items()):
        what, _, seed = name.rpartition(" #")
        own.append({"task": task, "name": what, "seed": seed, **_to_text(row)})
    write_table(PATH, sorted([*others, *own], key=lambda r: r["task"]))


def _to_text(row: Row) -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in row.items():
        if key == "judged":
            out |= {JUDGED + k: repr(float(v)) for k, v in value.items()}
        elif key in LISTS:
            out[key] = " ".join(repr(float(v)) for v in value)
        else:
            out[key] = value if key in TEXTS else repr(float(value))
    return out


def _from_text(row: dict[str, str]) -> Row:
    out: Row = {"judged": {}}
    for key, value in row.items():
        if key in ("task", "name", "seed"):
            continue
        if key.startswith(JUDGED):
            out["judged"][key.removeprefix(JUDGED)] = float(value)
        elif key in LISTS:
            out[key] = [float(v) for v in value.split()]
        else:
            out[key] = value if key in TEXTS else float(value)
    return out
