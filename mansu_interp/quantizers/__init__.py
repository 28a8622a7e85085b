"""Post-training quantizers: their cells, their real round trip, and what survives them.

One file per library behind one interface (`Quantizer`). An edit survives when it changes the
code, and is free of collateral when no other code changes.
"""

from .base import Cells, Quantizer
from .bitsandbytes import NF4, FourBit, Int8
from .registry import QUANTIZERS, get_quantizer
from .survival import Survival, quantize, survival

__all__ = [
    "NF4",
    "QUANTIZERS",
    "Cells",
    "FourBit",
    "Int8",
    "Quantizer",
    "Survival",
    "get_quantizer",
    "quantize",
    "survival",
]
