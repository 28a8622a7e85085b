"""What a model's states hold: a linear probe, and the states of one model run on by another.

The *probe* is a ridge regression from half A's states to the unembedding rows of their answers. It
is asked for half B, whose answers it was not fitted on. *Stitching* runs the first layers of one
model and the last of another (after Bansal et al. 2021, arXiv 2106.07682). Both score by four-way
choice: chance is 0.25. The *depth score* patches single states instead, and measures
log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ModelError
from ..losses.accuracy import ranked_first, ranked_last
from ..losses.answers import divergence
from ..losses.gradients import CHUNK, passes
from ..models.language_model import LanguageModel
from ..models.layout import output_embeddings
from ..models.stream import widen
from ..tasks.pairs import Batch, Pair, PairSet, collate

RIDGE = 0.01
"""Ridge of the probe, as a share of the standardised inputs' variance."""
BLOCKS = ("layers", "h")
"""Names under which Hugging Face models have their blocks."""
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
"""And their final norm."""

ProbeMap = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]]
"""A linear map from states to (centred) unembedding rows."""


def stages(model: LanguageModel) -> list[torch.nn.Module]:
    """The modules that read the residual stream in turn: every block, then the final norm.

    Raises:
        ModelError: blocks or final norm have a name that is not known.
    """
    base = model.hf.base_model
    base = getattr(base, "decoder", base)  # OPT
    blocks = [getattr(base, n) for n in BLOCKS if hasattr(base, n)]
    norms = [getattr(base, n) for n in FINAL_NORM if getattr(base, n, None) is not None]
    if not (blocks and norms):
        raise ModelError(
            f"{model.name}: stitching needs blocks named {' or '.join(BLOCKS)} and a final norm "
            f"named {', '.join(FINAL_NORM)}; {type(base).__name__} lacks them."
        )
    return [*blocks[0], norms[0]]


def _shape(model: LanguageModel) -> str:
    """A model's architecture in words."""
    shape = model.architecture
    return (
        f"a {type(model.hf).__name__} of {shape.n_layers} layers, {shape.n_heads} heads and width "
        f"{model.d_model}"
    )


def check_alike(original: LanguageModel, edited: LanguageModel) -> None:
    """Raise ModelError unless two checkpoints can be compared state by state.

    Raises:
        ModelError: another architecture, width, vocabulary, tokenizer or shape of a weight, or a
            weight that is not finite.
    """
    if original.architecture != edited.architecture or original.d_model != edited.d_model:
        raise ModelError(
            f"{edited.name} is {_shape(edited)}; {original.name} is {_shape(original)}. Compare "
            "two of one model."
        )
    sizes = [len(output_embeddings(m.hf).get_parameter("weight")) for m in (original, edited)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{edited.name} has a vocabulary of {sizes[1]}, {original.name} of {sizes[0]}. "
            "Compare checkpoints with the same vocabulary."
        )
    one, two = ({n: tuple(w.shape) for n, w in m.weights.items()} for m in (original, edited))
    if other := [n for n in {**one, **two} if one.get(n) != two.get(n)]:
        raise ModelError(
            f"The weight {other[0]} is {two.get(other[0], 'missing')} in {edited.name} and "
            f"{one.get(other[0], 'missing')} in {original.name}. Compare two of one model."
        )
    for model in (original, edited):
        model.check_finite()
    if original.get_tokenizer().get_vocab() != edited.get_tokenizer().get_vocab():
        raise ModelError(
            f"{edited.name} and {original.name} have different tokenizers. Compare checkpoints "
            "that share one."
        )


