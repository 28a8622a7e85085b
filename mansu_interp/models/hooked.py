"""Models that people hold: a name, or one of transformers, PEFT, bitsandbytes or TransformerLens.

Every public function takes them wherever it takes a model, and leaves them as they are. Two
functions make of them what this package works with, and nothing else looks:

- `as_model`, for circuits. A `HookedTransformer` computes with its own, possibly processed weights
  (folded norms, centred writes), so the scores are of these.
- `as_language_model`, for everything that reads, edits or quantizes the weights as they are
  deployed. Those of a `HookedTransformer` are not, and are refused; so are, by both, a bridge that
  processed its weights and an adapter over packed ones.

Nothing here imports transformer_lens or peft: 4.x has no `HookedTransformer`, and none is ever made
here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import CircuitError, ModelError
from ..utils.libraries import quiet
from ..utils.ranges import expect_kind
from .graph import Architecture, Graph
from .hook_points import Component
from .hugging_face import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    architecture_of,
    check_plain,
    has_experts,
)
from .language_model import LanguageModel
from .layout import is_packed, unwrapped
from .load import load_model, pick_dtype
from .stream import Reading, Stream, widen


@dataclass
class HookedModel:
    """A `HookedTransformer` with the few properties of a `LanguageModel` that attribution needs."""

    bridge: Component
    """The `HookedTransformer` itself."""
    sha256: str = ""

    @property
    def name(self) -> str:
        """As its configuration says."""
        return str(getattr(self.bridge.cfg, "model_name", None) or "HookedTransformer")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, if it has one."""
        return getattr(self.bridge, "tokenizer", None)

    @property
    def hf(self) -> nn.Module:
        """The module whose training mode counts."""
        return self.bridge

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.bridge.parameters()).device

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every parameter by its TransformerLens name."""
        return dict(self.bridge.named_parameters())

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.bridge.cfg.d_model

    @property
    def routed(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return bool(getattr(self.bridge.cfg, "num_experts", None))

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Rows of the embedding, and positions."""
        return self.bridge.cfg.d_vocab, self.bridge.cfg.n_ctx

    @cached_property
    def architecture(self) -> Architecture:
        """Layers, heads and block order."""
        c = self.bridge.cfg
        return Architecture(
            n_layers=c.n_layers,
            n_heads=c.n_heads,
            n_kv_heads=getattr(c, "n_key_value_heads", None) or c.n_heads,
            parallel=bool(c.parallel_attn_mlp),
        )

    @cached_property
    def graph(self) -> Graph:
        """All attribution edges."""
        return Graph(self.architecture)


