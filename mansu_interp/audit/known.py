"""What a model knows: only that can be forgotten, or retained.

A fact is asked in every phrasing that training sees, by four-way choice. It is

- *known*: right in more phrasings than a guess would be (one-sided binomial test, p <= `ALPHA`);
  where they are too few for that, what the model predicts outright in all of them;
- *unknown*: right in no more than a quarter of them, as a guess would be;
- *partly* known: between the two.

Phrasings of one fact share its rivals, so a model that knows nothing is right on a fact in all of
them or in none. Whether a model knows a *set* is therefore decided with the fact as the unit
(`p_of_guess`): how often would guesses be right on so many facts?

A single fact asks for more than its rank among four, which is right by chance one time in four in
every phrasing at once. `Asked` ranks the answer among all of its relation's (ours): from each score
is taken the mean of that answer's over all subjects of the phrasing, so that an answer that is
likely for all of them wins nothing, and the phrasings of a fact are averaged. A fact is *found* if
its answer is then in the highest twentieth, as one time in twenty by chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import TaskError
from ..losses.accuracy import right
from ..losses.gradients import passes
from ..models.language_model import LanguageModel
from ..tasks.pairs import N_CHOICES, Pair, answer_tokens
from ..tasks.task import Fact, Task

CHANCE = 1 / N_CHOICES
"""Share of answers that a guess ranks first of four, or last."""
ALPHA = 0.05
"""Probability by chance from which a test finds nothing."""
FEW = 3
"""Facts below which no number of right ones is beyond chance: their prompts are then counted."""
BATCH = 32
HIGHEST = 0.05
"""Share of a relation's answers among which a fact's own must be for it to be found."""
RARE = 0.001
"""Probability by chance of so many found facts, from which on they count: many looks are taken."""
LEFT_OUT = "the original does not know the fact"
"""Reason in `Task.dropped`."""


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """Probability of at least so many successes."""
    if successes <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    log, other = math.log(chance), math.log1p(-chance)
    terms = (
        math.exp(
            math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
            + k * log + (trials - k) * other
        )
        for k in range(successes, trials + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(terms))


def p_of_guess(share: float, facts: int, prompts: int, chance: float = CHANCE) -> float:
    """Probability that guesses are right on at least such a share of some prompts.

    The fact is the unit, and its share of right prompts counts towards the sum, rounded down: then
    the binomial bound holds however much the prompts of a fact depend on each other. Below `FEW`
    facts the prompt is the unit.

    Arguments:
        share: of the prompts that were right.
        facts: different facts among them.
        prompts: how many they are.
        chance: that a guess is right.
    """
    units = facts if facts >= FEW else prompts
    return binomial_tail(math.floor(share * units + 1e-9), units, chance)


def beyond_guesses(share: float, top1: float, facts: int, prompts: int) -> bool:
    """Whether a model answers some prompts better than guesses would (`p_of_guess`). Where so few
    that being right on all of them would not show it, it must predict each answer outright.

    Arguments:
        share: of the prompts on which the answer ranks first of four.
        top1: share on which it is what the model predicts.
        facts: different facts among the prompts.
        prompts: how many they are.
    """
    if p_of_guess(1.0, facts, prompts) > ALPHA:
        return top1 == 1
    return p_of_guess(share, facts, prompts) <= ALPHA


@dataclass(frozen=True)
class Known:
    """Which facts a model knows."""

    right: dict[Fact, int]
    """Phrasings in which the answer ranks first of four."""
    predicted: dict[Fact, int]
    """Phrasings in which it is what the model predicts."""
    asked: dict[Fact, int]
    """Of so many."""

    @classmethod
    def of(cls, model: LanguageModel, pairs: Sequence[Pair]) -> Known:
        """Ask a model for every pair."""
        first, top1, asked = Counter[Fact](), Counter[Fact](), Counter[Fact]()
        for part in passes(pairs, BATCH, model.d_model):
            predicted, chosen = (found.tolist() for found in right(model, part))
            for pair, p, c in zip(part, predicted, chosen, strict=True):
                asked[pair.fact] += 1
                top1[pair.fact] += bool(p)
                first[pair.fact] += bool(c)
        return cls({f: first[f] for f in asked}, {f: top1[f] for f in asked}, dict(asked))

    @property
    def share(self) -> float:
        """Four-way accuracy, every fact alike."""
        return sum(self.right[f] / n for f, n in self.asked.items()) / len(self.asked)

    @property
    def p(self) -> float:
        """Probability of such a share by guesses."""
        return p_of_guess(self.share, len(self.asked), sum(self.asked.values()))

    @property
    def beyond_guesses(self) -> bool:
        """Whether guesses would not do as well."""
        top1 = sum(self.predicted.values()) / sum(self.asked.values())
        return beyond_guesses(self.share, top1, len(self.asked), sum(self.asked.values()))

    @property
    def known(self) -> set[Fact]:
        """See the module."""
        return {
            f
            for f, n in self.asked.items()
            if beyond_guesses(self.right[f] / n, self.predicted[f] / n, 1, n)
        }

    @property
    def unknown(self) -> set[Fact]:
        """See the module."""
        return {f for f, n in self.asked.items() if self.right[f] <= CHANCE * n}

    def __str__(self) -> str:
        n, known, unknown = len(self.asked), len(self.known), len(self.unknown)
        return f"{known} of {n} facts known, {n - known - unknown} partly, {unknown} unknown"


def known_forget(model: LanguageModel, task: Task) -> tuple[Task, Known]:
    """The task without the forget facts that the original does not know, and what it knows.

    Only training phrasings are asked, so that the choice says nothing of the scored ones.

    Arguments:
        model: the original, before any edit.
        task: the task, tokenized for it.

    Raises:
        TaskError: it knows no more of them than a guess would: there is nothing to forget.
    """
    found = Known.of(model, task.forget)
    return without_unknown(model, task, found), found


def without_unknown(model: LanguageModel, task: Task, found: Known) -> Task:
    """The task without the forget facts that are unknown by what was found of all of them.

    Raises:
        TaskError: see `check_known`.
    """
    check_known(model, task, "forget", found)
    return task.without(found.unknown, LEFT_OUT)


def check_known(model: LanguageModel, task: Task, role: str, found: Known) -> None:
    """Raise TaskError where a model knows no more of a task's facts than a guess would.

    Raises:
        TaskError: it does not.
    """
    if found.beyond_guesses:
        return
    what = {"forget": "forgotten", "retain": "retained"}[role]
    raise TaskError(
        f"{model.name} does not know what task {task.name!r} is to {role}: four-way accuracy "
        f"{found.share:.3f} on {len(found.asked)} facts, and guesses do as well with p = "
        f"{found.p:.2g} (at most {ALPHA} is needed). What was not known cannot be {what}: give "
        "facts that the model knows, with their right answers, or another model."
    )


@dataclass(frozen=True)
class FactRanks:
    """Where some scores rank the answers of some facts, a number each."""

    first: Float[Tensor, " facts"]
    """Share of the fact's prompts on which the answer ranks first of four."""
    last: Float[Tensor, " facts"]
    """And last."""
    found: Bool[Tensor, " facts"]
    """Whether it is in the highest twentieth of its relation's (see the module)."""


