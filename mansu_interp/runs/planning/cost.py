"""What a job will cost, said before it starts: from a config alone, or by timing a small batch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ...circuits.config import AttributionConfig, fit_memory
from ...circuits.search.discover import TRIES
from ...evaluation.versions import QUANTIZER
from ...masks.select import MASK_PAIRS
from ...models.language_model import LanguageModel
from ...models.load import empty_model
from ...quantizers.survival import quantize
from ...tasks.task import Task
from ...unlearning.mansu import margins
from ...unlearning.mansu.adversarial import STRIDE
from ...unlearning.methods import Mansu, MethodConfig, RetainingConfig
from ...unlearning.training import CHUNK
from ...utils.tensors import dtype_name
from ...utils.words import number_of
from ..command import settings_lines
from ..config import PlanConfig, RunConfig
from ..leaks import cost_tokens
from .knowledge import Knowledge
from .memory import Job, disk_gb, fitting, peak, stages, tokens_of

CAD_PAIRS = 48
"""Pairs on which attribution graphs are compared."""
OVERHEAD = 1.6
"""Seconds of a whole run over those that its counted passes would take at the timed speed: measured
on SmolLM2-135M, two idle cores (12.8 min against 8)."""


@dataclass(frozen=True)
class Estimate:
    """What scoring every edge of a model takes."""

    parameters: int
    writers: int
    readers: int
    edges: int
    pairs_per_batch: int
    layers_at_once: int
    """Layers whose writers' differences are held at a time."""
    batches: int
    forward: int
    """Forward passes, each over one batch."""
    backward: int
    """Backward passes, each over one batch."""
    weights_gb: float
    """The weights, in the dtype that they are held in."""
    attribution_gb: float
    """What attribution holds beyond the model's own passes, for one batch."""
    pflop: float
    """Floating-point operations of the passes, in 10^15."""


def passes(config: AttributionConfig, n_layers: int) -> tuple[int, int]:
    """Forward and backward passes over each batch: the clean and the corrupt run, then one of each
    per point of each component's path; an end of it, EAP's point, is one of those runs."""
    path, moved = config.path(), config.components(n_layers)
    return 2 + moved * sum(alpha not in (0.0, 1.0) for alpha in path), moved * len(path)


