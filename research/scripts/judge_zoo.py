"""Which sign, seen without an attack, foretells what the attack brings back; and is `cad` right?

    python research/scripts/judge_zoo.py --horizon 20

Reads research/tables/zoo.csv. A model is *recoverable* if half B's answers rank first of four,
or last (which gives them away, too), more often than 0.25 + 0.15, at once or after half A was
relearned for up to --horizon steps at any rate. Per sign: AUROC, its 95 % interval over resampled
models, and how many are right with the threshold chosen without their family (all seeds of one
mechanism), without their seed, and without their task. For linearized relearning and the probe also
the interval over resampled prompts. Verdicts are those of `mansu cad`, whose thresholds are fixed.

In the table, one row a model, what was measured at several steps or cuts stands in one field,
separated by spaces; ``into`` and ``from`` are the stitches, ``*_by_prompt`` holds one digit a
prompt, and ``judged_*`` are the numbers that the verdict rests on.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from condense_runs import TABLES, Row, read_table, write_table

from mansu_interp.audit.relearning import is_erased
from mansu_interp.audit.verdict import UNCHANGED

PATH = TABLES / "zoo.csv"
LISTS = ("choice", "last", "top1", "linearized", "linearized_last", "into", "from")
TEXTS = ("verdict", "probe_by_prompt", "linearized_by_prompt")
JUDGED = "judged_"
MARKS = (0, 5, 10, 20, 40)
RESAMPLES = 500
Sign = Callable[[Row], float]
SIGNS: dict[str, Sign] = {
    "what `cad` judges by": lambda r: max(r["judged"][k] for k in ("first", "relearned", "last")),
    "linearized relearning": lambda r: r["linearized"][-1],
    "linear probe": lambda r: r["probe"],
    "gradient transfer": lambda r: r["transfer"],
    "attribution mass": lambda r: r["mass"],
    "attribution alignment": lambda r: r["alignment"],
    "forget accuracy": lambda r: r["forget"],
    "answer log-probability": lambda r: r["logp"],
    "ranking margin": lambda r: r["margin"],
    "edited states into original, best cut": lambda r: max(r["into"][1:]),
    "original states into edited, best cut": lambda r: max(r["from"][:-1]),
    "stitch, either way": lambda r: max(*r["into"][1:], *r["from"][:-1]),
    "probe or accuracy": lambda r: max(r["probe"], r["forget"]),
}


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


def load(tasks: Sequence[str], horizon: int) -> list[Row]:
    """Every row, with its name, task, family and seed, and the ground truth."""
    rows: list[Row] = []
    for task in tasks:
        for name, r in sorted(read_zoo(task).items()):
            what, _, seed = name.rpartition(" #")
            until = MARKS.index(horizon) + 1
            erased = is_erased(max(r["choice"][:until]), max(r["last"][:until]))
            truth = {"recoverable": not erased, "family": what.split(":")[0]}
            rows.append({**r, **truth, "name": what, "task": task, "seed": seed})
    return rows


def expected(row: Row) -> str:
    """The verdict that the attack makes right. Answering as before is nearly all answers right,
    since the original knows them all."""
    if row["choice"][0] >= UNCHANGED:
        return "unchanged"
    return "suppressed" if row["recoverable"] else "erased"


def auroc(rows: Sequence[Row], sign: Sign) -> float:
    """Chance that a recoverable model scores above one that is not; ties count half."""
    high = [sign(r) for r in rows if r["recoverable"]]
    low = [sign(r) for r in rows if not r["recoverable"]]
    wins = sum((a > b) + (a == b) / 2 for a in high for b in low)
    return wins / (len(high) * len(low)) if high and low else float("nan")


def interval(found: Sequence[float]) -> str:
    """The middle 95 % of what is a number."""
    known = sorted(v for v in found if not math.isnan(v))
    if not known:
        return "-"
    return f"{known[int(0.025 * len(known))]:.2f} to {known[int(0.975 * len(known)) - 1]:.2f}"


def threshold(rows: Sequence[Row], sign: Sign) -> float:
    """The cut with the best joint_rounding accuracy, halfway between neighbours."""
    values = sorted({sign(r) for r in rows})
    cuts = [(a + b) / 2 for a, b in pairwise(values)] or values
    high = [sign(r) for r in rows if r["recoverable"]]
    low = [sign(r) for r in rows if not r["recoverable"]]

    def joint_rounding(cut: float) -> float:
        return sum(v > cut for v in high) / max(len(high), 1) + sum(v <= cut for v in low) / max(
            len(low), 1
        )

    return max(cuts, key=joint_rounding)


def left_out(rows: Sequence[Row], sign: Sign, key: str) -> str:
    """How many are right with the threshold chosen on the rows that differ in ``key``."""
    groups = {r[key] for r in rows}
    if len(groups) < 2:
        return "-"
    right = 0
    for group in groups:
        rest = [r for r in rows if r[key] != group]
        if len({r["recoverable"] for r in rest}) < 2:
            return "-"
        cut = threshold(rest, sign)
        right += sum((sign(r) > cut) == r["recoverable"] for r in rows if r[key] == group)
    return f"{right}/{len(rows)}"


def over_prompts(rows: Sequence[Row], bits_of: str, rng: random.Random) -> str:
    """A sign's AUROC on resampled prompts, the same for every model of a task."""
    found = []
    for _ in range(RESAMPLES):
        drawn: dict[str, list[int]] = {}
        again = []
        for r in rows:
            bits = r[bits_of]
            picks = drawn.setdefault(r["task"], rng.choices(range(len(bits)), k=len(bits)))
            again.append({**r, "share": sum(bits[k] == "1" for k in picks) / len(bits)})
        found.append(auroc(again, lambda r: r["share"]))
    return interval(found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare signs of erasure on the zoo.")
    parser.add_argument("--tasks", nargs="+", default=["capitals", "countries"])
    parser.add_argument("--horizon", type=int, default=20, choices=MARKS[1:])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = load(args.tasks, args.horizon)
    print("| task | model | seed | choice after 0/5/10/20/40 | top-1 at 20 | retain ", end="")
    print("| linearized | probe | transfer | mass | truth | `cad` |\n|---" + "|---" * 11 + "|")
    for r in rows:
        path = " ".join(f"{c:.2f}" for c in r["choice"])
        truth = "recoverable" if r["recoverable"] else "not"
        print(
            f"| {r['task']} | {r['name']} | {r['seed']} | {path} | {r['top1'][3]:.2f} "
            f"| {r['retain']:.2f} | {r['linearized'][-1]:.2f} | {r['probe']:.2f} "
            f"| {r['transfer']:.2f} | {r['mass']:.2f} | {truth} "
            f"| {r['verdict']} {r['confidence']:.2f} |"
        )
    print(f"\n{len(rows)} models, {sum(r['recoverable'] for r in rows)} recoverable ", end="")
    print(f"within {args.horizon} steps.\n")
    print("| sign | AUROC | 95 % over models | right, family left out | seed left out ", end="")
    print("| task left out | threshold |\n|---|---|---|---|---|---|---|")
    samples = [rng.choices(rows, k=len(rows)) for _ in range(RESAMPLES)]
    for label, sign in SIGNS.items():
        cells = [
            f"{auroc(rows, sign):.3f}",
            interval([auroc(s, sign) for s in samples]),
            *(left_out(rows, sign, key) for key in ("family", "seed", "task")),
            f"{threshold(rows, sign):.3f}",
        ]
        print(f"| {label} | " + " | ".join(cells) + " |")
    for label, bits in (("linearized relearning", "linearized"), ("the probe", "probe")):
        found = over_prompts(rows, f"{bits}_by_prompt", rng)
        print(f"\nThe AUROC of {label} over resampled prompts: {found}.")
    right = [r for r in rows if r["verdict"] == expected(r)]
    print(f"\n`cad` is right for {len(right)} of {len(rows)}:\n")
    print("| attack says | `cad` says | models |\n|---|---|---|")
    for (truth, said), n in sorted(Counter((expected(r), r["verdict"]) for r in rows).items()):
        print(f"| {truth} | {said} | {n} |")


if __name__ == "__main__":
    main()
