"""Which sign, seen without an attack, foretells what the attack brings back?

    python scripts/judge_zoo.py --task capitals

Reads docs/research/zoo-TASK.json. A model is *recoverable* if half A brings half B's choice above
0.25 + 0.15 within HORIZON steps at any rate. Per sign: AUROC, its 95 % interval over resampled
models, and how many are right with the threshold chosen without their family (`left out`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from mansu_interp.relearning import CHANCE, TOLERANCE

DOCS = Path(__file__).parents[1] / "docs" / "research"
MARKS = (0, 5, 10, 20, 40)
HORIZON = 40
"""Attack steps within which a model counts as recoverable."""
Row = dict[str, Any]
SIGNS: dict[str, Callable[[Row], float]] = {
    "linear probe": lambda r: r["probe"],
    "gradient transfer": lambda r: r["transfer"],
    "forget accuracy": lambda r: r["forget"],
    "answer log-probability": lambda r: r["logp"],
    "ranking margin": lambda r: r["margin"],
    "edited states into original, best cut": lambda r: max(r["into"][1:]),
    "original states into edited, best cut": lambda r: max(r["from"][:-1]),
    "stitch, either way": lambda r: max(*r["into"][1:], *r["from"][:-1]),
    "probe or accuracy": lambda r: max(r["probe"], r["forget"]),
}


def recoverable(row: Row) -> bool:
    """The ground truth."""
    return max(row["choice"][: MARKS.index(HORIZON) + 1]) > CHANCE + TOLERANCE


def auroc(rows: list[Row], sign: Callable[[Row], float]) -> float:
    """Chance that a recoverable model scores above one that is not; ties count half."""
    high = [sign(r) for r in rows if recoverable(r)]
    low = [sign(r) for r in rows if not recoverable(r)]
    wins = sum((a > b) + (a == b) / 2 for a in high for b in low)
    return wins / (len(high) * len(low)) if high and low else float("nan")


def threshold(rows: list[Row], sign: Callable[[Row], float]) -> float:
    """The cut with the best balanced accuracy, halfway between neighbours."""
    values = sorted({sign(r) for r in rows})
    cuts = [(a + b) / 2 for a, b in pairwise(values)] or values
    high, low = [r for r in rows if recoverable(r)], [r for r in rows if not recoverable(r)]

    def balanced(cut: float) -> float:
        return sum(sign(r) > cut for r in high) / max(len(high), 1) + sum(
            sign(r) <= cut for r in low
        ) / max(len(low), 1)

    return max(cuts, key=balanced)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare signs of erasure on the zoo.")
    parser.add_argument("--task", default="capitals")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    named: dict[str, Row] = json.loads((DOCS / f"zoo-{args.task}.json").read_text())
    family = {id(r): name.split(":")[0] for name, r in named.items()}
    rows = list(named.values())
    print("| model | choice after 0/5/10/20/40 | top-1 at 20 | retain | probe | transfer | truth |")
    print("|---|---|---|---|---|---|---|")
    for name, r in sorted(named.items()):
        path = " ".join(f"{c:.2f}" for c in r["choice"])
        truth = "recoverable" if recoverable(r) else "not"
        print(
            f"| {name} | {path} | {r['top1'][3]:.2f} | {r['retain']:.2f} | {r['probe']:.2f} "
            f"| {r['transfer']:.2f} | {truth} |"
        )
    n = sum(map(recoverable, rows))
    print(f"\n{len(rows)} models, {n} recoverable.\n")
    print("| sign | AUROC | 95 % interval | right, family left out | threshold |")
    print("|---|---|---|---|---|")
    rng = random.Random(args.seed)
    samples = [rng.choices(rows, k=len(rows)) for _ in range(500)]
    for label, sign in SIGNS.items():
        spread = sorted(a for s in samples if (a := auroc(s, sign)) == a)
        right = 0
        for one in rows:
            cut = threshold([r for r in rows if family[id(r)] != family[id(one)]], sign)
            right += (sign(one) > cut) == recoverable(one)
        low, high = spread[int(0.025 * len(spread))], spread[int(0.975 * len(spread)) - 1]
        print(
            f"| {label} | {auroc(rows, sign):.3f} | {low:.2f} to {high:.2f} "
            f"| {right}/{len(rows)} | {threshold(rows, sign):.3f} |"
        )


if __name__ == "__main__":
    main()
