"""Makes the tutorials' notebooks from their scripts, and runs them.

    python scripts/make_tutorials.py            # all
    python scripts/make_tutorials.py --only 2   # those whose name begins with 2

Each ``tutorials/N-name.py`` is a plain script in the percent format that editors and jupytext know:
``# %% [markdown]`` starts a text cell (its lines are comments), ``# %%`` a code cell. The notebook
beside it is saved with outputs and without widget state, so that whoever opens or exports it sees
the static pictures.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"


def cells_of(script: str) -> list[tuple[str, str]]:
    """(``markdown`` or ``code``, source) of every cell of a percent script."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def notebook_of(script: str) -> nbformat.NotebookNode:
    """The notebook of a percent script, not yet run."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook()
    for number, (kind, source) in enumerate(cells_of(script)):
        notebook.cells.append(make[kind](source, id=f"cell-{number}"))
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
    for script in sorted(TUTORIALS.glob("[0-9]-*.py")):
        if script.name.startswith(chosen):
            notebook = notebook_of(script.read_text(encoding="utf-8"))
            execute(notebook)
            nbformat.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
