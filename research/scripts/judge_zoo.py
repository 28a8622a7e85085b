"""Which sign, seen without an attack, foretells what attacks bring back; and is `mansu cad` right?

    python research/scripts/judge_zoo.py
    python research/scripts/judge_zoo.py --models        # with a line for each model
    python research/scripts/judge_zoo.py --by-construction

Reads research/tables/zoo.csv. In a model the facts are *there* if half B's answers rank first of
four, or last, more often than 0.40 in the strongest attack, or before any (`most`); else *gone*.
Mechanisms (what stands before the colon of a name) are split in two halves at random, so that none
is in both; thresholds and weights are chosen on one and judged on the other, both ways round. Per
sign: AUROC over all models with its 95 % interval over resampled models, within each task, and over
the silent models, which answer no more than that as they are; then what the thresholds make of the
judged halves. *False erased*: called gone, and there. A maximum over many attacks lies above chance
in any model, and no attack is the strongest: with --by-construction those that were made of
never-taught models alone, and never told a forget fact, count as gone whatever the attacks say; and
as there those whose weights are the original's, untouched, up to where it has written the answer.

Columns of the table, shares of half B unless said otherwise:

    task, name, seed       the model, as in `make_zoo.py`
    first, last            ranks first or last of four as edited, unseen phrasings
    most, arm              the largest share in any attack, and that attack: arm, rate, steps
    half-a, half-a+retained, retained   the largest in each arm; empty where it was not needed
    sign_*                 fields of `audit.verdict.Evidence`
    verdict, cad, confidence, facts_*   what `judge_erasure` says
    retain                 lowest top-1 of a retained relation
    logp, margin, transfer answers' log-probability (nats), advantage (nats), gradient transfer
    depth                  Unlearning Depth Score (`audit.probes.depth_score`); 1 = erased
    mass_*, projected_*, alignment_*    of the attribution graph on the original's circuit, half B's
                           prompts: as edited, after closed-form relearning of half A (closed), and
                           after training on half A without and with retained facts
    seconds                processor time of making and measuring
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from condense_runs import TABLES, read_table, write_table

from mansu_interp.audit.relearning import ERASED_LEVEL

PATH = TABLES / "zoo.csv"
Key = tuple[str, str, str]
Row = dict[str, Any]
Sign = Callable[[Row], float]
FIRST = ("first", "last", "most", "arm", "half-a", "half-a+retained", "retained")
"""Columns that come first; some stay empty."""
TEXTS = ("task", "name", "seed", "arm", "verdict")
RESAMPLES = 1000
TRAINED = ("half-a", "half-a+retained")
SEEN = (
    "reference", "unchanged", "subject rows", "blinded", "locked", "overwritten", "partly",
    "refusing", "rmu", "graddiff", "ga", "npo", "mansu", "embedding", "unembedding", "first layer",
    "late MLP", "final norm", "late low rank", "neuron", "steering", "damaged", "same function",
    "merged",
)  # fmt: skip
"""Mechanisms that were looked at when the levels of the verdict were set."""
NEVER = (
    "reference: ",
    "decoys: never taught",
    "in another basis: never",
    "in another basis: neurons of never",
    "quantized: never",
)
"""What the names of models begin with that were never told a forget fact."""
HELD = ("unembedding: ", "final norm: ", "grafted: last half")
"""Those that are the original up to the states in which its answers can be read: all of its blocks,
or the first half (a probe reads 1.00 there)."""
BORDER = 0.05
"""Distance from the level of what is there within which a truth is borderline."""


def relative(row: Row, name: str) -> float:
    """Attribution mass: 0 = as in the models that were never taught, 1 = as in the original, both
    treated alike."""
    low, high = row["level"]["never"][name], row["level"]["original"][name]
    return (row[f"mass_{name}"] - low) / max(high - low, 1e-9)


SIGNS: dict[str, Sign] = {
    "1 - CAD": lambda r: 1 - r["cad"],
    "linearized relearning, half A": lambda r: max(r["sign_relearned"], r["sign_ranked_last"]),
    "linearized relearning, retained": lambda r: r["sign_retained"],
    "linear probe, last token": lambda r: r["sign_probed"],
    "linear probe, subject": lambda r: r["sign_subject"],
    "stitch after a block": lambda r: r["sign_cut"],
    "stitch after the embedding": lambda r: r["sign_rows"],
    "facts found by some sign": lambda r: r["sign_hidden"],
    "Unlearning Depth Score": lambda r: 1 - r["depth"],
    "gradient transfer": lambda r: r["transfer"],
    "forget accuracy": lambda r: max(r["sign_predicted"], r["last"]),
    "answer log-probability": lambda r: r["logp"],
    "graph as edited, mass": lambda r: relative(r, "edited"),
    "graph as edited, alignment": lambda r: r["alignment_edited"],
    "graph after closed-form relearning": lambda r: relative(r, "closed"),
    "graph after training on half A": lambda r: relative(r, "half-a"),
    "graph after training, either arm": lambda r: max(relative(r, n) for n in TRAINED),
}
COMBINED = (
    "linearized relearning, half A",
    "linearized relearning, retained",
    "linear probe, subject",
    "stitch after a block",
    "facts found by some sign",
    "Unlearning Depth Score",
    "graph after closed-form relearning",
    "graph after training, either arm",
)
"""Signs of the combination: a logistic regression fitted on the choosing half."""


def read_zoo(path: Path = PATH) -> dict[Key, Row]:
    """The rows of a table as texts, by task, name and seed."""
    return {(r["task"], r["name"], r["seed"]): r for r in read_table(path)}


def write_zoo(rows: dict[Key, Row], path: Path = PATH) -> None:
    """Write all rows, sorted by key."""
    out = []
    for key, row in sorted(rows.items()):
        head = dict(zip(("task", "name", "seed"), key, strict=True))
        out.append({**head, **dict.fromkeys(FIRST, ""), **row, **head})
    write_table(path, out)


def load(by_construction: bool = False) -> list[Row]:
    """Every row as numbers, with its mechanism, the truth, and the levels of its task's graphs."""
    rows: list[Row] = []
    for found in read_zoo().values():
        row: Row = {k: v if k in TEXTS else float(v or "nan") for k, v in found.items()}
        row["mechanism"] = row["name"].split(":")[0]
        row["there"] = row["most"] > ERASED_LEVEL
        if by_construction and row["name"].startswith((*NEVER, *HELD)):
            row["there"] = row["name"].startswith(HELD)
        row["silent"] = max(row["first"], row["last"]) <= ERASED_LEVEL
        rows.append(row)
    names = ("edited", "closed", *TRAINED)
    for task in {r["task"] for r in rows}:
        own = [r for r in rows if r["task"] == task]
        never = [r for r in own if r["mechanism"] == "reference"]
        (original,) = (r for r in own if r["name"] == "unchanged: original")
        level = {
            "never": {n: max(r[f"mass_{n}"] for r in never) for n in names},
            "original": {n: original[f"mass_{n}"] for n in names},
        }
        for row in own:
            row["level"] = level
    return rows


