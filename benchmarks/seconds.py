"""How long the stages of a run take beside what its plan says.

    python benchmarks/seconds.py [--model facts] [--steps 10] [--processor]

A run with few pairs and steps, one thread: circuit, mask, unlearning and scores. With
``--processor`` both are processor time, which on a busy machine is the fairer clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.planning.cost import Plan
from mansu_interp.runs.run import run
from mansu_interp.unlearning.methods import Mansu


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Seconds by stage, planned and measured.")
    parser.add_argument("--model", default="facts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.0005)
    parser.add_argument("--relearn-steps", type=int, default=20)
    parser.add_argument("--task")
    parser.add_argument("--score-pairs", type=int, default=200)
    parser.add_argument("--processor", action="store_true")
    args = parser.parse_args()
    if args.processor:
        time.perf_counter = time.process_time
    plans: list[Plan] = []
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            default_config(args.model, args.task),
            task=args.task,
            model=args.model,
            out=Path(folder) / "run",
            budget=args.budget,
            circuit=CircuitConfig(pairs=args.pairs, faithfulness_pairs=8),
            unlearn=Mansu(steps=args.steps, stop_at=None),
            score_pairs=args.score_pairs,
            leaks="no",
            relearn_steps=args.relearn_steps,
            device="cpu",
            threads=1,
        )
        measured = run(config, on_plan=plans.append).seconds
    print(f"{args.model}, {args.pairs} pairs, {args.steps} steps; seconds")
    print(f"{'stage':10}{'planned':>10}{'measured':>10}{'ratio':>8}")
    for stage, planned in plans[0].stages.items():
        if planned and measured.get(stage):
            took = measured[stage]
            print(f"{stage:10}{planned:10.1f}{took:10.1f}{planned / took:8.2f}")


if __name__ == "__main__":
    main()