@dataclass(frozen=True)
class Call:
    """What a stage was called with, and how it answers."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    in_tuple: bool
    """Whether it returns a tuple, of which the state is the first."""

    @property
    def read(self) -> Float[Tensor, "batch pos d_model"]:
        """The state that it reads."""
        read = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(read, Tensor)
        return read

    def of(self, state: Tensor) -> Call:
        """The same call of another state."""
        if self.args:
            return replace(self, args=(state, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": state})

    def repeat(self, stage: torch.nn.Module) -> Float[Tensor, "batch pos d_model"]:
        """Call a stage in this way; what it makes of the state."""
        made = stage(*self.args, **self.kwargs)
        return made[0] if self.in_tuple else made


def calls(model: LanguageModel, batch: Batch) -> list[Call]:
    """How each stage is called in a forward pass (see `stages`); gradients flow."""
    out: list[Call] = []

    def keep(
        _m: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object], made: object
    ) -> None:
        out.append(Call(args, kwargs, isinstance(made, tuple)))

    with ExitStack() as stack:
        for stage in stages(model):
            stack.callback(stage.register_forward_hook(keep, with_kwargs=True).remove)
        last_logits(model, batch)
    return out


@contextmanager
def resumed(model: LanguageModel, k: int, call: Call, state: Tensor) -> Iterator[None]:
    """Run the body with a state for what stage k reads; the stages before it compute nothing.

    Arguments:
        model: whose stages (see `stages`).
        k: the stage.
        call: of any stage before the final norm, for what the skipped ones return.
        state: what stage k reads.
    """
    every = stages(model)

    def skip(*_: object, **__: object) -> object:
        return (state,) if call.in_tuple else state

    def put(
        _m: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        own = Call(args, kwargs, call.in_tuple).of(state)
        return own.args, own.kwargs

    with ExitStack() as stack:
        for stage in every[:k]:
            stack.enter_context(patch.object(stage, "forward", skip))
        stack.callback(every[k].register_forward_pre_hook(put, with_kwargs=True).remove)
        yield


def last_logits(model: LanguageModel, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Logits of the token that follows each prompt. Unlike `LanguageModel.last_logits` it shares no
    prefix, so that hooks see every token of every prompt."""
    hidden = model.hf.base_model(input_ids=batch.clean, use_cache=False).last_hidden_state
    return model.unembed(hidden[torch.arange(len(batch), device=hidden.device), batch.last])


def states(model: LanguageModel, batch: Batch) -> list[Float[Tensor, "batch pos d_model"]]:
    """What each stage reads (see `stages`); gradients flow."""
    return [call.read for call in calls(model, batch)]


def last_states(
    model: LanguageModel, pairs: Sequence[Pair], subject: bool = False
) -> list[Float[Tensor, "batch d_model"]]:
    """What each stage reads at the last token of each prompt; with ``subject``, then also what each
    reads at the subject's last token, which is the last that the corrupt prompt changes."""
    batch = collate(pairs, model.device)
    read, rows = states(model, batch), torch.arange(len(batch), device=model.device)
    out = [widen(s[rows, batch.last]) for s in read]
    if subject:
        positions = torch.arange(batch.clean.shape[1], device=model.device)
        at = (batch.changed * positions).amax(1)
        out += [widen(s[rows, at]) for s in read]
    return out


def answer_rows(model: LanguageModel) -> Float[Tensor, "vocab d_model"]:
    """The unembedding's rows, centred: what a probe maps states to."""
    rows = widen(output_embeddings(model.hf).get_parameter("weight").detach())
    return rows - rows.mean(0)


@torch.no_grad()
def ranked(
    model: LanguageModel, pairs: PairSet
) -> tuple[Bool[Tensor, " prompts"], Bool[Tensor, " prompts"]]:
    """Which prompts' answers rank first of four, and which last, in the order of
    ``pairs.batches(CHUNK)``."""
    first, last = [], []
    for batch in pairs.batches(CHUNK, model.device):
        logits = model.last_logits(batch.clean, batch.last)
        first.append(ranked_first(logits, batch.choices))
        last.append(ranked_last(logits, batch.choices))
    return torch.cat(first).cpu(), torch.cat(last).cpu()


