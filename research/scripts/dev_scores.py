"""What settings are chosen by: a run's edit on the dev phrasings.

    python research/scripts/dev_scores.py RUN [RUN ...]

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

import torch
from every_prompt import FIGURES, figures, opened, row

from mansu_interp.losses.accuracy import BATCH, choice_accuracy
from mansu_interp.losses.counterfactual import CounterfactualTargets, model_answer_excess
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.survival import quantize
from mansu_interp.tasks.task import Task

TRAINED = 240
"""Training prompts on which the excess is measured."""


@torch.no_grad()
def training_excess(original: LanguageModel, model: LanguageModel, task: Task) -> tuple[float, ...]:
    """Mean and standard deviation of the excess (nats)."""
    targets = CounterfactualTargets(original, task.forget)
    found = [
        model_answer_excess(model, part, targets)
        for part in task.forget.sample(TRAINED, 0).parts(BATCH)
    ]
    every = torch.cat(found)
    return float(every.mean()), float(every.std())


def loss(original: LanguageModel, model: LanguageModel, task: Task) -> float:
    """The largest fall of a retained relation."""
    sets = task.scored["dev"]["retain"].values()
    return max(choice_accuracy(original, s) - choice_accuracy(model, s) for s in sets)


def beside(model: LanguageModel, task: Task) -> str:
    """Of the neighbour, whose prompts are never trained on."""
    sets = task.scored["dev"]["neighbour"].values()
    return " / ".join(f"{choice_accuracy(model, s):.3f}" for s in sets)


def forgotten(model: LanguageModel, task: Task) -> dict[str, float]:
    """The `FIGURES` of the forget answers, mean over their sets."""
    sets = task.scored["dev"]["forget"].values()
    means = torch.stack([figures(model, s).mean(0) for s in sets]).mean(0)
    return dict(zip(FIGURES, means.tolist(), strict=True))


def beyond(original: LanguageModel, model: LanguageModel, task: Task) -> dict[str, str]:
    """What is looked at while settings are chosen, besides."""
    above, spread = training_excess(original, model, task)
    near = f"{beside(original, task)} to {beside(model, task)}"
    return {
        "excess, trained": f"{above:+.2f} ({spread:.2f})",
        "worst loss": f"{loss(original, model, task):.3f}",
        "neighbour": near if task.scored["dev"]["neighbour"] else "-",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Edits on the dev phrasings.")
    parser.add_argument("runs", nargs="+", type=Path)
    torch.set_num_threads(1)
    for k, run in enumerate(parser.parse_args().runs):
        config, original, edited, task = opened(run)
        full: dict[str, float] = {}
        for name in (None, *config["unlearn"]["survive"]):
            model = quantize(edited, name) if name else edited
            found = forgotten(model, task)
            full = full or found
            cells = {"run": run.name, "precision": name or "full"}
            cells |= {label: f"{x:.3f}" for label, x in found.items()}
            cells |= {f"gap, {x}": f"{found[x] - full[x]:+.3f}" for x in ("first", "all draws")}
            cells |= beyond(quantize(original, name) if name else original, model, task)
            if k == 0 and not name:
                row(cells)
                row("---" for _ in cells)
            row(cells.values())


if __name__ == "__main__":
    main()
