"""A tokenizer in a GGUF file: whole words, byte-level BPE, and SentencePiece's BPE."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..models.language_model import LanguageModel
from ..utils.files import Json
from ..utils.words import number_of

if TYPE_CHECKING:
    from gguf import GGUFWriter
else:  # an optional package
    GGUFWriter = object

_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
PRE = {
    _DIGITS % "{1,3}": "llama-bpe",
    _DIGITS % "": "qwen2",
    r" ?[^(\s|[.,!?": "bloom",
}
"""How a tokenizer's splitting rule begins -> llama.cpp's name for it."""
_SPACE = "\u2581"
"""What stands for a space in a unigram model and in SentencePiece's tokens."""
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_KEEP = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's special tokens that swallow no space."""
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_BEFORE = {"type": "Prepend", "prepend": _SPACE}
_APART = {"type": "Split", "pattern": {"String": " "}}
"""Splits nothing once every space is another character."""


def vocabulary(model: LanguageModel) -> dict[str, Json]:
    """A tokenizer as plain data, with llama.cpp's name of its splitting rule (``pre``), ``words``,
    ``pieces`` or ``spaced pieces``: those of SentencePiece, whose texts begin with a space.

    Raises:
        ModelError: another kind of tokenizer, one without merges, or with more tokens than the
            embedding has rows.
    """
    fast = getattr(model.get_tokenizer(), "backend_tokenizer", None)
    data = json.loads(fast.to_str() if fast else '{"model": {}}')
    pre = splitting(data)
    if pre is None:
        raise ModelError(
            f"{model.name}: GGUF export knows tokenizers of whole words, byte-level BPE with the "
            "splitting rule of GPT-2, SmolLM, Llama 3, Qwen2 or Bloom, and the BPE of "
            "SentencePiece as Gemma and Llama 2 have it; this one is "
            f"{data['model'].get('type')} with another rule. Use "
            "llama.cpp's convert_hf_to_gguf.py on the saved folder."
        )
    _check_rows(model, data)
    if pre != "words" and "pieces" not in pre and not data["model"]["merges"]:
        raise ModelError(
            f"{model.name}: its tokenizer is a byte-level BPE without merges, which llama.cpp does "
            "not load. Train it with merges, or take one of whole words (WordLevel)."
        )
    if "pieces" in pre and (pair := _never_merged(data) or _merged_late(data)):
        raise ModelError(
            f"{model.name}: its tokenizer does not merge {pair[0]!r:.40} and {pair[1]!r:.40} when "
            "SentencePiece and llama.cpp do, by the rank of the token that they make. Train it "
            "with SentencePiece, or one of bytes (ByteLevel)."
        )
    return {**data, "pre": pre, "name": _name(model, data)}


def _check_rows(model: LanguageModel, data: dict[str, Json]) -> None:
    """Raise ModelError if the tokenizer has tokens beyond the embedding."""
    ids = data["model"]["vocab"] | {t["content"]: t["id"] for t in data["added_tokens"]}
    rows = model.sizes[0]
    if beyond := [text for text, i in ids.items() if i >= rows]:
        raise ModelError(
            f"{model.name}: its tokenizer has {number_of(len(beyond), 'token')} beyond the "
            f"{rows:,} rows of the embedding, such as {beyond[0]!r:.40}: the model can neither "
            "read nor write them. Take them out of the tokenizer; or give them rows with "
            f"transformers' resize_token_embeddings({max(ids.values()) + 1}), and train those."
        )


def _name(model: LanguageModel, data: dict[str, Json]) -> str:
    """A model's name in its file. By "phi-3" in it llama.cpp knows that special tokens swallow the
    spaces after them.

    Raises:
        ModelError: other tokens swallow spaces.
    """
    name, added = Path(model.name).name, data["added_tokens"]
    swallow = {t["content"] for t in added if t["rstrip"] or t["lstrip"]}
    if not swallow:
        return re.sub("(?i)phi-?3", "Phi 3", name)
    known = {t["content"] for t in added if not t["lstrip"]}
    if swallow != known - set(_KEEP) or not {*_KEEP, "</s>"} <= known:
        raise ModelError(
            f"{model.name}: the space beside {min(swallow)!r:.40} belongs to that token, and "
            "llama.cpp does that for all special tokens as Phi-3 has them, or for none. Add it "
            "without lstrip and rstrip."
        )
    return name if re.search("(?i)phi-?3", name) else f"{name} (Phi-3)"


def splitting(data: dict[str, Json]) -> str | None:
    """See `vocabulary`; None: another kind."""
    rule = data.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers") or ([rule] if rule else [])
    kinds = [s.get("type") for s in steps]
    if data["model"].get("type") == "WordLevel":
        known = kinds in (["WhitespaceSplit"], ["WhitespaceSplit", "Split"])
        return "words" if known and not data.get("normalizer") else None
    if data["model"].get("type") != "BPE":
        return None
    if data["model"].get("byte_fallback"):
        return _of_pieces(data, steps)
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        regex = steps[0]["pattern"].get("Regex", "")
        return next((name for start, name in PRE.items() if regex.startswith(start)), None)
    return None


