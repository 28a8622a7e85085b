"""Opens a notebook with the widget in a real JupyterLab.

Are its pixels those of the theme, at once, after each switch and after it was scrolled away and
back; does Python hear a click; and what is there when the notebook is opened again, with its
kernel, without it, and where it is not trusted?

    python scripts/check_lab.py [--shots folder]

Needs jupyterlab with ipywidgets and anywidget in one environment, chromium and chromedriver; run by
hand before a release. With --shots, every state is saved as a picture to look at.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402

CELLS = [
    """from pathlib import Path
import numpy as np
from mansu_interp import attribution_view, circuit_view
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.scores import Attribution
circuit = Circuit.load(Path(ROOT) / "circuits" / "facts-capitals.json")
view = circuit_view(circuit)
widget = view.widget()
widget.observe(lambda c: Path("heard.txt").write_text(repr(c["new"])), "selected")
widget""",
    """rng = np.random.default_rng(0)
share = np.moveaxis(rng.dirichlet([0.2] * 6, circuit.scores.shape), -1, 0)
scores = Attribution(circuit.graph, circuit.scores, 1.0, 0.0, share * circuit.scores)
attribution_view(scores, by_position=True, title="By position (random shares)").widget()""",
    "view  # its picture",
]
PAPER = """
return [...document.querySelectorAll(".mg canvas")].map((c) => {
  const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return [[...d.slice(0, 3)].join(), new Set(new Uint32Array(d.buffer)).size > 100];
});"""
THEMES = {"Light": "255,255,255", "Dark": "21,25,29"}
RUN = """
const [command, args, done] = arguments;
const end = (e) => done(e ? `${e}` : "");
window.jupyterapp.commands.execute(command, args ?? {}).then(() => end(), end);"""
CLICK = """
const c = document.querySelector(".mg canvas"), r = c.getBoundingClientRect();
// the logits box spans the top of the picture
const at = {clientX: r.left + r.width / 2, clientY: r.top + 24, pointerId: 1, button: 0,
            bubbles: true};
for (const n of ["pointerdown", "pointerup"]) c.dispatchEvent(new PointerEvent(n, at));
"""
SCROLL = """
const far = document.querySelector(".jp-WindowedPanel-outer, .jp-Notebook");
far.scrollTop = arguments[0] ? far.scrollHeight : 0;"""
SHOWN = """
const outputs = [...document.querySelectorAll(".jp-Cell-outputArea")];
return outputs.map((o) => o.querySelector(".mg canvas") ? "widget"
  : o.querySelector(".jp-RenderedSVG :is(svg, img)") ? "SVG"
  : o.querySelector(".jp-RenderedImage img") ? "pixels"
  : o.innerText.replace(/\\s+/g, " ").slice(0, 70));"""


def wait(what: str, check: Callable[[], object], seconds: float = 90) -> None:
    """Until a check is true."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise SystemExit(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(0.5)


@contextmanager
def jupyterlab(folder: str) -> Iterator[str]:
    """The address of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
         "--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}",
         "--LabApp.news_url=", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": folder},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def up() -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait("the server", up)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class Lab:
    """A browser with JupyterLab open in it."""

    def __init__(self, driver: Any, address: str, shots: Path | None) -> None:
        self.driver, self.address, self.shots = driver, address, shots

    def open(self, name: str) -> None:
        """Open a notebook in a fresh page."""
        self.driver.get(f"{self.address}/lab/tree/{name}?reset")
        wait("the notebook", lambda: self.find(".jp-Notebook .cm-content"))
        time.sleep(5)

    def find(self, selector: str) -> list[Any]:
        """Elements on the page."""
        return self.driver.find_elements("css selector", selector)

    def run(self, command: str, **args: object) -> None:
        """Run one of JupyterLab's commands."""
        if error := self.driver.execute_async_script(RUN, command, args):
            raise SystemExit(f"{command}: {error}")

    def shoot(self, when: str) -> None:
        """Save what is seen of each output."""
        for k, output in enumerate(self.find(".jp-Cell-outputArea") if self.shots else ()):
            self.driver.execute_script("arguments[0].scrollIntoView()", output)
            time.sleep(1)
            name = f"{when.replace(',', '').replace(' ', '-')}-{k}.png"
            assert self.shots is not None
            (self.shots / name).write_bytes(self.driver.get_screenshot_as_png())

    def check(self, when: str, panes: int) -> None:
        """The pixels are those of the theme."""
        time.sleep(2)
        light = self.driver.execute_script("return document.body.dataset.jpThemeLight")
        wanted = [[THEMES["Light" if light == "true" else "Dark"], True]] * panes
        self.shoot(when)
        if (found := self.driver.execute_script(PAPER)) != wanted:
            raise SystemExit(f"{when}: pixels {found}, expected {wanted}.")

    def shown(self, when: str, wanted: list[str]) -> None:
        """What each cell shows."""
        self.shoot(when)
        found = self.driver.execute_script(SHOWN)
        print(f"{when}: {', '.join(found)}")
        if found != wanted:
            raise SystemExit(f"{when}: {found}, expected {wanted}.")


