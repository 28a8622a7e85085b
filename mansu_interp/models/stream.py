"""The residual stream of a bridged model: where to hook it, what is written, who reads it.

Every decoder that TransformerLens bridges is read through the same hook points. What a component
*writes* is what is really added to the stream: where a norm stands between a component and the
stream (Gemma 2 and 3), a head writes its share of the normed sum, so that the writes of a layer
still add up exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import CircuitError
from .graph import Graph
from .hook_points import Component, Hook

ADD_INSIDE = ("bloom", "mpt")
"""Model types whose MLP module adds the stream to its output itself."""


@runtime_checkable
class StreamedModel(Protocol):
    """What `Stream` needs to know of a model, whichever kind it is."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def hf(self) -> nn.Module:
        """The module whose training mode counts."""
        ...

    @cached_property
    def bridge(self) -> Component:
        """Its modules with hook points."""
        ...

    @cached_property
    def graph(self) -> Graph:
        """All attribution edges."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its files; empty: not known."""
        ...

    @property
    def routed(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        ...

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Rows of the embedding, and positions where they are limited."""
        ...


@dataclass(frozen=True)
class Reading:
    """The q, k or v projection of a layer, by head."""

    kind: str
    """``q``, ``k`` or ``v``."""
    weight: Float[Tensor, "heads d_head d_model"]
    bias: Float[Tensor, "heads d_head"] | None


def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least float32, in which sums are taken; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _out_in(linear: Component) -> Float[Tensor, "out in"]:
    """Weight of a linear module in ``[out, in]`` layout."""
    weight = linear.weight.detach()
    original = getattr(linear, "original_component", linear)
    return weight.T if type(original).__name__ == "Conv1D" else weight


def _text_config(hf: nn.Module) -> Component:
    """The configuration of a model's decoder; None of what is not of transformers."""
    config = getattr(hf, "config", None)
    read = getattr(config, "get_text_config", None)
    return None if read is None else read(decoder=True)


def _by_head(rows: Float[Tensor, "out ..."], heads: int) -> Float[Tensor, "heads d_head ..."]:
    """The output rows of a projection, by head."""
    return rearrange(rows, "(heads d_head) ... -> heads d_head ...", heads=heads)


class Stream:
    """Hook points, projections and norms of one bridged model, layer by layer.

    Raises:
        CircuitError: a model in training mode, with weights that are not finite, or of an
            architecture whose components do not add to the stream.
    """

    model: StreamedModel

    def __init__(self, model: StreamedModel) -> None:
        self.model, self.graph, self.bridge = model, model.graph, model.bridge
        arch = self.graph.architecture
        self.n_layers, self.n_heads, self.n_kv = arch.n_layers, arch.n_heads, arch.n_kv_heads
        self.blocks = list(self.bridge.blocks)
        self.parallel = arch.parallel
        self._check()

    def _check_weights(self) -> None:
        name = self.model.name
        if self.model.hf.training:
            raise CircuitError(
                f"{name} is in training mode, so dropout would make every run another. "
                "Call its eval() first."
            )
        for weight_name, weight in self.model.weights.items():
            packed = not weight.is_floating_point()
            if packed and getattr(weight, "quant_state", None) is None:
                raise CircuitError(
                    f"{name}: the weight {weight_name} is packed as {weight.dtype}. Attribution "
                    "reads bitsandbytes 4-bit weights or plain ones: de-quantize it first."
                )
            # One cheap pass: a sum is finite only if its terms are.
            if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
                raise CircuitError(
                    f"{name}: the weight {weight_name} holds NaN or infinity. "
                    "Give a checkpoint of finite weights."
                )

    def _check(self) -> None:
        self._check_weights()
        name = self.model.name
        for layer, block in enumerate(self.blocks):
            attention = getattr(block, "attn", None)
            parts = {
                "an MLP": hasattr(block, "mlp"),
                **{c: getattr(attention, c, None) is not None for c in "qkvo"},
            }
            if type(block).__name__.startswith("MLA"):
                raise CircuitError(
                    f"{name}: keys and values of all heads come from one latent (multi-head latent "
                    "attention), so that no head reads the stream by itself. Not supported."
                )
            if missing := [part for part, there in parts.items() if not there]:
                raise CircuitError(
                    f"{name}: attribution needs decoder blocks with q, k, v, o and an MLP; "
                    f"{type(block).__name__} {layer} lacks {', '.join(missing)}."
                )
            self._check_heads(layer, attention)
        if type(self.blocks[0]).__name__.startswith("Parallel") != self.parallel:
            raise CircuitError(
                f"{name}: TransformerLens runs attention and MLP "
                f"{'one after the other' if self.parallel else 'in parallel'}, the configuration "
                "says otherwise. This architecture is not supported."
            )
        config = getattr(self.model.hf, "config", None)
        if not getattr(config, "do_layer_norm_before", True):
            raise CircuitError(
                f"{name} normalises the stream itself after each block (do_layer_norm_before = "
                "False), so that no component adds to it. Not supported."
            )
        self._check_hooks()

    def _check_heads(self, layer: int, attention: Component) -> None:
        """Raise CircuitError unless the projections have as many rows as the heads need."""
        rows = {kind: _out_in(getattr(attention, kind)).shape[0] for kind in "qkv"}
        size = {
            "q": rows["q"] // self.n_heads,
            "k": rows["q"] // self.n_heads,
            "v": _out_in(attention.o).shape[1] // self.n_heads,
        }
        for kind, n in (("q", self.n_heads), ("k", self.n_kv), ("v", self.n_kv)):
            if rows[kind] != n * size[kind]:
                raise CircuitError(
                    f"{self.model.name}: the {kind} projection of layer {layer} has {rows[kind]} "
                    f"rows; {n} heads of {size[kind]} need {n * size[kind]}, so its heads are not "
                    "known. This architecture is not supported."
                )

    def _check_hooks(self) -> None:
        """Raise CircuitError unless every hook point that attribution uses is there."""
        known = self.bridge.hook_dict
        for i in range(self.n_layers):
            needed = [self.projected(i, kind) for kind in "qkv"]
            needed += [self.before_attention(i), self.before_mlp(i), self.mlp_in(i)]
            for name in (*self.writers(), *needed, self.final):
                if name not in known:
                    raise CircuitError(
                        f"{self.model.name} has no hook point {name} in TransformerLens: no stream "
                        "to which its components add. This architecture is not supported."
                    )

    # Hook points. A name with a layer belongs to that layer's block.
    input = "blocks.0.hook_in"
    """Token plus position embeddings."""

    @property
    def final(self) -> str:
        """The stream that the final norm and the unembedding read."""
        return "ln_final.hook_in"

    def before_attention(self, layer: int) -> str:
        """The stream that a layer's attention reads."""
        return f"blocks.{layer}.hook_in"

    def before_mlp(self, layer: int) -> str:
        """The stream that a layer's MLP reads."""
        if self.parallel:
            return f"blocks.{layer}.hook_in"
        return f"blocks.{layer}.{'ln2' if hasattr(self.blocks[layer], 'ln2') else 'mlp'}.hook_in"

    def projected(self, layer: int, kind: str) -> str:
        """Output of the q, k or v projection, by head."""
        return f"blocks.{layer}.attn.{kind}.hook_out"

    def z(self, layer: int) -> str:
        """What the heads put out, before the output projection."""
        return f"blocks.{layer}.attn.o.hook_in"

    def mlp_in(self, layer: int) -> str:
        """Input of the MLP, after its norm."""
        return f"blocks.{layer}.mlp.hook_in"

    def neurons(self, layer: int) -> str:
        """Activations of the MLP's neurons, before the down projection."""
        return f"blocks.{layer}.mlp.out.hook_in"

    def mlp_out(self, layer: int) -> str:
        """What the MLP adds to the stream, up to `scale`."""
        if hasattr(self.blocks[layer], "ln2_post"):
            return f"blocks.{layer}.ln2_post.hook_out"
        inside = self.kind in ADD_INSIDE
        return f"blocks.{layer}.mlp." + ("out.hook_out" if inside else "hook_out")

    @cached_property
    def kind(self) -> str:
        """The decoder's model type in transformers, if it has one."""
        return str(getattr(_text_config(self.model.hf), "model_type", ""))

    @cached_property
    def scale(self) -> float:
        """What everything that attention and MLP add is multiplied with (Granite)."""
        return float(getattr(_text_config(self.model.hf), "residual_multiplier", None) or 1.0)

    def mlp_write(
        self, layer: int, value: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """What the MLP adds to the stream, from the value at its hook point."""
        return widen(value) * self.scale if self.scale != 1 else widen(value)

    def writers(self) -> list[str]:
        """All hook points from which the writes are rebuilt."""
        layers = range(self.n_layers)
        return [self.input, *(n for i in layers for n in (self.z(i), self.mlp_out(i)))]

    @contextmanager
    def hooked(self, hooks: list[tuple[str, Hook]]) -> Iterator[None]:
        """Run the body with forward hooks on the bridge, and take exactly these off again."""
        with self.bridge.hooks(fwd_hooks=hooks):
            yield

    def logits(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """Logits at the last real position, in float32; no other position is unembedded."""
        device = self.model.device
        rows = torch.arange(len(last))

        def last_only(hidden: Tensor, hook: object) -> Tensor:
            return hidden[rows, last.to(hidden.device)][:, None]

        with self.hooked([("unembed.hook_in", last_only)]):
            return widen(self.bridge(tokens.to(device), return_type="logits")[:, 0])

    def own_logits(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """The same as the model itself computes them, without any hook; of one with packed layers,
        which not every processor runs, as its unpacked copy does."""
        if any(not w.is_floating_point() for w in self.model.weights.values()):
            return self.logits(tokens, last)
        out = self.model.hf(input_ids=tokens.to(self.model.device), use_cache=False).logits
        return widen(out[torch.arange(len(last)), last.to(out.device)])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The least precise dtype in which a weight is computed with."""
        weights = self.model.weights.values()
        found = {getattr(getattr(w, "quant_state", None), "dtype", w.dtype) for w in weights}
        return max(found, key=lambda dtype: torch.finfo(dtype).eps)

    def readings(self, layer: int) -> list[Reading]:
        """The q, k and v projections of a layer."""
        out = []
        for kind, n in (("q", self.n_heads), ("k", self.n_kv), ("v", self.n_kv)):
            linear = getattr(self.blocks[layer].attn, kind)
            bias = getattr(linear, "bias", None)
            out.append(
                Reading(
                    kind,
                    _by_head(widen(_out_in(linear)), n),
                    None if bias is None else _by_head(widen(bias.detach()), n),
                )
            )
        return out

    def norm(self, layer: int, mlp: bool) -> Callable[[Tensor], Tensor]:
        """The norm in front of a layer's attention or MLP, of float32."""
        block = self.blocks[layer]
        after = hasattr(block, "ln1_post") and not hasattr(block, "ln1")  # OLMo 2
        first = None if after else block.ln1
        norm = getattr(block, "ln2", None if after else first) if mlp else first
        if norm is None:
            return lambda x: x
        norm = getattr(norm, "original_component", norm)
        # PyTorch's own takes inputs of its weights' dtype alone.
        own = norm.weight if isinstance(norm, nn.LayerNorm) else None
        half = own is not None and own.dtype in (torch.bfloat16, torch.float16)
        return copy.deepcopy(norm).float() if half else norm

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """What attention adds whatever its heads do; it belongs to no head."""
        bias = getattr(self.blocks[layer].attn.o, "bias", None)
        return None if bias is None else widen(bias.detach()) * self.scale

    def output_weight(self, layer: int) -> Float[Tensor, "d_model heads d_head"]:
        """The output projection, by head."""
        weight = widen(_out_in(self.blocks[layer].attn.o))
        return rearrange(
            weight, "d_model (heads d_head) -> d_model heads d_head", heads=self.n_heads
        )

    def head_writes(
        self,
        layer: int,
        z: Float[Tensor, "*rows heads d_head"] | Float[Tensor, "*rows heads_d_head"],
    ) -> Float[Tensor, "heads *rows d_model"]:
        """What each head adds to the stream, without the output bias.

        With a norm behind attention, each head's share of the normed sum.

        Arguments:
            layer: number of the layer.
            z: what the heads put out, by head or one behind the other.
        """
        weight = self.output_weight(layer)
        if z.shape[-1] != weight.shape[2]:
            z = rearrange(z, "... (heads d_head) -> ... heads d_head", heads=self.n_heads)
        writes = einsum(
            widen(z), weight, "... heads d_head, d_model heads d_head -> heads ... d_model"
        )
        if hasattr(self.blocks[layer], "ln1_post"):
            writes = writes * self._share(layer, writes.sum(0))
        return writes * self.scale if self.scale != 1 else writes

    def _share(
        self, layer: int, total: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The factor by which a norm behind attention scales each coordinate of its input."""
        norm = self.blocks[layer].ln1_post
        norm = getattr(norm, "original_component", norm)
        bias = self.output_bias(layer)
        if bias is not None:
            raise CircuitError(
                f"{self.model.name} has an output bias and a norm behind attention: the bias "
                "would belong to no head. Not supported."
            )
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        if eps is None or getattr(norm, "bias", None) is not None:
            raise CircuitError(
                f"{self.model.name} has a norm behind attention that is no RMSNorm, so that a "
                "head's write is no share of it. Not supported."
            )
        ones = torch.ones_like(total[..., :1, :].flatten(0, -2)[:1])
        gain = widen(norm(ones)[0]) * (1 + eps) ** 0.5
        return gain * (total.square().mean(-1, keepdim=True) + eps).rsqrt()
