"""The model card of an edited checkpoint: what a run found, for whoever downloads the model."""

from __future__ import annotations

from pathlib import Path

from ..utils.words import counted
from .blocks import Cards, Code
from .markdown import markdown_block, markdown_text
from .records import Report
from .story import heading, scores_blocks
from .values import percent


def model_card(report: Report) -> str:
    """``README.md`` for the checkpoint's folder, rendered from the report only."""
    from huggingface_hub import ModelCardData

    name = report.model.name
    # Only a name on the hub may stand in the metadata; a path would be taken for one.
    base = name if name.count("/") == 1 and not Path(name).exists() else None
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "mansu-interp"],
    )
    top, edit = heading(report), report.edit
    blocks = [
        f"# {markdown_text(Path(name).name)}, edited to forget",
        f"Task: {markdown_text(report.task.title)}",
        f"**{top.status.capitalize()}.** {markdown_text(top.sentence)}",
        f"Of `{markdown_text(name)}`, {counted(edit.edited, 'parameter')} changed "
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
