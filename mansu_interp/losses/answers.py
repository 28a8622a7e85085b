"""What models predict of answers: log-probabilities, likelihoods, levels, divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.language_model import LanguageModel
from ..tasks.pairs import (
    AnswerBatch,
    Pair,
    PairSet,
    Tokens,
    by_phrasing,
    chunks,
    collate,
    pack_answers,
    pad_right,
)
from .gradients import Weights, gradient


def log_probs(model: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities (nats) of the token that follows each clean prompt: of an answer of several
    tokens, the deciding one."""
    batch = collate(pairs, model.device)
    return model.last_logits(batch.clean, batch.last).log_softmax(-1)


def above_rivals(
    rows: Float[Tensor, "batch vocab"],
    pairs: Sequence[Pair],
    answers: dict[str, Int[Tensor, " answers"]],
    level: Callable[[Float[Tensor, "some answers"]], Float[Tensor, " some"]],
) -> Float[Tensor, " batch"]:
    """In each pair's row, the value of its answer minus the ``level`` of its relation's answers."""
    order, found = [], []
    for relation in dict.fromkeys(p.relation for p in pairs):
        at = [k for k, p in enumerate(pairs) if p.relation == relation]
        some = rows if len(at) == len(rows) else rows[at]
        own = torch.tensor([pairs[k].answer for k in at], device=rows.device)[:, None]
        found.append(some.gather(1, own)[:, 0] - level(some[:, answers[relation]]))
        order += at
    if len(found) == 1:
        return found[0]
    return torch.cat(found)[torch.tensor(order, device=rows.device).argsort()]


def token_nll(model: LanguageModel, packed: AnswerBatch) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of every token of some answers (nats), given those before it."""
    logp = model.logits_at(packed.tokens, packed.row, packed.position).log_softmax(-1)
    return -logp.gather(1, packed.target[:, None])[:, 0]


def nll(model: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each pair's answer (nats), summed over its tokens."""
    packed = pack_answers(pairs, model.device)
    return packed.sums(token_nll(model, packed))


def row_logits(model: LanguageModel, rows: Sequence[Tokens]) -> Float[Tensor, "tokens vocab"]:
    """Next-token logits behind every token of some rows, row after row."""
    tokens = pad_right(rows, model.device)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    there = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return model.all_logits(tokens)[there]


def divergence(
    student: Float[Tensor, "... vocab"], teacher: Float[Tensor, "... vocab"]
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats, from logits."""
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum(-1).mean()


def answer_gradient(
    model: LanguageModel, names: Sequence[str], *sets: PairSet, batch_size: int = 16
) -> Weights:
    """Gradient of the answers' negative log-likelihood, averaged over the pairs of a set, summed
    over the sets."""

    def loss(part: list[Pair], n: int) -> Float[Tensor, ""]:
        return nll(model, part).sum() / n

    losses = [
        partial(loss, part, len(pairs))
        for pairs in sets
        for group in by_phrasing(pairs)
        for part in chunks(group, batch_size)
    ]
    return dict(zip(names, gradient(model, names, losses), strict=True))
