"""What all unlearning methods share: batches, the retain loss, the stop and the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..losses.accuracy import choice_accuracy, ranked_first, right
from ..losses.answers import divergence, nll
from ..losses.gradients import Elements, gradient, passes
from ..models.language_model import LanguageModel
from ..models.load import computes_bfloat16
from ..tasks.pairs import Pair, by_phrasing, chunks, collate, pack_answers
from ..tasks.task import Task
from ..utils.distributed import sum_number
from ..utils.words import Shown
from .history import History, StepRecord

HINGE = 0.5
"""Nats by which the retain answers that the original ranks first should gain before the hinge has
no gradient."""
CHUNK = 16
"""Pairs of one phrasing that share the computation of what they begin with."""
CHECK_EVERY = 2
"""Steps between two looks at the forgetting level."""
OnStep = Callable[[int, int, StepRecord], None]
"""on_step(steps done, steps in all, record)."""
OnPrepare = Callable[[str, int, int], object]
"""on_prepare(what is found, parts done, parts in all)."""


@dataclass(repr=False)
class Unlearned(Shown):
    """What an unlearning method returns."""

    model: LanguageModel
    """The edited copy."""
    history: History = field(default_factory=list)
    """A record per step."""
    stopped_at: int = 0
    """Steps taken."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        edited = next((r.edited for r in reversed(self.history) if r.edited is not None), None)
        told: dict[str, object] = {"": repr(self.model.name), "steps": self.stopped_at}
        return told if edited is None else {**told, "edited": f"{edited:,.0f}"}


def mean_gradient(
    model: LanguageModel,
    of: Elements,
    pairs: Sequence[Pair],
    loss: Callable[[list[Pair]], Tensor],
) -> tuple[list[Tensor], float]:
    """Gradient of a loss that is a mean over pairs, at some elements of the weights, and the loss.

    Taken some chunks at a time (`passes`); shared among the processes of a distributed group.
    """
    total = 0.0

    def weighed(part: list[Pair]) -> Tensor:
        nonlocal total
        value = loss(part) * (len(part) / len(pairs))
        total += value.item()
        return value

    parts = passes(pairs, CHUNK, model.d_model)
    found = gradient(model, of, [lambda p=part: weighed(p) for part in parts])
    return found, sum_number(total)


def arithmetic(model: LanguageModel, precision: str) -> torch.autocast:
    """The context in which a loss is computed, at `Mansu.precision`. One for each loss: the low
    copies of the weights that it holds would go stale with a step."""
    kind = model.device.type
    wanted = precision == "bf16" and model.dtype == torch.float32  # else it is what weights are
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and computes_bfloat16(model.device))


Batch = tuple[list[list[Pair]], list[list[Pair]], Tensor | None]
"""Forget and retain pairs, each in chunks, and windows of running text, if any."""


class Sampler:
    """Seeded batches of forget pairs, retain and retain-unscored pairs, and running text.

    A batch is a few chunks; the pairs of a chunk share one phrasing and are of similar length, so
    that their common prefix is computed once and little is padded.

    Arguments:
        task: from which pairs and text are drawn.
        batch_size: pairs per batch.
        seed: of the draws.
    """

    TEXT_TOKENS = 64
    TEXT_ROWS = 2

    def __init__(self, task: Task, batch_size: int, seed: int = 0) -> None:
        self.task, self.size = task, batch_size
        self.rng = random.Random(seed)
        self.queue: list[list[Pair]] = []
        self.phrasings = by_phrasing(task.forget.pairs)
        # [retain, retain_unscored] -> relation -> phrasing -> pairs
        self.retain_groups: list[list[list[list[Pair]]]] = []
        for pairs in task.retain_sets:
            groups: dict[str, list[Pair]] = {}
            for pair in pairs:
                groups.setdefault(pair.relation, []).append(pair)
            self.retain_groups.append([by_phrasing(g) for g in groups.values()])

    def _shuffled(self, phrasing: list[Pair]) -> list[list[Pair]]:
        return chunks(self.rng.sample(phrasing, len(phrasing)), min(CHUNK, self.size))

    def forget(self) -> list[list[Pair]]:
        """The next forget batch; every pair comes once before any comes again."""
        batch: list[list[Pair]] = []
        while sum(map(len, batch)) < self.size:
            if not self.queue:
                self.queue = [c for p in self.phrasings for c in self._shuffled(p)]
                self.rng.shuffle(self.queue)
            batch.append(self.queue.pop())
        return batch

    def retain(self) -> list[list[Pair]]:
        """The next retain batch: retain and retain-unscored pairs half and half, every relation and
        phrasing alike within each."""
        batch: list[list[Pair]] = []
        while sum(map(len, batch)) < self.size:
            groups = self.retain_groups[len(batch) % len(self.retain_groups)]
            phrasing = self.rng.choice(self.rng.choice(groups))
            batch.append(self.rng.choice(self._shuffled(phrasing)))
        return batch

    def batch(self, done: int, sides: int) -> Batch:
        """Forget and retain batch of MANSU's next step; text comes with every second round of
        steps over the ``sides`` (full precision and the quantizers)."""
        return self.forget(), self.retain(), self.text() if done // sides % 2 == 0 else None

    def text(self) -> Tensor | None:
        """A few windows of running text, or None if the task has none."""
        paragraphs = [t for t in self.task.text.get("train", ()) if len(t) >= self.TEXT_TOKENS]
        if not paragraphs:
            return None
        rows = self.rng.sample(paragraphs, min(self.TEXT_ROWS, len(paragraphs)))
        return torch.tensor([r[: self.TEXT_TOKENS] for r in rows])


