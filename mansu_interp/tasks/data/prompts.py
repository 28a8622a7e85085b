"""Prompt pairs from plain texts: what exploring a circuit needs, without a task.

A clean and a corrupt prompt, the answer, and a wrong answer (or several). A
file holds one such pair a row::

    {"clean": "The capital of France is", "corrupt": "The capital of Spain is",
     "answer": " Paris", "wrong": " Madrid"}

``prompt``, ``counterfactual`` and ``distractors`` are read as ``clean``, ``wrong`` and ``wrong``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import TaskError
from ...models.language_model import LanguageModel
from ...utils.ranges import entrance
from ...utils.words import number_of
from ..answers import Tokens, WholeAnswers
from ..pairs import Pair, PairSet, gap
from .rows import SHOWN, sift
from .shapes import as_list
from .sources import records

COLUMNS = {
    "clean": ("clean", "prompt", "clean_prompt"),
    "corrupt": ("corrupt", "corrupted", "corrupt_prompt", "counterfactual_prompt"),
    "answer": ("answer", "correct", "answers"),
    "wrong": ("wrong", "counterfactual", "distractors", "wrong_answers", "incorrect"),
}
"""Field of a pair -> the columns that it is read from, the first that is there."""

Answers = str | Sequence[str]


def pairs_from_prompts(
    model: LanguageModel,
    clean: Sequence[str],
    corrupt: Sequence[str],
    answers: Sequence[str],
    wrong: Sequence[Answers],
    *,
    name: str = "prompts",
) -> PairSet:
    """Prompt pairs from texts.

    Arguments:
        model: whose tokenizer is used.
        clean: prompts, as the model is to read them. Where its tokenizer begins every text with a
            token of its own (BOS), that token comes first here, too.
        corrupt: the same with another right answer, best as many tokens as its clean
            prompt; otherwise they are aligned (see `alignment`).
        answers: what follows each clean prompt. Where neither the prompt ends nor the answer begins
            with white space, one space stands between them.
        wrong: what follows instead: one text a pair, or equally many; the first is the
            counterfactual answer of ``logit_diff``, all are the rivals of ``choice_margin``.
        name: of the set.

    Raises:
        TaskError: lists of different lengths, or a pair that cannot be made; says which and why.
    """
    lists = {"clean": clean, "corrupt": corrupt, "answers": answers, "wrong": wrong}
    for what, given in lists.items():
        if isinstance(given, str):
            raise TaskError(f"{what} must be a list of texts, one a pair; got the text {given!r}.")
    if len({len(given) for given in lists.values()}) > 1:
        sizes = ", ".join(f"{len(given)} {what}" for what, given in lists.items())
        raise TaskError(f"Give as many of each, one a pair; got {sizes}.")
    _check_words(model, list(zip(clean, corrupt, answers, wrong, strict=True)))
    made = [
        _pair(model, k, name, texts)
        for k, texts in enumerate(zip(clean, corrupt, answers, wrong, strict=True), 1)
    ]
    if len({len(p.distractors) for p in made}) > 1:
        raise TaskError(
            "Every pair needs as many wrong answers; give one each, or the same number."
        )
    return PairSet(name, tuple(made))


def _check_words(model: LanguageModel, texts: Sequence[tuple[str, str, str, Answers]]) -> None:
    """Raise TaskError where the tokenizer does not know a word; names all such words."""
    unknown: dict[str, None] = {}
    bad: list[int] = []
    for k, (*single, wrong) in enumerate(texts, 1):
        given = [*single, *([wrong] if isinstance(wrong, str) else wrong)]
        found = [word for text in given for word in _unknown(model, text)]
        bad += [k] * bool(found)
        unknown |= dict.fromkeys(found)
    if not unknown:
        return
    words = ", ".join(f"{word!r:.60}" for word in list(unknown)[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    known = [word.lower() != word and not _unknown(model, word.lower()) for word in unknown]
    advice = "Give prompts and answers of words that it knows."
    if all(known):
        advice = f"It knows {'it' if len(known) == 1 else 'them'} in lower case: write that."
    raise TaskError(
        f"The tokenizer of {model.name} does not know {words}{more}, in {len(bad)} of "
        f"{number_of(len(texts), 'pair')} (the first: pair {bad[0]}). {advice}"
    )


def _unknown(model: LanguageModel, text: str) -> list[str]:
    """The words of a text that the tokenizer does not know."""
    tokenizer = model.get_tokenizer()
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in (tokens := model.encode(text)):
        return []
    if not tokenizer.is_fast:  # it does not tell where in the text a token stands
        return [word for word in text.split() if unknown in model.encode(word)] or [text]
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [text[a:b].strip() for (a, b), t in zip(spans, tokens, strict=True) if t == unknown]


def _pair(model: LanguageModel, k: int, name: str, texts: tuple[str, str, str, Answers]) -> Pair:
    clean, corrupt, answer, wrong = texts
    others = [wrong] if isinstance(wrong, str) else list(wrong)
    if not others:
        raise TaskError(f"Pair {k} has no wrong answer: give at least one.")
    tokens, others_tokens = _encode(model, clean), _encode(model, corrupt)
    if not tokens or not others_tokens:
        which = "corrupt" if tokens else "clean"
        raise TaskError(f"Pair {k} has an empty {which} prompt: give a text.")
    if tokens == others_tokens:
        raise TaskError(
            f"Pair {k}: the clean and the corrupt prompt are the same, {clean!r:.80}, so that "
            "there is nothing to explain. Give a corrupt prompt that asks for another answer."
        )
    rivals = tuple(_following(model, k, clean, w) for w in others)
    whole = WholeAnswers(_following(model, k, clean, answer), rivals[0], rivals)
    return Pair.build(
        tokens,
        others_tokens,
        whole,
        relation=name,
        subject=clean,
        phrasing=name,
        prompt=clean,
        answer_text=answer.strip(),
    )


def _following(model: LanguageModel, k: int, prompt: str, answer: str) -> Tokens:
    """The answer's tokens behind its prompt."""
    if not answer:
        raise TaskError(f"Pair {k} has an empty answer.")
    spaced = prompt[-1:].isspace() or answer[:1].isspace()
    between = "" if spaced else gap(prompt, answer)
    begin, both = (_encode(model, text) for text in (prompt, prompt + between + answer))
    if both[: len(begin)] != begin or len(both) == len(begin):
        raise TaskError(
            f"Pair {k}: the tokenizer joins the end of {prompt!r} with {answer!r}. End the prompt "
            "with a word, and begin the answer with a space."
        )
    return both[len(begin) :]


