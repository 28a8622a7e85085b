"""UNDO (Lee et al. 2025, arXiv 2506.06278): unlearn, noise, distil on outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...losses.answers import divergence, row_logits
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair
from ...tasks.task import Task
from ...utils.distributed import shard
from ..checkpoint import Checkpoint
from ..history import History
from ..methods import UNDO
from ..registry import DenseConfig
from ..training import answer_loss, may_stop, text_kl, text_target
from .dense import DenseLoop, DrawnBatch, Objective


def shrink_and_perturb(
    weight: Float[Tensor, "*shape"], noise: float, scale: float, draws: torch.Generator
) -> Float[Tensor, "*shape"]:
    """(1 - noise) w + noise x scale x N: N is Xavier's uniform noise for a matrix, in
    +-sqrt(6 / (in + out)), and 0 for a vector."""
    if weight.dim() < 2:
        return (1 - noise) * weight
    limit = (6 / (weight.shape[-1] + weight.shape[-2])) ** 0.5
    drawn = torch.rand(weight.shape, generator=draws).mul(2 * limit).sub(limit)
    return (1 - noise) * weight + noise * scale * drawn.to(weight)


def prompt_kl(
    student: LanguageModel, teacher: LanguageModel, pairs: Sequence[Pair]
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats, a mean over every token of some prompts."""
    prompts = [p.clean for p in pairs]
    with torch.no_grad():
        wanted = row_logits(teacher, prompts)
    return divergence(row_logits(student, prompts), wanted)


class UnlearnNoiseDistil(DenseLoop):
    """Unlearns first; then the unlearned model teaches its noised copy."""

    def __init__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int = 0
    ) -> None:
        super().__init__(model, objective, config, seed)
        assert isinstance(config, UNDO)
        self.settings = config
        self.teacher: LanguageModel | None = None
        half = round(config.unlearn_share * config.steps)
        self.unlearn_steps = min(max(half, 1), config.steps - 1)

    def unlearned_at(self, history: History) -> int | None:
        """After how many steps the unlearned model was there; None: not yet."""
        for done, record in enumerate(history, 1):
            if done == self.unlearn_steps or may_stop(record.choice, self.config.stop_at):
                return done
        return None

    def begin(self, history: History) -> None:
        """Take the student as the teacher, and noise it, once it has unlearned."""
        if self.teacher is not None or self.unlearned_at(history) is None:
            return
        self.teach(self.student.copy())
        draws, config = torch.Generator().manual_seed(self.seed), self.settings
        for w in self.student.weights.values():
            w.copy_(shrink_and_perturb(w, config.noise, config.noise_scale, draws))

    def teach(self, teacher: LanguageModel) -> None:
        """Distil from a model from now on."""
        self.teacher = teacher
        self.optimiser = self.make_optimiser(self.settings.distil_lr)

    def step(self, batch: DrawnBatch, done: int) -> tuple[float, float | None]:
        """See `DenseLoop.step`; while distilling the retain loss is the KL to the teacher."""
        teacher = self.teacher
        if teacher is None:
            return super().step(batch, done)
        for w in self.weights:
            w.requires_grad_(True)
        assert batch.retain is not None
        retained = self.descend(lambda s, pairs: prompt_kl(s, teacher, pairs), batch.retain, 1.0)
        for text in shard([] if batch.text is None else [batch.text]):
            text_kl(self.student, text_target(teacher, text)).backward()
        self.finish()
        return self.descend(self.objective.forget, batch.forget, 0.0), retained

    @property
    def may_end(self) -> bool:
        """See `DenseLoop.may_end`: what is only unlearned is another method's."""
        return self.teacher is not None

    def ends(self, choice: float | None) -> bool:
        """Never: the forgetting level ends the unlearning, and distillation takes the rest."""
        return False

    def optimised(self, history: History) -> int:
        """See `DenseLoop.optimised`."""
        before = self.unlearned_at(history) if self.teacher else None
        return len(history) - (before or 0)

    def tensors(self) -> dict[str, Tensor]:
        """See `DenseLoop.tensors`; the teacher's weights, too."""
        known = self.teacher.weights if self.teacher else {}
        return {**super().tensors(), **{f"{n}|teacher": w.contiguous() for n, w in known.items()}}

    def resume(self, checkpoint: Checkpoint, history: History) -> None:
        """See `DenseLoop.resume`."""
        if any(name.endswith("|teacher") for name in checkpoint.tensors):
            self.teach(self.student.copy())
            assert self.teacher is not None
            for name, w in self.teacher.weights.items():
                checkpoint.restore(f"{name}|teacher", w)
        super().resume(checkpoint, history)


def undo(model: LanguageModel, task: Task, config: UNDO, seed: int = 0) -> Objective:
    """Unlearn with GradDiff's loss, noise every weight, distil from the unlearned model.

    1. Minimise -NLL(forget) + retain_weight x NLL(retain) at ``lr``, to the forgetting level or for
       ``unlearn_share`` of the steps.
    2. Take that model as the teacher, and noise a copy (`shrink_and_perturb`, drawn by ``seed``):
       the student.
    3. Minimise KL(teacher || student) on every token of retain prompts and of running text, at
       ``distil_lr``, for all steps that are left.

    Formula and settings are those of the authors' public code: noise 0.25 of their runs on WMDP,
    ``distil_lr`` of their runs on a small model. They unlearn with GradDiff, MaxEnt or RMU, distil
    on a pretraining corpus, and stop at 95 % of the teacher's retained performance.
    """
    return Objective(
        lambda student, pairs: -answer_loss(student, pairs),
        answer_loss,
        config.retain_weight,
        loop=UnlearnNoiseDistil,
        reads_text=True,
    )
