"""Peak memory of the stages of a run, as ratios to a bare forward and backward pass.

    python benchmarks/memory.py [--shape smollm2] [--dtype bfloat16] [--tokens 16]
        [--attribution-gb 0.1]
        [--survive nf4 fp4 int4-g32 q4_0] [--only unlearn]
    python benchmarks/memory.py --shape 8B --dtype bfloat16 --tracked    beside the plan
    python benchmarks/memory.py --tokens 256 --layers 0.18 0.16    attribution by layers

Random Llamas (`SHAPES`) and random prompts, 8 pairs of so many tokens; few steps, since what is
held does not depend on how many there are. "Bare" is a forward and backward pass of all pairs
through the same model in the same dtype, every weight with a gradient: weights, gradients and
activations. Each stage runs in a process of its own; its peak is the kernel's (VmHWM of
/proc/self/status, Linux alone) less what a process holds that has loaded the libraries.

With ``--tracked`` nothing is allocated: the stages run on fake weights (`tracker`), with what a run
holds beside them, and the peak stands beside that of `mansu plan`. So on any machine, for any size.

With ``--layers`` one pair is scored by EAP at once, and with each `memory_gb` that is given: what a
process takes at its peak beyond one that does two forward passes and one backward pass alone,
beside what `fit_memory` counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from attribution import bare as bare_passes
from attribution import make_pairs
from tracker import Tracker, full_card, make_fake, stand_ins
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.linearized import linearized_relearning
from mansu_interp.audit.relearning import fine_tune
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import AttributionConfig, fit_memory
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.answers import nll
from mansu_interp.masks.mask import Mask
from mansu_interp.masks.select import POOL, circuit_mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.planning.memory import PROCESS, Job
from mansu_interp.runs.planning.memory import stages as plan
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn

TOKENS, PAIRS, VOCAB, STEPS = 16, 8, 50257, 3
# layers, width, MLP width, heads, key-value heads, vocabulary, tied unembedding
SHAPES = {
    "smollm2": (30, 576, 1536, 9, 3, VOCAB, True),
    "0.35B": (24, 1024, 2816, 16, 8, VOCAB, True),
    "1.1B": (22, 2048, 5632, 32, 4, VOCAB, True),
    "1B": (16, 2048, 8192, 32, 8, 128256, True),  # Llama 3.2
    "8B": (32, 4096, 14336, 32, 8, 128256, False),  # Llama 3.1
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SET = ("nf4", "fp4", "int4-g32", "q4_0")
STAGES = ("attribution", "mask", "mask --by-layer", "unlearn", "scores", "relearning", "judging")
PLANNED = {
    "attribution": "circuit",
    "mask": "mask",
    "mask --by-layer": "mask",
    "unlearn": "unlearning",
    "scores": "scores",
    "relearning": "relearning",
    "judging": "judging erasure",
}
"""What the plan calls each."""
SHARE = 0.003
"""Candidates of the mask, of all linear weights: six times a budget of 0.05 %."""


def make_model(
    shape: str, dtype: torch.dtype, *, layers: int | None = None, fake: bool = False
) -> LanguageModel:
    """A random Llama, of as many layers as are asked for; or a fake one."""
    torch.manual_seed(0)
    depth, width, mlp, heads, groups, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )
    torch.set_default_dtype(dtype)
    with torch.device("meta" if fake else "cpu"):
        hf = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    if fake:
        make_fake(hf, dtype)
    return LanguageModel(shape, hf, None, dtype)


def make_task(tokens: int) -> Task:
    """Random pairs to forget, and others to retain."""
    forget, retain = make_pairs(tokens), make_pairs(tokens + 1)
    return Task("random", "random", forget, retain, None, {"dev": {}, "unseen": {}})


def bare(model: LanguageModel, task: Task) -> None:
    """A forward and backward pass of one batch, every weight with a gradient."""
    for w in model.weights.values():
        w.requires_grad_(True)
    nll(model, list(task.forget)).mean().backward()


def scores(model: LanguageModel, task: Task, survive: Sequence[str]) -> None:
    """What is asked of a model, and of each of its quantized forms."""
    for name in survive:
        accuracy(quantize(model, name, sharing=True), task.forget)


def relearning(model: LanguageModel, task: Task) -> None:
    """Two steps of an attack."""
    config = RelearnConfig(steps=(2,), batch_size=len(task.forget))
    for _ in fine_tune(model.trainable_copy(), [task.forget], 1e-5, config):
        pass


def judging(model: LanguageModel, task: Task) -> None:
    """A step of linearized relearning."""
    linearized_relearning(model, task.forget, task.forget, steps=1)


def mask(model: LanguageModel, task: Task, survive: Sequence[str], by_layer: bool) -> None:
    """The choice of parameters, the whole model as the circuit."""
    every = np.ones_like(model.graph.exists)
    circuit = Circuit(model.graph, np.zeros(every.shape, np.float32), every, pairs=task.forget)
    circuit_mask(
        circuit,
        model,
        budget=SHARE / POOL,
        retain=task.retain_sets,
        survive=survive,
        by_layer=by_layer,
    )


class Enough(Exception):
    """All pairs went through."""


def edges(model: LanguageModel, task: Task, config: AttributionConfig) -> None:
    """Scores of all edges, up to their mean, which takes numbers."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise Enough

    with suppress(Enough):
        attribute(model, task.forget, config=config, on_batch=stop)


