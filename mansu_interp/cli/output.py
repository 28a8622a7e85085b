"""How results are printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """How results are printed; may stand anywhere on the command line."""

    quiet: bool = False
    """``--quiet``: nothing but the result."""
    json: bool = False
    """``--json``: the result as one JSON value on standard output."""

    @classmethod
    def split(cls, argv: list[str]) -> tuple[Output, list[str]]:
        """These two options, and the rest of the command line."""
        rest = [word for word in argv if word not in ("--quiet", "--json")]
        return cls("--quiet" in argv, "--json" in argv), rest
