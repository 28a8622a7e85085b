"""RepSelect (Sondej et al. 2026, arXiv 2606.17168): what is special in one forget gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...losses.answers import nll
from ...losses.low_rank import Adapters
from ...models.language_model import LanguageModel
from ...models.layout import mlp_weights
from ...tasks.task import Task
from ..methods import RepSelect
from ..registry import DenseConfig
from ..training import Sampler, answer_loss, mean_gradient
from .dense import DenseLoop, DrawnBatch, Objective

ELICIT_RANK = 8
"""Of the adapters that relearn before the gradient is taken."""
SHARE = 1 / 8
"""Of the shorter side of a matrix: the authors' 512 components at a width of 4096."""
ROUNDING = 1e-5
"""Of a gradient: what is left of it below this share is rounding."""


def collapse(
    gradient: Float[Tensor, "out in"], components: int, *, hard: bool = False
) -> Float[Tensor, "out in"]:
    """A gradient whose top principal components are collapsed on both sides.

    With the singular vectors u_i, v_i and values s_1 >= ... >= s_k of the k components, each
    projection on v_i (the inputs), then on u_i (the outputs), is multiplied by s_k / s_i; if
    ``hard``, by 0, so that what is left is orthogonal to all of them.
    """
    left, sizes, right = torch.linalg.svd(gradient, full_matrices=False)
    u, s, v = left[:, :components], sizes[:components], right[:components].T
    taken = torch.ones_like(s) if hard else 1 - s[-1] / s.clamp(min=torch.finfo(s.dtype).tiny)
    out = gradient - (gradient @ v * taken) @ v.T
    return out - u @ (taken[:, None] * (u.T @ out))


def mlp_names(model: LanguageModel) -> list[str]:
    """The weights of all MLPs.

    Raises:
        ModelError: a layer has none of a known name.
    """
    layers = range(model.architecture.n_layers)
    return [
        n for k in layers for out in (False, True) for n in mlp_weights(model.linear_names, k, out)
    ]


def elicit(
    model: LanguageModel, task: Task, names: Sequence[str], config: RepSelect, seed: int
) -> LanguageModel:
    """A copy that knows the forget facts better: one pass of SGD on NLL(forget), in adapters."""
    copy = model.trainable_copy()
    rank = min(ELICIT_RANK, *(min(copy.weights[n].shape) for n in names))
    adapters, sampler = Adapters(copy, names, rank, seed), Sampler(task, config.batch_size, seed)
    for _ in range(max(1, len(task.forget) // config.batch_size)):
        batch = [p for chunk in sampler.forget() for p in chunk]
        slopes, _ = mean_gradient(copy, names, batch, lambda part: nll(copy, part).mean())
        for name, slope in zip(names, slopes, strict=True):
            adapters.gradients(name, slope)
            for matrix in (adapters.down[name], adapters.up[name]):
                assert matrix.grad is not None
                matrix.sub_(config.elicit_lr * matrix.grad)
        adapters.write()
    return copy


class FixedDirection(DenseLoop):
    """Moves along one direction, by ``lr`` in root mean square a step."""

    def __init__(
        self, model: LanguageModel, objective: Objective, config: DenseConfig, seed: int = 0,
        *, direction: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self.direction = direction
        super().__init__(model, objective, config, seed)

    def parameters(self) -> dict[str, Tensor]:
        """The weights that move."""
        return {n: self.student.weights[n] for n in self.direction}

    def step(self, batch: DrawnBatch, done: int) -> tuple[float, float | None]:
        """See `DenseLoop.step`; the loss is that before the step."""
        found = self.descend(self.objective.forget, batch.forget, 0.0)
        for name, along in self.direction.items():
            self.trained[name].sub_(self.config.lr * along)
        return found, None


def _mean_square(tensors: Collection[Tensor]) -> float:
    total = sum(float(t.double().square().sum()) for t in tensors)
    return total / sum(t.numel() for t in tensors)


def repselect(model: LanguageModel, task: Task, config: RepSelect, seed: int = 0) -> Objective:
    """Weights = original - lr x steps x direction: one forget gradient of the MLPs, collapsed.

    1. Relearn the forget facts a little in adapters, so that the gradient sees what an attacker
       would bring back (`elicit`).
    2. Take the gradient of -NLL(forget) there, over all forget pairs.
    3. `collapse` its top principal components on both sides, matrix by matrix.
    4. Follow it from the original, without the adapters.

    From the authors' public code and its settings of the paper's runs (components of the forget
    gradient, soft). Ours: the direction is scaled to root mean square 1, which changes the unit of
    the step size alone. Nothing is retained on purpose.

    Raises:
        ConfigError: more components than a matrix has.
        ModelError: a layer has no MLP of a known name.
    """
    names = mlp_names(model)
    shortest = min(min(model.weights[n].shape) for n in names)
    if config.components is not None and config.components > shortest:
        raise ConfigError(
            f"components is at most the shorter side of every MLP matrix of {model.name}, "
            f"{shortest}; got {config.components}."
        )
    elicited = elicit(model, task, names, config, seed)
    slopes, _ = mean_gradient(
        elicited, names, task.forget.pairs, lambda part: -nll(elicited, part).mean()
    )
    direction = {}
    for name, slope in zip(names, slopes, strict=True):
        count = config.components or max(1, round(SHARE * min(slope.shape)))
        direction[name] = collapse(slope, count, hard=config.collapse == "hard")
    before, size = _mean_square(slopes) ** 0.5, _mean_square(direction.values()) ** 0.5
    if size <= ROUNDING * before:
        raise ConfigError(
            "Nothing is left of the forget gradient without its principal components. Take fewer, "
            "or collapse them softly."
        )
    direction = {n: d / size for n, d in direction.items()}
    return Objective(
        lambda student, pairs: -answer_loss(student, pairs),
        loop=partial(FixedDirection, direction=direction),
    )
