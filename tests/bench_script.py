"""A benchmark whose training and attribution are stand-ins, for test_bench.py and its processes.

    python bench_script.py OUT JOBS SEEDS

Patches stand at module level, so that spawned workers have them too.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mansu_interp.bench import measure as measuring
from mansu_interp.bench import trial as trials
from mansu_interp.bench.config import BenchConfig
from mansu_interp.bench.run import run_bench
from mansu_interp.circuits.compare import Divergence, GraphComparison
from mansu_interp.unlearning.training import Unlearned

NAME = "model.layers.2.mlp.down_proj.weight"


def fake_unlearn(
    model: Any, task: Any, mask: Any, config: Any, *, seed: int = 0, **_: Any
) -> Unlearned:
    """Adds seeded noise to one weight; graddiff's is so large that the model forgets everything."""
    out = model.copy()
    scale = config.lr * {"graddiff": 1e6, "ga": 1e2}[config.method]
    generator = torch.Generator().manual_seed(seed)
    out.weights[NAME] += scale * torch.randn(out.weights[NAME].shape, generator=generator)
    time.sleep(0.2)
    return Unlearned(out, [], 7)


trials.unlearn = fake_unlearn  # type: ignore[assignment]
find_circuit = trials.find_circuit
trials.find_circuit = measuring.find_circuit = lambda *_: None  # type: ignore[assignment]
measuring.compare = lambda *_, **__: GraphComparison(  # type: ignore[assignment]
    {"unlearned": Divergence(0, 0, 0.5, 0, 0)}
)


def config(out: Path, jobs: int, seeds: int, **settings: Any) -> BenchConfig:
    """Two methods, two step sizes."""
    usual: dict[str, Any] = {
        "methods": ("graddiff", "ga"),
        "seeds": tuple(range(seeds)),
        "strengths": (1.0, 2.0),
        "relearn_steps": 2,
    }
    return BenchConfig(out=out, jobs=jobs, **{**usual, **settings})


if __name__ == "__main__":
    done = config(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(len(run_bench(done)), asdict(done)["jobs"])
