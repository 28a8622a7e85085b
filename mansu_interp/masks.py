"""From a circuit to parameters: which single weights may be edited.

A component maps to a slice of a weight in the deployed ``[out, in]`` layout:

===================  ===============================================================
``q``/``k``/``v``    the head's rows of the q/k/v projection
head output          the head's columns of the output projection
``mlp`` as reader    gate and up projection
``mlp`` as writer    down projection
``input``            the forget subjects' own rows of the embedding, if asked for
===================  ===============================================================

Inside the circuit's weights single parameters are chosen by expected forget gain per expected
retain damage of the step that the magnitude floor will impose: one whole quantizer cell against
the forget gradient (ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .artifacts import expect
from .errors import ArtifactError, MaskError
from .floor import Set, floor, floor_step, quantizer_set
from .graph import Node
from .hub import Shareable
from .layout import head_slice, mlp_weights
from .models import LanguageModel
from .pairs import Pair
from .provenance import stranger
from .tensors import read_tensors, write_tensors

SCHEMA = 1
POOL = 6
"""Candidates per parameter of the budget: which of them are edited is settled while unlearning."""
DAMPING = 100.0
"""Median damages below which damage hardly counts in the choice of parameters."""
META = {
    "model?": str,
    "model_sha256?": str,
    "limit?": int,
    "budget?": float,
    "survive?": [str],
    "components?": [str],
}
"""What is checked of the header of a file; more may stand there."""


def component_slices(
    model: LanguageModel, node: Node, writes: bool
) -> list[tuple[str, str, slice]]:
    """(weight name, ``rows`` or ``cols``, slice) behind a node.

    Arguments:
        model: a decoder whose weights `layout` knows.
        node: a reader, or with ``writes`` a writer.
        writes: for an MLP, its output (down) rather than its input (gate, up).

    Raises:
        ModelError: no weight of a known name, or a fused one of unknown order.
    """
    if node.kind in ("input", "logits"):
        return []  # see `subject_rows`; the unembedding is never edited
    names, arch = model.linear_names, model.architecture
    if node.kind == "mlp":
        return [(n, "rows", slice(None)) for n in mlp_weights(names, node.layer, writes)]
    return [
        head_slice(model.hf, names, node.layer, node.kind, node.head, arch.n_heads, arch.n_kv_heads)
    ]


def region(
    model: LanguageModel, components: Iterable[tuple[Node, bool]]
) -> dict[str, Bool[Tensor, "out in"]]:
    """Where the weights of some components lie, as boolean tensors."""
    out: dict[str, Bool[Tensor, "out in"]] = {}
    for node, writes in components:
        for name, axis, where in component_slices(model, node, writes):
            mask = out.setdefault(name, torch.zeros_like(model.weights[name], dtype=torch.bool))
            if axis == "rows":
                mask[where] = True
            else:
                mask[:, where] = True
    return out


def subject_tokens(pairs: Iterable[Pair]) -> list[int]:
    """Tokens that tell the pairs' subjects from others: those of the clean prompts in whose place
    the corrupt ones have others."""
    return sorted({a for p in pairs for a, b in zip(p.clean, p.corrupt, strict=True) if a != b})


def subject_rows(
    model: LanguageModel, pairs: Iterable[Pair], survive: Set = "nf4"
) -> Int[Tensor, " n"]:
    """Flat positions, in the embedding, of the rows of `subject_tokens`, but for elements that the
    floor lets move neither way."""
    weight = model.weights[model.embedding_name]
    own, width = torch.tensor(subject_tokens(pairs)), weight.shape[1]
    index = (own[:, None] * width + torch.arange(width)).flatten()
    where = floor(weight, survive, model.saved_dtype, index.to(model.device))
    return index[~(where.up.isnan() & where.down.isnan()).cpu()]


@dataclass(frozen=True)
class Mask(Shareable):
    """Which single parameters of a model may be edited, and how many of them at once."""

    FILE: ClassVar[str] = "mask.safetensors"

    indices: dict[str, Int[Tensor, " n"]]
    """Flat row-major positions in each Hugging Face weight, ``[out, in]``, ascending."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Model hash, budget, components and how the parameters were chosen; ``refused`` of
    ``candidates`` weights cannot take the step that forgetting asks for without breaking the
    promise for ``survive``."""

    def __post_init__(self) -> None:
        if not self.indices or not self.n_parameters:
            raise MaskError("The mask is empty: no parameter is left to edit.")
        for name, index in self.indices.items():
            whole = index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
            if not whole or not (len(index) and index[0] >= 0 and (index.diff() > 0).all()):
                raise MaskError(
                    f"The positions of {name} must be whole numbers from 0 on, ascending; got "
                    f"{tuple(index.shape)} of {index.dtype}."
                )

    @property
    def n_parameters(self) -> int:
        """Parameters that may be edited."""
        return sum(len(i) for i in self.indices.values())

    @property
    def limit(self) -> int:
        """How many of them may be edited at once: the budget."""
        return int(self.meta.get("limit", self.n_parameters))

    def check_fits(self, model: LanguageModel) -> None:
        """Raise MaskError unless every index lies inside the model's weights."""
        for name, index in self.indices.items():
            size = model.weights[name].numel() if name in model.weights else 0
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise MaskError(f"The mask does not fit {model.name}: {name} has {size} elements.")
        if other := stranger(self.meta, model):
            raise MaskError(f"The mask was made for another {other} than {model.name}.")

    def booleans(self, hf: Any) -> dict[str, Bool[Tensor, ...]]:
        """True where a parameter of a plain Hugging Face model may be edited, in its own shape.

        Arguments:
            hf: the model, as transformers loads it; all its parameters have an entry.

        Raises:
            MaskError: the mask does not fit the model.
        """
        out = {}
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

    def save(self, path: Path) -> None:
        """Write safetensors; the metadata travels as JSON in the header.

        Raises:
            ResourceError: the disk is full, or the like.
        """
        write_tensors(
            path, "mask", SCHEMA, {n: i.to(torch.int32) for n, i in self.indices.items()}, self.meta
        )

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a mask.

        Raises:
            ArtifactError: missing, damaged, changed since it was written, or not a mask.
        """
        tensors, meta = read_tensors(path, "mask", SCHEMA)
        try:
            expect(meta, META, "its header")
            return cls({n: t.long() for n, t in tensors.items()}, meta)
        except ValueError as error:
            raise ArtifactError(f"{path} is not a readable mask: {error}") from error


def choose_parameters(
    model: LanguageModel,
    regions: dict[str, Bool[Tensor, "out in"]],
    budget: float,
    forget_gradient: Mapping[str, Tensor],
    retain_fisher: Mapping[str, Tensor] | None = None,
    retain_gradient: Mapping[str, Tensor] | None = None,
    survive: Set = "nf4",
    damping: float = DAMPING,
    hold: float = 1.0,
    besides: Mapping[str, Int[Tensor, " n"]] | None = None,
) -> Mask:
    """The parameters with the best forget gain per retain damage, up to a budget.

    For the floor's step d of each single weight, gain = -(g_f + hold g_r) . d and damage =
    1/2 F d^2; the score is gain / (damage + damping x median damage). The retain gradient counts
    with its sign: what forgets an answer of the forget set and its near neighbours' alike gains
    nothing.

    Arguments:
        model: the model to edit.
        regions: candidate weights, from `region`.
        budget: share of all the model's parameters that may be edited, in (0, 1].
        forget_gradient: gradient of the forget loss per candidate weight; like the two below a
            dictionary, or a `ByLayer`, which holds one layer at a time.
        retain_fisher: diagonal Fisher of what must stay; None: no damage is counted.
        retain_gradient: gradient of the loss of retained answers; None counts as 0.
        survive: the set of quantizers whose cells define the step.
        hold: weight of the retain gradient.
        damping: keeps weights of no measured damage from winning on no gain.
        besides: flat positions in other weights that are candidates whatever their score.

    Raises:
        MaskError: budget out of range, or no candidate can move.
    """
    if not 0 < budget <= 1:
        raise MaskError(f"The budget is a share of all parameters in (0, 1]; got {budget}.")
    quantizers = quantizer_set(survive)
    refused = candidates = 0
    gains, damages, places = [], [], []
    for name, inside in regions.items():
        weight, g = model.weights[name], forget_gradient[name]
        step = floor_step(weight, g, quantizers, model.saved_dtype)
        wanted = inside & (g != 0)
        candidates += int(wanted.sum())
        refused += int((wanted & (step == 0)).sum())
        usable = (inside & (step != 0)).flatten().nonzero()[:, 0]
        d = step.flatten()[usable]
        if retain_gradient is not None:
            g = g + hold * retain_gradient[name]
        gains.append(-g.flatten()[usable] * d)
        if retain_fisher is not None:
            damages.append(0.5 * retain_fisher[name].flatten()[usable] * d * d)
        places.append((name, usable))
    gain = torch.cat(gains) if gains else torch.zeros(0)
    if not len(gain) or not (gain > 0).any():
        raise MaskError("No parameter of the circuit can move by a whole cell towards forgetting.")
    score = gain
    if damages:
        damage = torch.cat(damages)
        score = gain / (damage + damping * damage.median().clamp_min(1e-30)).clamp_min(1e-30)
    limit = max(1, int(budget * model.n_parameters))
    n = min(POOL * limit, int((gain > 0).sum()))
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.topk(n).indices] = True
    indices: dict[str, Tensor] = {}
    for (name, usable), picked in zip(
        places, chosen.split([len(u) for _, u in places]), strict=True
    ):
        if picked.any():
            indices[name] = usable[picked].cpu()
    indices |= besides or {}
    return Mask(
        indices,
        {
            "model": model.name,
            "model_sha256": model.sha256,
            "budget": budget,
            "limit": min(limit, sum(map(len, indices.values()))),
            "survive": [q.name for q in quantizers],
            "refused": refused,
            "candidates": candidates,
        },
    )


def random_mask(model: LanguageModel, budget: float, seed: int = 0, survive: Set = "nf4") -> Mask:
    """As many candidates as `choose_parameters` takes, drawn from every linear weight: an ablation.

    Arguments:
        model: the model to edit.
        budget: share of all the model's parameters that may be edited, in (0, 1].
        seed: of the draw.
        survive: the set of quantizers; what the floor lets move neither way is left out.

    Raises:
        MaskError: budget out of range.
    """
    if not 0 < budget <= 1:
        raise MaskError(f"The budget is a share of all parameters in (0, 1]; got {budget}.")
    quantizers = quantizer_set(survive)
    generator = torch.Generator().manual_seed(seed)
    floors = [floor(model.weights[n], quantizers, model.saved_dtype) for n in model.linear_names]
    movable = torch.cat([~(f.up.isnan() & f.down.isnan()).cpu() for f in floors])
    limit = max(1, int(budget * model.n_parameters))
    order = torch.randperm(len(movable), generator=generator)
    chosen = torch.zeros_like(movable)
    chosen[order[movable[order]][: POOL * limit]] = True
    parts = chosen.split([model.weights[n].numel() for n in model.linear_names])
    indices = {n: part.nonzero()[:, 0] for n, part in zip(model.linear_names, parts, strict=True)}
    return Mask(
        {n: index for n, index in indices.items() if len(index)},
        {
            "model": model.name,
            "model_sha256": model.sha256,
            "budget": budget,
            "limit": min(limit, int(chosen.sum())),
            "survive": [q.name for q in quantizers],
        },
    )
