"""Speed and memory of edge attribution, as ratios within one run.

    python benchmarks/attribution.py               against the passes it cannot avoid (a minute)
    python benchmarks/attribution.py --peer        and against TransformerLens' own (ten minutes)
    python benchmarks/attribution.py --growth      how both grow; writes docs/attribution-growth.svg
    python benchmarks/attribution.py --sums        how far sums over batches round (a minute)

The model has GPT-2 small's shape and random weights; there are 8 pairs of 15 tokens. "Bare" are the
forward and backward passes that the method needs, on the same bridge, hooked only where the
gradient is taken: 2 forward and 1 backward for EAP, 2 forward and m times both for EAP-IG with m
steps. Each timing is the median of several, taken in turn. Memory is the peak of a process of its
own, beyond that of a process that does the bare passes; its unit is the writers' difference tensor
(pairs x positions x writers x d_model, float32).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.metrics import logit_diff
from mansu_interp.circuits.search.faithfulness import strongest
from mansu_interp.circuits.search.stability import Resamples
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.models.stream import Stream
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet, collate

PAIRS, TOKENS, VOCAB, IG_STEPS, RESAMPLES = 8, 15, 50257, 5, 100
SHAPE = {"layers": 12, "heads": 12, "tokens": TOKENS}
GROWTH = {
    "layers": (3, 6, 12, 24),
    "heads": (3, 6, 12, 24),
    "tokens": (15, 30, 60, 120),
}
PLOT = Path(__file__).parents[1] / "docs" / "attribution-growth.svg"


def make_model(layers: int, heads: int) -> LanguageModel:
    """GPT-2 of a given depth and number of heads; width 768, random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=768,
        vocab_size=VOCAB,
        architectures=["GPT2LMHeadModel"],
    )
    return LanguageModel("gpt2-shape", transformers.GPT2LMHeadModel(config).eval(), None)


def make_pairs(tokens: int) -> PairSet:
    """Pairs of random tokens."""
    rng = random.Random(0)

    def draw() -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(tokens))

    made = [
        Pair(
            clean=draw(),
            corrupt=draw(),
            answer=4 * k,
            counterfactual=4 * k + 1,
            distractors=(4 * k + 1, 4 * k + 2, 4 * k + 3),
            relation="random",
            subject=f"s{k}",
            phrasing="random",
            prompt="",
            answer_text="",
        )
        for k in range(PAIRS)
    ]
    return PairSet("random", tuple(made))


def bare(model: LanguageModel, pairs: PairSet, steps: int) -> None:
    """Two forward passes, of which one with gradients and its backward (``steps`` = 0), or two
    forward passes and ``steps`` times forward and backward."""
    batch = collate(list(pairs))
    rows = torch.arange(len(batch))

    def metric(tokens: torch.Tensor) -> torch.Tensor:
        logits = model.bridge(tokens, return_type="logits")[rows, batch.last]
        return logit_diff(logits, batch, logits).sum()

    with torch.no_grad():
        metric(batch.clean)
        if steps:
            metric(batch.corrupt)
    leaf: list[torch.Tensor] = []

    def cut(value: torch.Tensor, hook: object) -> torch.Tensor:
        leaf[:] = [value.detach().requires_grad_(True)]
        return leaf[0]

    for _ in range(max(1, steps)):
        with model.bridge.hooks(fwd_hooks=[(Stream.input, cut)]):
            torch.autograd.grad(metric(batch.corrupt), leaf)


def jobs(model: LanguageModel, pairs: PairSet) -> dict[str, Callable[[], object]]:
    """What is timed and measured."""
    eap = AttributionConfig(method="eap", batch_size=PAIRS)
    ig = AttributionConfig(ig_steps=IG_STEPS, batch_size=PAIRS)
    return {
        "bare EAP": lambda: bare(model, pairs, 0),
        "EAP": lambda: attribute(model, pairs, config=eap),
        "bare EAP-IG": lambda: bare(model, pairs, IG_STEPS),
        "EAP-IG": lambda: attribute(model, pairs, config=ig),
        "resampled": lambda: attribute(
            model, pairs, config=ig, on_pairs=Resamples(pairs, RESAMPLES, 0)
        ),
    }


