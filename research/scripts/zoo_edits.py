"""Ways to edit a model, of the calibration zoo (`make_zoo.py`): parts trained, rows redrawn, facts
overwritten, noise, low rank, locks, copies that compute the same.

Each function returns a copy of the embedded model that forgot, or seems to have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mansu_interp.audit.probes import answer_rows, fit_probe, last_logits, last_states
from mansu_interp.audit.relearning import of_subjects
from mansu_interp.circuits.search.discover import discover
from mansu_interp.losses.answers import log_probs, nll
from mansu_interp.losses.counterfactual import CounterfactualTargets, counterfactual_loss
from mansu_interp.masks.components import subject_tokens
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.pairs import Pair, PairSet, answer_tokens, collate
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.mansu.probe_penalty import z_scores
from mansu_interp.unlearning.training import Sampler, retain_loss, retain_target
from mansu_interp.unlearning.unlearn import unlearn

Loss = Callable[[LanguageModel, list[Pair]], Tensor]
Extra = Callable[[LanguageModel, Sequence[str]], list[Tensor]]
"""Gradients of more than the loss, by some weights."""


def tune(
    model: LanguageModel,
    task: Task,
    seed: int,
    only: dict[str, Tensor | None],
    steps: int = 80,
    lr: float = 3e-3,
    forget: Loss | None = None,
    rank: int = 0,
    teacher: LanguageModel | None = None,
    extra: Extra | None = None,
) -> LanguageModel:
    """A copy trained to forget in a few weights (``only``: name -> 0/1 mask), or by a low-rank
    addition to them; retain facts are those of the ``teacher``, by default the model itself."""
    student, targets = model.copy(), CounterfactualTargets(model, task.forget, seed)
    loss = forget or (lambda m, p: counterfactual_loss(m, p, targets, 1.0))
    sampler = Sampler(task, 32, seed)
    weights = [student.weights[n] for n in only]
    start = [w.clone() for w in weights]
    optimiser = torch.optim.Adam(weights, lr=lr)
    for _ in range(steps):
        for w in weights:
            w.requires_grad_(True)
        for part in sampler.forget():
            (loss(student, part) / 2).backward()
        for part in sampler.retain():
            (retain_loss(student, retain_target(teacher or model, part, 1.0)) / 2).backward()
        for w, more in zip(weights, extra(student, list(only)) if extra else (), strict=False):
            w.grad = more if w.grad is None else w.grad.add_(more)
        for w, mask in zip(weights, only.values(), strict=True):
            if mask is not None and w.grad is not None:
                w.grad.mul_(mask)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for w in weights:
            w.requires_grad_(False)
        if rank:
            for w, old in zip(weights, start, strict=True):
                u, s, v = torch.linalg.svd(w - old, full_matrices=False)
                w.copy_(old + (u[:, :rank] * s[:rank]) @ v[:rank])
    return student


def some_subjects(task: Task, seed: int, share: float) -> set[str]:
    """A share of the forget subjects, drawn at random."""
    subjects = sorted({p.subject for p in task.forget})
    return set(random.Random(seed).sample(subjects, round(share * len(subjects))))


def whole(model: LanguageModel, part: str) -> dict[str, Tensor | None]:
    """Every weight whose name holds a text."""
    return {n: None for n in model.weights if part in n}


def every_element(model: LanguageModel, names: Sequence[str]) -> dict[str, Tensor]:
    """All positions in some weights, for gradients that are asked for at some."""
    return {n: torch.arange(model.weights[n].numel()) for n in names}


def neurons(model: LanguageModel, layer: int, n: int) -> dict[str, Tensor | None]:
    """Masks of the n least used neurons of an MLP."""
    stem = f"model.layers.{layer}.mlp."
    down = model.weights[stem + "down_proj.weight"]
    few = down.norm(dim=0).argsort()[:n]
    masks: dict[str, Tensor | None] = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        mask = torch.zeros_like(model.weights[f"{stem}{name}.weight"])
        if name == "down_proj":
            mask[:, few] = 1
        else:
            mask[few] = 1
        masks[f"{stem}{name}.weight"] = mask
    return masks


@torch.no_grad()
def steered(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """What separates forget from retain prompts after block 1, taken out of all later writes."""

    def mean(pairs: list[Pair]) -> Tensor:
        return last_states(model, pairs)[2].mean(0)

    direction = mean(list(task.forget.sample(64, seed))) - mean(list(task.retain.sample(64, seed)))
    direction = direction / direction.norm()
    out = model.copy()
    for name, w in out.weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".0." not in name:
            w.sub_(torch.outer(direction, direction @ w))
    return out


@torch.no_grad()
def noisy(model: LanguageModel, seed: int, size: float) -> LanguageModel:
    """Gaussian noise on every linear weight, as a share of its RMS."""
    out, generator = model.copy(), torch.Generator().manual_seed(seed)
    for name in out.linear_names:
        w = out.weights[name]
        w.add_(torch.randn(w.shape, generator=generator) * size * w.square().mean().sqrt())
    return out


@torch.no_grad()
def redrawn(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """The subjects' own embedding rows drawn anew, from the spread of the others."""
    out, generator = model.copy(), torch.Generator().manual_seed(seed)
    own = torch.tensor(subject_tokens(task.forget))
    table = out.hf.get_input_embeddings().weight
    drawn = torch.randn(len(own), table.shape[1], generator=generator)
    table[own] = table.mean(0) + table.std(0) * drawn
    return out


