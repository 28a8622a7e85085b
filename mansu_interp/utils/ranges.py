"""Settings within their range and arguments of their kind, or an error that says what was meant.

Knows the project's classes by their names alone, so that every room can use it.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import FunctionType, UnionType
from typing import Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import ConfigError, MansuError

P = ParamSpec("P")
T = TypeVar("T")

MEANT = {
    ("PairSet", "Task"): "task.forget, or another of its sets",
    ("PairSet", "Pair"): 'PairSet("mine", (pair,))',
    ("PairSet", "list"): 'PairSet("mine", tuple(pairs)), of Pair objects',
    ("PairSet", "tuple"): 'PairSet("mine", pairs), of Pair objects',
    ("PairSet", "str"): "read_prompts(path, model), or load_task(name, model).forget",
    ("PairSet", "PosixPath"): "read_prompts(path, model)",
    ("PairSet", "WindowsPath"): "read_prompts(path, model)",
    ("Task", "str"): "load_task(name, model)",
    ("Task", "PosixPath"): "load_task(path, model)",
    ("Task", "PairSet"): "the Task whose set this is",
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
    ("Sequence of PairSet", "PairSet"): "[pairs], or task.retain_sets",
    ("Sequence of PairSet", "Task"): "task.retain_sets",
    ("Sequence of Pair", "Task"): "task.forget, or another of its sets",
    ("Mapping", "LanguageModel"): '{"unlearned": model}',
    ("Mapping", "Unlearned"): '{"unlearned": result.model}',
    ("ndarray", "Circuit"): "circuit.edges, or circuit.scores for a ranking",
    ("ndarray", "Attribution"): "its .scores",
}
"""(expected class, class that came) -> what was probably meant."""


GUARDED = "has_entrance"
"""Attribute of a function that `entrance` decorates."""
MADE = {
    "LanguageModel": ("models.hooked", "is_model", "as_language_model"),
    "HookedModel": ("models.hooked", "is_model", "as_model"),
}
"""Class -> the module that makes one of what people hold instead, whether it can, and how."""


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
    return f"{'an' if name[0] in 'AEIOUaeioun' else 'a'} {name}"


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
    if isinstance(value, tuple(k for k in kinds if isinstance(k, type))):
        return
    if any(isinstance(k, str) and k in _classes(value) for k in kinds):
        return
    wanted = [kind if isinstance(kind, str) else kind.__name__ for kind in kinds if kind]
    raise error(_unexpected(argument, value, wanted))


def _classes(value: object) -> list[str]:
    """Names of a value's class and of those that it inherits from."""
    return [c.__name__ for c in type(value).__mro__]


def _unexpected(argument: str, value: object, wanted: Sequence[str]) -> str:
    """One sentence: what came, what was expected, and what was probably meant."""
    names, first = _classes(value), wanted[0]
    meant = next((MEANT[first, n] for n in names if (first, n) in MEANT), "")
    if isinstance(value, dict) and first.endswith("Config"):
        meant = f"{first}(**settings)"
    given = f"{value!r:.60}" if isinstance(value, (str, int, float)) else _a(names[0])
    if (shape := getattr(value, "shape", None)) is not None and "ndarray" in str(wanted):
        given += f" of shape {tuple(shape)}"
    words = [w if w[0] in "'0123456789" else _a(w) for w in wanted[: 1 if meant else None]]
    message = f"{argument}: got {given}, expected {' or '.join(words)}."
    return message + (f" Did you mean {meant}?" if meant else "")


class _ByName(type):
    """Class of a stand-in for a class that a module imports for its annotations alone."""

    def __instancecheck__(cls, value: object) -> bool:
        return cls.__name__ in _classes(value)


class _Names(dict[str, object]):
    """What an annotation's names mean in a module."""

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return _ByName(name, (), {})


