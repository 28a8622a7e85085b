"""Small runs of `mansu run` into which faults are put, for test_faults.py.

    python fault_script.py FOLDER

Imports are done once; every go is a fork of this process, with one thread, in a folder of its own.
The process itself computes nothing: torch's threads do not outlive a fork. Prints JSON: per fault
the exit status, what the user saw, and what was left.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes  # noqa: F401
import torch
import transformer_lens.model_bridge  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

torch.set_num_threads(1)

from mansu_interp.cli import commands  # noqa: E402
from mansu_interp.cli import main as cli  # noqa: E402
from mansu_interp.runs import erasure  # noqa: E402
from mansu_interp.runs import run as pipeline  # noqa: E402
from mansu_interp.utils import tensors as state  # noqa: E402

erasure.CAD_PAIRS = 4
state.SECONDS = 0.0  # a checkpoint at every step
SMALL = (
    "run --quiet --task capitals --out run --relearn-steps 0 --score-pairs 12 "
    "--circuit.pairs 8 --circuit.top 60 --circuit.ig-steps 1 --circuit.faithfulness-pairs 4 "
    "--unlearn.steps 4 --unlearn.batch-size 8 --unlearn.lr 0.1"
)
Hook = Callable[[], Any]


def go(folder: Path, hook: Hook | None = None, more: str = "", wait: bool = True) -> Any:
    """One run in a fork: its status (negative: the signal) and the last line that it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if not child:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        for fd, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(ROOT / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        if hook:
            hook()
        status = cli.main([*SMALL.split(), *more.split()])
        sys.stderr.flush()
        os._exit(status)
    if not wait:
        return child
    _, status = os.waitpid(child, 0)
    said = (ROOT / "err.txt").read_text().strip().splitlines()
    return os.waitstatus_to_exitcode(status), said


def at_write(name: str, do: Hook) -> Hook:
    """Do something just before a file or folder of this name takes its place."""

    def hook() -> None:
        true = os.replace

        def replace(source: Any, target: Any) -> None:
            if Path(target).name == name:
                do()
            true(source, target)

        os.replace = replace  # type: ignore[assignment]

    return hook


def at_step(step: int, do: Hook) -> Hook:
    """Do something when so many steps of unlearning are done."""

    def hook() -> None:
        def call(self: Any, stage: str, done: int, total: int) -> None:
            if (stage, done) == ("unlearning", step):
                do()

        commands.Progress.__call__ = call  # type: ignore[method-assign]

    return hook


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def same(folder: Path, whole: str = "whole") -> bool:
    """Whether a finished run is the uninterrupted one, byte for byte."""
    ours, theirs = folder / "run", ROOT / whole / "run"
    return files(ours) == files(theirs) and all(
        (ours / f).read_bytes() == (theirs / f).read_bytes()
        for f in files(theirs)
        if f != "seconds.json"
    )


def told(
    folder: Path, first: Any, after: Callable[[], Any], whole: str = "whole"
) -> dict[str, Any]:
    """What a fault left, and whether the next go ends as if there had been none."""
    kept = files(folder / "run")
    second = after()
    return {"status": first[0], "said": first[1], "kept": kept, "then": second[0],
            "then_said": second[1], "same": same(folder, whole)}  # fmt: skip


def killed() -> dict[str, Any]:
    """Killed while each file is written in turn, and once more between two steps."""
    names: list[str] = []
    folder, out = ROOT / "killed", []
    order = "config.json written.json provenance.json seconds.json attribution-forget.safetensors"
    order += " attribution-retain.safetensors circuit.json circuit.graphml"
    order += " mask.safetensors unlearning.safetensors history.json model ledger.safetensors"
    order += " results.json"
    for name in [*order.split(), "README.md", "report.json", "report.md", "report.html"]:
        names.append(name)
        out.append(go(folder, at_write(name, die))[0])
        if name == "unlearning.safetensors":
            out.append(go(folder, at_step(3, die))[0])
    last = go(folder)
    return {"statuses": out, "names": names, "then": last, "same": same(folder)}


def file_limit() -> dict[str, Any]:
    folder = ROOT / "limit"

    def hook() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    return told(folder, go(folder, hook), lambda: go(folder))


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def disk_full() -> dict[str, Any] | None:
    folder = ROOT / "full"
    if not mounted(folder / "run", "size=1m"):
        return None
    try:
        first = go(folder)

        def more() -> Any:
            grow = ["mount", "-o", "remount,size=64m", str(folder / "run")]
            subprocess.run(grow, check=True)
            return go(folder)

        return told(folder, first, more)
    finally:
        subprocess.run(["umount", str(folder / "run")], check=True)


def read_only() -> dict[str, Any] | None:
    folder = ROOT / "read-only"
    if os.getuid():
        (folder / "run").mkdir(parents=True)
        (folder / "run").chmod(0o555)
    elif not mounted(folder / "run", "ro"):
        return None
    try:
        first = go(folder)
        return {"status": first[0], "said": first[1], "kept": files(folder / "run")}
    finally:
        if not os.getuid():
            subprocess.run(["umount", str(folder / "run")], check=True)


def interrupted() -> dict[str, Any]:
    folder = ROOT / "interrupted"
    first = go(folder, at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    return told(folder, first, lambda: go(folder))


def two_at_once() -> dict[str, Any]:
    folder = ROOT / "two"
    child = go(folder, at_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP)), wait=False)
    os.waitpid(child, os.WUNTRACED)
    first = go(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {**told(folder, first, lambda: go(folder)), "pid": child}


def memory() -> dict[str, Any] | None:
    """Discovery with too little memory; then, under the same limit, as the message advises."""
    folder, status = ROOT / "memory", Path("/proc/self/status")
    if not status.exists():
        return None

    def hook() -> None:
        """Leave 150 MB from where discovery begins."""
        begin = pipeline.plan

        def then(*given: Any) -> Any:
            made = begin(*given)
            used = re.search(r"VmData:\s+(\d+) kB", status.read_text())
            assert used
            limit = int(used[1]) * 1024 + 150_000_000
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            return made

        pipeline.plan = then

    many = "--circuit.pairs 256 --circuit.batch-size "
    go(ROOT / "enough", more=many + "4")
    first = go(folder, hook, many + "256")
    return told(folder, first, lambda: go(folder, hook, many + "4"), "enough")


def truncated() -> dict[str, Any]:
    """Each artefact of a run that is not finished, cut short; then deleted."""
    whole, out = ROOT / "begun", {}
    go(whole, at_step(2, die))
    begun = {"circuit.json", "mask.safetensors", "unlearning.safetensors"}
    for name in ("circuit.json", "mask.safetensors", "unlearning.safetensors", "ledger.safetensors",
                 "model/model.safetensors"):  # fmt: skip
        folder = ROOT / f"cut-{Path(name).name}"
        shutil.copytree(whole if name in begun else ROOT / "whole", folder)
        (folder / "run" / "report.html").unlink(missing_ok=True)
        file = folder / "run" / name
        data = file.read_bytes()
        file.write_bytes(data[: len(data) * 2 // 3])
        first = go(folder)
        if name.startswith("model"):
            shutil.rmtree(file.parent)
        else:
            file.unlink()
        out[name] = told(folder, first, lambda folder=folder: go(folder))
    return out


def another_model() -> dict[str, Any]:
    folder = ROOT / "another"
    shutil.copytree(ROOT / "begun", folder)
    file = folder / "run" / "provenance.json"
    made_from = json.loads(file.read_text())
    file.write_text(json.dumps({**made_from, "model_sha256": "another"}))
    first = go(folder)
    return {"status": first[0], "said": first[1], "kept": files(folder / "run")}


FAULTS = (
    "killed file_limit disk_full read_only interrupted two_at_once memory truncated another_model"
)

if __name__ == "__main__":
    ROOT = Path(sys.argv[1]).resolve()
    found: dict[str, Any] = {"whole": go(ROOT / "whole")}
    for name in sys.argv[2:] or FAULTS.split():
        found[name] = globals()[name]()
    print(json.dumps(found, indent=1))
