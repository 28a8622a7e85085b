"""The arms of the attack suite: ways to bring back what a model was to forget.

An arm makes a copy of the model (as it is, with noise, quantized), and trains it on what it is
given; none is given a forget fact of half B, which is asked for. The arm ``half-a`` is the attack
of `relearning.relearn`; `suite.attack_suite` runs them all.

**What is excluded.** Retained prompts and other phrasings that name a subject of half B and, beside
it, its forgotten answer state the fact that is asked for: they would teach it, not bring it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..errors import ModelError
from ..models.language_model import LanguageModel
from ..quantizers.survival import quantize
from ..tasks.pairs import Pair, PairSet, Tokens
from ..tasks.task import Statements, Task
from .config import RelearnConfig
from .relearning import (
    LORA_RANK,
    Point,
    fine_tune,
    fine_tune_low_rank,
    halves,
    of_subjects,
    score_halves,
    scored_halves,
)

NOISE = 0.1
"""Standard deviation of the ``noise`` arm, over that of each weight."""
SHOTS = 4
"""Solved prompts of the ``few-shot`` arm, at most."""
SEPARATORS = ("\n", ".", ";")
"""What stands behind a solved prompt: the first that the tokenizer knows."""


@dataclass(frozen=True)
class Given:
    """What attackers may train on; half B's forget facts are in none of it."""

    half_a: PairSet
    """Half A in the train phrasings."""
    retained: PairSet | None
    """The retained facts, those about half B's subjects included, but for those that state a fact
    of half B; None where nothing is left."""
    phrasings: PairSet | None
    """Half A in the phrasings of the split that is not asked; None where there are none."""

    @classmethod
    def of(cls, task: Task, seed: int, split: str) -> Given:
        """What there is of a task, asked in the phrasings of a split."""
        first, second = halves(task.forget, seed)
        stated = Statements(of_subjects(task.forget, second))
        asked = {(p.relation, p.phrasing) for s in task.scored[split]["forget"].values() for p in s}
        other = task.scored.get({"unseen": "dev", "dev": "unseen"}[split], {}).get("forget", {})
        found = [
            p
            for s in other.values()
            for p in s
            if p.subject in first and (p.relation, p.phrasing) not in asked
        ]
        return cls(
            of_subjects(task.forget, first),
            stated.left("retained", task.retain),
            stated.left("phrasings", found),
        )


def copied(model: LanguageModel, _: int) -> LanguageModel:
    """The model itself, as a copy."""
    return model.trainable_copy()


@torch.no_grad()
def noisy(model: LanguageModel, seed: int) -> LanguageModel:
    """A copy with Gaussian noise on every weight of two dimensions, `NOISE` of its deviation."""
    copy, draws = model.trainable_copy(), torch.Generator().manual_seed(seed)
    for weight in copy.weights.values():
        if weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=draws).to(weight)
            weight.add_(noise * weight.std(), alpha=NOISE)
    return copy


def quantized(model: LanguageModel, _: int) -> LanguageModel:
    """A copy with the linear weights that NF4 stands for."""
    return quantize(model, "nf4").trainable_copy()


Trainer = Callable[
    [LanguageModel, Sequence[Sequence[Pair]], float, RelearnConfig], Iterator[LanguageModel]
]


@dataclass(frozen=True)
class Arm:
    """One way to bring knowledge back."""

    about: str
    """What it does."""
    finds: str
    """What it can find that others cannot."""
    source: str
    """Where it is from."""
    sets: tuple[str, ...] = ("half_a",)
    """Which sets of `Given` it trains on; none: it does not train."""
    prepare: Callable[[LanguageModel, int], LanguageModel] = copied
    """Makes the copy that is trained, from a model and a seed."""
    train: Trainer = fine_tune
    """How it trains."""


ARMS: dict[str, Arm] = {
    "half-a": Arm(
        "fine-tune all weights on half A, at every learning rate",
        "answers that are suppressed as a whole",
        "Deeb and Roger 2024, arXiv 2410.08827",
    ),
    "half-a+retained": Arm(
        "the same with half of each batch retained facts, those about half B's subjects included",
        "knowledge that training on half A alone would destroy before it shows",
        "ours",
        sets=("half_a", "retained"),
    ),
    "retained": Arm(
        "fine-tune on retained facts alone, without any forget fact",
        "subjects that were made unrecognizable: their other facts lead back to them",
        "benign relearning, Hu et al. 2024, arXiv 2406.13356",
        sets=("retained",),
    ),
    "phrasings": Arm(
        "fine-tune on half A in phrasings that are neither trained on by unlearning nor asked",
        "edits that hold in the phrasings that unlearning saw",
        "ours, after Lynch et al. 2024, arXiv 2402.16835",
        sets=("phrasings",),
    ),
    "lora": Arm(
        f"fine-tune low-rank changes of all linear layers (rank {LORA_RANK}) on half A",
        "knowledge that a small change brings back, and a large one writes over",
        "LoRA: Hu et al. 2021, arXiv 2106.09685",
        train=fine_tune_low_rank,
    ),
    "noise": Arm(
        f"add Gaussian noise, {NOISE:g} of each weight's standard deviation, then half A",
        "edits that are finely tuned, and plateaus from which no gradient leads back",
        "ours",
        prepare=noisy,
    ),
    "quantize": Arm(
        "replace the linear weights by those that NF4 stands for, then half A",
        "edits that rounding undoes, in part",
        "Zhang et al. 2024, arXiv 2410.16454, then half A",
        prepare=quantized,
    ),
    "few-shot": Arm(
        f"no training: up to {SHOTS} solved prompts of half A before each prompt of half B",
        "answers that are only withheld in the format of the question",
        "in-context relearning, Lynch et al. 2024, arXiv 2402.16835",
        sets=(),
    ),
}
"""All arms, by name."""


