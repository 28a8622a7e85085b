"""Rules for the backward pass: what stands in the place of the gradient.

Scores multiply what a writer adds with the metric's gradient at a reader. A gradient misjudges
what a large change does: a norm and a softmax compensate for it, and of a product each factor gets
the whole effect. Two papers put other coefficients in its place. The values of the forward pass
stay bit for bit: a value y becomes ``stop(y) + (s - stop(s))``, whose gradient is that of s.

GIM (Edin et al. 2025, arXiv 2505.17630), as in the authors' package:

- norms: the scale 1 / sqrt(mean square + eps) is a constant; LayerNorm still subtracts the mean.
- softmax of attention: the gradient is ``p (g - <p, g>)`` with p the softmax at temperature 2 of
  the same scores, without the factor 1 / 2 of its chain rule.
- products: the gradient at queries and keys counts a quarter, at values, and at gate and up
  projections, half.

RelP (Jafari et al. 2025, arXiv 2508.21258), with the rules of its table:

- norms: as above (LN-rule).
- attention: the pattern is a constant (AH-rule), so that edges into queries and keys score 0. The
  example in the authors' package leaves this rule out; the table has it.
- activation functions: output / input is a constant (identity rule).
- gate times up: each factor gets half of the gradient (half rule).

Not in either paper as far as we could read them, and left to the gradient: the tanh that caps
scores or logits (Gemma 2). Norms of queries and keys (Qwen3, Gemma 3) and norms behind a component
count as norms. The norm in front of a reader is differentiated apart from the model
(`attribution._add_scores`), by the same rule (`Rules.norm`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CircuitError
from ..models.hook_points import Component, Hook, HookPoint
from ..models.hooked import HookedStream
from ..models.stream import Stream, widen

TEMPERATURE = 2.0
"""Of GIM's softmax."""
GIM_SHARES = {"q": 0.25, "k": 0.25, "v": 0.5}
"""Of GIM's gradient at the projections."""
FITS = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far a norm or a pattern may be from its formula, relative to its size; else `ROUGH`."""
ROUGH = 0.05

Norm = Callable[[Tensor], Tensor]


def straight(
    value: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The value, with the gradient of the surrogate."""
    surrogate = surrogate.to(value.dtype)
    return value.detach() + (surrogate - surrogate.detach())


def share(value: Float[Tensor, "*shape"], part: float) -> Float[Tensor, "*shape"]:
    """The value, with a part of its gradient."""
    return straight(value, part * value)


