"""Makes docs/api.md from the public names, docs/cli.md from the parser, the docs' pictures, and
the JSON schemas of task files and leak templates, by which editors complete and check them.

    python scripts/make_docs.py
    python scripts/make_docs.py --run runs/latest    # and the picture of what a run changed
    python scripts/make_docs.py --circuits           # and circuits/: of each task of `facts`

Tests check that pages and schema are up to date. The second picture, docs/pictures/changes.svg, is
drawn from the report of a whole run, `mansu run`, and stays as it is without one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by scripts/make_docs.py. Do not edit. -->\n\n"
ROOMS = {
    "models": "Models",
    "tasks": "Tasks",
    "circuits": "Circuits",
    "quantizers": "Quantizers",
    "masks": "Masks",
    "audit": "Audit",
    "unlearning": "Unlearning",
    "export": "Export",
    "evaluation": "Evaluation",
    "viz": "Graphs to look at",
    "report": "Reports",
    "runs": "Whole runs",
    "errors": "Errors",
}
"""Heading of each room on the API page."""
BESIDE = ("viz.tokens", "viz.widget")
"""Modules documented beside the public names."""
COMMANDS = (
    "run",
    "report",
    "discover",
    "attribute",
    "view",
    "compare",
    "bench",
    "plan",
    "relearn",
    "cad",
    "verify",
    "delta",
    "apply",
    "export",
    "evaluate",
    "task",
    "teach",
    "metrics",
)


def api_page() -> str:
    """One directive of mkdocstrings for every public name, by room, in the order of the data."""
    import mansu_interp

    lines = [
        "# Python",
        "",
        "Every name below is imported from the package itself, `from mansu_interp import ...`; "
        "modules that are not listed here are implementation details. Options are given by "
        "keyword. This page is filled in by the site (`mkdocs build`); elsewhere, use "
        "`help(mansu_interp.unlearn)`.",
        "",
    ]
    room = ""
    for module, names in mansu_interp.PUBLIC.items():
        if module.split(".")[0] != room:
            room = module.split(".")[0]
            lines += [f"## {ROOMS.get(room, room.capitalize())}", ""]
        lines += [f"::: mansu_interp.{module}.{name}\n" for name in names]
    lines += ["## Tokens, attention and the widget", ""]
    lines += [f"::: mansu_interp.{module}\n" for module in BESIDE]
    return MADE + "\n".join(lines).rstrip() + "\n"


def _help(words: list[str], option: str = "--help") -> str:
    """What a command prints, at 96 columns without colours."""
    env = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    env.pop("FORCE_COLOR", None)
    command = [sys.executable, "-m", "mansu_interp", *words, option]
    done = subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def cli_page() -> str:
    """The help of every command, with every setting where ``--help`` shows a part of them."""
    intro = (
        "The same settings are the dataclasses of [Python](api.md) and a run's `config.json`. "
        "`mansu run --method NAME --help` shows the settings of another method."
    )
    lines = ["# Command line", "", intro, ""]
    for words in ([], *([c] for c in COMMANDS), ["list"]):
        text = _help(words)
        option = "--help-all" if words and "--help-all" in text else "--help"
        text = _help(words, option) if option == "--help-all" else text
        lines += [f"## {' '.join(['mansu', *words])}", "", "```text", text, "```", ""]
    return MADE + "\n".join(lines).rstrip() + "\n"


def circuit_picture() -> str:
    """The shipped circuit of ``capitals``."""
    from mansu_interp.circuits.circuit import Circuit
    from mansu_interp.viz.svg import circuit_svg

    return circuit_svg(Circuit.load(ROOT / "circuits" / "facts-capitals.json"))


def changes_picture(run: Path) -> str:
    """What became of the graph in a finished run: its four panes, from the report."""
    from mansu_interp.viz.data import GraphData
    from mansu_interp.viz.view import View

    data = json.loads((run / "report.json").read_text(encoding="utf-8"))["graph"]
    data.update(title="", cad=None, comparison=None)
    data["panes"] = ["original", "unlearned", "unlearned, nf4", "unlearned, half relearned"]
    return View(GraphData.from_json(data)).svg()


def make_circuits(out: Path) -> None:
    """Discover with the settings of each task of the embedded model; write circuits and masks."""
    from mansu_interp import default_config, discover, load_model, load_task, make_mask

    model = load_model("facts")
    for name in ("capitals", "countries"):
        task, config = load_task(name, model), default_config("facts", name)
        circuit = discover(model, task.forget, config=config.circuit, retain=task.retain)
        circuit.save(out / f"facts-{name}.json")
        make_mask(config, model, task, circuit).save(out / f"facts-{name}.mask.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Write everything."""
    from mansu_interp.evaluation.leaks import templates
    from mansu_interp.tasks.schema import json_schema
    from mansu_interp.utils.files import write_json
    from mansu_interp.utils.shipped import DATA

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a finished run of `capitals`")
    parser.add_argument("--circuits", action="store_true", help="make circuits/ again, too")
    args = parser.parse_args(argv)
    run: Path | None = args.run
    write_json(DATA / "task.schema.json", json_schema())
    write_json(DATA / "leaks.schema.json", templates.json_schema())
    docs = ROOT / "docs"
    (docs / "api.md").write_text(api_page(), encoding="utf-8")
    (docs / "cli.md").write_text(cli_page(), encoding="utf-8")
    (docs / "pictures" / "circuit.svg").write_text(circuit_picture(), encoding="utf-8")
    if run is not None:
        (docs / "pictures" / "changes.svg").write_text(changes_picture(run), encoding="utf-8")
    if args.circuits:
        make_circuits(ROOT / "circuits")


if __name__ == "__main__":
    main()