def ranked_only(model: LanguageModel, pairs: PairSet) -> PairSet:
    """Those whose answers a model ranks first of four; all where there are none."""
    order = [p for part in pairs.parts(CHUNK) for p in part]
    kept = tuple(
        p for p, first in zip(order, ranked(model, pairs)[0].tolist(), strict=True) if first
    )
    return PairSet(pairs.name, kept or pairs.pairs)


@torch.no_grad()
def stitches(
    first: LanguageModel, last: LanguageModel, pairs: PairSet, *, since: int = 0
) -> list[float]:
    """Four-way choice with the states of ``first`` up to each cut and ``last`` from there on.

    Of an early cut a high share says little of ``first``: any model's states tell ``last`` which
    subject it is about, and its own later blocks know the rest.

    Arguments:
        first: whose embedding and first blocks are run.
        last: whose other blocks and unembedding are.
        pairs: what is asked.
        since: the first cut; -1: the last alone, behind all blocks.

    Returns:
        By cut: after the first k blocks (and the embedding) of ``first``, k from ``since`` on.
    """
    cuts = range(len(stages(last)))[since:]
    right = dict.fromkeys(cuts, 0)
    for batch in pairs.batches(CHUNK, first.device):
        made = calls(first, batch)
        for k in cuts:
            with resumed(last, k, made[0], made[k].read):
                right[k] += int(ranked_first(last_logits(last, batch), batch.choices).sum())
    return [r / len(pairs) for r in right.values()]


@torch.no_grad()
def patched_log_probs(
    source: LanguageModel, target: LanguageModel, pairs: PairSet
) -> Float[Tensor, "blocks prompts"]:
    """Log-probability (nats) of each answer's first token in ``target``, whose state at the last
    token after one block is that of ``source``; one row for each block."""
    found: list[list[Tensor]] = [[] for _ in stages(target)[1:]]
    for batch in pairs.batches(CHUNK, source.device):
        rows = torch.arange(len(batch), device=batch.clean.device)
        at, own = (rows, batch.last), calls(target, batch)
        for k, state in enumerate(states(source, batch)[1:]):
            mixed = own[k + 1].read.index_put(at, state[at])
            with resumed(target, k + 1, own[0], mixed):
                logp = last_logits(target, batch).log_softmax(-1)
            found[k].append(logp[rows, batch.answer].cpu())
    return torch.stack([torch.cat(f) for f in found])


def depth_score(
    full: Float[Tensor, " prompts"],
    never: Float[Tensor, "blocks prompts"],
    edited: Float[Tensor, "blocks prompts"],
    *,
    least: float = 0.05,
) -> float:
    """The Unlearning Depth Score (arXiv 2605.24614): 1 = erased at every depth, 0 = nowhere.

    Per prompt, over the blocks at which the never-taught model's state costs the original more
    than ``least`` nats, sum(d1 clip(d2 / d1, 0, 1)) / sum(d1), with d1 and d2 what the never-taught
    and the edited model's states cost; then the mean over prompts. A prompt without such a block is
    left out.

    Arguments:
        full: the original's log-probability of each answer (nats).
        never: the same with the never-taught model's state patched in (`patched_log_probs`).
        edited: the same with the edited model's.
        least: of d1, in nats.

    Returns:
        The score, or NaN where no prompt has such a block.
    """
    lacks, shown = full - never, full - edited
    lacks = torch.where(lacks > least, lacks, 0.0)
    total = lacks.sum(0)
    found = torch.minimum(shown.clamp_min(0.0), lacks).sum(0)
    return float((found[total > 0] / total[total > 0]).mean())


@torch.no_grad()
def linear_map(
    x: Float[Tensor, "n d_in"], want: Float[Tensor, "n d_out"], ridge: float
) -> ProbeMap:
    """A ridge regression on standardised inputs, in closed form; its outputs are centred."""
    center, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - center) / scale
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (want - want.mean(0)))
    return lambda other: (other - center) / scale @ weight


