"""The mask: which single parameters may be edited, and how many of them at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import ArtifactError, MaskError
from ..models.language_model import LanguageModel
from ..models.provenance import find_mismatch
from ..utils.files import Json, expect
from ..utils.hub import Shareable
from ..utils.ranges import check_kinds, entrance, expect_kind
from ..utils.tensors import read_tensors, write_tensors
from ..utils.words import Shown

SCHEMA = 2

META = {
    "model?": str,
    "model_sha256?": str,
    "limit?": int,
    "budget?": float,
    "survive?": [str],
    "components?": [str],
}
"""What is checked of the header of a file; more may stand there."""


@dataclass(frozen=True, repr=False)
class Mask(Shown, Shareable):
    """Which single parameters of a model may be edited, and how many of them at once."""

    FILE: ClassVar[str] = "mask.safetensors"

    indices: dict[str, Int[Tensor, " _n"]]
    """Flat row-major positions in each Hugging Face weight, ``[out, in]``, ascending."""
    meta: dict[str, Json] = field(default_factory=dict)
    """Model hash, budget, components and how the parameters were chosen; ``refused`` of
    ``candidates`` weights cannot take the step that forgetting asks for without breaking the
    promise for ``survive``."""

    def __post_init__(self) -> None:
        check_kinds(self, MaskError)
        for name, index in self.indices.items():
            expect_kind(MaskError, f"indices[{str(name)[:60]!r}]", index, Tensor)
        if not self.indices or not self.n_parameters:
            raise MaskError("The mask is empty: no parameter is left to edit.")
        for name, index in self.indices.items():
            whole = index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
            if not whole or not (len(index) and index[0] >= 0 and (index.diff() > 0).all()):
                raise MaskError(
                    f"The positions of {name} must be whole numbers from 0 on, ascending; got "
                    f"{tuple(index.shape)} of {index.dtype}."
                )

    def told(self) -> dict[str, object]:
        """For its short form."""
        most = sorted(self.indices, key=lambda n: -len(self.indices[n]))[:3]
        return {
            "parameters": f"{self.n_parameters:,}",
            "weights": len(self.indices),
            "limit": f"{self.limit:,}",
            "most in": ", ".join(f"{n} ({len(self.indices[n]):,})" for n in most),
        }

    @property
    def n_parameters(self) -> int:
        """Parameters that may be edited."""
        return sum(len(i) for i in self.indices.values())

    @property
    def limit(self) -> int:
        """How many of them may be edited at once: the budget."""
        return int(self.meta.get("limit", self.n_parameters))

    @entrance(MaskError)
    def check_fits(self, model: LanguageModel) -> None:
        """Raise MaskError unless every index lies inside the model's weights."""
        for name, index in self.indices.items():
            size = model.weights[name].numel() if name in model.weights else 0
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise MaskError(f"The mask does not fit {model.name}: {name} has {size} elements.")
        if other := find_mismatch(self.meta, model):
            raise MaskError(f"The mask was made for another {other} than {model.name}.")

    @entrance(MaskError)
    def booleans(self, hf: nn.Module | LanguageModel) -> dict[str, Bool[Tensor, "*_shape"]]:
        """True where a parameter of a plain Hugging Face model may be edited, in its own shape.

        Arguments:
            hf: the model, as transformers loads it, or what `load_model` gives; all its parameters
                have an entry.

        Raises:
            MaskError: the mask does not fit the model.
        """
        out, hf = {}, hf.hf if isinstance(hf, LanguageModel) else hf
        parameters = dict(hf.named_parameters())
        if odd := sorted(self.indices.keys() - parameters.keys()):
            raise MaskError(f"The mask does not fit the model: it has no parameter {odd[0]}.")
        for name, parameter in parameters.items():
            module = hf.get_submodule(name.rpartition(".")[0])
            stored_in_out = type(module).__name__ == "Conv1D" and parameter.ndim == 2
            shape = parameter.shape[::-1] if stored_in_out else parameter.shape
            chosen = torch.zeros(parameter.numel(), dtype=torch.bool)
            index = self.indices.get(name)
            if index is not None:
                if not 0 <= int(index.min()) <= int(index.max()) < len(chosen):
                    raise MaskError(f"The mask does not fit the model: see {name}.")
                chosen[index] = True
            chosen = chosen.view(shape)
            out[name] = (chosen.T if stored_in_out else chosen).to(parameter.device)
        return out

    @entrance(MaskError)
    def save(self, path: Path | str) -> None:
        """Write safetensors; the metadata travels as JSON in the header.

        Raises:
            ResourceError: the disk is full, or the like.
        """
        indices = {n: i.to(torch.int32) for n, i in self.indices.items()}
        write_tensors(Path(path), "mask", SCHEMA, indices, self.meta)

    @classmethod
    @entrance(MaskError)
    def load(cls, path: Path | str) -> Mask:
        """Read a mask.

        Raises:
            ArtifactError: missing, damaged, changed since it was written, or not a mask.
        """
        tensors, meta = read_tensors(Path(path), "mask", SCHEMA)
        try:
            expect(meta, META, "its header")
            return cls({n: t.long() for n, t in tensors.items()}, meta)
        except ValueError as error:
            raise ArtifactError(f"{path} is not a readable mask: {error}") from error
