"""What a job will cost, said before it starts: from a config alone, or by timing a small batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from ..circuits.attribution import pairs_per_batch
from ..circuits.config import AttributionConfig
from ..evaluation.versions import QUANTIZER
from ..masks.select import MASK_PAIRS
from ..models.language_model import LanguageModel
from ..models.load import empty_model
from ..tasks.pairs import Pair, by_phrasing
from ..tasks.task import Task
from ..unlearning.mansu import margins
from ..unlearning.training import CHUNK
from .config import PlanConfig, RunConfig
from .context import needs

CAD_PAIRS = 48
"""Pairs on which attribution graphs are compared."""
OVERHEAD = 1.6
"""Seconds of a whole run over those that its counted passes would take at the timed speed: measured
on SmolLM2-135M, two idle cores (12.8 min against 8)."""
COPIES = 10.4
"""Peak memory of that run in copies of the float32 weights, with one quantizer to survive: the
original, teachers, students, gradients and activations."""


@dataclass(frozen=True)
class Estimate:
    """What scoring every edge of a model takes."""

    parameters: int
    writers: int
    readers: int
    edges: int
    pairs_per_batch: int
    batches: int
    forward: int
    """Forward passes, each over one batch."""
    backward: int
    """Backward passes, each over one batch."""
    weights_gb: float
    """The weights in float32."""
    attribution_gb: float
    """What attribution holds beyond the model's own passes, for one batch."""
    pflop: float
    """Floating-point operations of the passes, in 10^15."""


def passes(config: AttributionConfig) -> tuple[int, int]:
    """Forward and backward passes over each batch: the clean and the corrupt run, then one of each
    per point of the path."""
    points = len(config.path())
    return 2 + points, points


def estimate(model: LanguageModel, config: AttributionConfig, tokens: int) -> Estimate:
    """What `attribute` takes, from sizes alone: the model may be one of `empty_model`.

    Arguments:
        model: its weights are not read.
        config: how edges are scored.
        tokens: tokens of the longest prompt.

    Raises:
        CircuitError: not even one pair fits into ``config.memory_gb``.
    """
    size, one = pairs_per_batch(model.graph, model.d_model, tokens, config)
    size = min(size, config.pairs)
    batches = -(-config.pairs // size)
    forward, backward = passes(config)
    embedding = model.hf.get_input_embeddings().weight.numel()
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
        batches=batches,
        forward=forward * batches,
        backward=backward * batches,
        weights_gb=model.n_parameters * 4 / 1e9,
        attribution_gb=one * size,
        pflop=per_token * tokens * config.pairs * (forward + backward) / 1e15,
    )