@dataclass
class BridgedModel(HookedModel):
    """A `TransformerBridge` of TransformerLens 4, read as one that is made here."""

    @property
    def name(self) -> str:
        """As its configuration says."""
        return str(getattr(self.bridge.cfg, "model_name", None) or "TransformerBridge")

    @property
    def hf(self) -> nn.Module:
        """The model of transformers inside."""
        return self.bridge.original_model

    @cached_property
    def architecture(self) -> Architecture:
        """Layers, heads and block order."""
        return architecture_of(self.hf.config, self.name)  # pyright: ignore[reportArgumentType]

    @property
    def routed(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return has_experts(self.hf.config)  # pyright: ignore[reportArgumentType]


AnyModel = LanguageModel | HookedModel | nn.Module
"""What attribution reads: a `LanguageModel`, a ``PreTrainedModel`` of transformers, or a
`TransformerBridge` or `HookedTransformer` of TransformerLens; `entrance` makes one of a name."""


def view_of(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> LanguageModel:
    """A model of transformers as a `LanguageModel` over the same weights; it stays as it is.

    Arguments:
        hf: the model.
        tokenizer: that goes with it; texts need one.
    """
    check_plain(hf, type(hf).__name__)
    packed = {id(p): p for p in hf.parameters() if is_packed(p)}
    plain = {
        id(p): nn.Parameter(p.data, requires_grad=False)
        for p in hf.parameters()
        if id(p) not in packed
    }
    memo = {id(b): b for b in hf.buffers()} | plain | packed
    name = getattr(hf.config, "name_or_path", "") or type(hf).__name__
    return LanguageModel(str(name), copy.deepcopy(hf, memo), tokenizer)


def is_model(value: object) -> bool:
    """Whether a value is something that `as_model` takes."""
    if isinstance(value, tuple):
        return len(value) == 2 and isinstance(value[0], nn.Module) and is_model(value[0])
    names = {c.__name__ for c in type(value).__mro__}
    kinds = {"HookedTransformer", "TransformerBridge", "PreTrainedModel"}
    known = (str, Path, LanguageModel, HookedModel)
    return isinstance(value, known) or bool(names & kinds) or hasattr(value, "peft_config")


def as_model(model: object) -> LanguageModel | HookedModel:
    """A `LanguageModel` as it is; other models with the properties of one.

    Arguments:
        model: a model, its name or folder (loaded anew in every call), or a pair of a model of
            transformers and its tokenizer.

    Raises:
        CircuitError: no model.
        ModelError: a name that `load_model` does not know, or an adapter that cannot be merged.
    """
    if isinstance(model, (LanguageModel, HookedModel)):
        return model
    if not is_model(model):
        expect_kind(CircuitError, "model", model, LanguageModel)
    if isinstance(model, (str, Path)):
        return load_model(model)
    pair = model if isinstance(model, tuple) else (model, None)
    module, tokenizer = cast("tuple[nn.Module, PreTrainedTokenizerBase | None]", pair)
    names = {c.__name__ for c in type(module).__mro__}
    if "HookedTransformer" in names:
        return HookedModel(module)
    if "TransformerBridge" in names:
        if getattr(module, "_weights_processed", False):
            raise ModelError(
                "A TransformerBridge whose weights were processed (norms folded, writes centred) "
                "has neither the deployed weights nor all hook points. Give it before "
                "enable_compatibility_mode(), or the model of transformers, or its name."
            )
        return BridgedModel(module)
    module = merged(module) if hasattr(module, "merge_and_unload") else module
    return view_of(cast("PreTrainedModel", module), tokenizer)


def as_language_model(model: object) -> LanguageModel:
    """The weights of a model as they are deployed, with its tokenizer where it has one.

    Of a model in float16, or in bfloat16 where `pick_dtype` prefers float32, a float32 copy is
    made, whose edits are saved in its own dtype again; all others share the memory of what was
    given. Weights packed to 4 bits by bitsandbytes stay packed: such a model answers, and what
    edits or quantizes refuses it.

    Arguments:
        model: as in `as_model`.

    Raises:
        CircuitError: no model.
        ModelError: see `as_model`; or weights that are not the deployed ones.
    """
    found = as_model(model)
    if isinstance(found, BridgedModel):
        if version("transformer-lens").startswith("3."):
            raise ModelError(
                "A TransformerBridge of TransformerLens 3 changes the model inside (the "
                "unembedding gets a bias), so its weights are not the deployed ones. Give the "
                "model of transformers, or its name; or take TransformerLens 4."
            )
        found = view_of(cast("PreTrainedModel", unwrapped(found.hf)), found.tokenizer)
    if not isinstance(found, LanguageModel):
        raise ModelError(
            f"{found.name} is a HookedTransformer, whose weights are converted to another layout, "
            "so they are not the deployed ones. Give the model of transformers that it was made "
            "from, or its name. Circuits can be found in it as it is."
        )
    if not isinstance(model, LanguageModel):
        found.hf.eval()  # a copy of the modules
    narrow = {w.dtype for w in found.weights.values() if w.is_floating_point()} - {torch.float32}
    packed = any(map(is_packed, found.hf.parameters()))
    if isinstance(model, LanguageModel) or packed or not narrow:
        return found
    kinds = {w.dtype for w in found.weights.values() if w.is_floating_point()}
    stored = narrow.pop() if len(kinds) == 1 else torch.float32
    found = replace(found, saved_dtype=stored)
    if pick_dtype("auto", stored, found.n_parameters, found.device) == stored:
        return found
    return replace(found, hf=copy.deepcopy(found.hf).float())


def merged(adapted: nn.Module) -> nn.Module:
    """A copy of a model wrapped by PEFT, with its adapter merged into the weights.

    Raises:
        ModelError: the weights are packed, so merging would round them anew.
    """
    if any(map(is_packed, adapted.parameters())):
        raise ModelError(
            f"{type(adapted).__name__}: an adapter over weights packed to 4 bits. Merging would "
            "round them anew, so what is looked at would be another model. Load the base model in "
            "full precision, put the adapter on it, and give that."
        )
    with quiet():
        return copy.deepcopy(adapted).merge_and_unload()  # type: ignore[operator]


def open_stream(model: AnyModel) -> Stream:
    """The residual stream of a model of either kind.

    Raises:
        CircuitError: see `Stream`.
    """
    model = as_model(model)
    for part in ("graph", "bridge"):  # what a model lacks is told here
        getattr(model, part)
    return HookedStream(model) if type(model) is HookedModel else Stream(model)


def _normalised(norm: Component, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """What a norm of TransformerLens sends to its ``hook_normalized``, without calling hooks."""
    if type(norm).__name__.startswith("LayerNorm"):
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


class HookedStream(Stream):
    """Hook points, projections and norms of a `HookedTransformer`."""

    model: HookedModel

    def _check(self) -> None:
        self._check_weights()
        c, name = self.bridge.cfg, self.model.name
        for found, what in (
            (c.attn_only, "has no MLPs"),
            (c.normalization_type is None, "has no norms"),
            (c.positional_embedding_type == "shortformer", "adds positions to queries and keys"),
            (getattr(c, "load_in_4bit", False), "holds packed 4-bit weights"),
            (
                getattr(c, "ungroup_grouped_query_attention", False),
                "has its grouped heads ungrouped (set_ungroup_grouped_query_attention)",
            ),
            (
                not hasattr(getattr(self.blocks[0], "ln2", None), "hook_normalized")
                or str(c.original_architecture).startswith(("Olmo2", "Olmo3")),
                "normalises behind its components alone",
            ),
        ):
            if found:
                raise CircuitError(f"{name} {what}. Not supported.")

    input = "blocks.0.hook_resid_pre"

    @property
    def final(self) -> str:
        """The stream that the final norm and the unembedding read."""
        return f"blocks.{self.n_layers - 1}.hook_resid_post"

    def before_attention(self, layer: int) -> str:
        """The stream that a layer's attention reads."""
        return f"blocks.{layer}.hook_resid_pre"

    def before_mlp(self, layer: int) -> str:
        """The stream that a layer's MLP reads."""
        return f"blocks.{layer}.hook_resid_{'pre' if self.parallel else 'mid'}"

    def projected(self, layer: int, kind: str) -> str:
        """Output of the q, k or v projection, by head."""
        return f"blocks.{layer}.attn.hook_{kind}"

    def z(self, layer: int) -> str:
        """What the heads put out, before the output projection."""
        return f"blocks.{layer}.attn.hook_z"

    def mlp_in(self, layer: int) -> str:
        """The MLP's normed input, before the norm's gain: the last place that can be hooked."""
        return f"blocks.{layer}.ln2.hook_normalized"

    def neurons(self, layer: int) -> str:
        """Activations of the MLP's neurons, before the down projection."""
        return f"blocks.{layer}.mlp.hook_post"

    def mlp_out(self, layer: int) -> str:
        """What the MLP adds to the stream."""
        return f"blocks.{layer}.hook_mlp_out"

    def own_logits(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """The same: it is its own copy."""
        return self.logits(tokens, last)

    def logits(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """Logits at the last real position, in float32."""
        tokens = tokens.to(self.bridge.cfg.device)
        out = self.bridge(tokens, return_type="logits", padding_side="right")
        return widen(out[torch.arange(len(last)), last.to(out.device)])

    def readings(self, layer: int) -> list[Reading]:
        """The q, k and v projections of a layer."""
        attn = self.blocks[layer].attn
        return [
            Reading(
                kind,
                _grouped(attn, f"W_{kind.upper()}").transpose(1, 2),
                _grouped(attn, f"b_{kind.upper()}"),
            )
            for kind in "qkv"
        ]

    def norm(self, layer: int, mlp: bool) -> Callable[[Tensor], Tensor]:
        """The norm in front of a layer's attention, or in front of its MLP up to its gain."""
        if mlp:
            return lambda x: _normalised(self.blocks[layer].ln2, x)
        norm = self.blocks[layer].ln1

        def whole(x: Tensor) -> Tensor:
            x = _normalised(norm, x) * getattr(norm, "w", 1.0)
            return x + norm.b if hasattr(norm, "b") else x

        return whole

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """What attention adds whatever its heads do; it belongs to no head."""
        bias = widen(self.blocks[layer].attn.b_O.detach())
        return bias if bias.any() else None

    def output_weight(self, layer: int) -> Float[Tensor, "d_model heads d_head"]:
        """The output projection, by head."""
        return widen(self.blocks[layer].attn.W_O.detach()).permute(2, 0, 1)


def _grouped(attn: Component, name: str) -> Float[Tensor, "heads ..."]:
    """A projection's own parameter; grouped k and v have one more, repeated for every head."""
    return widen(getattr(attn, f"_{name}", getattr(attn, name)).detach())
