"""The commands for questions and answers: teach and metrics."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ..errors import ConfigError
from ..evaluation.qa.config import TeachConfig
from ..utils.ranges import check_range
from ..utils.shipped import quantizer_names
from ..utils.words import number_of
from .console import Output, keeps_nothing, say, say_json, warn
from .progress import duration, stages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..evaluation.qa.answered import QAMetric
    from ..evaluation.qa.measure import Measuring, QAMetrics
    from ..evaluation.qa.rows import QARow

FORGOTTEN = {
    "ROUGE-L recall": "low", "probability": "low", "entity generation": "low",
    "exact memorization": "low", "extraction strength": "low", "truth ratio": "as reference",
    "forget quality": "high", "log10 forget quality": "high", "loss AUC": "as reference",
    "zlib AUC": "as reference", "min-k AUC": "as reference", "min-k++ AUC": "as reference",
    "PrivLeak": "near 0",
}  # fmt: skip
"""What a metric of the forget rows is where they are forgotten."""
RETAINED = "high"
"""What each metric of the other rows is where they are retained."""


@dataclass(frozen=True, kw_only=True)
class TeachRun(TeachConfig):
    """Teach a model rows of questions and answers, by fine-tuning on the answers."""

    model: str
    """Embedded model, Hugging Face folder, or hub name."""
    rows: tuple[str, ...]
    """What it is taught: .jsonl, .json, .csv, .tsv or .parquet files, folders that `datasets`
    reads, or hub names (owner/name, owner/name:configuration or owner/name:configuration:split)."""
    limit: int | None = None
    """Take the first so many rows of each of these; default: all."""
    out: Path = Path("models/taught")
    """New folder for the Hugging Face checkpoint. A killed command goes on where it was."""
    device: str = "auto"
    """Where it computes: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "limit", at_least=1)
        if not self.rows:
            raise ConfigError("rows: got none. Name a file of questions and answers.")

    def teach_config(self) -> TeachConfig:
        """How it is taught, without what and where."""
        return TeachConfig(**{f.name: getattr(self, f.name) for f in fields(TeachConfig)})


@dataclass(frozen=True)
class MetricsConfig:
    """Say every metric of unlearning of a model on questions and answers."""

    model: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Folder of a run, Hugging Face folder, embedded model, or hub name."""
    forget: str
    """Rows that were to be forgotten: .jsonl, .json, .csv, .tsv or .parquet file, folder that
    `datasets` reads, or hub name (owner/name:configuration:split)."""
    retain: str | None = None
    """Rows that were to be retained; for model utility with perturbed answers."""
    real_authors: str | None = None
    """Rows about real authors, for model utility."""
    world_facts: str | None = None
    """Rows about the world, for model utility."""
    holdout: str | None = None
    """Rows that the model was never taught, for membership attacks."""
    entities: str | None = None
    """Rows with an entity for the same questions as the forget rows, where these have none."""
    reference: str | None = None
    """A model that was never taught the forget rows, for forget quality and PrivLeak."""
    quantizers: tuple[str, ...] = ()
    """Measure again after each of these; `mansu list` names them."""
    limit: int | None = None
    """Take the first so many rows of each file; default: all."""
    new_tokens: int = 200
    """Tokens of the longest answer that is generated."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantizers", quantizer_names(self.quantizers))
        check_range(self, "limit", "new_tokens", at_least=1)


def do_teach(config: TeachRun, output: Output) -> int:
    """Teach a model."""
    with stages("loading model and rows", output.quiet) as progress:
        from ..evaluation.qa.rows import Prompts, read_qa_rows
        from ..evaluation.qa.teach import Teaching
        from ..models.load import load_model, use_threads

        rows = [r for source in config.rows for r in read_qa_rows(source, limit=config.limit)]
        model = load_model(config.model, config.device)
        use_threads(model)
        teaching = Teaching(model, rows, config.out, config.teach_config())
        if not (output.quiet or output.json or teaching.finished):
            progress("timing a step", 0, 0)
            cost = teaching.cost()
            taken = teaching.steps - cost.steps
            before = f"; {number_of(taken, 'step')} taken before" if taken else ""
            lines = [
                f"model    {model.name}: {model.n_parameters:,} parameters",
                f"rows     {number_of(len(teaching.rows), 'row')}, asked by: {Prompts(model).how}",
                *note_lines(teaching.notes),
                f"cost     {number_of(cost.steps, 'step')}, {_about(cost.seconds)} "
                f"({_short(cost.seconds / max(cost.steps, 1))} a step), {_memory(cost.memory_gb)} "
                f"and activations{before}",
                f"output   {config.out}",
            ]
            say("\n".join(lines), flush=True)
        found = teaching.run(lambda done, total: progress("steps of teaching", done, total))
    if output.json:
        say_json(found.to_json())
        return 0
    losses = " ".join(f"{loss:.3f}" for loss in found.losses)
    done = "It was finished before: " if found.before else ""
    taught = f"{done}{found.folder}, taught {number_of(found.rows, 'row')}"
    say(f"{taught}. Loss of a token by epoch: {losses}")
    if found.warning:
        warn(f"Careful: {found.warning}")
    return 0


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """What was done to how many rows, a line each."""
    return [f"note     {text}: {n}" for text, n in notes.items()]


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 1 else "less than a second"


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def _memory(gb: float) -> str:
    return f"{gb:.1f} GB" if gb >= 0.1 else f"{gb * 1e3:.1f} MB"


