"""ROUGE-L recall: how much of an answer a text repeats, in the same order.

The words are those of Google's rouge-score with its stemmer: letters and digits in small letters,
and what is longer than three of them is stemmed (Porter 1980, with the changes that NLTK makes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

WORD = re.compile(r"[a-z0-9]+")
STEMMED = 4
"""Letters from which a word is stemmed."""
IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
"""Words that NLTK stems by list."""
Rules = tuple[tuple[str, str], ...]
STEP_2: Rules = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"),
    ("bli", "ble"), ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"),
    ("ization", "ize"), ("ation", "ate"), ("ator", "ate"), ("alism", "al"), ("iveness", "ive"),
    ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"),
    ("fulli", "ful"), ("logi", "log"),
)  # fmt: skip
STEP_3: Rules = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""),
    ("ness", ""),
)  # fmt: skip
STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou",
    "ism", "ate", "iti", "ous", "ive", "ize",
)  # fmt: skip


def _shape(word: str) -> str:
    """A word as c (consonant) and v (vowel); y is a vowel behind a consonant."""
    out = ""
    for k, letter in enumerate(word):
        y = letter == "y" and k > 0 and out[-1] == "c"
        out += "v" if letter in "aeiou" or y else "c"
    return out


def _measure(stem: str) -> int:
    """How often a consonant follows a vowel."""
    return _shape(stem).count("vc")


def _is_short(stem: str) -> bool:
    """Whether it ends in consonant, vowel, consonant (no w, x, y), or is vowel and consonant."""
    shape = _shape(stem)
    return shape == "vc" or (shape.endswith("cvc") and stem[-1] not in "wxy")


def _plural(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    """Without ``ed`` or ``ing``."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    stem = next((word[: -len(e)] for e in ("ed", "ing") if word.endswith(e)), "")
    if "v" not in _shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and _shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _is_short(stem) else stem


def _second(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _second(word[:-2])
    for end, new in STEP_2:
        if word.endswith(end):
            stem = word[: -len(end)]
            counts = word[:-3] if end == "logi" else stem
            return stem + new if _measure(counts) > 0 else word
    return word


def _third(word: str) -> str:
    for end, new in STEP_3:
        if word.endswith(end):
            stem = word[: -len(end)]
            return stem + new if _measure(stem) > 0 else word
    return word


def _fourth(word: str) -> str:
    for end in STEP_4:
        if word.endswith(end):
            stem = word[: -len(end)]
            fits = _measure(stem) > 1 and (end != "ion" or stem[-1:] in ("s", "t"))
            return stem if fits else word
    return word


def _fifth(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        if _measure(stem) > 1 or (_measure(stem) == 1 and not _is_short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a word in small letters: ``relational`` -> ``relat``."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    word = _past(_plural(word))
    if word.endswith("y") and len(word) > 2 and _shape(word[:-1])[-1] == "c":
        word = word[:-1] + "i"
    return _fifth(_fourth(_third(_second(word))))


def words(text: str) -> list[str]:
    """The words that are compared."""
    found = WORD.findall(text.lower())
    return [stem(word) if len(word) >= STEMMED else word for word in found]


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for a in one:
        before = 0
        for k, b in enumerate(other, 1):
            before, row[k] = row[k], before + 1 if a == b else max(row[k], row[k - 1])
    return row[-1]


def is_latin(answer: str) -> bool:
    """Whether the words that are compared hold most of an answer: at least half of its letters and
    digits are a to z or 0 to 9."""
    signs = [c for c in answer.lower() if c.isalnum()]
    return bool(signs) and 2 * sum(c.isascii() for c in signs) >= len(signs)


def rouge_l_recall(text: str, answer: str) -> float | None:
    """Longest common subsequence of words over the answer's words (Lin 2004), in [0, 1].

    Arguments:
        text: what a model generated.
        answer: the true answer.

    Returns:
        None where the answer is mostly in other letters than a to z and digits, in which
        Google's rouge-score sees no words.
    """
    if not is_latin(answer):
        return None
    wanted = words(answer)
    return common_length(words(text), wanted) / len(wanted)