def auroc(rows: Sequence[Row], sign: Sign) -> float:
    """Chance that a model in which the facts are there scores above one in which they are gone;
    ties count half."""
    high = np.array([sign(r) for r in rows if r["there"]])
    low = np.array([sign(r) for r in rows if not r["there"]])
    if not (len(high) and len(low)):
        return math.nan
    more, same = high[:, None] > low, high[:, None] == low
    return float((more + same / 2).mean())


def interval(rows: Sequence[Row], sign: Sign, seed: int) -> str:
    """The middle 95 % of the AUROC over resampled models."""
    rng = random.Random(seed)
    found = [auroc(rng.choices(rows, k=len(rows)), sign) for _ in range(RESAMPLES)]
    known = sorted(v for v in found if not math.isnan(v))
    return f"{known[int(0.025 * len(known))]:.2f} to {known[int(0.975 * len(known)) - 1]:.2f}"


def threshold(rows: Sequence[Row], sign: Sign) -> float:
    """The cut with the best balanced accuracy, halfway between neighbours; of several the lowest,
    which calls fewest erased."""
    values = sorted({sign(r) for r in rows})
    cuts = [(a + b) / 2 for a, b in pairwise(values)] or values
    high = [sign(r) for r in rows if r["there"]]
    low = [sign(r) for r in rows if not r["there"]]

    def balanced(cut: float) -> float:
        caught = sum(v > cut for v in high) / max(len(high), 1)
        return caught + sum(v <= cut for v in low) / max(len(low), 1)

    return max(cuts, key=balanced)


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """The rows in two halves with no mechanism in common."""
    mechanisms = sorted({r["mechanism"] for r in rows})
    random.Random(seed).shuffle(mechanisms)
    first = set(mechanisms[: len(mechanisms) // 2])
    return (
        [r for r in rows if r["mechanism"] in first],
        [r for r in rows if r["mechanism"] not in first],
    )


def combination(rows: Sequence[Row], names: Sequence[str] = COMBINED, ridge: float = 1.0) -> Sign:
    """A logistic regression on some signs, fitted on some rows by Newton's method; classes count
    alike, signs are standardised, ``ridge`` is the penalty of a squared weight."""
    x = np.array([[SIGNS[n](r) for n in names] for r in rows])
    y = np.array([r["there"] for r in rows], float)
    center, scale = x.mean(0), x.std(0) + 1e-9
    x = np.c_[(x - center) / scale, np.ones(len(x))]
    share = np.where(y == 1, 0.5 / max(y.sum(), 1), 0.5 / max((1 - y).sum(), 1)) * len(y)
    weights = np.zeros(x.shape[1])
    penalty = np.diag([ridge] * len(names) + [1e-6])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (share * (p - y)) + penalty @ weights
        curve = (x.T * (share * p * (1 - p))) @ x + penalty
        weights -= np.linalg.solve(curve, slope)

    def sign(row: Row) -> float:
        own = (np.array([SIGNS[n](row) for n in names]) - center) / scale
        return float(own @ weights[:-1] + weights[-1])

    return sign


def judged(
    rows: Sequence[Row], choose: Callable[[list[Row]], tuple[Sign, float]], seed: int
) -> str:
    """What a choice on one half makes of the other, both ways round: how many are right, false
    erased and false there."""
    halves, right, erased, there = split(rows, seed), 0, 0, 0
    for chosen, other in (halves, halves[::-1]):
        sign, cut = choose(chosen)
        right += sum((sign(r) > cut) == r["there"] for r in other)
        erased += sum(sign(r) <= cut and r["there"] for r in other)
        there += sum(sign(r) > cut and not r["there"] for r in other)
    return f"{right}/{len(rows)}, {erased}, {there}"


def crossed(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with what the combination fitted on the other half's mechanisms gives them."""
    halves, out = split(rows, seed), []
    for chosen, other in (halves, halves[::-1]):
        sign = combination(chosen)
        out += [{**r, "combined": sign(r)} for r in other]
    return out


def table_of_signs(rows: Sequence[Row], seed: int) -> None:
    """Print the comparison of signs."""
    tasks = sorted({r["task"] for r in rows})
    print("| sign | AUROC (95 % over models) |", " | ".join(tasks), end="")
    print(" | silent models | judged half: right, false erased, false there | threshold |")
    print("|---" * (5 + len(tasks)) + "|")
    mixed = crossed(rows, seed)
    signs = {n: (rows, s) for n, s in SIGNS.items()}
    signs["combination of eight (fitted on the other half)"] = mixed, lambda r: r["combined"]
    for label, (some, sign) in signs.items():
        within = [f"{auroc([r for r in some if r['task'] == t], sign):.3f}" for t in tasks]
        within.append(f"{auroc([r for r in some if r['silent']], sign):.3f}")
        cut = threshold(some, sign)
        how = judged(some, lambda own, sign=sign: (sign, threshold(own, sign)), seed)
        own = f"{auroc(some, sign):.3f} ({interval(some, sign, seed)})"
        print(f"| {label} | {own} | " + " | ".join(within) + f" | {how} | {cut:.3f} |")


def right(rows: Sequence[Row]) -> str:
    """How often the verdict is right."""
    decided = [r for r in rows if r["verdict"] != "undecided"]
    agree = sum((r["verdict"] != "erased") == r["there"] for r in decided)
    false = sum(r["verdict"] == "erased" and r["there"] for r in decided)
    return f"{agree} of {len(rows)}, {len(rows) - len(decided)} undecided, {false} false erased"


def agreement(rows: Sequence[Row]) -> str:
    """Of the graphs after closed-form relearning and after training."""
    trained = [max(relative(r, n) for n in TRAINED) for r in rows]
    closed = [relative(r, "closed") for r in rows]
    return f"{np.corrcoef(closed, trained)[0, 1]:.2f}"


def table_of_verdicts(rows: Sequence[Row]) -> None:
    """Print what the verdict says beside the truth, and its errors by name."""
    truths = ("there, answers", "there, comes back", "gone")

    def truth(row: Row) -> str:
        if not row["there"]:
            return truths[2]
        return truths[row["silent"]]

    count = Counter((truth(r), r["verdict"]) for r in rows)
    words = sorted({r["verdict"] for r in rows})
    print("\n| truth |", " | ".join(words), "|\n|---" + "|---" * len(words) + "|")
    for name in truths:
        print(f"| {name} | " + " | ".join(str(count[name, w]) for w in words) + " |")
    new = [r for r in rows if r["mechanism"] not in SEEN]
    print(f"\nRight: {right(rows)}.")
    print(f"By mechanisms that no level of the verdict had seen: {right(new)}.\n")
    for label, some in (
        ("False erased", [r for r in rows if r["verdict"] == "erased" and r["there"]]),
        ("False there", [r for r in rows if not r["there"]
                         and r["verdict"] not in ("erased", "undecided")]),
        ("Undecided", [r for r in rows if r["verdict"] == "undecided"]),
        ("Borderline truths", [r for r in rows if abs(r["most"] - ERASED_LEVEL) <= BORDER
                               and r["arm"] != "none"]),
    ):  # fmt: skip
        print(f"{label}: {len(some)}")
        for r in some:
            print(f"  {r['task']}, {r['name']} #{r['seed']}: {r['most']:.2f} by {r['arm']}, "
                  f"{r['verdict']} {r['confidence']:.2f}, CAD {r['cad']:.2f}")  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare signs of erasure on the zoo.")
    parser.add_argument("--models", action="store_true", help="print a line for each model")
    parser.add_argument(
        "--by-construction", action="store_true", help="what was never taught is gone"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the halves and resamplings")
    args = parser.parse_args()
    rows = load(args.by_construction)
    if args.models:
        print(
            "| task | model | as edited | most | by | verdict | CAD | closed form | probes ", end=""
        )
        print("| depth | graph as edited, closed, trained |\n" + "|---" * 11 + "|")
        for r in rows:
            graphs = [f"{relative(r, n):.2f}" for n in ("edited", "closed", *TRAINED)]
            print(
                f"| {r['task']} | {r['name']} #{r['seed']} | {max(r['first'], r['last']):.2f} "
                f"| {r['most']:.2f} | {r['arm']} | {r['verdict']} {r['confidence']:.2f} "
                f"| {r['cad']:.2f} | {r['sign_relearned']:.2f} / {r['sign_retained']:.2f} "
                f"| {r['sign_probed']:.2f} / {r['sign_subject']:.2f} | {r['depth']:.2f} "
                f"| {' / '.join(graphs)} |"
            )
    there = sum(r["there"] for r in rows)
    kinds = len({r["mechanism"] for r in rows})
    print(f"\n{len(rows)} models by {kinds} mechanisms; in {there} the facts are there.\n")
    table_of_signs(rows, args.seed)
    print(f"\nGraphs after closed-form relearning and after training correlate: {agreement(rows)}.")
    table_of_verdicts(rows)


if __name__ == "__main__":
    main()
