"""The commands for what is deployed: export and evaluate."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..utils.libraries import check_gguf, quiet
from ..utils.records import to_json
from ..utils.shipped import ENGINES, LOADED, quantizer_names
from ..utils.words import number_of
from .checkpoints import checkpoint_of, task_of, task_of_run
from .console import Output, keeps_nothing, say, say_json, warn
from .progress import duration, stages
from .settings import EvaluateConfig, ExportConfig

if TYPE_CHECKING:
    from ..evaluation.leaks.found import LeakShare, LeakTest
    from ..evaluation.packed import BesideEngine
    from ..evaluation.scores import Score, Scores
    from ..evaluation.versions import ModelVersion
    from ..models.language_model import LanguageModel
    from ..tasks.task import Task
    from .progress import Progress


@keeps_nothing
def do_export(config: ExportConfig, output: Output) -> int:
    """Write a GGUF file."""
    check_gguf(config.type)
    with stages("writing the file", output.quiet):
        from ..export.deployed import card_formats
        from ..export.gguf import check_export, export_gguf
        from ..export.ledger import Ledger, made_for, unpromised
        from ..models.load import load_model
        from ..utils.files import check_free

        check_free(config.out)
        place = checkpoint_of(config.model)
        model = load_model(place)
        check_export(model)
        lost, careful, ledger = None, False, Path(place).parent / "ledger.safetensors"
        if config.type != "f16" and isinstance(place, Path) and ledger.exists():
            lost = unpromised(model, Ledger.load(ledger), config.type)
            careful = lost is not None
        elif config.type != "f16" and (survive := card_formats(model.folder)) is not None:
            careful = not made_for(model, survive, config.type)
        export_gguf(model, config.out, config.type, new=True)
    say(f"{config.out.stat().st_size / 1e6:.1f} MB: {config.out}")
    if careful:
        measure = ["mansu", "evaluate", str(config.out), "--engine", "llama.cpp"]
        measure += ["--checkpoint", str(place)]
        measure += [] if task_of_run(str(place)) else ["--task", "TASK"]
        kept = f"; {lost.survived:,} of its {lost.edited:,} weights do" if lost else ""
        promise = (
            f", or unlearn with --unlearn.survive {config.type}"
            if config.type in ENGINES["llama.cpp"].exact
            else "; nothing can be promised of a format that fits its scales"
        )
        warn(
            f"Careful: this edit was not made to survive {config.type}{kept}. What was forgotten "
            f"may come back in this file. Measure it ({shlex.join(measure)}){promise}."
        )
    return 0


def _loadable(names: Sequence[str]) -> list[str]:
    """The formats to load in transformers: of engines those that it loads on this machine, and a
    warning names the others."""
    if not names:
        return []
    from ..quantizers.registry import get_quantizer

    found: list[str] = []
    out: dict[str, list[str]] = {}
    for name in quantizer_names(names):
        why = "" if name in LOADED else "transformers does not load it on every processor"
        if not why and name not in names:
            try:
                get_quantizer(name).check_installed()
            except ConfigError as error:
                why = str(error).rstrip(".")
        if why:
            out.setdefault(why, []).append(name)
        else:
            found.append(name)
    for why, some in out.items():
        warn(f"Left out: {', '.join(some)} ({why}).")
    if not found:
        raise ConfigError(f"None of {', '.join(names)} can be loaded here; see what was left out.")
    return found


@keeps_nothing
def do_evaluate(config: EvaluateConfig, output: Output) -> int:
    """Ask a task of a checkpoint, or of a GGUF file in llama.cpp."""
    with stages("loading model and task", output.quiet) as progress:
        quantizers = _loadable(config.quantizers)
        from ..evaluation.engine import EngineModel, check_file
        from ..evaluation.scores import evaluate
        from ..evaluation.versions import ModelVersion
        from ..models.load import load_model, use_threads
        from ..tasks.load import load_task

        inside = config.engine == "transformers"
        if not inside:
            check_file(Path(config.model))
        model = load_model(
            checkpoint_of(config.model if inside else config.checkpoint), config.device
        )
        use_threads(model)
        named = config.model if inside else config.checkpoint
        task = load_task(task_of(config.task, named), model)
        plain = ModelVersion("transformers")
        models = {plain: model}
        if not inside:
            engine = EngineModel.open(Path(config.model), model)
            engine.check_tokenizer(task, config.split)
            if not engine.made_from:
                warn(
                    f"Careful: nothing in {config.model} tells whether it was made from "
                    f"{config.checkpoint}; files that mansu export writes say so."
                )
            models[ModelVersion(config.engine)] = engine
        besides = []
        for name in quantizers:
            from ..evaluation.packed import beside_engine

            beside, simulated, loaded = beside_engine(model, name, task, config.split, progress)
            besides.append(beside)
            models[ModelVersion("simulated", name)] = simulated
            models[ModelVersion("transformers", name)] = loaded
        if config.leaks:
            told = not (output.quiet or output.json)
            leaks = _leaks(config, models[[*models][-1]], task, progress, told)
        else:
            with quiet():  # bitsandbytes tells every layer's dtypes
                scores = evaluate(models, task, config.split, progress)
    found = {"model": config.model, "engine": config.engine, "task": task.name}
    if config.leaks:
        if output.json:
            say_json({**found, "original": config.original, "leaks": to_json(leaks)})
        else:
            say("\n".join([*leak_lines(leaks), *_example_lines(leaks, config.show)]))
        return 0
    if besides:
        _say_besides(besides, scores, found, output)
        return 0
    if output.json:
        flips = scores.flips(plain, [*models][-1], "choice")
        rows = [asdict(row) for row in scores.rows]
        say_json({**found, "rows": rows, "flips": None if inside or not flips else asdict(flips)})
        return 0
    say("\n".join(score_lines(scores, list(models))))
    return 0


def _say_besides(
    besides: list[BesideEngine], scores: Scores, found: dict[str, Any], output: Output
) -> None:
    """Of every quantizer how transformers answers, and how far the simulated one is from it."""
    from ..evaluation.versions import ModelVersion

    plain, told, lines = ModelVersion("transformers"), [], []
    for beside in besides:
        versions = [plain, *(v for v in scores.rows[0].models if v.quantizer == beside.quantizer)]
        flips = scores.flips(plain, versions[-1], "choice")
        told.append({**asdict(beside), "flips": asdict(flips) if flips else None})
        lines += [*score_lines(scores, versions), str(beside), ""]
    if output.json:
        say_json({**found, "rows": [asdict(row) for row in scores.rows], "quantizers": told})
    else:
        say("\n".join(lines[:-1]))


def _leaks(
    config: EvaluateConfig, model: LanguageModel, task: Task, progress: Progress, told: bool
) -> LeakTest:
    """The leak test of a model, against the original's answers if one is named.

    Arguments:
        config: what is asked.
        model: the model.
        task: what it was to forget.
        progress: shows how far it is.
        told: whether what it costs is said first.
    """
    from ..evaluation.leaks.answers import ask_cost
    from ..evaluation.leaks.asking import questions
    from ..evaluation.leaks.scoring import leak_test
    from ..models.load import load_model

    how: dict[str, Any] = {n: getattr(config, n) for n in ("part", "templates", "prompts", "seed")}
    original = load_model(checkpoint_of(config.original), model.device) if config.original else None
    if told:
        asked = questions(model, task, **how).items
        progress("timing a batch", 0, 0)
        cost, models = ask_cost(model, asked), 1 + (original is not None)
        kinds = number_of(len({q.name for q in asked}), "kind")
        say(
            f"cost     {number_of(cost.prompts, 'prompt')} of {kinds} to "
            f"{number_of(models, 'model')}, at most {models * cost.passes:,} passes, about "
            f"{duration(models * cost.seconds)}",
            flush=True,
        )
    return leak_test(model, task, original=original, on_step=progress, **how)


def _example_lines(found: LeakTest, n: int) -> list[str]:
    """Prompts and answers in plain text, n of each kind at fault."""
    out: list[str] = []
    for t in found.examples(n):
        kind, prompt, answer, old, new = t.cells
        out += ["", f"{kind}: {prompt}", f"  answer    {answer}", f"  original  {old}"]
        out += [f"  model     {new}"] if t.model else []
    return out


def leak_lines(found: LeakTest) -> list[str]:
    """A table in plain text: of every kind the share of all prompts, and of those that are tested,
    that the model gives away; then the verdict, and what was left out. Without an original, the
    shares of all prompts."""
    from ..evaluation.leaks.templates import SCOPES

    width = max(len(r.name) for r in found.rows) + 2
    head = ("prompts", "first of all", "of tested", "written of all", "of tested",
            "last of tested", "")  # fmt: skip
    columns = (9, 14, 26, 16, 26, 16, 11)
    cells = "".join(f"{h:>{w}}" for h, w in zip(head, columns, strict=True))
    out, scope = [f"{'':{width}}{cells}".rstrip()], ""
    for row in sorted(found.rows, key=lambda r: SCOPES.index(r.scope)):
        out += [row.scope] if row.scope != scope else []
        scope = row.scope
        values = (f"{row.n}", *_way(row.first), *_way(row.written), _share(row.last), row.verdict)
        cells = "".join(f"{v:>{w}}" for v, w in zip(values, columns, strict=True))
        out.append(f"  {row.name:{width - 2}}{cells}".rstrip())
    out += ["", found.sentence]
    out += [f"left out: {reason}: {n}" for reason, n in found.left_out.items()]
    return out


def _share(share: LeakShare | None) -> str:
    return "-" if share is None or share.of_tested is None else f"{share.of_tested:.2f}"


def _way(share: LeakShare | None) -> tuple[str, str]:
    """The model's share of all prompts, and of those that are tested with its interval and their
    number."""
    if share is None:
        return "-", "-"
    if share.model is None:
        return f"{share.original:.2f}", "-"
    tested = "-" if share.low is None else f"{_share(share)} ({share.low:.2f} to {share.high:.2f})"
    return f"{share.model:.2f}", f"{tested} of {share.tested}"


def score_lines(scores: Scores, models: list[ModelVersion]) -> list[str]:
    """A table in plain text: how often the answer of every set ranks first of four, and last, and
    top-1; and of the last model how its forget answers differ from the first one's."""
    width = max(28, *(len(f"{r.role}: {r.label}") for r in scores.rows))
    column = max(23, *(len(str(v)) + 2 for v in models))
    head = "".join(f"{v!s:>{column}}" for v in models)
    out = [f"{'first of four / last / top-1':{width}}{'prompts':>9}{head}"]
    for row in scores.rows:
        cells = "".join(f"{_scored(row[v]):>{column}}" for v in models)
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


def _scored(score: Score) -> str:
    last = "-" if score.last is None else f"{score.last:.3f}"
    return f"{score.choice:.3f} / {last} / {score.top1:.3f}"