def estimate(model: LanguageModel, config: AttributionConfig, tokens: int) -> Estimate:
    """What `attribute` takes, from sizes alone: the model may be one of `empty_model`.

    Arguments:
        model: its weights are not read.
        config: how edges are scored.
        tokens: tokens of the longest prompt.

    Raises:
        CircuitError: not even one layer of one pair fits into ``config.memory_gb``.
    """
    size, one, layers = fit_memory(model.graph, model.d_model, tokens, config)
    size = min(size, config.pairs)
    batches = -(-config.pairs // size)
    forward, backward = passes(config, model.architecture.n_layers)
    embedding = model.weights[model.embedding_name].numel()
    # Per token 2 operations a weight forwards, and as many for the input's gradient. Looking an
    # embedding up is free; a tied one is used once more, as the unembedding.
    tied = model.config.tie_word_embeddings
    per_token = 2 * (model.n_parameters - (0 if tied else embedding))
    return Estimate(
        parameters=model.n_parameters,
        writers=len(model.graph.writers),
        readers=len(model.graph.readers),
        edges=model.graph.n_edges,
        pairs_per_batch=size,
        layers_at_once=layers,
        batches=batches,
        forward=forward * batches,
        backward=backward * batches,
        weights_gb=model.n_parameters * model.dtype.itemsize / 1e9,
        attribution_gb=one * size,
        pflop=per_token * tokens * config.pairs * (forward + backward) / 1e15,
    )


def plan_lines(config: PlanConfig) -> list[str]:
    """The text of ``mansu plan``.

    Raises:
        ModelError: no such config.
        CircuitError: not even one layer of one pair fits into ``config.attribution.memory_gb``.
    """
    model, how = empty_model(config.model, dtype=config.dtype), config.attribution
    e, a = estimate(model, how, config.tokens), model.architecture
    ends = "both runs" if how.at == "both" else f"the {how.at} run"
    job = Job(config.tokens, None, config.budget, how, Mansu(survive=config.survive))
    whole = ", ".join(f"{s.name} {s.gb:.1f}" for s in stages(model, job))
    formats = number_of(len(config.survive), "quantizer")
    by = f", {e.layers_at_once} layers at a time" if e.layers_at_once < a.n_layers else ""
    steps = f" at {ends}" if how.method == "eap" else f" with {how.ig_steps} steps"
    return [
        f"model    {model.name}: {e.parameters:,} parameters, {a.n_layers} layers of {a.n_heads} "
        f"heads ({a.n_kv_heads} for keys and values), width {model.d_model}",
        f"graph    {e.edges:,} edges from {e.writers:,} writers to {e.readers:,} readers",
        f"passes   {how.method}{steps}, {how.pairs} pairs of {config.tokens} tokens, "
        f"{e.pairs_per_batch} at a time: {e.forward} forward and {e.backward} backward",
        f"compute  {e.pflop:.3g} PFLOP",
        f"memory   {e.weights_gb:.3g} GB of weights in {dtype_name(model.dtype)}; "
        f"{e.attribution_gb:.3g} GB for attribution{by}, beyond the passes' own activations",
        f"scores   {e.writers * e.readers * 4 / 1e6:.3g} MB, as one tensor",
        f"run      {whole} GB at the peak, with {formats} to survive and the settings of mansu run",
    ]


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, and roughly what it costs."""

    lines: list[str]
    seconds: float
    memory_gb: float


def _forward_seconds(model: LanguageModel, task: Task, seed: int) -> float:
    """Seconds of a forward pass per token, timed on one small batch."""
    batch = next(task.forget.sample(CHUNK, seed).batches(CHUNK, model.device))
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            hidden = model.hf.base_model(input_ids=batch.clean, use_cache=False)[0]
            hidden[0, 0, 0].item()  # waits until it is computed
    return (time.perf_counter() - start) / batch.clean.numel()


def _step_tokens(method: MethodConfig, task: Task, forget: float, retain: float) -> float:
    """Tokens of forward passes that one step costs; a backward pass costs two forward ones.

    Arguments:
        method: its settings.
        task: what is forgotten and retained.
        forget: tokens of a forget pair.
        retain: tokens of a retain pair.
    """
    if not isinstance(method, Mansu):
        each = 4 if "references" in method.needs else 3
        retains = isinstance(method, RetainingConfig)
        return method.batch_size * each * (forget + (retain if retains else 0))
    # Forget: forward and backward. Retain: the teacher's forward pass besides.
    step = method.batch_size * (3 * forget + 4 * retain) + (64 * 4 if task.text else 0)
    if method.adversarial_steps:
        # The attack's own steps, and the gradient at their end.
        step += (min(STRIDE, method.adversarial_steps) + 1) * method.batch_size * 3 * forget
    if method.probe_weight:
        # A probe reads every prompt of a half, and a batch of the other gives the gradient.
        step += (len(task.forget) / 2 + method.batch_size * 3) * forget
    return step


def _margin_tokens(method: MethodConfig, task: Task, forget: float, retain: float) -> float:
    """The same of all margin edits, after the last step."""
    if not isinstance(method, Mansu):
        return 0.0
    # Every round: the answers of the models looked at, and one's slope of them and of those
    # retained; a last look.
    slopes = 3 * margins.ROUNDS
    forgotten = min(margins.PAIRS, len(task.forget)) * forget
    retained = min(margins.PAIRS, sum(map(len, task.retain_sets))) * retain * slopes
    return sum(
        forgotten * (models * (margins.ROUNDS + 1) + slopes) + retained
        for models, asked in (
            (1, method.final_margin is not None),
            (1 + len(method.survive), method.quantization_margin),
        )
        if asked
    )


def _fitting_seconds(method: MethodConfig, model: LanguageModel, task: Task) -> float:
    """Seconds of quantizing anew on every turn of a fitted quantizer, each timed once."""
    total = 0.0
    for name in method.trained_through:
        start = time.perf_counter()
        quantize(model, name, task.calibration, sharing=True)
        total += time.perf_counter() - start
    return total * turns(method)


def _through_line(method: MethodConfig, seconds: float) -> list[str]:
    """What training through fitted quantizers adds to the cost, if it does."""
    if not method.trained_through:
        return []
    names = ", ".join(method.trained_through)
    return [
        f"through  {max(1, round(seconds / 60))} min of it: {names} quantize anew on each of "
        f"{turns(method)} turns"
    ]


def turns(method: MethodConfig) -> int:
    """How often a quantizer has its turn in training, at most."""
    if not isinstance(method, Mansu):
        return 0
    return -(-method.steps // (1 + len(method.survive) + len(method.train_through)))


def _run_tokens(config: RunConfig, task: Task, n_layers: int) -> float:
    """The same of a whole run; what its method does not need costs nothing."""
    c, u = config.circuit, config.unlearn
    length = sum(len(p.clean) for p in task.forget) / len(task.forget)
    forget = tokens_of(task.forget)
    retain = tokens_of([p for pairs in task.retain_sets for p in pairs])
    scored = [p for by in task.scored["unseen"].values() for pairs in by.values() for p in pairs]
    texts = sum(min(len(t), 128) for t in task.text.get("unseen", ()))
    forwards, backwards = passes(c, n_layers)
    per_pair = length * (forwards + 2 * backwards)
    total = 3 * CAD_PAIRS * per_pair
    if "circuit" in u.needs:
        total += 2 * min(c.pairs, len(task.forget)) * per_pair
        total += TRIES * 2.5 * min(c.faithfulness_pairs, len(task.forget)) * length
    if "mask" in u.needs:
        total += MASK_PAIRS * 3 * (forget + (1 + len(task.retain_sets)) * retain)
    total += u.steps * _step_tokens(u, task, forget, retain)
    total += _margin_tokens(u, task, forget, retain)
    precisions = 1 + len({QUANTIZER, *u.promised})
    return total + 2 * precisions * (tokens_of(scored) * len(scored) + texts)


def plan(config: RunConfig, model: LanguageModel, task: Task, known: Knowledge) -> Plan:
    """Estimate a run by timing one small batch of it.

    Arguments:
        config: all settings.
        model: the original.
        task: what is forgotten and retained.
        known: what the original knows of it.
    """
    method = config.unlearn
    tokens = _run_tokens(config, task, model.architecture.n_layers)
    each, leaks = _forward_seconds(model, task, config.seed), cost_tokens(config, model, task)
    quantizing = _fitting_seconds(method, model, task)
    seconds = each * (OVERHEAD * tokens + leaks) + quantizing
    chosen = fitting(config, model, task)
    most, disk = peak(model, Job.of(chosen, task)), disk_gb(config, model)
    threads = number_of(torch.get_num_threads(), "CPU thread")
    where = threads if model.device.type == "cpu" else str(model.device)
    edits = "all parameters"
    if "mask" in method.needs:
        edits = f"at most {number_of(int(config.budget * model.n_parameters), 'parameter')}"
        edits += f" ({config.budget:.2%})"
    facts = {p.fact for p in task.forget}
    unseen = sum(len(s) for s in task.scored["unseen"]["forget"].values())
    lines = [
        f"model    {model.name}: {number_of(model.n_parameters, 'parameter')}, held in "
        f"{dtype_name(model.dtype)}",
        f"task     {task.name}: {number_of(len(facts), 'fact')} to forget, scored on "
        f"{number_of(unseen, 'unseen prompt')}",
        *([f"rows     {task.read}"] if task.read else []),
        *known.lines(),
        f"edit     {edits}, {number_of(method.steps, 'step')} of {method.method}",
        *settings_lines(config, model),
        *(
            ["mask     a layer at a time, as with --by-layer: all at once would not fit in memory"]
            if chosen != config
            else []
        ),
        f"cost     about {max(1, round(seconds / 60))} min on {where}, and {most.gb:.1f} GB of "
        f"memory ({most.name}); {disk.kept:.2g} GB of disk, {disk.most:.2g} meanwhile",
        *_through_line(method, quantizing),
        *([f"leaks    {max(1, round(each * leaks / 60))} min of it (--leaks no)"] if leaks else []),
        f"output   {config.out}",
    ]
    return Plan(lines, seconds, most.gb)