def dev_choice(model: LanguageModel, task: Task) -> float:
    """Mean four-way accuracy on the forget facts' dev phrasings (the trained ones without any)."""
    sets = list(task.scored["dev"]["forget"].values()) or [task.forget]
    return sum(choice_accuracy(model, s) for s in sets) / len(sets)


OnLook = Callable[[LanguageModel, int], object]
"""on_look(full-precision model that a run would end with now, steps done); it may not change it."""


def forgetting_level(
    outcomes: Callable[[], Sequence[LanguageModel]],
    task: Task,
    stop_at: float | None,
    done: int,
    on_look: OnLook | None = None,
) -> float | None:
    """Four-way forget accuracy that decides whether a run may stop: the one rule for every method.

    Arguments:
        outcomes: makes the models that the run would end with now: the edited one and, where a
            method trains them, its quantized ones. All must have forgotten: stopped by one of them,
            a run would stop at that one's luck, and the others would seem to recover.
        task: whose dev phrasings decide; never the unseen ones.
        stop_at: the level; None: never stop.
        done: steps done before this one; every ``CHECK_EVERY``-th step is looked at.
        on_look: called with the first of these models, whatever the level.

    Returns:
        The first model's accuracy above the level, or the highest, which is then at most the level;
        None where it was not looked at.
    """
    if (done + 1) % CHECK_EVERY or (stop_at is None and on_look is None):
        return None
    models = outcomes()
    if on_look:
        on_look(models[0], done + 1)
    if stop_at is None:
        return None
    worst = 0.0
    for model in models:
        worst = max(worst, dev_choice(model, task))
        if worst > stop_at:
            break
    return worst


def may_stop(choice: float | None, stop_at: float | None) -> bool:
    """Whether what `forgetting_level` found is at most the level."""
    return choice is not None and stop_at is not None and choice <= stop_at


def answer_loss(student: LanguageModel, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the answers (nats): the usual retain loss."""
    return nll(student, pairs).mean()


@dataclass(frozen=True)
class RetainTarget:
    """What a model predicted of some answers that are retained."""

    pairs: list[Pair]
    logits: Float[Tensor, "tokens vocab"]
    """Where an answer token is predicted."""
    right: Bool[Tensor, " batch"] | None = None
    """Whether the answer outranks the pair's distractors; None without a hinge."""
    hinge_weight: float = 0.0
    """Of the hinge beside the KL."""


@torch.no_grad()
def retain_target(
    teacher: LanguageModel, pairs: Sequence[Pair], hinge_weight: float = 0.0
) -> RetainTarget:
    """What `retain_loss` compares a student with."""
    packed = pack_answers(pairs, teacher.device)
    logits = teacher.logits_at(packed.tokens, packed.row, packed.position)
    if not hinge_weight:
        return RetainTarget(list(pairs), logits)
    if any(p.whole for p in pairs):
        correct = right(teacher, pairs)[1]
    else:  # the logits are at hand
        correct = ranked_first(logits, collate(pairs, teacher.device).choices)
    return RetainTarget(list(pairs), logits, correct, hinge_weight)


def retain_loss(student: LanguageModel, target: RetainTarget) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats on retain prompts, plus ``hinge_weight`` x a hinge.

    The KL is a mean over the positions that predict an answer token; it has no gradient before
    damage is done. The hinge max(0, log p_teacher(answer) + HINGE - log p_student(answer)), on the
    prompts whose answer the teacher ranks above its distractors, has one from the first step on,
    against the damage that a forget step would do.
    """
    packed, want = pack_answers(target.pairs, student.device), target.logits
    got = student.logits_at(packed.tokens, packed.row, packed.position)
    loss = divergence(got, want)
    if target.right is not None:
        answer = packed.target[:, None]
        lost = want.log_softmax(-1).gather(1, answer) - got.log_softmax(-1).gather(1, answer)
        held = (packed.sums(lost[:, 0]) + HINGE).relu() * target.right
        loss = loss + target.hinge_weight * held.mean()
    return loss


@dataclass(frozen=True)
class TextTarget:
    """What a model predicted of running text."""

    tokens: Int[Tensor, "rows pos"]
    logits: Float[Tensor, "rows pos vocab"]


@torch.no_grad()
def text_target(teacher: LanguageModel, tokens: Int[Tensor, "rows pos"]) -> TextTarget:
    """What `text_kl` compares a student with."""
    return TextTarget(tokens, teacher.all_logits(tokens))


def text_kl(student: LanguageModel, target: TextTarget) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats per token of running text."""
    return divergence(student.all_logits(target.tokens), target.logits)
