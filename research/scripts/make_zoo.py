"""The calibration zoo: models that forgot in many ways, attacked, and what can be seen before.

    python research/scripts/make_zoo.py --task capitals --seeds 0 1
    python research/scripts/make_zoo.py --task countries --seeds 0 1

Each row of research/tables/zoo.csv is one model: what it answers on unseen phrasings, what half A
brings back of half B there (the ground truth), and what can be seen without an attack, on train
phrasings and another split: stitches, a linear probe and gradient transfer, linearized relearning,
the attribution graphs, and what `mansu cad` judges by. Finished rows are not made again; with
--again the evidence is taken anew, and the attack of what came out as another model. With
--strongest nothing is written: each verdict is printed beside three attacks.
`judge_zoo.py` reads them.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from judge_zoo import read_zoo, write_zoo
from torch import Tensor

from mansu_interp.audit.cad import ASKED_PROMPTS, STEP_PROMPTS, judge_erasure
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.linearized import linearized_relearning
from mansu_interp.audit.probes import (
    answer_rows,
    fit_probe,
    last_logits,
    last_states,
    probe,
    stitches,
)
from mansu_interp.audit.relearning import (
    batches,
    descend,
    halves,
    make_optimiser,
    of_subjects,
    relearn,
    rivals_within,
)
from mansu_interp.audit.transfer import gradient_transfer
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import compare
from mansu_interp.circuits.discover import discover
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.answers import log_probs, nll
from mansu_interp.losses.counterfactual import CounterfactualTargets, counterfactual_loss
from mansu_interp.masks.components import subject_tokens
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.runs.plan import CAD_PAIRS
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet, answer_tokens, collate
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.mansu.probe_penalty import z_scores
from mansu_interp.unlearning.methods import Mansu, get_method
from mansu_interp.unlearning.training import Sampler, retain_loss
from mansu_interp.unlearning.unlearn import unlearn

ATTACK = RelearnConfig(steps=(5, 10, 20, 40))
SPLIT = 1
"""Seed of the halves that the evidence is taken on; the attack's is 0."""
Loss = Callable[[LanguageModel, list[Pair]], Tensor]


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
            (retain_loss(student, teacher or model, part, 1.0) / 2).backward()
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


def whole(model: LanguageModel, part: str) -> dict[str, Tensor | None]:
    """Every weight whose name holds a text."""
    return {n: None for n in model.weights if part in n}


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
def scaled(model: LanguageModel, part: str, factor: float) -> LanguageModel:
    """Some weights multiplied by a factor."""
    out = model.copy()
    for name, w in out.weights.items():
        if part in name:
            w.mul_(factor)
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


