"""What settings are chosen by: a run's edit on the dev phrasings.

    python scripts/dev_scores.py RUN [RUN ...]
    python scripts/dev_scores.py RUN [RUN ...] --report

Each RUN is a finished folder of `mansu run`. In full precision and after every quantizer of its
set: how often the forget answers rank first and last of four, first over all draws of three rivals
(which scatters less than the one draw of the task) and first of all words; by how many nats they
stand above where they should, among their relation's answers, over some training prompts (mean,
spread); the largest loss of a retained relation, four-way, against the original at the same
precision; and the neighbour's accuracy before and after the edit.

With `--report`, once nothing is chosen any more: the forget answers alone, on the unseen phrasings,
to see how much of a report's gap is the one draw of rivals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
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


def forgotten(model: LanguageModel, task: Task, split: str) -> dict[str, float]:
    """Figures of the forget answers, mean over their sets."""
    sets = task.scored[split]["forget"].values()
    found = [accuracy(model, s) for s in sets]
    return {
        "first": mean(a.choice for a in found),
        "last": mean(a.last for a in found),
        "all draws": mean(all_draws(model, s) for s in sets),
        "top-1": mean(a.top1 for a in found),
    }


def beyond(original: LanguageModel, model: LanguageModel, task: Task) -> dict[str, str]:
    """What is looked at while settings are chosen, besides."""
    above, spread = training_excess(original, model, task)
    near = f"{beside(original, task)} to {beside(model, task)}"
    return {
        "excess, trained": f"{above:+.2f} ({spread:.2f})",
        "worst loss": f"{loss(original, model, task):.3f}",
        "neighbour": near if task.scored["dev"]["neighbour"] else "-",
    }


def row(cells: Iterable[str]) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Edits on the dev phrasings.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--report", action="store_true", help="the unseen phrasings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for k, run in enumerate(args.runs):
        config = read_json(run / "config.json")
        original = load_model(config["model"])
        task_name = read_json(run / "report.json")["task"]["name"]
        task = load_task(task_name, original, config["score_pairs"])
        edited, full = load_model(run / "model"), {}
        for name in (None, *config["unlearn"]["survive"]):
            model = quantize(edited, name) if name else edited
            found = forgotten(model, task, "unseen" if args.report else "dev")
            full = full or found
            cells = {"run": run.name, "precision": name or "full"}
            cells |= {label: f"{x:.3f}" for label, x in found.items()}
            cells |= {f"gap, {x}": f"{found[x] - full[x]:+.3f}" for x in ("first", "all draws")}
            if not args.report:
                base = quantize(original, name) if name else original
                cells |= beyond(base, model, task)
            if k == 0 and not name:
                row(cells)
                row("---" for _ in cells)
            row(cells.values())


if __name__ == "__main__":
    main()
