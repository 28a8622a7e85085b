"""Pairs for unlearning from the train part of the leak test's templates (`asking.questions`).

A question is paired with another of the same template, with as many tokens and another answer: its
prompt is the corrupt one, its answer the counterfactual one. What no other question fits is left
out. Reports ask the unseen part, whose templates are others.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import TaskError
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, PairSet
from ...tasks.task import Task
from ...utils.ranges import entrance
from .asking import questions
from .question import Question

NOT_TRAINED = ("choice", "description")
"""Kinds that are not trained on: letters tell nothing of a fact, and what may stay may stay."""
OWN_ANSWERS = ("reversed", "language")
"""Kinds whose answers are others than the relation's: countries, Varsovie. They are relations of
their own."""


@entrance(TaskError)
def with_leak_prompts(model: LanguageModel, task: Task, seed: int = 0) -> Task:
    """The task, its forget set with prompts of the train part beside those it has.

    Arguments:
        model: whose tokenizer is used.
        task: over fact tables.
        seed: of the draws.

    Raises:
        TaskError: a task of rows, or one of which no such prompt can be made (see `questions`).
    """
    limit = len(task.forget)  # every fact in every template
    asked = questions(model, task, part="train", prompts=2 * limit, seed=seed)
    groups: dict[tuple[str, str, int], list[Question]] = {}
    for q in asked.items:
        if q.scope == "must go" and q.kind not in NOT_TRAINED:
            groups.setdefault((q.relation, q.template, len(q.tokens)), []).append(q)
    made = [pair for group in groups.values() for pair in _paired(group)]
    return replace(task, forget=PairSet(task.forget.name, (*task.forget, *made)))


def _paired(group: list[Question]) -> list[Pair]:
    """Pairs of questions with as many tokens: each with the next whose answer is another."""
    out: list[Pair] = []
    for k, q in enumerate(group):
        others = (*group[k + 1 :], *group[:k])
        other = next((o for o in others if o.choices[0] not in q.choices), None)
        if other is None:
            continue
        own = q.kind in OWN_ANSWERS
        out.append(
            Pair(
                clean=q.tokens,
                corrupt=other.tokens,
                answer=q.choices[0],
                counterfactual=other.choices[0],
                distractors=q.choices[1:],
                relation=f"{q.relation}, {q.name}" if own else q.relation,
                subject=q.subject,
                phrasing=q.template,
                prompt=q.prompt,
                answer_text=q.answer,
            )
        )
    return out
