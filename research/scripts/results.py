"""MANSU, GradDiff and NPO at matched forgetting, over seeds: the table "matched" of the pages.

    python research/scripts/results.py --model facts --task capitals --seeds 0 1 2
    python research/scripts/results.py --model facts --task countries --seeds 0 1 2
    python research/scripts/results.py --model models/SmolLM2-135M-Instruct --task world-capitals \
      --dense-steps 40
    python research/scripts/results.py --task capitals --seeds    # trains nothing, prints the table

Settings are those that the task file recommends for everybody (`mansu run` uses the same).
Each method's checkpoint is saved in the original's dtype and loaded again before it is scored on
the unseen phrasings, and after real NF4. Baselines stop where their four-way accuracy on the
*dev* phrasings first reaches MANSU's of the same seed. Finished trials are kept in runs/matched/
and not run again; what they say goes to the run "matched" of research/tables/runs.csv and sets.csv,
from which the table is printed.
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

from condense_runs import FULL, TABLES, condensed, merge, read_table

from mansu_interp.bench.scoreboard import spread
from mansu_interp.evaluation.scores import Flips, evaluate
from mansu_interp.evaluation.versions import EDITED, ORIGINAL, ModelVersion
from mansu_interp.export.ledger import changed_elements
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.run import run
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import get_method
from mansu_interp.unlearning.training import dev_choice
from mansu_interp.unlearning.unlearn import unlearn
from mansu_interp.utils.files import write_json
from mansu_interp.utils.records import to_json

TRIALS = Path(__file__).parents[2] / "runs" / "matched"
BASELINES = ("graddiff", "npo")
ORDER = ("mansu", *BASELINES)


def scored(
    model: LanguageModel,
    edited: LanguageModel,
    task: Task,
    started: float,
    version: ModelVersion = EDITED,
) -> dict[str, Any]:
    """All figures of one trial."""
    scores = evaluate({version: edited, version.after("nf4"): quantize(edited)}, task)
    survived = survival(model, edited, NF4())
    everything = sum(changed_elements(model, edited).values())
    return {
        "model": Path(model.name).name,
        "task": task.name,
        "scores": [to_json(row) for row in scores.rows],
        "perplexity": [to_json(text) for text in scores.perplexity],
        "flips": to_json(
            Flips.between(*(scores.right[version.after(q)]["choice"] for q in (None, "nf4")))
        ),
        "survival": to_json(survived),
        "dev_choice": dev_choice(edited, task),
        "edited": everything,
        "share": everything / model.n_parameters,
        "seconds": time.monotonic() - started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def trial(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished trial from disk, or made now."""
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
    """Run every method of one seed, and note in the tables what was found."""
    settings = replace(default_config(name, task_name), seed=seed, threads=threads)
    model = load_model(name)
    task = load_task(task_name, model, settings.score_pairs)
    folder = TRIALS / f"{Path(name).name}-{task.name}"

    def mansu() -> dict[str, Any]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as out:
            config = replace(settings, out=Path(out) / "run")
            result = run(config, lambda stage, d, n: print(f"\r{stage} {d}/{n}   ", end=""))
            made = scored(model, result.model, task, started)
            made["settings"] = {**result.report.config, "out": None}
            made["run_seconds"] = result.seconds
            return made

    def baseline(method: str, stop_at: float) -> dict[str, Any]:
        started = time.monotonic()
        config = get_method(method)(
            batch_size=settings.unlearn.batch_size,
            lr=rates[method],
            stop_at=stop_at,
            steps=dense_steps,
        )
        result = unlearn(model, task, config=config, seed=seed)
        with tempfile.TemporaryDirectory() as out:
            result.model.save(Path(out))
            made = scored(model, load_model(out), task, started)
        return {**made, "steps": result.stopped_at, "lr": config.lr}

    trial(
        folder / "original.json",
        lambda: scored(model, model.copy(), task, time.monotonic(), ORIGINAL),
    )
    reached = trial(folder / f"mansu-{seed}.json", mansu)["dev_choice"]
    print(f"\nmansu seed {seed}: dev four-way {reached:.3f}", flush=True)
    for method in BASELINES:
        path = folder / f"{method}-{seed}.json"
        found = trial(path, lambda m=method: baseline(m, reached))
        print(f"{method} seed {seed}: dev four-way {found['dev_choice']:.3f}", flush=True)
    found = [condensed(folder / f"{method}-{seed}.json") for method in ORDER]
    for k, table_name in enumerate(("runs", "sets")):
        merge(TABLES / f"{table_name}.csv", (row for parts in found for row in parts[k]))


def table(model: str, task: str) -> list[str]:
    """Markdown of one model and task, from the tables."""

    def read(name: str) -> list[dict[str, str]]:
        rows = read_table(TABLES / f"{name}.csv")
        return [r for r in rows if (r["run"], r["model"], r["task"]) == ("matched", model, task)]

    runs, sets = read("runs"), read("sets")
    methods = [m for m in ORDER if any(r["method"] == m for r in runs)]
    precisions = (FULL, "nf4")

    def values(rows: list[dict[str, str]], key: str, method: str, **given: str) -> list[float]:
        wanted = {"method": method, **given}
        found = [r[key] for r in rows if all(r[k] == v for k, v in wanted.items())]
        return [float(v) for v in found if v]

    head = [f"{m}{q}" for m in ("original", *methods) for q in ("", " nf4")]
    lines = [f"### {model}, {task}", "", "Top-1 / four-way choice.", ""]
    lines += ["| set (prompts) | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for role, label, n in dict.fromkeys((r["role"], r["set"], r["prompts"]) for r in sets):
        cells = []
        for method, suffix in ((ORDER[0], "_original"), *((m, "") for m in methods)):
            for q in precisions:
                one = {"quantizer": q, "role": role, "set": label}
                both = (values(sets, k + suffix, method, **one) for k in ("top1", "choice"))
                cells.append(" / ".join(spread(v[:1] if suffix else v) for v in both))
        lines.append(f"| {role}: {label} ({n}) | " + " | ".join(cells) + " |")
    first = [values(runs, "perplexity_original", ORDER[0], quantizer=q)[:1] for q in precisions]
    after = [values(runs, "perplexity", m, quantizer=q) for m in methods for q in precisions]
    if all(first):
        lines.append("| perplexity | " + " | ".join(spread(v, 2) for v in first + after) + " |")

    def across(key: str, q: str, digits: int = 3) -> Callable[[str], str]:
        return lambda m: spread(values(runs, key, m, quantizer=q), digits)

    def share(key: str, q: str) -> Callable[[str], str]:
        return lambda m: f"{statistics.mean(values(runs, key, m, quantizer=q)):.3%}"

    rows: dict[str, Callable[[str], str]] = {
        "PTQ gap, top-1": across("gap_top1", "nf4"),
        "PTQ gap, four-way": across("gap_choice", "nf4"),
        "parameters edited": share("edited_share", FULL),
        "edited codes that changed under NF4": share("codes_changed", "nf4"),
        "other codes that changed": across("other_codes_changed", "nf4", 0),
        "update RMS / NF4 bin": across("update_over_bin", "nf4"),
        "share that NF4 leaves": across("share_kept", "nf4"),
        "four-way, dev phrasings (matched)": across("dev_choice", FULL),
        "seconds": across("seconds", FULL, 0),
    }
    lines += ["", "| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for label, figure in rows.items():
        lines.append(f"| {label} | " + " | ".join(map(figure, methods)) + " |")
    return [*lines, ""]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Three methods at matched forgetting.")
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
    print("\n".join(table(Path(args.model).name, Path(args.task).stem)))


if __name__ == "__main__":
    main()
