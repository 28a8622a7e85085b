"""The classes of transformers that a model is made of, as names for annotations.

transformers takes seconds to import its models, and reading a circuit or a mask needs none of them.
So type checkers see its classes, and a running program sees what these are subclasses of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:
    from torch.nn import Module as PreTrainedModel

    PreTrainedConfig = PreTrainedTokenizerBase = object

__all__ = ["PreTrainedConfig", "PreTrainedModel", "PreTrainedTokenizerBase"]
