"""From rows to a task: phrasings, chat template, letters, corrupt prompts, whole answers.

Corrupt prompts have as many tokens as the clean ones. Where a row brings none, one is made:

- ``swap``: another row's prompt of the same relation and phrasing, with another answer. The
  symmetric token replacement of Zhang and Nanda 2023 (arXiv 2309.16042).
- ``any``: any row's prompt of the same split, whatever it asks: resampling, as in interchange
  interventions (Geiger et al. 2021, arXiv 2106.02997).
- ``symbol``: the row's own prompt with its subject replaced by a fixed symbol, repeated to length;
  the noiseless form (ours) of the subject corruption of Meng et al. 2022 (arXiv 2202.05262). The
  first distractor is the counterfactual answer.
- ``rotate`` (lettered choices; ours): the same question, the options moved on, so that another
  letter is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import TaskError
from ...models.language_model import LanguageModel
from ...utils.libraries import first_line
from ...utils.ranges import entrance
from ..answers import Tokens, WholeAnswers, clash
from ..pairs import N_CHOICES, Pair, PairSet, gap
from ..schema import RowOptions
from ..task import Asked, Task, distinct
from .rows import SHOWN, SPLITS, Row, hold_out

LETTERS = "ABCD"
TRIES = 32
"""Candidates looked at for a corrupt prompt or a distractor."""
LONGEST = 64
"""Symbols that may stand for one subject."""


@dataclass(frozen=True)
class _Item:
    """One row in one phrasing."""

    row: Row
    split: str
    template: str
    wrong: tuple[str, ...]
    prompt: str
    """As the model reads it."""
    tokens: Tokens
    answer: str
    """The answer's text, or its letter."""
    turned: str = ""
    """With letters: the prompt with its options moved on, and the letter that is then right."""
    turned_answer: str = ""

    @property
    def relation(self) -> str:
        return self.row.relation or self.row.role

    @property
    def phrasing(self) -> str:
        return f"{self.row.phrasing}|{self.template}" if self.row.phrasing else self.template


_Kind = tuple[str, int] | tuple[str, str, str, int]
"""Split and length; or relation, split, phrasing and length."""


class _Drop(Exception):
    """A row that cannot be used, and why."""


