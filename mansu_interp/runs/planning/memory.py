"""What each stage of a run holds in memory at its peak, from sizes alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import torch

from ...audit.config import RelearnConfig
from ...audit.linearized import step_room
from ...circuits.config import AttributionConfig, fit_memory
from ...errors import ResourceError
from ...losses.descent import STEP, WIDE, room
from ...losses.gradients import PACK, by_layer
from ...losses.resting import activation_bytes
from ...masks.select import POOL
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, by_phrasing
from ...tasks.task import Task
from ...unlearning.methods import Mansu, MethodConfig
from ...unlearning.training import CHUNK
from ..config import RunConfig

ADVICE = {
    "circuit": "a smaller --circuit.batch-size or a --circuit.memory-gb",
    "mask": "--by-layer",
    "unlearning": "fewer quantizers in --unlearn.survive and --unlearn.train-through, or no "
    "adversarial steps",
    "relearning": "--relearn-steps 0, and attack the checkpoint elsewhere with mansu relearn",
    "judging erasure": "--relearn-steps 0",
    "comparison of graphs": "--relearn-steps 0",
}
"""What takes less, by stage."""
SURE = 1.25
"""Estimates are right within this factor; what needs more than it times all memory cannot run."""
LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may have."""
PROCESS = 0.75
"""GB that a process holds which has loaded the libraries."""
PACKED = 0.65
"""Bytes of a quantized weight that is not in use: a code of half a byte, and its group's scale."""
FITTING = 4
"""Copies of the linear weights that a calibrated quantizer holds while it works."""
CHOOSING = 54
"""Bytes of each element of the weight among which parameters are being chosen: positions twice,
step, gain, damage and score."""
ELEMENT, ELEMENT_EACH = 90, 45
"""Bytes that unlearning keeps of each candidate of the mask, and again for each quantizer."""


@dataclass(frozen=True)
class Job:
    """What decides the memory of a run, besides the model."""

    tokens: int
    """Of the longest prompt."""
    batched: float | None = None
    """Tokens of a prompt where prompts of one phrasing share what they begin with, of the longest
    phrasing; default: ``tokens``."""
    budget: float = 0.005
    circuit: AttributionConfig = field(default_factory=AttributionConfig)
    method: MethodConfig = field(default_factory=Mansu)
    by_layer: bool = False
    attacked: bool = True
    """Whether erasure is tested by relearning."""
    attack_batch: int = RelearnConfig().batch_size
    """Prompts of its batches."""

    @classmethod
    def of(cls, config: RunConfig, task: Task) -> Job:
        """The job of a run."""
        pairs = [p for some in (task.forget, *task.retain_sets) for p in some]
        return cls(
            tokens=max(len(p.clean) for p in pairs),
            batched=max(tokens_of(group) for group in by_phrasing(pairs)),
            budget=config.budget,
            circuit=config.circuit,
            method=config.unlearn,
            by_layer=config.by_layer,
            attacked=config.relearn_steps > 0,
        )


@dataclass(frozen=True)
class Stage:
    """A stage of a run; memory at its peak, in GB (10^9 bytes), that of the process included."""

    name: str
    gb: float
    """All of it."""
    least: float
    """What is left on a card that cannot hold all, when the rest lies in the host's memory (see
    `losses.resting`)."""

    def on_device(self, has: float | None) -> float:
        """What a card with so much memory holds; None: not a card, so all."""
        return self.gb if has is None or self.gb <= has else self.least


def stages(model: LanguageModel, job: Job) -> list[Stage]:
    """The memory of a run, stage by stage, in the order in which they come.

    Arguments:
        model: its weights are not read: it may be one of `empty_model`.
        job: the rest.

    Raises:
        CircuitError: not even one layer of one pair fits into the circuit's ``memory_gb``.
    """
    n, in_layers = model.n_parameters, _elements(model, model.linear_names)
    whole, linear = model.dtype.itemsize * n, model.dtype.itemsize * in_layers
    batched = job.batched or job.tokens
    pass_ = activation_bytes(model, batched) * max(CHUNK * batched, PACK / model.d_model)
    found: list[tuple[str, float]] = []
    needs = job.method.needs
    size, one, _ = fit_memory(model.graph, model.d_model, job.tokens, job.circuit)
    pairs = min(size, job.circuit.pairs)
    scores = one * 1e9 * pairs + activation_bytes(model, job.tokens) * pairs * job.tokens
    if "circuit" in needs:
        found.append(("circuit", whole + scores))
    if "mask" in needs:
        held = WIDE * (_largest_layer(model) if job.by_layer else in_layers)
        pool = POOL * job.budget * n * 20
        chosen = CHOOSING * max(model.weights[x].numel() for x in model.linear_names)
        found.append(("mask", whole + 3 * held + in_layers + pool + max(chosen, pass_)))
    found.append(("unlearning", _unlearning(model, job) + pass_))
    kept = 2 * whole + linear  # original, edited, and what one quantizer makes of it
    found.append(("scores", kept + linear + pass_ / 2))  # and what one makes of either
    least: dict[str, float] = {}
    copy = WIDE * n if job.attacked else 0.0
    if job.attacked:
        batch = job.attack_batch * batched
        attack, judging = room(model, batch, batched), step_room(model, batched, job.attack_batch)
        found.append(("relearning", kept + copy + attack))
        # Of the attack there are a gradient, its moments and its step, and what one layer keeps.
        layer = activation_bytes(model, batched, WIDE) * batch / model.architecture.n_layers
        largest = max(w.numel() for w in model.weights.values())
        least["relearning"] = whole + copy + WIDE * (largest + 4 * min(largest, STEP)) + layer
        found.append(("judging erasure", kept + copy + judging))
        judged = judging - layer * (model.architecture.n_layers - 1)
        least["judging erasure"] = copy + max(whole, judged)
    found.append(("comparison of graphs", kept + copy + scores))
    least["comparison of graphs"] = max(whole, copy) + scores
    return [Stage(name, PROCESS + b / 1e9, PROCESS + least.get(name, b) / 1e9) for name, b in found]