@torch.no_grad()
def fit_probe(
    model: LanguageModel, half_a: PairSet, *, ridge: float = RIDGE, subject: bool = False
) -> list[ProbeMap]:
    """One map to the answers' (centred) unembedding for each of `last_states`."""
    parts = list(half_a.parts(CHUNK))
    seen = [last_states(model, part, subject) for part in parts]
    want = answer_rows(model)[[p.answer for part in parts for p in part]]
    return [linear_map(torch.cat(x), want, ridge) for x in zip(*seen, strict=True)]


def probe_scores(
    model: LanguageModel,
    half_a: PairSet,
    half_b: Sequence[Pair],
    tokens: Int[Tensor, " tokens"],
    *,
    ridge: float = RIDGE,
    subject: bool = False,
) -> list[Float[Tensor, "prompts tokens"]]:
    """What linear probes, fitted on half A's states, make of half B's.

    Arguments:
        model: whose states are probed.
        half_a: prompts that the probes are fitted on.
        half_b: prompts that they are asked for.
        tokens: whose scores are wanted.
        ridge: of the regression on standardised states.
        subject: probe also at the subject's last token.

    Returns:
        Scores by stage (see `stages`) at the last token: the embedding first, the last block's
        output last. With ``subject``, then as many at the subject's.
    """
    rows = answer_rows(model)[tokens.to(model.device)]
    maps = fit_probe(model, half_a, ridge=ridge, subject=subject)
    found: list[list[Tensor]] = [[] for _ in maps]
    for k in range(0, len(half_b), CHUNK):
        read = last_states(model, half_b[k : k + CHUNK], subject)
        for to_answers, x, out in zip(maps, read, found, strict=True):
            out.append((to_answers(x) @ rows.T).cpu())
    return [torch.cat(f) for f in found]


@torch.no_grad()
def probe(
    model: LanguageModel, half_a: PairSet, half_b: PairSet, *, ridge: float = RIDGE
) -> Bool[Tensor, "cuts prompts"]:
    """Which prompts of half B a linear probe, fitted on half A's last states, answers correctly.

    Arguments:
        model: whose states are probed.
        half_a: prompts that the probe is fitted on.
        half_b: prompts that it is asked for.
        ridge: of the regression on standardised states.

    Returns:
        One row per stage (see `stages`): the embedding first, the last block's output last. Prompts
        are in the order of ``half_b.parts(CHUNK)``.
    """
    pairs = [p for part in half_b.parts(CHUNK) for p in part]
    choices = torch.tensor([p.choices for p in pairs])
    tokens = choices.unique()
    at = torch.searchsorted(tokens, choices)
    scores = probe_scores(model, half_a, pairs, tokens, ridge=ridge)
    return torch.stack([ranked_first(s, at) for s in scores])


@torch.no_grad()
def answer_scores(
    model: LanguageModel, pairs: Sequence[Pair], tokens: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, "prompts tokens"], Bool[Tensor, " prompts"]]:
    """A model's logits of some tokens after each prompt, and where it predicts the answer itself,
    of all tokens.

    Arguments:
        model: that is asked.
        pairs: the prompts.
        tokens: whose logits are wanted.
    """
    number = {pair: k for k, pair in enumerate(pairs)}
    scores = torch.zeros(len(pairs), len(tokens))
    outright = torch.zeros(len(pairs), dtype=torch.bool)
    for part in passes(list(number), CHUNK, model.d_model):
        batch, own = collate(part, model.device), [number[p] for p in part]
        logits = model.last_logits(batch.clean, batch.last)
        scores[own] = logits[:, tokens.to(model.device)].float().cpu()
        outright[own] = (logits.argmax(-1) == batch.answer).cpu()
    return scores, outright


@torch.no_grad()
def model_divergence(original: LanguageModel, edited: LanguageModel, pairs: PairSet) -> float:
    """Mean KL(original || edited) of the next token after some prompts, in nats."""
    total = 0.0
    for part in pairs.parts(CHUNK):
        before, after = (last_logits(m, collate(part, m.device)) for m in (original, edited))
        total += float(divergence(after, before.to(after.device))) * len(part)
    return total / len(pairs)
