"""Opens a notebook with the widget in a real JupyterLab: are its pixels those of the theme, at once
and after each switch, and does Python hear a click?

    python scripts/check_lab.py [--shot lab.png]

Needs jupyterlab, chromium and chromedriver; run by hand before a release.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402

CODE = """
from pathlib import Path
from mansu_interp import circuit_view
from mansu_interp.circuits.circuit import Circuit
circuit = Circuit.load(Path(ROOT) / "circuits" / "facts-capitals.json")
widget = circuit_view(circuit).widget()
widget.observe(lambda c: Path("heard.txt").write_text(repr(c["new"])), "selected")
widget
"""
PAPER = """
const c = document.querySelector(".mg canvas");
const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
return [[...d.slice(0, 3)].join(), new Set(new Uint32Array(d.buffer)).size > 100];"""
THEMES = {"JupyterLab Light": "255,255,255", "JupyterLab Dark": "21,25,29"}
SWITCH = """
const [theme, done] = arguments;
window.jupyterapp.commands.execute("apputils:change-theme", {theme}).then(() => done(), done);"""
CLICK = """
const c = document.querySelector(".mg canvas"), r = c.getBoundingClientRect();
// the logits box spans the top of the picture
const at = {clientX: r.left + r.width / 2, clientY: r.top + 24, pointerId: 1, button: 0,
            bubbles: true};
for (const n of ["pointerdown", "pointerup"]) c.dispatchEvent(new PointerEvent(n, at));
"""


def wait(what: str, check: object, seconds: float = 90) -> None:
    """Until a check is true."""
    end = time.monotonic() + seconds
    while not check():  # type: ignore[operator]
        if time.monotonic() > end:
            raise SystemExit(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(0.5)


def main() -> None:
    """Start, open, run all cells, click, listen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shot", type=Path)
    shot = parser.parse_args().shot
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        notebook = nbformat.v4.new_notebook()
        source = CODE.replace("ROOT", repr(str(ROOT)))
        notebook.cells = [nbformat.v4.new_code_cell(source.strip())]
        notebook.metadata["kernelspec"] = {
            "display_name": "Python 3",
            "name": "python3",
            "language": "python",
        }
        nbformat.write(notebook, Path(folder) / "look.ipynb")
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
             "--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}",
             "--LabApp.news_url=", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            with browser.chromium(1400, 1000) as driver:

                def up() -> bool:
                    with socket.socket() as s:
                        return s.connect_ex(("127.0.0.1", port)) == 0

                wait("the server", up)
                driver.get(f"http://127.0.0.1:{port}/lab/tree/look.ipynb?reset")
                find = driver.find_elements
                wait("the notebook", lambda: find("css selector", ".jp-Notebook .cm-content"))
                time.sleep(4)
                find("css selector", ".jp-Notebook .cm-content")[0].click()
                from selenium.webdriver import ActionChains, Keys

                keys = ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER)
                keys.key_up(Keys.SHIFT).perform()
                try:
                    wait("the widget", lambda: find("css selector", ".mg canvas"))
                except SystemExit:
                    if shot:
                        shot.write_bytes(driver.get_screenshot_as_png())
                    raise
                for theme in ("", *THEMES, *THEMES):
                    if theme:
                        driver.execute_async_script(SWITCH, theme)
                    time.sleep(2)
                    light = driver.execute_script("return document.body.dataset.jpThemeLight")
                    wanted = THEMES["JupyterLab " + ("Light" if light == "true" else "Dark")]
                    if (found := driver.execute_script(PAPER)) != [wanted, True]:
                        raise SystemExit(f"{theme or 'Fresh'}: pixels {found}, expected {wanted}.")
                print("pixels: those of the theme, fresh and after each switch")
                driver.execute_script(CLICK)
                heard = Path(folder) / "heard.txt"
                try:
                    wait("Python to hear the click", heard.exists, 20)
                finally:
                    if shot:
                        shot.write_bytes(driver.get_screenshot_as_png())
                print(f"Python heard: selected = {heard.read_text()}")
                outside = [u for u in browser.requests(driver) if f"127.0.0.1:{port}" not in u]
                print(f"requests to other hosts: {outside or 'none'}")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
