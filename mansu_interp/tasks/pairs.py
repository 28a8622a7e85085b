"""Prompt pairs and sets of them: what losses, circuits and audits work on.

A `Pair` is a clean prompt, a corrupt prompt, the answer, the counterfactual answer and distractors
for a choice. Prompts of a task have equally many tokens; others are aligned (`alignment`). Answers
of one token are plain numbers. Longer ones are also held whole in `WholeAnswers`: accuracy and the
answers' losses take all their tokens, log p(answer) = sum over them; attribution, whose metrics
read one position, takes the *deciding token*, the first in which answer and counterfactual differ,
with what they share appended to both prompts.
"""

from __future__ import annotations

import html
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from jaxtyping import Bool, Int, Num, Shaped
from torch import Tensor

from ..errors import TaskError
from ..utils.ranges import check_kinds, entrance
from .alignment import align, take
from .answers import Tokens, WholeAnswers, clash

if TYPE_CHECKING:
    from ..models.language_model import LanguageModel

N_CHOICES = 4

Fact = tuple[str, str]
"""Relation and subject."""

Device = torch.device | str


_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff"
    "\uff00-\uff9f\U00020000-\U0003ffff]"
)
"""Letters and signs of scripts written without spaces: Thai, Lao, Burmese, Khmer, Chinese, Japanese
(not Korean)."""


def gap(prompt: str, answer: str) -> str:
    """What stands between a prompt and its answer: one space; nothing where either side of it is of
    a script that is written without."""
    return "" if _SPACELESS.match(answer) or _SPACELESS.match(prompt[-1:]) else " "


@dataclass(frozen=True)
class Pair:
    """One fact asked in one phrasing, with a corrupt prompt beside it."""

    clean: Tokens
    """Prompt tokens; the answer comes next."""
    corrupt: Tokens
    """The same phrasing about another subject; in tasks, as many tokens."""
    answer: int
    """First token of the answer; of several, the deciding one."""
    counterfactual: int
    """First token of the corrupt subject's answer."""
    distractors: Tokens
    """First tokens of other answers of the same type."""
    relation: str
    subject: str
    phrasing: str
    prompt: str
    """The clean prompt as text."""
    answer_text: str
    whole: WholeAnswers | None = None
    """The answers where one has several tokens; the fields above are then `WholeAnswers.deciding`,
    and the prompts end in what answer and counterfactual share."""

    def __repr__(self) -> str:
        return f"Pair({self.prompt!r} -> {self.answer_text!r}, {len(self.clean)} tokens)"

    def __post_init__(self) -> None:
        where = f"{self.relation} of {self.subject!r} in {self.phrasing!r}"
        if not self.clean or not self.corrupt:
            raise TaskError(
                f"{where}: the clean prompt has {len(self.clean)} tokens and the corrupt one "
                f"{len(self.corrupt)}. Give prompts of at least one."
            )
        if self.answer == self.counterfactual or self.answer in self.distractors:
            raise TaskError(
                f"{where}: the answer {self.answer_text!r} shares its first token with a "
                "distractor or the counterfactual answer. Give answers that differ at once."
            )

    @property
    def fact(self) -> Fact:
        """What is asked, in whatever phrasing."""
        return self.relation, self.subject

    @property
    def level(self) -> bool:
        """Whether both prompts have equally many tokens."""
        return len(self.clean) == len(self.corrupt)

    @property
    def aligned(self) -> Tokens:
        """The corrupt prompt's tokens that stand for the clean one's (see `align`)."""
        return tuple(self.corrupt[k] for k in align(self.clean, self.corrupt))

    @property
    def choices(self) -> Tokens:
        """The answer, then the distractors."""
        return (self.answer, *self.distractors)

    @property
    def question(self) -> Tokens:
        """The clean prompt without anything of the answer."""
        return self.clean[: len(self.clean) - self.whole.shared] if self.whole else self.clean

    @property
    def answers(self) -> tuple[Tokens, ...]:
        """All tokens of the answer, then of each distractor, as they follow the question."""
        if self.whole:
            return (self.whole.answer, *self.whole.distractors)
        return tuple((token,) for token in self.choices)

    @property
    def rival(self) -> Tokens:
        """All tokens of the counterfactual answer."""
        return self.whole.counterfactual if self.whole else (self.counterfactual,)

    @classmethod
    def build(cls, question: Tokens, corrupt: Tokens, whole: WholeAnswers, **labels: str) -> Pair:
        """A pair from prompts and answers of any length; ``whole`` is held only where one has
        several tokens.

        Arguments:
            question: the clean prompt.
            corrupt: the corrupt one.
            whole: the answers.
            labels: relation, subject, phrasing, prompt and answer_text.

        Raises:
            TaskError: an empty prompt, or an answer that begins another.
        """
        if any(clash(whole.answer, x) for x in (whole.counterfactual, *whole.distractors)):
            raise TaskError(
                f"{labels['relation']} of {labels['subject']!r}: the answer "
                f"{labels['answer_text']!r} and another one begin with each other. Give answers "
                "that differ in a token."
            )
        longest = max(map(len, (whole.answer, whole.counterfactual, *whole.distractors)))
        begun = whole.answer[: whole.shared]
        answer, counterfactual, *distractors = whole.deciding()
        return cls(
            question + begun,
            corrupt + begun,
            answer,
            counterfactual,
            tuple(distractors),
            **labels,
            whole=whole if longest > 1 else None,
        )

    def with_answers(self, whole: WholeAnswers) -> Pair:
        """The same prompts with other answers (see `build`)."""
        names = ("relation", "subject", "phrasing", "prompt", "answer_text")
        labels = {name: getattr(self, name) for name in names}
        cut = len(self.question)
        return Pair.build(self.clean[:cut], self.corrupt[:cut], whole, **labels)