def _fits(value: object, hint: object) -> bool:
    """Whether a value is what an annotation says, and what a sequence holds, too."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is Callable:
        return callable(value)
    if hint is None or hint in (int, float):
        number = {int: Integral, float: Real}
        return value is None if hint is None else isinstance(value, number[cast(type, hint)])
    kind = origin or hint
    if not isinstance(kind, type):  # type variables, say
        return True
    if not isinstance(value, kind) or (isinstance(value, (str, bytes)) and args):
        return False
    if isinstance(value, Collection) and (len(args) == 1 or args[1:] == (...,)):
        inner = args[0]
        if isinstance(inner, type) and not get_args(inner) and inner not in (int, float):
            return all(isinstance(v, inner) for v in value)  # of many pairs, say
        return all(_fits(v, inner) for v in value)
    return True


def _words(hint: object, value: object) -> list[str]:
    """The classes, or values, that an annotation names to somebody with this value; None is not
    told."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [word for a in args if a not in (None, type(None)) for word in _words(a, value)]
    if origin is Literal:
        return [repr(a) for a in args]
    if origin is Callable:
        return ["function"]
    array = getattr(hint, "array_type", None)  # jaxtyping's
    kind = array if array and not isinstance(value, array) else origin or hint
    name = getattr(kind, "__name__", str(hint))
    inner = _words(args[0], value) if len(args) == 1 or args[1:] == (...,) else []
    return [f"{name} of {' or '.join(inner)}" if inner else name]


def _made(value: object, hint: object) -> object:
    """A value, or what a function of the package makes of it where a class is expected that people
    hold in other forms (`MADE`); of a mapping, of each of its values."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        makers = sorted(n for n in map(_name, args) if n in MADE)  # a HookedModel, if it may be
        # A model of another kind can be called, and is none the less no function that makes one.
        kinds = [kind for kind in args if get_origin(kind) is not Callable]
        fits = any(_fits(value, kind) for kind in kinds)
        return value if fits or not makers else _make(value, makers[0])
    if _name(hint) in MADE and not _fits(value, hint):
        return _make(value, _name(hint))
    if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping):
        return {k: _made(v, args[1]) for k, v in value.items()}
    return value


def _name(kind: object) -> str:
    return getattr(kind, "__name__", "")


def _make(value: object, wanted: str) -> object:
    """The value, made into what is wanted if it can be."""
    module, test, make = MADE[wanted]
    found = importlib.import_module(f"..{module}", __package__)
    return getattr(found, make)(value) if getattr(found, test)(value) else value


def _swapped(
    name: str, other: str, given: Mapping[str, object], hints: Mapping[str, object]
) -> bool:
    """Whether two arguments were given in each other's place."""
    return (
        name != other
        and other in hints
        and _fits(given[other], hints[name])
        and _fits(given[name], hints[other])
    )


def entrance(error: type[MansuError]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a public function or method: its arguments are what their annotations say, or
    ``error`` is raised before anything is done. Where a model is expected, what people hold instead
    is made into one (`MADE`).

    Arguments:
        error: of the room whose function it is.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        owner = cast(FunctionType, inspect.unwrap(function))

        @cache
        def hints() -> dict[str, object]:
            names = _Names(owner.__globals__)
            return {
                name: eval(parameter.annotation, {}, names)  # our own source
                for name, parameter in signature.parameters.items()
                if isinstance(parameter.annotation, str)
                and parameter.kind is not parameter.VAR_KEYWORD
            }

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            for name, hint in hints().items():
                if name not in given:
                    continue
                given[name] = _made(given[name], hint)
                if not _fits(given[name], hint):
                    message = _unexpected(name, given[name], _words(hint, given[name]))
                    if any(_swapped(name, other, given, hints()) for other in given):
                        message += f" The order is {owner.__name__}({', '.join(given)})."
                    raise error(message)
            return function(*bound.args, **bound.kwargs)

        setattr(checked, GUARDED, True)
        return checked

    return decorate


_fields = cache(get_type_hints)


def check_kinds(record: object, error: type[MansuError] = ConfigError) -> None:
    """Raise ``error`` unless every field of a dataclass is what its annotation says."""
    for name, hint in _fields(type(record)).items():
        if not _fits(value := getattr(record, name), hint):
            raise error(_unexpected(name, value, _words(hint, value)))


def expect_values(
    error: type[MansuError], argument: str, values: object, kind: type, key: type = str
) -> None:
    """Raise ``error`` unless an argument is a mapping from ``key`` to ``kind``, and not empty."""
    expect_kind(error, argument, values, Mapping)
    assert isinstance(values, Mapping)
    for name, value in values.items():
        expect_kind(error, f"a key of {argument}", name, key)
        expect_kind(error, f"{argument}[{str(name)[:60]!r}]", value, kind)
