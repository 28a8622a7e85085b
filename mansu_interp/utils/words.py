"""Words and texts: numbers with their nouns, values as messages name them, what is no text."""

from __future__ import annotations

import codecs
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence

from ..errors import printable

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def number_of(n: int, noun: str) -> str:
    """1 -> "1 prompt", 1234 -> "1,234 prompts"; the noun is one that takes an s, or es."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{n:,} {noun}{plural * (n != 1)}"


def p_value(p: float) -> str:
    """0.042 -> "p = 0.04"; below 0.01 -> "p < 0.01", since no p is 0.00."""
    return "p < 0.01" if p < 0.01 else f"p = {p:.2f}"


def shortened(text: str, most: int) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= most else text[: most - 2] + " …"


def shown(value: object) -> str:
    """A value as messages name it: short ones as they are, others by their type."""
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
    return text if len(text) < 80 else text[:77] + "..."


def decode(data: bytes) -> str:
    """The text of a file that somebody wrote: UTF-8, or what its first bytes (a byte order mark, as
    Excel and Notepad write it) say.

    Raises:
        ValueError: it is in another encoding.
    """
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start:,} is no {'UTF-16' if marked else 'UTF-8'} (save it as UTF-8)"
        ) from error


def half_pair(text: str) -> str:
    """The first half of a surrogate pair that stands alone in a text, escaped; else nothing. Such a
    text can be neither written nor tokenized."""
    found = _HALF_PAIR.search(text)
    return ascii(found.group())[1:-1] if found else ""


def plain_words(text: str) -> str:
    """A text without case, accents and signs, its words between single spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c for c in letters if not unicodedata.combining(c) and c not in "'’ʼ`")
    return " ".join(re.findall(r"\w+", kept))


def mentions(text: str, names: Sequence[str]) -> bool:
    """Whether a text holds one of some names, as whole words in any case and with any accents."""
    within = f" {plain_words(text)} "
    return any((name := plain_words(n)) and f" {name} " in within for n in names)


class Shown:
    """A result with a short form for the console and one for notebooks, from a few facts."""

    MOST = 200
    """Letters of a fact that are shown."""

    def told(self) -> Mapping[str, object]:
        """The facts: name -> value."""
        raise NotImplementedError

    def _cells(self) -> list[tuple[str, str]]:
        def short(value: object) -> str:
            text = printable(f"{value:.4g}" if isinstance(value, float) else str(value))
            return shortened(text, self.MOST)

        return [(short(k), short(v)) for k, v in list(self.told().items())[:12]]

    def __repr__(self) -> str:
        facts = ", ".join(" ".join(filter(None, cell)) for cell in self._cells())
        return f"{type(self).__name__}({facts})"[:2000]

    def _repr_html_(self) -> str:
        cells = [(html.escape(k), html.escape(v)) for k, v in self._cells()]
        title = " ".join([type(self).__name__, *(v for k, v in cells if not k)])
        rows = "".join(f"<tr><td>{k}</td><td>{v}</td></tr>" for k, v in cells if k)
        return f"<table><caption>{title}</caption><tbody>{rows}</tbody></table>"
