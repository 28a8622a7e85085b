"""What the leak test asks: one fact in one template, for one model's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.pairs import Tokens
from ...tasks.task import Fact
from .templates import Kind, Part, Scope


@dataclass(frozen=True)
class Question:
    """A fact, asked in other words."""

    name: str
    """What it is judged with: `Template.name`."""
    kind: Kind
    scope: Scope
    template: str
    """The template's text."""
    relation: str
    subject: str
    prompt: str
    tokens: Tokens
    """The prompt, with what begins every prompt of the task."""
    answer: str
    accepted: tuple[str, ...]
    """The answer's spellings, in all languages."""
    choices: Tokens
    """First tokens of the answer and of three rivals."""
    guess: float
    """Share of the relation's facts whose answer is the commonest, which one answer to all gets
    right."""
    chat: bool
    """Whether an assistant's turn is continued: a new line does not end it."""

    @property
    def fact(self) -> Fact:
        """What is asked."""
        return self.relation, self.subject


@dataclass(frozen=True)
class Questions:
    """All questions that a model can be asked."""

    items: tuple[Question, ...]
    left_out: dict[str, int]
    """Why questions, of those that were tried, could not be asked, and how many."""
    part: Part
    seed: int
