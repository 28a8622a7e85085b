"""The commands for what is deployed: export and evaluate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.defaults import default_task
from ..utils.shipped import ENGINES
from .console import Output, say, say_json, warn
from .progress import stages
from .settings import EvaluateConfig, ExportConfig

if TYPE_CHECKING:
    from ..evaluation.scores import Scores
    from ..evaluation.versions import ModelVersion


def _checkpoint(given: str) -> str | Path:
    """The checkpoint of a run's folder, or what is given itself."""
    inside = Path(given) / "model"
    place = inside if (inside / "config.json").exists() else Path(given)
    return place if place.is_dir() else given


def do_export(config: ExportConfig, output: Output) -> int:
    """Write a GGUF file."""
    with stages("writing the file", output.quiet):
        from ..export.gguf import export_gguf
        from ..export.ledger import Ledger, unpromised
        from ..models.load import load_model
        from ..utils.files import check_free

        check_free(config.out)
        place = _checkpoint(config.model)
        model = load_model(place)
        lost, ledger = None, Path(place).parent / "ledger.safetensors"
        if config.type != "f16" and isinstance(place, Path) and ledger.exists():
            lost = unpromised(model, Ledger.load(ledger), config.type)
        export_gguf(model, config.out, config.type, new=True)
    say(f"{config.out.stat().st_size / 1e6:.1f} MB: {config.out}")
    if lost:
        measure = f"mansu evaluate {config.out} --engine llama.cpp --checkpoint {place}"
        promise = (
            f", or unlearn with --unlearn.survive {config.type}"
            if config.type in ENGINES["llama.cpp"].exact
            else "; nothing can be promised of a format that fits its scales"
        )
        warn(
            f"Careful: this edit was not made to survive {config.type}; {lost.survived:,} of its "
            f"{lost.edited:,} weights do. What was forgotten may come back in this file. Measure "
            f"it ({measure} --task TASK){promise}."
        )
    return 0


def do_evaluate(config: EvaluateConfig, output: Output) -> int:
    """Ask a task of a checkpoint, or of a GGUF file in llama.cpp."""
    with stages("loading model and task", output.quiet) as progress:
        from ..evaluation.engine import EngineModel
        from ..evaluation.scores import evaluate
        from ..evaluation.versions import ModelVersion
        from ..models.load import load_model, use_threads
        from ..tasks.load import load_task

        inside = config.engine == "transformers"
        model = load_model(_checkpoint(config.model if inside else config.checkpoint), "cpu")
        use_threads(model)
        named = config.model if inside else config.checkpoint
        task = load_task(config.task or default_task(named), model)
        plain = ModelVersion("transformers")
        models = {plain: model}
        if not inside:
            engine = EngineModel.open(Path(config.model), model)
            engine.check_tokenizer(task, config.split)
            models[ModelVersion(config.engine)] = engine
        scores = evaluate(models, task, config.split, progress)
    if output.json:
        found = {"model": config.model, "engine": config.engine, "task": task.name}
        flips = scores.flips(plain, [*models][-1], "choice")
        rows = [asdict(row) for row in scores.rows]
        say_json({**found, "rows": rows, "flips": None if inside or not flips else asdict(flips)})
        return 0
    say("\n".join(score_lines(scores, list(models))))
    return 0


def score_lines(scores: Scores, models: list[ModelVersion]) -> list[str]:
    """A table in plain text: four-way accuracy and top-1 of every set, and of the last model how
    its forget answers differ from the first one's."""
    width = max(len(f"{r.role}: {r.label}") for r in scores.rows)
    head = "".join(f"{v!s:>18}" for v in models)
    out = [f"{'four-way / top-1':{width}}{'prompts':>9}{head}"]
    for row in scores.rows:
        cells = "".join(f"{f'{row[v].choice:.3f} / {row[v].top1:.3f}':>18}" for v in models)
        out.append(f"{f'{row.role}: {row.label}':{width}}{row.n:>9}{cells}")
    for record in scores.perplexity:
        value = "-" if record.value is None else f"{record.value:.2f}"
        out.append(f"perplexity of {record.model}: {value}")
    first, last = models[0], models[-1]
    flips = scores.flips(first, last, "choice")
    if first != last and flips:
        old, new = (scores.mean("forget", "choice", v) for v in (first, last))
        out.append(f"forget, {last}: {new:.3f}, gap {new - old:+.3f}: {flips}. Chance 0.250.")
    return out