def _encode(model: LanguageModel, text: str) -> Tokens:
    """A text's tokens, after the token that the tokenizer begins every text with, if it does."""
    tokenizer = model.get_tokenizer()
    tokens, bos = tuple(model.encode(text)), tokenizer.bos_token_id
    begin = (bos,) if isinstance(bos, int) else ()
    begins = begin and tuple(tokenizer("a").input_ids[:1]) == begin and tokens[:1] != begin
    return (*begin, *tokens) if begins else tokens


@entrance(TaskError)
def read_prompts(source: str | Path, model: LanguageModel) -> PairSet:
    """Prompt pairs from a file of rows, or whatever else `sources.records` reads.

    Arguments:
        source: path of a .jsonl, .json, .csv, .tsv or .parquet file with the columns clean,
            corrupt, answer and wrong; or the name of such a data set on the hub.
        model: whose tokenizer is used.

    Raises:
        TaskError: rows without one of the fields (they are listed by line), or a pair that cannot
            be made.
    """
    given = records(source)
    found = sift(given.records, _texts, given.where)
    if not found:
        raise TaskError(
            f"{source}: there is no row. Give a pair a row, with clean, corrupt, answer and wrong."
        )
    clean, corrupt, answers, wrong = zip(*found, strict=True)
    return pairs_from_prompts(
        model, list(clean), list(corrupt), list(answers), list(wrong), name=Path(source).stem
    )


def _texts(_: int, record: Mapping[str, object]) -> tuple[str, str, str, list[str]]:
    """The fields of a row.

    Raises:
        TaskError: one is missing, or no text.
    """
    found: dict[str, object] = {}
    for field, names in COLUMNS.items():
        given = [record[name] for name in names if record.get(name) not in (None, "", [])]
        if not given:
            raise TaskError(
                f"no {field!r}; expected clean, corrupt, answer and wrong, got "
                f"{', '.join(map(str, record)) or 'nothing'}"
            )
        found[field] = as_list(given[0])
    wrong = found["wrong"] if isinstance(found["wrong"], list) else [found["wrong"]]
    for value in (found["clean"], found["corrupt"], found["answer"], *wrong):
        if not isinstance(value, str):
            raise TaskError(f"expected texts, got {type(value).__name__}")
    texts = (str(found[field]) for field in ("clean", "corrupt", "answer"))
    clean, corrupt, answer = texts
    return clean, corrupt, answer, [str(w) for w in wrong]
