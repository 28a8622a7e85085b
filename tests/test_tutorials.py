"""The tutorials: script and notebook agree, outputs are saved with pictures, and each runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from test_docs import load

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tutorials").glob("[0-9]-*.py"))
maker: Any = load("make_tutorials")
named = pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)


def test_there_are_five():
    assert [p.name[0] for p in SCRIPTS] == list("12345")


@named
def test_script_and_notebook_agree(script: Path):
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    cells = [(c.cell_type, c.source) for c in notebook.cells]
    assert cells == maker.cells_of(script.read_text("utf-8")), "run scripts/make_tutorials.py"


@named
def test_saved_with_outputs_and_static_pictures(script: Path):
    text = script.with_suffix(".ipynb").read_text("utf-8")
    cells = [c for c in nbformat.reads(text, 4).cells if c.cell_type == "code"]
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr" or o.output_type == "error"]
    assert str(Path.home()) not in text and "widget-state" not in text
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            assert "image/svg+xml" in output["data"]  # an export is never blank
    if "view" in script.read_text("utf-8").split("mansu_interp.viz import")[-1][:30]:
        assert any("image/svg+xml" in o.get("data", {}) for o in outputs) or "5-" in script.name


@named
def test_runs(script: Path, monkeypatch: pytest.MonkeyPatch):
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = maker.notebook_of(script.read_text("utf-8"))
    maker.execute(notebook)  # raises on the first error, with its traceback
    text = "\n".join(
        o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs
    )
    assert {
        "1": "faithfulness",
        "2": "candidates",
        "3": "collateral=0",
        "4": "erased",
        "5": "Paris",
    }[script.name[0]] in text
