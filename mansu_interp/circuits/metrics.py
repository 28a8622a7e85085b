"""What is attributed: functions of the logits at the last position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CircuitError
from ..tasks.pairs import Batch

Logits = Float[Tensor, "batch vocab"]

Metric = Callable[[Logits, Batch, Logits], Float[Tensor, " batch"]]
"""metric(logits, batch, clean logits) -> one number a pair, at the last position."""


def logit_diff(logits: Logits, batch: Batch, clean: Logits) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the counterfactual answer (nats)."""
    rows = torch.arange(len(batch), device=logits.device)
    return logits[rows, batch.answer] - logits[rows, batch.counterfactual]


def log_prob(logits: Logits, batch: Batch, clean: Logits) -> Float[Tensor, " batch"]:
    """Log-probability of the answer's first token (nats)."""
    return logits.log_softmax(-1)[torch.arange(len(batch), device=logits.device), batch.answer]


def choice_margin(logits: Logits, batch: Batch, clean: Logits) -> Float[Tensor, " batch"]:
    """Logit of the answer minus the log-sum-exp over the distractors (nats)."""
    choices = logits.gather(1, batch.choices)
    return choices[:, 0] - choices[:, 1:].logsumexp(1)


def kl(logits: Logits, batch: Batch, clean: Logits) -> Float[Tensor, " batch"]:
    """-KL(clean run || this run) in nats: 0 at the clean run, lower elsewhere."""
    want = clean.log_softmax(-1)
    return -(want.exp() * (want - logits.log_softmax(-1))).sum(-1)


METRICS: dict[str, Metric] = {
    "logit_diff": logit_diff,
    "log_prob": log_prob,
    "choice_margin": choice_margin,
    "kl": kl,
}


def get_metric(metric: Metric | str) -> Metric:
    """A metric by name, or a function of one's own, which is checked whenever it is called.

    Raises:
        CircuitError: neither; later, if it does not return one number a pair.
    """
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    if not callable(metric):
        raise CircuitError(
            f"Unknown metric {metric!r:.80}; expected one of {', '.join(METRICS)}, or a function "
            "of (logits, batch, clean logits) -> one number a pair."
        )

    def checked(logits: Logits, batch: Batch, clean: Logits) -> Float[Tensor, " batch"]:
        value = metric(logits, batch, clean)
        if not isinstance(value, Tensor) or value.shape != (len(batch),):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CircuitError(
                f"The metric returned {shape} for {len(batch)} pairs, expected [{len(batch)}]: one "
                "number a pair, not their mean, or the scores would depend on the batch size."
            )
        return value

    return checked


def caveat(ends: Float[Tensor, "facts 4"], aligned: int = 0) -> str:
    """What to know of scores of a model that hardly does what is attributed; empty: nothing.

    The gap between clean and corrupt runs counts as seen if its 95 % interval, mean +- 1.96
    standard errors with the fact as the unit (pairs of one fact go together), lies above 0.

    Arguments:
        ends: sums over the pairs of each fact: clean metric, corrupt metric, pairs whose answer the
            model ranks first of all tokens, and pairs.
        aligned: pairs whose prompts have different numbers of tokens.
    """
    clean, corrupt, first, n = ends.sum(0).tolist()
    gap, facts, out = (clean - corrupt) / n, len(ends), []
    rest = ends[:, 0] - ends[:, 1] - gap * ends[:, 3]
    half = 1.96 * (float(rest.square().sum()) * facts / max(facts - 1, 1)) ** 0.5 / n
    if facts > 1 and gap <= half:
        out.append(
            f"the metric is {clean / n:.3g} on clean prompts and {corrupt / n:.3g} on corrupt "
            f"ones, {gap:.3g} ± {half:.2g} apart: no gap that these pairs can tell from none"
        )
    if first < n / 2:
        out.append(f"the model ranks the answer first on {first:.0f} of {n:.0f} pairs")
    if aligned:
        out.append(
            f"in {aligned} of {n:.0f} pairs the prompts have different numbers of tokens: they are "
            "aligned, and scores hold what the shift does as well"
        )
    return "; ".join(out)