def fresh(lab: Lab, folder: Path) -> None:
    """Run all cells, switch themes, scroll away and back, click."""
    lab.open("look.ipynb")
    lab.run("runmenu:run-all")
    wait("the widgets", lambda: len(lab.find(".mg canvas")) == 2)
    lab.check("fresh", 2)
    for theme in ("Light", "Dark", "Light", "Dark"):
        lab.run("apputils:change-theme", theme=f"JupyterLab {theme}")
        lab.check(f"fresh {theme}", 2)
    print("pixels: those of the theme, fresh and after each switch")
    lab.driver.execute_script(SCROLL, True)
    time.sleep(2)
    lab.run("apputils:change-theme", theme="JupyterLab Light")  # while it is out of sight
    time.sleep(1)
    lab.driver.execute_script(SCROLL, False)
    lab.check("scrolled away and back", 2)
    print("pixels: those of the theme, after it was scrolled away and back")
    lab.driver.execute_script(CLICK)
    heard = folder / "heard.txt"
    wait("Python to hear the click", heard.exists, 20)
    print(f"Python heard: selected = {heard.read_text()}")


def again(lab: Lab, folder: Path) -> None:
    """Open the saved notebook again: with its kernel, without it, and not trusted."""
    lab.run("docmanager:save")
    time.sleep(2)
    lab.open("look.ipynb")
    wait("the widgets", lambda: len(lab.find(".mg canvas")) == 2)
    lab.check("reopened", 2)
    lab.shown("reopened with its kernel", ["widget", "widget", "SVG"])
    lab.run("kernelmenu:shutdown")
    time.sleep(2)
    lab.open("look.ipynb")
    missing = [f"[{n}]: Error displaying widget: model not found" for n in (1, 2)]
    lab.shown("reopened without its kernel, trusted", [*missing, "SVG"])
    book = nbformat.read(folder / "look.ipynb", 4)
    book.metadata["from"] = "elsewhere"
    book.cells[0].source += "\n# by somebody else"
    nbformat.write(book, folder / "other.ipynb")
    lab.open("other.ipynb")
    lab.shown("reopened without its kernel, not trusted", ["pixels", "pixels", "pixels"])


def main() -> None:
    """Start, open, run all cells, click, listen, open again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shots", type=Path)
    shots = parser.parse_args().shots
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        notebook = nbformat.v4.new_notebook()
        sources = [cell.replace("ROOT", repr(str(ROOT))) for cell in CELLS]
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook.cells += [nbformat.v4.new_markdown_cell("\n\n".join("below" * 9)) for _ in "abcd"]
        kernel = {"display_name": "Python 3", "name": "python3", "language": "python"}
        notebook.metadata["kernelspec"] = kernel
        nbformat.write(notebook, Path(folder) / "look.ipynb")
        with jupyterlab(folder) as address, browser.chromium(1400, 1000) as driver:
            lab = Lab(driver, address, shots)
            fresh(lab, Path(folder))
            again(lab, Path(folder))
            outside = [u for u in browser.requests(driver) if not u.startswith(address)]
            print(f"requests to other hosts: {outside or 'none'}")


if __name__ == "__main__":
    main()