class _Pairing:
    """Rows and options for one tokenizer."""

    def __init__(self, model: LanguageModel, rows: Sequence[Row], options: RowOptions) -> None:
        self.model, self.options = model, options
        self.tokenizer = model.get_tokenizer()
        self.unknown = self.tokenizer.unk_token_id
        if options.chat and not getattr(self.tokenizer, "chat_template", None):
            raise TaskError(f"The tokenizer of {model.name} has no chat template: set chat false.")
        self.dropped: dict[str, list[int]] = {}
        self.answers: dict[str, list[str]] = {}
        for row in rows:
            pool = self.answers.setdefault(row.relation or row.role, [])
            pool.append(row.answer)
        self.answers = {r: list(dict.fromkeys(pool)) for r, pool in self.answers.items()}
        self.items = [i for row in rows for i in self._asked(row)]
        self.lenders: dict[_Kind, list[_Item]] = {}
        for item in self.items:
            self.lenders.setdefault(self._kind(item), []).append(item)

    def _kind(self, item: _Item) -> _Kind:
        """What a corrupt prompt shares with the clean one."""
        if self.options.strategy == "any":
            return item.split, len(item.tokens)
        return item.relation, item.split, item.phrasing, len(item.tokens)

    def _rng(self, *what: str) -> random.Random:
        return random.Random("|".join([str(self.options.seed), *what]))

    def _encode(self, text: str) -> Tokens:
        tokens = tuple(self.model.encode(text))
        if self.unknown is not None and self.unknown in tokens:
            raise _Drop("the tokenizer does not know a word of it")
        return tokens

    def _wrap(self, text: str) -> str:
        """The text as the model reads it."""
        if not self.options.chat:
            return self.options.prefix + text
        turn = [{"role": "user", "content": text}]
        try:
            found = self.tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a stranger's program
            raise TaskError(
                f"The chat template of {self.model.name} does not take a user's turn: "
                f"{type(error).__name__}: {first_line(error)} Set chat false, or mend the template."
            ) from error
        return str(found)

    def _answer(self, prompt: str, tokens: Tokens, answer: str) -> Tokens:
        """The answer's tokens behind a prompt: after its `gap`, or at once in an assistant's turn
        and on a new line."""
        between = "" if self.options.chat or prompt.endswith("\n") else gap(prompt, answer)
        both = self._encode(prompt + between + answer)
        if both[: len(tokens)] != tokens or len(both) == len(tokens):
            raise _Drop("the tokenizer joins the prompt's end with the answer")
        return both[len(tokens) :]

    def _wrong(self, row: Row) -> tuple[str, ...]:
        """The row's distractors, or other answers of its relation."""
        if row.distractors:
            return tuple(dict.fromkeys(row.distractors))[: N_CHOICES - 1]
        relation = row.relation or row.role
        pool = [a for a in self.answers[relation] if a.casefold() != row.answer.casefold()]
        return tuple(self._rng(relation, row.fact).sample(pool, min(TRIES, len(pool))))

    def _asked(self, row: Row) -> Iterable[_Item]:
        """The row in every phrasing of its splits."""
        usual = {"retain_unscored": ("train",), "neighbour": ("dev", "unseen")}.get(
            row.role, SPLITS
        )
        for split in [row.split] if row.split else usual:
            plain = ["{s}"] if row.split or split == "train" else []
            for template in self.options.phrasings.get(split, plain):
                try:
                    yield self._item(row, split, template)
                except _Drop as why:
                    self._drop(row, str(why))

    def _item(self, row: Row, split: str, template: str) -> _Item:
        wrong = self._wrong(row)
        if not self.options.letters:
            prompt = self._wrap(template.replace("{s}", row.prompt))
            return _Item(
                row,
                split,
                template,
                wrong=wrong,
                prompt=prompt,
                tokens=self._encode(prompt),
                answer=row.answer,
            )
        if len(wrong) < N_CHOICES - 1:
            raise _Drop("too few different answers for a choice")
        options = [row.answer, *wrong[: N_CHOICES - 1]]
        rng = self._rng(split, template, row.relation or row.role, row.prompt)
        rng.shuffle(options)
        turn = rng.randrange(1, N_CHOICES)
        at = options.index(row.answer)

        def ask(options: list[str]) -> str:
            lines = [f"{x}. {o}" for x, o in zip(LETTERS, options, strict=True)]
            asked = "\n".join([row.prompt, *lines])
            return self._wrap(template.replace("{s}", asked))

        prompt = ask(options)
        return _Item(
            row,
            split,
            template,
            wrong=tuple(x for x in LETTERS if x != LETTERS[at]),
            prompt=prompt,
            tokens=self._encode(prompt),
            answer=LETTERS[at],
            turned=ask(options[turn:] + options[:turn]),
            turned_answer=LETTERS[(at - turn) % N_CHOICES],
        )

    def _corrupt(self, item: _Item, own: Tokens) -> tuple[Tokens, str]:
        """Corrupt prompt of as many tokens, and its answer's text."""
        row, strategy, n = item.row, self.options.strategy, len(item.tokens)
        instead = row.counterfactual or (item.wrong[0] if item.wrong else "")
        if row.corrupt and not self.options.letters:
            tokens = self._encode(self._wrap(item.template.replace("{s}", row.corrupt)))
            if len(tokens) != n:
                raise _Drop("the corrupt prompt given has another number of tokens")
            return tokens, instead
        if strategy == "rotate":
            tokens = self._encode(item.turned)
            if len(tokens) != n:
                raise _Drop("the options moved on have another number of tokens")
            return tokens, item.turned_answer
        if strategy == "symbol":
            if not row.subject or row.subject not in item.prompt:
                raise _Drop("symbol: the prompt does not hold the row's subject")
            for k in range(1, LONGEST):
                filled = item.prompt.replace(row.subject, " ".join([self.options.symbol] * k))
                tokens = tuple(self.model.encode(filled))
                if len(tokens) >= n:
                    break
            if len(tokens) != n:
                raise _Drop("symbol: no number of symbols gives as many tokens")
            return tokens, instead
        lenders = self.lenders[self._kind(item)]
        rng = self._rng(item.relation, row.fact, item.phrasing)
        for other in rng.sample(lenders, min(TRIES, len(lenders))):
            given = row.counterfactual or other.answer
            if other.tokens == item.tokens or other.answer == item.answer:
                continue
            if not clash(self._answer(item.prompt, item.tokens, given), own):
                return other.tokens, given
        raise _Drop(f"{strategy}: no other prompt of as many tokens and another answer")

    def _drop(self, row: Row, why: str) -> None:
        self.dropped.setdefault(why, []).append(row.line)

    def pair(self, item: _Item) -> Pair:
        """One item as a pair.

        Raises:
            _Drop: it cannot be made.
        """
        own = self._answer(item.prompt, item.tokens, item.answer)
        corrupt, text = self._corrupt(item, own)
        if not text:
            raise _Drop("there is no counterfactual answer")
        counterfactual = self._answer(item.prompt, item.tokens, text)
        wrong: list[Tokens] = []
        for answer in item.wrong:
            tokens = self._answer(item.prompt, item.tokens, answer)
            if not any(clash(tokens, x) for x in (own, *wrong)):
                wrong.append(tokens)
        if len(wrong) < N_CHOICES - 1 or clash(own, counterfactual):
            raise _Drop("too few different answers for a choice")
        whole = WholeAnswers(
            own, counterfactual, tuple(wrong[: N_CHOICES - 1]), self.options.normalise
        )
        return Pair.build(
            item.tokens,
            corrupt,
            whole,
            relation=item.relation,
            subject=item.row.fact,
            phrasing=item.phrasing,
            prompt=item.prompt,
            answer_text=item.answer,
        )

    def pairs(self, role: str, split: str) -> list[Pair]:
        """All pairs of a role and split; what cannot be paired is noted."""
        out = []
        for item in self.items:
            if (item.row.role, item.split) == (role, split):
                try:
                    out.append(self.pair(item))
                except _Drop as why:
                    self._drop(item.row, str(why))
        return out

    def left_out(self) -> dict[str, int]:
        """How many prompts were left out, by reason; the reason names the first lines."""
        out = {}
        for why, lines in self.dropped.items():
            named = sorted(set(lines))
            more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
            shown = ", ".join(map(str, named[:SHOWN]))
            out[f"{why} (line{'s' * (len(named) > 1)} {shown}{more})"] = len(lines)
        return out


