"""MANSU: sparse, discrete edits inside a circuit that survive quantization by construction.

Every editable weight has a latent weight, in units of its block's absmax. While that lies in the
cell of the original value of any quantizer of the set ``survive``, the weight has exactly its
original value; once it has left them all, it is rounded to what `floor` allows. So a weight moves
by at least one whole cell or not at all, and the quantized model receives the same edit. Gradients
pass the rounding straight through (ours; the idea of a per-parameter magnitude floor is arXiv
2605.15138's). `mansu` names the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...losses.accuracy import answered_correctly
from ...losses.answers import nll
from ...losses.counterfactual import CounterfactualTargets, counterfactual_loss
from ...losses.fisher import fisher_diagonal
from ...losses.gradients import gradient, packed
from ...masks.mask import Mask
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, PairSet
from ...tasks.task import Task
from ...utils.distributed import sum_number
from ..checkpoint import Checkpoint
from ..history import History, StepRecord
from ..methods import Mansu
from ..training import (
    Batch,
    OnLook,
    OnPrepare,
    OnStep,
    RetainTarget,
    Sampler,
    TextTarget,
    Unlearned,
    arithmetic,
    forgetting_level,
    may_stop,
    retain_loss,
    retain_target,
    text_kl,
    text_target,
)
from .adversarial import AdversarialRelearning
from .latent_weights import LatentWeights, LatentWeightsWithoutFloor
from .margins import PAIRS, ROUNDS, MarginEditor
from .probe_penalty import ProbePenalty
from .students import Students

FISHER_PAIRS = 48


def mansu(
    model: LanguageModel,
    task: Task,
    mask: Mask,
    config: Mansu,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    on_look: OnLook | None = None,
    on_prepare: OnPrepare | None = None,
    checkpoint: Checkpoint | None = None,
) -> Unlearned:
    """Unlearn inside a mask.

    1. Copy the model in full precision and after every quantizer: the students. Each is compared
       with its teacher, the original at the same precision: itself without its edits. Those of
       fitted quantizers are quantized anew on each of their turns, and gradients pass the
       quantizer straight through.
    2. Measure the Fisher information F of what must stay, for the null-space projection
       lambda / (lambda + F), which multiplies every step.
    3. In each step one student has its turn, full precision first, so that all of them forget and
       all retain: take the gradient of its forget and retain losses.
    4. Add the gradient of the forget loss at a relearned point, and that of what a probe reads, if
       the settings name them.
    5. Move the latent weights; round those that left their cells to the floor, for several
       quantizers jointly; write these edits into all students.
    6. Stop once the forgetting level is reached in all students, or after the last step.
    7. Make margin edits, for which a share of the budget was left over: until full precision and
       the models of fitted quantizers reach the final margin, then until the models of the others
       reach the quantization margin.

    Arguments:
        model: the original; it is not changed.
        task: what to forget and what to retain.
        mask: the parameters that may be edited.
        config: all settings; without its ``floored`` (an ablation) latent weights are written as
            they are, on the full-precision model alone.
        seed: of every draw.
        on_step: called after each step, and before and after each round of margin edits.
        on_look: see `unlearn`.
        on_prepare: see `unlearn`.
        checkpoint: where a killed loop goes on.

    Returns:
        The edited full-precision model; the last record of its history has the margins, too.
    """
    checkpoint = checkpoint or Checkpoint()
    history = checkpoint.load()
    answered = _Answered(task)
    if history:
        checkpoint.restore("answered", answered.order)
    else:
        answered.find(_laid_out(model, config), on_prepare)
    loop = _EditLoop.of(model, answered.task(), mask, config, seed, on_prepare)
    kept = {"answered": answered.order}
    if history:
        loop.resume(checkpoint, len(history))
    for done in range(len(history), config.steps):
        history.append(loop.step(done, on_look))
        if on_step:
            on_step(done + 1, config.steps, history[-1])
        if may_stop(history[-1].choice, config.stop_at):
            break
        if checkpoint.is_due() and loop.is_between_attacks(done + 1):
            loop.latent.save(checkpoint, history, kept)
    if loop.has_margins:
        if len(history) == config.steps:  # what follows may be as long as many steps
            loop.latent.save(checkpoint, history, kept)
        history[-1] = loop.reach_margins(history, on_step)
    edited = replace(loop.students[0], in_trees=model.in_trees)
    return Unlearned(edited, history, len(history))


def learning_rate(peak: float, done: int, steps: int) -> float:
    """Warm-up over 5 steps, flat until 60 %, then linear to a twentieth."""
    if done < 5:
        return peak * (done + 1) / 5
    tail = steps * 0.4
    return peak * min(1.0, (steps - done) / tail * 0.95 + 0.05)


def _laid_out(model: LanguageModel, config: Mansu) -> LanguageModel:
    """The model with its prompts in trees, if it relearns: the longest loop there is."""
    return replace(model, in_trees=config.adversarial_steps > 0)


Retained = tuple[list[RetainTarget], TextTarget | None]
"""What must stay of a batch: the retain pairs' part by part, and that of running text."""


