"""What a job will cost, said before it starts: from a config alone, or by timing a small batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...circuits.config import AttributionConfig, fit_memory
from ...models.language_model import LanguageModel
from ...models.load import empty_model, load_model, use_threads
from ...tasks.load import load_task
from ...tasks.task import Task
from ...unlearning.methods import Mansu, MethodConfig
from ...utils.shipped import is_embedded
from ...utils.tensors import dtype_name
from ...utils.words import number_of
from ..command import settings_lines
from ..config import PlanConfig, RunConfig
from ..defaults import default_config, default_task
from .knowledge import Knowledge
from .memory import Job, card_gb, disk_gb, fitting, machine_gb, peak, stages
from .seconds import passes, stage_seconds, told, turns


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
    method = Mansu(survive=config.survive)
    job = Job(
        config.tokens,
        budget=config.budget,
        circuit=how,
        method=method,
    )
    found = stages(model, job)
    whole = ", ".join(f"{s.name} {s.gb:.1f}" for s in found)
    resting = ", ".join(f"{s.name} {s.least:.1f}" for s in found if s.least < s.gb)
    formats, took = number_of(len(config.survive), "quantizer"), _seconds(config, model)
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
        f"card     where that does not fit onto a card: {resting} GB there, the rest in the host's "
        "memory",
        *(
            []
            if took is None
            else [f"time     about {told(sum(took.values()))}: {stage_line(took)}"]
        ),
    ]


def _seconds(config: PlanConfig, sizes: LanguageModel) -> dict[str, float] | None:
    """Seconds of a run's stages, timed on this machine, with the model's own task; None of a model
    whose weights are not here, or would take a quarter of the memory to load."""
    folder = Path(config.model)
    here = is_embedded(config.model) or any(folder.glob("*.safetensors"))
    has = machine_gb(torch.device("cpu"))
    if not here or (has and sizes.n_parameters * sizes.dtype.itemsize / 1e9 > has / 4):
        return None
    model = load_model(config.model, "cpu", config.dtype)
    run = default_config(config.model)
    run = replace(
        run,
        budget=config.budget,
        circuit=replace(run.circuit, **vars(config.attribution)),
        unlearn=replace(run.unlearn, survive=config.survive),
    )
    use_threads(model)
    return stage_seconds(run, model, load_task(default_task(config.model), model, run.score_pairs))


def stage_line(seconds: Mapping[str, float]) -> str:
    """Stages and their time, those without any left out."""
    return ", ".join(f"{stage} {told(s)}" for stage, s in seconds.items() if s)


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, and roughly what it costs."""

    lines: list[str]
    stages: dict[str, float]
    """Seconds of each stage, by the names of the run's clock."""
    memory_gb: float

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())


def _through_line(method: MethodConfig) -> list[str]:
    """Which fitted quantizers training goes through, if any."""
    if not method.trained_through:
        return []
    names = ", ".join(method.trained_through)
    return [f"through  {names}, each quantized anew on its turns, {turns(method)} at most"]


def plan(config: RunConfig, model: LanguageModel, task: Task, known: Knowledge) -> Plan:
    """Estimate a run by timing one small batch of it.

    Arguments:
        config: all settings.
        model: the original.
        task: what is forgotten and retained.
        known: what the original knows of it.
    """
    method, stages_ = config.unlearn, stage_seconds(config, model, task)
    seconds, leaks = sum(stages_.values()), stages_["leaks"]
    chosen = fitting(config, model, task)
    most, disk = peak(model, Job.of(chosen, task)), disk_gb(config, model)
    on_device = most.on_device(card_gb(model.device))
    host = f" and {most.gb - on_device:.1f} of the host's" if on_device < most.gb else ""
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
        f"cost     about {told(seconds)} on {where}, and {on_device:.1f} GB of "
        f"memory{host} ({most.name}); {disk.kept:.2g} GB of disk, {disk.most:.2g} meanwhile",
        f"stages   {stage_line(stages_)}",
        *_through_line(method),
        *([f"leaks    {told(leaks)} of it (--leaks no)"] if leaks else []),
        f"output   {config.out}",
    ]
    return Plan(lines, stages_, on_device)
