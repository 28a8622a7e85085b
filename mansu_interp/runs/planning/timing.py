"""How quick this machine is: the seconds of one unit of every kind of work that a run consists of.

Passes are timed on two small batches, since a pass costs a fixed time a call (most of it, of a
model of a million parameters) and more for each token. What is no pass is timed on one layer, or on
some rows of it (`some_rows`): it takes as long for every element.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...audit.probes import RIDGE, linear_map
from ...circuits.attribution import attribute
from ...circuits.config import AttributionConfig, fit_memory
from ...losses.accuracy import perplexity
from ...losses.descent import make_optimiser
from ...losses.gradients import by_layer, local_gradient
from ...masks.floor import floor_step
from ...models.language_model import LanguageModel
from ...quantizers.registry import get_quantizer
from ...tasks.pairs import Pair, PairSet, by_phrasing
from ...tasks.task import Task
from ...unlearning.training import CHUNK, arithmetic
from ...utils.files import write_json

FEW = 4
"""Pairs of the smaller batch; of the larger one `CHUNK`."""
REPEATS = 4
"""How often a job is timed, at most; the fastest counts."""
ENOUGH = 0.3
"""Seconds after which it is not timed again: what takes as long is not disturbed much."""
WINDOW = 128
"""Tokens of a text that are read."""
ROWS = 2**18
"""Elements of each weight of a layer that are quantized, floored and so on to time it."""


@dataclass(frozen=True)
class Units:
    """An amount of every kind of work; or the seconds that one unit of each takes."""

    forward_calls: float = 0.0
    """Forward passes without gradients."""
    forward: float = 0.0
    """Their tokens, as computed: padding counts, a prefix that prompts share counts once."""
    forward_prefixes: float = 0.0
    """Of the forward passes those that begin with a shared prefix: what its keys take besides."""
    both_calls: float = 0.0
    """Forward and backward passes, to the weights."""
    both: float = 0.0
    """Their tokens."""
    both_prefixes: float = 0.0
    """Likewise."""
    read: float = 0.0
    """Tokens of running text, all of them predicted."""
    scored_calls: float = 0.0
    """Passes forwards or backwards while edges are scored."""
    scored: float = 0.0
    """Their tokens."""
    opened: float = 0.0
    """Models made ready for scoring: bridged, and tried."""
    summed: float = 0.0
    """Elements of whole gradients, squared and added up."""
    stepped: float = 0.0
    """Elements that Adam moves, step by step."""
    floored: float = 0.0
    """Elements whose floor is sought, of the set of quantizers."""
    quantized: float = 0.0
    """Elements that go through every quantizer that is scored."""
    coded: float = 0.0
    """Elements whose cells are sought, in every quantizer that is scored."""
    mapped: float = 0.0
    """Linear probes."""
    crossed: float = 0.0
    """Products of two tokens' states, number by number, in the tangent kernel."""
    kept: float = 0.0
    """Results written to the disk."""

    def __add__(self, other: Units) -> Units:
        """Both together."""
        return Units(**{n: x + getattr(other, n) for n, x in vars(self).items()})

    def __mul__(self, times: float) -> Units:
        """So many times the same."""
        return Units(**{n: x * times for n, x in vars(self).items()})

    def seconds(self, speed: Units) -> float:
        """Of this work, at the seconds of one unit each."""
        return sum(x * getattr(speed, n) for n, x in vars(self).items())


