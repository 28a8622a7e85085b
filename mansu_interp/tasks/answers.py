"""Answers of several tokens."""

from __future__ import annotations

from dataclasses import dataclass

Tokens = tuple[int, ...]


def clash(one: Tokens, other: Tokens) -> bool:
    """Whether one answer is the beginning of the other (or both are the same)."""
    return one[: len(other)] == other[: len(one)]


@dataclass(frozen=True)
class WholeAnswers:
    """Answers of several tokens, as each follows the prompt."""

    answer: Tokens
    counterfactual: Tokens
    distractors: tuple[Tokens, ...]
    normalise: bool = False
    """Whether choices are compared by log-probability per token instead of by its sum."""

    @property
    def shared(self) -> int:
        """How many tokens answer and counterfactual begin alike with."""
        both = zip(self.answer, self.counterfactual, strict=False)
        return next((k for k, (a, c) in enumerate(both) if a != c), 0)

    def deciding(self) -> Tokens:
        """The answer's deciding token, the counterfactual's, and one for each distractor: its own
        where it gets so far and differs there, otherwise the counterfactual's."""
        at = self.shared
        answer, counterfactual = self.answer[at], self.counterfactual[at]
        own = dict.fromkeys(
            d[at]
            for d in self.distractors
            if d[:at] == self.answer[:at] and len(d) > at and d[at] != answer
        )
        rivals = [*own, *[counterfactual] * len(self.distractors)][: len(self.distractors)]
        return (answer, counterfactual, *rivals)
