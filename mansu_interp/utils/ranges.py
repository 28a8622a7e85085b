"""Settings within their range and arguments of their kind, or an error that says what was meant.

Knows the project's classes by their names alone, so that every room can use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import ConfigError, MansuError

MEANT = {
    ("PairSet", "Task"): "task.forget, or another of its sets",
    ("PairSet", "Pair"): 'PairSet("mine", (pair,))',
    ("PairSet", "list"): 'PairSet("mine", tuple(pairs)), of Pair objects',
    ("PairSet", "tuple"): 'PairSet("mine", pairs), of Pair objects',
    ("PairSet", "str"): "load_task(name, model).forget",
    ("Task", "str"): "load_task(name, model)",
    ("Task", "PosixPath"): "load_task(path, model)",
    ("Task", "PairSet"): "the Task whose set this is",
    ("LanguageModel", "str"): "load_model(name)",
    ("LanguageModel", "PosixPath"): "load_model(path)",
    ("LanguageModel", "Unlearned"): "its .model",
    ("Mask", "Circuit"): "circuit_mask(circuit, model)",
    ("Mask", "str"): "Mask.load(Path(path))",
    ("Mask", "PosixPath"): "Mask.load(path)",
    ("Circuit", "Attribution"): "discover(model, pairs), which also chooses edges",
    ("Circuit", "str"): "Circuit.load(Path(path))",
    ("Circuit", "PosixPath"): "Circuit.load(path)",
    ("Circuit", "Mask"): "the circuit from which the mask was made",
    ("Attribution", "Circuit"): "attribute(model, pairs)",
    ("ModelVersion", "str"): "ModelVersion(name, quantizer)",
    ("list", "PairSet"): "[pairs], or task.retain_sets",
    ("list", "Task"): "task.retain_sets",
    ("Mapping", "LanguageModel"): '{"unlearned": model}',
    ("Mapping", "Unlearned"): '{"unlearned": result.model}',
    ("ndarray", "Circuit"): "circuit.edges, or circuit.scores for a ranking",
    ("ndarray", "Attribution"): "its .scores",
}
"""(expected class, class that came) -> what was probably meant."""


def check_range(
    config: object,
    *names: str,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Raise ConfigError unless some settings lie between bounds.

    Arguments:
        config: whose settings are looked at; None counts as not given, and fits.
        names: which ones, each a number or a tuple of numbers; NaN and infinity never fit.
        at_least: lower bound, itself allowed.
        above: lower bound, itself not allowed.
        at_most: upper bound, itself allowed.
        below: upper bound, itself not allowed.
    """
    bounds = (
        ("at least", at_least, lambda v, b: v >= b),
        ("above", above, lambda v, b: v > b),
        ("at most", at_most, lambda v, b: v <= b),
        ("below", below, lambda v, b: v < b),
    )
    given = [(word, bound, fits) for word, bound, fits in bounds if bound is not None]
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if all(_is_finite(v) and all(fits(v, b) for _, b, fits in given) for v in values):
            continue
        words = " and ".join(f"{word} {bound:g}" for word, bound, _ in given) or "finite"
        raise ConfigError(f"{name} must be {words}; got {value}.")


def check_seeds(config: object, *names: str) -> None:
    """Raise ConfigError unless some settings are seeds that every generator takes."""
    check_range(config, *names, at_least=-(1 << 63), below=1 << 63)


def _is_finite(value: float) -> bool:
    """Also of whole numbers that no float is as large as."""
    return isinstance(value, int) or math.isfinite(value)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUn' else 'a'} {name}"


def expect_kind(
    error: type[MansuError], argument: str, value: object, *kinds: type | str | None
) -> None:
    """Raise ``error`` unless an argument is of one of some classes.

    Arguments:
        error: of the room whose function it is.
        argument: its name.
        value: what came.
        kinds: the classes, or their names where they are not imported; the first is the one that
            the message proposes. None: it may be None.
    """
    if value is None and None in kinds:
        return
    names = [c.__name__ for c in type(value).__mro__]
    wanted = [kind if isinstance(kind, str) else kind.__name__ for kind in kinds if kind]
    if isinstance(value, tuple(k for k in kinds if isinstance(k, type))):
        return
    if any(isinstance(k, str) and k in names for k in kinds):
        return
    first = wanted[0]
    meant = next((MEANT[first, n] for n in names if (first, n) in MEANT), "")
    if first == "LanguageModel" and "PreTrainedModel" in names:
        meant = "LanguageModel(name, model, tokenizer)"
    if isinstance(value, dict) and first.endswith("Config"):
        meant = f"{first}(**settings)"
    given = f"{value!r:.60}" if isinstance(value, (str, int, float)) else _a(names[0])
    message = f"{argument}: got {given}, expected {' or '.join(map(_a, wanted))}."
    raise error(message + (f" Did you mean {meant}?" if meant else ""))


def expect_values(
    error: type[MansuError], argument: str, values: object, kind: type, key: type = str
) -> None:
    """Raise ``error`` unless an argument is a mapping from ``key`` to ``kind``, and not empty."""
    expect_kind(error, argument, values, Mapping)
    assert isinstance(values, Mapping)
    for name, value in values.items():
        expect_kind(error, f"a key of {argument}", name, key)
        expect_kind(error, f"{argument}[{str(name)[:60]!r}]", value, kind)
