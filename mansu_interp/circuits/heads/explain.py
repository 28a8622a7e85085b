"""What a head does on some pairs: where it looks, why, what it writes, and its role.

1. Where: mean attention from the last token, by the role of the token that is looked at (`ROLES`).
2. Why (the QK part; Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): the
   attention logit of the token of its main role that the head looks at most, above the mean over
   the tokens that it sees. With norms frozen at their values in the run it is bilinear in what the
   query and the keys read, and the stream is a sum of writes: so it is a sum over the writers that
   the keys read (query as it is), and one over those that the query reads (keys as they are); what
   is left is of biases and positions (`_why`). Exact, but where a model caps attention logits
   (Gemma 2): there the cap is linearised.
3. What: the direct effect of its write on the logits, final norm frozen, a cap on logits left out.
4. Its role: `SCORES`, each beside the largest of at least `RANDOM` random heads. A random head is
   one of the model's own whose query, key and value weights have their input coordinates shuffled;
   it reads the stream of the whole model, and nothing else reads what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import CircuitError
from ...models.hook_points import Recorder
from ...models.hooked import AnyModel
from ...models.stream import widen
from ...tasks.pairs import Batch, PairSet, collate
from ...utils.ranges import entrance
from .records import ROLES, ExplainedHead, ExplainedHeads
from .runs import Frozen, HeadRuns, shuffle

RANDOM = 200
"""Random heads with which a head is compared, at least."""
WRITERS, TOKENS = 3, 5
"""How many are named of the writers that make a logit, and of the tokens raised and lowered."""
_BATCH = 8
"""Pairs at a time."""
_REPEATED = (4, 20)
"""Random sequences, and the tokens of each that come twice."""
_VOCABULARY = 4096
"""Tokens, drawn at random, over which copying is measured."""


def _tokens_by_role(batch: Batch) -> Bool[Tensor, "roles batch pos"]:
    """Which tokens have which role; every real one has one."""
    at, last = torch.arange(batch.clean.shape[1], device=batch.last.device), batch.last[:, None]
    found = [batch.changed, at == last, at == 0, at == last - 1, at >= 0]
    left, out = batch.real, []
    for role in found:
        out.append(role & left)
        left = left & ~role
    return torch.stack(out)


def _sources(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """The answer's own token where the prompt has it, else the subject's tokens."""
    answers = (batch.clean == batch.answer[:, None]) & batch.real
    return torch.where(answers.any(1, keepdim=True), answers, _tokens_by_role(batch)[0])


UNSEEN = -1e4
"""Attention logit below which a token is masked: masks add -inf, or a dtype's lowest number."""


