"""The models that MANSU trains: full precision, and what each quantizer makes of it.

The cells of an exact quantizer do not move, so that what it makes of an edit is known element by
element. A fitted one (llama.cpp's K-quants, GPTQ) chooses scales and roundings anew by all that was
edited: its model is quantized again, by the library itself, whenever it has its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...masks.floor import Set, quantizer_set
from ...models.language_model import LanguageModel
from ...quantizers.base import Quantizer
from ...quantizers.packed import Packed
from ...quantizers.registry import fitted_quantizers
from ...quantizers.survival import quantize


@dataclass
class _Shelved:
    """A quantized model that is not in use."""

    packed: dict[str, Packed | Tensor]
    """Its weights before all edits."""
    edits: dict[int, tuple[dict[str, Tensor], Tensor]] = field(default_factory=dict)
    """Flat positions by weight, and the values there, weight after weight."""


class Students(Sequence[LanguageModel]):
    """A model and what each quantizer makes of it; indexing gives one, full precision first.

    All quantized models have their linear weights in the same memory: at most one exists at a time,
    until another is asked for, and the others are kept as codes and the values of their edits. What
    no quantizer touches is the full-precision model's own, in all.

    Arguments:
        model: full precision; changed in place by `write`.
        survive: exact quantizers, at least one; the students have the order of `quantizer_set`.
        through: fitted quantizers, whose students come after those.
        calibration: see `quantize`; calibrated quantizers alone look.

    Raises:
        ConfigError: see `quantizer_set`, `fitted_quantizers` and `Quantizer.fit`.
    """

    def __init__(
        self,
        model: LanguageModel,
        survive: Set,
        through: Sequence[str] = (),
        calibration: Sequence[Sequence[int]] = (),
    ) -> None:
        self.full, self.quantizers = model, quantizer_set(survive)
        self.fitted, self.calibration = fitted_quantizers(through), calibration
        self._shelf: list[_Shelved] = []
        self._in_use = 0
        if len(self.quantizers) == 1 and not self.fitted:  # nothing to take turns with
            self._quantized = quantize(model, self.quantizers[0], sharing=True)
            self._shelf, self._in_use = [_Shelved({})], 1
        else:
            names = model.linear_names
            self._shelf = [
                _Shelved({n: packed(q, w) for n in names if q.touches(w := model.weights[n])})
                for q in self.quantizers
            ]
            for q in self.fitted:
                made = {}
                for name, layer in q.fit(model, calibration).items():
                    weight = model.weights[name]
                    made[name] = layer.round_trip(weight.cpu()).to(weight)
                self._shelf.append(_Shelved(made))
            touched = {n for x in self._shelf for n in x.packed}
            self._quantized = model.copy(sharing=set(model.weights) - touched)
            self._own = {n: self._quantized.weights[n] for n in touched}

    def __len__(self) -> int:
        return 1 + len(self._shelf)

    def __getitem__(self, side: int) -> LanguageModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Full precision (0), or what the quantizer of that number, from 1 on, makes of it: valid
        until another quantized one is asked for, and a fitted one until full precision is written.
        """
        if not 0 <= side < len(self):
            raise IndexError(side)
        if side and side != self._in_use:
            self._take(side) if side <= len(self.quantizers) else self._fit(side)
            self._in_use = side
        return self._quantized if side else self.full

    @torch.no_grad()
    def _fit(self, side: int) -> None:
        """Quantize the edited model."""
        layers = self.fitted[side - 1 - len(self.quantizers)].fit(self.full, self.calibration)
        for name, weight in self._own.items():
            layer = layers.get(name)
            full = self.full.weights[name]
            weight.copy_(full if layer is None else layer.round_trip(full.cpu()))

    def unedited(self, side: int) -> LanguageModel:
        """One of the quantized models; a fitted one as its quantizer made it of the original, but
        for weights that it leaves alone. Valid until another one is asked for."""
        if side <= len(self.quantizers):
            return self[side]
        self._take(side)
        self._in_use = 0
        return self._quantized

    @torch.no_grad()
    def _take(self, side: int) -> None:
        """Make a quantized model anew from its codes and edits."""
        shelved = self._shelf[side - 1]
        for name, weight in self._own.items():
            kept = shelved.packed.get(name)
            if isinstance(kept, Packed):
                kept.unpack(weight)
            else:
                weight.copy_(self.full.weights[name] if kept is None else kept)
        for indices, values in shelved.edits.values():
            put(self._quantized, indices, values)

    @torch.no_grad()
    def write(
        self,
        side: int,
        key: int,
        indices: dict[str, Int[Tensor, " _m"]],
        values: Float[Tensor, " n"],
    ) -> None:
        """Write values of some elements into one of the models.

        Arguments:
            side: full precision, or which of the exact quantizers.
            key: the number of these elements: the same elements again take the place of the last
                values.
            indices: flat positions by weight.
            values: weight after weight.
        """
        if not side:
            put(self.full, indices, values)
            if self._in_use > len(self.quantizers):
                self._in_use = 0  # fitted to what was there before
            return
        self._shelf[side - 1].edits[key] = indices, values
        if side == self._in_use:
            put(self._quantized, indices, values)


def packed(
    quantizer: Quantizer, weight: Float[Tensor, "out in"]
) -> Packed | Float[Tensor, "out in"]:
    """What a quantizer makes of a weight, as codes if they give it back."""
    on_cpu = weight.cpu()
    wanted = quantizer.round_trip(on_cpu)
    codes = Packed.of(quantizer, on_cpu, wanted)
    return wanted.to(weight) if codes is None else codes.to(weight.device)


@torch.no_grad()
def put(
    model: LanguageModel, indices: dict[str, Int[Tensor, " _m"]], values: Float[Tensor, " n"]
) -> None:
    """Write values into some elements of a model's weights, weight after weight. Edits are exact in
    the weights' dtype; what a quantizer makes of them is rounded to it."""
    parts = values.split([len(i) for i in indices.values()])
    for (name, index), part in zip(indices.items(), parts, strict=True):
        weight = model.weights[name].view(-1)
        weight[index] = part.to(weight.dtype)
