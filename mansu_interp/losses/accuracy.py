"""Accuracy and perplexity of one model on one set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ModelError
from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet, by_phrasing, chunks, collate, pack_behind

BATCH = 32
WHOLE_BATCH = 8
"""Pairs scored at once where answers have several tokens."""


@dataclass(frozen=True)
class Accuracy:
    """Scores of one model on one pair set."""

    top1: float
    """Share of prompts whose greedy continuation is the answer: the pair's answer token, or all
    tokens of a `WholeAnswers` answer."""
    choice: float
    """Share of prompts on which the answer outranks its three distractors by log-probability (of
    `WholeAnswers` answers: summed over the tokens, per token if they say so); chance is 0.25."""
    last: float
    """Share of prompts on which all three distractors outrank the answer; chance is 0.25. An answer
    that is ranked last is given away as well."""
    n: int
    """Prompts."""
    first: tuple[bool, ...] = field(repr=False)
    """On which prompts the answer outranks its distractors, in the order of ``parts(BATCH)``."""
    predicted: tuple[bool, ...] = field(repr=False)
    """On which it is the greedy continuation, in the same order."""


def _first(options: Float[Tensor, "batch 4"]) -> Bool[Tensor, " batch"]:
    return options[:, 0] > options[:, 1:].amax(1)


def _last(options: Float[Tensor, "batch 4"]) -> Bool[Tensor, " batch"]:
    return options[:, 0] < options[:, 1:].amin(1)


def ranked_first(
    logits: Float[Tensor, "batch vocab"], choices: Int[Tensor, "batch 4"]
) -> Bool[Tensor, " batch"]:
    """Where the answer (the first choice) outranks its distractors; a tie counts against it."""
    return _first(logits.gather(1, choices))


def ranked_last(
    logits: Float[Tensor, "batch vocab"], choices: Int[Tensor, "batch 4"]
) -> Bool[Tensor, " batch"]:
    """Where every distractor outranks the answer (the first choice); a tie does not count."""
    return _last(logits.gather(1, choices))


def _options_of_whole(
    model: LanguageModel, pairs: Sequence[Pair]
) -> tuple[Bool[Tensor, " batch"], Float[Tensor, "batch 4"]]:
    """`_options` with every token of every answer.

    Greedy decoding gives the answer exactly if each of its tokens is the likeliest after those
    before it, so nothing need be generated.
    """
    scores, top1 = [], torch.empty(0)
    whole = [bool(p.whole and p.whole.normalise) for p in pairs]
    normalise = torch.tensor(whole, device=model.device)
    for k, answers in enumerate(zip(*(p.answers for p in pairs), strict=True)):
        packed = pack_behind([p.question for p in pairs], answers, model.device)
        logp = model.logits_at(packed.tokens, packed.row, packed.position).log_softmax(-1)
        if k == 0:
            top1 = packed.sums((logp.argmax(-1) == packed.target).long()) == packed.lengths
        total = packed.sums(logp.gather(1, packed.target[:, None])[:, 0])
        scores.append(torch.where(normalise, total / packed.lengths, total))
    return top1, torch.stack(scores, 1)


@torch.no_grad()
def _options(
    model: LanguageModel, pairs: Sequence[Pair]
) -> tuple[Bool[Tensor, " batch"], Float[Tensor, "batch 4"]]:
    """Per pair: whether the answer is what the model predicts, and the scores of the answer and its
    distractors, by which they rank.

    Raises:
        ModelError: the scores are no numbers; a model that ranks nothing would seem to have
            forgotten everything.
    """
    if any(p.whole for p in pairs):
        starts = range(0, len(pairs), WHOLE_BATCH)
        found = [_options_of_whole(model, pairs[i : i + WHOLE_BATCH]) for i in starts]
        top1, options = torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
    else:
        batch = collate(pairs, model.device)
        logits = model.last_logits(batch.clean, batch.last)
        top1, options = logits.argmax(-1) == batch.answer, logits.gather(1, batch.choices)
    if options.isnan().any():
        model.check_finite()
        raise ModelError(
            f"{model.name} gives NaN on {pairs[0].prompt!r:.200} or a prompt like it, though its "
            "weights are finite: its states overflow. Nothing can be said of such a model."
        )
    return top1, options


def right(
    model: LanguageModel, pairs: Sequence[Pair]
) -> tuple[Bool[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Per pair: is the answer what the model predicts, and does it outrank its distractors?

    A tie counts against the model.
    """
    top1, options = _options(model, pairs)
    return top1, _first(options)


def accuracy(model: LanguageModel, pairs: PairSet) -> Accuracy:
    """Top-1, and how often the answer ranks first and last of four."""
    n, last = len(pairs), 0
    first: list[bool] = []
    top1: list[bool] = []
    for part in pairs.parts(BATCH):
        predicted, options = _options(model, part)
        top1 += predicted.tolist()
        first += _first(options).tolist()
        last += int(_last(options).sum())
    return Accuracy(
        sum(top1) / n, sum(first) / n, last / n, n, first=tuple(first), predicted=tuple(top1)
    )


def choice_accuracy(model: LanguageModel, pairs: PairSet) -> float:
    """Four-way choice accuracy alone."""
    return accuracy(model, pairs).choice


def answered_correctly(
    model: LanguageModel, pairs: PairSet, on_part: Callable[[int, int], object] | None = None
) -> PairSet | None:
    """The pairs whose answer the model ranks above its distractors; None if there is none.
    ``on_part`` is called with (parts asked, parts in all) before each."""
    out: list[Pair] = []
    parts = [part for group in by_phrasing(pairs) for part in chunks(group, BATCH)]
    for k, part in enumerate(parts):
        if on_part:
            on_part(k, len(parts))
        _, chosen = right(model, part)
        out += [pair for pair, ok in zip(part, chosen.cpu(), strict=True) if ok]
    return PairSet(pairs.name, tuple(out)) if out else None


@torch.no_grad()
def perplexity(model: LanguageModel, text: Sequence[tuple[int, ...]], window: int = 128) -> float:
    """exp of the mean next-token loss over the first ``window`` tokens of each paragraph."""
    total, count = 0.0, 0
    for row in text:
        tokens = torch.tensor([row[:window]], device=model.device)
        logp = model.all_logits(tokens)[0, :-1].log_softmax(-1)
        total -= float(logp.gather(1, tokens[0, 1:, None]).sum())
        count += tokens.shape[1] - 1
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf
