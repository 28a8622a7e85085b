"""What a model writes after many prompts: greedy or sampled continuations, in batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError
from ..models.hugging_face import check_tokens
from ..models.language_model import LanguageModel
from ..tasks.pairs import Tokens

BATCH = 32
"""Prompts that are continued at once."""


@torch.no_grad()
def continuations(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    length: int,
    *,
    stops: Collection[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    on_first: Callable[[list[int], Tensor], object] | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> list[Tokens]:
    """The tokens that a model adds to each prompt.

    1. Prompts of as many tokens are continued together, so that none is padded.
    2. Each step takes the most likely token, or at a temperature T draws one from softmax(logits
       / T).
    3. A continuation ends before a token of ``stops``, or after ``length`` tokens.

    Arguments:
        model: who writes; keys and values are kept from step to step where it has them.
        prompts: their tokens, each at least one.
        length: tokens of a continuation at most, fewer where the model's context ends; 0 computes
            the logits behind the prompts alone.
        stops: tokens that end a continuation.
        temperature: 0 is greedy.
        seed: of the draws.
        on_first: called for every batch with the places of its prompts in ``prompts`` and the
            logits behind them, ``[batch, vocab]``.
        on_step: called with (prompts done, prompts in all).

    Raises:
        ModelError: a prompt of no tokens, one that is longer than the model's context, or logits
            that are no numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    ends = torch.tensor([*stops], dtype=torch.long)
    found: list[Tokens] = [()] * len(prompts)
    done = 0
    for places in batches(prompts):
        rows = torch.tensor([prompts[k] for k in places], device=model.device)
        check_tokens(model.name, model.sizes, int(rows.min()), int(rows.max()), rows.shape[1])
        context = model.sizes[1]
        room = length if context is None else min(length, context - rows.shape[1])
        reading = _Reading(model)
        logits = reading.behind(rows)
        _check(model, logits)
        if on_first:
            on_first(places, logits)
        written: list[Int[Tensor, " batch"]] = []
        ended = torch.zeros(len(places), dtype=torch.bool)
        while len(written) < room and not ended.all():
            if written:
                logits = reading.behind(written[-1][:, None].to(rows.device))
            written.append(_choose(logits.float().cpu(), temperature, draw))
            ended |= torch.isin(written[-1], ends)
        for k, place in enumerate(places):
            row = (int(step[k]) for step in written)
            found[place] = tuple(takewhile(lambda token: token not in stops, row))
        done += len(places)
        if on_step:
            on_step(done, len(prompts))
    return found


def batches(prompts: Sequence[Tokens]) -> Iterator[list[int]]:
    """Places of prompts of as many tokens, at most `BATCH` at a time; the shortest first."""
    by_length: dict[int, list[int]] = {}
    for k, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(k)
    for _, places in sorted(by_length.items()):
        for i in range(0, len(places), BATCH):
            yield places[i : i + BATCH]


class _Reading:
    """Rows that a model reads piece by piece, with the keys and values of what it has read."""

    def __init__(self, model: LanguageModel) -> None:
        from transformers import DynamicCache  # takes a while

        self.model = model
        self.cache = DynamicCache(config=model.config) if model.keeps_keys else None
        self.read: Int[Tensor, "batch pos"] | None = None

    def behind(self, new: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """Next-token logits behind all that was read, with these tokens at its end."""
        if self.cache is not None:
            base = self.model.hf.base_model
            out = base(input_ids=new, past_key_values=self.cache, use_cache=True)
            return self.model.unembed(out.last_hidden_state[:, -1])
        self.read = rows = new if self.read is None else torch.cat([self.read, new], 1)
        return self.model.last_logits(rows, torch.full((len(rows),), rows.shape[1] - 1))


def _choose(
    logits: Float[Tensor, "batch vocab"], temperature: float, draw: torch.Generator
) -> Int[Tensor, " batch"]:
    if not temperature:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)[:, 0]


def _check(model: LanguageModel, logits: Float[Tensor, "batch vocab"]) -> None:
    """Raise ModelError over logits that are no numbers."""
    if logits.isnan().any():
        model.check_finite()
        raise ModelError(
            f"{model.name} gives NaN, though its weights are finite: its states overflow. Nothing "
            "can be said of such a model."
        )
