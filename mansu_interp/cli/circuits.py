"""The commands for circuits alone: discover, attribute, view, compare, convert."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, ConfigError
from ..runs.defaults import default_task
from .console import Output, keeps_nothing, say, say_json
from .progress import stages
from .settings import (
    AttributeConfig,
    CompareConfig,
    ConvertConfig,
    DiscoverConfig,
    OnPrompts,
    ViewConfig,
)

if TYPE_CHECKING:
    from ..circuits.circuit import Circuit
    from ..circuits.heads.records import ExplainedHeads
    from ..circuits.scores import Attribution, ScoredEdge
    from ..models.language_model import LanguageModel
    from ..tasks.pairs import PairSet
    from ..utils.files import Json

SHOWN = 10
"""Edges that a result prints."""
SCORES = "scores.safetensors"
"""In the folder of discover: the scores of all edges, those outside the circuit included."""
SYNTHETIC = 200
"""Pairs that are made of a synthetic behaviour, for `pairs` of the settings to be drawn from."""


def _pairs(config: OnPrompts, model: LanguageModel) -> tuple[PairSet, PairSet | None]:
    """The pairs to explain and, of a task, those that must stay."""
    from ..tasks.data.prompts import read_prompts
    from ..tasks.load import load_task
    from ..tasks.synthetic import KINDS, synthetic_pairs

    if config.pairs is not None:
        if config.task is not None:
            raise ConfigError("Give --pairs or --task, not both.")
        if str(config.pairs) in KINDS and not config.pairs.exists():
            return synthetic_pairs(model, str(config.pairs), SYNTHETIC, config.seed), None
        return read_prompts(config.pairs, model), None
    task = load_task(config.task or default_task(config.model), model)
    return task.forget, task.retain


def _print_edges(edges: Sequence[ScoredEdge], circuit: Circuit | None = None) -> None:
    """One line an edge; of a circuit whose stability is known, with that."""
    width, stable = max(len(e.source) for e in edges), circuit and circuit.stability
    for e in edges:
        line = f"  {e.source:>{width}} -> {e.target:<12}{e.score:+9.3f}"
        if circuit and stable:
            held = stable.of_edge(*circuit.graph.edge(e.source, e.target))
            line += f"  [{held['low']:+.3f}, {held['high']:+.3f}]"
            line += f"  in {held['frequency']:.0%} of resamples"
        say(line)


def _told(found: Circuit, heads: ExplainedHeads | None) -> dict[str, Json]:
    """A circuit as JSON: size, faithfulness, strongest edges, and what else was asked for."""
    stable, top = found.stability, found.top(SHOWN)
    edges = [
        {**asdict(e), **(stable.of_edge(*found.graph.edge(e.source, e.target)) if stable else {})}
        for e in top
    ]
    measured = ("faithfulness", "completeness", "random_completeness", "irreducible")
    known = {name: getattr(found.meta, name) for name in measured}
    out: dict[str, Json] = {"edges": found.n_edges, **known, "strongest": edges}
    out |= {"stability": stable.told()} if stable else {}
    out |= {"caveat": found.meta.caveat} if found.meta.caveat else {}
    return out | ({"heads": {h.head: h.to_json() for h in heads}} if heads is not None else {})


def do_discover(config: DiscoverConfig, output: Output) -> int:
    """Discover a circuit, and write it with a page to look at."""
    silent = output.quiet or output.json
    with stages("loading the model", silent) as progress:
        from ..circuits.formats.scored import save_scores
        from ..circuits.search.discover import discover
        from ..models.load import load_model, use_threads
        from ..utils.files import atomic_folder
        from ..viz.view import circuit_view

        model = load_model(config.model, config.device)
        use_threads(model)
        forget, retain = _pairs(config, model)
        if not silent:
            say(f"{model.name}: {model.graph.n_edges:,} edges; {len(forget):,} pairs", flush=True)
        with atomic_folder(config.out, new=True) as folder:
            unfinished = config.out.with_name(f"{config.out.name}.unfinished")
            try:
                found = discover(
                    model,
                    forget,
                    config=config.circuit,
                    retain=retain,
                    seed=config.seed,
                    resamples=config.resamples,
                    on_step=progress,
                    resume=unfinished,
                )
            finally:
                with suppress(OSError):  # something waits there, or it was never made
                    unfinished.rmdir()
            if config.explain:
                progress("explaining the heads", 0, 0)
            heads = found.explain(model) if config.explain else None
            progress("drawing", 0, 0)
            found.save(folder / "circuit.json")
            found.save_graphml(folder / "circuit.graphml")
            save_scores(found, folder / SCORES)
            view = circuit_view(found, model=model, pairs=found.pairs, heads=heads)
            view.to_html(folder / "circuit.html")
    if output.json:
        say_json(_told(found, heads))
        return 0
    short = replace(found, stability=None, meta=replace(found.meta, caveat=""))
    say(f"{short!r}.")
    lines = [*found.meta.remarks(), found.stability and found.stability.sentence, found.meta.caveat]
    for line in filter(None, lines):
        say(f"{line[0].upper()}{line[1:].rstrip('.')}.")
    say(f"The strongest edges (nats of {config.circuit.metric}):")
    _print_edges(found.top(SHOWN), found)
    if heads is not None:
        say(repr(heads))
    if not output.quiet:
        say(f"Open {config.out / 'circuit.html'}")
    return 0


@keeps_nothing
def do_attribute(config: AttributeConfig, output: Output) -> int:
    """Score every edge, and write the scores."""
    from ..utils.files import atomic_path, check_free

    if config.out.suffix not in (".safetensors", ".csv", ".html"):
        raise ConfigError(f"--out must end with .safetensors, .csv or .html; got {config.out}.")
    if config.positions and config.out.suffix == ".csv":
        raise ConfigError(
            "A table (.csv) has no place for scores by position: give --out a name that ends with "
            ".safetensors or .html, or leave out --positions."
        )
    check_free(config.out)
    with stages("loading the model", output.quiet or output.json) as progress:
        from ..circuits.attribution import attribute
        from ..models.load import load_model, use_threads
        from ..viz.view import attribution_view

        model = load_model(config.model, config.device)
        use_threads(model)
        pairs = _pairs(config, model)[0].sample(config.attribution.pairs, config.seed)
        found = attribute(
            model,
            pairs,
            config=config.attribution,
            on_batch=lambda done, n: progress("attribution", done, n),
            positions=config.positions,
        )
    with atomic_path(config.out, new=True) as file:
        if config.out.suffix == ".csv":
            file.write_text(found.to_pandas().to_csv(index=False), encoding="utf-8")
        elif config.out.suffix == ".html":
            view = attribution_view(found, model=model, pairs=pairs, by_position=config.positions)
            view.to_html(file)
        else:
            found.save(file)
    if output.json:
        said = {"caveat": found.caveat} if found.caveat else {}
        say_json({"edges": [asdict(e) for e in found.top(SHOWN)], "clean": found.clean, **said})
        return 0
    say(f"{replace(found, caveat='')!r}. The strongest edges:")
    _print_edges(found.top(SHOWN))
    if not found.clean > found.corrupt:
        say(f"{model.name} does not know these answers: they score no higher on the clean prompts.")
    if found.caveat:
        say(f"{found.caveat[0].upper()}{found.caveat[1:]}.")
    if not output.quiet:
        say(f"All of them: {config.out}")
    return 0


def _read(path: Path) -> Circuit | Attribution:
    """A circuit, or edge scores."""
    from ..circuits.scores import Attribution

    return Attribution.load(path) if path.suffix == ".safetensors" else _read_circuit(path)


def _read_circuit(path: Path, model: str | None = None) -> Circuit:
    """A circuit in a file of any form, or in the folder of a run or of discover."""
    from ..circuits.formats.files import read_circuit
    from ..circuits.formats.scored import with_scores
    from ..models.load import empty_model

    known = empty_model(model).architecture if model else None
    if not path.is_dir():
        return read_circuit(path, known)
    file, scores = path / "circuit.json", path / SCORES
    if not file.exists():
        raise ArtifactError(
            f"{path} holds no circuit.json: name the folder of a run or of mansu discover, or a "
            "file."
        )
    found = read_circuit(file, known)
    # circuit.json has the scores of its own edges alone.
    return with_scores(found, scores) if scores.exists() else found


@keeps_nothing
def do_convert(config: ConvertConfig, output: Output) -> int:
    """Write a circuit as another tool reads it."""
    from ..circuits.formats.files import write_circuit
    from ..utils.files import check_free

    check_free(config.out)
    found = _read_circuit(config.path, config.model)
    write_circuit(found, config.out, config.to)
    told = f" Note: a {found.meta.caveat}." if found.meta.caveat else ""
    say(str(config.out) if output.quiet else f"{found!r}, for {config.to}: {config.out}.{told}")
    return 0


@keeps_nothing
def do_view(config: ViewConfig, output: Output) -> int:
    """Draw what a file holds."""
    from ..circuits.scores import Attribution
    from ..report.records import Report
    from ..utils.files import check_free, read_json, unused
    from ..viz.data import GraphData
    from ..viz.view import View, attribution_view, circuit_view

    path = config.path
    report = path / "report.json"
    if report.exists() and (graph := Report.load(report).graph):
        view = View(GraphData.from_json(graph))
    elif path.suffix == ".json" and "panes" in read_json(path):  # what a page or `to_json` saved
        view = View.from_json(path)
    else:
        found = _read(path)
        if isinstance(found, Attribution):
            view = attribution_view(found, by_position=found.by_position is not None)
        else:
            view = circuit_view(found)
    stem = path / "graph" if path.is_dir() else path.with_suffix("")
    out = config.out or unused(stem, ".html")
    check_free(out)
    if out.suffix == ".html":
        view.to_html(out)
    elif out.suffix == ".svg":
        view.to_svg(out)
    elif out.suffix == ".png":
        view.to_png(out)
    else:
        raise ConfigError(f"--out must end with .html, .svg or .png; got {out}.")
    say(str(out) if output.quiet else f"{view!r}. Open {out}")
    return 0


@keeps_nothing
def do_compare(config: CompareConfig, output: Output) -> int:
    """Say how two circuits, or the scores of two models, differ."""
    from ..circuits.circuit import Circuit
    from ..circuits.scores import Attribution, edge_changes

    first, second = _read(config.first), _read(config.second)
    if isinstance(first, Circuit) and isinstance(second, Circuit):
        both, alone, other = first & second, first - second, second - first
        union = (first | second).n_edges
        counts = {
            "both": int((first.edges & second.edges).sum()),
            "first only": alone.n_edges,
            "second only": other.n_edges,
        }
        overlap = counts["both"] / union if union else 1.0
        if output.json:
            say_json({**counts, "overlap": overlap})
            return 0
        say(f"{first!r}\n{second!r}")
        say(", ".join(f"{n} edges in {k}" for k, n in counts.items()) + f"; overlap {overlap:.2f}")
        for label, part in (("both", both), ("first only", alone), ("second only", other)):
            if part.n_edges:
                say(f"{label}, the strongest:")
                _print_edges(part.top(SHOWN))
        return 0
    if isinstance(first, Attribution) and isinstance(second, Attribution):
        table = edge_changes(first, second)
        if output.json:
            say_json(table.to_dict("records"))
            return 0
        counts = table.change.value_counts().to_dict()
        say(f"{first!r}\n{second!r}")
        say("edges: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
        say(table.head(2 * SHOWN).to_string(index=False, float_format="{:+.3f}".format))
        return 0
    raise ArtifactError(
        f"{config.first} and {config.second} are of different kinds. Give two circuits, or two "
        "files of scores from mansu attribute."
    )
