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
from .tasks import Pair, PairSet, collate

TARGET_PROMPTS = 32
"""Corrupt prompts averaged per phrasing."""


class CounterfactualTargets:
    """Per phrasing, the original model's mean next-token distribution over corrupt prompts."""

    def __init__(self, model: LanguageModel, pairs: PairSet, seed: int = 0) -> None:
        groups: dict[str, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(f"{pair.relation}|{pair.phrasing}", []).append(pair)
        self.by_phrasing: dict[str, Float[Tensor, " vocab"]] = {}
        for key, group in groups.items():
            few = PairSet(key, tuple(group)).sample(TARGET_PROMPTS, seed)
            with torch.no_grad():
                probabilities = [
                    model.last_logits(b.corrupt, b.last).softmax(-1) for b in few.batches(32)
                ]
            self.by_phrasing[key] = torch.cat(probabilities).mean(0)

    def __call__(self, pairs: Sequence[Pair]) -> Float[Tensor, "batch vocab"]:
        """Target distribution of each pair."""
        return torch.stack([self.by_phrasing[f"{p.relation}|{p.phrasing}"] for p in pairs])


def counterfactual_loss(
    model: LanguageModel,
    pairs: Sequence[Pair],
    targets: CounterfactualTargets,
    push: float = 0.0,
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """KL(target || model) in nats, plus ``push`` x how far the answer is above its target.

    The KL alone hardly notices one capital among hundreds; the hinge
    max(0, log p(answer) - log target(answer) + margin) is what removes the ranking.
    """
    batch, target = collate(pairs), targets(pairs)
    logp = model.last_logits(batch.clean, batch.last).log_softmax(-1)
    log_target = target.clamp_min(1e-9).log()
    loss = (target * (log_target - logp)).sum(-1)
    if push:
        at = batch.answer[:, None]
        excess = (logp.gather(1, at) - log_target.gather(1, at))[:, 0]
        loss = loss + push * (excess + margin).relu()
    return loss.mean()


def ascent_loss(model: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
    """Gradient ascent: the mean log-probability of the answer (nats), to be minimised."""
    batch = collate(pairs)
    logp = model.last_logits(batch.clean, batch.last).log_softmax(-1)
    return logp.gather(1, batch.answer[:, None]).mean()


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
    total = {n: torch.zeros_like(model.weights[n]) for n in names}
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        loss = gradient(
            model, names, lambda p=part: counterfactual_loss(model, p, targets, push=1.0) * len(p)
        )
        for name, g in zip(names, loss, strict=True):
            total[name] += g
    return {n: t / len(pairs) for n, t in total.items()}
