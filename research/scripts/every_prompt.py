"""Runs on every prompt of the unseen phrasings, and over every draw of rivals.

    python research/scripts/every_prompt.py RUN [RUN ...]

Each RUN is a finished folder of `mansu run`. Its report scores a sample (`score_pairs` of each set)
with one draw of three rivals each, so that a gap scatters; here are all of them, in full precision
and after every quantizer of the run's set. First those that the report leaves out, which nobody
ever looked at, then all: how often the forget answers rank first of four, first over all draws of
rivals, and last, and how often the model predicts them (means over the sets), with the gaps to full
precision and the worst set, and the prompts on which the answer came back to the first rank or
went, with the p of a sign test.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_interp.evaluation.scores import Flips
from mansu_interp.evaluation.versions import EDITED, ORIGINAL
from mansu_interp.losses.accuracy import BATCH, ranked_first, ranked_last
from mansu_interp.losses.answers import log_probs
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.report.records import Report
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet, answer_tokens, collate
from mansu_interp.tasks.task import Task
from mansu_interp.utils.files import read_json

EVERY = 10**6
FIGURES = ("first", "all draws", "last", "top-1")


@torch.no_grad()
def figures(model: LanguageModel, pairs: PairSet) -> Float[Tensor, "pairs 4"]:
    """Of each pair, in the order of ``parts(BATCH)``, the `FIGURES`: whether its answer outranks
    its distractors, how often it would outrank three of its relation's other answers (drawn one by
    one), whether all distractors outrank it, and whether the model predicts it; of an answer of
    several tokens the deciding one."""
    answers, out = answer_tokens(pairs), []
    for part in pairs.parts(BATCH):
        rows, batch = log_probs(model, part).cpu(), collate(part)
        drawn = []
        for row, pair in zip(rows, part, strict=True):
            rivals = answers[pair.relation]
            rivals = row[rivals[rivals != pair.answer]]
            drawn.append(float((row[pair.answer] > rivals).float().mean()) ** 3)
        first, last = ranked_first(rows, batch.choices), ranked_last(rows, batch.choices)
        said = rows.argmax(1) == batch.answer
        out.append(torch.stack([first, torch.tensor(drawn), last, said], 1))
    return torch.cat(out)


def opened(
    run: Path, score_pairs: int | None = None
) -> tuple[dict[str, Any], LanguageModel, LanguageModel, Task]:
    """A finished run's settings, the original, the edited model, and the task, scored on as many
    prompts a set as the run's report or as given."""
    config = read_json(run / "config.json")
    original = load_model(config["model"])
    name = Report.load(run / "report.json").task.name
    task = load_task(name, original, score_pairs or config["score_pairs"])
    return config, original, load_model(run / "model"), task


def row(cells: Iterable[str]) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def against(after: list[Tensor], before: list[Tensor]) -> list[str]:
    """How often answers rank first, as means over sets with the gaps, and the worst set; what came
    back."""
    sets, others = (torch.stack([x.mean(0) for x in found]) for found in (after, before))
    now, then, worst = sets.mean(0), others.mean(0), sets.amax(0)
    flips = Flips.between(*(torch.cat(x)[:, 0].tolist() for x in (before, after)))
    return [
        *(f"{now[k]:.3f} ({now[k] - then[k]:+.3f}), {worst[k]:.3f}" for k in range(2)),
        f"{flips.back}/{flips.gone} ({flips.p:.2f})",
        *(f"{x:.3f}" for x in now[2:]),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Runs on every prompt of the unseen phrasings.")
    parser.add_argument("runs", nargs="+", type=Path)
    torch.set_num_threads(1)
    for k, run in enumerate(parser.parse_args().runs):
        config, original, edited, task = opened(run, EVERY)
        sets = task.scored["unseen"]["forget"].values()
        n = config["score_pairs"]  # a set's sample is what it begins with
        cut = [[PairSet(s.name, part) for part in (s.pairs[:n], s.pairs[n:]) if part] for s in sets]
        if k == 0:
            columns = [
                "first (gap), worst",
                "all draws (gap), worst",
                "back / gone (p)",
                *FIGURES[2:],
            ]
            left_out, every = sum(len(s.pairs[n:]) for s in sets), sum(map(len, sets))
            head = [f"{c}, {m}" for m in (f"{left_out} left out", f"all {every}") for c in columns]
            row(["model", "precision", *head])
            row("---" for _ in range(2 + len(head)))
        models = {str(ORIGINAL): original} if k == 0 else {}
        for label, model in (models | {f"{run.name}, {EDITED}": edited}).items():
            full: list[list[Tensor]] = []
            for precision in (None, *config["unlearn"]["survive"]):
                some = quantize(model, precision) if precision else model
                found = [[figures(some, part) for part in parts] for parts in cut]
                full = full or found
                cells = [label, precision or "full"]
                rest = [[parts[1] for parts in x if len(parts) > 1] for x in (found, full)]
                cells += against(*rest) if rest[0] else ["-"] * len(columns)
                cells += against(*([torch.cat(parts) for parts in x] for x in (found, full)))
                row(cells)


if __name__ == "__main__":
    main()
