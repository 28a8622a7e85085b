"""The main job, end to end: discover -> mask -> unlearn -> quantize -> compare -> report.

Each stage leaves its artefact in the output folder; a run that was interrupted continues after
its last whole artefact when started again with the same settings.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..audit.cad import judge_erasure
from ..audit.config import RelearnConfig
from ..audit.relearning import Relearning, relearn, scored_halves
from ..circuits.attribution import Attribution
from ..circuits.circuit import Circuit
from ..circuits.compare import REFERENCE, compare
from ..circuits.discover import discover
from ..errors import ArtifactError, ConfigError, TaskError
from ..evaluation.properties import properties, verdict
from ..evaluation.scores import EDITED, ORIGINAL, QUANTIZER, Flips, Scores, evaluate
from ..export.ledger import Ledger, changed_elements
from ..masks.floor import quantizer_set
from ..masks.mask import Mask
from ..masks.select import circuit_mask, random_mask
from ..models.language_model import LanguageModel
from ..models.layout import check_layout
from ..models.load import load_model
from ..models.provenance import provenance
from ..quantizers.base import Quantizer
from ..quantizers.registry import get_quantizer
from ..quantizers.survival import quantize, survival
from ..report.__init__ import write_report
from ..report.card import model_card
from ..tasks.files import ROBUST
from ..tasks.load import load_task, reference_model
from ..tasks.task import Task
from ..unlearning.methods import Mansu, MansuRandomMask, MansuWholeModel
from ..unlearning.unlearn import unlearn
from ..utils.distributed import first_says, rank
from ..utils.files import atomic_folder, locked, read_json, write_json, write_text
from ..utils.memory import enough_memory
from ..viz.svg import circuit_svg
from ..viz.view import erasure_view
from .config import RunConfig
from .defaults import default_config, default_task
from .folder import Clock, begin, check_folder, config_json, result_affecting
from .plan import CAD_PAIRS, Plan, plan

OnProgress = Callable[[str, int, int], None]
SAMPLES = 8
FINISH = {
    "quantization_margin_reached": "reaching the quantization margin",
    "above_target": "reaching the final margin",
}
"""Stages of unlearning after its steps, by what their records hold, the last one first."""
MARGINS = (*FINISH, "final_margin_edits", "quantization_margin_edits")
"""What the last step's record may hold of margin edits."""
PLACE = ("out", "threads", "device")
"""Settings of a run that say where and how fast, not what."""
GRAPH_LIMIT = 1500
"""Edges that the report's graph holds; all else in report.json is a few kilobytes."""


def command_line(config: RunConfig) -> str:
    """The shortest command that makes this run: every setting that is not the task's default, or
    not one of its settings against relearning."""
    method = config.unlearn.method
    usual = default_config(config.model, config.task, method=method)
    try:
        robust = default_config(config.model, config.task, robust=True, method=method)
    except (ConfigError, TaskError):
        robust = usual
    plain, short = _options(config, usual), [f"--{ROBUST}", *_options(config, robust)]
    chosen = [] if method == RunConfig().unlearn.method else ["--method", method]
    return shlex.join(["mansu", "run", *chosen, *(short if len(short) < len(plain) else plain)])


def _options(config: RunConfig, usual: RunConfig) -> list[str]:
    """The options that lead from some settings to others."""
    words: list[str] = []

    def add(prefix: str, given: Any, usual: Any) -> None:
        for item in fields(given):
            value, default = getattr(given, item.name), getattr(usual, item.name)
            name = f"{prefix}{item.name}".replace("_", "-")
            if is_dataclass(value):
                add(f"{prefix}{item.name}.", value, default)
            elif (value != default or item.name == "model") and item.name not in PLACE:
                if isinstance(value, bool):
                    no = "" if value else "no-"
                    words.append(f"--{prefix}{no}{item.name}".replace("_", "-"))
                else:
                    values = value if isinstance(value, tuple) else (value,)
                    words.extend([f"--{name}", *map(str, values)])

    add("", config, replace(usual, task=None))
    return words


@dataclass
class RunResult:
    """What a run leaves in memory."""

    report: dict[str, Any]
    circuit: Circuit
    mask: Mask | None
    """None: the method needs none."""
    model: LanguageModel
    folder: Path
    seconds: dict[str, float]
    """Per stage."""


