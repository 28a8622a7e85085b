"""The leak test of a run: who is asked, and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from ..errors import TaskError
from ..evaluation.leaks.answers import Answers, ask
from ..evaluation.leaks.asking import Questions, questions
from ..evaluation.leaks.found import LeakTest
from ..evaluation.leaks.scoring import judge
from ..evaluation.versions import EDITED, ORIGINAL, ModelVersion
from ..models.language_model import LanguageModel
from ..models.load import SMALL
from ..quantizers.survival import quantize
from ..tasks.task import Task
from ..utils.records import Keep
from .config import RunConfig, deployed
from .context import RunContext

EXAMPLES = 3
"""Transcripts that a report keeps of each kind at fault."""
TOKENS = 40_000
"""Tokens that one model reads and writes, of the shipped templates and world-capitals with the
tokenizer of SmolLM2: 920 prompts."""


def asked_for(config: RunConfig, model: LanguageModel, task: Task) -> bool:
    """Whether a run makes the leak test."""
    if config.leaks == "auto":
        return model.n_parameters >= SMALL and bool(task.tables)
    return config.leaks != "no"


def leak_questions(config: RunConfig, model: LanguageModel, task: Task) -> Questions | None:
    """What the models of a run are asked; None: no leak test.

    Raises:
        TaskError: it was asked for, and the task has no relation or none that the model can read.
    """
    if not asked_for(config, model, task):
        return None
    return questions(model, task, seed=config.seed)


def check_leak_prompts(config: RunConfig, model: LanguageModel, task: Task) -> None:
    """Raise TaskError if a run is to unlearn in leak prompts, and there are none.

    Raises:
        TaskError: the task has no relation, or none that the model can read.
    """
    if not config.leak_prompts:
        return
    try:
        questions(model, task, part="train", prompts=1, seed=config.seed)
    except TaskError as error:
        raise TaskError(
            f"There are no leak prompts to unlearn in: leave out --leak-prompts. {error}"
        ) from error


def versions(config: RunConfig) -> list[ModelVersion]:
    """The edited models that are asked."""
    after = deployed(config) if config.leaks == "quantized" else []
    return [EDITED, *(EDITED.after(name) for name in after)]


def cost_tokens(config: RunConfig, model: LanguageModel, task: Task) -> float:
    """Tokens of forward passes that the leak test of a run takes, about."""
    return TOKENS * (1 + len(versions(config))) if asked_for(config, model, task) else 0.0


def leak_tests(
    run: RunContext, models: Mapping[ModelVersion, LanguageModel], keep: Keep
) -> tuple[LeakTest, ...]:
    """The leak test of the edited model and, where that was asked for, of it after each quantizer;
    all against what the original knows in full precision.

    Arguments:
        run: its settings, task and original.
        models: by version; those that are not there are quantized.
        keep: called for the answers of each.
    """
    asked = leak_questions(run.config, run.model, run.task)
    if asked is None:
        return ()

    def answers(version: ModelVersion) -> Answers:
        def make() -> Answers:
            model = models.get(version)
            if model is None:
                model = quantize(models[EDITED], str(version.quantizer), sharing=True)
            return ask(model, asked.items, seed=run.config.seed, on_step=note)

        def note(what: str, done: int, total: int) -> None:
            run.note(f"{what} to {version}", done, total)

        return keep(f"leak answers of {version}", Answers, make)

    judged = functools.partial(judge, asked, answers(ORIGINAL), task=run.task.name)
    found = (judged(answers(v), version=v) for v in versions(run.config))
    return tuple(replace(test, transcripts=tuple(test.examples(EXAMPLES))) for test in found)