def _retained(teacher: LanguageModel, batch: Batch, config: Mansu) -> Retained:
    """What a teacher predicts of a batch."""
    _, retain, text = batch
    parts = packed(retain, teacher.d_model)
    with torch.no_grad(), arithmetic(teacher, config.precision):
        targets = [retain_target(teacher, p, config.hinge_weight) for p in parts]
        return targets, None if text is None else text_target(teacher, text)


def _partial_losses(
    student: LanguageModel,
    targets: CounterfactualTargets,
    retained: Retained,
    batch: Batch,
    config: Mansu,
    losses: dict[str, float],
) -> list[Callable[[], Tensor]]:
    """The loss of a step in parts that fit into memory; each adds its value to ``losses``, the
    retain losses before `Mansu.retain_weight`."""

    def weighed(kind: str, share: float, loss: Callable[[], Tensor]) -> Tensor:
        with arithmetic(student, config.precision):
            value = loss() * share
        losses[kind] += value.item()
        return value * (config.retain_weight if kind == "retain" else 1.0)

    def forget_part(pairs: list[Pair]) -> Tensor:
        if config.forget_loss == "ga":
            return -nll(student, pairs).mean()
        return counterfactual_loss(
            student, pairs, targets, config.ranking_weight, config.training_margin
        )

    held, read = retained
    parts, (n, m) = [], (sum(map(len, groups)) for groups in batch[:2])
    for p in packed(batch[0], student.d_model):
        parts.append(partial(weighed, "forget", len(p) / n, partial(forget_part, p)))
    for t in held:
        loss = partial(retain_loss, student, t)
        parts.append(partial(weighed, "retain", len(t.pairs) / m, loss))
    if read is not None:
        parts.append(partial(weighed, "retain", 1.0, partial(text_kl, student, read)))
    return parts


class _Answered:
    """Which retain-unscored prompts of a task the original answers correctly: the hinge has nothing
    to hold on the others. To ask them all takes as long as many steps, so a checkpoint keeps it."""

    def __init__(self, task: Task) -> None:
        self._all = task
        self.order = torch.full((len(task.retain_unscored or ()),), -1)
        """Numbers of the prompts, in the order in which they were asked, and -1 behind them."""

    def find(self, model: LanguageModel, on_prepare: OnPrepare | None) -> None:
        """Ask the original."""
        pairs = self._all.retain_unscored
        show = partial(on_prepare, "what the original answers") if on_prepare else None
        found = answered_correctly(model, pairs, show) if pairs else None
        if pairs and found:
            number = {id(pair): k for k, pair in enumerate(pairs)}
            self.order[: len(found)] = torch.tensor([number[id(pair)] for pair in found])

    def task(self) -> Task:
        """The task with these prompts alone, if there are any."""
        pairs = self._all.retain_unscored
        some = tuple(pairs[int(k)] for k in self.order if k >= 0) if pairs else ()
        return (
            replace(self._all, retain_unscored=PairSet(pairs.name, some))
            if pairs and some
            else self._all
        )


