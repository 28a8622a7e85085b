"""How far an edit moves a model where it should not move at all, and the last step within a budget.

Disruption is the mean of KL(original || edited), in nats a token, on running text: the measure by
which RepSelect (Sondej et al. 2026, arXiv 2606.17168) makes methods comparable, at 0.01. Text and
rule of choice are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..losses.answers import divergence, row_logits
from ..models.language_model import LanguageModel
from ..tasks.pairs import PairSet, Tokens
from ..tasks.task import Task
from .results import Look

ROWS, WINDOW, BATCH = 64, 128, 16
"""Paragraphs or prompts, tokens of each, and how many are computed together."""


def disruption_text(task: Task) -> tuple[str, list[Tokens]]:
    """What disruption is measured on, in a word and as tokens.

    The task's unseen running text; where it has none, prompts in dev phrasings whose answers are
    retained (else the trained ones), without their answers.
    """
    if unseen := task.text.get("unseen"):
        return "running text", [row[:WINDOW] for row in unseen[:ROWS]]
    sets = list(task.scored["dev"].get("retain", {}).values()) or [task.retain]
    pairs = PairSet("retain", tuple(p for s in sets for p in s)).sample(ROWS, 0)
    return "retained prompts", [p.clean[:WINDOW] for p in pairs]


@torch.no_grad()
def disruption(original: LanguageModel, edited: LanguageModel, text: Sequence[Tokens]) -> float:
    """Mean of KL(original || edited) over all tokens of some text, in nats a token; not negative
    but for rounding.

    Arguments:
        original: before the edit.
        edited: after it.
        text: token rows, such as of `disruption_text`; none is empty.
    """
    total, count = 0.0, 0
    for k in range(0, len(text), BATCH):
        before, after = (row_logits(m, text[k : k + BATCH]) for m in (original, edited))
        total += float(divergence(after, before)) * len(before)
        count += len(before)
    return total / count


@dataclass
class LastWithin:
    """Of all models that it looks at, the last one within a disruption budget.

    The original, which moves nothing, stands for a run of which no look is within it. A run that
    leaves the budget and comes back, as one that noises and repairs, counts where it comes back.
    """

    original: LanguageModel
    task: Task
    budget: float
    """Nats a token."""
    step: int = 0
    """Steps of that model; 0: the original."""
    looks: list[Look] = field(default_factory=list)
    """All that were measured."""

    def __post_init__(self) -> None:
        self.model = self.original
        self._spare: LanguageModel | None = None
        _, self.text = disruption_text(self.task)

    @torch.no_grad()
    def look(self, model: LanguageModel, done: int) -> None:
        """Measure a model after so many steps, as it would be saved; keep it if it is within the
        budget."""
        stored = self._spare or model.copy()
        for name, weight in stored.weights.items():
            weight.copy_(model.weights[name].to(model.saved_dtype))
        self._spare = stored
        found = Look(done, disruption(self.original, stored, self.text))
        if self.looks and found == self.looks[-1]:
            return  # the run's end, looked at already
        self.looks.append(found)
        if not found.kl <= self.budget:  # NaN, too
            return
        self._spare = None if self.model is self.original else self.model
        self.model, self.step = stored, done
