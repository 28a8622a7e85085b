"""What ships with the package: where its data lie, and which models are embedded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ..errors import ConfigError

DATA = Path(__file__).parents[1] / "data"


def is_embedded(model: str) -> bool:
    """Whether a model ships with the package."""
    # Path.exists raises over 255 characters
    return Path(model).name == model and os.path.exists(DATA / "models" / model / "config.json")


@dataclass(frozen=True)
class Formats:
    """Quantizers that people use with an engine."""

    exact: tuple[str, ...]
    """An edit can be made to survive them."""
    fitted: tuple[str, ...]
    """What survives them is measured."""
    rescaling: tuple[str, ...] = ()
    """Of these the ones that move scales between layers: training cannot go through them."""

    def of(self, kind: Literal["exact", "through"] | None) -> tuple[str, ...]:
        """All, the exact ones, or those that training can go through without a promise."""
        if kind == "exact":
            return self.exact
        through = tuple(q for q in self.fitted if q not in self.rescaling)
        return through if kind else self.exact + self.fitted


ENGINES = {
    "llama.cpp": Formats(
        ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"),
        ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl"),
    ),
    "transformers": Formats(("nf4", "fp4", "int8", "torchao-int4-g128"), ("hqq",)),
    "vllm": Formats(
        ("nf4", "int4-sym-g128", "mxfp4", "nvfp4"),
        ("awq-g128", "autoround-g128", "gptq-g128"),
        ("awq-g128",),
    ),
}
"""What runs models -> what it quantizes them to. ``nf4-dq`` has the codes of ``nf4``, and
``int4-sym-g128`` the cells of compressed-tensors' W4A16."""

LOADED = (
    *("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "quanto-int4", "hqq"),
    *(f"int4{rule}-g{group}" for rule in ("", "-sym") for group in (32, 64, 128)),
)
"""Quantizers that a folder is loaded with, on any processor: by transformers, ``hqq`` by its own
package."""


MEANT = {
    "w4a16": "int4-sym-g128",
    "compressed-tensors": "int4-sym-g128",
    "int4": "int4-g128",
    "gptq": "gptq-g128",
    "awq": "awq-g128",
    "autoround": "autoround-g128",
    "bitsandbytes": "nf4",
    "torchao": "torchao-int4-g128",
    "ollama": "llama.cpp",
    "lm-studio": "llama.cpp",
    "gguf": "llama.cpp",
}
"""What others call a format or an engine -> its name here. For suggestions: these are no names."""


def unknown_quantizer(name: str, known: Iterable[str]) -> str:
    """What to say of a name that no quantizer has: what was probably meant.

    Arguments:
        name: that was given.
        known: the quantizers' names.
    """
    engines = f"Engines: {', '.join(ENGINES)}; `mansu list` names every quantizer."
    if engine := ENGINES.get(name.lower()):
        formats = ", ".join(engine.of(None))
        return f"{name} is an engine; expected a quantizer, such as one of its formats: {formats}."
    meant = MEANT.get(name.lower())
    near = [meant] if meant else get_close_matches(name.lower(), (*known, *ENGINES), n=3)
    ask = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"Unknown quantizer {name!r:.60}{ask} {engines}"


def quantizer_names(
    given: Iterable[str], only: Literal["exact", "through"] | None = None
) -> tuple[str, ...]:
    """Names of quantizers; those of `ENGINES`, and ``all`` of them, replaced by their formats.

    Arguments:
        given: names in any case, separated by spaces or commas.
        only: which of an engine's formats (`Formats.of`); default: all.

    Raises:
        ConfigError: see `split_names`.
    """
    names = tuple(name.lower() for name in split_names(given))
    out: list[str] = []
    for name in names:
        engines = engines_of(name)
        found = [q for e in engines for q in e.of(only)]
        new = [q for q in dict.fromkeys(found) if q not in (*out, *names)]
        out += new if engines else [name]
    return tuple(out)


def engines_of(name: str) -> list[Formats]:
    """The engines that a name stands for, if any."""
    return [engine for key, engine in ENGINES.items() if name in (key, "all")]


def split_names(given: Iterable[str]) -> tuple[str, ...]:
    """Names separated by spaces or commas.

    Raises:
        ConfigError: something else than a list of texts.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"Names: got {given!r:.60}, expected several, such as ('nf4', 'q4_0').")
    parts = tuple(given)
    if odd := [part for part in parts if not isinstance(part, str)]:
        raise ConfigError(f"Names: got {odd[0]!r:.60}, expected texts, such as ('nf4', 'q4_0').")
    return tuple(n for part in parts for n in part.replace(",", " ").split())
