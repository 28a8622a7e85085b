"""The ledger of an edit, and its verification from two checkpoints alone.

A ledger is one safetensors file: for every edited weight ``NAME`` the tensors ``NAME|index`` (flat
row-major), ``NAME|old`` and ``NAME|new`` (in the checkpoint's dtype), and ``NAME|QUANTIZER`` (codes
before and after, counted from the lowest level). Its header is JSON: schema, the set, the hashes of
both checkpoints and of the mask, and a hash of its own tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..quantizers.gguf import Mix
from ..quantizers.registry import get_quantizer
from ..quantizers.survival import Survival, survival
from ..utils.files import Json, expect
from ..utils.tensors import read_tensors, tensors_sha256, write_tensors

SCHEMA = 2

META = {
    "survive": [str],
    "original_sha256?": str,
    "edited_sha256?": str,
    "mask_sha256?": str,
}
"""What is checked of the header of a file; more may stand there."""


def check_same_shape(original: LanguageModel, edited: LanguageModel) -> None:
    """Raise ArtifactError unless two checkpoints have the same weights by name and shape."""
    a = {n: tuple(w.shape) for n, w in original.weights.items()}
    b = {n: tuple(w.shape) for n, w in edited.weights.items()}
    odd = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
    if odd:
        raise ArtifactError(
            f"{edited.name} is not an edit of {original.name}: {odd[0]} is {b.get(odd[0])}, "
            f"expected {a.get(odd[0])} ({len(odd)} weights differ in name or shape)."
        )


def changed_elements(before: LanguageModel, after: LanguageModel) -> dict[str, int]:
    """How many elements of each weight differ."""
    return {n: int((w != after.weights[n].to(w.device)).sum()) for n, w in before.weights.items()}


def coded_names(model: LanguageModel) -> set[str]:
    """Weights whose codes count: the linear layers, and the embedding as if it were one."""
    return {*model.linear_names, model.embedding_name}


def weights_sha256(model: LanguageModel) -> str:
    """Hash of a model's weights as its checkpoint stores them, whatever the number of files."""
    return tensors_sha256({n: w.to(model.saved_dtype) for n, w in model.weights.items()})


@dataclass(frozen=True)
class Ledger:
    """Every edit of a run."""

    tensors: dict[str, Tensor]
    """See the module's text."""
    meta: dict[str, Json] = field(default_factory=dict)
    """``survive``, ``mask_sha256``; of both checkpoints the hash of their files
    (``original_sha256``, ``edited_sha256``), and of their weights, however cut into files
    (``original_weights_sha256``, ``edited_weights_sha256``)."""

    @property
    def n_edits(self) -> int:
        """Edited weights."""
        return sum(len(t) for n, t in self.tensors.items() if n.endswith("|index"))

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        original: LanguageModel,
        edited: LanguageModel,
        survive: Sequence[str],
        mask: Mask | None = None,
    ) -> Ledger:
        """Record what differs between two checkpoints.

        Raises:
            ArtifactError: they are not checkpoints of one architecture.
            ConfigError: unknown quantizer.
        """
        check_same_shape(original, edited)
        tensors: dict[str, Tensor] = {}
        coded = coded_names(original)
        for name, weight in original.weights.items():
            before, after = weight.cpu(), edited.weights[name].cpu()
            index = (before != after).flatten().nonzero()[:, 0]
            if not len(index):
                continue
            tensors[f"{name}|index"] = index.int()
            for key, whole in (("old", before), ("new", after)):
                tensors[f"{name}|{key}"] = whole.flatten()[index].to(edited.saved_dtype)
            for q in map(get_quantizer, survive):
                if name in coded and q.touches(before):
                    codes = [q.cells(w).codes[index] for w in (before, after)]
                    tensors[f"{name}|{q.name}"] = torch.stack(codes, 1).to(torch.uint8)
        return cls(
            tensors,
            {
                "survive": list(survive),
                "original_sha256": original.sha256,
                "edited_sha256": edited.sha256,
                "original_weights_sha256": weights_sha256(original),
                "edited_weights_sha256": weights_sha256(edited),
                "mask_sha256": tensors_sha256(mask.indices) if mask else "",
            },
        )

    def save(self, path: Path) -> None:
        """Write the ledger atomically.

        Raises:
            ResourceError: the disk is full, or the like.
        """
        write_tensors(path, "ledger", SCHEMA, self.tensors, self.meta)

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read a ledger.

        Raises:
            ArtifactError: missing, truncated, changed since it was written, or not a ledger.
        """
        tensors, meta = read_tensors(path, "ledger", SCHEMA)
        try:
            expect(meta, META, "its header")
            for key, value in tensors.items():
                _check_part(key, value, tensors)
        except ValueError as error:
            raise ArtifactError(f"{path} is not a readable ledger: {error}.") from error
        return cls(tensors, meta)


def _check_part(key: str, value: Tensor, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless a tensor of a ledger is as described in the module."""
    name, _, part = key.rpartition("|")
    index = tensors.get(f"{name}|index")
    if index is None or index.ndim != 1 or index.dtype != torch.int32:
        raise ValueError(f"{key} has no list of positions beside it")
    codes = part not in ("index", "old", "new")
    if value.shape != (len(index), *([2] if codes else [])) or (
        codes and value.dtype != torch.uint8
    ):
        raise ValueError(
            f"{key} is {tuple(value.shape)} of {value.dtype}, for {len(index)} positions"
        )


