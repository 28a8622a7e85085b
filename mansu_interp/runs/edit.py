"""The first half of a run: circuit, mask, edited model and its ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..circuits.circuit import Circuit
from ..circuits.search.discover import discover
from ..errors import ArtifactError, ConfigError, MaskError
from ..evaluation.versions import QUANTIZER
from ..export.deployed import save_edited
from ..export.ledger import Ledger
from ..masks.mask import Mask
from ..masks.select import circuit_mask, random_mask
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..tasks.task import Task
from ..unlearning.history import StepRecord
from ..unlearning.methods import Mansu, MansuRandomMask, MansuWholeModel
from ..unlearning.unlearn import unlearn
from ..utils.libraries import enough_memory
from ..utils.ranges import entrance
from .config import RunConfig
from .context import RunContext
from .folder import CIRCUIT, GRAPHML, HISTORY, LEDGER, MASK, MODEL

FINISH = {
    "quantization_margin_reached": "reaching the quantization margin",
    "above_target": "reaching the final margin",
}
"""Stages of unlearning after its steps, by what their records hold; the last one first."""


@dataclass(frozen=True)
class Edited:
    """What the first half of a run leaves."""

    circuit: Circuit | None
    """None: the method needs none; so with the mask."""
    mask: Mask | None
    model: LanguageModel
    """The edited checkpoint as saved."""


def edit(run: RunContext) -> Edited:
    """Make the edited model, or go on where an earlier go at the run ended.

    1. Find the circuit of the forget facts, if the method needs one.
    2. Choose the parameters that may change: the mask, if the method needs one.
    3. Unlearn, and save the checkpoint.
    4. Record every edit in the ledger.

    Each artefact is read back from its file: what was made in this go and what was found there are
    then the same. The first process writes; the others wait.
    """
    needs = run.config.unlearn.needs
    circuit = find_circuit(run) if "circuit" in needs else None
    mask = choose_parameters(run, circuit) if "mask" in needs else None
    model = train(run, mask)
    record(run, mask, model)
    run.clock.lap("unlearn")
    return Edited(circuit, mask, model)


def find_circuit(run: RunContext) -> Circuit:
    """``circuit.json``, made or read."""
    settings, file = run.config.circuit, run.out / CIRCUIT
    if run.missing(file):
        torch.manual_seed(run.config.seed)
        with enough_memory(
            "discovering the circuit",
            "Run it again in the same folder with a smaller --circuit.batch-size (now "
            f"{settings.batch_size}) or a --circuit.memory-gb.",
        ):
            found = discover(
                run.model,
                run.task.forget,
                config=settings,
                retain=run.task.retain,
                seed=run.config.seed,
                on_step=run.note,
                resume=run.out,
            )
        found = replace(found, meta=replace(found.meta, provenance=run.provenance))
        if run.writes:
            with run.folder.file(CIRCUIT) as made:
                found.save(made)
        run.wait()
    circuit = Circuit.load(file)
    if run.writes and not (run.out / GRAPHML).exists():
        with run.folder.file(GRAPHML) as made:
            circuit.save_graphml(made)
    circuit = replace(circuit, pairs=run.task.forget.sample(settings.pairs, run.config.seed))
    circuit.check_fits(run.model)
    run.clock.lap("discover")
    return circuit


@entrance(MaskError)
def make_mask(
    config: RunConfig,
    model: LanguageModel,
    task: Task,
    circuit: Circuit | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Mask:
    """The mask of a circuit, with a run's settings; of ablations, one that ignores the circuit.

    Raises:
        ConfigError: the method needs no mask, or a circuit that is not given.
        MaskError, CircuitError: see `circuit_mask`.
    """
    method = config.unlearn
    if not isinstance(method, Mansu):
        raise ConfigError(f"{method.method} trains all weights: it has no mask.")
    if isinstance(method, MansuRandomMask):
        return random_mask(model, config.budget, config.seed, method.survive)
    if isinstance(method, MansuWholeModel):
        everything = np.ones_like(model.graph.exists)
        circuit = Circuit(model.graph, np.zeros(everything.shape, np.float32), everything)
    if circuit is None:
        raise ConfigError(f"{method.method} needs a circuit: give one of discover(model, ...).")
    return circuit_mask(
        circuit,
        model,
        budget=config.budget,
        retain=task.retain_sets,
        forget=task.forget,
        seed=config.seed,
        damage_damping=config.damage_damping,
        retain_gradient_weight=config.retain_gradient_weight,
        frozen_layers=config.frozen_layers,
        survive=method.survive,
        by_layer=config.by_layer,
        subject_rows=config.subject_rows,
        on_step=on_step,
    )


def choose_parameters(run: RunContext, circuit: Circuit | None) -> Mask:
    """``mask.safetensors``, made or read."""
    config, file = run.config, run.out / MASK
    if run.missing(file):

        def on_step(done: int, total: int) -> None:
            run.note("choosing parameters", done, total)

        on_step(0, 0)
        torch.manual_seed(config.seed)
        less = "Take a smaller model or a larger machine."
        if not config.by_layer:
            less = "Run it again in the same folder with --by-layer: the mask is the same."
        with enough_memory("choosing parameters", less):
            made = make_mask(config, run.model, run.unlearned, circuit, on_step)
        if run.writes:
            with run.folder.file(MASK) as place:
                replace(made, meta={**made.meta, "provenance": run.provenance}).save(place)
        run.wait()
    mask = Mask.load(file)
    mask.check_fits(run.model)
    run.clock.lap("mask")
    return mask


def train(run: RunContext, mask: Mask | None) -> LanguageModel:
    """The checkpoint in ``model/``, made or read; everything is measured on it as saved."""
    config = run.config
    folder, checkpoint = run.out / MODEL, run.out / "unlearning.safetensors"

    def on_step(done: int, total: int, record: StepRecord) -> None:
        after = (name for key, name in FINISH.items() if getattr(record, key) is not None)
        run.note(next(after, "unlearning"), done, total)

    if run.missing(folder) or run.missing(run.out / HISTORY):
        torch.manual_seed(config.seed)
        with enough_memory(
            "unlearning",
            f"A smaller --unlearn.batch-size (now {config.unlearn.batch_size}) takes less, and "
            "another --out with it, for it changes the result.",
        ):
            result = unlearn(
                run.model,
                run.unlearned,
                mask,
                config.unlearn,
                seed=config.seed,
                on_step=on_step,
                on_prepare=run.note,
                resume=checkpoint,
            )
        if run.writes:
            run.folder.write_json(HISTORY, [step.to_json() for step in result.history])
            with run.folder.folder(MODEL) as made:
                save_edited(result.model, run.model, made)
        run.wait()
    checkpoint.unlink(missing_ok=True)
    return load_model(folder, run.model.device, run.model.dtype)


def record(run: RunContext, mask: Mask | None, model: LanguageModel) -> None:
    """Write ``ledger.safetensors``, or check that it is of this checkpoint.

    Raises:
        ArtifactError: it is of another.
    """
    file = run.out / LEDGER
    run.note("recording every edit", 0, 0)
    if run.missing(file):
        if run.writes:
            ledger = Ledger.of(run.model, model, run.config.unlearn.promised or (QUANTIZER,), mask)
            with run.folder.file(LEDGER) as made:
                replace(ledger, meta={**ledger.meta, "provenance": run.provenance}).save(made)
        run.wait()
    if Ledger.load(file).meta.get("edited_sha256") != model.sha256:
        raise ArtifactError(
            f"{run.out / MODEL} is not the model that {file} records. Delete both to unlearn again."
        )
