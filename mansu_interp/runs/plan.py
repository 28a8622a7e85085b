"""What a job will cost, said before it starts: from a config alone, or by timing a small batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from ..audit.known import Known, check_known, without_unknown
from ..circuits.config import AttributionConfig, pairs_per_batch
from ..circuits.search.discover import TRIES
from ..errors import TaskError
from ..evaluation.scores import Metric, Scores, evaluate
from ..evaluation.versions import ORIGINAL, QUANTIZER
from ..masks.select import MASK_PAIRS
from ..models.language_model import LanguageModel
from ..models.load import empty_model
from ..quantizers.survival import quantize
from ..tasks.pairs import Pair, by_phrasing
from ..tasks.task import Fact, Task
from ..unlearning.mansu import margins
from ..unlearning.mansu.adversarial import STRIDE
from ..unlearning.methods import Mansu, MethodConfig, RetainingConfig
from ..unlearning.training import CHUNK
from ..utils.words import number_of
from .command import settings_lines
from .config import PlanConfig, RunConfig
from .leaks import cost_tokens

CAD_PAIRS = 48
"""Pairs on which attribution graphs are compared."""
OVERHEAD = 1.6
"""Seconds of a whole run over those that its counted passes would take at the timed speed: measured
on SmolLM2-135M, two idle cores (12.8 min against 8)."""
NAMED, PHRASINGS, EXAMPLE = 12, 4, 50
"""Unknown facts, phrasings, and letters of one that a plan shows."""
RETAIN_PAIRS = 48
"""Retain prompts that are asked, drawn evenly over their phrasings: enough to tell knowledge from
guesses, and soon answered."""
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
        CircuitError: not even one pair fits into ``config.memory_gb``.
    """
    size, one = pairs_per_batch(model.graph, model.d_model, tokens, config)
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
    ends = "both runs" if how.at == "both" else f"the {how.at} run"
    steps = f" at {ends}" if how.method == "eap" else f" with {how.ig_steps} steps"
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
class Phrasing:
    """How well the original answers the forget facts in one phrasing."""

    example: str
    """A prompt."""
    unseen: bool
    """Whether training does not see it, and reports score it."""
    prompts: int
    choice: float
    """Share of the prompts whose answer ranks first of four; chance 0.25."""
    top1: float
    """Share whose answer is what the model predicts."""

    def line(self) -> str:
        """One line for the plan."""
        which = "unseen" if self.unseen else "trained on"
        text = self.example if len(self.example) <= EXAMPLE else f"{self.example[:EXAMPLE]}…"
        shares = f"{self.choice:.0%} first of four, {self.top1:.0%} predicted"
        return f"         {shares}: {text!r} ({which})"


@dataclass(frozen=True)
class Knowledge:
    """What the original knows of a task."""

    forget: Known
    """Of all forget facts, in their training phrasings; the unknown ones are left out."""
    retain: Known
    """Of a sample of the retain prompts."""
    scores: Scores
    """On the unseen phrasings of the forget facts left, in full precision and after each
    quantizer."""
    phrasings: tuple[Phrasing, ...] = ()
    """Of all forget facts the training phrasings, of those left the unseen ones."""

    def lines(self) -> list[str]:
        """For the plan: which facts, in which phrasings, after which quantizers."""
        names = sorted({s for _, s in self.forget.unknown})
        shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        out = [f"known    {self.forget}{f', left out: {shown}' if names else ''}"]
        worst = sorted(self.phrasings, key=lambda p: (not p.unseen, p.choice))
        out += [p.line() for p in worst[:PHRASINGS]]
        if rest := worst[PHRASINGS:]:
            out.append(
                f"         {rest[0].choice:.0%} to {rest[-1].choice:.0%} in {len(rest)} more"
            )
        rows, told = self.scores.rows, []
        for version in rows[0].models:
            share = self.scores.mean("forget", "choice", version)
            guess = "" if any(r.knows(version) for r in rows) else ", as guesses do"
            told.append(f"{share:.1%}{f' after {q}' if (q := version.quantizer) else ''}{guess}")
        out.append(f"         {', '.join(told)} of the unseen prompts")
        asked = sum(self.retain.asked.values())
        return [*out, f"retain   {self.retain.share:.1%} first of four, {asked:,} prompts sampled"]


def _asked(model: LanguageModel, pairs: Sequence[Pair]) -> tuple[Known, list[Phrasing]]:
    """What a model knows of some facts, in all and by phrasing."""
    parts, phrasings = [], []
    for group in by_phrasing(pairs):
        part = Known.of(model, group)
        n = sum(part.asked.values())
        first, top1 = (sum(found.values()) / n for found in (part.right, part.predicted))
        parts.append(part)
        phrasings.append(Phrasing(group[0].prompt, False, n, first, top1))
    sums = (Counter[Fact](), Counter[Fact](), Counter[Fact]())
    for part in parts:
        for total, found in zip(sums, (part.right, part.predicted, part.asked), strict=True):
            total.update(found)
    right, predicted, asked = (dict(total) for total in sums)
    return Known(right, predicted, asked), phrasings


