"""What settings are chosen by: a run's edit on the dev phrasings, never the unseen ones.

    python scripts/dev_scores.py RUN [RUN ...]

Each RUN is a finished folder of `mansu run`. In full precision and after every quantizer of its
set: how often the forget answers rank first and last of four, first over all draws of three rivals
(which scatters less than the one draw of the task) and first of all words; by how many nats they
stand above where they should, among their relation's answers, over some training prompts (mean,
spread); the largest loss of a retained relation, four-way, against the original at the same
precision; and the neighbour's accuracy before and after the edit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch

from mansu_interp.artifacts import read_json
from mansu_interp.models import LanguageModel, load_model
from mansu_interp.objectives import CounterfactualTargets, log_probs, model_excess
from mansu_interp.pairs import PairSet, Task, answer_tokens
from mansu_interp.quantizers import quantize
from mansu_interp.scoring import BATCH, accuracy, choice_accuracy
from mansu_interp.tasks import load_task

TRAINED = 240
"""Training prompts on which the excess is measured."""


@torch.no_grad()
def training_excess(original: LanguageModel, model: LanguageModel, task: Task) -> tuple[float, ...]:
    """Mean and standard deviation of the excess (nats)."""
    targets = CounterfactualTargets(original, task.forget)
    found = [
        model_excess(model, part, targets) for part in task.forget.sample(TRAINED, 0).parts(BATCH)
    ]
    every = torch.cat(found)
    return float(every.mean()), float(every.std())


@torch.no_grad()
def all_draws(model: LanguageModel, pairs: PairSet) -> float:
    """How often the answer outranks three of its relation's other answers, drawn one by one from
    all of them."""
    answers, drawn = answer_tokens(pairs), 0.0
    for part in pairs.parts(BATCH):
        for row, pair in zip(log_probs(model, part).cpu(), part, strict=True):
            rivals = answers[pair.relation]
            rivals = row[rivals[rivals != pair.answer]]
            drawn += float((row[pair.answer] > rivals).float().mean()) ** 3
    return drawn / len(pairs)


def loss(original: LanguageModel, model: LanguageModel, task: Task) -> float:
    """The largest fall of a retained relation."""
    sets = task.scored["dev"]["retain"].values()
    return max(choice_accuracy(original, s) - choice_accuracy(model, s) for s in sets)


def beside(model: LanguageModel, task: Task) -> str:
    """Of the neighbour, whose prompts are never trained on."""
    sets = task.scored["dev"]["neighbour"].values()
    return " / ".join(f"{choice_accuracy(model, s):.3f}" for s in sets)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Edits on the dev phrasings.")
    parser.add_argument("runs", nargs="+", type=Path)
    torch.set_num_threads(1)
    head = "run | precision | first | last | gap | all draws | top-1 | excess, trained | worst loss"
    print(f"| {head} | neighbour |")
    print(f"|{10 * '---|'}")
    for run in parser.parse_args().runs:
        config = read_json(run / "config.json")
        original = load_model(config["model"])
        name = read_json(run / "report.json")["task"]["name"]
        task = load_task(name, original, config["score_pairs"])
        edited, full = load_model(run / "model"), 0.0
        for name in (None, *config["unlearn"]["survive"]):
            base, model = ((quantize(m, name) if name else m) for m in (original, edited))
            forget = task.scored["dev"]["forget"].values()
            found = [accuracy(model, s) for s in forget]
            first, last, said = (
                mean(getattr(a, k) for a in found) for k in ("choice", "last", "top1")
            )
            full = full if name else first
            drawn = mean(all_draws(model, s) for s in forget)
            above, spread = training_excess(base, model, task)
            cells = [
                run.name,
                name or "full",
                *(f"{x:.3f}" for x in (first, last)),
                f"{first - full:+.3f}",
                *(f"{x:.3f}" for x in (drawn, said)),
                f"{above:+.2f} ({spread:.2f})",
                f"{loss(base, model, task):.3f}",
                f"{beside(base, task)} to {beside(model, task)}"
                if task.scored["dev"]["neighbour"]
                else "-",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
