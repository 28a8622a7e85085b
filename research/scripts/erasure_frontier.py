"""How hard the facts come back, against what it cost: the frontier of erasure.

    python research/scripts/erasure_frontier.py facts capitals mansu=runs/0/model npo=runs/n/model

Attacks every checkpoint named by relearning (`mansu relearn --quick`, unseen phrasings, worst of
the rates) and notes beside it the share of parameters that differ from the original and the largest
loss of a retained relation. Rows go to runs/frontier-MODEL-TASK.json, finished ones are not made
again, and several checkpoints of one name are its seeds; the table printed and the plot beside the
file are of all rows attacked for the same steps. Reference models that ship with the task are
attacked, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.relearning import relearn
from mansu_interp.export.ledger import changed_elements, weights_sha256
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.load import load_model
from mansu_interp.runs.defaults import default_config
from mansu_interp.tasks.load import load_task
from mansu_interp.utils.files import write_json, write_text
from mansu_interp.utils.shipped import is_embedded
from mansu_interp.viz.plots import Dots, scatter_svg

RUNS = Path(__file__).parents[2] / "runs"
AT = 20
"""Steps at which the plot reads the attack."""


def table(rows: list[dict], marks: list[int]) -> str:
    """The rows as Markdown."""
    head = ["", "edited", "worst retain loss", *(f"{m} steps" for m in marks)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        back = [f"{c:.2f} / {t:.2f}" for c, t in zip(row["choice"], row["top1"], strict=True)]
        lines.append([row["name"], f"{row['share']:.3%}", f"{row['loss']:.3f}", *back])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(rows: list[dict], marks: list[int]) -> str:
    """Half B after the attack, by share of parameters edited."""
    at = marks.index(AT) if AT in marks else -1
    names = dict.fromkeys(r["name"] for r in rows if r["share"])
    points = []
    for name in names:
        own = [r for r in rows if r["name"] == name]
        ours = name.startswith("mansu")
        across = Dots(name, [r["share"] for r in own], ours)
        points.append((across, Dots(name, [r["choice"][at] for r in own], ours)))
    label = f"half B, four-way, {marks[at]} steps of relearning"
    return scatter_svg(points, "share of parameters edited", label, log_x=True, labels=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("original")
    parser.add_argument("task")
    parser.add_argument("checkpoints", nargs="*", help="NAME=FOLDER")
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 10, 20, 40, 80])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.original)
    score_pairs = default_config(args.original, args.task).score_pairs
    task = load_task(args.task, model, score_pairs)
    given = [(name, path) for name, _, path in (c.partition("=") for c in args.checkpoints)]
    if is_embedded(args.original):
        given += [("never taught", twin) for twin in task.reference_models]
    path = RUNS / f"frontier-{Path(args.original).name}-{Path(args.task).stem}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    kept = task.scored["unseen"]["retain"]
    before = {n: accuracy(model, s) for n, s in kept.items()}
    marks = [0, *args.steps]
    for name, folder in given:
        edited = load_model(folder)
        digest = weights_sha256(edited)
        if any(r["sha256"] == digest and r["steps"] == marks for r in rows):
            continue
        found = relearn(edited, task, config=RelearnConfig(steps=tuple(args.steps)))
        moved = sum(changed_elements(model, edited).values())
        losses = []
        for n, s in kept.items():
            after = accuracy(edited, s)
            losses += [before[n].choice - after.choice, before[n].top1 - after.top1]
        row = {
            "name": name,
            "sha256": digest,
            "share": 0.0 if name == "never taught" else moved / model.n_parameters,
            "loss": max(losses),
            "steps": marks,
            "choice": [found.at(m) for m in marks],
            "top1": [found.at(m, "top1") for m in marks],
        }
        rows.append(row)
        rows.sort(key=lambda r: r["name"])
        write_json(path, rows)
        print(table([row], marks).splitlines()[-1], flush=True)
    rows = [r for r in rows if r["steps"] == marks]
    print(table(rows, marks))
    write_text(path.with_suffix(".svg"), picture(rows, marks))


if __name__ == "__main__":
    main()
