"""Where a model keeps the weights of a head or an MLP: which parameter, which rows or columns.

Every weight is a linear layer's ``[out, in]``, as bitsandbytes quantizes it. GPT-2 stores its own
the other way round (`Conv1D`); it is turned when a model is loaded and turned back when it is
saved, as transformers' bitsandbytes integration does before it quantizes one.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ModelError
from .hook_points import Component
from .hugging_face import PreTrainedModel

SEPARATE = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",)}
FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
HEADS_OUT = ("o_proj", "out_proj", "c_proj", "dense")
MLP_IN = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h")
MLP_OUT = ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h")
CONCATENATED = ("gpt2", "phi3", "mpt")
"""Model types whose fused projection is all q heads, then all k heads, then all v heads."""
BY_HEAD = ("gpt_neox", "bloom")
"""Model types whose fused projection is q, k and v of the first head, then of the second..."""
ONE_KEY = ("falcon", "gpt_bigcode")
"""Model types with ``multi_query``: all q heads, then the only k head, then the only v head."""
ROWS = 4096
"""Rows of an unembedding in bfloat16 that are widened at a time."""
_ATTENTION = re.compile(r"\.(self_attn|attn|attention|self_attention)\.")


class Turned(nn.Linear):
    """The linear layer that a `Conv1D` is."""


def turn(hf: PreTrainedModel) -> None:
    """Replace every `Conv1D` of a model, in place, by a linear layer: the same function."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(hf.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            with torch.device("meta"):
                linear = Turned(inputs, outputs).train(module.training)
            _give(linear, module)
            linear.weight = nn.Parameter(linear.weight.data.contiguous(), requires_grad=False)
            hf.set_submodule(name, linear)


def turn_back(hf: PreTrainedModel) -> None:
    """Undo `turn`, in place; the weights are views of the same memory."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(hf.named_modules()):
        if isinstance(module, Turned):
            with torch.device("meta"):
                conv = Conv1D(*module.weight.shape).train(module.training)
            _give(conv, module)
            hf.set_submodule(name, conv)


def _give(new: nn.Module, old: nn.Module) -> None:
    new.weight = nn.Parameter(old.get_parameter("weight").data.T, requires_grad=False)
    new.bias = nn.Parameter(old.get_parameter("bias").data, requires_grad=False)


def is_packed(weight: object) -> bool:
    """Whether bitsandbytes has packed a weight to 4 bits."""
    return getattr(weight, "quant_state", None) is not None


@torch.no_grad()
def unpack_4bit(packed: Component) -> nn.Linear:
    """A plain float32 linear layer with the weights that a bitsandbytes 4-bit layer stands for.

    On some processors such a layer repacks itself when it first runs; what it then does to the
    unit vectors are its weights.
    """
    state, bias = packed.weight.quant_state, packed.bias
    if getattr(state, "packing_format_for_cpu", False):
        weight = packed(torch.eye(packed.in_features, dtype=torch.float32))
        weight = (weight if bias is None else weight - bias).T.contiguous()
    else:
        from bitsandbytes.functional import dequantize_4bit

        # Flat: the library's CPU kernel restores blocks that span rows with wrong scales.
        flat = copy.copy(state)
        flat.shape = torch.Size([state.shape.numel()])
        weight = dequantize_4bit(packed.weight, flat).view(state.shape)
    plain = torch.nn.Linear(packed.in_features, packed.out_features, bias is not None)
    plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        plain.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
    return plain


def unwrapped(module: nn.Module) -> nn.Module:
    """A module that a `TransformerBridge` has wrapped part by part, without the wrapping; its
    parameters and buffers are the same tensors."""
    module = module._modules.get("_original_component") or module
    plain = copy.copy(module)
    plain.__dict__ = dict(module.__dict__)
    plain._modules = {k: m and unwrapped(m) for k, m in module._modules.items()}
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
    return plain


def output_embeddings(hf: PreTrainedModel) -> nn.Module:
    """The unembedding of a model.

    Raises:
        ModelError: it has none, so it predicts no tokens.
    """
    found = hf.get_output_embeddings()
    if found is None:
        raise ModelError(f"A {type(hf).__name__} has no unembedding: give a causal language model.")
    return found


class _WideProduct(torch.autograd.Function):
    """x W^T of bfloat16 factors, computed and returned in float32, some rows of W at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.cat([x.float() @ rows.float().T for rows in weight.split(ROWS)], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), parts = ctx.saved_tensors, slopes[0].split(ROWS, -1)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torch.zeros_like(x, dtype=torch.float32)
            for slope, rows in zip(parts, weight.split(ROWS), strict=True):
                of_x += slope @ rows.float()
            of_x = of_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            flat = x.float().flatten(0, -2)
            found = [(s.flatten(0, -2).T @ flat).to(weight.dtype) for s in parts]
            of_weight = torch.cat(found)
        return of_x, of_weight


