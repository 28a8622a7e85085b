"""Whole answers packed behind their prompts, for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .pairs import Device, Pair, Tokens, pad_right


@dataclass(frozen=True)
class AnswerBatch:
    """Answers packed behind their prompts, and where each of their tokens is predicted."""

    tokens: Int[Tensor, "batch pos"]
    row: Int[Tensor, " tokens"]
    """Whose answer each token is of."""
    position: Int[Tensor, " tokens"]
    """The position that predicts it."""
    target: Int[Tensor, " tokens"]
    """The token itself."""

    def sums(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " batch"]:
        """Sums over each answer's tokens."""
        return values.new_zeros(len(self.tokens)).index_add(0, self.row, values)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each answer."""
        return torch.bincount(self.row)


def pack_behind(
    questions: Sequence[Tokens], answers: Sequence[Tokens], device: Device = "cpu"
) -> AnswerBatch:
    """Pack answers behind questions, for all tokens of each answer in one forward pass."""
    each = list(zip(questions, answers, strict=True))
    return AnswerBatch(
        pad_right([q + a[:-1] for q, a in each], device),
        torch.tensor([k for k, (_, a) in enumerate(each) for _ in a], device=device),
        torch.tensor([len(q) - 1 + j for q, a in each for j in range(len(a))], device=device),
        torch.tensor([token for a in answers for token in a], device=device),
    )


def pack_answers(pairs: Sequence[Pair], device: Device = "cpu") -> AnswerBatch:
    """Each pair's own answer behind its question."""
    return pack_behind([p.question for p in pairs], [p.answers[0] for p in pairs], device)