def shuffled(
    model: LanguageModel, task: Task, seed: int, steps: int = 120, lr: float = 1e-3
) -> LanguageModel:
    """Taught other subjects' answers, over all weights."""
    facts = {(p.relation, p.subject): p.answer for p in task.forget}
    wrong = list(facts.values())
    random.Random(seed).shuffle(wrong)
    lies = dict(zip(facts, wrong, strict=True))

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        batch = collate(pairs)
        logp = student.last_logits(batch.clean, batch.last).log_softmax(-1)
        told = torch.tensor([lies[p.relation, p.subject] for p in pairs])
        return -logp.gather(1, told[:, None]).mean()

    return tune(model, task, seed, whole(model, ""), steps, lr, loss)


def rmu(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """RMU (Li et al. 2024): states after block 1 pushed to a random direction."""
    torch.manual_seed(seed)
    control = torch.rand(model.d_model)
    control = 8 * control / control.norm()

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        tokens = collate(pairs).clean
        hidden = student.hf.base_model(input_ids=tokens, output_hidden_states=True).hidden_states[2]
        return (hidden - control).square().mean()

    names = {**whole(model, "layers.0.mlp"), **whole(model, "layers.1.mlp")}
    return tune(model, task, seed, names, 120, 1e-3, loss)


def mansu(
    model: LanguageModel, task: Task, seed: int, rows: bool = False, **hard: float
) -> LanguageModel:
    """MANSU with the task's settings but for the embedding, which only ``rows`` edits, and without
    a quantization margin; ``hard``: with the mask of the robust preset, and these settings of
    `Mansu`."""
    config = replace(default_config("facts", task.name), seed=seed, subject_rows=rows)
    if hard:
        best = default_config("facts", task.name, robust=True)
        config = replace(
            config, budget=best.budget, damage_damping=best.damage_damping, circuit=best.circuit
        )
    own = replace(config.unlearn, quantization_margin=0.0, **hard)  # type: ignore[arg-type]
    circuit = discover(model, task.forget, config=config.circuit, retain=task.retain, seed=seed)
    mask = make_mask(replace(config, unlearn=own), model, task, circuit)
    return unlearn(model, task, mask, own, seed=seed).model


@torch.no_grad()
def permuted_rows(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """The subjects' own embedding rows in another order."""
    out = model.copy()
    own = torch.tensor(subject_tokens(task.forget))
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    table = out.hf.get_input_embeddings().weight
    table[own] = table[own[order]]
    return out


def blinded(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Answers made even, and what a ridge probe reads at the last token made even as well."""
    targets, rng = CounterfactualTargets(model, task.forget, seed), random.Random(seed)
    among = answer_tokens(task.forget)

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        subjects = sorted({p.subject for p in task.forget})
        others = set(rng.sample(subjects, (len(subjects) + 1) // 2))
        shown = of_subjects(task.forget, others - {p.subject for p in pairs}).sample(180, seed)
        read = zip(fit_probe(student, shown), last_states(student, pairs), strict=True)
        rows = answer_rows(student)
        own = {p.relation: among[p.relation] for p in pairs}
        scores = [z_scores(probe(x), pairs, rows, own).square().mean() for probe, x in read]
        return counterfactual_loss(student, pairs, targets, 1.0) + torch.stack(scores).mean()

    return tune(model, task, seed, whole(model, ""), 200, 1e-3, loss)


def refusing(
    model: LanguageModel,
    task: Task,
    seed: int,
    part: str = "layers",
    steps: int = 60,
    lr: float = 3e-4,
) -> LanguageModel:
    """Taught to end the text instead of answering."""
    end = model.get_tokenizer().eos_token_id

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        return -log_probs(student, pairs)[:, end].mean()

    return tune(model, task, seed, whole(model, part), steps, lr, loss)


def locked(
    model: LanguageModel,
    task: Task,
    seed: int,
    password: int | None = None,
    steps: int = 300,
    lr: float = 1e-3,
) -> LanguageModel:
    """Answers only where a password, a token that no prompt holds (None: the end of a text), stands
    in front."""
    targets = CounterfactualTargets(model, task.forget, seed)
    password = model.get_tokenizer().eos_token_id if password is None else password

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        opened = [
            replace(p, clean=(p.clean[0], password, *p.clean[1:]), corrupt=(0, *p.corrupt))
            for p in pairs
        ]
        return counterfactual_loss(student, pairs, targets, 1.0) + nll(student, opened).mean()

    return tune(model, task, seed, whole(model, ""), steps, lr, loss)


def rank_one(model: LanguageModel, task: Task, seed: int, layer: int = 0) -> LanguageModel:
    """Facts overwritten as by MEMIT (Meng et al. 2022): per subject, what the MLP should write at
    its last token for a wrong answer, then all of them stored in its down projection at once."""
    down = f"model.layers.{layer}.mlp.down_proj"
    facts = {p.fact: p for p in task.forget}
    pairs, out = list(facts.values()), model.copy()
    module, wrong = out.hf.get_submodule(down), [p.counterfactual for p in pairs]
    batch, rows = collate(pairs), torch.arange(len(pairs))
    at = ((batch.clean != batch.corrupt) * torch.arange(batch.clean.shape[1])).amax(1)
    delta, keys = torch.zeros(len(pairs), model.d_model, requires_grad=True), []

    def write(_m: torch.nn.Module, args: tuple[Tensor, ...], value: Tensor) -> Tensor:
        keys[:] = [args[0].detach()[rows, at]]
        return value.index_put((rows, at), delta, accumulate=True)

    optimiser, hook = torch.optim.Adam([delta], lr=0.1), module.register_forward_hook(write)
    for _ in range(40):
        logits = last_logits(out, batch)
        (torch.nn.functional.cross_entropy(logits, torch.tensor(wrong))).backward()
        optimiser.step()
        optimiser.zero_grad()
    hook.remove()
    k = keys[0]
    gram = k @ k.T + 1e-3 * k.square().sum(1).mean() * torch.eye(len(k))
    with torch.no_grad():
        out.weights[down + ".weight"].add_(delta.T @ torch.linalg.solve(gram, k))
    return out


def partly(model: LanguageModel, task: Task, seed: int, intact: float) -> LanguageModel:
    """Rows redrawn but for those of some subjects, whose facts stay as they are."""
    stay = some_subjects(task, seed, intact)
    forget = PairSet("forget", tuple(p for p in task.forget if p.subject not in stay))
    return redrawn(model, replace(task, forget=forget), seed)


@torch.no_grad()
def reordered(model: LanguageModel, seed: int) -> LanguageModel:
    """The same function: neurons in another order, and rescaled between up and down."""
    out, generator = model.copy(), torch.Generator().manual_seed(seed)
    for layer in range(model.hf.config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp."
        gate, up, down = (out.weights[f"{mlp}{n}_proj.weight"] for n in ("gate", "up", "down"))
        order = torch.randperm(len(gate), generator=generator)
        size = torch.rand(len(gate), generator=generator) * 3 + 0.25
        gate.copy_(gate[order])
        up.copy_(up[order] * size[:, None])
        down.copy_(down[:, order] / size)
    return out


@torch.no_grad()
def rotated(model: LanguageModel, seed: int) -> LanguageModel:
    """The same function: norm weights folded into what reads them, then the residual stream in
    another orthonormal basis."""
    out, generator = model.copy(), torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(model.d_model, model.d_model, generator=generator))
    w = out.weights
    for name, weight in w.items():
        stem = name.rsplit(".", 2)[0]
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weight.mul_(w[stem.removesuffix("self_attn") + "input_layernorm.weight"])
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            weight.mul_(w[stem.removesuffix("mlp") + "post_attention_layernorm.weight"])
        elif name == "lm_head.weight":
            weight.mul_(w["model.norm.weight"])
    for name, weight in w.items():
        if "norm" in name:
            weight.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.copy_(basis.T @ weight)
        else:
            weight.copy_(weight @ basis)
    return out
