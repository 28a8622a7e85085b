"""Builds wheel and sdist, installs the wheel in an empty environment, and runs it from outside.

    python scripts/check_package.py                 # a short run
    python scripts/check_package.py --full          # the default run
    python scripts/check_package.py --newest        # without constraints.txt

Only pip is needed. The source tree is not on the path of anything that runs; the run's folder and
the environment are deleted at the end. Prints sizes and seconds, and what the edited checkpoint
says in transformers alone; fails if a step fails, or if the sdist makes another wheel than the
source tree does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = """--circuit.pairs 8 --circuit.ig-steps 2 --circuit.faithfulness 0.5 --unlearn.steps 6
--relearn-steps 0 --score-pairs 20 --threads 1"""
ASK = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("run/model")
tokenizer = AutoTokenizer.from_pretrained("run/model")
for sample in json.load(open("run/report.json"))["samples"][:2]:
    ids = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    print(f"  {sample['prompt']} -> {tokenizer.decode(out[0, -1])} (was {sample['answer']})")
"""


def call(label: str, *command: str | Path, cwd: Path) -> str:
    """Run a command that knows nothing of the source tree; print its seconds."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    start = time.monotonic()
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, check=False, capture_output=True, text=True
    )
    print(f"{label:32} {time.monotonic() - start:8.1f} s", flush=True)
    if done.returncode:
        sys.exit(f"{label} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def contents(wheel: Path) -> dict[str, int]:
    """Names and checksums of a wheel's files."""
    with zipfile.ZipFile(wheel) as file:
        return {i.filename: i.CRC for i in file.infolist() if "/RECORD" not in i.filename}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build, install and run the package.")
    parser.add_argument("--full", action="store_true", help="the default run, not a short one")
    parser.add_argument("--newest", action="store_true", help="install without constraints.txt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        venv.create(work / "build", with_pip=True)
        builder = work / "build" / "bin" / "python"
        call("install build", builder, "-m", "pip", "install", "-q", "build", cwd=work)
        # One after the other: the sdist from the tree, and the wheel from the sdist.
        call(
            "build sdist, wheel of it", builder, "-m", "build", "-o", work / "dist", ROOT, cwd=work
        )
        tree = work / "tree"
        call("build wheel of the tree", builder, "-m", "build", "-w", "-o", tree, ROOT, cwd=work)
        (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
        for file in (wheel, sdist):
            print(f"{file.name:32} {file.stat().st_size / 1e6:8.2f} MB")
        if contents(wheel) != contents(next(tree.glob("*.whl"))):
            sys.exit("The sdist lacks something: its wheel differs from that of the source tree.")
        venv.create(work / "empty", with_pip=True)
        python = work / "empty" / "bin" / "python"
        pinned = [] if args.newest else ["-c", ROOT / "constraints.txt"]
        call("install", python, "-m", "pip", "install", "-q", *pinned, wheel, cwd=work)
        size = sum(f.lstat().st_size for f in (work / "empty").rglob("*") if f.is_file())
        print(f"{'environment':32} {size / 1e6:8.0f} MB")
        where = call(
            "import", python, "-c", "import mansu_interp; print(mansu_interp.__file__)", cwd=work
        )
        if not where.startswith(str(work)):
            sys.exit(f"The package came from {where}, not from the wheel.")
        mansu, out = work / "empty" / "bin" / "mansu", work / "run"
        call("mansu list", mansu, "list", cwd=work)
        call(
            "mansu run", mansu, "run", "--out", out, *([] if args.full else SHORT.split()), cwd=work
        )
        edit = json.loads((out / "report.json").read_text())["edit"]
        print(f"{edit['edited']} parameters edited, {edit['survived']} survive NF4")
        print(call("ask the checkpoint", python, "-c", ASK, cwd=work), end="")


if __name__ == "__main__":
    main()
