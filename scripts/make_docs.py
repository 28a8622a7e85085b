"""Makes docs/api.md from docstrings, docs/cli.md from the parser, and the docs' pictures.

    python scripts/make_docs.py

A test checks that the two pages are up to date.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by scripts/make_docs.py. Do not edit. -->\n\n"
EXTRA = ("changes", "viz.view", "viz.tokens", "viz.widget")
"""Modules documented beside the public names."""


def _signature(value: Callable[..., Any]) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    return re.sub(r"'([^']*)'", r"\1", text)


def _entry(name: str, value: Any, level: int) -> list[str]:
    """One documented name and, for a class, its public methods."""
    lines = [f"{'#' * level} `{name}`", ""]
    if callable(value):
        lines += ["```python", f"{name}{_signature(value)}", "```", ""]
    doc = inspect.getdoc(value) or ""
    lines += ["```text", doc, "```", ""] if doc and not doc.startswith(f"{name}(") else []
    if inspect.isclass(value):
        for key, member in vars(value).items():
            plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if not key.startswith("_") and inspect.isfunction(plain) and inspect.getdoc(plain):
                lines += _entry(f"{name}.{key}", plain, level + 1)
    return lines


def api_page() -> str:
    """Every public name with its signature and docstring."""
    import importlib

    import mansu_interp

    lines = ["# API reference", "", "`from mansu_interp import ...`", ""]
    for name in mansu_interp.__all__:
        if name != "__version__":
            lines += _entry(name, getattr(mansu_interp, name), 2)
    for where in EXTRA:
        module = importlib.import_module(f"mansu_interp.{where}")
        doc = inspect.getdoc(module) or ""
        lines += [f"## `mansu_interp.{where}`", "", "```text", doc, "```", ""]
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__
            if (
                own
                and not name.startswith("_")
                and (inspect.isfunction(value) or inspect.isclass(value))
            ):
                lines += _entry(name, value, 3)
    return MADE + "\n".join(lines).rstrip() + "\n"


def cli_page() -> str:
    """The help of every command, as printed at 96 columns without colours."""
    env = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    env.pop("FORCE_COLOR", None)
    intro = "The same settings are the dataclasses of the API and a run's `config.json`."
    lines = ["# Command line", "", intro, ""]
    helps = ([], "--help"), (["run"], "--help"), (["run"], "--help-all")
    for words, option in (
        *helps,
        (["bench"], "--help-all"),
        (["plan"], "--help"),
        (["list"], "--help"),
    ):
        command = [sys.executable, "-m", "mansu_interp", *words, option]
        done = subprocess.run(
            command, env=env, cwd=ROOT, check=True, capture_output=True, text=True
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        lines += [f"## {' '.join(['mansu', *words, option])}", "", "```text", text, "```", ""]
    return MADE + "\n".join(lines).rstrip() + "\n"


def pictures() -> dict[str, str]:
    """The SVG files of docs/concepts.md: shipped circuits, and the classes of edges."""
    import numpy as np

    from mansu_interp.circuits.attribution import Attribution
    from mansu_interp.circuits.circuit import Circuit
    from mansu_interp.viz.svg import circuit_svg
    from mansu_interp.viz.view import erasure_view

    circuit = Circuit.load(ROOT / "circuits" / "facts-capitals.json")
    # Not a measurement: factors chosen so that every class is to be seen once or more.
    rng = np.random.default_rng(3)
    after = circuit.scores * rng.choice([1.0, 0.05, -0.6], circuit.scores.shape)
    back = rng.random(circuit.scores.shape) < 0.25
    scores = [circuit.scores, after, np.where(back, circuit.scores, after)]
    made = [Attribution(circuit.graph, s.astype(np.float32), 1, 0) for s in scores]
    view = erasure_view(circuit, *made, title="The classes of edges (invented scores)")
    return {"circuit.svg": circuit_svg(circuit), "classes.svg": view.svg()}


def main() -> None:
    """Write everything."""
    docs = ROOT / "docs"
    (docs / "pictures").mkdir(exist_ok=True)
    (docs / "api.md").write_text(api_page(), encoding="utf-8")
    (docs / "cli.md").write_text(cli_page(), encoding="utf-8")
    for name, text in pictures().items():
        (docs / "pictures" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