def _why(
    heads: HeadRuns,
    run: Recorder,
    batch: Batch,
    at: tuple[int, int],
    role: Bool[Tensor, "batch pos"],
    writes: Float[Tensor, "writers batch pos d_model"],
) -> tuple[float, int, list[Float[Tensor, " writers"]]]:
    """The attention logit of a head to a role, above its mean over all tokens that it sees, summed
    over the pairs that have the role; how many have; and its parts by writer, of keys and query.

    """
    (layer, h), s = at, heads.stream
    rows = torch.arange(len(batch))
    logits = heads.attention_logits(layer, run)[:, h][rows, batch.last]
    seen = logits.detach() > UNSEEN
    logits = torch.where(seen, logits, 0.0)
    most = torch.where(role & seen, logits.detach(), -torch.inf).argmax(1)
    logit = ((logits[rows, most] - logits.sum(1) / seen.sum(1)) * (role & seen).any(1)).sum()
    ends = [heads.projections(layer, c, run) for c in "kq"]
    grads = torch.autograd.grad(logit, [run[names[-1]] for names in ends], retain_graph=True)
    x, parts = widen(run[s.before_attention(layer)].detach()), []
    norm = Frozen(s.norm(layer, mlp=False), x)
    readings = {r.kind: r.weight for r in s.readings(layer)}
    for kind, head, g in zip("kq", (h * s.n_kv // s.n_heads, h), grads, strict=True):
        weight = readings[kind]
        by_head = heads.at_projection(layer, kind, run, widen(g), len(weight))
        pulled = norm.back(by_head[:, :, head] @ weight[head])
        parts.append(einsum(writes, pulled, "w b p d, b p d -> w"))
    return float(logit.detach()), int((role & seen).any(1).sum()), parts


def _stands_out(
    heads: HeadRuns, run: Recorder, wrote: Recorder, seen: Recorder, batch: Batch
) -> tuple[Bool[Tensor, "heads batch"], Float[Tensor, "heads batch"]]:
    """Whether each head looks most at the source and raises the answer above the rival and all
    distractors, and its direct effect on answer minus rival.

    Arguments:
        heads: of the model.
        run: of the model as it is.
        wrote: has what the heads put out; the same, or that of random ones.
        seen: has their attention patterns.
        batch: the pairs.
    """
    rows = torch.arange(len(batch))
    most = heads.attention(seen)[:, rows, batch.last].argmax(-1)
    rivals = torch.cat([batch.counterfactual[:, None], batch.choices[:, 1:]], 1)
    apart = heads.unembedding[batch.answer][:, None] - heads.unembedding[rivals]
    final = Frozen(heads.final_norm, widen(run[heads.stream.final].detach())[rows, batch.last])
    wrote_last = final.apply(heads.writes(wrote, batch.last))
    effects = einsum(wrote_last, apart, "h b d, b c d -> h b c")
    return _sources(batch)[rows, most] & (effects > 0).all(-1), effects[..., 0]


def _copying(heads: HeadRuns, draw: int | None = None) -> Float[Tensor, " heads"]:
    """Sum of the eigenvalues of each head's OV circuit, from the embedding to the unembedding, over
    the sum of their sizes; with ``draw``, of random heads.

    The eigenvalues of U O V E that are not 0 are those of V (E U) O, a small matrix. Gains and
    centring of the norms are part of V and O.
    """
    s, d = heads.stream, heads.embedding.shape[1]
    some = torch.randperm(len(heads.embedding), generator=torch.Generator().manual_seed(0))
    some = some[:_VOCABULARY].to(heads.embedding.device)
    both = heads.embedding[some].T @ heads.unembedding[some]
    final, out = Frozen(heads.final_norm, torch.ones(1, d, device=both.device)), []
    for i in heads.layers:
        norm = Frozen(s.norm(i, mlp=False), torch.ones(1, d, device=both.device))
        value = next(r.weight for r in s.readings(i) if r.kind == "v")
        if draw is not None:
            value = shuffle(value, draw * len(heads.layers) + i)
        value = norm.linear_back(value).repeat_interleave(s.n_heads // s.n_kv, 0)
        write = final.linear(rearrange(s.output_weight(i), "d h c -> h c d"))
        small = value @ both @ write.transpose(1, 2)
        found = torch.linalg.eigvals(small)
        out.append(found.real.sum(1) / found.abs().sum(1).clamp(min=1e-12))
    return torch.cat(out)


def _on_repeated(
    patterns: Float[Tensor, "heads batch query key"],
) -> Float[Tensor, "2 heads"]:
    """Mean attention to the token before, and to the token behind the last occurrence of the same
    one, in random tokens that come twice."""
    n = patterns.shape[-1] // 2
    before = patterns.diagonal(-1, 2, 3).mean((1, 2))
    behind = patterns.diagonal(1 - n, 2, 3)[..., 1:].mean((1, 2))
    return torch.stack([before, behind])


def _repeated(heads: HeadRuns) -> Int[Tensor, "batch pos"]:
    """Random sequences of tokens, each of which comes twice."""
    rows, limit = heads.stream.model.sizes
    batch, n = _REPEATED[0], min(_REPEATED[1], (limit or 10**6) // 2)
    draw = torch.Generator().manual_seed(0)
    once = torch.stack([torch.randperm(rows, generator=draw)[:n] for _ in range(batch)])
    return torch.cat([once, once], 1).to(heads.model.device)


@dataclass
class _Seen:
    """Of all heads of a model, layer by layer, as means over pairs."""

    attention: Float[Tensor, "roles heads"]
    effect: Float[Tensor, " heads"]
    write: Float[Tensor, "heads d_model"]
    """Behind the frozen final norm."""
    scores: Float[Tensor, "scores heads"]
    """Previous-token, induction, copying, mover."""
    chance: Float[Tensor, " scores"]
    """The largest of random heads."""
    named: bool
    """Whether most prompts have the answer's own token."""


@torch.no_grad()
def _look(heads: HeadRuns, pairs: PairSet) -> _Seen:
    """What all heads do, and what random ones reach."""
    s, n = heads.stream, heads.stream.n_layers * heads.stream.n_heads
    draws = range(-(-RANDOM // n))
    attention, effect = torch.zeros(len(ROLES), n), torch.zeros(n)
    write, named = torch.zeros(n, heads.embedding.shape[1]), 0
    mover = torch.zeros(1 + len(draws), n)
    for part in pairs.parts(_BATCH):
        batch = collate(part, heads.model.device)
        run, rows = heads.run(batch.clean), torch.arange(len(part))
        last = heads.attention(run)[:, rows, batch.last]
        roles = _tokens_by_role(batch).to(last)
        attention += einsum(last, roles, "h b p, r b p -> r h").cpu()
        hits, apart = _stands_out(heads, run, run, run, batch)
        effect += apart.sum(1).cpu()
        mover[0] += hits.sum(1).cpu()
        final = Frozen(heads.final_norm, widen(run[s.final])[rows, batch.last])
        write += final.apply(heads.writes(run, batch.last)).sum(1).cpu()
        named += int(((batch.clean == batch.answer[:, None]) & batch.real).any(1).sum())
        for draw in draws:
            wrote, hooks = heads.shuffled(run, draw)
            seen = heads.run(batch.clean, hooks)
            mover[1 + draw] += _stands_out(heads, run, wrote, seen, batch)[0].sum(1).cpu()
    tokens = _repeated(heads)
    run = heads.run(tokens)
    own = [_on_repeated(heads.attention(run)), _copying(heads)[None]]
    random = []
    for draw in draws:
        seen = heads.run(tokens, heads.shuffled(run, draw)[1])
        patterns = _on_repeated(heads.attention(seen))
        random.append(torch.cat([patterns, _copying(heads, draw)[None]]).cpu())
    n_pairs = len(pairs)
    return _Seen(
        attention / n_pairs,
        effect / n_pairs,
        write / n_pairs,
        scores=torch.cat([*own, mover[:1].to(own[0]) / n_pairs]).cpu(),
        chance=torch.cat([torch.cat(random, 1).amax(1), mover[1:].amax()[None] / n_pairs]),
        named=named > n_pairs / 2,
    )


def _logits(
    heads: HeadRuns, pairs: PairSet, asked: Sequence[tuple[int, int]], main: Sequence[int]
) -> list[tuple[float, list[Float[Tensor, " writers"]]]]:
    """Of each head, the attention logit to its main role and its parts by writer (`_why`), as means
    over the pairs that have the role."""
    s, out = heads.stream, []
    total, count = [0.0] * len(asked), [0] * len(asked)
    parts = [[torch.zeros(s.graph.writers_before(layer)) for _ in "kq"] for layer, _ in asked]
    for part in pairs.parts(_BATCH):
        batch = collate(part, heads.model.device)
        run, roles = heads.run(batch.clean, grad=True), _tokens_by_role(batch)
        writes = heads.all_writes(run)
        for k, (layer, h) in enumerate(asked):
            before = writes[: s.graph.writers_before(layer)]
            logit, n, found = _why(heads, run, batch, (layer, h), roles[main[k]], before)
            total[k], count[k] = total[k] + logit, count[k] + n
            parts[k] = [old + new.cpu() for old, new in zip(parts[k], found, strict=True)]
    for k, n in enumerate(count):
        out.append((total[k] / max(n, 1), [p / max(n, 1) for p in parts[k]]))
    return out


@entrance(CircuitError)
def explain_heads(model: AnyModel, pairs: PairSet, heads: Sequence[str]) -> ExplainedHeads:
    """What some heads do on some pairs: where they look and why, what they write, their role.

    Arguments:
        model: from `load_model`, or a HookedTransformer.
        pairs: whose clean prompts are run; the corrupt ones say which tokens are the subject.
        heads: ids, such as ``["a3.h5"]``.

    Returns:
        A record of each, in the order in which they compute (`ExplainedHead`).

    Raises:
        CircuitError: no such head, or an architecture without attention patterns.
    """
    runs = HeadRuns(model)
    s = runs.stream
    names = [node.id for node in s.graph.writers if node.kind == "head"]
    if unknown := [h for h in heads if h not in names]:
        raise CircuitError(
            f"{unknown[0]!r} is no head of {runs.model.name}; heads are called {names[0]} to "
            f"{names[-1]}."
        )
    chosen = [k for k, name in enumerate(names) if name in heads]
    seen = _look(runs, pairs)
    main = seen.attention.argmax(0).tolist()
    asked = [divmod(k, s.n_heads) for k in chosen]
    logits = _logits(runs, pairs, asked, [main[k] for k in chosen])
    decode = _decoder(runs)
    mover = "name-mover" if seen.named else "answer-mover"
    scored = ("previous-token", "induction", "copying", mover)
    writers, out = [w.id for w in s.graph.writers], []
    for k, (logit, parts) in zip(chosen, logits, strict=True):
        keys, query = (_most(writers, p, WRITERS) for p in parts)
        moved = runs.unembedding @ seen.write[k].to(runs.unembedding)
        order = moved.argsort(descending=True).tolist()
        raises, lowers = (
            tuple((decode(t), float(moved[t])) for t in some)
            for some in (order[:TOKENS], order[::-1][:TOKENS])
        )
        out.append(
            ExplainedHead(
                head=names[k],
                attention=dict(zip(ROLES, seen.attention[:, k].tolist(), strict=True)),
                looks_at=ROLES[main[k]],
                logit=logit,
                keys=keys,
                query=query,
                effect=float(seen.effect[k]),
                raises=raises,
                lowers=lowers,
                scores=dict(zip(scored, seen.scores[:, k].tolist(), strict=True)),
                chance=dict(zip(scored, seen.chance.tolist(), strict=True)),
            )
        )
    return ExplainedHeads(tuple(out))


@entrance(CircuitError)
def explain_head(model: AnyModel, pairs: PairSet, head: str) -> ExplainedHead:
    """What one head does on some pairs; see `explain_heads`.

    Arguments:
        model: from `load_model`, or a HookedTransformer.
        pairs: whose clean prompts are run.
        head: its id, such as ``"a3.h5"``.

    Raises:
        CircuitError: no such head, or an architecture without attention patterns.
    """
    return explain_heads(model, pairs, [head])[head]


def _most(
    names: list[str], values: Float[Tensor, " writers"], n: int
) -> tuple[tuple[str, float], ...]:
    """The largest by size, with their names."""
    order = values.abs().argsort(descending=True, stable=True)[:n].tolist()
    return tuple((names[k], float(values[k])) for k in order)


def _decoder(runs: HeadRuns) -> Callable[[int], str]:
    """Texts of tokens; their ids where there is no tokenizer."""
    tokenizer = runs.model.tokenizer
    return str if tokenizer is None else lambda token: str(tokenizer.decode([token]))
