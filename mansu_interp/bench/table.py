"""The benchmark's table: one row a trial and quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.relearning import CHANCE, Relearning
from ..circuits.compare import Divergence
from ..evaluation.properties import properties
from ..evaluation.scores import Scores
from .trial import Trial


@dataclass(frozen=True)
class Chosen:
    """A method's winning step size on one model, task and level, with a trial per seed."""

    trials: list[Trial]
    reached: bool
    """Whether the first seed's try reached the level."""


def _complete(trial: Trial, quantizer: str) -> bool:
    found = trial.read() or {}
    return "error" in found or quantizer in found.get("quantizers", {})


def _row(
    trial: Trial, found: dict[str, Any], original: dict[str, Any], quantizer: str, reached: bool
) -> dict[str, Any]:
    """One line of the table."""
    out: dict[str, Any] = {
        "model": Path(trial.model).name,
        "task": Path(trial.task).stem,
        "level": trial.level,
        "method": trial.method,
        "seed": trial.seed,
        "strength": trial.strength,
        "lr": trial.config.unlearn.lr,
        "quantizer": quantizer,
    }
    if "error" in found:
        return {**out, "error": found["error"]}
    rows = []
    for mine, theirs in zip(found["rows"], original["rows"], strict=True):
        # The original's, so that trials of older versions are judged as the others are.
        row = {**mine, "chance_top1": theirs.get("chance_top1", 0.0), "models": {}}
        for name, models in (("original", theirs["models"]), ("unlearned", mine["models"])):
            row["models"][name] = models["fp"]
            row["models"][f"{name} {quantizer}"] = models[quantizer]
        rows.append(row)
    perplexity = None
    if found["perplexity"]:
        perplexity = {
            name + suffix: source["perplexity"][key]
            for name, source in (("original", original), ("unlearned", found))
            for suffix, key in (("", "fp"), (f" {quantizer}", quantizer))
        }
    scores = Scores(rows, perplexity)
    cad = found.get("cad")
    parts = {k: Divergence(**d) for k, d in cad["models"].items()} if cad else {}
    attack = Relearning.from_json(found["relearning"]) if "relearning" in found else None
    forget, retain, gap, erased = properties(scores, [quantizer], attack)
    lived = found["quantizers"][quantizer]
    after = f"unlearned {quantizer}"
    out |= {
        "reached": found.get("dev", {}).get("forget", 9.0) <= trial.level,
        "searched": reached,
        "steps": found.get("steps"),
        "dev_forget": found.get("dev", {}).get("forget"),
        "prompts": sum(r["n"] for r in rows if r["role"] == "forget"),
    }
    for key in ("choice", "top1"):
        out[f"forget_{key}_original"] = scores.mean("forget", key, "original")
        out[f"forget_{key}_original_q"] = scores.mean("forget", key, f"original {quantizer}")
        out[f"forget_{key}"] = scores.mean("forget", key, "unlearned")
        out[f"forget_{key}_q"] = scores.mean("forget", key, after)
        out[f"gap_{key}"] = out[f"forget_{key}_q"] - out[f"forget_{key}"]
        out[f"retain_{key}"] = scores.mean("retain", key, "unlearned")
        out[f"retain_{key}_q"] = scores.mean("retain", key, after)
    out |= {
        "above_chance": out["forget_choice"] - CHANCE,
        "forgets": forget["passed"],
        "forget_margin": forget["margin"],
        "retains": retain["passed"],
        "retain_margin": retain["margin"],
        "stays": gap["passed"],
        "gap_margin": gap["margin"],
        **{key: lived.get("flips", {}).get(key) for key in ("back", "gone", "p")},
        "erased": erased["passed"],
        "relearnt_choice": attack.up_to(attack.marks[-1]) if attack else None,
        "relearnt_top1": attack.up_to(attack.marks[-1], "top1") if attack else None,
        "cad": found.get("erasure", {}).get("verdict"),
        "cad_score": found.get("erasure", {}).get("cad"),
        "alignment": parts["unlearned"].alignment if cad else None,
        "edited_share": found["edited"] / found["parameters"],
        "codes_changed": lived["survived"] / lived["edited"] if lived["edited"] else None,
        "collateral": lived["collateral"],
        "update_over_bin": lived["update_over_bin"],
        "projection": lived["projection"],
        "noise_over_signal": lived["noise_over_signal"],
        "seconds": found.get("seconds"),
        "peak_gb": found.get("peak_gb"),
    }
    return out


def tidy(
    originals: Sequence[Trial], chosen: Sequence[Chosen], quantizers: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per trial and quantizer.

    ``gap_*`` is accuracy after minus before the quantizer; margins are positive where a property is
    met (see `properties`); ``retain_margin`` counts the largest change of any retain score against
    the original at the same precision. ``back``, ``gone`` and ``p`` are the prompts behind
    ``gap_choice`` (`Flips`); trials of older versions lack them. ``reached`` says whether this seed
    came down to the level, ``searched`` whether the seed that chose the step size did.
    """
    reference = {(c.model, c.task): c.read() or {} for c in originals}
    return [
        _row(
            trial, trial.read() or {}, reference[trial.model, trial.task], quantizer, group.reached
        )
        for group in chosen
        for trial in group.trials
        for quantizer in quantizers
        if _complete(trial, quantizer)
        and quantizer in reference[trial.model, trial.task].get("quantizers", {})
    ]
