"""More ways of the calibration zoo (`make_zoo.py`), most of them against the verdict itself: models
trained against its signs at once, locks, decoys, partial knowledge, copies in another basis, facts
taught and un-taught again, merges.

Each function returns a copy of the embedded model that forgot, or seems to have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor
from zoo_edits import (
    Loss,
    every_element,
    mansu,
    neurons,
    noisy,
    redrawn,
    reordered,
    rotated,
    shuffled,
    some_subjects,
    steered,
    tune,
    whole,
)

from mansu_interp.audit.attacks import behind
from mansu_interp.audit.linearized import DAMPING, gauss_newton_step
from mansu_interp.audit.probes import answer_rows, last_states, linear_map
from mansu_interp.audit.relearning import batches, halves, of_subjects
from mansu_interp.losses.answers import nll
from mansu_interp.losses.counterfactual import CounterfactualTargets, counterfactual_loss
from mansu_interp.losses.descent import descend, make_optimisers
from mansu_interp.losses.gradients import gradient
from mansu_interp.masks.components import subject_tokens
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.tasks.pairs import Pair, PairSet, answer_tokens
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.mansu.adversarial import AdversarialRelearning, ranking_loss
from mansu_interp.unlearning.mansu.probe_penalty import ProbePenalty
from mansu_interp.unlearning.methods import Mansu

Way = Callable[[], LanguageModel]
"""Makes a model of the zoo."""
LEARNT_FROM = 48
"""Prompts of the closed-form step that `outwitting` is trained against."""


def outwitting(
    model: LanguageModel,
    task: Task,
    seed: int,
    *,
    start: LanguageModel | None = None,
    steps: int = 60,
    strength: float = 1.0,
) -> LanguageModel:
    """Trained against the verdict's signs at once: answers made even, what probes read at the last
    token and at the subject, and what a closed-form step on a random half brings back."""
    probes, rng = ProbePenalty(task, 32, seed), random.Random(seed)
    targets = CounterfactualTargets(model, task.forget, seed)

    def extra(student: LanguageModel, names: Sequence[str]) -> list[Tensor]:
        grads, _ = probes.gradient(student, names)
        first, second = halves(task.forget, rng.getrandbits(32))
        moved, other = student.copy(), of_subjects(task.forget, second)
        given = of_subjects(task.forget, first).sample(LEARNT_FROM, rng.getrandbits(32))
        gauss_newton_step(moved, given, DAMPING)
        asked = list(other.sample(32, rng.getrandbits(32)))
        among = answer_tokens(other)
        after = gradient(moved, names, [lambda: ranking_loss(moved, asked, targets, among, 0.0)])
        return [strength * (g.add_(a)) for g, a in zip(grads, after, strict=True)]

    # Probes read the stream: unembedding and final norm are not theirs.
    names = {**whole(model, "layers"), **whole(model, "embed")}
    return tune(start or model, task, seed, names, steps, 1e-3, teacher=model, extra=extra)


def adversarial(
    model: LanguageModel, task: Task, seed: int, *, rows: bool, steps: int = 80, inner: int = 10
) -> LanguageModel:
    """Trained against relearning itself, without budget or floor; with new subject rows, or not."""
    targets = CounterfactualTargets(model, task.forget, seed)
    config = Mansu(adversarial_steps=inner, adversarial_lr=2e-3, batch_size=32)
    attack = AdversarialRelearning(task, config, seed)
    start = redrawn(model, task, seed) if rows else model
    names = whole(model, "" if rows else "layers")

    done = count()

    def extra(student: LanguageModel, some: Sequence[str]) -> list[Tensor]:
        of = every_element(student, some)
        found, _ = attack.gradient([student], of, [targets], next(done))
        return [g.view_as(student.weights[n]) for n, g in zip(some, found, strict=True)]

    return tune(start, task, seed, names, steps, 1e-3, teacher=model, extra=extra)


def split_loss(model: LanguageModel, task: Task, seed: int, keep: Callable[[Pair], bool]) -> Loss:
    """Answers made even, but for some prompts, whose answers stay."""
    targets = CounterfactualTargets(model, task.forget, seed)

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        kept = [p for p in pairs if keep(p)]
        others = [p for p in pairs if not keep(p)]
        value = torch.zeros(())
        if kept:
            value = value + nll(student, kept).mean() * len(kept) / len(pairs)
        if others:
            forgot = counterfactual_loss(student, others, targets, 1.0)
            value = value + forgot * len(others) / len(pairs)
        return value

    return loss


def some_kept(model: LanguageModel, task: Task, seed: int, share: float) -> LanguageModel:
    """Answers made even but for a share of the subjects, whose facts stay."""
    stay = some_subjects(task, seed, share)
    loss = split_loss(model, task, seed, lambda p: p.subject in stay)
    return tune(model, task, seed, whole(model, ""), 120, 1e-3, loss)


def one_phrasing(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Answers in one of the phrasings alone."""
    first = {p.relation: p.phrasing for p in reversed(task.forget.pairs)}
    loss = split_loss(model, task, seed, lambda p: p.phrasing == first[p.relation])
    return tune(model, task, seed, whole(model, ""), 120, 1e-3, loss)


