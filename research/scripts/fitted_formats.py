"""What training through fitted formats does on the dev phrasings, beside what it might be
replaced by.

    python research/scripts/fitted_formats.py --task countries --seed 10

Trains the embedded model inside the mask that ships, with the task's settings: as they are,
through fitted formats, for an exact format whose grid one of them has, and for a fine one
alone. After each fitted
format: by how many nats the forget answers stand higher among their relation's answers than in
full precision (mean and spread over prompts), and how many come back to the first of four ranks,
or are gone from it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from mansu_interp.losses.accuracy import BATCH, right
from mansu_interp.losses.counterfactual import CounterfactualTargets, model_answer_excess
from mansu_interp.masks.mask import Mask
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model, use_threads
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn

MASKS = Path(__file__).parents[2] / "circuits"
FITTED = ("q4_k_m", "iq4_nl", "gptq-g128")
ARMS = {
    "nf4": {},
    "nf4, through all three": {"train_through": FITTED},
    "nf4, int4-sym-g128": {"survive": ("nf4", "int4-sym-g128")},
    "q8_0": {"survive": ("q8_0",)},
}
"""``int4-sym-g128`` is the grid on which GPTQ rounds; ``q8_0`` has the finest cells."""


@torch.no_grad()
def looked_at(
    model: LanguageModel, pairs: PairSet, targets: CounterfactualTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    """The excess (nats) of each pair's answer, and whether it ranks first of four."""
    parts = [model_answer_excess(model, part, targets) for part in pairs.parts(BATCH)]
    return torch.cat(parts), right(model, list(pairs))[1]


def main() -> None:
    """One row for each of the `ARMS`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="countries")
    parser.add_argument("--seed", type=int, default=10)
    given = parser.parse_args()
    model = load_model("facts")
    use_threads(model, 1)
    task = load_task(given.task, model)
    usual = default_config("facts", given.task).unlearn
    assert isinstance(usual, Mansu)
    mask = Mask.load(MASKS / f"facts-{given.task}.mask.safetensors")
    dev = tuple(p for pairs in task.scored["dev"]["forget"].values() for p in pairs)
    pairs = PairSet("forget", dev)
    targets = CounterfactualTargets(model, pairs, given.seed)
    print(f"| made for | seconds | first of four | {' | '.join(FITTED)} |")
    for name, settings in ARMS.items():
        start = time.process_time()
        edited = unlearn(model, task, mask, replace(usual, **settings), seed=given.seed).model
        took = time.process_time() - start
        excess, first = looked_at(edited, pairs, targets)
        cells = [name, f"{took:.0f}", f"{float(first.float().mean()):.3f}"]
        for quantizer in FITTED:
            after, still = looked_at(quantize(edited, quantizer, task.calibration), pairs, targets)
            rise, back, gone = (
                after - excess,
                int((still & ~first).sum()),
                int((first & ~still).sum()),
            )
            cells.append(f"{rise.mean():+.3f} ± {rise.std():.3f}, {back} / {gone}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
