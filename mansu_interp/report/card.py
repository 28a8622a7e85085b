"""The model card of an edited checkpoint: what a run found, for whoever downloads the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .markdown import _md, _md_block
from .story import Cards, heading, sections
from .values import count, get, items, percent, text_of


def model_card(report: dict[str, Any]) -> str:
    """``README.md`` for the checkpoint's folder, rendered from ``report.json`` only."""
    from huggingface_hub import ModelCardData

    name = text_of(get(report, "model", "name"))
    # Only a name on the hub may stand in the metadata; a path would be taken for one.
    base = name if name.count("/") == 1 and not Path(name).exists() else None
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "mansu-interp"],
    )
    word, sentence = heading(report)[2:]
    edited, share = get(report, "edit", "edited"), get(report, "edit", "share")
    scores = next((s for s in sections(report) if s.title == "Scores"), None)
    blocks = [
        f"# {_md(Path(name).name)}, edited to forget",
        f"Task: {_md(get(report, 'task', 'title'))}",
        f"**{word.capitalize()}.** {_md(sentence)}",
        f"{count(edited)} parameters of `{_md(name)}` were changed ({percent(share, 3)}), nothing "
        "else. The licence of that model applies to this one.",
        "## Scorecard",
        _md_block(Cards(items(get(report, "properties")))),
        *(map(_md_block, scores.blocks) if scores else ()),
        "All scores are on phrasings that unlearning never saw, on the checkpoint as saved. "
        "Surviving quantization is not erasure: a relearning attack can bring the answers back.",
        "## Made with",
        f"```\n{text_of(get(report, 'command'))}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(b for b in blocks if b) + "\n"
