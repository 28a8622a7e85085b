"""The figures of docs/results.md: MANSU, GradDiff and NPO at matched forgetting, over seeds.

    python scripts/results.py --model facts --task capitals --seeds 0 1 2
    python scripts/results.py --model facts --task countries --seeds 0 1 2
    python scripts/results.py --model models/SmolLM2-135M-Instruct --task world-capitals \
      --dense-steps 40

Settings are those that the task file recommends for everybody (`mansu run` uses the same).
Each method's checkpoint is saved in the original's dtype and loaded again before it is scored on
the unseen phrasings, and after real NF4. Baselines stop where their four-way accuracy on the
*dev* phrasings first reaches MANSU's of the same seed. Finished cells are kept in docs/results/ and
not run again; docs/results.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mansu_interp.artifacts import write_json, write_text
from mansu_interp.cad import Divergence, judge
from mansu_interp.defaults import default_config
from mansu_interp.evaluation import evaluate
from mansu_interp.ledger import changed_elements
from mansu_interp.models import LanguageModel, load_model
from mansu_interp.pairs import Task
from mansu_interp.pipeline import run
from mansu_interp.quantizers import NF4, quantize, survival
from mansu_interp.report.scoreboard import spread
from mansu_interp.tasks import load_task
from mansu_interp.unlearning import dev_choice, unlearn

DOCS = Path(__file__).parents[1] / "docs"
BASELINES = ("graddiff", "npo")
ORDER = ("original", "mansu", *BASELINES)


def scored(
    model: LanguageModel, edited: LanguageModel, task: Task, started: float
) -> dict[str, Any]:
    """All figures of one cell."""
    scores = evaluate({"fp": edited, "nf4": quantize(edited)}, task)
    lived = survival(model, edited, NF4())
    everything = sum(changed_elements(model, edited).values())
    return {
        "rows": scores.rows,
        "perplexity": scores.perplexity,
        "dev_choice": dev_choice(edited, task),
        "edited": everything,
        "share": everything / model.n_parameters,
        "edited_quantized": lived.edited,
        "survived": lived.survived,
        "collateral": lived.collateral,
        "update_over_bin": lived.update_over_bin,
        "projection": lived.projection,
        "seconds": time.monotonic() - started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def cell(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished cell from disk, or made now."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def measure(
    name: str,
    task_name: str,
    seed: int,
    rates: dict[str, float],
    dense_steps: int,
    threads: int | None,
) -> None:
    """Run every method of one seed."""
    settings = replace(default_config(name, task_name), seed=seed, threads=threads)
    model = load_model(name)
    task = load_task(task_name, model, settings.score_pairs)
    folder = DOCS / "results" / f"{Path(name).name}-{task.name}"

    def mansu() -> dict[str, Any]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as out:
            config = replace(settings, out=Path(out) / "run")
            result = run(config, lambda stage, d, n: print(f"\r{stage} {d}/{n}   ", end=""))
            out_cell = scored(model, result.model, task, started)
            out_cell["settings"] = {**result.report["config"], "out": None}
            out_cell["run_seconds"] = result.seconds
            out_cell["cad"] = result.report["cad"]
            out_cell["circuit"] = {
                k: result.report["circuit"][k] for k in ("edges", "of", "faithfulness")
            }
            return out_cell

    def baseline(method: str, stop_at: float) -> dict[str, Any]:
        started = time.monotonic()
        config = replace(
            settings.unlearn,
            seed=seed,
            method=method,
            lr=rates[method],
            stop_at=stop_at,
            retain_weight=1.0,
            steps=dense_steps,
        )
        result = unlearn(model, task, None, config)
        with tempfile.TemporaryDirectory() as out:
            result.model.save(Path(out))
            cell_ = scored(model, load_model(out), task, started)
        return {**cell_, "steps": result.stopped_at, "lr": config.lr}

    cell(folder / "original.json", lambda: scored(model, model.copy(), task, time.monotonic()))
    reached = cell(folder / f"mansu-{seed}.json", mansu)["dev_choice"]
    print(f"\nmansu seed {seed}: dev four-way {reached:.3f}", flush=True)
    for method in BASELINES:
        path = folder / f"{method}-{seed}.json"
        found = cell(path, lambda m=method: baseline(m, reached))
        print(f"{method} seed {seed}: dev four-way {found['dev_choice']:.3f}", flush=True)


def cad_verdict(found: dict[str, Any]) -> str:
    """The verdict on a cell's recorded parts, by today's thresholds; - if not compared."""
    parts = [Divergence(**d) for d in found.get("cad", {}).get("models", {}).values()]
    return judge(*parts)[0] if parts else "-"


def table(folder: Path) -> list[str]:
    """Markdown of one model and task."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        cells.setdefault(path.stem.rsplit("-", 1)[0], []).append(json.loads(path.read_text()))
    methods = [m for m in ORDER if m in cells]
    labels = [(r["role"], r["label"]) for r in cells["original"][0]["rows"]]
    seeds = ", ".join(f"{m} {len(cells[m])}" for m in methods[1:])
    lines = [f"### {folder.name}", "", f"Seeds: {seeds}. Top-1 / four-way choice.", ""]
    head = [f"{m}{q}" for m in methods for q in ("", " nf4")]
    lines += ["| set (prompts) | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]

    def values(method: str, index: int, precision: str, key: str) -> list[float]:
        return [c["rows"][index]["models"][precision][key] for c in cells[method]]

    for k, (role, label) in enumerate(labels):
        n = cells["original"][0]["rows"][k]["n"]
        parts = [
            " / ".join(spread(values(m, k, q, key)) for key in ("top1", "choice"))
            for m in methods
            for q in ("fp", "nf4")
        ]
        lines.append(f"| {role}: {label} ({n}) | " + " | ".join(parts) + " |")
    if cells["original"][0]["perplexity"]:
        parts = [
            spread([c["perplexity"][q] for c in cells[m]], 2)
            for m in methods
            for q in ("fp", "nf4")
        ]
        lines.append("| perplexity | " + " | ".join(parts) + " |")
    forget = [k for k, (role, _) in enumerate(labels) if role == "forget"]

    def gap(method: str, key: str) -> str:
        return spread(
            [
                statistics.mean(
                    c["rows"][k]["models"]["nf4"][key] - c["rows"][k]["models"]["fp"][key]
                    for k in forget
                )
                for c in cells[method]
            ]
        )

    lines += ["", "| | " + " | ".join(methods[1:]) + " |", "|---" * len(methods) + "|"]
    rows: dict[str, Callable[[str], str]] = {
        "PTQ gap, top-1": lambda m: gap(m, "top1"),
        "PTQ gap, four-way": lambda m: gap(m, "choice"),
        "parameters edited": lambda m: f"{statistics.mean(c['share'] for c in cells[m]):.3%}",
        "edited codes that changed under NF4": lambda m: (
            f"{statistics.mean(c['survived'] / (c['edited_quantized'] or 1) for c in cells[m]):.2%}"
        ),
        "other codes that changed": lambda m: spread([c["collateral"] for c in cells[m]], 0),
        "update RMS / NF4 bin": lambda m: spread([c["update_over_bin"] for c in cells[m]]),
        "projection retention": lambda m: spread([c["projection"] for c in cells[m]]),
        "four-way, dev phrasings (matched)": lambda m: spread([c["dev_choice"] for c in cells[m]]),
        "CAD verdict": lambda m: ", ".join(map(cad_verdict, cells[m])),
        "seconds": lambda m: spread([c["seconds"] for c in cells[m]], 0),
    }
    for label, figure in rows.items():
        lines.append(f"| {label} | " + " | ".join(figure(m) for m in methods[1:]) + " |")
    return [*lines, ""]


def write_page() -> None:
    """docs/results.md from every finished cell and the hand-written notes."""
    notes = (DOCS / "results-notes.md").read_text()
    folders = sorted(p for p in (DOCS / "results").iterdir() if (p / "original.json").exists())
    tables = "\n".join(line for folder in folders for line in table(folder))
    write_text(DOCS / "results.md", notes.rstrip() + "\n\n" + tables)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the figures of docs/results.md.")
    parser.add_argument("--model", default="facts")
    parser.add_argument("--task", default="capitals")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--lr-graddiff", type=float, default=1e-4)
    parser.add_argument("--lr-npo", type=float, default=1e-4)
    parser.add_argument("--dense-steps", type=int, default=600, help="a baseline's steps at most")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    rates = {"graddiff": args.lr_graddiff, "npo": args.lr_npo}
    for seed in args.seeds:
        measure(args.model, args.task, seed, rates, args.dense_steps, args.threads)
    write_page()


if __name__ == "__main__":
    main()
