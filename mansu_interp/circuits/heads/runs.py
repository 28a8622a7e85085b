"""Runs of a model in which its heads are looked at: patterns, what they read and write; norms with
their scale frozen; and random heads in the place of its own.

A random head is one of the model's own whose query, key and value weights have their input
coordinates shuffled. It reads the stream of the whole model, and nothing else reads what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import CircuitError
from ...models.hook_points import Component, Hook, Recorder
from ...models.hooked import AnyModel, HookedModel, as_model, open_stream
from ...models.layout import output_embeddings
from ...models.stream import widen


class Frozen:
    """A norm with its scale frozen at some vectors x: a -> scale(x) * gain * (a, or a - mean a).

    Arguments:
        norm: LayerNorm, RMSNorm, or nothing at all, as a function of the last dimension.
        x: at which it is frozen.

    Raises:
        CircuitError: it is another kind of norm.
    """

    def __init__(self, norm: Component, x: Float[Tensor, "*rows d"]) -> None:
        with torch.no_grad():
            one = torch.ones_like(x.reshape(-1, x.shape[-1])[:1])
            sign = one.clone()
            sign[:, 1::2] = -1  # its mean is 0, so that centring leaves it alone
            bias = norm(torch.zeros_like(one))
            self.gain = ((norm(sign) - bias) * sign)[0]
            self.centred = bool((norm(one) - bias).norm() < 1e-3 * self.gain.norm())
            plain, real = self.linear(x), norm(x) - bias
            size = plain.square().sum(-1, keepdim=True).clamp(min=1e-30)
            self.scale = (plain * real).sum(-1, keepdim=True) / size
            if (self.apply(x) - real).norm() > 0.02 * real.norm():
                raise CircuitError(
                    f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm: what a head "
                    "reads cannot be taken apart by writers."
                )

    def _centre(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def linear(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The norm without its scale and bias."""
        return self.gain * self._centre(x)

    def linear_back(self, y: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The transpose of that."""
        return self._centre(self.gain * y)

    def apply(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What the frozen norm makes of vectors, but for its bias."""
        return self.scale * self.linear(x)

    def back(self, y: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Its transpose."""
        return self.scale * self.linear_back(y)


class HeadRuns:
    """All heads of a model, and what is looked up once.

    Raises:
        CircuitError: see `Stream`; or no hook point has the attention patterns.
    """

    def __init__(self, model: AnyModel) -> None:
        self.model, self.stream = as_model(model), open_stream(model)
        s = self.stream
        self.layers = range(s.n_layers)
        missing = [i for i in self.layers if self.pattern(i) not in s.bridge.hook_dict]
        if missing:
            raise CircuitError(
                f"{self.model.name}: TransformerLens has no attention patterns of layer "
                f"{missing[0]}, so its heads cannot be explained."
            )
        norm = s.bridge.ln_final
        self.final_norm = getattr(norm, "original_component", norm)
        self.embedding, self.unembedding = self._tables()

    def _tables(self) -> tuple[Float[Tensor, "vocab d"], Float[Tensor, "vocab d"]]:
        """Embedding and unembedding, the latter without what it adds to all tokens."""
        if type(self.model) is HookedModel:
            bridge = self.model.bridge
            first, last = bridge.embed.W_E, bridge.unembed.W_U.T
        else:
            hf: Component = self.model.hf
            first: Tensor = hf.get_input_embeddings().weight
            last: Tensor = output_embeddings(hf).get_parameter("weight")
            text = hf.config.get_text_config(decoder=True)
            scale = float(getattr(text, "logit_scale", None) or 1.0)
            scale /= float(getattr(text, "logits_scaling", None) or 1.0)
            last = scale * last.detach()
        last = widen(last.detach())
        return widen(first.detach()), last - last.mean(0)

    def pattern(self, layer: int) -> str:
        """Hook point of a layer's attention, after the softmax."""
        return f"blocks.{layer}.attn.hook_pattern"

    def _scores(self, layer: int) -> str:
        """Hook point of a layer's attention before the softmax, where TransformerLens has it."""
        return f"blocks.{layer}.attn.hook_attn_scores"

    def attention_logits(self, layer: int, run: Recorder) -> Float[Tensor, "batch heads query key"]:
        """What a layer's softmax is of, masked tokens far below all others, up to a number a row.

        Where only the pattern is known it is its logarithm, and what is too small for it is masked.
        """
        if self._scores(layer) in run.seen:
            return widen(run[self._scores(layer)])
        share = widen(run[self.pattern(layer)])
        known = share.detach() > 1e-30
        return torch.where(known, torch.where(known, share, 1.0).log(), -torch.inf)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        hooks: Sequence[tuple[str, Hook]] = (),
        *,
        grad: bool = False,
    ) -> Recorder:
        """One forward pass that remembers patterns, what heads read and write, and, with ``grad``,
        what leads from the projections to the patterns."""
        s, seen = self.stream, Recorder()
        names = [n for i in self.layers for n in (self.pattern(i), s.before_attention(i))]
        names = list(dict.fromkeys([*names, *s.writers(), s.final]))
        first: list[tuple[str, Hook]] = []
        if grad:
            names += [n for i in self.layers for c in "qk" for n in self._projections(i, c)]
            scores, known = (self._scores(i) for i in self.layers), s.bridge.hook_dict
            names += [n for n in scores if n in known]
            first = [(s.input, lambda value, hook: value.detach().requires_grad_(True))]
        with torch.set_grad_enabled(grad), s.hooked([*first, *seen.on(names), *hooks]):
            s.bridge(tokens.to(self.model.device), return_type=None)
        return seen

    def _projections(self, layer: int, kind: str) -> list[str]:
        """The projection, and input and output of a norm behind it, if there is one."""
        norm, known = f"blocks.{layer}.attn.{kind}_norm", self.stream.bridge.hook_dict
        behind = [f"{norm}.hook_in", f"{norm}.hook_out"]
        return [self.stream.projected(layer, kind), *(n for n in behind if n in known)]

    def projections(self, layer: int, kind: str, run: Recorder) -> list[str]:
        """Those that the model ran through."""
        return [n for n in self._projections(layer, kind) if n in run.seen]

    def at_projection(
        self,
        layer: int,
        kind: str,
        run: Recorder,
        g: Tensor,
        heads: int,
    ) -> Float[Tensor, "batch pos heads d_head"]:
        """A gradient at the last of `projections`, taken back to the first, by head."""
        names = self.projections(layer, kind, run)
        if len(names) > 1:
            norm = getattr(self.stream.blocks[layer].attn, f"{kind}_norm")
            before = widen(run[names[1]].detach())
            g = Frozen(getattr(norm, "original_component", norm), before).back(g)
            projected = run[names[0]].detach().flatten(2)
            if g.dim() == 4 and not torch.equal(run[names[1]].flatten(2), projected):
                g = g.transpose(1, 2)  # the heads stand before the tokens
        return rearrange(g.flatten(2), "b p (h c) -> b p h c", h=heads)

    def attention(self, run: Recorder) -> Float[Tensor, "heads batch query key"]:
        """The patterns of all heads, layer by layer."""
        found = [widen(run[self.pattern(i)].detach()) for i in self.layers]
        return rearrange(torch.stack(found), "l b h q k -> (l h) b q k")

    def all_writes(self, run: Recorder) -> Float[Tensor, "writers batch pos d_model"]:
        """What every writer adds to the stream, at every token."""
        s = self.stream
        out = [widen(run[s.input].detach())[None]]
        for i in self.layers:
            out.append(s.head_writes(i, widen(run[s.z(i)].detach())))
            out.append(s.mlp_write(i, run[s.mlp_out(i)].detach())[None])
        return torch.cat(out)

    def writes(
        self, run: Recorder, last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "heads batch d_model"]:
        """What all heads write at the last token."""
        s, rows = self.stream, torch.arange(len(last))
        return torch.cat(
            [s.head_writes(i, widen(run[s.z(i)].detach())[rows, last]) for i in self.layers]
        )

    def shuffled(self, run: Recorder, draw: int) -> tuple[Recorder, list[tuple[str, Hook]]]:
        """Hooks that make all heads random ones, and what these put out, remembered before it is
        replaced by the model's own, which all others read."""
        s, hooks, seen = self.stream, list[tuple[str, Hook]](), Recorder()
        for i in self.layers:
            normed = s.norm(i, mlp=False)(widen(run[s.before_attention(i)].detach()))
            for r in s.readings(i):
                weight = shuffle(r.weight, draw * s.n_layers + i, r.kind)
                out = einsum(normed, weight, "b p d, h c d -> b p h c")
                out = out if r.bias is None else out + r.bias
                hooks.append((s.projected(i, r.kind), _instead(out)))
            hooks += [*seen.on([s.z(i)]), (s.z(i), _instead(run[s.z(i)].detach()))]
        return seen, hooks


def shuffle(
    weight: Float[Tensor, "heads d_head d_model"], seed: int, kind: str = "v"
) -> Float[Tensor, "heads d_head d_model"]:
    """A projection whose heads read the coordinates of the stream in a random order each."""
    draw = torch.Generator().manual_seed(3 * seed + "qkv".index(kind))
    orders = [torch.randperm(weight.shape[-1], generator=draw) for _ in weight]
    return torch.stack([w[:, o] for w, o in zip(weight, orders, strict=True)])


def _instead(new: Tensor) -> Hook:
    """A hook that puts a value in the place of another."""
    return lambda value, hook: new.reshape(value.shape).to(value.dtype)
