"""A model asked the questions of the leak test."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...losses.accuracy import ranked_first, ranked_last
from ...models.language_model import LanguageModel
from ...tasks.pairs import Tokens
from ...utils.words import mentions
from ..generate import batches, continuations
from .asking import LENGTH
from .question import Question

SAMPLES = 8
"""Continuations that are drawn of each sampled prompt."""
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """What a model made of one question."""

    rank: int | None
    """Of the answer among itself and three rivals, 1 to 4: 1 outranks all, 4 is outranked by all;
    None: not asked by rank."""
    written: float | None
    """Share of its continuations that hold the answer; None: not asked to write."""
    text: str
    """The continuation, of several the first that holds the answer, else the first; empty: not
    asked to write."""

    @property
    def first(self) -> bool | None:
        """Whether the answer outranks three rivals; None: not asked by rank."""
        return None if self.rank is None else self.rank == 1

    @property
    def last(self) -> bool:
        """Whether all three outrank it."""
        return self.rank == 4

    @property
    def given(self) -> bool:
        """Whether the answer ranks first, or is written at all."""
        return bool(self.first or self.written)

    def __str__(self) -> str:
        rank = [] if self.rank is None else [f"rank {self.rank}"]
        draws = [] if self.rank or self.written is None else [f"{self.written:.2f} of draws"]
        text = [] if self.written is None else [f'"{" ".join(self.text.split())}"']
        return ", ".join([*rank, *draws, *text])


@dataclass(frozen=True)
class Answers:
    """What a model made of all questions, in their order."""

    of: tuple[Answer, ...]


def ask(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Answers:
    """Ask a model.

    - Ranks are those of `accuracy`, by the first token: the answer's against three rivals'.
    - Text is the greedy continuation of at most `LENGTH` tokens, up to the end of the turn, or of
      the line outside a chat; or `SAMPLES` continuations drawn at temperature 1.

    Arguments:
        model: who is asked.
        questions: made for its tokenizer.
        seed: of the draws.
        on_step: called with (what, answers done, in all); a sampled question has `SAMPLES`.

    Raises:
        ModelError: its logits are no numbers.
    """
    found: dict[int, Answer] = {}
    base, total = 0, sum(_answers(q.kind) for q in questions)
    for (chat, how), places in _groups(questions).items():

        def note(done: int, _: int, base: int = base) -> None:
            if on_step:
                on_step("leak answers", base + done, total)

        asked = [questions[k] for k in places]
        stops = _stops(model, chat)
        if how == "sampling":
            made = _sampled(model, asked, stops, seed, note)
        else:
            made = _greedy(model, asked, stops, 0 if how == "choice" else LENGTH, note)
        found |= dict(zip(places, made, strict=True))
        base += _answers(how) * len(places)
    return Answers(tuple(found[k] for k in range(len(questions))))


def _answers(how: str) -> int:
    """How many a question of a kind has."""
    return SAMPLES if how == "sampling" else 1


def _groups(questions: Sequence[Question]) -> dict[tuple[bool, str], list[int]]:
    """(In a chat, "choice", "sampling" or "") -> places of the questions asked together."""
    groups: dict[tuple[bool, str], list[int]] = {}
    for k, q in enumerate(questions):
        how = q.kind if q.kind in ("choice", "sampling") else ""
        groups.setdefault((q.chat, how), []).append(k)
    return groups


@dataclass(frozen=True)
class AskCost:
    """What asking one model takes at most; continuations may end early."""

    prompts: int
    passes: int
    """Forward passes, each of a batch."""
    seconds: float
    """By the time of one batch."""


def ask_cost(model: LanguageModel, questions: Sequence[Question]) -> AskCost:
    """Estimate what `ask` takes, by timing one batch of middle size."""
    made: list[tuple[list[Tokens], int]] = []
    for (_, how), places in _groups(questions).items():
        prompts = [questions[k].tokens for k in places for _ in range(_answers(how))]
        steps = 1 if how == "choice" else LENGTH
        made += [([prompts[k] for k in batch], steps) for batch in batches(prompts)]
    passes = sum(steps for _, steps in made)
    batch, _ = sorted(made, key=lambda found: len(found[0]))[len(made) // 2]
    continuations(model, batch, 1)  # the first warms up
    start = time.perf_counter()
    continuations(model, batch, LENGTH)
    seconds = (time.perf_counter() - start) / LENGTH * passes
    return AskCost(len(questions), passes, seconds)


def _stops(model: LanguageModel, chat: bool) -> set[int]:
    """Tokens that end a continuation."""
    configured = getattr(model.hf.generation_config, "eos_token_id", None)
    known = configured if isinstance(configured, list) else [configured]
    known = [model.get_tokenizer().eos_token_id, *known]
    ends = {token for token in known if isinstance(token, int)}
    lines = () if chat else (model.encode(text) for text in ("x\n", "x\n\n"))
    return ends | {ids[-1] for ids in lines if "\n" in str(model.get_tokenizer().decode(ids[-1:]))}


def _greedy(
    model: LanguageModel,
    asked: Sequence[Question],
    stops: set[int],
    length: int,
    note: Callable[[int, int], None],
) -> list[Answer]:
    ranks: dict[int, int] = {}

    def rank(places: list[int], logits: Tensor) -> None:
        choices = logits.new_tensor([asked[k].choices for k in places]).long()
        four = logits.gather(1, choices)
        above = (four[:, 1:] > four[:, :1]).sum(1) + 1
        first, last = ranked_first(logits, choices), ranked_last(logits, choices)
        above = above.clamp(2, 3).masked_fill(first, 1).masked_fill(last, 4)  # a tie is neither
        ranks.update(zip(places, above.tolist(), strict=True))

    rows = continuations(
        model, [q.tokens for q in asked], length, stops=stops, on_first=rank, on_step=note
    )
    out = []
    for k, (q, row) in enumerate(zip(asked, rows, strict=True)):
        text = _text(model, q, row)
        written = float(mentions(text, q.accepted)) if length else None
        out.append(Answer(ranks[k], written, text))
    return out


def _sampled(
    model: LanguageModel,
    asked: Sequence[Question],
    stops: set[int],
    seed: int,
    note: Callable[[int, int], None],
) -> list[Answer]:
    repeated = [q for q in asked for _ in range(SAMPLES)]
    prompts = [q.tokens for q in repeated]
    rows = continuations(
        model, prompts, LENGTH, stops=stops, temperature=1.0, seed=seed, on_step=note
    )
    texts = [_text(model, q, row) for q, row in zip(repeated, rows, strict=True)]
    out = []
    for k, q in enumerate(asked):
        mine = texts[k * SAMPLES : (k + 1) * SAMPLES]
        right = [text for text in mine if mentions(text, q.accepted)]
        out.append(Answer(None, len(right) / SAMPLES, (right or mine)[0]))
    return out


def _text(model: LanguageModel, q: Question, row: Sequence[int]) -> str:
    """A continuation as text; outside a chat the first line that says anything."""
    text = str(model.get_tokenizer().decode(list(row))).strip()
    return text if q.chat or not text else text.splitlines()[0]