def rates_of(arm: str, config: RelearnConfig) -> tuple[float, ...]:
    """The learning rates at which an arm is tried: all for ``half-a``, the middle one for the
    others (of two the larger), 0 without training."""
    if not ARMS[arm].sets:
        return (0.0,)
    rates = sorted(config.rates)
    return tuple(rates) if arm == "half-a" else (rates[len(rates) // 2],)


def why_not(arm: str, model: LanguageModel, task: Task, given: Given, seed: int, split: str) -> str:
    """Why an arm cannot be tried; empty if it can.

    Arguments:
        arm: one of `ARMS`.
        model: what is to be attacked.
        task: whose forget facts are split.
        given: what there is to train on.
        seed: of the split.
        split: whose phrasings are asked.
    """
    sets = ARMS[arm].sets
    if "retained" in sets and given.retained is None:
        return "every retained fact states a fact of half B"
    if "phrasings" in sets and given.phrasings is None:
        return f"what is forgotten has no phrasings but those of training and of {split}"
    if not sets and few_shot(model, task, seed, split) is None:
        return f"not even one solved prompt fits into the model's {model.sizes[1]} positions"
    return ""


def few_shot(
    model: LanguageModel, task: Task, seed: int, split: str
) -> tuple[list[PairSet], list[PairSet]] | None:
    """`relearning.scored_halves`, each prompt behind solved ones of half A, as many as fit into the
    model's context, at most `SHOTS`; None where not even one does."""
    limit, joint = model.sizes[1], _joint(model)
    out = []
    for asked in zip(*scored_halves(task, seed, split), strict=True):
        longest = max(len(p.question) + max(map(len, p.answers)) for half in asked for p in half)
        shots = list(asked[0].sample(SHOTS, seed))
        while shots and limit is not None:
            size = sum(len(s.question) + len(s.answers[0]) + len(joint) for s in shots)
            if size + longest <= limit:
                break
            shots.pop()
        if not shots:
            return None
        out.append([behind(model, shots, joint, half) for half in asked])
    return [a for a, _ in out], [b for _, b in out]


def _joint(model: LanguageModel) -> Tokens:
    """What stands behind a solved prompt; nothing without a tokenizer that knows a separator."""
    if model.tokenizer is None:
        return ()
    known = (tuple(model.encode(text)) for text in SEPARATORS)
    return next((t for t in known if t and model.tokenizer.unk_token_id not in t), ())


def behind(model: LanguageModel, shots: Sequence[Pair], joint: Tokens, asked: PairSet) -> PairSet:
    """Prompts behind solved ones; a token that begins every text stands once, at the beginning."""
    begin = getattr(model.tokenizer, "bos_token_id", None)

    def inner(tokens: Tokens) -> Tokens:
        return tokens[1:] if tokens[0] == begin else tokens

    head = (begin,) if begin is not None and asked[0].clean[0] == begin else ()
    before = head + tuple(t for s in shots for t in (*inner(s.question), *s.answers[0], *joint))
    moved = (
        replace(p, clean=before + inner(p.clean), corrupt=before + inner(p.corrupt)) for p in asked
    )
    return PairSet(asked.name, tuple(moved))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that results do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def attack_once(
    model: LanguageModel,
    task: Task,
    arm: str,
    rate: float,
    *,
    config: RelearnConfig,
    split: str = "unseen",
    on_step: Callable[[int], object] = lambda _: None,
) -> list[Point]:
    """One arm at one learning rate, on one thread.

    Arguments:
        model: what is attacked; it is not changed.
        task: its forget facts are split by subject and seed.
        arm: one of `ARMS` that can be tried (`why_not`).
        rate: learning rate; not looked at without training.
        config: steps, optimiser, batch size and seed.
        split: whose phrasings are asked.
        on_step: called with the steps done.

    Returns:
        The scores before the first step and after each mark; where training destroys the model, so
        that it gives no numbers, those before.
    """
    how, points = ARMS[arm], list[Point]()
    with one_thread():
        if not how.sets:
            found = few_shot(model, task, config.seed, split)
            assert found is not None  # as `why_not` says
            return [score_halves(model, *found, rate=0.0, steps=0)]
        given = Given.of(task, config.seed, split)
        asked = scored_halves(task, config.seed, split)
        sets = [getattr(given, name) for name in how.sets]
        copies = how.train(how.prepare(model, config.seed), sets, rate, config)
        for done, attacked in enumerate(copies):
            if done == 0 or done in config.steps:
                try:
                    points.append(score_halves(attacked, *asked, rate=rate, steps=done))
                except ModelError:
                    if not done:
                        raise
                    break
            on_step(done)
    return points