def _samples(task: Task, models: dict[str, LanguageModel]) -> list[dict[str, str]]:
    """What the models say on a few forget and retain prompts, those first that the original
    answers."""
    out = []
    for role in ("forget", "retain"):
        sets = list(task.scored["unseen"][role].values())
        tried = [p for k in range(SAMPLES) for s in sets for p in s[k * 7 : k * 7 + 1]]
        answered, others = [], []
        for pair in tried[: 3 * SAMPLES]:
            original = models["original"].generate(pair.prompt)
            right = original.strip().startswith(pair.answer_text)
            (answered if right else others).append((pair, original))
            if len(answered) == SAMPLES // 2:
                break
        for pair, original in (answered + others)[: SAMPLES // 2]:
            said = {n: m.generate(pair.prompt) for n, m in models.items() if n != "original"}
            known = {"prompt": pair.prompt, "answer": pair.answer_text, "original": original}
            out.append({**known, **said})
    return out


def quantizer_row(
    model: LanguageModel,
    edited: LanguageModel,
    quantizer: Quantizer,
    task: Task,
    promised: bool,
    scores: Scores,
) -> dict[str, Any]:
    """What one quantizer makes of a run's edit: survival, and forget accuracy on unseen phrasings.

    ``gap`` is the change of an accuracy from the edited model to the same after the quantizer,
    ``flips`` the prompts behind it (`Flips`). ``scores`` holds the unlearned model, and may hold
    both quantized ones.
    """
    before, after = (f"{m} {quantizer.name}" for m in (ORIGINAL, EDITED))
    found = scores
    if after not in scores.first:
        models = {
            name: quantize(m, quantizer, task.calibration)
            for name, m in ((before, model), (after, edited))
        }
        found = evaluate(models, task, role="forget")
    out: dict[str, Any] = {"name": quantizer.name, "promised": promised}
    out |= asdict(survival(model, edited, quantizer, task.calibration))
    for key in ("choice", "top1"):
        old, new = (found.mean("forget", key, m) for m in (before, after))
        gap = new - scores.mean("forget", key, EDITED)
        out[key] = {ORIGINAL: old, EDITED: new, "gap": gap}
    out["flips"] = asdict(Flips.between(scores.first[EDITED], found.first[after]))
    return out


def relearning_marks(steps: int) -> tuple[int, ...]:
    """Where a run's attack is measured: after a quarter of its steps, and after all."""
    return tuple(dict.fromkeys((max(1, steps // 4), steps)))


def make_mask(
    config: RunConfig, model: LanguageModel, task: Task, circuit: Circuit | None = None
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
    )


def run(
    config: RunConfig,
    on_progress: OnProgress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> RunResult:
    """Run the whole job and write every artefact; go on with one that was killed.

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
    if config.threads:
        torch.set_num_threads(config.threads)
    check_folder(config)
    if isinstance(config.unlearn, Mansu):
        quantizer_set(config.unlearn.survive)
    for name in config.quantizers:
        get_quantizer(name)
    model = load_model(config.model, config.device)
    arch = model.architecture
    check_layout(model.hf, model.linear_names, arch.n_heads, arch.n_kv_heads)
    task = load_task(config.task or default_task(config.model), model, config.score_pairs)
    if config.relearn_steps:
        scored_halves(task, config.seed)
    made_from = provenance(model, config.seed, result_affecting(config_json(config)), task.sha256)
    writes = rank() == 0
    with locked(config.out) if writes else contextlib.nullcontext():
        if writes:
            begin(config, made_from)
        clock = Clock(config.out / "seconds.json")
        if on_plan:
            on_plan(plan(config, model, task))
        clock.lap("load")
        circuit, mask, edited = _edit(config, model, task, made_from, note, clock)
        with enough_memory("measuring the result", "Free memory and run the same command again."):
            report = _measure(config, model, task, made_from, circuit, mask, edited, note, clock)
        if writes:
            write_text(config.out / "model" / "README.md", model_card(report))
            write_report(config.out, report, circuit_svg(circuit))
    return RunResult(report, circuit, mask, edited, config.out, clock.seconds)


def _edit(
    config: RunConfig,
    model: LanguageModel,
    task: Task,
    made_from: dict[str, Any],
    note: OnProgress,
    clock: Clock,
) -> tuple[Circuit, Mask | None, LanguageModel]:
    """Circuit, mask and edited model, each as read back from its file: what was made in this go
    and what was found there are then the same. The first process writes; the others wait."""
    out, writes = config.out, rank() == 0

    def missing(file: Path) -> bool:
        return first_says(not file.exists())

    file = out / "circuit.json"
    if missing(file):
        torch.manual_seed(config.seed)
        with enough_memory(
            "discovering the circuit",
            "Run it again in the same folder with a smaller --circuit.batch-size (now "
            f"{config.circuit.batch_size}) or a --circuit.memory-gb.",
        ):
            found = discover(
                model, task.forget, config.circuit, task.retain, note, seed=config.seed
            )
        found = replace(found, meta={**found.meta, "provenance": made_from})
        if writes:
            found.save_graphml(out / "circuit.graphml")
            found.save(file)
        first_says(True)
    pairs = task.forget.sample(config.circuit.pairs, config.seed)
    circuit = replace(Circuit.load(file), pairs=pairs)
    circuit.check_fits(model)
    clock.lap("discover")

    file = out / "mask.safetensors"
    needs_mask = "mask" in config.unlearn.needs
    if needs_mask and missing(file):
        note("choosing parameters", 0, 1)
        torch.manual_seed(config.seed)
        less = "Take a smaller model or a larger machine."
        if not config.by_layer:
            less = "Run it again in the same folder with --by-layer: the mask is the same."
        with enough_memory("choosing parameters", less):
            made = make_mask(config, model, task, circuit)
        if writes:
            replace(made, meta={**made.meta, "provenance": made_from}).save(file)
        first_says(True)
        note("choosing parameters", 1, 1)
    mask = Mask.load(file) if needs_mask else None
    if mask:
        mask.check_fits(model)
    clock.lap("mask")

    folder, place = out / "model", out / "unlearning.safetensors"
    if missing(folder):
        torch.manual_seed(config.seed)
        with enough_memory(
            "unlearning",
            f"A smaller --unlearn.batch-size (now {config.unlearn.batch_size}) takes less, and "
            "another --out with it, for it changes the result.",
        ):
            result = unlearn(
                model,
                task,
                mask,
                config.unlearn,
                seed=config.seed,
                on_step=lambda done, total, record: note(
                    next(
                        (s for key, s in FINISH.items() if getattr(record, key) is not None),
                        "unlearning",
                    ),
                    done,
                    total,
                ),
                resume=place,
            )
        if writes:
            write_json(out / "history.json", [record.to_json() for record in result.history])
            with atomic_folder(folder) as partial:
                result.model.save(partial)
        first_says(True)
    place.unlink(missing_ok=True)
    edited = load_model(folder, model.device)  # everything is measured on the checkpoint as saved
    file = out / "ledger.safetensors"
    if missing(file):
        if writes:
            ledger = Ledger.of(model, edited, config.unlearn.promised or (QUANTIZER,), mask)
            replace(ledger, meta={**ledger.meta, "provenance": made_from}).save(file)
        first_says(True)
    if Ledger.load(file).meta.get("edited_sha256") != edited.sha256:
        raise ArtifactError(
            f"{folder} is not the model that {file} records. Delete both to unlearn again."
        )
    clock.lap("unlearn")
    return circuit, mask, edited


def _measure(
    config: RunConfig,
    model: LanguageModel,
    task: Task,
    made_from: dict[str, Any],
    circuit: Circuit,
    mask: Mask | None,
    edited: LanguageModel,
    note: OnProgress,
    clock: Clock,
) -> dict[str, Any]:
    """The report of an edited model."""
    last = read_json(config.out / "history.json")[-1]
    torch.manual_seed(config.seed)
    deployed = list(dict.fromkeys((QUANTIZER, *config.unlearn.promised)))
    measured = [get_quantizer(q) for q in dict.fromkeys((*deployed, *config.quantizers))]
    models = {
        ORIGINAL: model,
        f"{ORIGINAL} {QUANTIZER}": quantize(model, QUANTIZER),
        EDITED: edited,
        f"{EDITED} {QUANTIZER}": quantize(edited, QUANTIZER),
    }
    scores = evaluate(models, task, on_step=note)
    for name in deployed[1:]:  # two at a time: they need not fit into memory together
        reference_models = {f"{m} {name}": quantize(models[m], name) for m in (ORIGINAL, EDITED)}
        scores = scores.beside(evaluate(reference_models, task, on_step=note))
    lives = [
        quantizer_row(model, edited, q, task, q.name in config.unlearn.promised, scores)
        for q in measured
    ]
    clock.lap("evaluate")

    compared = {k: models[k] for k in (EDITED, f"{EDITED} {QUANTIZER}")}
    twin = reference_model(task, model)
    graphs: dict[str, Attribution] = {}
    cad = compare(
        circuit,
        model,
        compared,
        task.held_out.sample(CAD_PAIRS, config.seed),
        config.circuit,
        lambda name, d, n: note(f"attribution of {name}", d, n),
        twin,
        graphs.__setitem__,
    )
    graph = erasure_view(
        circuit,
        graphs[ORIGINAL],
        graphs[EDITED],
        graphs[f"{EDITED} {QUANTIZER}"],
        model=model,
        mask=mask,
        limit=GRAPH_LIMIT,
    )
    clock.lap("compare")

    attacked: dict[str, Relearning] = {}
    erasure = None
    if config.relearn_steps:
        erasure = judge_erasure(
            model, edited, task, models[f"{EDITED} {QUANTIZER}"], config.seed, note
        )
        attack = RelearnConfig(steps=relearning_marks(config.relearn_steps), seed=config.seed)
        targets = {EDITED: edited, **({REFERENCE: twin} if twin else {})}
        for name, target in targets.items():
            attacked[name] = relearn(
                target,
                task,
                attack,
                on_step=lambda rate, d, n, name=name: note(f"relearning {name} at {rate:g}", d, n),
            )
        clock.lap("relearn")

    rows = properties(scores, deployed, attacked.get(EDITED))
    edits = changed_elements(model, edited)
    if mask:
        edits = {name: edits[name] for name in mask.indices}
    about = mask.meta if mask else {}
    ranked = sorted(circuit.to_networkx().edges(data=True), key=lambda e: -abs(e[2]["score"]))
    return {
        "schema": 1,
        "versions": made_from["versions"],
        "provenance": made_from,
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "parameters": model.n_parameters,
            "dtype": str(model.saved_dtype).removeprefix("torch."),
        },
        "task": {
            "name": task.name,
            "title": task.title,
            "forget_facts": len({(p.relation, p.subject) for p in task.forget}),
            "dropped": task.dropped,
        },
        "config": config_json(config),
        "command": command_line(config),
        "verdict": verdict(rows),
        "properties": rows,
        "scores": scores.rows,
        "perplexity": scores.perplexity,
        "edit": {
            "edited": sum(edits.values()),
            "embedding": edits.get(model.embedding_name, 0),
            "share": sum(edits.values()) / model.n_parameters,
            "budget": config.budget,
            "refused": about.get("refused"),
            "candidates": about.get("candidates"),
            **{k: v for k, v in last.items() if k in MARGINS},
            **{k: lives[0][k] for k in ("survived", "collateral", "update_over_bin", "projection")},
            "by_weight": [
                {"weight": n, "edited": k, "of": model.weights[n].numel()}
                for n, k in sorted(edits.items(), key=lambda item: -item[1])
                if k
            ],
        },
        "quantizers": lives,
        "circuit": {
            "edges": circuit.n_edges,
            "of": circuit.graph.n_edges,
            "faithfulness": circuit.meta["faithfulness"],
            "curve": circuit.meta["curve"],
            "top_edges": [
                {"source": u, "target": v, "score": d["score"]}
                for u, v, d in ranked[:20]
                if d["kind"] == "residual"
            ],
        },
        "cad": cad.to_json(),
        "erasure": erasure.to_json() if erasure else None,
        "relearning": {n: [[m, found.at(m)] for m in found.marks] for n, found in attacked.items()},
        "graph": graph.data,
        "samples": _samples(
            task, {k: v for k, v in models.items() if k != f"{ORIGINAL} {QUANTIZER}"}
        ),
    }
