"""The retain bound, predicted and measured: edits inside the circuit against the whole model.

    python research/scripts/retain_bound.py --seeds 0 1 2

Both arms spend the same budget of parameters and the same steps with the same settings; the one may
edit weights of the circuit, the other any weight of the blocks. Forgetting (four-way, dev
phrasings) is printed beside the bound, so that the arms can be compared at what they forget.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from mansu_interp.circuits.search.discover import discover
from mansu_interp.losses.counterfactual import forget_gradient
from mansu_interp.losses.fisher import fisher_diagonal, retain_bound
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import choose_parameters
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.training import dev_choice
from mansu_interp.unlearning.unlearn import unlearn


def whole_model_mask(model: LanguageModel, task: Task, budget: float, seed: int) -> Mask:
    """The same choice of parameters without a circuit to choose from."""
    names = model.linear_names
    keep = PairSet("retain", tuple(p for pairs in task.retain_sets for p in pairs))
    return choose_parameters(
        model,
        {n: model.weights[n].isfinite() for n in names},
        budget,
        forget_gradient(model, names, task.forget.sample(64, seed)),
        retain_fisher=fisher_diagonal(model, names, keep.sample(64, seed), seed=seed),
    )


def main() -> None:
    """Print one row per arm and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="facts")
    parser.add_argument("--task", default="capitals")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    model = load_model(args.model)
    task = load_task(args.task, model)
    retained = PairSet("retain", tuple(p for pairs in task.retain_sets for p in pairs)).sample(
        128, 99
    )
    print("| seed | mask | forget, dev | abs(g.d) | 1/2 sum F d^2 | bound | measured | remainder |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        config = replace(default_config(args.model, args.task), seed=seed)
        circuit = discover(model, task.forget, config=config.circuit, retain=task.retain, seed=seed)
        masks = {
            "circuit": make_mask(config, model, task, circuit),
            "whole model": whole_model_mask(model, task, config.budget, seed),
        }
        for name, mask in masks.items():
            settings = replace(config.unlearn, steps=args.steps, quantization_margin=0.0)  # type: ignore[call-arg]
            edited = unlearn(model, task, mask, settings, seed=seed).model
            b = retain_bound(model, edited, retained, seed)
            forget = dev_choice(edited, task)
            cells = [b.first, b.second, b.bound, b.measured, b.remainder]
            print(f"| {seed} | {name} | {forget:.3f} | ", end="")
            print(" | ".join(f"{c:.4f}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
