"""A causal language model: its logits, its weights by name, and its bridge to TransformerLens.

The weights are the Hugging Face ones in their deployed ``[out, in]`` layout. The TransformerLens
bridge wraps a structural copy of the modules that *shares* those weights, with no processing, so
that what is analysed is what is deployed. Only this room imports transformer_lens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError, TaskError
from ..utils.libraries import first_line, is_out_of_memory, quiet
from ..utils.ranges import entrance, expect_kind
from ..utils.tensors import dtype_name, plant
from ..utils.words import Shown, half_pair
from .graph import Architecture, Graph
from .hook_points import Component
from .hugging_face import (
    STATEFUL,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    architecture_of,
    check_plain,
    check_tokens,
    has_experts,
)
from .layout import (
    is_packed,
    linear_weights,
    turn,
    turn_back,
    unembedded,
    unpack_4bit,
)

MIN_SHARED = 96.0
"""Token positions that sharing a prefix must save to be worth a second forward call on a CPU."""

MIN_SHARED_WORK = 2.5e11
"""The same on an accelerator, times the model's parameters: a call costs it some milliseconds,
whatever is in it."""

LONGEST_IN_TREE = 128
"""Tokens of a prompt up to which a tree stands for it: a model that attends to a window of the last
tokens alone would see beyond it, and no window is shorter."""


def _common_prefix(tokens: Int[Tensor, "batch pos"], at: Int[Tensor, " n"]) -> int:
    """How many leading tokens all rows share, short of the first position that is read."""
    same = (tokens == tokens[:1]).all(0).long().cumprod(0).sum()
    return min(int(same), int(at.min()))


@dataclass(repr=False)
class LanguageModel(Shown):
    """A causal language model, its tokenizer, and views of both.

    Examples:
        >>> model = load_model("facts")
        >>> model.graph.n_edges > 0
        True
    """

    name: str
    """Embedded name, folder or hub name it was loaded from."""
    hf: PreTrainedModel
    """The Hugging Face ``PreTrainedModel`` (eval mode; float32, or the checkpoint's bfloat16, see
    `pick_dtype`); a `Conv1D` in it is turned into a linear layer, see `layout`."""
    tokenizer: PreTrainedTokenizerBase | None
    """The Hugging Face tokenizer; None of a model that only computes on token ids."""
    saved_dtype: torch.dtype = torch.float32
    """The dtype of the checkpoint, in which edits are saved again."""
    sha256: str = ""
    """Hash of the safetensors files it was loaded from."""
    folder: Path | None = None
    """The folder on this machine that it was loaded from."""
    unread: tuple[str, ...] = ()
    """Tensors of those files that have no place in the model."""
    in_trees: bool = False
    """Whether `logits_at` computes on a CPU what some prompts, not all, begin alike with once, too:
    the same but for the order of sums, in about half the time for a batch of facts."""
    weights: dict[str, Tensor] = field(init=False, repr=False)
    """Every parameter by its Hugging Face name. In-place edits reach the bridge too."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        dtype = dtype_name(self.saved_dtype)
        size = f"{self.n_parameters:,}"
        without = {} if self.tokenizer else {"tokenizer": "none"}
        return {
            "": repr(self.name), "parameters": size, "saved as": dtype, "on": self.device, **without
        }  # fmt: skip

    def __post_init__(self) -> None:
        check_plain(self.hf, self.name)
        turn(self.hf)
        self.weights = {n: p.requires_grad_(False) for n, p in self.hf.named_parameters()}

    @property
    def device(self) -> torch.device:
        """Where its weights lie, and so where it computes."""
        return next(iter(self.weights.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """In which its weights are held and its layers compute."""
        return next(iter(self.weights.values())).dtype

    @property
    def config(self) -> PreTrainedConfig:
        """The Hugging Face configuration."""
        return self.hf.config

    @cached_property
    def architecture(self) -> Architecture:
        """Layers, heads and block order.

        Raises:
            ModelError: see `architecture_of`.
        """
        return architecture_of(self.config, self.name)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.get_text_config(decoder=True).hidden_size

    @cached_property
    def graph(self) -> Graph:
        """All attribution edges."""
        return Graph(self.architecture)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(w.numel() for w in self.weights.values())

    def shares(self, common: int, prompts: int) -> bool:
        """Whether `logits_at` computes so many tokens, with which so many prompts begin, once: in a
        call of their own."""
        least = MIN_SHARED if self.device.type == "cpu" else MIN_SHARED_WORK / self.n_parameters
        return bool(common) and common * (prompts - 1) >= least and self.keeps_keys

    @cached_property
    def linear_names(self) -> list[str]:
        """Names of the weights that 4-bit quantizers touch: every linear layer but the unembedding,
        not embeddings, norms or biases."""
        return linear_weights(self.hf)

    @cached_property
    def embedding_name(self) -> str:
        """Name of the input embedding's weight, ``[vocab, d_model]``; a tied one is the
        unembedding, too."""
        weight = self.hf.get_input_embeddings().weight
        return next(n for n, w in self.weights.items() if w is weight)

    @cached_property
    def bridge(self) -> Component:
        """The model as a TransformerLens ``TransformerBridge`` over the same weight tensors; layers
        packed to 4 bits by bitsandbytes are replaced by plain ones."""
        with quiet():
            from transformer_lens.model_bridge.sources._bridge_builder import (
                build_bridge_from_module,
            )

            memo = {id(t): t for t in [*self.hf.parameters(), *self.hf.buffers()]}
            sharing = copy.deepcopy(self.hf, memo)
            for name, module in list(sharing.named_modules()):
                if is_packed(getattr(module, "weight", None)):
                    dtype = self.weights[self.embedding_name].dtype  # the stream's
                    sharing.set_submodule(name, unpack_4bit(module).to(dtype))
            turn_back(sharing)
            sharing.set_attn_implementation("eager")
            arch = (self.config.architectures or [type(self.hf).__name__])[0]
            try:
                bridge = build_bridge_from_module(
                    sharing, arch, hf_config=self.config, tokenizer=self.tokenizer
                )
            except Exception as error:  # what it cannot bridge it trips over in many ways
                if is_out_of_memory(error):
                    raise
                reason = first_line(error).rstrip(".")
                raise ModelError(
                    f"TransformerLens cannot bridge {arch} ({self.name}): {reason}. "
                    "Use a decoder family that it supports."
                ) from error
        bridge.eval()
        return bridge

    def check_editable(self) -> None:
        """Raise ModelError unless every weight is float32, or bfloat16 as in the checkpoint."""
        parameters = self.hf.named_parameters()
        if name := next((n for n, w in parameters if is_packed(w)), ""):
            raise ModelError(
                f"{self.name}: {name} is packed to 4 bits by bitsandbytes. What edits or quantizes "
                "needs the checkpoint that it was packed from, and of the values that the codes "
                "stand for it would say nothing true: load that one, without a "
                "quantization_config. Prompts are answered and circuits found as it is."
            )
        for name, weight in self.weights.items():
            own = weight.dtype == self.saved_dtype == torch.bfloat16
            if weight.dtype != torch.float32 and not own:
                packed = "packed as " if not weight.is_floating_point() else ""
                raise ModelError(
                    f"{self.name}: {name} is {packed}{dtype_name(weight.dtype)}, "
                    "expected float32, or bfloat16 that the checkpoint is stored in. load_model() "
                    "takes care of it, and save() stores a checkpoint in its own dtype again."
                )

    def copy(self, sharing: Collection[str] = ()) -> LanguageModel:
        """A copy whose weights can be edited without touching this one's, but for those named in
        ``sharing``, which both have in common."""
        memo = {id(self.weights[n]): self.weights[n] for n in sharing}
        with quiet():
            hf = copy.deepcopy(self.hf, memo)
        return replace(self, hf=hf)

    def trainable_copy(self, sharing: Collection[str] = ()) -> LanguageModel:
        """A copy in float32: in bfloat16 the steps of an optimiser would be rounded away. Of a
        model in float32 the weights in ``sharing``, which stay, are not copied."""
        if self.dtype == torch.float32:
            return self.copy(sharing)
        copied = self.copy()
        return replace(copied, hf=copied.hf.float())

    def check_finite(self) -> None:
        """Raise ModelError over a weight that holds NaN or infinity.

        Raises:
            ModelError: one does.
        """
        for name, weight in self.weights.items():
            # Of what torchao has packed the scales, which are finite only if their groups are.
            held = getattr(weight, "scale", weight) if hasattr(weight, "qdata") else weight
            # A sum is finite only if its terms are; it may overflow where they are.
            if not torch.isfinite(held.sum()) and not torch.isfinite(held).all():
                raise ModelError(
                    f"{self.name}: the weight {name} holds NaN or infinity. Give a checkpoint of "
                    "finite weights."
                )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text exactly as written: nothing is prepended.

        Raises:
            TaskError: it holds half of a surrogate pair, which no tokenizer takes.
        """
        if not isinstance(text, str):  # asked of every text of a task: no `entrance`, which is slow
            expect_kind(TaskError, "text", text, str)
        if half := half_pair(text):
            raise TaskError(
                f"The text {text[:200]!r} holds {half}, half of a surrogate pair: remove it."
            )
        return self.get_tokenizer()(text, add_special_tokens=False).input_ids

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ModelError: the model was made without one.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"{self.name} has no tokenizer, which texts need: give (model, tokenizer) in place "
                "of the model, or its name or folder."
            )
        return self.tokenizer

    def last_logits(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """Next-token logits at one position of each row (see `logits_at`)."""
        return self.logits_at(tokens, torch.arange(len(tokens)), last)

    def logits_at(
        self,
        tokens: Int[Tensor, "batch pos"],
        rows: Int[Tensor, " n"],
        at: Int[Tensor, " n"],
    ) -> Float[Tensor, "n vocab"]:
        """Next-token logits at any positions of any rows; right padding needs no mask.

        Tokens that all rows begin with (an instruction, few-shot examples) are computed once, and
        their keys and values shared: the same logits and gradients, several times faster.

        Raises:
            ModelError: no tokens, too many, or some that the model does not have.
        """
        if not tokens.numel():
            raise ModelError(
                f"{self.name} is asked to go on from no tokens. Give a prompt of which its "
                "tokenizer makes at least one."
            )
        low, high = tokens.aminmax()
        check_tokens(self.name, self.sizes, int(low), int(high), tokens.shape[1])
        tokens, rows, at = (t.to(self.device) for t in (tokens, rows, at))
        by_parts, sharing, trees = self._ways
        if not by_parts:
            return self._own_logits(tokens)[rows, at]
        if trees and tokens.shape[1] <= LONGEST_IN_TREE:
            return self.unembed(self._by_trees(tokens, rows, at))
        common = _common_prefix(tokens, at) if sharing else 0
        if not self.shares(common, len(tokens)):
            hidden = self.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            return self.unembed(hidden[rows, at])
        return self.unembed(self._after_prefix(tokens, common)[rows, at - common])

    def _after_prefix(
        self, tokens: Int[Tensor, "batch pos"], common: int
    ) -> Float[Tensor, "batch rest d_model"]:
        """Hidden states of the tokens behind a prefix that all rows share."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        self.hf.base_model(input_ids=tokens[:1, :common], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(tokens))
        return self.hf.base_model(
            input_ids=tokens[:, common:], past_key_values=cache, use_cache=True
        ).last_hidden_state

    def _by_trees(
        self, tokens: Int[Tensor, "batch pos"], rows: Int[Tensor, " n"], at: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """Hidden states at some positions, the prompts laid out as trees."""
        trees = plant(tokens.tolist(), rows.tolist(), at.tolist())
        mask = torch.zeros(trees.seen.shape, dtype=self.dtype)
        mask.masked_fill_(~trees.seen, torch.finfo(self.dtype).min)
        hidden = self.hf.base_model(
            input_ids=trees.tokens,
            position_ids=trees.depth,
            attention_mask=mask[:, None],
            use_cache=False,
        ).last_hidden_state
        return hidden[trees.tree, trees.at]

    @cached_property
    def _ways(self) -> tuple[bool, bool, bool]:
        """Whether unembedding the base model's hidden states gives the model's own logits, and
        whether it does so behind a shared prefix and, if asked for, in trees; tried once, on eight
        tokens.

        Not with heads that transform first (BERT, ModernBERT), nor without a cache of keys (Mamba).
        """
        tokens = torch.tensor([[0, 1] * 4, [0, 1, 0, 1, 0, 0, 0, 1]], device=self.device)

        def same(hidden: Callable[[], Tensor]) -> bool:
            try:
                found = self.unembed(hidden()[:, -1]).float()
            except Exception:  # what is not there is missed in many ways
                return False
            return bool((found - own).norm() <= 0.02 * (own - own.mean()).norm())

        with torch.no_grad():
            own = self.hf(input_ids=tokens, use_cache=False).logits[:, -1].float()
            if not own.isfinite().all():
                return True, True, False
            base = self.hf.base_model
            by_parts = same(lambda: base(input_ids=tokens, use_cache=False).last_hidden_state)
            keys = self.config.get_text_config(decoder=True).to_dict()
            keeps_state = any(part in key for key in keys for part in STATEFUL)
            sharing = by_parts and not keeps_state
            asked = sharing and self.in_trees and self.device.type == "cpu"
            ends = torch.tensor([0, 1]), torch.tensor([7, 7])
            trees = asked and same(lambda: self._by_trees(tokens, *ends)[:, None])
            return by_parts, sharing and same(lambda: self._after_prefix(tokens, 5)), trees

    @property
    def keeps_keys(self) -> bool:
        """Whether what it has read of a prompt can be kept, as keys and values."""
        return self._ways[1]

    @property
    def routed(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return has_experts(self.config)

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Rows of the embedding, and positions where the configuration limits them."""
        config = self.config.get_text_config(decoder=True)
        rows = len(self.hf.get_input_embeddings().get_parameter("weight"))
        return rows, getattr(config, "max_position_embeddings", None)

    def unembed(self, hidden: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
        """Logits of what the final norm has made of hidden states, scaled and capped as in the
        model's own forward pass, and never in bfloat16."""
        logits = unembedded(self.hf, hidden)
        config = self.config.get_text_config(decoder=True)
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        logits = logits * scale if scale != 1 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    def all_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits at every position, as the model rounds them; never in bfloat16."""
        return self._own_logits(tokens.to(self.device))

    def _own_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        logits = self.hf(input_ids=tokens, use_cache=False).logits
        return logits.float() if self.dtype == torch.bfloat16 else logits

    @torch.no_grad()
    @entrance(ModelError)
    def generate(self, prompt: str, max_new_tokens: int = 4) -> str:
        """Greedy continuation of a prompt, as text."""
        ids = torch.tensor([self.encode(prompt)], device=self.device)
        for _ in range(max_new_tokens):
            step = self.last_logits(ids, torch.tensor([ids.shape[1] - 1])).argmax(-1)
            ids = torch.cat([ids, step[:, None]], 1)
        return str(self.get_tokenizer().decode(ids[0, -max_new_tokens:]))

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder with tokenizer, in the dtype the model was loaded in.

        Unedited weights come back bit for bit: they were widened from that dtype.
        """
        with quiet():
            out = copy.deepcopy(self.hf).to("cpu", self.saved_dtype)  # pyright: ignore[reportArgumentType]
            turn_back(out)
            out.config.dtype = self.saved_dtype
            out.save_pretrained(folder)
            self.get_tokenizer().save_pretrained(folder)
