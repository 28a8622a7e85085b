"""How long each stage of a run takes: its passes through the model, counted from the settings,
times what a pass over one batch of the run's own takes on this machine.

What is no pass is not counted, choosing parameters by quantizers' cells and quantizing models; but
for fitted quantizers that training goes through, which are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...audit.config import RelearnConfig
from ...circuits.attribution import attribute
from ...circuits.config import AttributionConfig, fit_memory
from ...circuits.search.discover import TRIES
from ...losses.answers import nll
from ...losses.gradients import local_gradient
from ...masks.select import MASK_PAIRS
from ...models.language_model import LanguageModel
from ...quantizers.survival import quantize
from ...tasks.pairs import by_phrasing, collate
from ...tasks.task import Task
from ...unlearning.mansu import margins
from ...unlearning.mansu.adversarial import STRIDE
from ...unlearning.methods import Mansu, MethodConfig, RetainingConfig
from ...unlearning.training import CHUNK, Sampler
from ..config import RunConfig, deployed
from ..leaks import cost_tokens
from .memory import tokens_of

CAD_PAIRS = 48
"""Pairs on which attribution graphs are compared."""
REPEATS = 3
"""Timed passes of each kind, after one that warms up; the fastest counts."""


@dataclass(frozen=True)
class Work:
    """Tokens that pass through a model."""

    forward: float = 0.0
    """Forwards alone."""
    both: float = 0.0
    """Forwards, and backwards to the weights."""
    scored: float = 0.0
    """Forwards or backwards while edges are scored, each pass counted."""

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(
            self.forward + other.forward, self.both + other.both, self.scored + other.scored
        )

    def __mul__(self, times: float) -> Work:
        """So many times the same."""
        return Work(self.forward * times, self.both * times, self.scored * times)


@dataclass(frozen=True)
class Speed:
    """Seconds a token on this machine."""

    forward: float
    both: float
    scored: float

    def seconds(self, work: Work) -> float:
        """Of some work."""
        found = self.forward * work.forward + self.both * work.both
        return found + self.scored * work.scored


def measure_speed(model: LanguageModel, task: Task, config: AttributionConfig) -> Speed:
    """Time bare passes over `CHUNK` forget pairs of one phrasing: forwards without gradients, and
    forwards and backwards to a few elements of every linear weight, as a step of unlearning does;
    and EAP of a batch of pairs, two passes forwards and one backwards.

    Arguments:
        model: the original; it is left as it was.
        task: what is forgotten.
        config: how edges are scored.
    """
    pairs = by_phrasing(task.forget)[0][:CHUNK]
    batch = collate(pairs, model.device)
    few = {n: torch.arange(1, device=model.device) for n in model.linear_names}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model.hf.base_model(input_ids=batch.clean, use_cache=False)[0][0, 0, 0]

    def both() -> torch.Tensor:
        return local_gradient(model, few, [lambda: nll(model, pairs).mean()])[0][0]

    return Speed(
        _fastest(forward) / batch.clean.numel(),
        _fastest(both) / (tokens_of(pairs) * len(pairs)),
        _scored(model, task, config),
    )


def _scored(model: LanguageModel, task: Task, config: AttributionConfig) -> float:
    """Seconds of EAP a token and pass, by the batches after the first, which is slower."""
    longest = max(len(p.clean) for p in task.forget)
    fits = fit_memory(model.graph, model.d_model, longest, config).pairs
    size = min(fits, CHUNK)  # a plan must not take the memory that it plans
    pairs = task.forget.sample(2 * size, 0)
    ends = [(0, time.perf_counter())]
    attribute(
        model,
        pairs,
        config=AttributionConfig(method="eap", metric=config.metric, batch_size=size),
        on_batch=lambda done, _: ends.append((done, time.perf_counter())),
    )
    (first, began), (last, ended) = ends[-2:]
    tokens = sum(len(p.clean) for p in pairs) / len(pairs) * (last - first)
    return (ended - began) / (sum(passes(AttributionConfig(method="eap"), 0)) * tokens)


def _fastest(pass_: Callable[[], torch.Tensor]) -> float:
    """Seconds of a pass."""
    took = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        pass_().item()  # waits until it is computed
        took.append(time.perf_counter() - start)
    return min(took[1:])


def passes(config: AttributionConfig, n_layers: int) -> tuple[int, int]:
    """Forward and backward passes over each batch: the clean and the corrupt run, then one of each
    per point of each component's path; an end of it, EAP's point, is one of those runs."""
    path, moved = config.path(), config.components(n_layers)
    return 2 + moved * sum(alpha not in (0.0, 1.0) for alpha in path), moved * len(path)


def stage_work(config: RunConfig, task: Task, n_layers: int) -> dict[str, Work]:
    """What passes through models in each stage of a run, by the names of its clock (see
    seconds.json); what its method does not need is 0.

    Arguments:
        config: all settings.
        task: what is forgotten and retained.
        n_layers: of the model.
    """
    c, u = config.circuit, config.unlearn
    length = sum(len(p.clean) for p in task.forget) / len(task.forget)
    forget = tokens_of(task.forget)
    retain = tokens_of([p for pairs in task.retain_sets for p in pairs])
    scored = [p for by in task.scored["unseen"].values() for pairs in by.values() for p in pairs]
    asked = [p for pairs in task.scored["unseen"]["forget"].values() for p in pairs]
    texts = sum(min(len(t), 128) for t in task.text.get("unseen", ()))
    scoring = Work(scored=length * sum(passes(c, n_layers)))
    stages = ("discover", "mask", "unlearn", "evaluate", "relearn", "compare")
    found: dict[str, Work] = {stage: Work() for stage in stages}
    if "circuit" in u.needs:
        found["discover"] = scoring * (2 * min(c.pairs, len(task.forget))) + Work(
            scored=TRIES * 2.5 * min(c.faithfulness_pairs, len(task.forget)) * length
        )
    if "mask" in u.needs:
        found["mask"] = Work(both=MASK_PAIRS * (forget + (1 + len(task.retain_sets)) * retain))
    found["unlearn"] = _step(u, task, forget, retain) * u.steps + _margins(u, task, forget, retain)
    precisions = 1 + len(deployed(config))
    found["evaluate"] = Work(2 * precisions * (tokens_of(scored) * len(scored) + texts))
    if config.relearn_steps:
        how = RelearnConfig()
        marks = 3 * tokens_of(asked) * len(asked)  # before, after a quarter and after all steps
        found["relearn"] = Work(marks, config.relearn_steps * how.batch_size * forget) * len(
            how.rates
        )
    found["compare"] = scoring * (3 * CAD_PAIRS)
    return found


def stage_seconds(config: RunConfig, model: LanguageModel, task: Task) -> dict[str, float]:
    """Seconds of each stage of a run on this machine, the leak test's included: takes a second or
    two, of a large model longer."""
    speed = measure_speed(model, task, config.circuit)
    found = stage_work(config, task, model.architecture.n_layers)
    found["leaks"] = Work(cost_tokens(config, model, task))
    seconds = {stage: speed.seconds(work) for stage, work in found.items()}
    once = _fitting_seconds(config.unlearn, model, task)
    seconds["unlearn"] += once * turns(config.unlearn)
    seconds["evaluate"] += once * 2  # of the original and of the edited model
    return seconds


def turns(method: MethodConfig) -> int:
    """How often a quantizer has its turn in training, at most."""
    if not isinstance(method, Mansu):
        return 0
    return -(-method.steps // (1 + len(method.survive) + len(method.train_through)))


def _fitting_seconds(method: MethodConfig, model: LanguageModel, task: Task) -> float:
    """Quantizing once with each fitted quantizer that training goes through."""
    total = 0.0
    for name in method.trained_through:
        start = time.perf_counter()
        quantize(model, name, task.calibration, sharing=True)
        total += time.perf_counter() - start
    return total


def _step(method: MethodConfig, task: Task, forget: float, retain: float) -> Work:
    """One step.

    Arguments:
        method: its settings.
        task: what is forgotten and retained.
        forget: tokens of a forget pair.
        retain: tokens of a retain pair.
    """
    n = method.batch_size
    if not isinstance(method, Mansu):
        batch = forget + (retain if isinstance(method, RetainingConfig) else 0)
        return Work(batch if "references" in method.needs else 0.0, batch) * n
    # Retained is what a teacher predicts, so that there is its forward pass, too.
    step = Work(n * retain, n * (forget + retain))
    if task.text:  # in every second round
        text = Sampler.TEXT_TOKENS * Sampler.TEXT_ROWS / 2
        step += Work(text, text)
    if method.adversarial_steps:  # the attack's own steps, and the gradient at their end
        step += Work(both=(min(STRIDE, method.adversarial_steps) + 1) * n * forget)
    if method.probe_weight:
        # A probe reads every prompt of a half, and a batch of the other gives the gradient.
        step += Work(len(task.forget) / 2 * forget, n * forget)
    return step


def _margins(method: MethodConfig, task: Task, forget: float, retain: float) -> Work:
    """All margin edits, after the last step."""
    total = Work()
    if not isinstance(method, Mansu):
        return total
    # Every round: the answers of the models looked at, and one's slope of them and of those
    # retained; a last look.
    forgotten = min(margins.PAIRS, len(task.forget)) * forget
    retained = min(margins.PAIRS, sum(map(len, task.retain_sets))) * retain
    for models, asked in (
        (1 + len(method.train_through), method.final_margin is not None),
        (1 + len(method.survive), method.quantization_margin),
    ):
        if asked:
            looks = forgotten * models * (margins.ROUNDS + 1)
            total += Work(looks, margins.ROUNDS * (forgotten + retained))
    return total


def told(seconds: float) -> str:
    """Seconds in the unit that people use."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} min"