def fitting(config: RunConfig, model: LanguageModel, task: Task) -> RunConfig:
    """The settings, with ``by_layer`` where the machine cannot hold the gradients of all layers at
    once and can hold those of one: the mask is the same."""
    if config.by_layer or "mask" not in config.unlearn.needs:
        return config
    layered = replace(config, by_layer=True)
    at_once, one = (
        next(s.gb for s in stages(model, Job.of(c, task)) if s.name == "mask")
        for c in (config, layered)
    )
    has = machine_gb(model.device)
    return layered if has is not None and at_once > has >= one else config


def peak(model: LanguageModel, job: Job) -> Stage:
    """The stage that needs most of the device that a model is on."""
    has = card_gb(model.device)
    return max(stages(model, job), key=lambda stage: stage.on_device(has))


@dataclass(frozen=True)
class Disk:
    """Disk that a run's folder takes, in GB."""

    kept: float
    """When it is finished, without its pages and circuit (a megabyte)."""
    most: float
    """While it unlearns: with the checkpoint to go on from, whose old file stays until the new one
    is whole."""


def disk_gb(config: RunConfig, model: LanguageModel) -> Disk:
    """The disk that a run takes at most, from sizes alone."""
    n, method, stored = model.n_parameters, config.unlearn, model.saved_dtype.itemsize
    kept, state = stored * n, 3 * WIDE * n  # a dense method's weights and two moments
    if "mask" in method.needs:
        edits = config.budget * n
        candidates = min(POOL * edits, _elements(model, model.linear_names))
        sets = len(method.promised)
        # A position (int32) of each candidate; of each edit also both values and codes.
        kept += 4 * candidates + edits * (4 + 2 * stored + 2 * sets)
        state = 2 * WIDE * candidates * (1 + (sets if sets > 1 else 0))
    return Disk(kept / 1e9, (kept + 2 * state) / 1e9)


def tokens_of(pairs: Sequence[Pair]) -> float:
    """Mean tokens a pair costs when chunks of one phrasing share what they begin with."""
    total, n = 0.0, 0
    for group in by_phrasing(pairs):
        prompts = [p.clean for p in group]
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
        common = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
        total += sum(len(p) - common for p in prompts) + common * len(group) / CHUNK
        n += len(group)
    return total / max(1, n)


def machine_gb(device: torch.device) -> float | None:
    """All memory that a model on a device may have, in GB; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        try:
            sizes.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(sizes) / 1e9


def card_gb(device: torch.device) -> float | None:
    """The same of a card; None of the CPU."""
    return None if device.type == "cpu" else machine_gb(device)


def check_memory(model: LanguageModel, job: Job) -> None:
    """Before long work.

    Raises:
        ResourceError: a stage needs more memory than the machine has, beyond all doubt.
    """
    most, has, card = peak(model, job), machine_gb(model.device), card_gb(model.device)
    host, needs = machine_gb(torch.device("cpu")), most.on_device(card)
    where = "this machine" if model.device.type == "cpu" else str(model.device)
    if needs <= SURE * (has or math.inf):
        # What does not fit onto a card rests in the machine's memory.
        resting = [(s.gb - s.least, s) for s in stages(model, job) if card and s.gb > card]
        needs, most = max(resting, key=lambda x: x[0], default=(0.0, most))
        has, where = host, f"beside {where} this machine"
    if has is not None and needs > SURE * has:
        less = ADVICE.get(most.name, "a smaller model")
        raise ResourceError(
            f"{most.name.capitalize()} needs about {needs:.1f} GB, and {where} has {has:.1f}. Less "
            f"is needed with {less}; else take a larger machine or a smaller model."
        )


def _unlearning(model: LanguageModel, job: Job) -> float:
    """Bytes of weights, optimiser and edits while a method runs."""
    n, in_layers = model.n_parameters, _elements(model, model.linear_names)
    whole, linear = model.dtype.itemsize * n, model.dtype.itemsize * in_layers
    if not isinstance(job.method, Mansu):
        # The original, the student, its gradients and two moments.
        return whole + 4 * WIDE * n
    exact, fitted = len(job.method.survive), len(job.method.train_through)
    several = exact if exact + fitted > 1 else 0
    candidates = min(POOL * job.budget * n, in_layers)
    state = candidates * (ELEMENT + ELEMENT_EACH * exact + WIDE * fitted)
    total = 2 * whole + linear + several * PACKED * in_layers + state
    if fitted:  # what each makes of the original, and the work of one, its last results included
        total += fitted * linear + FITTING * WIDE * in_layers
    if job.method.adversarial_steps:
        total += 3 * WIDE * n
    return total


def _elements(model: LanguageModel, names: Sequence[str]) -> int:
    return sum(model.weights[n].numel() for n in names)


def _largest_layer(model: LanguageModel) -> int:
    """Linear weights of the layer that has most."""
    return max(_elements(model, names) for names in by_layer(model.linear_names).values())
