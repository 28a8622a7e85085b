"""A summary for the terminal, laid out by rich, and what to do next.

Texts reach rich as `Text`, never as markup, and without control characters, so that no prompt or
model name can style or steer the terminal.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import printable
from ..evaluation.scores import ScoreRow
from ..evaluation.versions import EDITED, ORIGINAL, QUANTIZER, ModelVersion
from ..quantizers.registry import QUANTIZERS, THROUGH
from ..utils.files import Json, unused
from ..utils.libraries import gguf_lacks
from ..utils.words import number_of, shortened
from .records import QuantizerRow, Report, kept_promise, precision_name, worst_format
from .story import ROLES, gone, heading
from .values import DASH, count, measured, percent, status_of

MIN_WIDTH = 20
ROOMY = 60
"""Columns from which on the target of a property is shown."""
LABEL = 24
"""Columns of the words before a command."""
SENTENCE = 300
"""Letters of the verdict's sentence; the page has the rest of a longer one."""
STYLES = {"pass": "bold green", "fail": "bold red", "undecided": "bold yellow"}
_ONE_LINE = {"no_wrap": True, "overflow": "ellipsis"}


@dataclass(frozen=True)
class Place:
    """Where a report lies, and what can be done there: the next steps are made of it."""

    folder: Path
    """Of the run."""
    mansu: str = "mansu"
    """The words, quoted for a shell, that start this program."""
    opener: str = ""
    """And the one that opens a page; empty where there is none."""
    robust: bool = False
    """Whether the task's file has settings against relearning."""
    gguf: bool = False
    """Whether the edited model can be written as GGUF."""


@dataclass(frozen=True)
class Step:
    """Something to do next."""

    words: str
    command: str
    """One line for a shell."""
    reason: str = ""
    """Why: of steps that mend a property."""


