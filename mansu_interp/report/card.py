"""The model card of an edited checkpoint: what a run found, for whoever downloads the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..utils.words import number_of
from .blocks import Cards, Code
from .markdown import markdown_block, markdown_text
from .records import Report
from .story import heading, scores_blocks
from .values import percent


def model_card(report: Report, terms: Mapping[str, str] | None = None) -> str:
    """``README.md`` for the checkpoint's folder.

    Arguments:
        report: all that it shows.
        terms: what the metadata say of the licence, such as ``{"license": "mit"}``.
    """
    from huggingface_hub import ModelCardData

    name = report.model.name
    data = ModelCardData(
        base_model=_hub_name(name),
        license="unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "mansu-interp"],
    )
    vars(data).update(terms or {})
    top, edit = heading(report), report.edit
    blocks = [
        f"# {markdown_text(Path(name).name)}, edited to forget",
        f"Task: {markdown_text(report.task.title)}",
        f"**{top.status.capitalize()}.** {markdown_text(top.sentence)}",
        f"Of `{markdown_text(name)}`, {number_of(edit.edited, 'parameter')} changed "
        f"({percent(edit.share, 3)}), nothing else. The licence of that model applies to this one.",
        "## Scorecard",
        markdown_block(Cards(report.properties)),
        *map(markdown_block, scores_blocks(report)),
        "All scores are on phrasings that unlearning never saw, on the checkpoint as saved. "
        "Surviving quantization is not erasure: relearning can bring the answers back.",
        "## Made with",
        markdown_block(Code(report.command)),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(b for b in blocks if b) + "\n"


def _hub_name(name: str) -> str | None:
    """The model's name on the hub: only that may stand in the metadata. A path would be taken for
    one; that of a snapshot in the hub's cache holds it."""
    for part in Path(name).parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return name if name.count("/") == 1 and not Path(name).exists() else None
