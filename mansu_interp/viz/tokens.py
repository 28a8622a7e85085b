"""What happens at the tokens of a prompt: the data of a view, and panels drawn by CircuitsVis.

CircuitsVis' own objects ask whether a web host answers and then load their script from a content
network; here only its local source is used, once per page however many panels there are (about
1.3 MB).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ViewError
from ..models.hook_points import Recorder
from ..models.stream import Stream, widen
from ..tasks.pairs import Pair, collate
from ..utils.files import write_text
from ..utils.libraries import library
from .data import Effect, PromptData
from .svg import escape

if TYPE_CHECKING:
    from ..models.language_model import LanguageModel

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "font-src data:; base-uri 'none'; form-action 'none'"
)

_LONGEST = 48
"""Tokens of a prompt up to which attention is part of a view, to keep it small."""
_MOST = 6
"""Tokens listed of those that a component raises, and as many of those that it lowers."""


def _pattern_hook(layer: int) -> str:
    """Hook point of a layer's attention, after the softmax."""
    return f"blocks.{layer}.attn.hook_pattern"


def _writes(
    stream: Stream, run: Recorder, nodes: Collection[str]
) -> dict[str, Float[Tensor, " d_model"]]:
    """What some components add to the stream of the last token."""
    out = {"input": widen(run[stream.input])[0, -1]}
    for i in range(stream.n_layers):
        heads = stream.head_writes(i, widen(run[stream.z(i)])[0, -1])
        out |= {f"a{i}.h{h}": write for h, write in enumerate(heads)}
        out[f"m{i}"] = stream.mlp_write(i, run[stream.mlp_out(i)])[0, -1]
    return {name: write for name, write in out.items() if name in nodes}


def _effects(
    model: LanguageModel, stream: Stream, run: Recorder, nodes: Collection[str], answer: int
) -> dict[str, Effect]:
    """The direct effect on the logits of some components.

    A component's is the logits of the last token's stream less those of the same without what the
    component wrote, all else as it was, through the final norm; less its mean over tokens (ours).
    """
    norm = getattr(stream.bridge.ln_final, "original_component", stream.bridge.ln_final)
    decode, out = model.get_tokenizer().decode, {}
    final = widen(run[stream.final])[0, -1]
    whole = model.unembed(norm(final[None]))[0]
    for name, write in _writes(stream, run, nodes).items():
        effect = widen(whole - model.unembed(norm((final - write)[None]))[0])
        effect = effect - effect.mean()
        order = effect.argsort(descending=True)
        most = torch.cat([order[:_MOST], order[_MOST:][-_MOST:]]).tolist()
        values = [float(f"{float(effect[t]):.3g}") for t in (*most, answer)]
        out[name] = Effect([str(decode([t])) for t in most], values[:-1], values[-1])
    return out


@torch.no_grad()
def look_inside(
    model: LanguageModel, pairs: Sequence[Pair], nodes: Collection[str]
) -> list[PromptData]:
    """Attention patterns and direct effects of some components on the clean prompts.

    Arguments:
        model: whose components.
        pairs: whose clean prompts.
        nodes: ids of heads, MLPs and ``input``.

    Raises:
        CircuitError: the architecture's components do not add to the stream (see `Stream`).
        ModelError: a model without a tokenizer.
    """
    stream, out = Stream(model), []
    decode = model.get_tokenizer().decode
    layers = [i for i in range(stream.n_layers) if _pattern_hook(i) in stream.bridge.hook_dict]
    for pair in pairs:
        batch, run = collate([pair], model.device), Recorder()
        hooks = [*stream.writers(), stream.final, *map(_pattern_hook, layers)]
        with stream.hooked(run.on(hooks)):
            stream.bridge(batch.clean, return_type=None)
        short, attention = len(pair.clean) <= _LONGEST, {}
        for i in layers if short else ():
            for h, pattern in enumerate((100 * run[_pattern_hook(i)][0]).round().int().cpu()):
                if (name := f"a{i}.h{h}") in nodes:
                    rows, columns = torch.tril_indices(*pattern.shape)
                    attention[name] = pattern[rows, columns].tolist()
        tokens = [str(decode([t])) for t in pair.clean]
        effects = _effects(model, stream, run, nodes, pair.answer)
        out.append(PromptData(pair.prompt, tokens, pair.answer_text, attention, effects))
    return out


def position_names(pairs: Sequence[Pair], model: LanguageModel, n: int) -> list[str]:
    """What the clean prompts have at each of ``n`` positions: the token where all have the same,
    else that of the first with an ellipsis.

    Raises:
        ViewError: the longest prompt has another number of tokens.
    """
    if (longest := max(len(p.clean) for p in pairs)) != n:
        raise ViewError(
            f"The scores are of {n} positions and the longest prompt has {longest} tokens. Give "
            "the pairs that the edges were scored on."
        )
    out = []
    for k in range(n):
        found = [p.clean[k] for p in pairs if k < len(p.clean)]
        text = str(model.get_tokenizer().decode([found[0]]))
        out.append(text if len(set(found)) == 1 else f"{text}…")
    return out


