"""What "forget" and "retain" mean as losses.

``counterfactual`` (ours) pulls the output on the clean prompt to what a model that was never taught
the facts would predict: the model's own average output over corrupt prompts of the same phrasing,
in which every answer has the share that its frequency gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.language_model import LanguageModel
from ..tasks.pairs import Pair, PairSet, answer_tokens, by_phrasing, chunks
from .answers import above_rivals, log_probs
from .gradients import Elements, Weights, gradient

TARGET_PROMPTS = 32
"""Corrupt prompts averaged per phrasing."""


class CounterfactualTargets:
    """Per phrasing, what a model that was never taught the facts would predict, as next-token
    probabilities (ours).

    The original model's mean output over some corrupt prompts tells how much goes to the phrasing's
    answers together, and to everything else. Among the answers the share is their frequency: a
    model that knows its facts gives nearly all to the answers of the very subjects that were
    averaged, and an answer far below those is given away as surely as one that ranks first.
    """

    def __init__(self, model: LanguageModel, pairs: PairSet, seed: int = 0) -> None:
        self.by_phrasing: dict[tuple[str, str], Float[Tensor, " vocab"]] = {}
        for group in by_phrasing(pairs):
            first = group[0]
            few = PairSet(first.relation, tuple(group)).sample(TARGET_PROMPTS, seed)
            with torch.no_grad():
                probabilities = [
                    model.last_logits(b.corrupt, b.corrupt_last).softmax(-1)
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


def answer_excess(
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

    predicted, wanted = (
        above_rivals(rows, pairs, answers, lambda some: some.mean(1)) for rows in (logp, log_target)
    )
    return predicted - wanted


def model_answer_excess(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    answers: dict[str, Int[Tensor, " answers"]] | None = None,
) -> Float[Tensor, " batch"]:
    """`answer_excess` of each pair's answer in a model.

    Arguments:
        model: whose predictions count.
        pairs: what is asked.
        targets: what it should predict.
        answers: tokens that an answer ranks among, by relation; default: those of the targets.
    """
    among = targets.answers if answers is None else answers
    return answer_excess(log_probs(model, pairs), targets.log(pairs), pairs, among)


def counterfactual_loss(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    ranking_weight: float = 0.0,
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """KL(target || model) in nats, plus ``ranking_weight`` x |`answer_excess` + margin|.

    The KL alone hardly notices one capital among hundreds; the second term is what removes the
    ranking, and what prevents that the answer is ranked last, which would give it away as well. It
    sees the relation's answers alone: the answer is to lose to its rivals, not to words of another
    kind, which would unlearn the whole kind of question.
    """
    logp, log_target = log_probs(model, pairs), targets.log(pairs)
    loss = (log_target.exp() * (log_target - logp)).sum(-1)
    if ranking_weight:
        loss = (
            loss
            + ranking_weight
            * (answer_excess(logp, log_target, pairs, targets.answers) + margin).abs()
        )
    return loss.mean()


def forget_gradient(
    model: LanguageModel, of: Elements, pairs: PairSet, batch_size: int = 16
) -> Weights:
    """Gradient of the counterfactual loss, averaged over some pairs, with respect to some weights
    or positions in them, as in `gradient`."""
    targets = CounterfactualTargets(model, pairs)
    total = gradient(
        model,
        of,
        [
            lambda p=part: (
                counterfactual_loss(model, p, targets, ranking_weight=1.0) * (len(p) / len(pairs))
            )
            for group in by_phrasing(pairs)
            for part in chunks(group, batch_size)
        ],
    )
    return dict(zip(of, total, strict=True))