def console_summary(
    report: Report, width: int, color: bool = False, place: Place | None = None
) -> str:
    """The verdict, the four properties, mean scores and the edit in about ten lines; what is next.

    Arguments:
        report: what a run found.
        width: no line is wider, in columns (at least 20), but those of commands, which stay whole
            so that they can be pasted.
        color: with the codes that a terminal takes for colours; without them, nothing but
            printable text.
        place: where the report lies; None: nothing is said of what to do next.
    """
    console = Console(
        file=io.StringIO(),
        width=max(width, MIN_WIDTH),
        force_terminal=color,
        color_system="standard" if color else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    top = heading(report)
    title = _text(f"{top.title} ({report.model.name})")
    console.print(Text.assemble((top.status.upper(), STYLES[top.status]), "  ", title), **_ONE_LINE)
    console.print(_text(shortened(report.verdict.sentence, SENTENCE)))
    console.print(_properties(report, console.width))
    if report.scores:
        console.print(_means(report))
    console.print(_text(_edit(report)))
    if report.cad:
        console.print(_text(shortened(gone(report.cad), SENTENCE)))
    if report.leaks:
        console.print(_text(f"Leaks: {report.leaks[0].sentence}"))
    if place:
        console.print("\nNext:")
        for step in next_steps(report, place):
            _print_step(console, step)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _text(text: str, style: str = "") -> Text:
    """Text of anybody's: on one line, without control characters, never markup."""
    return Text(re.sub(r"\s", " ", printable(text)), style)


def _properties(report: Report, width: int) -> Text:
    """A line a property; the sentence above has the reason of one that is not met. Names give way
    where there is little room, and targets where there is less."""
    rows = report.properties
    words = [status_of(item.passed)[0].upper() for item in rows]
    ends = [f"  {measured(item.value):>6}" for item in rows]
    if width >= ROOMY:
        ends = [f"{e}  at most {measured(p.target)}" for e, p in zip(ends, rows, strict=True)]
    first = max(map(len, words), default=0) + 2
    names = [_text(item.name) for item in rows]
    room = width - first - max(map(len, ends), default=0)
    room = min(room, max(map(len, names), default=0))
    lines = []
    for word, name, end in zip(words, names, ends, strict=True):
        name.truncate(room, overflow="ellipsis", pad=True)
        lines.append(Text.assemble((word.ljust(first), STYLES[word.lower()]), name, end))
    return Text("\n").join(lines)


def _means(report: Report) -> RenderableType:
    """A row a precision: four-way accuracy over all the facts of a role, before → after, and how
    often a forget answer ranks last."""
    roles = [r for r in ROLES if any(e.role == r for e in report.scores)]
    versions = dict.fromkeys(v for e in report.scores for v in e.models)
    table = Table("right among four", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for role in roles:
        table.add_column(role, justify="right", overflow="fold")
    last = any(s.last is not None for e in report.scores if e.role == "forget" for s in e.scores)
    if last:
        table.add_column("forget, last", justify="right", overflow="fold")
    for quantizer in dict.fromkeys(v.quantizer for v in versions):
        cells = []
        for role in roles:
            rows = [e for e in report.scores if e.role == role]
            ends = (_mean(rows, v.after(quantizer)) for v in (ORIGINAL, EDITED))
            cells.append(" → ".join(ends))
        if last:
            rows = [e for e in report.scores if e.role == "forget"]
            ends = (_mean(rows, v.after(quantizer), last=True) for v in (ORIGINAL, EDITED))
            cells.append(" → ".join(ends))
        table.add_row(_text(f"  {precision_name(report, quantizer)}"), *map(Text, cells))
    return table


def _mean(rows: list[ScoreRow], version: ModelVersion, last: bool = False) -> str:
    """Of ranked first, or last, over the prompts of all sets that a model was scored on."""
    found = [(r.n, r[version]) for r in rows if version in r.models]
    scored = [(n, v) for n, s in found if (v := s.last if last else s.choice) is not None]
    total = sum(n for n, _ in scored)
    return percent(sum(n * v for n, v in scored) / total, 0) if total else DASH


def _edit(report: Report) -> str:
    """How much was edited, and how much of it survives what was promised."""
    edit = report.edit
    line = f"Edited: {number_of(edit.edited, 'parameter')} ({percent(edit.share, 2)})"
    if report.quantizers and edit.edited > edit.embedding:
        line += f", {_survives(report.quantizers)}"
    if edit.embedding:
        line += f"; {count(edit.embedding)} are in the embedding, which is not quantized"
    return f"{line}."


def _survives(rows: Sequence[QuantizerRow]) -> str:
    """How many edits survive all the formats that were promised, or the worst of them; without a
    promise, the first format."""
    promised = [row for row in rows if row.promised]
    worst = worst_format(rows)
    found = worst.survival
    if promised and all(map(kept_promise, promised)):
        least, most = (f(row.survival.edited for row in promised) for f in (min, max))
        every = f"all {count(most)}" if least == most else f"{count(least)} to {count(most)}"
        which = f"all {len(promised)} formats that were promised" if promised[1:] else worst.name
        return f"{every} that are quantized survive {which}"
    said = f"{count(found.survived)} of {count(found.edited)} survive {worst.name}"
    if not promised:
        return f"{said}, of which nothing was promised"
    if found.collateral:
        said += f", where {number_of(found.collateral, 'other code')} changed"
    return said + (
        f", the worst of {len(promised)} formats that were promised" * bool(promised[1:])
    )


def _print_step(console: Console, step: Step) -> None:
    """The reason, then words and command, on one line where they fit."""
    if step.reason:
        console.print(_text(step.reason, "dim"))
    command = _text(step.command)
    words = _text(f"  {step.words}:".ljust(LABEL))
    if len(words) + len(command) <= console.width:
        console.print(words + command, soft_wrap=True)
        return
    words.rstrip()
    console.print(words)
    console.print(Text("    ") + command, soft_wrap=True)


def next_steps(report: Report, place: Place) -> list[Step]:
    """What to do with a run: first what mends each property that is not met, then look, attack,
    deploy.

    Arguments:
        report: of the run, of anybody's: its words are quoted for a shell.
        place: where it lies.
    """
    mansu, folder = place.mansu, shlex.quote(str(place.folder))
    attack = f"{mansu} relearn {folder}"
    steps = _mending(report, place)
    if report.properties[-1:] and report.properties[-1].passed is None and not report.relearning:
        reason = "Erasure was not tested; this relearns half of the facts and asks for the rest:"
        steps.append(Step("attack it", f"{attack} --quick", reason))
        attack = ""
    page = f"{place.folder}/report.html"
    opened = f"{place.opener} {shlex.quote(page)}" if place.opener else page
    steps.append(Step("look at the page", opened))
    if report.graph:
        steps.append(Step("see what is gone", f"{mansu} view {folder}"))
    original = shlex.quote(report.model.name)
    steps.append(Step("gone or only hidden", f"{mansu} cad {original} {folder}"))
    if attack:
        steps.append(Step("attack in eight ways", attack))
    return [*steps, _deployed(report, place)]


def _deployed(report: Report, place: Place) -> Step:
    """The GGUF file that keeps the promise, or where there is no such file the edit alone."""
    promised = {row.name for row in report.quantizers if row.promised}
    if place.gguf:
        kind = next((k for k in ("q4_0", "q8_0") if k in promised), "f16")
        folder, out = (shlex.quote(f"{place.folder}{end}") for end in ("", f"-{kind}.gguf"))
        command = f"{place.mansu} export {folder} --type {kind} --out {out}"
        install = gguf_lacks(kind)
        return Step("for llama.cpp", command, install and f"GGUF files need: {install}")
    before, after = shlex.quote(report.model.name), shlex.quote(str(place.folder))
    out = shlex.quote(f"{place.folder}-delta.safetensors")
    return Step("the edit alone", f"{place.mansu} delta {before} {after} --out {out}")


def _mending(report: Report, place: Place) -> list[Step]:
    """For each property that is missed, the run that is likely to meet it."""
    try:
        words = shlex.split(report.command)
    except ValueError:
        words = []
    if words[:2] != ["mansu", "run"]:  # the report of a stranger
        return []
    makers = {
        "structural erasure": _erase,
        "no recovery under quantization": _survive,
        "retain preservation": _retain,
        "meaningful forgetting": _forget,
    }
    steps = []
    for name, make in makers.items():
        if any(p.name == name and p.passed is False for p in report.properties):
            label, reason, options = make(report, place)
            run = _with(words[2:], options)
            beside = f"{place.folder.name}-{label.split()[0]}"
            folder = unused(place.folder.parent / beside)
            command = f"{place.mansu} run {shlex.join([*run, '--out', str(folder)])}"
            steps.append(Step(label, command, reason))
    return steps


Options = Mapping[str, Sequence[str] | None]
"""Option -> its words; None removes it."""


def _with(words: Sequence[str], options: Options) -> list[str]:
    """The words of a command line with other options."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word.replace("--no-", "--") in options
        if not skip and word != "--out":
            kept.append(word)
    for option, values in options.items():
        kept += [] if values is None else [option, *values]
    return kept


_Made = tuple[str, str, Options]
"""Words of the step, the reason, and the options that mend."""


def _setting(report: Report, name: str, usual: float) -> float:
    """A number of the run's settings."""
    found: Json = report.config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, (int, float)) else usual


def _more(
    report: Report, name: str, usual: float, least: float = 0.0, most: float = 1e9
) -> Options:
    """An option with twice the value that it has."""
    value = min(max(2 * _setting(report, name, usual), least), most)
    return {f"--{name}".replace("_", "-"): [f"{value:g}"]}


def _is_mansu(report: Report) -> bool:
    return str(report.config.get("method", "mansu")).startswith("mansu")


def _without(report: Report, option: str) -> Options:
    """An option and all of the method, removed."""
    inner = report.config.get("unlearn")
    names = inner if isinstance(inner, dict) else {}
    return {option: None, **{f"--unlearn.{n}".replace("_", "-"): None for n in names}}


def _erase(report: Report, place: Place) -> _Made:
    steps = _setting(report, "unlearn.adversarial_steps", 0)
    hidden = "The facts are hidden, not gone"
    plain: Options = {} if _is_mansu(report) else _without(report, "--method")
    if place.robust and not steps:
        # Options beside --robust win over it: those that say how to unlearn go, not what is named.
        given = {k: v for k, v in _without(report, "--budget").items() if k != "--unlearn.survive"}
        reason = f"{hidden}; this trains against relearning, too, and takes longer:"
        return "erase", reason, {**plain, **given, "--robust": []}
    reason = f"{hidden}; this trains against relearning, and edits the subjects' embedding rows:"
    if steps:
        reason = f"{hidden}; this trains against a longer attack, with a larger budget:"
        budget = _more(report, "budget", 0.005, most=1.0)
        return "erase", reason, {**budget, **_more(report, "unlearn.adversarial_steps", 15)}
    return "erase", reason, {**plain, "--subject-rows": [], "--unlearn.adversarial-steps": ["30"]}


def _survive(report: Report, place: Place) -> _Made:
    promised = [row.name for row in report.quantizers if row.promised]
    through = [row.name for row in report.quantizers if row.trained_through]
    known = [row for row in report.quantizers if row.name in QUANTIZERS]
    others = [row.name for row in known if not row.promised and (row.choice.gap or 0) > 0]
    if not _is_mansu(report):
        reason = "A quantizer may undo edits of this method; those of mansu it cannot:"
        survive = [row.name for row in known if QUANTIZERS[row.name].promises] or [QUANTIZER]
        return "survive", reason, {**_without(report, "--method"), "--unlearn.survive": survive}
    if exact := [name for name in others if QUANTIZERS[name].promises]:
        reason = f"The edit was not made to survive {', '.join(exact)}; this is:"
        return "survive", reason, {"--unlearn.survive": [*promised, *exact]}
    if new := [name for name in others if name in THROUGH and name not in through]:
        reason = f"Training did not go through {', '.join(new)}; this does, and promises nothing:"
        return "survive", reason, {"--unlearn.train-through": [*through, *new]}
    reason = "Answers came back; this lowers them further in the quantized models:"
    return "survive", reason, _more(report, "unlearn.quantization_margin", 0.0, least=0.1)


def _retain(report: Report, place: Place) -> _Made:
    inner = report.config.get("unlearn")
    if isinstance(inner, dict) and "retain_weight" in inner:
        reason = "Too much else was lost; this weighs the retain answers more:"
        return "retain", reason, _more(report, "unlearn.retain_weight", 2.0)
    lr = _setting(report, "unlearn.lr", 1e-4) / 2
    reason = "Too much else was lost, and this method does not train on it; smaller steps:"
    return "retain", reason, {"--unlearn.lr": [f"{lr:g}"]}


def _forget(report: Report, place: Place) -> _Made:
    longer = _more(report, "unlearn.steps", 250)
    if not _is_mansu(report):
        return "forget", "The facts are still answered; this trains longer:", longer
    budget = _more(report, "budget", 0.005, most=1.0)
    reason = "The facts are still answered; this trains longer and lets more weights change:"
    return "forget", reason, {**longer, **budget}
