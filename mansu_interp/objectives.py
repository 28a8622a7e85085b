"""What "forget" and "retain" mean as losses.

``counterfactual`` (ours) pulls the output on the clean prompt to the model's own average output
over the corrupt prompts of the same phrasing: what a model that never knew would say. ``ga`` is
gradient ascent, the paper's family.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .models import LanguageModel
from .nullspace import Weights, gradient
from .pairs import Laid, Pair, PairSet, answer_tokens, by_phrasing, chunks, collate, lay_answers

TARGET_PROMPTS = 32
"""Corrupt prompts averaged per phrasing."""


class CounterfactualTargets:
    """Per phrasing, the original model's mean next-token distribution over corrupt prompts."""

    def __init__(self, model: LanguageModel, pairs: PairSet, seed: int = 0) -> None:
        self.by_phrasing: dict[tuple[str, str], Float[Tensor, " vocab"]] = {}
        for group in by_phrasing(pairs):
            first = group[0]
            few = PairSet(first.relation, tuple(group)).sample(TARGET_PROMPTS, seed)
            with torch.no_grad():
                probabilities = [
                    model.last_logits(b.corrupt, b.last).softmax(-1) for b in few.batches(32)
                ]
            self.by_phrasing[first.relation, first.phrasing] = torch.cat(probabilities).mean(0)
        self.answers = answer_tokens(pairs)

    def __call__(self, pair: Pair) -> Float[Tensor, " vocab"]:
        """Target distribution of a pair's phrasing."""
        return self.by_phrasing[pair.relation, pair.phrasing]


def log_probs(model: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities (nats) of the token that follows each clean prompt: of an answer of several
    tokens, the deciding one."""
    batch = collate(pairs)
    return model.last_logits(batch.clean, batch.last).log_softmax(-1)


def counterfactual_loss(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    push: float = 0.0,
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """KL(target || model) in nats, plus ``push`` x how far the answer is from its target.

    The KL alone hardly notices one capital among hundreds; |log p(answer) - log target(answer) +
    margin| is what removes the ranking, and keeps the answer from being avoided, which would give
    it away as well. Its probabilities are taken among the relation's answers alone: the answer is
    to lose to its rivals, not to words of another kind, which would unlearn the whole kind of
    question.
    """
    logp = log_probs(model, pairs)
    log_target = torch.stack([targets(p) for p in pairs]).clamp_min(1e-9).log()
    loss = (log_target.exp() * (log_target - logp)).sum(-1)
    if push:
        excess = []
        for row, want, pair in zip(logp, log_target, pairs, strict=True):
            among = targets.answers[pair.relation]
            excess.append(
                (row[pair.answer] - row[among].logsumexp(0))
                - (want[pair.answer] - want[among].logsumexp(0))
            )
        loss = loss + push * (torch.stack(excess) + margin).abs()
    return loss.mean()


def token_nll(model: LanguageModel, laid: Laid) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of every token of some answers (nats), given those before it."""
    logp = model.logits_at(laid.tokens, laid.row, laid.at).log_softmax(-1)
    return -logp.gather(1, laid.want[:, None])[:, 0]


def nll(model: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each pair's answer (nats), summed over its tokens."""
    laid = lay_answers(pairs)
    return laid.sums(token_nll(model, laid))


def divergence(
    student: Float[Tensor, "... vocab"], teacher: Float[Tensor, "... vocab"]
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats, from logits."""
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum(-1).mean()


def forget_gradient(
    model: LanguageModel, names: Sequence[str], pairs: PairSet, batch_size: int = 16
) -> Weights:
    """Gradient of the counterfactual loss, averaged over some pairs."""
    targets = CounterfactualTargets(model, pairs)
    total = gradient(
        model,
        names,
        [
            lambda p=part: counterfactual_loss(model, p, targets, push=1.0) * (len(p) / len(pairs))
            for group in by_phrasing(pairs)
            for part in chunks(group, batch_size)
        ],
    )
    return dict(zip(names, total, strict=True))


def answer_gradient(
    model: LanguageModel, names: Sequence[str], pairs: PairSet, batch_size: int = 16
) -> Weights:
    """Gradient of the answers' negative log-likelihood, averaged over some pairs."""
    parts = [part for group in by_phrasing(pairs) for part in chunks(group, batch_size)]
    losses = [lambda p=part: nll(model, p).sum() / len(pairs) for part in parts]
    return dict(zip(names, gradient(model, names, losses), strict=True))
