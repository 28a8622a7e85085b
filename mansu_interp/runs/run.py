"""The main job, end to end: discover -> mask -> unlearn -> quantize -> compare -> report.

Each stage leaves its artefact in the output folder; a run that was interrupted continues after
its last whole artefact when started again with the same settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..audit.relearning import scored_halves
from ..circuits.circuit import Circuit
from ..masks.floor import quantizer_set
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..models.layout import check_layout
from ..models.load import load_model
from ..models.provenance import provenance
from ..quantizers.registry import get_quantizer
from ..report.markdown import model_card
from ..report.records import Report
from ..report.write import write_report
from ..tasks.load import load_task
from ..unlearning.methods import Mansu
from ..utils.distributed import rank
from ..utils.files import locked, write_text
from ..utils.libraries import enough_memory
from ..viz.svg import circuit_svg
from .config import RunConfig
from .context import OnProgress, RunContext
from .defaults import default_task
from .edit import edit
from .folder import Clock, begin, check_folder, config_json, result_affecting
from .measure import measure
from .plan import Plan, plan


@dataclass
class RunResult:
    """What a run leaves in memory."""

    report: Report
    circuit: Circuit | None
    """None: the method needs none; so with the mask."""
    mask: Mask | None
    model: LanguageModel
    folder: Path
    seconds: dict[str, float]
    """Per stage."""


def run(
    config: RunConfig,
    on_progress: OnProgress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> RunResult:
    """Run the whole job and write every artefact; go on with one that was killed.

    1. Check the settings and load model and task: bad input costs no work.
    2. Take the folder, and tell the plan.
    3. Edit: circuit, mask, unlearning (`edit`).
    4. Measure the saved checkpoint (`measure`).
    5. Write the report.

    Whenever it was killed, the files end up the same byte for byte, ``seconds.json`` apart, if it
    went on on the same kind of device.

    Inside a ``torch.distributed`` process group the processes share discovery, the mask and
    unlearning, and the first one writes; all need to see the same folder.

    Arguments:
        config: all settings.
        on_progress: called with (stage, done, total); total 0 = unknown.
        on_plan: called once with the plan, before any long work.

    Raises:
        MansuError: bad input, always before long work starts.
        ResourceError: disk or memory ran out, or another run writes to the folder.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    check_folder(config)
    if isinstance(config.unlearn, Mansu):
        quantizer_set(config.unlearn.survive)
    for name in config.quantizers:
        get_quantizer(name)
    note = on_progress or (lambda *_: None)
    note("loading model and task", 0, 0)
    model = load_model(config.model, config.device)
    arch = model.architecture
    check_layout(model.hf, model.linear_names, arch.n_heads, arch.n_kv_heads)
    task = load_task(config.task or default_task(config.model), model, config.score_pairs)
    if config.relearn_steps:
        scored_halves(task, config.seed)
    made_from = provenance(model, config.seed, result_affecting(config_json(config)), task.sha256)
    with locked(config.out) if rank() == 0 else contextlib.nullcontext():
        if rank() == 0:
            begin(config, made_from)
        clock = Clock(config.out / "seconds.json")
        context = RunContext(config, model, task, made_from, note=note, clock=clock)
        if on_plan:
            note("timing a small batch", 0, 0)
            on_plan(plan(config, model, task))
        clock.lap("load")
        edited = edit(context)
        with enough_memory("measuring the result", "Free memory and run the same command again."):
            report = measure(context, edited)
        if context.writes:
            write_text(config.out / "model" / "README.md", model_card(report))
            picture = circuit_svg(edited.circuit) if edited.circuit else ""
            write_report(config.out, report, picture)
    return RunResult(report, edited.circuit, edited.mask, edited.model, config.out, clock.seconds)