@dataclass(frozen=True)
class Batch:
    """Pairs as right-padded tensors."""

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch corrupt_pos"]
    last: Int[Tensor, " batch"]
    """Index of the last real token of each clean prompt."""
    corrupt_last: Int[Tensor, " batch"]
    """The same of the corrupt ones."""
    answer: Int[Tensor, " batch"]
    counterfactual: Int[Tensor, " batch"]
    choices: Int[Tensor, "batch choice"]
    """The answer first, then the distractors; four in tasks."""
    of_clean: Int[Tensor, "batch pos"] | None = None
    """For each position of a clean prompt, which one of the corrupt prompt stands for it (see
    `align`); None: the same, since all pairs have as many tokens in both."""
    of_corrupt: Int[Tensor, "batch corrupt_pos"] | None = None
    """The other way round."""

    def as_clean(
        self, value: Shaped[Tensor, "batch corrupt_pos ..."]
    ) -> Shaped[Tensor, "batch pos ..."]:
        """What corrupt prompts have at each position, put where the clean ones have it."""
        return value if self.of_clean is None else take(value, self.of_clean)

    def as_corrupt(
        self, value: Shaped[Tensor, "batch pos ..."]
    ) -> Shaped[Tensor, "batch corrupt_pos ..."]:
        """The other way round."""
        return value if self.of_corrupt is None else take(value, self.of_corrupt)

    @property
    def changed(self) -> Bool[Tensor, "batch pos"]:
        """True at tokens of the clean prompts for which others stand in the corrupt ones."""
        return self.clean != self.as_clean(self.corrupt)

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens of the clean prompts, False at padding."""
        return torch.arange(self.clean.shape[1], device=self.last.device) <= self.last[:, None]

    def __len__(self) -> int:
        return len(self.last)


def pad_right(rows: Sequence[Tokens], device: Device) -> Int[Tensor, "batch pos"]:
    """Rows padded on the right with token 0 (causal attention never looks there)."""
    width = max(map(len, rows))
    return torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)


def collate(pairs: Sequence[Pair], device: Device = "cpu") -> Batch:
    """Stack pairs on a device, padding on the right.

    Raises:
        TaskError: some have more distractors than others.
    """
    if len(counts := {len(p.distractors) for p in pairs}) > 1:
        raise TaskError(
            f"Pairs with {min(counts)} and with {max(counts)} distractors: give all as many."
        )
    of_clean = of_corrupt = None
    if not all(p.level for p in pairs):
        of_clean = pad_right([align(p.clean, p.corrupt) for p in pairs], device)
        of_corrupt = pad_right([align(p.corrupt, p.clean) for p in pairs], device)
    return Batch(
        clean=pad_right([p.clean for p in pairs], device),
        corrupt=pad_right([p.corrupt for p in pairs], device),
        last=torch.tensor([len(p.clean) - 1 for p in pairs], device=device),
        corrupt_last=torch.tensor([len(p.corrupt) - 1 for p in pairs], device=device),
        answer=torch.tensor([p.answer for p in pairs], device=device),
        counterfactual=torch.tensor([p.counterfactual for p in pairs], device=device),
        choices=torch.tensor([p.choices for p in pairs], device=device),
        of_clean=of_clean,
        of_corrupt=of_corrupt,
    )


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

    def sums(self, values: Num[Tensor, " tokens"]) -> Num[Tensor, " batch"]:
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


def by_phrasing(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs grouped by relation and phrasing, in order of first appearance."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.relation, pair.phrasing), []).append(pair)
    return list(groups.values())


def answer_tokens(
    pairs: Sequence[Pair], device: Device = "cpu"
) -> dict[str, Int[Tensor, " answers"]]:
    """The different answers of each relation among some pairs, ascending."""
    answers: dict[str, set[int]] = {}
    for pair in pairs:
        answers.setdefault(pair.relation, set()).add(pair.answer)
    return {r: torch.tensor(sorted(tokens), device=device) for r, tokens in answers.items()}


def chunks(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Runs of at most ``size`` pairs of similar length."""
    ordered = sorted(pairs, key=lambda p: len(p.clean))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


