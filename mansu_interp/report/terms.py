"""The terms that a report explains where they stand: rows of docs/glossary.md (a test compares)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markupsafe import Markup, escape

TERMS = {
    "alignment": "whether what is left of the attribution points the same way (cosine): 1 = the "
    "same, −1 = reversed",
    "attribution graph": "writers and readers of the residual stream, with a score on every edge "
    "between them",
    "budget": "share of all parameters that may be edited",
    "CAD": "circuit attribution divergence; here the number and verdict of `mansu cad`: 0 = all "
    "knowledge is there, 1 = none",
    "chance": "what a guess among the four candidates gets: 0.25",
    "choice": "share of prompts whose answer ranks first of four; the same as four-way accuracy",
    "circuit": "the fewest edges that keep a behaviour when all others are ablated",
    "code": "the integer that a quantizer stores for a weight",
    "erased": "relearning half of the facts brings back no more of the other half than chance + "
    "0.15, ranked first or last",
    "faithfulness": "share of the metric that a circuit keeps with every other edge ablated",
    "final margin": "margin that further edits reach after the last training step",
    "four-way": "the right answer against three others of the same kind; chance 0.25",
    "gap": "forget accuracy after a quantizer minus before it; at most 0 is wanted",
    "headroom": "distance of a property from its target; positive = met",
    "linearized relearning": "relearning in closed form, through the tangent kernel",
    "mass": "how much attribution is left on the circuit, as a share of the original's",
    "never taught": "the reference model: trained from scratch without the forget facts",
    "nf4": "4-bit quantizer of bitsandbytes, after which everything is scored",
    "outside": "attribution that flows elsewhere than along the circuit, as a share of all of the "
    "original's",
    "perplexity": "exp of the mean loss per token of running text; lower is better",
    "probe": "linear classifier that reads the answer from the model's states",
    "projected share": "⟨s′, s⟩ / ⟨s, s⟩: how much of the original's attribution, or of an edit, "
    "is left along its direction",
    "promised": "every edit changes this quantizer's code, by construction",
    "quantization margin": "margin by which quantized models lie below full precision",
    "relearning": "fine-tuning on half of the forget facts, to see whether the other half comes "
    "back",
    "retain": "what must stay",
    "suppressed": "not answered any more, and not erased",
    "top-1": "share of prompts whose answer is the most probable of all tokens",
    "unseen": "phrasings that neither discovery nor unlearning saw",
}
"""Name -> meaning."""
_ALONE = {"outside"}
"""Terms that are ordinary words in a sentence."""
_WORDS = sorted((re.escape(t) for t in TERMS if t not in _ALONE), key=len, reverse=True)
_ANY = re.compile(rf"(?<![\w.-])({'|'.join(_WORDS)})(?![\w-]|\.\w)", re.IGNORECASE)
_NAMES = {name.lower(): name for name in TERMS}


def _pieces(text: str) -> Iterator[Markup]:
    """Text, its terms marked, each once."""
    end, seen = 0, set()
    for found in _ANY.finditer(text):
        name = _NAMES[found[0].lower()]
        if name in seen:
            continue
        seen.add(name)
        yield escape(text[end : found.start()])
        yield Markup('<abbr title="{}">{}</abbr>').format(TERMS[name], found[0])
        end = found.end()
    yield escape(text[end:])


def explained(text: str) -> Markup:
    """Escaped text in which hovering a term shows its meaning."""
    if text in _ALONE:
        return Markup('<abbr title="{}">{}</abbr>').format(TERMS[text], text)
    return Markup("").join(_pieces(text))