@dataclass(frozen=True)
class TokenView:
    """One or several CircuitsVis panels."""

    html: str
    """Markup with the script inlined, as a notebook shows it."""
    summary: str
    """The same in words, for whatever cannot run scripts."""

    def to_html(self, path: Path | str) -> Path:
        """Write one self-contained page."""
        path = Path(path)
        write_text(
            path,
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            "<title>Tokens</title>\n</head>\n"
            '<body style="margin:24px;background:#fff;color:#1d2329">\n'
            f"{self.html}\n</body>\n</html>\n",
        )
        return path

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.summary


def harmless_token(token: str) -> str:
    """A token that cannot end or open a script element, at the cost of an invisible space."""
    return re.sub(r"<(?=[/!]|script)", "<\N{ZERO WIDTH SPACE}", token, flags=re.I)


@runtime_checkable
class _Rendered(Protocol):
    """What CircuitsVis draws."""

    local_src: str
    """Markup and script that need no network."""


def _combine(panels: Sequence[tuple[str, _Rendered]], summary: str) -> TokenView:
    """Panels with headings that share one copy of the script."""
    marks, calls, shared = [], [], ""
    for title, rendered in panels:
        source = rendered.local_src
        start, end = source.index(">", source.index("<script")) + 1, source.rindex("</script>")
        at = source.rindex("CircuitsVis.render(")
        shared = shared or source[start:at]
        calls.append(source[at:end])
        name = re.search(r'<div id="([\w-]+)"', source)
        assert name is not None
        marks.append(
            '<h3 style="font:600 14px system-ui,sans-serif;margin:18px 0 4px">'
            f'{escape(title)}</h3><div id="{name[1]}" style="margin:4px 0 12px"></div>'
        )
    script = shared + "\n".join(calls)
    return TokenView(f'{"".join(marks)}<script type="module">{script}</script>', summary)


def _decoder(model: LanguageModel) -> Callable[[int], str]:
    return lambda token: harmless_token(str(model.get_tokenizer().decode([token])))


def attention_patterns(
    models: Mapping[str, LanguageModel], pair: Pair, layer: int, head: int
) -> TokenView:
    """Where one head looks, on the clean and the corrupt prompt, in each model.

    Arguments:
        models: name -> model, e.g. before, after and quantized.
        pair: a pair of prompts.
        layer: layer of the head.
        head: query head (``a3.h5`` is layer 3, head 5).

    Raises:
        ViewError: no such head, or CircuitsVis is not installed.
    """
    attention = library("circuitsvis.attention", "", "This view", ViewError)
    panels, words = [], []
    batch = collate([pair])
    for name, model in models.items():
        a = model.architecture
        if not (0 <= layer < a.n_layers and 0 <= head < a.n_heads):
            raise ViewError(f"No head a{layer}.h{head} in {name}: {a}.")
        decode = _decoder(model)
        for which, tokens in (("clean", batch.clean), ("corrupt", batch.corrupt)):
            recorder = Recorder()
            hook = _pattern_hook(layer)
            with model.bridge.hooks(fwd_hooks=recorder.on([hook])):
                model.bridge(tokens.to(model.device), return_type=None)
            pattern = recorder.seen[hook][0, head].detach().float().cpu()
            texts = [decode(int(t)) for t in tokens[0]]
            panels.append(
                (
                    f"a{layer}.h{head}, {name}, {which}",
                    attention.attention_heads(
                        attention=pattern[None],
                        tokens=texts,
                        attention_head_names=[f"a{layer}.h{head}"],
                    ),
                )
            )
            most = int(pattern[-1].argmax())
            words.append(
                f"{name}, {which}: the last token looks most at {texts[most]!r} "
                f"({float(pattern[-1, most]):.2f})"
            )
    return _combine(panels, "\n".join(words))


def token_log_probs(models: Mapping[str, LanguageModel], pair: Pair, *, top: int = 10) -> TokenView:
    """Log-probability of every next token, the answer's included, on both prompts in each model.

    Arguments:
        models: name -> model, e.g. before, after and quantized.
        pair: a pair of prompts; the answer is appended to the clean one, the counterfactual answer
            to the corrupt one.
        top: candidates listed at each token.

    Raises:
        ViewError: CircuitsVis is not installed.
    """
    logits = library("circuitsvis.logits", "", "This view", ViewError)
    panels, words = [], []
    batch = collate([pair])
    for name, model in models.items():
        ends = (
            ("clean", batch.clean, pair.answer),
            ("corrupt", batch.corrupt, pair.counterfactual),
        )
        for which, tokens, answer in ends:
            row = tokens[0].new_tensor([*tokens[0].tolist(), answer])
            found = model.all_logits(row[None])[0].detach().float().log_softmax(-1).cpu()
            drawn = logits.token_log_probs(row, found, _decoder(model), top_k=top)
            panels.append((f"{name}, {which}", drawn))
            text = str(model.get_tokenizer().decode([answer]))
            words.append(f"{name}, {which}: log-prob of {text!r} {float(found[-2, answer]):+.2f}")
    return _combine(panels, "\n".join(words))
