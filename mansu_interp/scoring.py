"""Accuracy and perplexity of one model on one set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .models import LanguageModel
from .tasks import Pair, PairSet, by_phrasing, chunks, collate

BATCH = 32


@dataclass(frozen=True)
class Accuracy:
    """Scores of one model on one pair set."""

    top1: float
    """Share of prompts whose most likely next token is the answer's first."""
    choice: float
    """Share of prompts on which the answer outranks its three distractors; chance is 0.25."""
    n: int
    """Prompts."""


def ranked_first(
    logits: Float[Tensor, "batch vocab"], choices: Int[Tensor, "batch 4"]
) -> Bool[Tensor, " batch"]:
    """Where the answer (the first choice) outranks its distractors; a tie counts against it."""
    options = logits.gather(1, choices)
    return options[:, 0] > options[:, 1:].amax(1)


@torch.no_grad()
def accuracy(model: LanguageModel, pairs: PairSet) -> Accuracy:
    """Top-1 and four-way choice accuracy. A tie counts against the model."""
    top1 = choice = 0
    for batch in pairs.batches(BATCH):
        logits = model.last_logits(batch.clean, batch.last)
        top1 += int((logits.argmax(-1) == batch.answer).sum())
        choice += int(ranked_first(logits, batch.choices).sum())
    return Accuracy(top1 / len(pairs), choice / len(pairs), len(pairs))


def choice_accuracy(model: LanguageModel, pairs: PairSet) -> float:
    """Four-way choice accuracy alone."""
    return accuracy(model, pairs).choice


@torch.no_grad()
def known(model: LanguageModel, pairs: PairSet) -> PairSet | None:
    """The pairs whose answer the model ranks above its distractors; None if there is none."""
    out: list[Pair] = []
    for group in by_phrasing(pairs):
        for part in chunks(group, BATCH):
            batch = collate(part)
            right = ranked_first(model.last_logits(batch.clean, batch.last), batch.choices)
            out += [pair for pair, ok in zip(part, right, strict=True) if ok]
    return PairSet(pairs.name, tuple(out)) if out else None


@torch.no_grad()
def perplexity(model: LanguageModel, text: Sequence[tuple[int, ...]], window: int = 128) -> float:
    """exp of the mean next-token loss over the first ``window`` tokens of each paragraph."""
    total, count = 0.0, 0
    for row in text:
        tokens = torch.tensor([row[:window]])
        logp = model.all_logits(tokens)[0, :-1].log_softmax(-1)
        total -= float(logp.gather(1, tokens[0, 1:, None]).sum())
        count += tokens.shape[1] - 1
    return math.exp(total / count)
