"""What an accelerator gains: the same work on the CPU and on CUDA, as ratios within one run.

    python benchmarks/devices.py [--device cuda] [--threads 16]
    python benchmarks/devices.py --count      operations of a step of MANSU: what a card waits for

The model has SmolLM2-135M's shape and random weights; there are 8 pairs of 30 tokens. Each timing
is the mean of two after a first that warms up. Operations are counted on the embedded model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attribution import make_pairs, seconds
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.losses.answers import answer_gradient
from mansu_interp.losses.descent import descend, make_optimisers
from mansu_interp.losses.fisher import fisher_diagonal
from mansu_interp.masks.floor import floor
from mansu_interp.masks.select import random_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model, pick_device
from mansu_interp.tasks.load import load_task
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn

TOKENS = 30
LAYER = 7
"""Linear weights of a layer."""
SET = ("nf4", "fp4", "int4-g32", "q4_0")


def make_model(device: torch.device) -> LanguageModel:
    """SmolLM2-135M's shape, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    return LanguageModel("smollm2-shape", LlamaForCausalLM(config).eval().to(device), None)


def jobs(device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed."""
    model, pairs = make_model(device), make_pairs(TOKENS)
    victim = model.copy()
    optimisers = make_optimisers("adam", victim, 1e-6)
    return {
        "attribution (EAP-IG, 5 steps)": lambda: attribute(
            model, pairs, config=AttributionConfig()
        ),
        "forget gradient of the mask": lambda: answer_gradient(model, model.linear_names, pairs),
        "diagonal Fisher": lambda: fisher_diagonal(model, model.linear_names, pairs),
        "floor of one layer, four quantizers": lambda: [
            floor(model.weights[n], SET) for n in model.linear_names[:LAYER]
        ],
        "a step of relearning": lambda: descend(victim, optimisers, list(pairs)),
    }


def finished(job: Callable[[], object], device: torch.device) -> None:
    """Do a job, and wait until the device has."""
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Count(TorchDispatchMode):
    """Counts what torch is asked to do."""

    asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.asked += 1
        return func(*args, **(kwargs or {}))


def operations(survive: tuple[str, ...], steps: int = 10) -> float:
    """Of a step of MANSU: those of more steps less those of five."""
    model = load_model("facts")
    task, mask = load_task("capitals", model), random_mask(model, 0.005, survive=survive)
    found = []
    for n in (5, 5 + steps):
        with Count() as count:
            unlearn(model, task, mask, Mansu(steps=n, survive=survive))
        found.append(count.asked)
    return (found[1] - found[0]) / steps


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare a device with the CPU.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--count", action="store_true", help="count operations instead")
    args = parser.parse_args()
    if args.count:
        for survive in (SET[:1], SET):
            print(f"{' '.join(survive)}: {operations(survive):,.0f} operations a step")
        return
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name} against {args.threads} CPU threads")
    there, here = jobs(device), jobs(torch.device("cpu"))
    for what, job in there.items():
        took = seconds({"there": partial(finished, job, device), "here": here[what]}, 2)
        fast, slow = took["there"], took["here"]
        print(f"{what}: {fast:.3f} s, CPU {slow:.2f} s: {slow / fast:.1f} x faster", flush=True)


if __name__ == "__main__":
    main()