def delta(original: LanguageModel, edited: LanguageModel) -> Ledger:
    """The edit alone: a ledger without codes, from which `apply` makes the edited checkpoint.

    Raises:
        ArtifactError: not checkpoints of one architecture and dtype, or no weight differs.
    """
    if original.saved_dtype != edited.saved_dtype:
        raise ArtifactError(
            f"{original.name} is stored as {original.saved_dtype} and {edited.name} as "
            f"{edited.saved_dtype}: a delta needs checkpoints of one dtype."
        )
    found = Ledger.of(original, edited, ())
    if not found.n_edits:
        raise ArtifactError(f"{edited.name} and {original.name} have the same weights.")
    return found


@torch.no_grad()
def apply(original: LanguageModel, ledger: Ledger) -> LanguageModel:
    """The edited model that a ledger records, bit for bit.

    Arguments:
        original: the checkpoint that the ledger was made for.
        ledger: from a run, or from `delta`.

    Raises:
        ArtifactError: another original, a ledger that does not fit it, or another outcome than it
            promises.
    """
    recorded = ledger.meta.get("original_weights_sha256")
    if not recorded:
        raise ArtifactError("The ledger lacks the hash of its original: make a new one (delta).")
    if recorded != weights_sha256(original):
        raise ArtifactError(
            f"The ledger belongs to another original than {original.name}: its weights differ."
        )
    edited = original.copy()
    _put(edited, ledger, "new")
    if weights_sha256(edited) != ledger.meta.get("edited_weights_sha256"):
        raise ArtifactError("The ledger's edits do not give the weights that it promises.")
    return edited


def made_for(edited: LanguageModel, survive: Collection[str], quantizer: str) -> bool:
    """Whether an edit that was made to survive a set was made for a quantizer: it is in the set,
    or every type that a mix consists of is.

    Raises:
        ConfigError: unknown quantizer.
    """
    kind = get_quantizer(quantizer)
    kinds = (
        {q.name for q in kind.fit(edited, ()).values()} if isinstance(kind, Mix) else {kind.name}
    )
    return kinds <= set(survive)


@torch.no_grad()
def unpromised(edited: LanguageModel, ledger: Ledger, quantizer: str) -> Survival | None:
    """What a quantizer makes of an edit that was not `made_for` it; None: it was.

    Arguments:
        edited: the edited checkpoint.
        ledger: of it; the original is rebuilt from the old values there.
        quantizer: a name.

    Raises:
        ArtifactError: the ledger does not fit the checkpoint.
        ConfigError: unknown quantizer.
    """
    if made_for(edited, ledger.meta["survive"], quantizer):
        return None
    if ledger.meta.get("edited_weights_sha256") != weights_sha256(edited):
        raise ArtifactError(f"The ledger beside {edited.name} is of another checkpoint.")
    original = edited.copy()
    _put(original, ledger, "old")
    return survival(original, edited, quantizer)


def _put(model: LanguageModel, ledger: Ledger, kind: str) -> None:
    """Write the old or new values of a ledger into a model's weights.

    Raises:
        ArtifactError: it does not fit.
    """
    for key, index in ledger.tensors.items():
        name, _, part = key.rpartition("|")
        if part != "index":
            continue
        values = ledger.tensors.get(f"{name}|{kind}")
        size = model.weights[name].numel() if name in model.weights else 0
        fits = values is not None and values.shape == index.shape and index.ndim == 1 and len(index)
        if values is None or not fits or not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ArtifactError(f"The ledger does not fit {model.name}: see {name}.")
        weight = model.weights[name].view(-1)
        weight[index.long().to(weight.device)] = values.to(weight)