def some_mask(model: LanguageModel) -> Mask:
    """Candidates at random in every linear weight."""
    draws, indices = torch.Generator().manual_seed(0), {}
    for name in model.linear_names:
        n = model.weights[name].numel()
        indices[name] = torch.randint(n, (int(SHARE * n),), generator=draws).unique()
    return Mask(indices, {"limit": sum(map(len, indices.values())) // 6})


def stages(
    model: LanguageModel, task: Task, survive: Sequence[str], attribution_gb: float | None = None
) -> dict[str, Callable[[], object]]:
    """What is measured."""
    method = Mansu(steps=STEPS, survive=tuple(survive), batch_size=len(task.forget))
    how = "eap" if len(task.forget) == 1 else "eap-ig"
    config = AttributionConfig(how, batch_size=len(task.forget), memory_gb=attribution_gb)
    return {
        "bare": lambda: bare(model, task),
        "attribution": lambda: edges(model, task, config),
        "passes": lambda: bare_passes(model, task.forget, 0),
        "mask": lambda: mask(model, task, survive, False),
        "mask --by-layer": lambda: mask(model, task, survive, True),
        "unlearn": lambda: unlearn(model, task, some_mask(model), method),
        "scores": lambda: scores(model, task, survive),
        "relearning": lambda: relearning(model, task),
        "judging": lambda: judging(model, task),
    }


def beside(model: LanguageModel, stage: str) -> list[LanguageModel]:
    """What a run holds beside the original while it measures: the edited model, and what nf4 makes
    of it."""
    if stage not in ("scores", "relearning", "judging"):
        return []
    edited = model.copy()
    return [edited, quantize(edited, sharing=True)]


def job(model: LanguageModel, survive: Sequence[str], by_layer: bool = False) -> Job:
    """The same for the plan."""
    method = Mansu(steps=STEPS, survive=tuple(survive), batch_size=PAIRS)
    return Job(
        tokens=TOKENS + 1,
        budget=SHARE / POOL,
        circuit=AttributionConfig(batch_size=PAIRS),
        method=method,
        by_layer=by_layer,
        attack_batch=PAIRS,
    )


def tracked(
    shape: str,
    dtype: torch.dtype,
    survive: Sequence[str],
    stage: str,
    layers: int | None = None,
    card: bool = False,
) -> tuple[float, float]:
    """Peak of a stage on fake weights, and the plan's, both in GB beyond an empty process's; or of
    a card that holds as little as can be, while the rest lies in the host's memory."""
    model, task = make_model(shape, dtype, layers=layers, fake=True), make_task(TOKENS)
    # Of the candidates of a mask those are edited that fill the budget.
    tracker = Tracker(model.weights.values(), share=1 / POOL if stage == "unlearn" else 1)
    with stand_ins(survive), tracker, full_card(tracker) if card else nullcontext():
        held = [] if card else beside(model, stage)
        stages(model, task, survive)[stage]()
        del held
    planned = plan(model, job(model, survive, stage == "mask --by-layer"))
    found = next(s for s in planned if s.name == PLANNED[stage])
    return tracker.gb, (found.least if card else found.gb) - PROCESS


def measured(args: argparse.Namespace) -> str:
    """Peak (bytes) and seconds of one stage, in this process."""
    torch.set_num_threads(args.threads)
    task, began = make_task(args.tokens), time.perf_counter()
    if args.layers:
        task = replace(task, forget=PairSet("one", task.forget.pairs[:1]))
    if args.stage != "nothing":
        model = make_model(args.shape, DTYPES[args.dtype])
        began = time.perf_counter()
        stages(model, task, args.survive, args.attribution_gb)[args.stage]()
    took = time.perf_counter() - began
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return f"{int(status.partition('VmHWM:')[2].split()[0]) * 1024} {took}"


def run_stage(stage: str, *more: str) -> tuple[float, float]:
    """Peak (GB) and seconds of one stage, in a process of its own with this one's arguments, whose
    freed memory goes back to the system at once where one pair is measured."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, *more]
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if more else {}
    env = os.environ | freed
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    peak, took = done.stdout.split()
    return int(peak) / 1e9, float(took)


def by_layers(args: argparse.Namespace) -> None:
    """Print what attribution of one pair takes, counted and measured."""
    model = make_model(args.shape, DTYPES[args.dtype], fake=True)
    least, plain = run_stage("passes", "--attribution-gb", "1")
    print(
        f"{args.shape}, one pair of {args.tokens} tokens, {args.threads} threads; bare passes "
        f"{plain:.1f} s\n\n| memory_gb | layers at a time | GB counted | GB measured | time / bare "
        "|\n|---|---|---|---|---|",
        flush=True,
    )
    for gb in (None, *args.layers):
        fit = fit_memory(
            model.graph, model.d_model, args.tokens, AttributionConfig(memory_gb=gb, batch_size=1)
        )
        given = 1e3 if gb is None else gb
        peak, took = run_stage("attribution", "--attribution-gb", str(given))
        print(
            f"| {'–' if gb is None else gb} | {fit.layers} | {fit.gb:.2f} | {peak - least:.2f} | "
            f"{took / plain:.1f} |",
            flush=True,
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Peak memory of the stages of a run.")
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each prompt")
    parser.add_argument("--attribution-gb", type=float, help="memory_gb of attribution")
    parser.add_argument("--layers", type=float, nargs="+", help="memory_gb, for one pair by layers")
    parser.add_argument("--survive", nargs="+", default=list(SET))
    parser.add_argument("--only", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--card", action="store_true", help="tracked, on a card that is too small")
    parser.add_argument("--tracked", action="store_true", help="on fake weights, beside the plan")
    args = parser.parse_args()
    if args.tracked:
        for stage in args.only:
            found, planned = tracked(
                args.shape, DTYPES[args.dtype], args.survive, stage, card=args.card
            )
            print(f"{stage:16} {found:6.1f} GB tracked  {planned:6.1f} planned", flush=True)
        return
    if args.stage:
        print(measured(args))
        return
    if args.layers:
        by_layers(args)
        return
    nothing, _ = run_stage("nothing")
    least = run_stage("bare")[0] - nothing
    dtype = DTYPES[args.dtype]
    weights = make_model(args.shape, dtype).n_parameters * dtype.itemsize / 1e9
    print(
        f"{args.shape}: weights {weights:.2f} GB in {args.dtype}, bare pass {least:.2f} GB",
        flush=True,
    )
    for stage in args.only:
        peak, took = run_stage(stage)
        gb = peak - nothing
        print(f"{stage:16} {gb:6.2f} GB  {gb / least:5.2f} x bare  {gb / weights:5.1f} x weights"
              f"  {took:6.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