@dataclass
class _EditLoop:
    """What the steps of one run share: the full-precision model first, then each quantized one."""

    original: LanguageModel
    task: Task
    retain: PairSet
    """All that must stay."""
    config: Mansu
    seed: int
    limit: int
    """Edits at most."""
    students: Students
    targets: list[CounterfactualTargets]
    latent: LatentWeights
    sampler: Sampler
    adversary: AdversarialRelearning | None
    probe: ProbePenalty | None

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        task: Task,
        mask: Mask,
        config: Mansu,
        seed: int,
        on_prepare: OnPrepare | None,
    ) -> _EditLoop:
        """Everything before the first step."""
        show = on_prepare or (lambda *_: None)
        model = _laid_out(model, config)
        students = Students(model.copy(), config.survive, config.train_through, task.calibration)
        retain = PairSet("retain", tuple(p for pairs in task.retain_sets for p in pairs))
        fisher = None
        if config.projection:
            sample = retain.sample(FISHER_PAIRS, seed)
            fisher = fisher_diagonal(model, mask.indices, sample, seed=seed)
        # Before the first edit the students are their own teachers.
        targets = []
        for side, student in enumerate(students):
            show("what forgetting aims at", side, len(students))
            targets.append(CounterfactualTargets(student, task.forget, seed))
        latent = (LatentWeights if config.floored else LatentWeightsWithoutFloor)(
            students,
            mask,
            fisher=fisher,
            strength=config.projection,
            offset_rate=config.offset_rate,
        )
        loop = cls(
            original=model,
            task=task,
            retain=retain,
            config=config,
            seed=seed,
            limit=mask.limit,
            students=students,
            targets=targets,
            latent=latent,
            sampler=Sampler(task, config.batch_size, seed),
            adversary=AdversarialRelearning(task, config, seed)
            if config.adversarial_steps
            else None,
            probe=ProbePenalty(task, config.batch_size, seed) if config.probe_weight else None,
        )
        if loop.has_margins:
            latent.limit -= int(config.margin_budget * mask.limit)
        return loop

    @property
    def has_margins(self) -> bool:
        """Whether more is edited after the last step."""
        asked = self.config.final_margin is not None or self.config.quantization_margin > 0
        return self.config.floored and asked

    def is_between_attacks(self, done: int) -> bool:
        """Whether nothing but the latent weights decides how it goes on after so many steps."""
        return self.adversary is None or self.adversary.between(done)

    def resume(self, checkpoint: Checkpoint, done: int) -> None:
        """Go on where a killed loop was: repeat the draws of its steps, restore its weights."""
        for step in range(done):
            self.sampler.batch(step, len(self.students))
            if self.probe:
                self.probe.draw()
        self.latent.resume(checkpoint)

    def step(self, done: int, on_look: OnLook | None) -> StepRecord:
        """One step, after ``done`` others: gradient, latent weights, edits, and a look at the
        forgetting level."""
        config, side = self.config, done % len(self.students) if self.config.floored else 0
        batch = self.sampler.batch(done, len(self.students))
        gradients, losses = self._gradients(side, batch, done)
        rate = learning_rate(config.lr, done, config.steps)
        self.latent.step(gradients, rate, done + 1, side)
        edited = self.latent.write()
        choice = forgetting_level(
            lambda: self.latent.models, self.task, config.stop_at, done, on_look
        )
        return StepRecord(
            forget=losses["forget"],
            retain=losses["retain"],
            adversarial=losses.get("adversarial"),
            probe=losses.get("probe"),
            edited=edited,
            choice=choice,
        )

    def _gradients(
        self, side: int, batch: Batch, done: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        """The gradient of one student's losses at the mask's elements, and those."""
        config, of = self.config, self.latent.indices
        attacked = None
        if self.adversary:
            # Fitted models change too much between two steps for one attack to go on.
            exact = 1 + len(self.students.quantizers) if config.floored else 1
            attacked = self.adversary.gradient(self.students, of, self.targets[:exact], done)
        with nullcontext(self.original) if not side else self.latent.unedited(side) as teacher:
            retained = _retained(teacher, batch, config)
        student, targets = self.students[side], self.targets[side]
        losses = {"forget": 0.0, "retain": 0.0}
        parts = _partial_losses(student, targets, retained, batch, config, losses)
        gradients = gradient(student, of, parts)
        losses = {kind: sum_number(value) for kind, value in losses.items()}
        if attacked:
            more, losses["adversarial"] = attacked()
            for g, m in zip(gradients, more, strict=True):
                g.add_(m, alpha=config.adversarial_weight)
        if self.probe:
            more, losses["probe"] = self.probe.gradient(student, of)
            for g, m in zip(gradients, more, strict=True):
                g.add_(m, alpha=config.probe_weight)
        return gradients, losses

    def reach_margins(self, history: History, on_step: OnStep | None) -> StepRecord:
        """Make margin edits within what the steps left of the budget; the last step's record, with
        what they came to."""
        config, last, show = self.config, history[-1], on_step or (lambda *_: None)
        edited = int(last.edited or 0)
        left = self.limit - edited
        forget, retain = (x.sample(PAIRS, self.seed) for x in (self.task.forget, self.retain))
        editor = MarginEditor(self.latent, forget, self.targets[0], retain)

        if config.final_margin is not None:
            most = left // 2 if config.quantization_margin else left
            found = editor.reach_final_margin(
                config.final_margin,
                most,
                lambda done, nats: show(done, ROUNDS, replace(last, above_target=nats)),
            )
            left -= found.edits
            edited += found.edits
            last = replace(
                last,
                edited=edited,
                above_target=found.reached,
                final_margin_edits=found.edits,
            )
        if config.quantization_margin:
            found = editor.reach_quantization_margin(
                config.quantization_margin,
                left,
                lambda done, nats: show(
                    done, ROUNDS, replace(last, quantization_margin_reached=nats)
                ),
            )
            last = replace(
                last,
                edited=edited + found.edits,
                quantization_margin_reached=found.reached,
                quantization_margin_edits=found.edits,
            )
        return last
