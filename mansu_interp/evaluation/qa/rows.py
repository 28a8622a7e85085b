"""Rows of questions and answers with the other answers that metrics ask for, and how a model is
asked: as token ids, through its chat template if it has one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ConfigError, ModelError, TaskError
from ...models.language_model import LanguageModel
from ...tasks.data.rows import sift
from ...tasks.data.shapes import ANSWER, QUESTION, as_list, fold, listed
from ...tasks.data.sources import SUFFIXES, records
from ...utils.libraries import first_line, quiet
from ...utils.words import half_pair, number_of, shown

PLAIN = "Question: {}\nAnswer: "
"""How a model without a chat template is asked."""
MARK = "mansu"
"""An answer by which the end of an assistant's turn is found."""


@dataclass(frozen=True)
class QARow:
    """A question and its answers."""

    question: str
    """As it is asked."""
    answer: str
    """The one that is taught."""
    paraphrased: str = ""
    """The same in other words, which ``perturbed`` go with; empty: they go with ``answer``."""
    perturbed: tuple[str, ...] = ()
    """The same sentence with wrong facts."""
    entity: str = ""
    """The part of the answer that is the fact itself."""
    line: int = 0
    """Where the row stood, from 1."""

    @property
    def right(self) -> str:
        """The answer that ``perturbed`` are compared with."""
        return self.paraphrased or self.answer


def _texts(value: object, name: str) -> list[str]:
    """The texts of a list, or one; none where it is missing."""
    value = as_list(value)
    many = value if isinstance(value, (list, tuple)) else [value]
    many = [text for text in many if not _missing(text)]
    for text in many:
        if not isinstance(text, str):
            raise TaskError(f"{name} must be text; got {shown(text)}")
        if half := half_pair(text):
            raise TaskError(f"{name} holds {half}, half of a surrogate pair, which is no text")
    return [str(text) for text in many if str(text).strip()]


def _missing(value: object) -> bool:
    """None, NaN and what else stands for a missing value."""
    nan = isinstance(value, float) and math.isnan(value)
    return value is None or nan or type(value).__name__ in ("NAType", "NaTType")


def _row(line: int, record: Mapping[str, object]) -> QARow:
    given = fold(record)
    names = {
        "question": next((n for n in QUESTION if n in given), "question"),
        "answer": next((n for n in ANSWER if n in given), "answer"),
        "paraphrased": "paraphrased_answer",
        "entity": "entity",
    }
    found = {field: _texts(given.get(name), name) for field, name in names.items()}
    for field in ("question", "answer"):
        if not found[field]:
            raise TaskError(f"{field} is missing or empty")
    if odd := [field for field, texts in found.items() if len(texts) > 1]:
        raise TaskError(f"{names[odd[0]]} holds {len(found[odd[0]])} texts; expected one")
    one = {field: texts[0] for field, texts in found.items() if texts}
    several = given.get("perturbed_answer")
    several = [] if _missing(several) or several == "" else listed(several, "perturbed_answer")
    wrong = tuple(_texts(several, "perturbed_answer"))
    row = QARow(**one, perturbed=wrong, line=line)
    if row.right in wrong:
        raise TaskError(f"the answer {shown(row.right)} is also a perturbed one")
    return row


