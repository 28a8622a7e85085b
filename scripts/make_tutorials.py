"""Makes the notebooks of tutorials/ from their scripts, and runs them.

    python scripts/make_tutorials.py            # all
    python scripts/make_tutorials.py --only 2   # those whose name begins with 2

Each ``tutorials/NAME.py`` is a plain script in jupytext's percent format. The notebook beside it is
saved with outputs and without widget state, so that whoever opens or exports it sees the static
pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"


def notebook_of(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, not yet run."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout: int = 600) -> None:
    """Run it in the tutorials' folder; raises on the first error."""
    resources = {"metadata": {"path": str(TUTORIALS)}}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources,
        store_widget_state=False, record_timing=False,
    )  # fmt: skip
    client.execute()


def main() -> None:
    """Make and run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="beginning of the name")
    chosen = parser.parse_args().only
    for script in sorted(TUTORIALS.glob("*.py")):
        if script.name.startswith(chosen):
            notebook = notebook_of(script)
            execute(notebook)
            nbformat.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