@dataclass(frozen=True)
class Cost:
    """Passes through a model."""

    calls: float = 0.0
    tokens: float = 0.0
    prefixes: float = 0.0
    """Of the calls those for a shared prefix alone."""

    def __add__(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Cost:
        """So many times the same."""
        return Cost(*(x * times for x in astuple(self)))

    @property
    def forward(self) -> Units:
        """Forwards alone."""
        return Units(self.calls, self.tokens, self.prefixes)

    @property
    def both(self) -> Units:
        """Forwards and backwards."""
        return Units(both_calls=self.calls, both=self.tokens, both_prefixes=self.prefixes)


def cost(model: LanguageModel, parts: Sequence[Sequence[Pair]]) -> Cost:
    """What it takes to ask for the answers of some pairs, each part in one pass: of a prefix that
    is long enough (`LanguageModel.shares`) a call of its own."""
    calls, tokens, prefixes = 0, 0, 0
    for part in parts:
        prompts = [p.clean for p in part]
        n, longest = len(prompts), max(map(len, prompts))
        first, last = min(prompts), max(prompts)  # what these two share all share
        common = 0
        while common < min(map(len, prompts)) - 1 and first[common] == last[common]:
            common += 1
        if not model.shares(common, n):
            common = 0
        calls += 1 + (common > 0)
        prefixes += common > 0
        tokens += n * (longest - common) + common
    return Cost(calls, tokens, prefixes)


def fastest(job: Callable[[], object]) -> float:
    """Seconds of a job, which has to wait for what it computes."""
    took: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        job()
        took.append(time.perf_counter() - start)
        if sum(took) > ENOUGH:
            break
    return min(took)


def measure_passes(model: LanguageModel, task: Task, precision: str = "fp32") -> Units:
    """Time forward passes, and those with a backward pass to a few elements of every linear weight,
    as a step of unlearning does: of random prompts, as long as the forget prompts are.

    Arguments:
        model: the original; it is left as it was.
        task: what is forgotten.
        precision: of the losses (`Mansu.precision`).
    """
    lengths = sorted(len(p.clean) for p in task.forget)
    draws = torch.Generator().manual_seed(0)
    shape = CHUNK, lengths[len(lengths) // 2]
    tokens = torch.randint(model.sizes[0], shape, generator=draws)
    few = {n: torch.arange(1, device=model.device) for n in model.linear_names}

    common = next((k for k in range(1, 64) if model.shares(k, CHUNK)), 0)
    alike = torch.cat([tokens[:1, :1].expand(CHUNK, common), tokens[:, -2:]], 1)

    def loss(rows: Tensor) -> Tensor:
        with arithmetic(model, precision):
            logits = model.last_logits(rows, torch.full((len(rows),), rows.shape[1] - 1))
        return logits.log_softmax(-1).mean()

    def forward(rows: Tensor) -> None:
        with torch.no_grad():
            loss(rows).item()

    def both(rows: Tensor) -> None:
        local_gradient(model, few, [lambda: loss(rows)])[0].sum().item()

    sizes = [Cost(1, n * shape[1]) for n in (FEW, CHUNK)]
    found: list[float] = []
    for job in (forward, both):
        job(tokens[:1])  # what is computed once, and what is slow at first
        took = [fastest(lambda n=n, job=job: job(tokens[:n])) for n in (FEW, CHUNK)]
        call, token = _call_and_token(took, sizes)
        found += [call, token, 0.0]
        if common:
            sharing = fastest(lambda job=job: job(alike))
            found[-1] = max(0.0, sharing - 2 * call - (common + 2 * CHUNK) * token)
    return Units(*found)


def _call_and_token(took: Sequence[float], sizes: Sequence[Cost]) -> tuple[float, float]:
    """What a call and what a token takes, if both batches took calls x call + tokens x token."""
    (small, large), (a, b) = took, sizes
    scale = a.calls * b.tokens - b.calls * a.tokens
    call = (small * b.tokens - large * a.tokens) / scale if scale else 0.0
    token = (large * a.calls - small * b.calls) / scale if scale else 0.0
    if call >= 0 and token > 0:
        return call, token
    return (large / b.calls, 0.0) if scale and token <= 0 else (0.0, large / b.tokens)


def measure_scoring(model: LanguageModel, task: Task, config: AttributionConfig) -> Units:
    """Time EAP, two passes forwards and one backwards: of batches after the first, which is slower,
    and what comes before any batch."""
    assert replace(model).bridge  # what it needs is imported
    longest = max(len(p.clean) for p in task.forget)
    fits = fit_memory(model.graph, model.d_model, longest, config).pairs
    groups = sorted(by_phrasing(task.forget), key=lambda g: sum(len(p.clean) for p in g) / len(g))
    group = groups[len(groups) // 2]
    opened: list[float] = []

    def batch(part: list[Pair]) -> float:
        """Seconds of a pass over a batch."""
        ends = [(0, time.perf_counter())]
        attribute(
            replace(model),  # which is not bridged yet
            PairSet("timed", tuple(part * 2)),
            config=AttributionConfig(method="eap", metric=config.metric, batch_size=len(part)),
            on_batch=lambda done, _: ends.append((done, time.perf_counter())),
        )
        start, first, second = (when for _, when in ends)
        opened.append(2 * first - start - second)
        return (second - first) / 3

    # A plan must not take the memory that it plans.
    parts = [group[: min(size, fits)] for size in (FEW, CHUNK)]
    sizes = [Cost(1, sum(len(p.clean) for p in part)) for part in parts]
    calls, tokens = _call_and_token([batch(part) for part in parts], sizes)
    return Units(scored_calls=calls, scored=tokens, opened=max(0.0, min(opened)))


def measure_reading(model: LanguageModel, text: Sequence[int]) -> Units:
    """Time the perplexity of a text."""
    tokens = tuple(text[:WINDOW])
    return Units(read=fastest(lambda: perplexity(model, [tokens])) / len(tokens))


def some_rows(model: LanguageModel) -> dict[str, Tensor]:
    """The linear weights of a layer, of large ones some rows."""
    names = next(iter(by_layer(model.linear_names).values()))
    weights = {n: model.weights[n] for n in names}
    return {n: w[: max(1, ROWS // w.shape[1])].clone() for n, w in weights.items()}


def measure_weights(model: LanguageModel, survive: Sequence[str], deployed: Sequence[str]) -> Units:
    """Time what is done to weights, on those of one layer.

    Arguments:
        model: the original; it is left as it was.
        survive: the set of quantizers of the floor; empty: none is sought.
        deployed: the quantizers that are scored.
    """
    weights = some_rows(model)
    n = sum(w.numel() for w in weights.values())
    rows, quantizers = list(weights.values()), [get_quantizer(q) for q in deployed]
    exact = [q for q in quantizers if q.promises]
    moved = [w.float().clone() for w in rows]  # what is trained whole is float32
    optimisers = [make_optimiser("adam", [w], 1e-9) for w in moved]
    for w in moved:
        w.grad = torch.zeros_like(w)

    def waited() -> None:
        if model.device.type != "cpu":
            moved[-1].sum().item()

    def summed() -> None:
        for w in moved:
            w.add_(w.clone().square_(), alpha=0.0)
        waited()

    def stepped() -> None:
        for optimiser in optimisers:
            optimiser.step()
        waited()

    def floored() -> None:
        for w in rows:
            floor_step(w, w, survive, model.saved_dtype)
        waited()

    @torch.no_grad()
    def each(job: Callable[..., object]) -> None:
        for q in exact:
            for w in rows:
                if q.touches(w):
                    job(q, w.cpu())

    return Units(
        summed=fastest(summed) / n,
        stepped=fastest(stepped) / n,
        floored=fastest(floored) / n if survive else 0.0,
        quantized=fastest(lambda: each(lambda q, w: q.round_trip(w).to(model.device))) / n,
        coded=fastest(lambda: each(lambda q, w: q.cells(w))) / n,
    )


def measure_rest(model: LanguageModel, probed: int, record: Mapping[str, object]) -> Units:
    """Time a linear probe, products of states, and writing a result to the disk.

    Arguments:
        model: whose width and device count.
        probed: prompts that a probe is fitted on.
        record: what is written.
    """
    width = model.d_model
    x = torch.randn(probed, width, device=model.device)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "record.json"
        kept = fastest(lambda: write_json(place, record))
    return Units(
        mapped=fastest(lambda: linear_map(x, x, RIDGE)(x).sum().item()),
        crossed=fastest(lambda: ((x @ x.T) * (x @ x.T)).sum().item()) / (2 * probed**2 * width),
        kept=2 * kept,  # the results and the record of the run's files
    )