def seconds(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall time of each job, the jobs taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for run in range(repeats + 1):
        for name, job in work.items():
            start = time.perf_counter()
            job()
            if run:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peak(name: str, layers: int, heads: int, tokens: int, threads: int) -> float:
    """Peak memory in MB of a process that does one job."""
    shape = [str(x) for x in (layers, heads, tokens)]
    command = [__file__, "--job", name, "--shape", *shape, "--threads", str(threads)]
    return figure_of(command)


def figure_of(command: list[str]) -> float:
    """The figure that a Python script prints last, whose freed memory goes back to the system at
    once, so that its peak is what was really held."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=env
    )
    return json.loads(done.stdout.splitlines()[-1])


def status(field: str) -> float:
    """A figure of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1e3


def peak_of(model: LanguageModel, pairs: PairSet, job: str) -> float:
    """Peak resident memory of this process in MB while it does a job (Linux)."""
    work = jobs(model, pairs)
    work["bare EAP"]()  # the bridge is built, and every library has its buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work[job]()
    return status("VmHWM")


def peak_beyond(job: Callable[[PairSet], object], pairs: PairSet) -> float:
    """The same of any job, beyond what the process held before it."""
    job(PairSet(pairs.name, pairs.pairs[:1]))  # bridge and libraries have their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    job(pairs)
    return status("VmHWM") - before


def difference_mb(model: LanguageModel, tokens: int) -> float:
    """Size of the writers' difference tensor."""
    return PAIRS * tokens * len(model.graph.writers) * model.d_model * 4 / 1e6


def against_bare(repeats: int, threads: int) -> None:
    """Time and memory, each as a ratio."""
    model, pairs = make_model(SHAPE["layers"], SHAPE["heads"]), make_pairs(TOKENS)
    took = seconds(jobs(model, pairs), repeats)
    unit = difference_mb(model, TOKENS)
    print(f"{model.graph.n_edges:,} edges; difference tensor {unit:.0f} MB; {threads} threads")
    for name in ("EAP", "EAP-IG"):
        plain = took[f"bare {name}"]
        memory = [peak(x, **SHAPE, threads=threads) for x in (f"bare {name}", name)]
        print(
            f"{name}: {took[name]:.2f} s, bare {plain:.2f} s: {took[name] / plain:.2f} x; "
            f"memory beyond bare {memory[1] - memory[0]:.0f} MB: "
            f"{(memory[1] - memory[0]) / unit:.2f} x the difference tensor"
        )
    held = took["resampled"]
    print(f"EAP-IG with {RESAMPLES} resamples: {held:.2f} s, {held / took['EAP-IG']:.2f} x EAP-IG")


def against_peer() -> None:
    """Seconds per pair of TransformerLens' sweep and faithfulness, and of ours."""
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
        faithfulness,
    )

    model, pairs = make_model(SHAPE["layers"], SHAPE["heads"]), make_pairs(TOKENS)
    attribute(model, pairs, config=AttributionConfig(method="eap"))  # warm up
    start = time.perf_counter()
    scores = attribute(
        model, pairs, config=AttributionConfig(method="eap", batch_size=PAIRS)
    ).scores
    ours = (time.perf_counter() - start) / PAIRS
    ablation = Ablation(model, pairs, batch_size=PAIRS)
    edges = strongest(model.graph, scores, 1000)
    start = time.perf_counter()
    ablation.faithfulness(edges)
    ours_faithful = (time.perf_counter() - start) / PAIRS

    batch = collate([pairs.pairs[0]])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logit_diff(logits[:, -1], batch, logits[:, -1])[0]

    inputs = (batch.clean, batch.corrupt, metric)
    model.hf.get_input_embeddings().weight.requires_grad_(True)
    start = time.perf_counter()
    theirs_found = attribution_patch(
        model.bridge, *inputs, config=EdgeAttributionConfig(granularity="edge", ig_steps=1)
    )
    theirs = time.perf_counter() - start
    ranked = sorted(theirs_found.edge_scores, key=lambda e: -abs(theirs_found.edge_scores[e]))
    start = time.perf_counter()
    faithfulness(model.bridge, *inputs, ranked[:1000])
    theirs_faithful = time.perf_counter() - start
    for name, a, b in (
        ("EAP", ours, theirs),
        ("faithfulness of 1,000 edges", ours_faithful, theirs_faithful),
    ):
        print(f"{name}, a pair: {a:.3f} s, TransformerLens {b:.1f} s: {b / a:.0f} x faster")


