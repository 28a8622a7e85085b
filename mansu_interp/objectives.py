"""What "forget" and "retain" mean as losses.

``counterfactual`` (ours) pulls the output on the clean prompt to what a model that never knew would
say: the model's own average output over corrupt prompts of the same phrasing, in which every answer
has the share that its frequency gives it. ``ga`` is gradient ascent, the paper's family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .models import LanguageModel
from .nullspace import Weights, gradient
from .pairs import Laid, Pair, PairSet, answer_tokens, by_phrasing, chunks, collate, lay_answers

TARGET_PROMPTS = 32
"""Corrupt prompts averaged per phrasing."""


class CounterfactualTargets:
    """Per phrasing, what a model that never knew would say, as next-token probabilities.

    The original model's mean output over some corrupt prompts says how much goes to the phrasing's
    answers together, and to everything else. Among the answers the share is their frequency: a
    model that knows its facts gives nearly all to the answers of the very subjects that were
    averaged, and to lie far below those gives an answer away as surely as to be first (ours).
    """

    def __init__(self, model: LanguageModel, pairs: PairSet, seed: int = 0) -> None:
        self.by_phrasing: dict[tuple[str, str], Float[Tensor, " vocab"]] = {}
        for group in by_phrasing(pairs):
            first = group[0]
            few = PairSet(first.relation, tuple(group)).sample(TARGET_PROMPTS, seed)
            with torch.no_grad():
                probabilities = [
                    model.last_logits(b.corrupt, b.last).softmax(-1)
                    for b in few.batches(32, model.device)
                ]
            mean = torch.cat(probabilities).mean(0)
            given = torch.tensor([p.answer for p in group], device=model.device)
            answers, counts = given.unique(return_counts=True)
            mean[answers] = mean[answers].sum() * (counts / len(group))
            self.by_phrasing[first.relation, first.phrasing] = mean
        self.answers = answer_tokens(pairs, model.device)

    def __call__(self, pair: Pair) -> Float[Tensor, " vocab"]:
        """Target distribution of a pair's phrasing."""
        return self.by_phrasing[pair.relation, pair.phrasing]

    def log(self, pairs: Sequence[Pair]) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities (nats) of some pairs' targets."""
        return torch.stack([self(p) for p in pairs]).clamp_min(1e-9).log()


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
    places, found = [], []
    for relation in dict.fromkeys(p.relation for p in pairs):
        at = [k for k, p in enumerate(pairs) if p.relation == relation]
        some = rows if len(at) == len(rows) else rows[at]
        own = torch.tensor([pairs[k].answer for k in at], device=rows.device)[:, None]
        found.append(some.gather(1, own)[:, 0] - level(some[:, answers[relation]]))
        places += at
    if len(found) == 1:
        return found[0]
    return torch.cat(found)[torch.tensor(places, device=rows.device).argsort()]


def excess(
    logp: Float[Tensor, "batch vocab"],
    log_target: Float[Tensor, "batch vocab"],
    pairs: Sequence[Pair],
    answers: dict[str, Int[Tensor, " answers"]],
) -> Float[Tensor, " batch"]:
    """By how many nats each pair's answer stands too high among its relation's ``answers``.

    log p(answer) minus the mean of log p over the answers, less the same of the target. The mean,
    not the log of the summed probability: where the answers differ among themselves, one that is
    level with the sum outranks most of them.
    """

    said, wanted = (
        above_rivals(rows, pairs, answers, lambda some: some.mean(1)) for rows in (logp, log_target)
    )
    return said - wanted


def model_excess(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    answers: dict[str, Int[Tensor, " answers"]] | None = None,
) -> Float[Tensor, " batch"]:
    """`excess` of each pair's answer in a model, among ``answers`` (default: the targets')."""
    among = targets.answers if answers is None else answers
    return excess(log_probs(model, pairs), targets.log(pairs), pairs, among)


def counterfactual_loss(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    push: float = 0.0,
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """KL(target || model) in nats, plus ``push`` x |`excess` + margin|.

    The KL alone hardly notices one capital among hundreds; the push is what removes the ranking,
    and keeps the answer from being avoided, which would give it away as well. It sees the
    relation's answers alone: the answer is to lose to its rivals, not to words of another kind,
    which would unlearn the whole kind of question.
    """
    logp, log_target = log_probs(model, pairs), targets.log(pairs)
    loss = (log_target.exp() * (log_target - logp)).sum(-1)
    if push:
        loss = loss + push * (excess(logp, log_target, pairs, targets.answers) + margin).abs()
    return loss.mean()


def token_nll(model: LanguageModel, laid: Laid) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of every token of some answers (nats), given those before it."""
    logp = model.logits_at(laid.tokens, laid.row, laid.at).log_softmax(-1)
    return -logp.gather(1, laid.want[:, None])[:, 0]


def nll(model: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each pair's answer (nats), summed over its tokens."""
    laid = lay_answers(pairs, model.device)
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