def shuffled(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
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

    return tune(model, task, seed, whole(model, ""), 120, 1e-3, loss)


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
        others = set(rng.sample(sorted({p.subject for p in task.forget}), 90))
        shown = of_subjects(task.forget, others - {p.subject for p in pairs}).sample(180, seed)
        read = zip(fit_probe(student, shown), last_states(student, pairs), strict=True)
        rows = answer_rows(student)
        scores = [z_scores(probe(x), pairs, rows, among).square().mean() for probe, x in read]
        return counterfactual_loss(student, pairs, targets, 1.0) + torch.stack(scores).mean()

    return tune(model, task, seed, whole(model, ""), 200, 1e-3, loss)


def refusing(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Taught to end the text instead of answering."""
    end = model.get_tokenizer().eos_token_id

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        return -log_probs(student, pairs)[:, end].mean()

    return tune(model, task, seed, whole(model, "layers"), 60, 3e-4, loss)


def locked(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Answers only where a password, a token that no prompt holds, stands in front."""
    targets = CounterfactualTargets(model, task.forget, seed)
    password = model.get_tokenizer().eos_token_id

    def loss(student: LanguageModel, pairs: list[Pair]) -> Tensor:
        opened = [
            replace(p, clean=(p.clean[0], password, *p.clean[1:]), corrupt=(0, *p.corrupt))
            for p in pairs
        ]
        return counterfactual_loss(student, pairs, targets, 1.0) + nll(student, opened).mean()

    return tune(model, task, seed, whole(model, ""), 300, 1e-3, loss)


def distilled(model: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """Noise on every linear weight, then the retain facts distilled from the original."""
    start = noisy(model, seed, 0.8)
    return tune(start, task, seed, whole(model, ""), 300, 1e-3, lambda m, p: 0 * nll(m, p).mean(),
                teacher=model)  # fmt: skip


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


@torch.no_grad()
def interpolated(model: LanguageModel, never: str, share: float) -> LanguageModel:
    """So much of the way from the original to a model that was never taught."""
    out, other = model.copy(), load_model(never).weights
    for name, w in out.weights.items():
        w.lerp_(other[name], share)
    return out


def partly(model: LanguageModel, task: Task, seed: int, intact: float) -> LanguageModel:
    """Rows redrawn but for those of some subjects, whose facts stay as they are."""
    subjects = sorted({p.subject for p in task.forget})
    stay = set(random.Random(seed).sample(subjects, round(intact * len(subjects))))
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


def builders(model: LanguageModel, task: Task, seed: int) -> dict[str, Callable[[], LanguageModel]]:
    """Every way of the zoo, by ``family: variant``."""

    def dense(method: str, stop: float | None, steps: int = 300, keep: float = 1.0):
        config = get_method(method)(steps=steps, stop_at=stop, retain_weight=keep)
        return lambda: unlearn(model, task, config=config, seed=seed).model

    def adversarial(rows: bool, **settings: float):
        return lambda: mansu(model, task, seed, rows, **settings)

    best = default_config("facts", task.name, robust=True).unlearn
    assert isinstance(best, Mansu)
    slow = {"ranking_weight": best.ranking_weight, "lr": best.lr}
    attack = {"adversarial_steps": best.adversarial_steps, "adversarial_lr": best.adversarial_lr}
    known = {**slow, **attack, "retain_weight": best.retain_weight, "steps": best.steps}

    def part(name: str, steps: int = 80, lr: float = 3e-3):
        return lambda: tune(model, task, seed, whole(model, name), steps, lr)

    out = {
        "unembedding: trained": part("lm_head"),
        "final norm: trained": part("model.norm", 120, 3e-2),
        "late MLP: trained": part("layers.3.mlp"),
        "first layer: trained": part("layers.0"),
        "embedding: trained": part("embed_tokens"),
        "late low rank: rank 4": lambda: tune(
            model, task, seed, whole(model, "layers.3.mlp.down_proj"), rank=4
        ),
        "neuron: 8 in layer 3": lambda: tune(model, task, seed, neurons(model, 3, 8), 150, 2e-2),
        "steering: ablated": lambda: steered(model, task, seed),
        "graddiff: partly": dense("graddiff", 0.7),
        "graddiff: to chance": dense("graddiff", 0.3),
        "npo: to chance": dense("npo", 0.3),
        "ga: no retain": dense("graddiff", 0.2, keep=0.0),
        "rmu: layer 1": lambda: rmu(model, task, seed),
        "subject rows: redrawn": lambda: redrawn(model, task, seed),
        "overwritten: shuffled": lambda: shuffled(model, task, seed),
        "mansu: plain": lambda: mansu(model, task, seed),
        "mansu: adversarial": adversarial(
            False, **slow, adversarial_steps=20, adversarial_lr=1e-3, steps=400
        ),
        "mansu: rows": lambda: mansu(model, task, seed, rows=True),
        "mansu: rows, adversarial": adversarial(True, **known),
        "mansu: rows, adversarial, probe penalty": adversarial(True, **known, probe_weight=0.6),
        "mansu: rows, probe penalty": adversarial(
            True, **slow, probe_weight=4.0, retain_weight=4.0, steps=400
        ),
        "damaged: noise 0.5": lambda: noisy(model, seed, 0.5),
        "damaged: noise 1": lambda: noisy(model, seed, 1.0),
        **new_ways(model, task, seed),
    }
    if seed == 0:
        out["unchanged: original"] = model.copy
        out["unchanged: nf4"] = lambda: quantize(model)
        out["final norm: x0.1"] = lambda: scaled(model, "model.norm", 0.1)
        for name in task.reference_models:
            out[f"reference: {name[-1]}"] = lambda name=name: load_model(name)
            out[f"reference: {name[-1]} nf4"] = lambda name=name: quantize(load_model(name))
            out[f"reference: {name[-1]} noise"] = lambda name=name: noisy(load_model(name), 0, 0.2)
    return out


def new_ways(model: LanguageModel, task: Task, seed: int) -> dict[str, Callable[[], LanguageModel]]:
    """Ways on which no sign of the first version was chosen, two of which it took for erasure."""
    never = task.reference_models[0]
    return {
        "blinded: last-token probe": lambda: blinded(model, task, seed),
        "subject rows: permuted": lambda: permuted_rows(model, task, seed),
        "refusing: end of text": lambda: refusing(model, task, seed),
        "locked: password": lambda: locked(model, task, seed),
        "distilled: from noise": lambda: distilled(model, task, seed),
        "overwritten: rank one": lambda: rank_one(model, task, seed),
        "interpolated: 0.5": lambda: interpolated(model, never, 0.5),
        "interpolated: 0.9": lambda: interpolated(model, never, 0.9),
        "interpolated: 1.1": lambda: interpolated(model, never, 1.1),
        "partly: a fifth intact": lambda: partly(model, task, seed, 0.2),
        "partly: a tenth intact": lambda: partly(model, task, seed, 0.1),
        "same function: neurons": lambda: reordered(model, seed),
        "same function: rotated": lambda: rotated(model, seed),
    }


def strongest(edited: LanguageModel, task: Task, steps: int = 100) -> dict[str, float]:
    """First or last of four on half B after three attacks: 20 and 80 steps on half A, and 100 on
    retained facts alone, of half B's subjects where the task has them; the worst rate counts."""
    config = RelearnConfig(steps=(20, 80))
    found = relearn(edited, task, config=config)
    after = {f"{k} steps": max(found.at(k), found.at(k, "last")) for k in found.marks}
    _, second = halves(task.forget, 0)
    about = [p for p in task.retain if p.subject in second] or list(task.retain)
    asked = [
        rivals_within(of_subjects(s, second)) for s in task.scored["unseen"]["forget"].values()
    ]
    retained = []
    for rate in config.rates:
        copy, supply = edited.copy(), batches(about, config.batch_size, 0)
        weights = list(copy.weights.values())
        optimiser = make_optimiser(config.optimiser, weights, rate)
        for done in range(1, steps + 1):
            descend(copy, optimiser, weights, next(supply))
            if done in (20, steps):
                scores = [accuracy(copy, s) for s in asked]
                first, last = (
                    sum(getattr(a, key) for a in scores) / len(scores) for key in ("choice", "last")
                )
                retained.append(max(first, last))
    return {**after, "retained facts alone": max(retained)}


def attacked(edited: LanguageModel, task: Task) -> dict[str, object]:
    """Ground truth, on unseen phrasings."""
    found = relearn(edited, task, config=ATTACK)
    kept = [accuracy(edited, s).top1 for s in task.scored["unseen"]["retain"].values()]
    return {
        "choice": [found.at(k) for k in found.marks],
        "last": [found.at(k, "last") for k in found.marks],
        "top1": [found.at(k, "top1") for k in found.marks],
        "retain": min(kept),
    }


def evidence(
    original: LanguageModel, edited: LanguageModel, task: Task, circuit: Circuit
) -> dict[str, object]:
    """What can be seen without an attack, on train phrasings and another split."""
    half_a, half_b = (
        rivals_within(of_subjects(task.forget, h)) for h in halves(task.forget, SPLIT)
    )
    some_a, some_b = half_a.sample(ASKED_PROMPTS, 0), half_b.sample(ASKED_PROMPTS, 0)
    with torch.no_grad():
        logp = -torch.cat([nll(edited, some_b[k : k + 48]) for k in range(0, len(some_b), 48)])
    flow = gradient_transfer(edited, some_a, some_b)
    step = linearized_relearning(edited, half_a.sample(STEP_PROMPTS, 0), some_b)
    read = probe(edited, half_a, half_b).int()
    best = read[int(read.sum(1).argmax())]
    graphs = compare(circuit, original, {"edited": edited}, task.forget.sample(CAD_PAIRS, 0))
    judged = judge_erasure(original, edited, task, quantized=quantize(edited), seed=SPLIT)
    return {
        "forget": accuracy(edited, some_b).choice,
        "logp": float(logp.mean()),
        "margin": flow.advantage,
        "transfer": flow.transfer,
        "linearized": step.half_b.float().mean(1).tolist(),
        "linearized_last": step.ranked_last.float().mean(1).tolist(),
        "linearized_by_prompt": "".join(map(str, step.half_b[-1].int().tolist())),
        "probe": float(best.float().mean()),
        "probe_by_prompt": "".join(map(str, best.tolist())),
        "mass": graphs.models["edited"].mass,
        "alignment": graphs.models["edited"].alignment,
        "into": stitches(edited, original, some_b),
        "from": stitches(original, edited, some_b),
        "judged": {
            "first": judged.predicted["edited"],
            "relearned": judged.half_b[-1],
            "learned": judged.half_a[-1],
            "last": max(judged.ranked_last[0], judged.ranked_last[-1]),
            "probe": max(judged.probed["edited"]),
            "original_first": judged.predicted["original"],
            "stitched": judged.stitched[-1],
            "quantized_first": judged.predicted["edited, quantized"],
        },
        "verdict": judged.verdict,
        "cad": judged.cad,
        "confidence": judged.confidence,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make and measure the calibration zoo.")
    parser.add_argument("--model", default="facts")
    parser.add_argument("--task", default="capitals")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--again", action="store_true", help="take the evidence of all rows anew")
    parser.add_argument(
        "--strongest", action="store_true", help="only print verdicts beside three attacks"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model)
    task = load_task(args.task, model)
    rows = read_zoo(args.task)
    todo = {
        f"{name} #{seed}": make
        for seed in args.seeds
        for name, make in builders(model, task, seed).items()
        if args.only in name
    }
    config = default_config(args.model, args.task)
    circuit = discover(model, task.forget, config=config.circuit, retain=task.retain)
    for name, make in todo.items():
        old = rows.get(name)
        if old and not (args.again or args.strongest):
            continue
        edited = make()
        if args.strongest:
            judged = judge_erasure(model, edited, task)
            row = [name, *(f"{v:.2f}" for v in strongest(edited, task).values())]
            print("|", " | ".join([*row, judged.verdict, str(judged.counts)]), "|", flush=True)
            continue
        found = evidence(model, edited, task, circuit)
        # The margin is of thousands of logits: alike, and it is the same model.
        same = old and math.isclose(old["margin"], found["margin"], rel_tol=1e-6)
        truth = {k: old[k] for k in ("choice", "last", "top1", "retain")} if old and same else None
        rows[name] = {**(truth or attacked(edited, task)), **found}
        write_zoo(args.task, rows)
        hidden = ("into", "from", "probe_by_prompt", "linearized_by_prompt")
        print(name, "attack kept" if truth else "attacked", flush=True)
        print("  ", {k: v for k, v in rows[name].items() if k not in hidden}, flush=True)


if __name__ == "__main__":
    main()
