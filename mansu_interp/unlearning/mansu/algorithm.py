"""MANSU: sparse, discrete edits inside a circuit that survive quantization by construction.

Every editable weight has a latent position in units of its block's absmax. While the position lies
in the weight's own cell of any quantizer of the set ``survive``, the weight keeps its exact
original value; once it has left them all, it lands where `floor` allows. So a weight moves at least
one whole cell or not at all, and the quantized model receives the same edit. Gradients pass the
snap straight through (ours; the idea of a per-parameter magnitude floor is arXiv 2605.15138's).
Steps take turns, the full-precision model first and then each quantized one, so that all forget and
all retain; each is compared with the original at its own precision. Of several quantized models
each gathers, on its turns, how it would like its own values to differ; `landing` weighs these
wishes where there is a choice (ours). At the end `finish` takes all models down to the target and
parts the quantized ones from full precision. The momentum direction is multiplied by the null-space
projection lambda / (lambda + F).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from ...losses.accuracy import answered_correctly
from ...losses.answers import nll
from ...losses.counterfactual import CounterfactualTargets, counterfactual_loss
from ...losses.fisher import fisher_diagonal
from ...losses.gradients import gradient
from ...masks.floor import quantizer_set
from ...masks.mask import Mask
from ...models.language_model import LanguageModel
from ...quantizers.survival import quantize
from ...tasks.pairs import Pair, PairSet
from ...tasks.task import Task
from ...utils.distributed import sum_number
from ..checkpoint import Checkpoint
from ..config import UnlearnConfig
from ..training import Batch, OnStep, Sampler, Unlearned, arithmetic, reached, retain_loss, text_kl
from .adversarial import AdversarialRelearning
from .latent_weights import LatentWeights, LatentWeightsWithoutFloor
from .margins import PAIRS, ROUNDS, MarginEditor
from .probe_penalty import ProbePenalty

FISHER_PAIRS = 48


def learning_rate(peak: float, done: int, steps: int) -> float:
    """Warm-up over 5 steps, flat until 60 %, then linear to a twentieth."""
    if done < 5:
        return peak * (done + 1) / 5
    tail = steps * 0.4
    return peak * min(1.0, (steps - done) / tail * 0.95 + 0.05)


def _parts(
    student: LanguageModel,
    teacher: LanguageModel,
    target: CounterfactualTargets,
    batch: Batch,
    config: UnlearnConfig,
    losses: dict[str, float],
) -> list[Callable[[], Tensor]]:
    """The loss of a step in parts that fit into memory; each adds what it came to to ``losses``,
    the retained ones before `UnlearnConfig.retain_weight`."""

    def weighed(kind: str, share: float, loss: Callable[[], Tensor]) -> Tensor:
        with arithmetic(student, config):
            value = loss() * share
        losses[kind] += value.item()
        return value * (config.retain_weight if kind == "retain" else 1.0)

    def forgotten(pairs: list[Pair]) -> Tensor:
        if config.forget_loss == "ga":
            return -nll(student, pairs).mean()
        return counterfactual_loss(
            student, pairs, target, config.ranking_weight, config.training_margin
        )

    def retained(pairs: list[Pair]) -> Tensor:
        return retain_loss(student, teacher, pairs, config.hinge_weight)

    forget, keep, text = batch
    parts = []
    for kind, groups, loss in (("forget", forget, forgotten), ("retain", keep, retained)):
        n = sum(map(len, groups))
        parts += [partial(weighed, kind, len(p) / n, partial(loss, p)) for p in groups]
    if text is not None:
        parts.append(partial(weighed, "retain", 1.0, partial(text_kl, student, teacher, text)))
    return parts


def mansu(
    model: LanguageModel,
    task: Task,
    mask: Mask,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
    floored: bool = True,
    checkpoint: Checkpoint | None = None,
) -> Unlearned:
    """Unlearn inside a mask (see the module's text).

    Without ``floored`` (an ablation) positions are written as they are and nothing is known of the
    quantizer: the same mask, budget, losses and step rule, on the full-precision model alone.

    With a ``checkpoint`` that a killed loop kept, this one goes on there.

    With `UnlearnConfig.final_margin` or a quantization_margin more is edited after the last step (see `finish`).

    The result's history holds, per step, ``forget`` and ``retain`` losses (nats) and ``edited``;
    the last one what `MarginEditor.reach_final_margin` and `MarginEditor.reach_quantization_margin` return as well.
    """
    survive = quantizer_set(config.survive)
    teachers = [model, *(quantize(model, q) for q in survive)]
    students = [model.copy(), *(quantize(model, q) for q in survive)]
    # A retain_unscored that the model does not know holds nothing: keep those whose answer it ranks first.
    retain_unscored = (
        answered_correctly(model, task.retain_unscored) if task.retain_unscored else None
    )
    task = replace(task, retain_unscored=retain_unscored or task.retain_unscored)
    fisher = None
    kept = PairSet("retain", tuple(p for pairs in task.retain_sets for p in pairs))
    if config.projection:
        fisher = fisher_diagonal(
            model, list(mask.indices), kept.sample(FISHER_PAIRS, config.seed), seed=config.seed
        )
    targets = [CounterfactualTargets(t, task.forget, config.seed) for t in teachers]
    kind = LatentWeights if floored else LatentWeightsWithoutFloor
    latent = kind(
        students[0], students[1:], mask, survive, fisher, config.projection, config.offset_rate
    )
    sampler = Sampler(task, config)
    attacker = AdversarialRelearning(task, config) if config.adversarial_steps else None
    reader = ProbePenalty(task, config) if config.probe_weight else None
    checkpoint = checkpoint or Checkpoint()
    finishing = floored and (config.final_margin is not None or config.quantization_margin > 0)
    if finishing:
        latent.limit -= int(config.margin_budget * mask.limit)
    history = checkpoint.load()
    for done in range(len(history)):  # the draws of the steps that are done
        sampler.batch(done, len(students))
        if attacker:
            attacker.draw()
        if reader:
            reader.draw()
    if history:
        latent.resume(checkpoint)
    for done in range(len(history), config.steps):
        side = done % len(students) if floored else 0
        student, teacher = students[side], teachers[side]
        losses = {"forget": 0.0, "retain": 0.0}
        batch = sampler.batch(done, len(students))
        parts = _parts(student, teacher, targets[side], batch, config, losses)
        gradients = gradient(student, latent.names, parts)
        losses = {kind: sum_number(value) for kind, value in losses.items()}
        if attacker:
            extra, losses["attacked"] = attacker.gradient(student, latent.names, targets[side])
            for g, e in zip(gradients, extra, strict=True):
                g.add_(e, alpha=config.adversarial_weight)
        if reader:
            extra, losses["read"] = reader.gradient(student, latent.names)
            for g, e in zip(gradients, extra, strict=True):
                g.add_(e, alpha=config.probe_weight)
        latent.step(gradients, learning_rate(config.lr, done, config.steps), done + 1, side)
        losses["edited"] = latent.write()
        stop = reached(lambda: latent.models, task, config, done, losses)
        history.append(losses)
        if on_step:
            on_step(done + 1, config.steps, losses)
        if stop:
            break
        if checkpoint.is_due():
            latent.save(checkpoint, history)
    if finishing:
        last = history[-1]
        if len(history) == config.steps:  # what follows may be as long as many steps
            latent.save(checkpoint, history)

        def on_round(measure: str, done: int, nats: float) -> None:
            if on_step:
                on_step(done, ROUNDS, last | {measure: nats})

        left = mask.limit - int(last["edited"])
        answers, others = (x.sample(PAIRS, config.seed) for x in (task.forget, kept))
        finish = MarginEditor(latent, answers, targets[0], others)
        if config.final_margin is not None:
            most = left // 2 if config.quantization_margin else left
            last |= finish.reach_final_margin(config.final_margin, most, partial(on_round, "above"))
            left -= int(last["deepening"])
            last["edited"] += last["deepening"]
        if config.quantization_margin:
            last |= finish.reach_quantization_margin(
                config.quantization_margin, left, partial(on_round, "apart")
            )
            last["edited"] += last["parting"]
    return Unlearned(students[0], history, len(history))
