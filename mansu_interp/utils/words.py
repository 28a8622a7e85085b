"""Numbers with their nouns."""

from __future__ import annotations


def number_of(n: int, noun: str) -> str:
    """1 -> "1 prompt", 1234 -> "1,234 prompts"; the noun is one that takes an s."""
    return f"{n:,} {noun}{'s' * (n != 1)}"