def frozen(norm: Norm) -> Norm:
    """A LayerNorm or RMSNorm whose scale counts as a constant.

    Gain, bias and whether the mean is subtracted are read off the norm's own values, so that every
    implementation will do: with a vector v of mean 0, norm(v) and norm(-v) differ by twice the
    gain, up to a factor. The scale at x is the number that makes both sides of
    ``norm(x) - bias = scale * gain * x`` equal.

    Arguments:
        norm: over the last dimension of ``[..., d]``.

    Returns:
        The function with the same values.

    Raises:
        CircuitError: later, if the norm is of another kind.
    """

    def held(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        with torch.no_grad():
            value = norm(x)
            like = x[:1] if x.ndim > 1 else x
            signs = 1.0 - 2.0 * (torch.arange(x.shape[-1], device=x.device) % 2)
            v = (signs - signs.mean()).to(x.dtype).expand(like.shape)
            plus, minus, moved = (widen(norm(p)) for p in (v, -v, v + 2))
            gain, bias = (plus - minus) / 2 / widen(v), (plus + minus) / 2
            centred = bool((moved - plus).norm() < 0.1 * (plus - bias).norm())
            line = gain * _centre(widen(x), centred)
            target = widen(value) - bias
            square = line.square().sum(-1, keepdim=True).clamp_min(1e-30)
            scale = (line * target).sum(-1, keepdim=True) / square
            off = float((scale * line - target).norm() / target.norm().clamp_min(1e-12))
        if not off <= FITS.get(value.dtype, ROUGH):
            raise CircuitError(
                f"{type(norm).__name__} differs by {off:.2g} of its size from a LayerNorm or "
                "RMSNorm, so what its scale is, is not known. Use rules='gradient'."
            )
        return straight(value, gain * scale * _centre(widen(x), centred) + bias)

    return held


def _centre(x: Float[Tensor, "*rows d"], centred: bool) -> Float[Tensor, "*rows d"]:
    return x - x.mean(-1, keepdim=True) if centred else x


def softer(
    scores: Float[Tensor, "*rows key"], temperature: float = TEMPERATURE
) -> Float[Tensor, "*rows key"]:
    """What has GIM's gradient of softmax(scores): J at a higher temperature, without its factor."""
    return temperature * (scores / temperature).softmax(-1)


def _ratio(
    value: Float[Tensor, "*shape"], over: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """value / over as a constant; 0 where both are 0."""
    value, over = value.detach(), over.detach()
    return torch.where(over == 0, torch.zeros_like(over), value / torch.where(over == 0, 1, over))


@dataclass(frozen=True)
class Rules:
    """One rule on one model.

    Arguments:
        name: ``gradient``, ``gim`` or ``relp``.
        stream: of the model.

    Raises:
        CircuitError: the rule does not reach all parts of this model.
    """

    name: str
    stream: Stream

    def __post_init__(self) -> None:
        if self.name == "gradient":
            return
        stream, known = self.stream, self.stream.bridge.hook_dict
        if isinstance(stream, HookedStream):
            self._refuse("it is a HookedTransformer; give the model of transformers or its name")
        if stream.model.routed:
            self._refuse("its MLPs are mixtures of experts")
        whole = [n for n in known if n.endswith(".hook_normalized")]
        wrapped = {id(self._module(n).original_component) for n in whole}
        for block in stream.blocks:
            for name, module in block.named_modules():
                leaf = not any(True for _ in module.children())
                if leaf and type(module).__name__.endswith("Norm") and id(module) not in wrapped:
                    self._refuse(f"TransformerLens does not wrap its {name.split('.')[-1]}")

    def _refuse(self, why: str) -> NoReturn:
        raise CircuitError(
            f"{self.stream.model.name}: rules={self.name!r} do not fit: {why}. "
            "Use rules='gradient'."
        )

    def _module(self, hook_point: str) -> Component:
        """The component that a hook point belongs to."""
        found = self.stream.bridge
        for part in hook_point.split(".")[:-1]:
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    def norm(self, layer: int, mlp: bool) -> Norm:
        """`Stream.norm`, by the rule."""
        norm = self.stream.norm(layer, mlp)
        return norm if self.name == "gradient" else frozen(norm)

    def hooks(self) -> tuple[list[tuple[str, Hook]], list[tuple[str, Hook]]]:
        """Hooks for one forward pass: those that put a value in the place of another, to stand
        before whatever records it, and those that look at or weigh what was recorded."""
        first: list[tuple[str, Hook]] = []
        then: list[tuple[str, Hook]] = []
        if self.name == "gradient":
            return first, then
        seen: dict[str, Tensor] = {}

        def look(value: Tensor, hook: HookPoint) -> None:
            seen[str(hook.name)] = value

        for point in self.stream.bridge.hook_dict:
            if point.endswith(".hook_normalized"):
                part = point.removesuffix(".hook_normalized")
                then.append((f"{part}.hook_in", look))
                first.append((f"{part}.hook_out", self._freeze(f"{part}.hook_in", point, seen)))
        for i in range(self.stream.n_layers):
            attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
            then.append((f"{attn}.hook_attn_scores", look))
            first.append((f"{attn}.hook_pattern", self._pattern(attn, seen)))
            if self.name == "gim":
                for kind, part in GIM_SHARES.items():
                    then.append((self.stream.projected(i, kind), _weigh(part)))
            gated = hasattr(self.stream.blocks[i].mlp, "gate")
            inputs = [f"{mlp}.{part}.hook_out" for part in (("gate", "in") if gated else ("in",))]
            then += [(name, look) for name in inputs]
            first.append((self.stream.neurons(i), self._neurons(inputs, seen)))
        return first, then

    def _freeze(self, read: str, point: str, seen: dict[str, Tensor]) -> Hook:
        norm = frozen(self._module(point).original_component)

        def hook_fn(value: Tensor, hook: HookPoint) -> Tensor:
            return straight(value, norm(seen[read]))

        return hook_fn

    def _pattern(self, attn: str, seen: dict[str, Tensor]) -> Hook:
        def hook_fn(value: Tensor, hook: HookPoint) -> Tensor:
            scores = seen.pop(f"{attn}.hook_attn_scores", None)
            if scores is None:
                self._refuse("TransformerLens does not compute its attention itself")
            off = widen(scores.detach()).softmax(-1) - widen(value.detach())
            if not float(off.abs().max()) <= FITS.get(value.dtype, ROUGH):
                self._refuse("its attention pattern is not the softmax of its scores")
            return share(value, 0.0) if self.name == "relp" else straight(value, softer(scores))

        return hook_fn

    def _neurons(self, inputs: list[str], seen: dict[str, Tensor]) -> Hook:
        """The neurons from what goes into them: activation(in), or activation(gate) times up."""

        def hook_fn(value: Tensor, hook: HookPoint) -> Tensor:
            parts = [seen.pop(name) for name in inputs if name in seen]
            if [x.shape for x in parts] != [value.shape] * len(inputs):
                self._refuse("the inputs of its neurons have no hook points of their own")
            if len(parts) == 2 and self.name == "gim":
                return share(value, 0.5)  # of either factor
            if self.name == "gim":
                return value
            shares = torch.stack([x * _ratio(value, x) for x in parts])
            return straight(value, shares.mean(0))

        return hook_fn


def _weigh(part: float) -> Hook:
    return lambda value, hook: share(value, part)
