"""The notebooks: one with their scripts, saved with outputs that are not stale, and each runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from test_docs import load

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tutorials").glob("*.py"))
VARIES = "varies"
"""Tag of cells that print what models answer: another processor may round to another word."""
maker: Any = load("make_tutorials")
named = pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)


def saved(script: Path) -> nbformat.NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), 4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell printed, line by line, each number as #: the last digits differ by processor."""
    text = "".join(o.get("text", "") for o in cell.outputs)
    if VARIES in cell.metadata.get("tags", []):
        return [""] * len(text.splitlines())
    return [re.sub(r"[-+−]?\d[\d,.]*%?", "#", line) for line in text.splitlines()]


def test_there_are_six():
    assert [p.stem[:2] for p in SCRIPTS] == ["1-", "2-", "3-", "4-", "5-", "qu"]


@named
def test_script_and_notebook_agree(script: Path):
    def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
        return [(c.cell_type, c.source) for c in notebook.cells]

    assert cells(saved(script)) == cells(maker.notebook_of(script)), "run scripts/make_tutorials.py"


@named
def test_saved_with_outputs_and_static_pictures(script: Path):
    outputs = [o for c in code(saved(script)) for o in c.outputs]
    assert outputs
    assert not [o for o in outputs if o.get("name") == "stderr" or o.output_type == "error"]
    text = script.with_suffix(".ipynb").read_text("utf-8")
    assert str(Path.home()) not in text and str(ROOT) not in text and "widget-state" not in text
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            assert "image/svg+xml" in output["data"]  # an export is never blank
    if "_view(" in script.read_text("utf-8"):
        assert any("image/svg+xml" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
@named
def test_runs_and_prints_what_is_saved(script: Path, monkeypatch: pytest.MonkeyPatch):
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = maker.notebook_of(script)
    maker.execute(notebook)  # raises on the first error, with its traceback
    for was, now in zip(code(saved(script)), code(notebook), strict=True):
        assert printed(now) == printed(was), f"stale: {now.source}"


def test_a_stale_output_is_seen():
    def cell(text: str) -> nbformat.NotebookNode:
        return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=text)])

    assert printed(cell("mass 0.12\n")) == printed(cell("mass 0.13\n"))
    assert printed(cell("mass 0.12\n")) != printed(cell("share 0.12\n"))