@keeps_nothing
def do_metrics(config: MetricsConfig, output: Output) -> int:
    """Say the metrics of a checkpoint."""
    with stages("loading model and rows", output.quiet) as progress:
        from ..evaluation.qa.checks import SETS
        from ..evaluation.qa.measure import Measuring
        from ..evaluation.qa.rows import read_qa_rows, with_entities
        from ..models.load import load_model, use_threads
        from .checkpoints import checkpoint_of

        sets: dict[str, tuple[QARow, ...]] = {}
        for name in SETS:
            source = getattr(config, name)
            if source is not None:
                sets[name] = read_qa_rows(source, limit=config.limit)
        if config.entities is not None:
            sets["forget"] = with_entities(sets["forget"], read_qa_rows(config.entities))
        model = load_model(checkpoint_of(config.model), config.device)
        use_threads(model)
        reference = None
        if config.reference is not None:
            reference = load_model(checkpoint_of(config.reference), model.device)
        progress("checking the rows", 0, 0)
        measuring = Measuring(
            model,
            sets,
            reference=reference,
            quantizers=config.quantizers,
            new_tokens=config.new_tokens,
        )
        if not (output.quiet or output.json):
            progress("timing a batch", 0, 0)
            say("\n".join(cost_lines(measuring)) + "\n", flush=True)
        found = measuring.run(progress)
    if output.json:
        say_json(found.to_json())
    else:
        say("\n".join(metric_lines(found)))
    return 0


def cost_lines(measuring: Measuring) -> list[str]:
    """What is measured, of how many rows, and what it takes."""
    cost, sets = measuring.cost(), measuring.sets.items()
    rows = ", ".join(f"{len(some):,} {name.replace('_', ' ')}" for name, some in sets)
    more = len(measuring.versions) - 1
    after = f", in full precision and after {number_of(more, 'quantizer')}" if more else ""
    return [
        f"rows     {rows}",
        *note_lines(measuring.notes),
        f"cost     {number_of(cost.scored, 'answer')} scored, {cost.written:,} generated{after}: "
        f"{_about(cost.seconds)} at most{', and quantizing' if more else ''}; nothing is kept of "
        "an interrupted command",
    ]


def _with_numbers(found: QAMetrics) -> list[str]:
    """The sets of which there is a number in any version."""
    every: Sequence[QAMetric] = [m for some in found.versions.values() for m in some]
    some = {m.rows for m in every if m.value is not None}
    return [name for name in dict.fromkeys(m.rows for m in every) if name in some]


def _number(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    if name == "forget quality":
        return f"{value:.2g}"
    return f"{value:+.1f}" if name in ("PrivLeak", "log10 forget quality") else f"{value:.4f}"


def metric_lines(found: QAMetrics) -> list[str]:
    """A table in plain text: a row a metric, a column full precision and each quantizer, and what
    the metric is where the forget rows are forgotten; sets without a number are left out; below it
    what was not computed, and why."""
    first = next(iter(found.versions.values()))
    beside = f"; reference {found.reference}" if found.reference else ""
    out = [f"{found.model}{beside}. Asked by: {found.asked}."]
    for of in _with_numbers(found):
        good = "forgotten" if of == "forget" else "retained"
        heads = "".join(f"{version:>16}" for version in found.versions)
        out += ["", f"{of.replace('_', ' '):24}{'rows':>6}{heads}   {good} when"]
        for k, metric in enumerate(first):
            if metric.rows != of:
                continue
            cells = "".join(
                f"{_number(by[k].value, metric.name):>16}" for by in found.versions.values()
            )
            when = FORGOTTEN[metric.name] if of == "forget" else RETAINED
            out.append(f"{metric.name:24}{metric.n or '-':>6}{cells}   {when}")
    lacking: dict[str, list[str]] = {}
    for m in (m for found_in in found.versions.values() for m in found_in if m.value is None):
        named = m.name if m.rows in ("forget", "utility") else f"{m.name} of {m.rows}"
        lacking.setdefault(m.reason, []).append(named.replace("_", " "))
    told = [f"  {', '.join(dict.fromkeys(names))}: {why}" for why, names in lacking.items()]
    return [*out, *(["", "Not computed:", *told] if told else [])]
