"""The model card of an edited checkpoint: what a run found, for whoever downloads the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.scores import METRICS, WORDS, Scores
from ..evaluation.versions import EDITED
from ..utils.words import number_of
from .blocks import Cards, Code
from .markdown import markdown_block, markdown_text
from .records import Edit, Report, kept_promise
from .story import heading, quantizer_table, scores_blocks
from .values import count, percent

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
else:  # takes a while to import
    EvalResult = object


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
        eval_results=_results(report),
        license="unknown",
        library_name="transformers",
        model_name=f"{Path(name).name}-edited",
        pipeline_tag="text-generation",
        tags=["machine-unlearning", "unlearning", "mansu-interp"],
        mansu={"survive": [q.name for q in report.quantizers if q.promised]},  # read by export
    )
    vars(data).update(terms or {})
    top, edit = heading(report), report.edit
    blocks = [
        f"# {markdown_text(Path(name).name)}, edited to forget",
        f"Task: {markdown_text(report.task.title)}",
        f"**{top.status.capitalize()}.** {markdown_text(top.sentence)}",
        f"Of `{markdown_text(name)}`, {number_of(edit.edited, 'parameter')} changed "
        f"({percent(edit.share, 3)}{_where(edit)}), nothing else. The licence of that model "
        "applies to this one.",
        "## Scorecard",
        markdown_block(Cards(report.properties)),
        *map(markdown_block, scores_blocks(report)),
        *_formats(report),
        "All scores are on phrasings that unlearning never saw, on the checkpoint as saved. "
        "Surviving quantization is not erasure: relearning can bring the answers back.",
        "## Made with",
        markdown_block(Code(report.command)),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(b for b in blocks if b) + "\n"


def _where(edit: Edit) -> str:
    """Where the changed parameters lie, of an edit of the embedding."""
    if not edit.embedding:
        return ""
    others = count(edit.edited - edit.embedding)
    return f": {others} in the layers, {count(edit.embedding)} in rows of the embedding"


def _results(report: Report) -> list[EvalResult]:
    """Mean accuracies of the edited model as the hub's ``model-index`` has them: by role and
    metric, in full precision and after each quantizer after which all sets were scored, with a word
    where nothing was promised."""
    from huggingface_hub import EvalResult

    scores, task = Scores(report.scores), report.task
    alone = {row.name for row in report.quantizers if not row.promised}
    out = []
    for role in dict.fromkeys(row.role for row in report.scores):
        rows = scores.of_role(role)
        edited = [v for v in rows[0].models if v.name == EDITED.name]
        versions = [v for v in edited if all(v in row.models for row in rows)]
        for version in versions:
            after = f", after {version.quantizer}" if version.quantizer else ""
            after += ", not promised" if version.quantizer in alone else ""
            for metric in METRICS:
                found = EvalResult(
                    task_type="text-generation",
                    dataset_type=task.name,
                    dataset_name=f"{task.name}: {role}, unseen phrasings",
                    dataset_config=role,
                    metric_type="accuracy",
                    metric_name=f"{WORDS[metric]} accuracy{after}",
                    metric_value=round(scores.mean(role, metric, version), 4),
                )
                out.append(found)
    return out


def _formats(report: Report) -> list[str]:
    """Which formats were looked at, and what holds of each."""
    rows, edit = report.quantizers, report.edit
    if not rows:
        return []
    promised = [r for r in rows if r.promised]
    through = [r.name for r in rows if r.trained_through]
    measured = [r.name for r in rows if not r.promised and not r.trained_through]
    said = []
    if promised:
        word = "holds" if all(map(kept_promise, promised)) else "does NOT hold"
        found = sorted({r.survival.edited for r in promised})
        of = " to ".join(count(n) for n in dict.fromkeys((found[0], found[-1])))
        said.append(
            f"The edit was made to survive {', '.join(r.name for r in promised)}: every edited "
            f"weight that is quantized there ({of} of {count(edit.edited)}) changes its code, and "
            f"no other weight does. That {word} of this checkpoint."
        )
    if edit.embedding:
        said.append(
            f"Of the edits {count(edit.embedding)} are in rows of the embedding, which these "
            "formats leave alone; `mansu export` writes the embedding of a GGUF file as Q8_0 (of "
            "a mix such as Q4_K_M as llama.cpp does, of f16 as F16)."
        )
    if through:
        said.append(
            f"Training went through {', '.join(through)} as well, which promises nothing there."
        )
    if measured:
        said.append(f"Nothing is promised of {', '.join(measured)}, which were measured.")
    said.append("No other format was looked at: answers may come back there.")
    return ["## Formats", " ".join(said), markdown_block(quantizer_table(rows))]


def _hub_name(name: str) -> str | None:
    """The model's name on the hub: only that may stand in the metadata. A path would be taken for
    one; that of a snapshot in the hub's cache holds it."""
    for part in Path(name).parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return name if name.count("/") == 1 and not Path(name).exists() else None
