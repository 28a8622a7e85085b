"""Peak memory of every stage of a run, as ratios to a bare forward and backward pass.

    python benchmarks/memory.py --out /tmp/memory [--survive nf4 fp4 int4-g32 q4_0]
    python benchmarks/memory.py --model FOLDER --task world-capitals --out /tmp/memory

Runs the whole job with few steps and prompts: what is held does not depend on how many there are.
The peak is the kernel's (VmHWM of /proc/self/status, reset between stages), so Linux alone; the
model is the embedded one by default. "Bare" is one forward and backward pass of the batch of
unlearning through the same model in the same process, all weights with a gradient; its peak holds
one copy of the weights, the gradients and the activations.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from mansu_interp.losses.answers import nll
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.runs.config import RunConfig
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.run import run
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task


class Peak:
    """Resident memory (GB) at its highest since the last look."""

    def look(self) -> float:
        """The peak; the next one counts anew."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        kib = status.partition("VmHWM:")[2].split()[0]
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return int(kib) * 1024 / 1e9


class Stages:
    """Prints peak and seconds of each stage, from the stage lines of a run.

    Arguments:
        bare: peak (GB) of a bare pass.
        weights: size (GB) of the weights in float32.
    """

    def __init__(self, bare: float, weights: float) -> None:
        self.bare, self.weights = bare, weights
        self.peak, self.now, self.since = Peak(), "start", time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A run's progress."""
        if stage != self.now:
            self.close()
            self.now = stage

    def close(self) -> None:
        """The stage is over."""
        gb, took = self.peak.look(), time.perf_counter() - self.since
        ratio, over = gb / self.bare, (gb - self.bare) / self.weights
        figures = f"{gb:6.2f} GB = {ratio:4.2f} x bare, {over:+.1f} weights {took:7.1f} s"
        print(f"{self.now:45} {figures}", flush=True)
        self.since = time.perf_counter()


def bare(model: LanguageModel, task: Task, size: int) -> float:
    """Peak (GB) of a forward and backward pass of one batch, all weights with a gradient."""
    weights, peak = list(model.weights.values()), Peak()
    for w in weights:
        w.requires_grad_(True)
    peak.look()
    nll(model, task.forget.pairs[:size]).mean().backward()
    found = peak.look()
    for w in weights:
        w.requires_grad_(False).grad = None
    return found


def small(config: RunConfig, survive: list[str], steps: int) -> RunConfig:
    """A run's settings with few steps and prompts."""
    method = replace(config.unlearn, steps=steps)
    if survive:
        method = replace(method, survive=tuple(survive))
    circuit = replace(config.circuit, pairs=16, top=300)
    return replace(config, unlearn=method, circuit=circuit, score_pairs=24, relearn_steps=2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Peak memory of each stage of a run.")
    parser.add_argument("--model", default="facts")
    parser.add_argument("--task", default="countries")
    parser.add_argument("--survive", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    config = replace(default_config(args.model, args.task), out=args.out)
    config = small(config, args.survive, args.steps)
    model = load_model(args.model)
    weights = model.n_parameters * 4 / 1e9
    peak = bare(model, load_task(args.task, model), config.unlearn.batch_size)
    del model
    print(f"{args.model}: float32 weights {weights:.3f} GB, bare pass {peak:.2f} GB", flush=True)
    stages = Stages(peak, weights)
    run(config, on_progress=stages)
    stages.close()


if __name__ == "__main__":
    main()
