"""Verification of an edit from two checkpoints, a ledger and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..masks.floor import quantizer_set
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..quantizers.survival import Survival, survival, survival_elsewhere
from ..utils.tensors import tensors_sha256
from .deployed import compare_deployed
from .ledger import Ledger, changed_elements, check_same_shape, coded_names


@dataclass(frozen=True)
class Verification:
    """What two checkpoints say about a promise."""

    rows: dict[str, Survival]
    """Per quantizer of the set; then, as `int4-g32 in bfloat16`, in other libraries and in the
    arithmetic of the checkpoints' dtype."""
    embedding: dict[str, Survival]
    """The same of the input embedding, were it quantized, too; empty if it is not edited."""
    outside: int
    """Values that differ elsewhere (norms, biases, an unembedding of its own), where nothing is
    promised."""
    changed: list[str]
    """What differs beside the weights: configuration, tokenizer, templates, buffers."""
    uncovered: list[str]
    """What is deployed and was not compared."""
    mismatches: list[str]
    """Where the ledger or the mask disagrees with the checkpoints."""
    edited: int
    """Weights that differ."""

    @property
    def holds(self) -> bool:
        """There is an edit, all of it survives every quantizer, no other code changes, and nothing
        else that is deployed differs."""
        return (
            bool(self.edited)
            and not self.outside
            and not self.changed
            and all(
                r.survived == r.edited and not r.collateral
                for r in (*self.rows.values(), *self.embedding.values())
            )
        )

    @property
    def status(self) -> int:
        """Exit status: 0 holds, 3 the promise is broken, 4 ledger or mask do not belong to it."""
        return 4 if self.mismatches else 0 if self.holds else 3


def _mask_mismatches(mask: Mask, ledger: Ledger, original: LanguageModel) -> list[str]:
    out = []
    sha = mask.meta.get("model_sha256")
    if sha and sha != original.sha256:
        out.append("the mask was made for another original")
    beyond = 0
    for name, index in ledger.tensors.items():
        if name.endswith("|index"):
            allowed = mask.indices.get(name.removesuffix("|index"), torch.zeros(0))
            beyond += int((~torch.isin(index.long(), allowed)).sum())
    if beyond:
        out.append(f"{beyond} edits lie outside the mask")
    return out


def verify(
    original: LanguageModel,
    edited: LanguageModel,
    survive: Sequence[str] = (),
    ledger: Ledger | None = None,
    mask: Mask | None = None,
) -> Verification:
    """Recompute survival and collateral from two checkpoints, compare what else is deployed, and
    hold a ledger and a mask to them.

    Arguments:
        original: before the edit.
        edited: after it.
        survive: the set; default: the ledger's, or nf4.
        ledger: what the run recorded.
        mask: where the run may edit.

    Raises:
        ArtifactError: not checkpoints of one architecture.
        ConfigError: unknown quantizer, or one that allows no promise.
    """
    check_same_shape(original, edited)
    names = list(survive) or (ledger.meta.get("survive") if ledger else None) or ["nf4"]
    survivors = quantizer_set(names)
    rows = {q.name: survival(original, edited, q) for q in survivors}
    for q in survivors:
        there = survival_elsewhere(original, edited, q)
        rows |= {f"{q.name} {where}": row for where, row in there.items()}
    moved, coded = changed_elements(original, edited), coded_names(original)
    embedding = {}
    if moved[original.embedding_name]:
        embedding = {q.name: survival(original, edited, q, embedding=True) for q in survivors}
    outside = sum(k for n, k in moved.items() if n not in coded)
    mismatches: list[str] = []
    found = Ledger.of(original, edited, ledger.meta.get("survive", []) if ledger else [])
    if ledger:
        for key, model in (("original", original), ("edited", edited)):
            recorded = ledger.meta.get(f"{key}_sha256")
            if recorded and model.sha256 != recorded:
                mismatches.append(f"the ledger is of another {key} checkpoint (its hash differs)")
        if tensors_sha256(found.tensors) != tensors_sha256(ledger.tensors):
            mismatches.append(
                f"the ledger records {ledger.n_edits} edits, the checkpoints show {found.n_edits}, "
                "and they are not the same"
            )
        recorded = ledger.meta.get("mask_sha256")
        if mask and recorded and tensors_sha256(mask.indices) != recorded:
            mismatches.append("the mask is not the one that the ledger names")
    if mask:
        mismatches += _mask_mismatches(mask, found, original)
    also = compare_deployed(original, edited)
    return Verification(
        rows,
        embedding,
        outside=outside,
        changed=also.changed,
        uncovered=also.uncovered,
        mismatches=mismatches,
        edited=sum(moved.values()),
    )
