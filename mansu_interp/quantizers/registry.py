"""Quantizers by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from ..utils.ranges import entrance
from ..utils.shipped import unknown_quantizer
from .base import Quantizer
from .bitsandbytes import FourBit, Int8
from .fitted import AutoRound, Hqq
from .gguf import EXACT, MIXES, Gguf, Mix
from .gptq import Gptq
from .quanto import Quanto
from .torchao import Int4, Nvfp4

BLOCKS = (64, 128, 256, 512)
GROUPS = (32, 64, 128)
_ALL: list[Quantizer] = [
    *(FourBit(k, b, d) for k in ("nf4", "fp4") for b in BLOCKS for d in (False, True)),
    Int8(),
    *(Int4(rule, g) for rule in ("asym", "sym", "tinygemm") for g in GROUPS),
    *(Gguf(name) for name in EXACT),
    *(Mix(name) for name in MIXES),
    Nvfp4(),
    Nvfp4(one_level=True),
    Quanto(),
    Hqq(),
    *(AutoRound(algorithm, g) for algorithm in ("awq", "autoround") for g in GROUPS),
    *(Gptq(group=g) for g in GROUPS),
]
QUANTIZERS: dict[str, Quantizer] = {q.name: q for q in _ALL}
"""Every quantizer, by the name that settings and the command line use, in small letters."""
THROUGH = tuple(n for n, q in QUANTIZERS.items() if not q.promises and not q.rescales)
"""Those that training can go through without a promise."""


@entrance(ConfigError)
def get_quantizer(name: str) -> Quantizer:
    """A quantizer by name, in any case.

    Raises:
        ConfigError: unknown name.
    """
    if name.lower() not in QUANTIZERS:
        raise ConfigError(unknown_quantizer(name, QUANTIZERS))
    return QUANTIZERS[name.lower()]


def fitted_quantizers(names: Sequence[str]) -> list[Quantizer]:
    """Quantizers that training can go through without a promise, by name, in one order, whatever
    the order in which they were named.

    Raises:
        ConfigError: unknown, one that an edit can be made to survive, or one that moves scales
            between layers.
    """
    found = [get_quantizer(name) for name in names]
    for q in found:
        if q.promises:
            raise ConfigError(
                f"An edit can be made to survive {q.name}: name it under survive, where that is "
                "promised, and leave it out of train_through."
            )
        if q.rescales:
            raise ConfigError(
                f"Training cannot go through {q.name}: it moves scales between layers, so that its "
                "weights are no longer those that are edited. Name it under quantizers to measure "
                "it."
            )
    return [q for q in QUANTIZERS.values() if q in found]