def growth(threads: int) -> None:
    """Time and memory of EAP, one size varied at a time, as a plot."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(9, 5), sharex="col", layout="constrained")
    for (what, sizes), column in zip(GROWTH.items(), axes.T, strict=True):
        lines: dict[str, list[float]] = {"bare EAP": [], "EAP": []}
        memory: dict[str, list[float]] = {"EAP": [], "1.5 x difference tensor": []}
        for size in sizes:
            shape = {**SHAPE, what: size}
            model, pairs = make_model(shape["layers"], shape["heads"]), make_pairs(shape["tokens"])
            work = {n: j for n, j in jobs(model, pairs).items() if n in lines}
            for name, value in seconds(work, 3).items():
                lines[name].append(value)
            used = [peak(x, **shape, threads=threads) for x in lines]
            memory["EAP"].append(used[1] - used[0])
            memory["1.5 x difference tensor"].append(1.5 * difference_mb(model, shape["tokens"]))
            print(
                f"{what} {size}: {lines['EAP'][-1]:.2f} s, bare {lines['bare EAP'][-1]:.2f} s; "
                f"{memory['EAP'][-1]:.0f} MB"
            )
        for axis, series, label in zip(
            column, (lines, memory), ("seconds, 8 pairs", "MB beyond bare"), strict=True
        ):
            for (name, values), style in zip(series.items(), ("o-", "s--"), strict=True):
                axis.plot(sizes, values, style, label=name)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
        column[1].set_xlabel(what)
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})
    print(f"wrote {PLOT}")


def sums() -> None:
    """How far scores of the embedded model are from those of the same model in float64, one pair a
    batch: as `attribute` sums them, and summed in float32 throughout."""
    model = load_model("facts")
    pairs = load_task("capitals", model).forget
    config = AttributionConfig(method="eap", batch_size=1)
    total = torch.zeros(model.graph.exists.shape)

    def add(_: Sequence[Pair], scores: torch.Tensor) -> None:
        total.add_(scores.sum(0))

    found = attribute(model, pairs, config=config, on_pairs=add).scores
    wide = model.copy()
    wide.hf.double()
    exact = attribute(wide, pairs, config=config).scores
    print(f"{len(pairs)} batches of one pair, EAP; largest difference over the largest score")
    for name, scores in (("as here", found), ("float32", total.numpy() / len(pairs))):
        print(f"  {name}: {np.abs(scores - exact).max() / np.abs(exact).max():.1e}")


def main() -> None:
    """Parse the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="also time TransformerLens' own")
    parser.add_argument("--growth", action="store_true", help="plot how time and memory grow")
    parser.add_argument("--sums", action="store_true", help="how far sums over batches round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--shape", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job:
        layers, heads, tokens = options.shape
        print(peak_of(make_model(layers, heads), make_pairs(tokens), options.job))
        return
    if options.growth:
        growth(options.threads)
        return
    if options.sums:
        torch.set_num_threads(options.threads)
        sums()
        return
    against_bare(options.repeats, options.threads)
    if options.peer:
        against_peer()


if __name__ == "__main__":
    main()