@dataclass(frozen=True)
class PairSet(Sequence[Pair]):
    """Pairs under a name."""

    name: str
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        check_kinds(self, TaskError)
        if not self.pairs:
            raise TaskError(f"The set {self.name!r} is empty: no fact is left to ask about.")

    @classmethod
    @entrance(TaskError)
    def from_prompts(
        cls,
        model: LanguageModel,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[str],
        wrong: Sequence[str | Sequence[str]],
        *,
        name: str = "prompts",
    ) -> PairSet:
        """Pairs from texts; see `tasks.prompts.pairs_from_prompts`.

        Examples:
            >>> model = load_model("facts")
            >>> pairs = PairSet.from_prompts(
            ...     model,
            ...     clean=["the capital of france is"],
            ...     corrupt=["the capital of spain is"],
            ...     answers=["paris"],
            ...     wrong=["madrid"],
            ... )
        """
        from .data.prompts import pairs_from_prompts

        return pairs_from_prompts(model, clean, corrupt, answers, wrong, name=name)

    def __repr__(self) -> str:
        return f"PairSet({self.name!r}, {len(self):,} pairs, such as {self.pairs[0]!r})"

    def _repr_html_(self) -> str:
        cells = [(p.prompt, p.answer_text, p.relation) for p in self.pairs[:5]]
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells
        )
        return (
            f"<table><caption>{html.escape(self.name)}: {len(self):,} pairs</caption>"
            "<thead><tr><th>clean prompt</th><th>answer</th><th>relation</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Pair, ...]: ...

    def __getitem__(self, index: int | slice) -> Pair | tuple[Pair, ...]:
        return self.pairs[index]

    def parts(self, size: int) -> Iterator[list[Pair]]:
        """At most ``size`` pairs of similar length at a time, in a fixed order; a phrasing with
        pairs enough to fill a batch has its own, so that its prefix is computed once."""
        groups = by_phrasing(self.pairs)
        rest = [pair for group in groups if len(group) < size for pair in group]
        for group in [*(g for g in groups if len(g) >= size), rest]:
            yield from chunks(group, size)

    def batches(self, size: int, device: Device = "cpu") -> Iterator[Batch]:
        """The same as tensors on a device."""
        return (collate(part, device) for part in self.parts(size))

    def without(self, facts: Collection[Fact]) -> PairSet | None:
        """The pairs about other facts; None if there are none."""
        left = tuple(p for p in self.pairs if p.fact not in facts)
        return PairSet(self.name, left) if left else None

    @entrance(TaskError)
    def sample(self, n: int, seed: int) -> PairSet:
        """At most ``n`` pairs, drawn evenly over phrasings."""
        rng = random.Random(seed)
        queues = [rng.sample(g, len(g)) for g in by_phrasing(self.pairs)]
        rounds = [q[i] for i in range(max(map(len, queues))) for q in queues if i < len(q)]
        return PairSet(self.name, tuple(rounds[:n]))