class Asked:
    """Prompts about some facts, and what a guess finds of them.

    Arguments:
        pairs: the prompts; the answers of a relation are those that they ask for.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.facts = list(dict.fromkeys(p.fact for p in pairs))
        number = {fact: k for k, fact in enumerate(self.facts)}
        self.owner: Int[Tensor, " prompts"] = torch.tensor([number[p.fact] for p in pairs])
        self.tokens: Int[Tensor, " tokens"] = torch.tensor(
            sorted({token for p in pairs for token in p.choices})
        )
        self.answers = answer_tokens(pairs)
        own = {p.fact: p.answer for p in pairs}
        sizes = [len(self.answers[relation]) for relation, _ in self.facts]
        self.chance = torch.tensor([self._high(n) / n for n in sizes])
        """Of each fact: that a guess finds it."""
        commonest = Counter((f[0], a) for f, a in own.items())
        share = {
            r: max(n for (other, _), n in commonest.items() if other == r)
            / sum(n for (other, _), n in commonest.items() if other == r)
            for r in self.answers
        }
        self.guess = torch.tensor([share[relation] for relation, _ in self.facts])
        """Of each fact: share of its relation's facts whose answer is the commonest, which one
        answer to all of them gets right."""

    @staticmethod
    def _high(n: int) -> int:
        return max(1, int(HIGHEST * n))

    def by_fact(self, values: Bool[Tensor, " prompts"]) -> Float[Tensor, " facts"]:
        """The mean over each fact's prompts."""
        total = torch.zeros(len(self.facts)).index_add(0, self.owner, values.float())
        return total / self.owner.bincount()

    def ranks(self, scores: Float[Tensor, "prompts tokens"]) -> FactRanks:
        """Where scores of ``tokens`` rank the answers."""
        choices = torch.searchsorted(self.tokens, torch.tensor([p.choices for p in self.pairs]))
        four = scores.gather(1, choices)
        return FactRanks(
            first=self.by_fact(four[:, 0] > four[:, 1:].amax(1)),
            last=self.by_fact(four[:, 0] < four[:, 1:].amin(1)),
            found=self._found(scores),
        )

    def _found(self, scores: Float[Tensor, "prompts tokens"]) -> Bool[Tensor, " facts"]:
        found = torch.zeros(len(self.facts), dtype=torch.bool)
        for relation, tokens in self.answers.items():
            columns = torch.searchsorted(self.tokens, tokens)
            total = torch.zeros(len(self.facts), len(tokens))
            for phrasing in {p.phrasing for p in self.pairs if p.relation == relation}:
                at = torch.tensor(
                    [
                        k
                        for k, p in enumerate(self.pairs)
                        if (p.relation, p.phrasing) == (relation, phrasing)
                    ]
                )
                above = scores[at][:, columns] - scores[at][:, columns].mean(0)
                above = above - above.mean(1, keepdim=True)
                above = above / (above.std(1, keepdim=True, correction=0) + 1e-6)
                total.index_add_(0, self.owner[at], above)
            own = {p.fact: p.answer for p in self.pairs if p.relation == relation}
            for k, fact in enumerate(self.facts):
                if fact in own:
                    mine = total[k, int((tokens == own[fact]).nonzero())]
                    found[k] = int((total[k] >= mine).sum()) <= self._high(len(tokens))
        return found


def beyond_chance(
    hits: Bool[Tensor, " facts"], chance: Float[Tensor, " facts"], rare: float = RARE
) -> float:
    """Which share of facts was found beyond guesses: 0 where guesses find as many, 1 where all are.

    Arguments:
        hits: which were found.
        chance: of each, that a guess finds it.
        rare: 0 is returned unless guesses find so many with at most this probability.
    """
    count, mean = int(hits.sum()), float(chance.mean())
    if mean >= 1 or binomial_tail(count, len(hits), mean) > rare:
        return 0.0
    return max(0.0, (count / len(hits) - mean) / (1 - mean))