def unembedded(
    hf: PreTrainedModel, hidden: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """What a model's unembedding makes of hidden states; of bfloat16 in float32: rounded to it,
    logits from 16 on are multiples of an eighth, and scores count a tie as lost."""
    head = output_embeddings(hf)
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    if weight.dtype != torch.bfloat16:
        return head(hidden)
    logits = _WideProduct.apply(hidden, weight)
    return logits if bias is None else logits + bias


def linear_weights(hf: PreTrainedModel) -> list[str]:
    """Names of the weights that 4-bit quantizers touch: every linear layer but the unembedding."""
    head = hf.get_output_embeddings()
    return [
        f"{name}.weight"
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def decoder_weights(hf: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those weights that belong to the decoder of a model, not to what sees or hears for it."""
    decoder = hf.get_decoder()
    place = next((name for name, module in hf.named_modules() if module is decoder), "")
    return [n for n in names if n.startswith(f"{place}.")] or list(names)


def _find(names: Sequence[str], layer: int, attention: bool, leaves: tuple[str, ...]) -> list[str]:
    out = []
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        leaf = name.split(".")[-2]
        here = number is not None and int(number.group(1)) == layer
        if here and leaf in leaves and bool(_ATTENTION.search(name)) == attention:
            out.append(name)
    return out


def mlp_weights(names: Sequence[str], layer: int, writes: bool) -> list[str]:
    """Weights of a layer's MLP: what reads the stream, or what writes to it.

    Raises:
        ModelError: none of a known name.
    """
    found = _find(names, layer, False, MLP_OUT if writes else MLP_IN)
    return found or _raise_unknown(names, layer, "MLP")


def head_slice(
    hf: PreTrainedModel,
    names: Sequence[str],
    *,
    layer: int,
    kind: str,
    head: int,
    heads: int,
    kv_heads: int,
) -> tuple[str, str, slice]:
    """(weight name, ``rows`` or ``cols``, slice) of one head.

    Arguments:
        hf: the Hugging Face model.
        names: its `linear_weights`.
        layer: number of the layer.
        kind: ``q``, ``k``, ``v`` or ``head`` (what the head writes).
        head: its number; for ``k`` and ``v`` that of the KV head.
        heads: query heads of a layer.
        kv_heads: KV heads of a layer.

    Raises:
        ModelError: no weight of a known name, or a fused one whose order of rows is not known.
    """
    if kind == "head":
        found = _find(names, layer, True, HEADS_OUT)
        name = (found or _raise_unknown(names, layer, "attention output"))[0]
        width = hf.get_parameter(name).shape[1] // heads
        return name, "cols", slice(head * width, (head + 1) * width)
    if found := _find(names, layer, True, SEPARATE[kind]):
        width = hf.get_parameter(found[0]).shape[0] // (heads if kind == "q" else kv_heads)
        return found[0], "rows", slice(head * width, (head + 1) * width)
    fused = _find(names, layer, True, FUSED)
    name = (fused or _raise_unknown(names, layer, f"{kind} projection"))[0]
    width = hf.get_parameter(name).shape[0] // (heads + 2 * kv_heads)
    config = hf.config.get_text_config(decoder=True)
    kind_of_model, one_key = config.model_type, getattr(config, "multi_query", False)
    by_head = kind_of_model in BY_HEAD or (kind_of_model == "falcon" and not one_key)
    if getattr(config, "new_decoder_architecture", False):
        by_head = one_key = False
    if kind_of_model in CONCATENATED or (kind_of_model in ONE_KEY and one_key):
        first = {"q": 0, "k": heads, "v": heads + kv_heads}[kind] + head
    elif by_head:
        first = 3 * head + "qkv".index(kind)
    else:
        raise ModelError(
            f"{name} holds q, k and v in one weight, in an order that is not known for model type "
            f"{kind_of_model!r} (known: {', '.join(CONCATENATED + BY_HEAD)}). Masks need it."
        )
    return name, "rows", slice(first * width, (first + 1) * width)


def _raise_unknown(names: Sequence[str], layer: int, what: str) -> NoReturn:
    there = [n for n in names if f".{layer}." in n]
    raise ModelError(
        f"No weight of layer {layer} is known as its {what}; the layer has "
        f"{', '.join(there) or 'no linear layers'}. Masks need a decoder family that is known."
    )


def check_layout(hf: PreTrainedModel, names: Sequence[str], heads: int, kv_heads: int) -> None:
    """Raise ModelError unless all weights of the first layer are found: cheap, before long work."""
    names = decoder_weights(hf, names)
    for kind in ("q", "k", "v", "head"):
        head_slice(hf, names, layer=0, kind=kind, head=0, heads=heads, kv_heads=kv_heads)
    for writes in (False, True):
        mlp_weights(names, 0, writes)
