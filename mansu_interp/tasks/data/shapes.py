"""Rows as people have them: the shapes of published data, each made into rows of our own.

- own: ``prompt``, ``answer`` and the other fields of `rows.Row`.
- question and answer: also called query or instruction (with an ``input``), and response,
  completion, output or target. MUSE's knowmem (Shi et al. 2024, arXiv 2407.06460) is of this shape;
  its verbmem has ``prompt`` and ``gt``.
- TOFU (Maini et al. 2024, arXiv 2401.06121): see `_tofu`.
- choices: ``question``, ``choices`` and an ``answer`` that is an index from 0, a letter, a label or
  a choice itself. WMDP (Li et al. 2024, arXiv 2403.03218), MMLU, and ARC, whose choices are an
  object of ``text`` and ``label``.
- lettered columns: ``question``, ``A``, ``B``, ``C``, ``D`` and an ``answer``, as MMLU's CSV files.
- chat: ``messages`` of one user's turn and the assistant's.

Names of fields are compared without case and outer spaces. Nothing here is guessed from what the
texts say.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import TaskError
from ...utils.words import shown

Record = Mapping[str, object]
Made = list[dict[str, object]]
"""Fields of the rows that a record becomes."""
LETTERS = tuple("abcdefghij")
OWN = ("role", "prompt", "answer", "split", "corrupt", "counterfactual", "distractors", "relation",
       "subject", "phrasing")  # fmt: skip
"""The fields of `rows.Row`."""
QUESTION = ("question", "query", "instruction", "prompt", "input", "question_stem")
ANSWER = ("answer", "response", "completion", "output", "target")
KEY = ("answer", "answerkey", "answer_index", "answer_idx", "label", "correct", "target")
CHOICES = ("choices", "options", "mc_answers")
TURNS = ("messages", "conversations", "conversation")
INDEX = re.compile(r"(unnamed: \d+|index|__index_level_\d+__|)")
"""What pandas calls the column of running numbers that it adds to a file."""
FEWEST = 4
"""Choices of a row."""


@dataclass(frozen=True)
class Shape:
    """A known shape of rows."""

    name: str
    fields: tuple[tuple[str, ...], ...]
    """What it needs, each under one of its names."""
    make: Callable[[Record], Made]
    takes: tuple[str, ...] = ()
    """Further fields that ``make`` reads; all others are left out."""

    def missing(self, record: Record) -> list[str]:
        """The fields that a record lacks, by their first name."""
        return [names[0] for names in self.fields if not any(n in record for n in names)]


def fold(record: Mapping[str, object]) -> dict[str, object]:
    """The record under the names by which shapes know fields, without an added index.

    Raises:
        TaskError: two fields have the same name.
    """
    out: dict[str, object] = {}
    for key, value in record.items():
        name = str(key).strip().casefold()
        if INDEX.fullmatch(name) and str(value).strip().isdecimal():
            continue
        if name in out:
            raise TaskError(f"two fields are called {shown(name)}")
        out[name] = value
    return out


def convert(record: Record, kind: str) -> tuple[Shape, Made, list[str]]:
    """The shape of a record (see `fold`), the rows that it becomes, and the fields left out.

    Arguments:
        record: one row of a file.
        kind: one of `KINDS`.

    Raises:
        TaskError: it has none of the kind's shapes; says which it comes nearest to. Or a field
            holds what it should not.
    """
    shapes = KINDS[kind]
    for shape in shapes:
        if not shape.missing(record):
            used = {n for names in shape.fields for n in names} | {*shape.takes}
            left_out = [] if shape.make is _own else sorted(record.keys() - used)
            return shape, shape.make(record), left_out
    nearest = min(shapes, key=lambda s: len(s.missing(record)) / len(s.fields))
    lacking, names = nearest.missing(record), ", ".join(map(shown, record)) or "nothing"
    if len(lacking) == len(nearest.fields):
        known = ", ".join(s.name for s in shapes)
        raise TaskError(f"it has {names}, and no field of a known shape ({known}: docs/tasks.md)")
    raise TaskError(
        f"{', '.join(lacking)} is missing for the shape that it comes nearest to, {nearest.name}; "
        f"it has {names}"
    )


def _one(record: Record, names: Sequence[str]) -> object:
    """The first of some fields that the record has."""
    return next(record[n] for n in names if n in record)


def as_list(value: object) -> object:
    """A list in place of an array of numpy or the like; anything else as it is."""
    convert_it = getattr(value, "tolist", None)
    return convert_it() if callable(convert_it) else value


def listed(value: object, name: str) -> list[object]:
    """A list, also from numpy, or from CSV text that holds one as JSON or as Python writes it."""
    found = as_list(value)
    for read in (json.loads, ast.literal_eval):
        if isinstance(found, str):
            try:
                found = read(found)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(found, (list, tuple)):
        raise TaskError(f"{name} must be a list; got {shown(value)}")
    return list(found)


def _kept(record: Record) -> dict[str, object]:
    """The fields of our own that rows of another shape may have besides."""
    names = [n for n in OWN if n in record and n not in ("prompt", "answer")]
    return {n: record[n] for n in names if not _absent(record[n])}


def _absent(value: object) -> bool:
    """Whether a field holds nothing, also as CSV and pandas write it."""
    nan = isinstance(value, float) and math.isnan(value)
    return value is None or nan or (isinstance(value, str) and not value.strip())


def _either(value: object, other: object) -> object:
    return other if _absent(value) else value


def _own(record: Record) -> Made:
    return [dict(record)]


def _plain(record: Record) -> Made:
    """Question and answer; an instruction may come with an input."""
    asked, more = _one(record, QUESTION), record.get("input")
    if asked is not more and isinstance(asked, str) and not _absent(more):
        asked = f"{asked}\n{more}"
    row = {"prompt": asked, "answer": _one(record, ANSWER), "subject": asked}
    return [{**row, **_kept(record)}]


def _verbatim(record: Record) -> Made:
    return [{"prompt": record["prompt"], "answer": record["gt"]}]


def _chat(record: Record) -> Made:
    """One user's turn and the assistant's; system turns are left out."""
    turns = []
    for turn in listed(_one(record, TURNS), "messages"):
        if not isinstance(turn, Mapping):
            raise TaskError(f"a message must be an object with role and content; got {shown(turn)}")
        who, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(said, list):
            said = "".join(str(p.get("text", "")) for p in said if isinstance(p, Mapping))
        turns.append((str(who), said))
    turns = [(who, said) for who, said in turns if who != "system"]
    asked, answered = ("user", "human"), ("assistant", "gpt")
    if len(turns) != 2 or turns[0][0] not in asked or turns[1][0] not in answered:
        given = ", ".join(shown(who) for who, _ in turns[:6]) or "none"
        raise TaskError(f"messages: the turns are {given}; expected one of user and of assistant")
    (_, prompt), (_, answer) = turns
    return [{"prompt": prompt, "answer": answer, "subject": prompt, **_kept(record)}]


def _choices(record: Record) -> Made:
    given = _one(record, CHOICES)
    labels: list[str] = []
    if isinstance(given, Mapping):  # ARC
        labels = [str(x) for x in listed(given.get("label"), "choices.label")]
        given = given.get("text")
    return _choice(record, listed(given, "choices"), labels)


def _lettered(record: Record) -> Made:
    choices = [record[x] for x in LETTERS if x in record]
    while choices and _absent(choices[-1]):
        choices.pop()
    return _choice(record, choices, [])


def _choice(record: Record, choices: list[object], labels: list[str]) -> Made:
    """A row of some choices; none if they are too few to choose from."""
    if len(choices) < FEWEST:
        return []
    key = _one(record, KEY)
    at = _chosen(key, choices, labels)
    if at is None:
        last = chr(ord("A") + len(choices) - 1)
        raise TaskError(
            f"the answer {shown(key)} is none of the {len(choices)} choices; expected 0 to "
            f"{len(choices) - 1}, A to {last}, or one of them as written"
        )
    asked, wrong = _one(record, QUESTION), choices[:at] + choices[at + 1 :]
    if isinstance(asked, Mapping):  # ARC as published
        asked = asked.get("stem")
    row = {"prompt": asked, "answer": choices[at], "distractors": wrong, "subject": asked}
    return [{**row, **{k: record[k] for k in ("role", "split") if k in record}}]


def _chosen(key: object, choices: list[object], labels: list[str]) -> int | None:
    """Which choice a key names: by label, index from 0, letter, or as it is written.

    Raises:
        TaskError: it names two, since a file of texts does not tell the index 3 from the choice 3.
    """
    text = str(key).strip()
    if text in labels:
        return labels.index(text)
    found = {choices.index(key)} if isinstance(key, str) and key in choices else set()
    if re.fullmatch(r"[0-9]{1,3}(\.0)?", text):
        found.add(int(float(text)))
    elif re.fullmatch(r"[A-Ja-j]", text):
        found.add(LETTERS.index(text.casefold()))
    found = {at for at in found if at < len(choices)}
    if len(found) > 1:
        raise TaskError(f"the answer {shown(key)} may be a position or a choice: give its letter")
    return found.pop() if found else None


def _words(text: str) -> list[tuple[str, int]]:
    """The words of a text, without case and outer punctuation, and where each begins."""
    found = re.finditer(r"\S+", text)
    return [(m.group().casefold().strip(".,;:!?\"'()“”‘’"), m.start()) for m in found]


def _shared(one: str, other: str) -> int:
    """How many words two texts begin alike with."""
    both = zip(_words(one), _words(other), strict=False)
    return next((n for n, ((a, _), (b, _)) in enumerate(both) if a != b), 0)


def _fact(text: str, known: Iterable[str]) -> int | None:
    """Where the first word of a text begins that is in none of the others; None: there is none."""
    said = {word for other in known for word, _ in _words(other)}
    return next((at for word, at in _words(text) if word and word not in said), None)


def _tofu(record: Record) -> Made:
    """TOFU: question and answer; the perturbed sets add ``paraphrased_question``,
    ``paraphrased_answer`` and ``perturbed_answer`` (a list).

    1. The perturbed answers are those of the paraphrased one, word by word (where there is one; of
       ``answer`` otherwise), so these stand beside each other: the wrong one that begins with most
       of the same words is the counterfactual, and the deciding token is where the facts differ.
       They are asked by the question and, unseen, by its paraphrase.
    2. The answer itself, which was learned by heart, is trained on. Its fact is taken to begin at
       the first word that is also in the paraphrased answer and neither asked nor in a perturbed
       one; wrong answers are the same beginning followed by what is a perturbed answer's own.
       Where there is no such word, the paraphrased answer takes its place (ours).
    """
    asked, answer = record["question"], record["answer"]
    wrong = [w for w in listed(record["perturbed_answer"], "perturbed_answer") if w]
    told = _either(record.get("paraphrased_answer"), answer)
    row: dict[str, object] = {
        "prompt": asked,
        "answer": told,
        "subject": asked,
        "distractors": wrong,
    }
    row |= {k: record[k] for k in ("role",) if k in record}
    if not (isinstance(told, str) and all(isinstance(w, str) for w in wrong)):
        return [row]  # refused by the check of rows
    texts = sorted(map(str, wrong), key=lambda w: -_shared(told, w))
    row |= {"distractors": texts, "counterfactual": texts[0] if texts else ""}
    again = _either(record.get("paraphrased_question"), asked)
    unseen = {**row, "prompt": again, "split": "unseen"}
    if told == answer:
        return [row] if again == asked else [row, unseen]
    learned = _learned(str(answer), told, texts, f"{asked} {again}")
    return [{**row, **learned, "split": "train"}, {**row, "split": "dev"}, unseen]


def _learned(answer: str, told: str, wrong: list[str], asked: str) -> dict[str, object]:
    """The answer of TOFU with wrong ones that begin like it; nothing if its fact is not found."""
    own = {word for word, _ in _words(told)} - {w for t in (*wrong, asked) for w, _ in _words(t)}
    at = next((at for word, at in _words(answer) if word in own and word), None)
    if at is None:
        return {}
    found = [(begin, t) for t in wrong if (begin := _fact(t, (told, asked))) is not None]
    # First those that begin a sentence where the answer does, and go on with one where it does.
    found.sort(key=lambda part: (part[0] == 0) != (at == 0))
    rivals = [answer[:at] + text[begin:] for begin, text in found]
    if len(set(rivals)) < FEWEST - 1 or answer in rivals:
        return {}
    return {"answer": answer, "distractors": rivals, "counterfactual": rivals[0]}


_TOFU = Shape(
    "TOFU",
    (("question",), ("answer",), ("perturbed_answer",)),
    _tofu,
    ("role", "paraphrased_question", "paraphrased_answer"),
)
_CHOICES = Shape("choices", (QUESTION, CHOICES, KEY), _choices, ("role", "split"))
_LETTERED = Shape(
    "lettered columns",
    (QUESTION, *((x,) for x in LETTERS[:FEWEST]), KEY),
    _lettered,
    ("role", "split", *LETTERS),
)
_CHAT = Shape("chat", (TURNS,), _chat, OWN)
_VERBATIM = Shape("MUSE's verbatim rows", (("prompt",), ("gt",)), _verbatim, ("role",))
_PROMPT = Shape("prompt and answer", (("prompt",), ("answer",)), _own)
_PLAIN = Shape("question and answer", (QUESTION, ANSWER), _plain, OWN)
KINDS = {
    "rows": (_TOFU, _CHOICES, _LETTERED, _CHAT, _VERBATIM, _PROMPT, _PLAIN),
    "tofu": (_TOFU, _PLAIN),
    "muse": (_VERBATIM, _PLAIN),
    "wmdp": (_CHOICES, _LETTERED),
}
"""Shapes of each kind of rows, in the order in which they are tried."""
KNOWN = {*OWN, *QUESTION, *ANSWER, *KEY, *CHOICES, *TURNS, "gt"}
"""Names of fields by which a header is told from a row."""
