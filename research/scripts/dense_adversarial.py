"""Adversarial relearning without budget or floor: which weights have to move to erase?

    python research/scripts/dense_adversarial.py --train layers
    python research/scripts/dense_adversarial.py --train rows layers --row-step 10

Trains an embedded model with Adam against relearning inside the loop, in the forget subjects' own
embedding rows, in all linear layers, or both, and prints what relearning half of the facts brings
back of the others, on dev phrasings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from zoo_edits import every_element, redrawn

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.relearning import relearn
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.counterfactual import CounterfactualTargets, counterfactual_loss
from mansu_interp.losses.gradients import gradient
from mansu_interp.masks.components import subject_tokens
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair
from mansu_interp.unlearning.mansu.adversarial import AdversarialRelearning
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.training import (
    Sampler,
    retain_loss,
    retain_target,
    text_kl,
    text_target,
)

MARKS = (5, 10, 20, 40)


def losses(
    student: LanguageModel,
    model: LanguageModel,
    targets: CounterfactualTargets,
    forget: list[list[Pair]],
    keep: list[list[Pair]],
    text: Tensor | None,
) -> list[Callable[[], Tensor]]:
    """What one step sums: forgetting, and twice the loss of retained prompts and running text."""
    n, m = sum(map(len, forget)), sum(map(len, keep))
    out: list[Callable[[], Tensor]] = [
        lambda p=p: counterfactual_loss(student, p, targets, 1.0) * len(p) / n for p in forget
    ]
    held = [retain_target(model, p, 1.0) for p in keep]
    out += [lambda t=t: 2 * retain_loss(student, t) * len(t.pairs) / m for t in held]
    if text is not None:
        read = text_target(model, text)
        out.append(lambda: 2 * text_kl(student, read))
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="capitals")
    parser.add_argument("--train", nargs="+", choices=["rows", "layers"], default=["layers"])
    parser.add_argument("--redraw", action="store_true", help="begin with new rows")
    parser.add_argument("--row-step", type=float, default=1.0, help="step of rows over layers'")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = load_model("facts")
    task = load_task(args.task, model)
    config = Mansu(steps=args.steps, adversarial_steps=20, adversarial_lr=2e-3)
    student = redrawn(model, task, args.seed) if args.redraw else model.copy()
    table = model.embedding_name
    mask = torch.zeros_like(model.weights[table])
    mask[subject_tokens(task.forget)] = 1
    names = [table] * ("rows" in args.train) + model.linear_names * ("layers" in args.train)
    weights = [student.weights[n] for n in names]
    rates = [1e-3 * (args.row_step if n == table else 1.0) for n in names]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
    targets = CounterfactualTargets(model, task.forget, args.seed)
    sampler = Sampler(task, config.batch_size, args.seed)
    adversary = AdversarialRelearning(task, config, args.seed)
    for step in range(args.steps):
        left = (args.steps - step) / (0.4 * args.steps)
        for group, lr in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = lr * min(1.0, 0.95 * left + 0.05)
        parts = losses(student, model, targets, *sampler.batch(step, 1))
        grads = gradient(student, names, parts)
        of = every_element(student, names)
        found, _ = adversary.gradient([student], of, [targets], step)
        extra = [g.view_as(student.weights[n]) for n, g in zip(names, found, strict=True)]
        for name, w, g, more in zip(names, weights, grads, extra, strict=True):
            w.grad = g.add_(more, alpha=config.adversarial_weight)
            if name == table:
                w.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    found = relearn(student, task, config=RelearnConfig(steps=MARKS), split="dev")
    kept = {n: accuracy(student, s).top1 for n, s in task.scored["dev"]["retain"].items()}
    print("half B, four-way:", ", ".join(f"{m}: {found.at(m):.2f}" for m in found.marks))
    print("half B, top-1:   ", ", ".join(f"{m}: {found.at(m, 'top1'):.2f}" for m in found.marks))
    print("retain, top-1:   ", ", ".join(f"{n} {v:.3f}" for n, v in kept.items()))


if __name__ == "__main__":
    main()
