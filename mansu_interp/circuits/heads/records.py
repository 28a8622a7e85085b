"""What is said of a head, as a record, a table and JSON."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import CircuitError
from ...utils.files import Json

if TYPE_CHECKING:
    import pandas

ROLES = ("subject", "self", "first", "previous", "relation")
"""Of the tokens that the last one looks at; each has the first that fits: where clean and corrupt
prompt differ, the last token itself, the first token, the one before the last, every other word."""
SCORES = ("previous-token", "induction", "copying", "name-mover", "answer-mover")
"""What a head may be called, by the score behind the name (docs/circuits.md): mean attention to the
token before (Olsson et al. 2022), or behind the last occurrence of the same token (the same), in
random tokens that come twice; sum of the OV eigenvalues over the sum of their sizes (Elhage et al.
2021); share of pairs in which it looks most at the answer's own token (Wang et al. 2022), or, where
the prompt lacks it, at the subject, and raises the answer above the rival and all distractors."""
MOST = 0.5
"""Score from which it is most of what a head does: half of its attention, or of the pairs."""


def _listed(parts: tuple[tuple[str, float], ...], digits: str) -> str:
    return ", ".join(f"{name} {value:{digits}}" for name, value in parts)


@dataclass(frozen=True)
class ExplainedHead:
    """What a head does on some pairs, as means over them."""

    head: str
    """Its id."""
    attention: dict[str, float]
    """Attention from the last token by role of what it looks at; adds up to 1."""
    looks_at: str
    """The role that has most of it."""
    logit: float
    """Attention logit of the token of that role that it looks at most, above the mean over all
    tokens that it sees (nats)."""
    keys: tuple[tuple[str, float], ...]
    """The writers that the keys read and that make most of this logit (nats), by size."""
    query: tuple[tuple[str, float], ...]
    """The same of what the query reads."""
    effect: float
    """Direct effect on the answer's logit minus that on the rival's."""
    raises: tuple[tuple[str, float], ...]
    """The tokens that it raises most, in logits beyond the mean token."""
    lowers: tuple[tuple[str, float], ...]
    """The tokens that it lowers most."""
    scores: dict[str, float]
    """By name of a role, -1 to 1 (see `SCORES`)."""
    chance: dict[str, float]
    """The largest of these scores among random heads."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Names with their scores, the highest first: those above all random heads that are most
        of what the head does (more than `MOST`)."""
        high = {n: s for n, s in self.scores.items() if s > max(self.chance[n], MOST)}
        return tuple(f"{n} {high[n]:.2f}" for n in sorted(high, key=lambda n: -high[n]))

    @property
    def sees(self) -> str:
        """What it looks at, with its share."""
        return f"{self.looks_at} {self.attention[self.looks_at]:.2f}"

    def told(self) -> dict[str, str]:
        """A row of a table."""
        return {
            "head": self.head,
            "role": ", ".join(self.roles) or "none",
            "looks at": self.sees,
            "keys from": _listed(self.keys, "+.2f"),
            "query from": _listed(self.query, "+.2f"),
            "answer − rival": f"{self.effect:+.2f}",
            "raises": ", ".join(repr(token) for token, _ in self.raises[:3]),
        }

    def to_json(self) -> dict[str, Json]:
        """What a view shows of it, with four significant digits."""

        def rounded(parts: tuple[tuple[str, float], ...]) -> list[list[Json]]:
            return [[name, float(f"{value:.4g}")] for name, value in parts]

        return {
            "roles": list(self.roles),
            "attention": {n: float(f"{v:.3g}") for n, v in self.attention.items()},
            "looks_at": self.looks_at,
            "logit": float(f"{self.logit:.4g}"),
            "keys": rounded(self.keys),
            "query": rounded(self.query),
            "effect": float(f"{self.effect:.4g}"),
        }

    def __repr__(self) -> str:
        facts = (f"{k} {v}" for k, v in list(self.told().items())[1:])
        return f"ExplainedHead({self.head}: {'; '.join(facts)})"


@dataclass(frozen=True)
class ExplainedHeads:
    """Heads in the order in which they compute."""

    heads: tuple[ExplainedHead, ...]

    def __iter__(self) -> Iterator[ExplainedHead]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, head: str) -> ExplainedHead:
        """A head by its id.

        Raises:
            CircuitError: it was not explained.
        """
        if found := next((h for h in self.heads if h.head == head), None):
            return found
        known = ", ".join(h.head for h in self.heads) or "none"
        raise CircuitError(f"{head!r} was not explained; these were: {known}.")

    def to_pandas(self) -> pandas.DataFrame:
        """One row a head, with every number in a column of its own."""
        import pandas

        rows = [
            {
                **{k: h.told()[k] for k in ("head", "role")},
                **{f"attention to {role}": share for role, share in h.attention.items()},
                "attention logit": h.logit,
                **{k: h.told()[k] for k in ("keys from", "query from")},
                "effect": h.effect,
                **h.scores,
                "raises": [token for token, _ in h.raises],
                "lowers": [token for token, _ in h.lowers],
            }
            for h in self.heads
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        rows = [h.told() for h in self.heads]
        if not rows:
            return "ExplainedHeads(none)"
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        def row(cells: list[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"

        rows = [h.told() for h in self.heads]
        body = "".join(row(list(r.values()), "td") for r in rows)
        head = row(list(rows[0]), "th") if rows else ""
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