def plan_lines(config: PlanConfig) -> list[str]:
    """The text of ``mansu plan``.

    Raises:
        ModelError: no such config.
        CircuitError: not even one pair fits into ``config.attribution.memory_gb``.
    """
    model, how = empty_model(config.model), config.attribution
    e, a = estimate(model, how, config.tokens), model.architecture
    steps = f" with {how.ig_steps} steps" if how.method == "eap-ig" else f" at the {how.at} run"
    return [
        f"model    {model.name}: {e.parameters:,} parameters, {a.n_layers} layers of {a.n_heads} "
        f"heads ({a.n_kv_heads} for keys and values), width {model.d_model}",
        f"graph    {e.edges:,} edges from {e.writers:,} writers to {e.readers:,} readers",
        f"passes   {how.method}{steps}, {how.pairs} pairs of {config.tokens} tokens, "
        f"{e.pairs_per_batch} at a time: {e.forward} forward and {e.backward} backward",
        f"compute  {e.pflop:.3g} PFLOP",
        f"memory   {e.weights_gb:.3g} GB of weights in float32 ({e.weights_gb / 2:.3g} in bf16); "
        f"{e.attribution_gb:.3g} GB for attribution, beyond the passes' own activations",
        f"scores   {e.writers * e.readers * 4 / 1e6:.3g} MB, as one tensor",
    ]


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, and roughly what it costs."""

    lines: list[str]
    seconds: float
    memory_gb: float


def _tokens(pairs: Sequence[Pair]) -> float:
    """Mean tokens a pair costs when chunks of one phrasing share what they begin with."""
    total, n = 0.0, 0
    for group in by_phrasing(pairs):
        prompts = [p.clean for p in group]
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
        common = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
        total += sum(len(p) - common for p in prompts) + common * len(group) / CHUNK
        n += len(group)
    return total / max(1, n)


def plan(config: RunConfig, model: LanguageModel, task: Task) -> Plan:
    """Estimate a run by timing one small batch of it."""
    sample = task.forget.sample(CHUNK, config.seed)
    batch = next(sample.batches(CHUNK, model.device))
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            hidden = model.hf.base_model(input_ids=batch.clean, use_cache=False)[0]
            hidden[0, 0, 0].item()  # waits until it is computed
    forward = (time.perf_counter() - start) / batch.clean.numel()
    c, u = config.circuit, config.unlearn
    length = sum(len(p.clean) for p in task.forget) / len(task.forget)
    shared = _tokens(task.forget)
    kept = [p for pairs in task.retain_sets for p in pairs]
    shared_kept = _tokens(kept)
    scored = [p for by in task.scored["unseen"].values() for pairs in by.values() for p in pairs]
    texts = sum(min(len(t), 128) for t in task.text.get("unseen", ()))
    forwards, backwards = passes(c)
    per_pair = length * (forwards + 2 * backwards)  # a backward pass costs two forward ones
    attribution = min(c.pairs, len(task.forget)) * per_pair
    search = 14 * 2.5 * min(c.faithfulness_pairs, len(task.forget)) * length
    mask = MASK_PAIRS * 3 * (shared + (1 + len(task.retain_sets)) * shared_kept)
    # Forget: forward and backward. Retain: the teacher's forward pass besides.
    step = u.batch_size * (3 * shared + 4 * shared_kept) + (64 * 4 if task.text else 0)
    # An attack's steps, half of the most on average, and the gradient at their end.
    step += (u.adversarial_steps / 2 + 1) * u.batch_size * 3 * shared if u.adversarial_steps else 0
    # A probe reads every prompt of a half, and a batch of the other gives the gradient.
    step += (len(task.forget) / 2 + u.batch_size * 3) * shared if u.probe_weight else 0
    # Every round: the answers of the models looked at, and one's slope of them and of those
    # retained; a last look.
    forgotten, slopes = min(margins.PAIRS, len(task.forget)) * shared, 3 * margins.ROUNDS
    retained = min(margins.PAIRS, len(kept)) * shared_kept * slopes
    finishing = sum(
        forgotten * (models * (margins.ROUNDS + 1) + slopes) + retained
        for models, asked in (
            (1, u.final_margin is not None),
            (1 + len(u.survive), u.quantization_margin),
        )
        if asked
    )
    precisions = 1 + len({QUANTIZER, *u.survive})
    needed = needs(u.method)
    total = u.steps * step + finishing
    total += 2 * precisions * (_tokens(scored) * len(scored) + texts)
    if "circuit" in needed:
        total += 2 * attribution + search + 3 * CAD_PAIRS * per_pair
    if "mask" in needed:
        total += mask
    # Every further quantizer to survive adds a teacher and a student.
    copies = COPIES + 2 * (len(u.survive) - 1)
    memory = model.n_parameters * 4 * copies / 1e9 + 0.6
    seconds = OVERHEAD * total * forward
    edits = f"at most {int(config.budget * model.n_parameters):,} parameters ({config.budget:.2%})"
    threads = torch.get_num_threads()
    on_cores = f"{threads} CPU thread{'s' * (threads > 1)}"
    where = on_cores if model.device.type == "cpu" else str(model.device)
    lines = [
        f"model    {model.name}: {model.n_parameters:,} parameters, {model.graph.n_edges:,} edges",
        f"task     {task.name}: {task.title}",
        f"forget   {len({(p.relation, p.subject) for p in task.forget})} facts in "
        f"{len({(p.relation, p.phrasing) for p in task.forget})} phrasings; "
        f"scored on {sum(len(s) for s in task.scored['unseen']['forget'].values())} unseen prompts",
        f"edit     {edits if 'mask' in needed else 'all parameters'}, {u.steps} steps of {u.method}",
        f"cost     about {max(1, round(seconds / 60))} min and {memory:.1f} GB on {where}",
        f"output   {config.out}",
    ]
    return Plan(lines, seconds, memory)