def _unseen(pairs: Sequence[Pair], right: Mapping[Metric, Sequence[bool]]) -> Iterator[Phrasing]:
    """The same of scored prompts, from the scores that are there."""
    at = {id(pair): k for k, pair in enumerate(pairs)}
    for group in by_phrasing(pairs):
        hits = [sum(right[m][at[id(pair)]] for pair in group) for m in ("choice", "top1")]
        first, top1 = (n / len(group) for n in hits)
        yield Phrasing(group[0].prompt, True, len(group), first, top1)


def what_is_known(
    model: LanguageModel,
    task: Task,
    quantizers: Sequence[str],
    seed: int,
    note: Callable[[str, int, int], None],
) -> tuple[Task, Knowledge]:
    """The task without the forget facts that the original does not know, and what it knows.

    1. Ask for every forget fact in its training phrasings, and leave the unknown ones out.
    2. Ask for a sample of the retain facts.
    3. Ask for the forget facts left in their unseen phrasings, also after each quantizer.

    Arguments:
        model: the original.
        task: the task, tokenized for it.
        quantizers: after which the edit will be scored.
        seed: of the sample.
        note: called with (stage, done, total).

    Raises:
        TaskError: the original knows no more of the forget facts, in the training phrasings or in
            the unseen ones, or of the retain facts, than a guess would.
    """
    steps = 2 + len(quantizers)
    note("what the original knows", 0, steps)
    forget, phrasings = _asked(model, task.forget)
    task = without_unknown(model, task, forget)
    retain = Known.of(model, task.retain.sample(RETAIN_PAIRS, seed))
    check_known(model, task, "retain", retain)
    note("what the original knows", 1, steps)
    scores = evaluate({ORIGINAL: model}, task, role="forget")
    if not any(row.knows(ORIGINAL) for row in scores.rows):
        worst = max(scores.rows, key=lambda row: row[ORIGINAL].choice)
        raise TaskError(
            f"{model.name} does not know the forget facts of task {task.name!r} in the unseen "
            f"phrasings: four-way accuracy {worst[ORIGINAL].choice:.3f} on {worst.label} at best, "
            f"and guesses do as well with p = {worst.p_of_guess(ORIGINAL):.2g}. Nothing could be "
            "seen to be forgotten there: score in phrasings that the model answers."
        )
    for k, name in enumerate(quantizers):
        note("what the original knows", 2 + k, steps)
        after = evaluate({ORIGINAL.after(name): quantize(model, name)}, task, role="forget")
        scores = scores.beside(after)
    unseen = [p for pairs in task.scored["unseen"]["forget"].values() for p in pairs]
    phrasings += _unseen(unseen, scores.right[ORIGINAL])
    note("what the original knows", steps, steps)
    return task, Knowledge(forget, retain, scores, tuple(phrasings))


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


def _run_tokens(config: RunConfig, task: Task, n_layers: int) -> float:
    """The same of a whole run; what its method does not need costs nothing."""
    c, u = config.circuit, config.unlearn
    length = sum(len(p.clean) for p in task.forget) / len(task.forget)
    forget = _tokens(task.forget)
    retain = _tokens([p for pairs in task.retain_sets for p in pairs])
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
    return total + 2 * precisions * (_tokens(scored) * len(scored) + texts)


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
    seconds = each * (OVERHEAD * tokens + leaks)
    # Every further quantizer to survive adds a teacher and a student.
    copies = COPIES + 2 * max(0, len(method.promised) - 1)
    memory = model.n_parameters * 4 * copies / 1e9 + 0.6
    threads = number_of(torch.get_num_threads(), "CPU thread")
    where = threads if model.device.type == "cpu" else str(model.device)
    edits = "all parameters"
    if "mask" in method.needs:
        edits = f"at most {number_of(int(config.budget * model.n_parameters), 'parameter')}"
        edits += f" ({config.budget:.2%})"
    facts = {p.fact for p in task.forget}
    unseen = sum(len(s) for s in task.scored["unseen"]["forget"].values())
    lines = [
        f"model    {model.name}: {number_of(model.n_parameters, 'parameter')}",
        f"task     {task.name}: {number_of(len(facts), 'fact')} to forget, scored on "
        f"{number_of(unseen, 'unseen prompt')}",
        *([f"rows     {task.read}"] if task.read else []),
        *known.lines(),
        f"edit     {edits}, {number_of(method.steps, 'step')} of {method.method}",
        *settings_lines(config, model),
        f"cost     about {max(1, round(seconds / 60))} min and {memory:.1f} GB on {where}",
        *([f"leaks    {max(1, round(each * leaks / 60))} min of it (--leaks no)"] if leaks else []),
        f"output   {config.out}",
    ]
    return Plan(lines, seconds, memory)
