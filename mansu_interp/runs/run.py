"""The main job, end to end: discover -> mask -> unlearn -> quantize -> compare -> report.

Each stage leaves its artefact in the output folder; a run that was interrupted continues after
its last whole artefact when started again with the same settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..audit.relearning import scored_halves
from ..circuits.circuit import Circuit
from ..errors import ConfigError
from ..export.deployed import licence_terms
from ..masks.floor import quantizer_set
from ..masks.mask import Mask
from ..models.language_model import LanguageModel
from ..models.layout import check_layout
from ..models.load import load_model, use_threads
from ..models.provenance import provenance
from ..quantizers.gguf import Mix, gguf_names
from ..quantizers.registry import fitted_quantizers, get_quantizer
from ..report.card import model_card
from ..report.records import Report
from ..report.write import report_files
from ..tasks.load import load_task
from ..tasks.task import Task
from ..unlearning.methods import Mansu
from ..utils.distributed import rank
from ..utils.files import locked
from ..utils.libraries import enough_memory
from ..utils.ranges import entrance
from ..utils.words import Shown
from ..viz.svg import circuit_svg
from .config import RunConfig, deployed, scored
from .context import OnProgress, RunContext
from .defaults import default_task
from .edit import edit
from .folder import (
    CARD,
    MODEL,
    RESULTS,
    Clock,
    RunFolder,
    begin,
    check_folder,
    config_json,
    result_affecting,
)
from .leaks import check_leak_prompts, leak_questions
from .measure import measure
from .planning.cost import Plan, plan
from .planning.knowledge import Knowledge, what_is_known
from .planning.memory import Job, check_memory, fitting


@dataclass(repr=False)
class RunResult(Shown):
    """What a run leaves in memory."""

    report: Report
    circuit: Circuit | None
    """None: the method needs none; so with the mask."""
    mask: Mask | None
    model: LanguageModel
    folder: Path
    seconds: dict[str, float]
    """Per stage."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        took = f"{sum(self.seconds.values()):.0f} s"
        return {**self.report.told(), "folder": self.folder, "took": took}


@entrance(ConfigError)
def run(
    config: RunConfig,
    on_progress: OnProgress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> RunResult:
    """Run the whole job and write every artefact; go on with one that was killed.

    1. Check the settings and load model and task, and ask the original what it knows of it: bad
       input costs no work, and what was not known cannot be forgotten.
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
    note = on_progress or (lambda *_: None)
    _check_settings(config)
    model, task, known = _load(config, note)
    made_from = provenance(model, config.seed, result_affecting(config_json(config)), task.sha256)
    with locked(config.out) if rank() == 0 else contextlib.nullcontext():
        folder = begin(config, made_from) if rank() == 0 else RunFolder(config.out)
        clock = Clock(config.out / "seconds.json")

        def held(stage: str, done: int, total: int) -> None:
            if rank() == 0:
                folder.check_held()
            note(stage, done, total)

        context = RunContext(
            fitting(config, model, task),
            model,
            task=task,
            provenance=made_from,
            note=held,
            clock=clock,
            folder=folder,
        )
        if on_plan:
            held("timing a small batch", 0, 0)
            made = plan(config, model, task, known)
            on_plan(replace(made, lines=made.lines + _spent(clock)))
        clock.lap("load")
        edited = edit(context)
        with enough_memory("measuring the result", "Free memory and run the same command again."):
            report = measure(context, edited)
        if context.writes:
            _write_report(context, report, edited.circuit)
    return RunResult(report, edited.circuit, edited.mask, edited.model, config.out, clock.seconds)


def _check_settings(config: RunConfig) -> None:
    """What of step 1 needs no model."""
    check_folder(config)
    if isinstance(config.unlearn, Mansu):
        quantizer_set(config.unlearn.survive)
    fitted_quantizers(config.unlearn.trained_through)
    for name in scored(config):
        get_quantizer(name).check_installed()


def _load(config: RunConfig, note: OnProgress) -> tuple[LanguageModel, Task, Knowledge]:
    """The rest of step 1: the model, the task without what it does not know, and what it knows."""
    note("loading model and task", 0, 0)
    model = load_model(config.model, config.device, config.dtype)
    use_threads(model, config.threads)
    arch = model.architecture
    check_layout(model.hf, model.linear_names, arch.n_heads, arch.n_kv_heads)
    measured = (*config.unlearn.trained_through, *config.quantizers)
    if any(isinstance(get_quantizer(name), Mix) for name in measured):
        gguf_names(model)  # or the family is not known
    task = load_task(config.task or default_task(config.model), model, config.score_pairs)
    check_memory(model, Job.of(fitting(config, model, task), task))
    task, known = what_is_known(model, task, deployed(config), config.seed, note)
    leak_questions(config, model, task)
    check_leak_prompts(config, model, task)
    if config.relearn_steps:
        scored_halves(task, config.seed)
    return model, task, known


def _write_report(run: RunContext, report: Report, circuit: Circuit | None) -> None:
    """Step 5: the model card and the report in every form."""
    picture = circuit_svg(circuit) if circuit else ""
    run.folder.check_whole()
    run.folder.remove(RESULTS)
    card = model_card(report, licence_terms(run.model.folder))
    run.folder.write_text(f"{MODEL}/{CARD}", card)
    for name, text in report_files(report, picture).items():
        run.folder.write_text(name, text)


def _spent(clock: Clock) -> list[str]:
    """A line of the plan about what earlier goes took of its cost; none in the first go."""
    minutes = round(sum(clock.seconds.values()) / 60)
    return [f"before   {minutes or 'under 1'} min of it by earlier goes"] if clock.seconds else []