@entrance(TaskError)
def task_from_rows(
    rows: Sequence[Row],
    model: LanguageModel,
    options: RowOptions | None = None,
    *,
    score_pairs: int = 200,
    name: str = "rows",
    title: str | None = None,
    reference_models: Sequence[str] = (),
) -> Task:
    """Build a task from rows for a model's tokenizer.

    Arguments:
        rows: from `read_rows`; where none names a split, some are held out (`rows.hold_out`).
        model: the model whose tokenizer is used.
        options: how rows are asked.
        score_pairs: at most so many prompts per scored set.
        name: of the task.
        title: what is forgotten, in one sentence.
        reference_models: embedded models that were never taught the forget facts.

    Raises:
        TaskError: prompts contradict each other, or a role has no usable rows in ``train`` or
            ``unseen``, or none could be held out; says why. What is left out otherwise is counted
            in `Task.dropped`.
    """
    options = options or RowOptions()
    told = ""
    if not options.phrasings and not any(row.split for row in rows):
        rows, told = hold_out(name, rows, options.seed)
    made = _Pairing(model, rows, options)
    places = [Asked(r, s, "") for r in ("forget", "retain") for s in SPLITS]
    places += [Asked("neighbour", s, "") for s in ("dev", "unseen")]
    places.append(Asked("retain_unscored", "train", ""))
    found, left_out = distinct(name, {at: made.pairs(at.role, at.split) for at in places})
    unscored = tuple(found[Asked("retain_unscored", "train", "")])
    dropped = made.left_out() | left_out
    for role in ("forget", "retain"):
        for split in ("train", "unseen"):
            if not found[Asked(role, split, "")]:
                why = "".join(f"\n  {n} prompts: {reason}" for reason, n in dropped.items())
                raise TaskError(
                    f"Task {name!r} has no usable {role} prompt in the split {split}. Give rows of "
                    f"that role and split, or phrasings for it in the task file.{why}"
                )

    def sets(role: str, split: str) -> dict[str, PairSet]:
        by: dict[str, list[Pair]] = {}
        for pair in found[Asked(role, split, "")]:
            by.setdefault(pair.relation, []).append(pair)
        return {r: PairSet(f"{role}/{r}", tuple(p)).sample(score_pairs, 0) for r, p in by.items()}

    return Task(
        name=name,
        title=title or name,
        forget=PairSet("forget", tuple(found[Asked("forget", "train", "")])),
        retain=PairSet("retain", tuple(found[Asked("retain", "train", "")])),
        retain_unscored=PairSet("retain_unscored", unscored) if unscored else None,
        scored={
            split: {role: sets(role, split) for role in ("forget", "retain", "neighbour")}
            for split in ("dev", "unseen")
        },
        reference_models=tuple(reference_models),
        dropped=dropped,
        read=told,
    )
