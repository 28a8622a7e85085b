"""RMU (Li et al. 2024, WMDP, arXiv 2403.03218): misdirect one layer's output on forget prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from ...errors import ConfigError
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, collate
from ...tasks.task import Task
from ..methods import RMU
from .dense import Objective

DEPTH = 7 / 32
"""The authors' layer 7 of a model of 32."""


def layer_output(
    model: LanguageModel, pairs: Sequence[Pair], layer: int
) -> Float[Tensor, "batch d_model"]:
    """The residual stream after a layer where the answer is predicted."""
    batch = collate(pairs, model.device)
    states = model.hf.base_model(
        input_ids=batch.clean, output_hidden_states=True, use_cache=False
    ).hidden_states
    return states[layer + 1][torch.arange(len(pairs)), batch.last]


def target(model: LanguageModel, scale: float, seed: int) -> Float[Tensor, " d_model"]:
    """c x a random unit vector: uniform entries in [0, 1), as the authors draw them."""
    random = torch.rand(model.d_model, generator=torch.Generator().manual_seed(seed))
    return (scale * random / random.norm()).to(model.device)


def rmu(model: LanguageModel, task: Task, config: RMU, seed: int = 0) -> Objective:
    """Loss = MSE(h, c u) on forget prompts + retain_weight x MSE(h, h_original) on retain prompts.

    h is the output of one layer at the last token of the prompt, which predicts the
    answer (of several tokens, the deciding one); c is ``config.scale``, the layer ``config.layer``,
    and u is drawn by ``seed``. Only weights up to that layer have a gradient. The units are those
    of the residual stream, squared.

    Raises:
        ConfigError: no such layer. The last layer's output is not offered: it comes normalised.
    """
    depth = model.architecture.n_layers
    layer = config.layer
    layer = round(DEPTH * depth) if layer is None else layer
    if not 0 <= layer < depth - 1:
        raise ConfigError(
            f"The layer of rmu must lie in [0, {depth - 1}) for {model.name}; got {layer}."
        )
    away = target(model, config.scale, seed)

    def forget(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        found = layer_output(student, pairs, layer)
        return mse_loss(found, away.expand_as(found))

    def retain(student: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad():
            want = layer_output(model, pairs, layer)
        return mse_loss(layer_output(student, pairs, layer), want)

    return Objective(forget, retain, config.retain_weight)