def read_qa_rows(
    source: str | Path | Iterable[object], *, limit: int | None = None
) -> tuple[QARow, ...]:
    """Rows of questions and answers, checked.

    Arguments:
        source: path of a .jsonl, .json, .csv, .tsv or .parquet file, or of a folder that `datasets`
            reads; a name on the hub, ``owner/name[:configuration[:split]]``; or any iterable of
            mappings. Read are ``question`` and ``answer``, or what these are called elsewhere
            (docs/tasks.md), and where they are there ``paraphrased_answer``, ``perturbed_answer``
            (a list of texts) and ``entity``.
        limit: take the first so many rows; None: all.

    Raises:
        TaskError: no such source, no row, or bad ones, listed with line and reason.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1; got {limit}.")
    named = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if named and named.suffix.casefold() in SUFFIXES and not os.path.exists(named):
        raise TaskError(f"There is no file {str(source)[:300]!r}. Name one that exists.")
    found = records(source)
    rows = sift(found.records, _row, found.where)
    if not rows:
        raise TaskError(f"{found.where}: there is no row.")
    return tuple(rows[:limit])


def with_entities(rows: Sequence[QARow], others: Sequence[QARow]) -> tuple[QARow, ...]:
    """Rows with the entities that other rows give for the same questions.

    Raises:
        TaskError: they share no question, or the others have no entity.
    """
    entity = {row.question: row.entity for row in others if row.entity}
    if not any(row.question in entity for row in rows):
        raise TaskError(
            f"None of {number_of(len(rows), 'row')} has its question among the "
            f"{number_of(len(entity), 'row')} with an entity. Give rows with the fields question "
            "and entity, of the same questions."
        )
    return tuple(replace(row, entity=entity.get(row.question, row.entity)) for row in rows)


@dataclass(frozen=True)
class Asked:
    """A question with an answer, as token ids."""

    tokens: tuple[int, ...]
    """Question, answer and the token that ends the answer, if there is one."""
    begin: int
    """Where the answer begins."""
    ends: bool
    """Whether the last token ends the answer and is no part of it."""


class Prompts:
    """How a model is asked.

    1. With a chat template the question is the user's turn, and the answer the assistant's; else
       `PLAIN`, behind the token that the tokenizer itself puts first, if it does.
    2. Question and answer are tokenized together. Where the space between them becomes part of the
       answer's first token, that token is the answer's.
    3. The answer ends with the token that the template puts behind it, or the tokenizer's end of
       text: a taught model has learned to stop there.

    Arguments:
        model: whose tokenizer and template are used.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.tokenizer = model, model.get_tokenizer()
        self.chat = bool(getattr(self.tokenizer, "chat_template", None))
        plain = PLAIN.format("...").strip().replace("\n", r"\n")
        self.how = "chat template" if self.chat else plain
        ids = [] if self.chat else self.tokenizer("a").input_ids
        first = self.tokenizer.bos_token_id
        self.lead = (first,) if isinstance(first, int) and ids[:1] == [first] else ()
        self.end = self._end()
        self.strange = not self.chat and bool(self._unknown(PLAIN.format("")))
        """Whether the words around a question are unknown to the tokenizer."""

    def _turns(self, question: str, answer: str | None = None) -> str:
        turns = [{"role": "user", "content": question}]
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=answer is None
                )
            )
        except Exception as error:  # a template is a stranger's program
            raise ModelError(
                f"The chat template of {self.model.name} does not take a question and an answer: "
                f"{type(error).__name__}: {first_line(error)} Mend the template, or remove it."
            ) from error

    def _end(self) -> int | None:
        """The token behind an answer."""
        rest = self._turns(MARK, MARK).rpartition(MARK)[2].strip() if self.chat else ""
        ids = self.model.encode(rest) if rest else []
        last = self.tokenizer.eos_token_id
        return ids[0] if ids else last if isinstance(last, int) else None

    def _before(self, question: str) -> str:
        """All that stands before an answer."""
        return self._turns(question) if self.chat else PLAIN.format(question)

    def question(self, text: str) -> tuple[int, ...]:
        """A question alone, up to where the answer begins."""
        return (*self.lead, *self.model.encode(self._before(text).rstrip(" ")))

    def answer(self, question: str, answer: str) -> Asked:
        """A question with an answer behind it."""
        before = self._before(question)
        begin = (*self.lead, *self.model.encode(before.rstrip(" ")))
        both = (*self.lead, *self.model.encode(before + answer))
        if both[: len(begin)] != begin or len(both) == len(begin):
            # The tokenizer joins the end of the question with the answer.
            both = (*begin, *self.model.encode(answer))
        ends = () if self.end is None else (self.end,)
        return Asked((*both, *ends), len(begin), bool(ends))

    def _unknown(self, text: str) -> str:
        """What of a text the tokenizer cannot read: a word, or all of it; else nothing."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in self.model.encode(text):
            return ""
        return next((w for w in text.split() if unknown in self.model.encode(w)), text)

    def unreadable(self, row: QARow) -> str:
        """What of a row's texts becomes the token for unknown words; else nothing."""
        with quiet():  # of texts that exceed what the tokenizer says of the context
            texts = (row.question, row.answer, row.right, *row.perturbed)
            return next((word for text in texts if (word := self._unknown(text))), "")

    def check_fit(self, rows: Sequence[QARow], what: str) -> None:
        """Raise TaskError over rows whose question with its longest answer exceeds the context.

        Arguments:
            rows: that are to be asked.
            what: what they are called, such as the name of their set.
        """
        most = self.model.sizes[1]
        for row in rows:
            every = {row.answer, row.right, *row.perturbed}
            with quiet():
                longest = max(len(self.answer(row.question, text).tokens) for text in every)
            if most and longest > most:
                raise TaskError(
                    f"{what}, line {row.line}: question and answer have {longest:,} tokens, and "
                    f"{self.model.name} has {most:,} positions. Shorten or remove the row."
                )
