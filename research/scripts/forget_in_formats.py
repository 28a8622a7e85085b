"""What becomes of an edited checkpoint's forgetting, format by format; of its forget sets alone.

    python research/scripts/forget_in_formats.py ORIGINAL EDITED --task world-capitals \
      --quantizers nf4 q4_0 q4_k_m q3_k_m q2_k

A tenth of the time of `mansu run --quantizers`, which scores everything, the original in every
format included. Of each format: the share of the edits whose code changes, other codes that
change, the share of the edit that is kept, how often answers rank first and last of four on the
unseen phrasings, the gap to full precision, and the prompts that come back and go, with p.
"""

from __future__ import annotations

import argparse

import torch

from mansu_interp.evaluation.scores import Scores, evaluate
from mansu_interp.evaluation.versions import EDITED, ModelVersion
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task
from mansu_interp.utils.shipped import quantizer_names


def scored(version: ModelVersion, model: LanguageModel, task: Task) -> Scores:
    """A version on the forget sets."""
    return evaluate({version: model}, task, role="forget")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Forgetting of a checkpoint, format by format.")
    parser.add_argument("original")
    parser.add_argument("edited")
    parser.add_argument("--task", required=True)
    parser.add_argument("--quantizers", nargs="+", default=["nf4"])
    parser.add_argument("--pairs", type=int, default=100, help="prompts a set")
    given = parser.parse_args()
    torch.set_num_threads(1)
    original, edited = load_model(given.original), load_model(given.edited)
    task = load_task(given.task, original, given.pairs)
    scores = scored(EDITED, edited, task)
    print(
        "| format | survive | other codes | kept | first of four | last | gap | back / gone (p) |"
    )
    print("|---" * 8 + "|")
    before = scores.mean("forget", "choice", EDITED)
    print(
        f"| full | | | | {before:.3f} | {scores.mean_last('forget', EDITED):.3f} | | |", flush=True
    )
    for name in quantizer_names(given.quantizers):
        version = EDITED.after(name)
        after = quantize(edited, name, calibration=task.calibration)
        scores = scores.beside(scored(version, after, task))
        found = survival(original, edited, name, calibration=task.calibration)
        kept = "–" if found.share_kept is None else f"{found.share_kept:.3f}"
        first, last = scores.mean("forget", "choice", version), scores.mean_last("forget", version)
        flips = scores.flips(EDITED, version, "choice")
        told = f"{flips.back} / {flips.gone} ({flips.p:.2f})" if flips else "–"
        share = found.survived / max(1, found.edited)
        print(
            f"| `{name}` | {share:.1%} | {found.collateral:,} | {kept} | {first:.3f} | {last:.3f} "
            f"| {first - before:+.3f} | {told} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
