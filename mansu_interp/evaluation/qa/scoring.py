"""What a model predicts of answers, token by token, and what it answers by itself.

Numbers do not depend on what else is in a batch: answers are padded on the right, behind all that
is read, and only questions of one length are answered together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ModelError
from ...models.language_model import LanguageModel
from ...tasks.pairs import AnswerBatch, Tokens, pack_behind
from ..generate import BATCH, continuations
from .rows import Asked, Prompts

BATCH_TOKENS = 2048
"""Positions of a batch of answers, padding counted; all answers to one question are one batch."""
SLICE = 256
"""Positions whose probabilities are held at a time."""
TIMED = 4
"""Tokens that are generated to time the generation."""
SMALLEST_VARIANCE = 1e-6
"""Of log-probabilities, below which min-k++ divides by the root of this."""

OnStep = Callable[[int, int], object]


@dataclass(frozen=True)
class AnswerScores:
    """What a model predicts of the tokens of one answer."""

    logp: Float[Tensor, " tokens"]
    """Log-probability of each token, given all before it (nats)."""
    greedy: Bool[Tensor, " tokens"]
    """Whether it is the most probable one."""
    standing: Float[Tensor, " tokens"]
    """Its log-probability in standard deviations above the mean of all tokens', both weighted by
    probability: what min-k++ sorts."""
    ends: bool
    """Whether the last token ends the answer and is no part of it."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, the end included (nats)."""
        return -self.logp.mean().item()

    def inside(self) -> AnswerScores:
        """The same of the answer's own tokens, without the end."""
        own = slice(0, len(self.logp) - self.ends)
        return AnswerScores(self.logp[own], self.greedy[own], self.standing[own], False)


def token_scores(
    logits: Float[Tensor, "tokens vocab"], target: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-probability (nats), rank and standing of some tokens (see `AnswerScores`).

    With mu and sigma the mean and standard deviation of log p(v) over the vocabulary under p, the
    standing is (log p(target) - mu) / sigma (Zhang et al. 2024, arXiv 2404.02936, eq. 4).

    Raises:
        ModelError: a logit is NaN or infinite.
    """
    parts = []
    for one, right in zip(logits.split(SLICE), target.split(SLICE), strict=True):
        if not one.isfinite().all():
            raise ModelError(
                "The model's logits hold NaN or infinity, of which no metric can be computed. Give "
                "a checkpoint whose answers are finite."
            )
        logp = one.float().log_softmax(-1)
        p = logp.exp()
        mean = (p * logp).sum(-1)
        variance = ((p * logp.square()).sum(-1) - mean.square()).clamp(min=SMALLEST_VARIANCE)
        own = logp.gather(1, right[:, None])[:, 0]
        parts.append((own, logp.argmax(-1) == right, (own - mean) / variance.sqrt()))
    logp, greedy, standing = (torch.cat(part) for part in zip(*parts, strict=True))
    return logp, greedy, standing


def pack(asked: Sequence[Asked], device: torch.device) -> AnswerBatch:
    """Answers behind their questions, and where each of their tokens is predicted."""
    questions = [a.tokens[: a.begin] for a in asked]
    answers = [a.tokens[a.begin :] for a in asked]
    return pack_behind(questions, answers, device)


def _batches(groups: Sequence[Sequence[Asked]]) -> Iterator[list[int]]:
    """Numbers of groups that are computed together: a group of several answers by itself, since
    they share their question; single answers by length."""
    single = [k for k, group in enumerate(groups) if len(group) == 1]
    yield from ([k] for k, group in enumerate(groups) if len(group) > 1)
    batch: list[int] = []
    for k in sorted(single, key=lambda k: len(groups[k][0].tokens)):
        if batch and (len(batch) + 1) * len(groups[k][0].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


@torch.no_grad()
def score_answers(
    model: LanguageModel, groups: Sequence[Sequence[Asked]], on_step: OnStep | None = None
) -> list[list[AnswerScores]]:
    """Scores of answers.

    Arguments:
        model: of whose tokenizer the token ids are.
        groups: answers, those to one question in one group; each group not empty.
        on_step: called with (groups done, groups in all).

    Returns:
        As the groups, in their order.

    Raises:
        ModelError: a logit is NaN or infinite, or an answer exceeds the context.
    """
    out: list[list[AnswerScores]] = [[] for _ in groups]
    done = 0
    for batch in _batches(groups):
        flat = [(k, asked) for k in batch for asked in groups[k]]
        packed = pack([asked for _, asked in flat], model.device)
        logits = model.logits_at(packed.tokens, packed.row, packed.position)
        found = token_scores(logits, packed.target)
        sizes = packed.lengths.tolist()
        split = zip(*(part.cpu().split(sizes) for part in found), strict=True)
        for (k, asked), (logp, greedy, standing) in zip(flat, split, strict=True):
            out[k].append(AnswerScores(logp.double(), greedy, standing.double(), asked.ends))
        done += len(batch)
        if on_step:
            on_step(done, len(groups))
    return out


@torch.no_grad()
def greedy_answers(
    model: LanguageModel,
    prompts: Prompts,
    questions: Sequence[str],
    *,
    new_tokens: int,
    on_step: OnStep | None = None,
) -> list[str]:
    """What a model answers when it always takes the most probable token, as texts.

    Arguments:
        model: the one that ``prompts`` were made for, or a quantized copy.
        prompts: how it is asked.
        questions: what is asked.
        new_tokens: tokens of the longest answer; less where the context ends.
        on_step: called with (questions done, questions in all).

    Raises:
        ModelError: a logit is NaN or infinite.
    """
    asked = [prompts.question(text) for text in questions]
    last = prompts.tokenizer.eos_token_id
    ends = {token for token in (prompts.end, last) if isinstance(token, int)}
    written = continuations(model, asked, new_tokens, stops=ends, on_step=on_step)
    texts = (prompts.tokenizer.decode([*ids], skip_special_tokens=True) for ids in written)
    return [str(text).strip() for text in texts]


def score_seconds(model: LanguageModel, groups: Sequence[Sequence[Asked]]) -> float:
    """Seconds that `score_answers` takes, from its first batch and the positions of all."""
    batches = [[groups[k] for k in batch] for batch in _batches(groups)]
    sizes = [sum(map(len, b)) * max(len(a.tokens) for some in b for a in some) for b in batches]
    first = batches[0]
    score_answers(model, [first[0][:1]])  # the first pass warms up
    start = time.perf_counter()
    score_answers(model, first)
    return (time.perf_counter() - start) * sum(sizes) / sizes[0]


def answer_seconds(model: LanguageModel, asked: Sequence[Tokens], new_tokens: int) -> float:
    """Seconds that `greedy_answers` takes at most, from the first tokens of its largest batch.

    Arguments:
        asked: questions as token ids.
        new_tokens: tokens of the longest answer.
    """
    lengths = Counter(map(len, asked))
    batches = sum(-(-n // BATCH) for n in lengths.values())
    length = lengths.most_common(1)[0][0]
    some = [tokens for tokens in asked if len(tokens) == length][:BATCH]
    start = time.perf_counter()
    continuations(model, some, timed := min(TIMED, new_tokens))
    return (time.perf_counter() - start) / timed * new_tokens * batches
