"""Names that were given up, and what each is called now: old input gets one clear error.

Nothing is translated: whoever gives an old name is told the new one.
"""

from __future__ import annotations

from collections.abc import Iterable

METHODS = {
    "mansu-random": "mansu-random-mask",
    "mansu-whole": "mansu-whole-model",
    "mansu-unprojected": "mansu-no-projection",
    "mansu-unsteered": "mansu-no-offsets",
    "mansu-unsnapped": "mansu-no-floor",
}
"""Methods."""

SEED = "seed, one for the whole run"

SETTINGS = {
    "damping": "damage_damping",
    "hold": "retain_gradient_weight",
    "depth": "frozen_layers",
    "hardened": "robust",
    "circuit.selective": "circuit.retain_discount",
    "circuit.seed": SEED,
    "unlearn.method": "method",
    "unlearn.seed": SEED,
    "unlearn.push": "unlearn.ranking_weight",
    "unlearn.margin": "unlearn.training_margin",
    "unlearn.deepen": "unlearn.final_margin",
    "unlearn.reserve": "unlearn.quantization_margin",
    "unlearn.reserve_share": "unlearn.margin_budget",
    "unlearn.hold": "unlearn.hinge_weight",
    "unlearn.steer": "unlearn.offset_rate",
    "unlearn.attack": "unlearn.adversarial_steps",
    "unlearn.attack_rate": "unlearn.adversarial_lr",
    "unlearn.attack_weight": "unlearn.adversarial_weight",
    "unlearn.baseline": "unlearn, which holds the settings of the run's one method",
    "unlearn.baseline.npo_beta": "unlearn.beta of the method npo",
    "unlearn.baseline.simnpo_beta": "unlearn.beta of the method simnpo",
    "unlearn.baseline.simnpo_delta": "unlearn.delta of the method simnpo",
    "unlearn.baseline.dpo_beta": "unlearn.beta of the methods dpo and idkdpo",
    "unlearn.baseline.rmu_layer": "unlearn.layer of the method rmu",
    "unlearn.baseline.rmu_scale": "unlearn.scale of the method rmu",
    "unlearn.baseline.undial_beta": "unlearn.beta of the method undial",
    "unlearn.baseline.wga_beta": "unlearn.beta of the method wga",
    "unlearn.baseline.satimp_beta1": "unlearn.beta1 of the method satimp",
    "unlearn.baseline.satimp_beta2": "unlearn.beta2 of the method satimp",
    "unlearn.baseline.task_vector_scale": "unlearn.scale of the method task-vector",
    "unlearn.baseline.sure_percentile": "unlearn.percentile of the method sure",
}
"""Settings of a run, as in its ``config.json`` and in a task file's ``settings``."""

TASK_KEYS = {"guard": "retain_unscored", "twins": "reference_models", "hardened": "robust"}
"""Keys of a task file."""


def renamed_setting(settings: object, inside: str = "") -> str:
    """What to say of the first renamed setting in a nested dictionary; empty where there is none.

    Arguments:
        settings: JSON values.
        inside: name of the setting that holds them, such as ``unlearn``.
    """
    for key, value in settings.items() if isinstance(settings, dict) else ():
        name = f"{inside}.{key}" if inside else str(key)
        found = renamed_setting(value, name)
        if not found and name in SETTINGS:
            found = f"{name} is now {SETTINGS[name]}"
        if found:
            return found
    return ""


def renamed_option(words: Iterable[str]) -> str:
    """What to say of the first renamed option on a command line; empty where there is none."""
    for word in words:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        new = SETTINGS.get(name) if word.startswith("--") else None
        if new:
            first, *rest = new.split(" ", 1)
            option = "--" + first.rstrip(",").replace("_", "-")
            comma = "," * first.endswith(",")
            return f"{word.split('=')[0]} is now {' '.join([option + comma, *rest])}"
    return ""


def renamed_key(spec: object) -> str:
    """The same of the first renamed key of a task file."""
    for key in spec if isinstance(spec, dict) else ():
        if key in TASK_KEYS:
            return f"{key} is now {TASK_KEYS[key]}"
    return ""