def _of_pieces(data: dict[str, Json], steps: list[dict[str, Json]]) -> str | None:
    """How SentencePiece's BPE treats spaces, as transformers writes that down: in the normalizer,
    or in a step that never splits. A space before a text's first token alone llama.cpp cannot
    tell from one after every special token."""
    whole = data["model"]
    if not set(_BYTES) <= whole["vocab"].keys() or whole.get("ignore_merges"):
        return None
    rule = data.get("normalizer") or {}
    rules = rule.get("normalizers") or ([rule] if rule else [])
    plain = not steps or [{**s, **_APART} for s in steps] == steps
    if plain and rules == [_TO_SPACE]:
        return "pieces"
    if plain and rules == [_BEFORE, _TO_SPACE]:
        odd = any(added["normalized"] for added in data["added_tokens"])  # begin with a space, too
        return None if odd else "spaced pieces"
    space = [{"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never"}]
    once = [{k: s.get(k) for k in space[0]} for s in steps] == space and not steps[0].get("split")
    return "pieces" if once and not rules else None


def _merges(data: dict[str, Json]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in data["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _never_merged(data: dict[str, Json]) -> tuple[str, str] | None:
    """Two tokens whose pair is a token that no merge makes of them. llama.cpp has scores of tokens
    alone, and merges every such pair."""
    known, merges = set(data["model"]["vocab"]), set(_merges(data))
    known -= {*_BYTES, *(added["content"] for added in data["added_tokens"])}
    for token in known:
        for k in range(1, len(token)):
            pair = token[:k], token[k:]
            if pair[0] in known and pair[1] in known and pair not in merges:
                return pair
    return None


def _merged_late(data: dict[str, Json]) -> tuple[str, str] | None:
    """A pair that makes a token later than other pairs do, with another token's between."""
    seen, last = set(), ""
    for left, right in _merges(data):
        token = left + right
        if token != last and token in seen:
            return left, right
        seen.add(token)
        last = token
    return None


def write_tokenizer(
    writer: GGUFWriter, model: LanguageModel, data: dict[str, Json], gguf: ModuleType
) -> None:
    """Of `vocabulary`, with its special tokens and chat templates."""
    size = model.config.vocab_size
    writer.add_name(data["name"])
    kinds = gguf.TokenType
    tokens, types = [f"[PAD{i}]" for i in range(size)], [kinds.UNUSED] * size
    words, pieces = data["pre"] == "words", "pieces" in data["pre"]
    for text, i in data["model"]["vocab"].items():
        tokens[i], types[i] = _spaced(text, data) if words else text, kinds.NORMAL
        if pieces and text in _BYTES:
            types[i] = kinds.BYTE
    for added in data["added_tokens"]:
        i, special, text = added["id"], added["special"], added["content"]
        phrase = (words and not special) or (pieces and _SPACE in text)
        tokens[i] = _spaced(text, data) if phrase and words else text
        types[i] = kinds.CONTROL if special else kinds.NORMAL if phrase else kinds.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if words:
        # As a unigram model (T5's) whose tokens all cost the same: the fewest cover a text.
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([-1.0] * size)
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
    elif pieces:
        # llama.cpp merges the pair whose token scores highest: the one that is merged first.
        scores, ids = [-1e6] * size, data["model"]["vocab"]
        for k, (left, right) in reversed([*enumerate(_merges(data))]):
            scores[ids[left + right]] = float(-k)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(data["pre"] == "spaced pieces")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(data["pre"])
        writer.add_token_merges([" ".join(pair) for pair in _merges(data)])
    for kind in ("bos", "eos", "unk", "pad"):
        found = getattr(model.tokenizer, f"{kind}_token_id")
        if found is not None:
            getattr(writer, f"add_{kind}_token_id")(found)
    for kind, adds in zip(("bos", "eos"), _adds(model), strict=True):
        getattr(writer, f"add_add_{kind}_token")(adds)
    template = model.get_tokenizer().chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:
        named = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(named)


def _spaced(text: str, data: dict[str, Json]) -> str:
    """A word with the space before it, as a unigram model writes one; none before what is split off
    the end of a word."""
    steps = data["pre_tokenizer"].get("pretokenizers", [])
    ends = [s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split"]
    attached = any(re.fullmatch(pattern, text) for pattern in ends)
    return text if attached else _SPACE + text.replace(" ", _SPACE)


def _adds(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text, and its EOS after it."""
    tokenizer = model.get_tokenizer()
    ids = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = len(ids) > len(model.encode("a"))
    return bool(added and ids[0] == bos), bool(added and ids[-1] == eos)
