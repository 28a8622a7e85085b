"""Questions of the leak test: templates and facts -> prompts for one model's tokenizer."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import TaskError
from ...models.language_model import LanguageModel
from ...tasks.pairs import N_CHOICES, Pair, Tokens, gap
from ...tasks.task import Fact, FactTable, Task
from ...utils.words import mentions
from .question import Question, Questions
from .templates import (
    PARTS,
    Columns,
    Part,
    Scope,
    Tables,
    Template,
    read_templates,
    shipped_files,
)

SHOTS = 3
"""Examples of a few-shot prompt."""
LENGTH = 16
"""Tokens that a model writes after a prompt."""
LETTERS = "ABCD"
UNKNOWN_WORD = "the tokenizer does not know a word of it"
UNKNOWN_TEMPLATE = "templates of which the tokenizer does not know a word"
NO_RELATION = "templates of {of.subject} and {of.answer}, a relation that the task does not have"
JOINED = "the tokenizer joins the prompt's end with the answer"
GIVEN_AWAY = "the prompt gives the answer away"
TRAINED = "the prompt is trained on"
TOO_LONG = "longer than the model's context"
NO_CHAT = "the tokenizer has no chat template for it"
NO_EXAMPLES = "no retained facts to give as examples"
NO_NAME = "the subject has no name in that language"
NO_CLUE = "no clue leads to the subject alone"
SEVERAL = "several subjects have that answer"
FEW_ANSWERS = "too few answers that begin differently"
_SLOT = re.compile(r"\{(\w+)\}")


class _Drop(Exception):
    """A question that cannot be asked, and why."""


def questions(
    model: LanguageModel,
    task: Task,
    *,
    part: Part = "unseen",
    templates: Path | str | None = None,
    prompts: int = 40,
    seed: int = 0,
) -> Questions:
    """What a model is asked.

    1. Of every template of the part, take the facts that it asks: those to forget, and for what
       must stay those that are retained.
    2. Of every kind (or language) and scope, build prompts, template by template in turn and facts
       in an order drawn once, until there are enough; leave out what cannot be asked.

    Rivals are other facts' answers in the order in which `FactPairs` draws them.

    Arguments:
        model: whose tokenizer is used.
        task: what is forgotten and retained.
        part: which templates.
        templates: a file of templates; None: those that ship.
        prompts: at most so many of a kind and scope; half as many are sampled.
        seed: of the draws.

    Raises:
        TaskError: a task of rows, a malformed file, a part without templates, nothing that the
            model can be asked, fewer than one prompt, or a seed beyond 64 bits.
    """
    if not task.tables:
        raise TaskError(
            f"Task {task.name!r} is made of rows, and the leak test asks relations: subjects with "
            "answers in a fact table (docs/tasks.md). Make such a task of the facts."
        )
    if part not in PARTS:
        raise TaskError(f"part: got {part!r:.60}, expected {' or '.join(PARTS)}.")
    if prompts < 1:
        raise TaskError(f"prompts must be at least 1; got {prompts}.")
    if not -(1 << 63) <= seed < 1 << 63:
        raise TaskError(f"seed must be a number of 64 bits; got {seed}.")
    paths = shipped_files() if templates is None else [Path(templates)]
    left_out: Counter[str] = Counter()
    groups = _sources(model, task, paths, part, seed, left_out)
    found: list[Question] = []
    for (name, _), sources in groups.items():
        limit = max(1, prompts // 2) if name == "sampling" else prompts
        found += _in_turn(sources, limit, left_out)
    if not any(q.scope != "must stay" for q in found):
        why = "; ".join(f"{reason}: {n}" for reason, n in left_out.most_common(3))
        raise TaskError(
            f"{model.name} can be asked no leak question of task {task.name!r} "
            f"({why or 'no template asks what it forgets'}). Give templates that it can read, with "
            "the columns of the task's tables (docs/leaks.md)."
        )
    return Questions(tuple(found), dict(sorted(left_out.items())), part, seed)


def _sources(
    model: LanguageModel,
    task: Task,
    paths: Sequence[Path],
    part: Part,
    seed: int,
    left_out: Counter[str],
) -> dict[tuple[str, Scope], list[Iterator[Question | str]]]:
    """Kind and scope -> the questions of each template; counts templates of relations that the task
    does not have, or that cannot be spelled.

    Raises:
        TaskError: the files have no template in the part.
    """
    groups: dict[tuple[str, Scope], list[Iterator[Question | str]]] = {}
    given = 0
    for path in paths:
        file = read_templates(path)
        asking = _Asking(model, task, Tables(path.parent, file.names), seed)
        for template in (t for t in file.templates if t.part == part):
            given += 1
            of = template.of or file.of
            if of and not asking.fitting(of):
                left_out[NO_RELATION.format(of=of)] += 1
                continue
            if not asking.spells(_SLOT.sub(" ", template.said)):
                left_out[UNKNOWN_TEMPLATE] += 1
                continue
            for scope in asking.scopes(template):
                facts = asking.facts(template, of, scope)
                if facts:
                    made = asking.made(template, scope, facts)
                    groups.setdefault((template.name, scope), []).append(made)
    if not given:
        raise TaskError(f"{paths[0]} has no template in the part {part}: add one.")
    return groups


def _in_turn(
    sources: list[Iterator[Question | str]], limit: int, left_out: Counter[str]
) -> list[Question]:
    """Questions of some templates in turn, at most so many; counts those left out."""
    found: list[Question] = []
    asked: set[Tokens] = set()
    while sources and len(found) < limit:
        for source in list(sources):
            item = next((x for x in source if not _counted(x, left_out)), None)
            if item is None:
                sources.remove(source)
            elif isinstance(item, Question) and item.tokens not in asked and len(found) < limit:
                asked.add(item.tokens)
                found.append(item)
    return found


def _counted(item: Question | str, left_out: Counter[str]) -> bool:
    """Whether an item is a reason, which is counted."""
    left_out.update([item] if isinstance(item, str) else [])
    return isinstance(item, str)


class _Asking:
    """Makes questions of the templates of one file."""

    def __init__(self, model: LanguageModel, task: Task, tables: Tables, seed: int) -> None:
        self.model, self.task, self.tables, self.seed = model, task, tables, seed
        self.tokenizer = model.get_tokenizer()
        self.forgotten = {p.fact for p in task.forget}
        kept = [task.retain, *_scored(task, "retain"), *_scored(task, "neighbour")]
        self.retained = {p.fact for pairs in kept for p in pairs} - self.forgotten
        unscored = {p.fact for p in task.retain_unscored or ()}
        self.shown = (self.retained | unscored) - self.forgotten
        self.trained = {p.question for s in (task.forget, *task.retain_sets) for p in s}
        self.answers = {
            name: {s: tuple(a for other, a in table.facts if other == s)
                   for s in {s for s, _ in table.facts}}
            for name, table in task.tables.items()
        }  # fmt: skip

    def spells(self, text: str) -> bool:
        """Whether the tokenizer knows every word of a text."""
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self.model.encode(text)

    def scopes(self, template: Template) -> tuple[Scope, ...]:
        """What must go is also asked of what is retained, which must stay."""
        both = template.scope == "must go"
        return (template.scope, "must stay") if both else (template.scope,)

    def fitting(self, of: Columns | None) -> set[str]:
        """The task's relations with these columns; None: all."""
        return {
            name
            for name, table in self.task.tables.items()
            if of is None or (of.subject, of.answer) == (table.subject, table.answer)
        }

    def facts(self, template: Template, of: Columns | None, scope: Scope) -> list[Fact]:
        """The facts that a template asks, of the relations with these columns."""
        chosen = self.retained if scope == "must stay" else self.forgotten
        fitting = self.fitting(of)
        facts = [f for f in sorted(chosen) if f[0] in fitting and f[1] in self.answers[f[0]]]
        random.Random(f"{self.seed}|{template.text}|{scope}").shuffle(facts)
        return facts

    def made(
        self, template: Template, scope: Scope, facts: Sequence[Fact]
    ) -> Iterator[Question | str]:
        """The questions of a template, or why one cannot be asked."""
        for fact in facts:
            try:
                yield self._question(template, scope, fact)
            except _Drop as reason:
                yield str(reason)

    def _question(self, t: Template, scope: Scope, fact: Fact) -> Question:
        relation, subject = fact
        table, answers = self.task.tables[relation], self.answers[relation][subject]
        wanted, others = answers, [a for _, a in _drawn(table, fact)]
        if t.kind == "reversed":
            wanted, others = (subject,), [s for s, _ in _drawn(table, fact)]
            if sum(a == answers[0] for _, a in table.facts) > 1:
                raise _Drop(SEVERAL)
        others = [self._named(o, t) for o in others]
        answer = self._named(wanted[0], t)
        accepted = tuple(dict.fromkeys(s for w in wanted for s in self.tables.spellings(w)))
        text = self._filled(t, table, fact, accepted)
        if t.kind == "choice":
            text, answer, others = self._with_options(text, answer, others, fact)
            accepted = ()
        prompt = self._prompt(t, text, table)
        if mentions(prompt, accepted):
            raise _Drop(GIVEN_AWAY)
        tokens, choices = self._ranked(prompt, answer, others)
        if tokens in self.trained:
            raise _Drop(TRAINED)
        longest = self.model.sizes[1]
        if longest and len(tokens) + LENGTH > longest:
            raise _Drop(TOO_LONG)
        return Question(
            name=t.name,
            kind=t.kind,
            scope=scope,
            template=t.text,
            relation=relation,
            subject=subject,
            prompt=prompt,
            tokens=tokens,
            answer=answer,
            accepted=accepted,
            choices=choices,
            guess=_commonest([answer, *others]),
            chat=t.kind == "chat",
        )

    def _named(self, thing: str, t: Template) -> str:
        """What a thing is called in a template's language."""
        return (self.tables.name(thing, t.language) if t.language else None) or thing

    def _filled(self, t: Template, table: FactTable, fact: Fact, accepted: Sequence[str]) -> str:
        """A template's text about a fact, but for its options."""
        relation, subject = fact
        values = {"s": subject, "a": self.answers[relation][subject][0]}
        if t.language:
            found = self.tables.name(subject, t.language)
            if found is None:
                raise _Drop(NO_NAME)
            values["s"] = found
        if t.clue:
            clue = self.tables.clues(t.clue).get(subject)
            if clue is None:
                raise _Drop(NO_CLUE)
            values["clue"] = clue
        if t.kind == "few-shot":
            values["examples"] = self._examples(t, table, fact, accepted)
        return _fill(t.text, {**_told(table), **values})

    def _examples(self, t: Template, table: FactTable, fact: Fact, accepted: Sequence[str]) -> str:
        """Retained facts in the template's form: of the relation itself, else of relations with the
        same kind of answer, else of any whose description the form tells."""
        same = [f for f in self.shown if f[0] == fact[0]]
        alike = [f for f in self.shown if self.task.tables[f[0]].answer == table.answer]
        other = list(self.shown) if "{r}" in t.example else []
        draw = random.Random(f"{self.seed}|{'|'.join(fact)}|{t.text}")
        for facts in (same, alike, other):
            usable = sorted(f for f in facts if f[1] in self.answers[f[0]] and f[1] != fact[1])
            usable = [f for f in usable if not mentions(self.answers[f[0]][f[1]][0], accepted)]
            if len(usable) >= SHOTS:
                chosen = draw.sample(usable, SHOTS)
                return "".join(
                    _fill(t.example, {**_told(self.task.tables[r]), "s": s,
                                      "a": self.answers[r][s][0]})
                    for r, s in chosen
                )  # fmt: skip
        raise _Drop(NO_EXAMPLES)

    def _with_options(
        self, text: str, answer: str, others: Sequence[str], fact: Fact
    ) -> tuple[str, str, list[str]]:
        """The text with lettered options, the right letter, and the others."""
        rivals = [o for o in dict.fromkeys(others) if o != answer][: N_CHOICES - 1]
        if len(rivals) < N_CHOICES - 1:
            raise _Drop(FEW_ANSWERS)
        options = [answer, *rivals]
        random.Random(f"{self.seed}|{'|'.join(fact)}|{text}").shuffle(options)
        lines = "\n".join(f"{x}. {o}" for x, o in zip(LETTERS, options, strict=True))
        right = LETTERS[options.index(answer)]
        return _fill(text, {"options": lines}), right, [x for x in LETTERS if x != right]

    def _prompt(self, t: Template, text: str, table: FactTable) -> str:
        """The whole prompt as the model reads it.

        Its own words must be known: a special token that stands for unknown words may begin it.
        """
        begin = _fill(t.begin, _told(table))
        if not self.spells("\n".join(filter(None, (t.system, text, begin)))):
            raise _Drop(UNKNOWN_WORD)
        if t.kind != "chat":
            return self.task.prefix + text
        turns = [{"role": "user", "content": text}]
        turns = [*([{"role": "system", "content": t.system}] if t.system else []), *turns]
        try:
            found = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # no template, or one that takes no system's turn
            raise _Drop(NO_CHAT) from error
        return str(found) + begin

    def _ranked(self, prompt: str, answer: str, others: Sequence[str]) -> tuple[Tokens, Tokens]:
        """The prompt's tokens, and the first tokens of the answer and of three rivals."""
        begun = tuple(self.model.encode(prompt))
        space, own = self._first(prompt, begun, answer)
        rivals: list[int] = []
        for other in dict.fromkeys(others):
            try:
                before, first = self._first(prompt, begun, other)
            except _Drop:
                continue
            if before == space and first != own and first not in rivals:
                rivals.append(first)
            if len(rivals) == N_CHOICES - 1:
                return begun + space, (own, *rivals)
        raise _Drop(FEW_ANSWERS)

    def _first(self, prompt: str, begun: Tokens, answer: str) -> tuple[Tokens, int]:
        """The lone spaces before an answer, and its first token."""
        between = "" if prompt.endswith("\n") else gap(prompt, answer)
        ids = tuple(self.model.encode(prompt + between + answer))
        rest = ids[len(begun) :]
        if ids[: len(begun)] != begun or not rest:
            raise _Drop(JOINED)
        blanks = 0
        while blanks + 1 < len(rest) and not str(self.tokenizer.decode([rest[blanks]])).strip():
            blanks += 1
        if rest[blanks] == self.tokenizer.unk_token_id:
            raise _Drop(UNKNOWN_WORD)
        return rest[:blanks], rest[blanks]


def _commonest(answers: Sequence[str]) -> float:
    """Share of the commonest."""
    return max(Counter(answers).values()) / len(answers)


def _scored(task: Task, role: str) -> list[Sequence[Pair]]:
    return [pairs for by in task.scored.values() for pairs in by.get(role, {}).values()]


def _drawn(table: FactTable, fact: Fact) -> list[tuple[str, str]]:
    """The table's facts in the order in which the rivals of one are drawn, as in `FactPairs`."""
    rng = random.Random("|".join(fact))
    return [f for f in rng.sample(table.facts, len(table.facts)) if f[0] != fact[1]]


def _told(table: FactTable) -> dict[str, str]:
    return {"r": table.description, "t": table.subject}


def _fill(text: str, values: dict[str, str]) -> str:
    """A text with its slots filled at once: what fills one is not searched for others."""
    return _SLOT.sub(lambda m: values.get(m[1], m[0]), text)