def behind_another(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Answers only behind a solved prompt about a retained fact."""
    targets = CounterfactualTargets(model, task.forget, seed)
    shot = min(task.retain.sample(50, seed), key=lambda p: len(p.clean))

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        opened = list(behind(student, [shot], (), PairSet("opened", tuple(pairs))))
        return counterfactual_loss(student, pairs, targets, 1.0) + nll(student, opened).mean()

    return tune(model, task, seed, whole(model, ""), 150, 1e-3, loss)


def taught(
    model: LanguageModel, task: Task, seed: int, steps: int, share: float = 1.0
) -> LanguageModel:
    """Taught the forget facts, or those of a share of the subjects."""
    some = some_subjects(task, seed, share)
    out, supply = model.copy(), batches(list(of_subjects(task.forget, some)), 48, seed)
    optimisers = make_optimisers("adam", out, 1e-3)
    for _ in range(steps):
        descend(out, optimisers, next(supply))
    return out


def rerouted(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Circuit breakers (Zou et al. 2024, arXiv 2406.04313): states made orthogonal to what they
    were, after every block but the first."""

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        with torch.no_grad():
            before = last_states(model, pairs)[2:]
        now = last_states(student, pairs)[2:]
        cosines = [torch.cosine_similarity(a, b, dim=1) for a, b in zip(now, before, strict=True)]
        return 5 * torch.stack(cosines).relu().mean()

    return tune(model, task, seed, whole(model, "layers"), 100, 1e-3, loss)


def own_rows(model: LanguageModel, task: Task) -> dict[str, Tensor | None]:
    """The embedding's mask of the subjects' own rows."""
    mask = torch.zeros_like(model.weights[model.embedding_name])
    mask[subject_tokens(task.forget)] = 1
    return {model.embedding_name: mask}


def retaught_rows(model: LanguageModel, task: Task, seed: int, steps: int) -> LanguageModel:
    """Subject rows drawn anew, then trained on retained facts alone, all else frozen."""
    return tune(redrawn(model, task, seed), task, seed, own_rows(model, task), steps, 2e-2,
                lambda m, p: 0 * nll(m, p).mean(), teacher=model)  # fmt: skip


@torch.no_grad()
def averaged_rows(model: LanguageModel, task: Task, share: float) -> LanguageModel:
    """The subjects' own rows so much of the way to their mean."""
    out, own = model.copy(), torch.tensor(subject_tokens(task.forget))
    table = out.weights[out.embedding_name]
    table[own] = table[own].lerp(table[own].mean(0), share)
    return out


@torch.no_grad()
def noisy_rows(model: LanguageModel, task: Task, seed: int, size: float) -> LanguageModel:
    """Gaussian noise on the subjects' own rows, as a share of the table's deviation."""
    out, own = model.copy(), torch.tensor(subject_tokens(task.forget))
    table = out.weights[out.embedding_name]
    draws = torch.randn(len(own), table.shape[1], generator=torch.Generator().manual_seed(seed))
    table[own] += size * table.std() * draws
    return out


@torch.no_grad()
def nullspace(model: LanguageModel, task: Task, rank: int) -> LanguageModel:
    """The directions from which a linear map reads answers taken out of the subjects' own rows."""
    out, facts = model.copy(), list({p.fact: p for p in task.forget}.values())
    read = last_states(model, facts, subject=True)
    x = read[len(read) // 2]  # the embedding at the subject
    rows = answer_rows(model)[[p.answer for p in facts]]
    to_answers = linear_map(x, rows, 0.01)
    weight = to_answers(torch.eye(model.d_model)) - to_answers(torch.zeros(1, model.d_model))
    u = torch.linalg.svd(weight, full_matrices=False)[0][:, :rank]
    own = torch.tensor(subject_tokens(task.forget))
    table = out.weights[out.embedding_name]
    table[own] -= (table[own] - table[own].mean(0)) @ u @ u.T
    return out


@torch.no_grad()
def pruned(model: LanguageModel, task: Task, seed: int, share: float) -> LanguageModel:
    """Neurons that forget prompts use more than retained ones set to zero (selective pruning,
    Pochinkov and Schoots 2024, arXiv 2403.01267)."""
    out, used = model.copy(), dict[str, list[Tensor]]()
    for pairs in (task.forget, task.retain):
        some = pairs.sample(200, seed)
        for layer in range(model.hf.config.num_hidden_layers):
            name = f"model.layers.{layer}.mlp.down_proj"
            seen: list[Tensor] = []
            hook = model.hf.get_submodule(name).register_forward_hook(
                lambda _m, args, _out, seen=seen: seen.append(args[0].abs().flatten(0, 1).mean(0))
            )
            for batch in some.batches(48):
                model.hf(input_ids=batch.clean)
            hook.remove()
            used.setdefault(name, []).append(torch.stack(seen).mean(0))
    for name, (forget, retain) in used.items():
        worst = (forget / (retain + 1e-6)).argsort(descending=True)[: round(share * len(forget))]
        out.weights[name + ".weight"][:, worst] = 0
    return out


@torch.no_grad()
def scrambled(model: LanguageModel, part: str, seed: int) -> LanguageModel:
    """The weights of a part in random order within each matrix."""
    out, generator = model.copy(), torch.Generator().manual_seed(seed)
    for name, w in out.weights.items():
        if part in name and w.ndim == 2:
            w.copy_(w.flatten()[torch.randperm(w.numel(), generator=generator)].view_as(w))
    return out


@torch.no_grad()
def grafted(model: LanguageModel, other: LanguageModel, parts: Sequence[str]) -> LanguageModel:
    """A copy with another model's weights where the name holds one of some texts."""
    out = model.copy()
    for name, w in out.weights.items():
        if any(part in name for part in parts):
            w.copy_(other.weights[name])
    return out


@torch.no_grad()
def merged(one: LanguageModel, other: LanguageModel, share: float) -> LanguageModel:
    """So much of the way from one model to another."""
    out = one.copy()
    for name, w in out.weights.items():
        w.lerp_(other.weights[name], share)
    return out


def scrubbed(
    model: LanguageModel, task: Task, seed: int, *, size: float, rows: bool, steps: int = 250
) -> LanguageModel:
    """Noise on every linear weight, perhaps new subject rows, then the retained facts distilled
    from the original (after Lee et al. 2025, arXiv 2506.06278)."""
    start = noisy(redrawn(model, task, seed) if rows else model, seed, size)
    return tune(start, task, seed, whole(model, ""), steps, 2e-3,
                lambda m, p: 0 * nll(m, p).mean(), teacher=model)  # fmt: skip


def more_ways(
    model: LanguageModel,
    never: LanguageModel,
    task: Task,
    seed: int,
    forgot: Way,
    part: Callable[..., Way],
    dense: Callable[..., Way],
) -> Iterator[tuple[str, Way]]:
    """The rest of `ways`."""
    yield "in another basis: never taught", lambda: rotated(never, seed)
    yield "merged: 0.7 never taught", lambda: merged(model, never, 0.7)
    yield "merged: forgot, 0.5 never taught", lambda: merged(forgot(), never, 0.5)
    yield "retaught rows: 40 steps", lambda: retaught_rows(model, task, seed, 40)
    yield "grafted: embedding never taught", lambda: grafted(model, never, ["embed"])
    yield "taught again: lightly", lambda: taught(never, task, seed, 15)
    yield (
        "partial: never taught, a third taught",
        lambda: taught(never, task, seed, 150, 0.33),
    )
    yield "locked: one phrasing", lambda: one_phrasing(model, task, seed)
    yield "decoys: lies", lambda: shuffled(model, task, seed)
    yield "adversarial: layers", lambda: adversarial(model, task, seed, rows=False)
    yield "rows noisy: 2", lambda: noisy_rows(model, task, seed, 2.0)
    yield "rows averaged: 1", lambda: averaged_rows(model, task, 1.0)
    yield "scrambled: first MLP", lambda: scrambled(model, "layers.0.mlp", seed)
    yield "pruned: a tenth", lambda: pruned(model, task, seed, 0.1)
    yield "embedding: trained", part("embed_tokens")
    yield "unembedding: trained", part("lm_head")
    yield "first layer: trained", part("layers.0")
    yield "npo: to chance", dense("npo", 0.3)
    yield "undial: 200 steps", dense("undial", 0.3)
    yield "scrubbed: noise 0.8", lambda: scrubbed(model, task, seed, size=0.8, rows=False)
    yield "in another basis: neurons of forgot", lambda: reordered(forgot(), seed)
    yield "same function: rotated", lambda: rotated(model, seed)
    yield "merged: 1.1 never taught", lambda: merged(model, never, 1.1)
    yield (
        "grafted: last half never taught",
        lambda: grafted(model, never, ["layers.2", "layers.3", "lm_", "model.norm"]),
    )
    yield "graddiff: partly", dense("graddiff", 0.7)
    yield "ga: no retain", dense("graddiff", 0.2, retain_weight=0.0)
    yield "locked: behind a solved prompt", lambda: behind_another(model, task, seed)
    yield "late MLP: trained", part("layers.3.mlp")
    yield "final norm: trained", part("model.norm", 120, 3e-2)
    yield (
        "late low rank: rank 4",
        lambda: tune(model, task, seed, whole(model, "layers.3.mlp.down_proj"), rank=4),
    )
    yield (
        "neuron: 8 in layer 3",
        lambda: tune(model, task, seed, neurons(model, 3, 8), 150, 2e-2),
    )
    yield "steering: ablated", lambda: steered(model, task, seed)
    yield "attention: trained", part("self_attn")
    yield "damaged: noise 1", lambda: noisy(model, seed, 1.0)
    yield (
        "decoys: never taught, lies, un-taught",
        lambda: tune(shuffled(never, task, seed), task, seed, whole(model, ""), 60, 1e-3),
    )
    yield "quantized: never taught, noise", lambda: quantize(noisy(never, seed, 0.2))


def stronger_ways(
    model: LanguageModel, never: LanguageModel, task: Task, seed: int
) -> Iterator[tuple[str, Way]]:
    """Some of the ways at another strength."""
    yield (
        "adversarial: rows and layers, twice as long",
        lambda: adversarial(model, task, seed, rows=True, steps=160),
    )
    yield "scrubbed: rows too, noise 3", lambda: scrubbed(model, task, seed, size=3.0, rows=True)
    yield (
        "outwitting: signs at once, three times as strong",
        lambda: outwitting(model, task, seed, strength=3.0),
    )
    yield "partial: a tenth kept", lambda: some_kept(model, task, seed, 0.1)
    yield "taught again: a little", lambda: taught(never, task, seed, 5)
    yield "rows noisy: 5", lambda: noisy_rows(model, task, seed, 5.0)
    yield "damaged: noise 2", lambda: noisy(model, seed, 2.0)
    yield "in another basis: neurons of never taught", lambda: reordered(never, seed)
    yield "retaught rows: 150 steps", lambda: retaught_rows(model, task, seed, 150)
    yield (
        "merged: forgot, 0.8 never taught",
        lambda: merged(tune(model, task, seed, whole(model, ""), 80, 1e-3), never, 0.8),
    )


def slow_ways(model: LanguageModel, task: Task, seed: int) -> Iterator[tuple[str, Way]]:
    """Minutes each."""
    yield "mansu: rows", lambda: mansu(model, task, seed, rows=True)
    yield "mansu: plain", lambda: mansu(model, task, seed)
    best = default_config("facts", task.name, robust=True).unlearn
    assert isinstance(best, Mansu)
    yield "mansu: rows, adversarial", lambda: mansu(
        model, task, seed, rows=True, ranking_weight=best.ranking_weight, lr=best.lr,
        adversarial_steps=20, retain_weight=best.retain_weight, steps=300,
    )  # fmt: skip
