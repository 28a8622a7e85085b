"""The notebook runs from top to bottom, and ends with a model that has forgotten something."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "tutorials" / "quickstart.ipynb"


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(o.get("text", "") for o in cell.outputs)


def test_saved_with_outputs_and_without_warnings_or_local_paths():
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    assert all(c.outputs for c in cells)
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr" or o.output_type == "error"]
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")
    assert any("image/svg+xml" in o.get("data", {}) for o in outputs)


def test_quickstart_runs(monkeypatch: pytest.MonkeyPatch):
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = nbformat.read(NOTEBOOK, 4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()  # raises on the first error, with its traceback
    text = "\n".join(printed(c) for c in notebook.cells if c.cell_type == "code")
    assert "collateral=0" in text
    forget = next(line for line in text.splitlines() if line.startswith("forget capital"))
    before, _, after, quantized = map(float, forget.split()[2:])
    assert before > 0.95
    assert max(after, quantized) < before - 0.3
