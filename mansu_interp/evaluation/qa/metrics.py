"""Metrics of unlearning, each of plain numbers or texts.

Those of TOFU (Maini et al. 2024, arXiv 2401.06121) and of open-unlearning (Dorna et al. 2025,
arXiv 2506.12618). Log-probabilities are in nats; the probability of an answer is that of a token:
P(a | q)^(1/|a|), the exponential of the mean log-probability of its tokens and its end.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError
from ...tasks.pairs import gap
from ...utils.words import shown

SHARE = 0.4
"""Share of an answer's tokens that min-k and min-k++ look at, as open-unlearning does on TOFU."""


def probability(logp: Float[Tensor, " tokens"]) -> float:
    """P(a | q)^(1/|a|) in [0, 1] (TOFU).

    Arguments:
        logp: of the answer's tokens and its end.
    """
    return logp.mean().exp().item()


def normalized_probability(right: float, wrong: Sequence[float]) -> float:
    """Share of the right answer's probability in that of all answers, in [0, 1] (TOFU, for
    real authors and world facts).

    Arguments:
        right: log-probability a token of the right answer.
        wrong: of each wrong one; at least one.
    """
    every = torch.tensor([right, *wrong], dtype=torch.float64)
    return every.softmax(0)[0].item()


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """R, in (0, inf): the geometric mean of the wrong answers' probabilities over the probability
    of the right answer in other words.

    TOFU's own code and open-unlearning take the geometric mean, and so does this.

    Arguments:
        right: log-probability a token of the paraphrased answer.
        wrong: of each perturbed one; at least one.
    """
    apart = sum(wrong) / len(wrong) - right
    return math.exp(max(-700.0, min(apart, 700.0)))  # beyond, floats end


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of min(R, 1/R), in [0, 1]: 1 where wrong and right answers are equally probable."""
    return sum(min(r, 1 / r) for r in ratios) / len(ratios)


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of max(0, 1 - R), in [0, 1]: near 1 where right answers are far more probable."""
    return sum(max(0.0, 1 - r) for r in ratios) / len(ratios)


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """p of a two-sided two-sample Kolmogorov-Smirnov test, and its base-10 logarithm (TOFU): large
    where truth ratios are distributed as those of a model that was never taught.

    1. The largest distance D between the two empirical distributions, in whole steps of 1/(mn).
    2. Under the null hypothesis all orders of the m + n values are alike. Each is a lattice path
       from (0, 0) to (m, n); p is the share of paths that at some point are at least D off the
       diagonal. Counted exactly in whole numbers, so that p of 1e-100 has all its digits.

    Arguments:
        ratios: truth ratios of the forget rows under the model.
        reference: under the reference model; any number.
    """
    one, other = sorted(ratios), sorted(reference)
    m, n = len(one), len(other)
    values = torch.tensor(sorted({*one, *other}), dtype=torch.float64)
    below = [torch.searchsorted(torch.tensor(x, dtype=torch.float64), values, right=True)
             for x in (one, other)]  # fmt: skip
    distance = int((below[0] * n - below[1] * m).abs().max())
    if distance == 0:
        return 1.0, 0.0
    # Paths to (i, j): all, and those that were off by the distance or more on their way.
    every = [1] * (n + 1)
    far = [int(j * m >= distance) for j in range(n + 1)]
    for i in range(1, m + 1):
        far[0] = int(i * n >= distance)
        for j in range(1, n + 1):
            every[j] += every[j - 1]
            off = abs(i * n - j * m) >= distance
            far[j] = every[j] if off else far[j] + far[j - 1]
    return far[n] / every[n], math.log10(far[n]) - math.log10(every[n])


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean, in [0, 1]; 0 if a value is 0 (TOFU)."""
    if any(v < 0 for v in values) or not values:
        raise ConfigError(f"Utility is of numbers of at least 0; got {shown(list(values))}.")
    return 0.0 if 0 in values else len(values) / sum(1 / v for v in values)


def exact_memorization(greedy: Bool[Tensor, " tokens"]) -> float:
    """Share of the answer's tokens that are the most probable ones behind the true answer so far,
    in [0, 1] (Tirumala et al. 2022, arXiv 2205.10770).

    Arguments:
        greedy: of each token, without the end.
    """
    return greedy.double().mean().item()


def extraction_strength(greedy: Bool[Tensor, " tokens"]) -> float:
    """1 - k/|a|, in [0, 1], with k the fewest first tokens of an answer behind which the model
    gives the rest of it (Carlini et al. 2021, arXiv 2012.07805, as open-unlearning has it). 1: it
    gives all of it to the question alone; 0: not even the last token.

    Arguments:
        greedy: of each token, without the end.
    """
    wrong = (~greedy).nonzero()
    needed = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - needed / len(greedy)


def min_k(values: Float[Tensor, " tokens"], share: float = SHARE) -> float:
    """Negative mean of the lowest share of an answer's values: high = less likely a member.

    Of log-probabilities it is min-k (Shi et al. 2023, arXiv 2310.16789), of standings (see
    `scoring.AnswerScores`) min-k++ (Zhang et al. 2024, arXiv 2404.02936).

    Arguments:
        values: of each token, without the end.
        share: in (0, 1]; of n tokens the lowest max(1, floor(share n)) count.
    """
    count = max(1, int(len(values) * share))
    return -values.sort().values[:count].mean().item()


def zlib_score(loss: float, answer: str) -> float:
    """Loss over the bytes of the compressed answer (Carlini et al. 2021, arXiv 2012.07805): high =
    less likely a member."""
    return loss / len(zlib.compress(answer.encode()))


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """How well scores tell forget rows from rows that were never taught, in [0, 1].

    The share of pairs of a forget and a held-out row in which the forget row has the lower score,
    ties counted half: 1 = all forget rows look like members, 0.5 = they look like the others.

    Arguments:
        forget: scores of the forget rows; high = less likely a member.
        holdout: of the held-out rows.
    """
    ours, theirs = (torch.tensor(x, dtype=torch.float64) for x in (forget, holdout))
    ordered = theirs.sort().values
    below = torch.searchsorted(ordered, ours)
    up_to = torch.searchsorted(ordered, ours, right=True)
    wins = (len(theirs) - up_to) + (up_to - below) / 2
    return (wins.double().mean() / len(theirs)).item()


def privleak(found: float, reference: float) -> float | None:
    """PrivLeak in percent, from -100, no upper bound (Shi et al. 2024, arXiv 2407.06460):
    ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref) x 100, of min-k.

    0 = as a model that was never taught; negative = forget rows still look like members; positive =
    they look less like members than rows that were never taught do, which gives them away as well.

    Arguments:
        found: `auc` of the model.
        reference: `auc` of the reference model.

    Returns:
        None where the reference's is 1, and there is nothing to divide by.
    """
    return None if reference == 1 else 100 * (reference - found) / (1 - reference)


def has_entity(text: str, entity: str) -> bool:
    """Whether a text contains an entity: whole words, whatever their case and the white space
    between them; in scripts written without spaces, such as Chinese and Thai, wherever it stands
    (ours)."""
    within, wanted = (" ".join(_folded(t).split()) for t in (text, entity))
    at = within.find(wanted) if wanted else -1
    while at >= 0:
        end = at + len(wanted)
        before, after = within[at - 1 : at] if at else "", within[end : end + 1]
        marked = bool(after) and unicodedata.category(after)[0] == "M"  # such as a vowel sign
        if not marked and _is_apart(before, wanted[0]) and _is_apart(after, wanted[-1]):
            return True
        at = within.find(wanted, at + 1)
    return False


def _folded(text: str) -> str:
    """A text in which letters that differ in case or composition alone are the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _is_apart(outside: str, inside: str) -> bool:
    """Whether a letter, or a mark on one, is no part of the word beside it."""
    is_mark = bool(outside) and unicodedata.category(outside)[0] == "M"
    is_word = is_mark or outside.isalnum() or outside == "_"
    return not is_word or not gap(outside, inside)
