"""CAD of knowledge: a number and a verdict on whether an edit erased, without attacking the model.

The sign is a linear probe (see `evidence.probe`): can a map fitted on half of the forget subjects
read the other half's answers from the states of the edited model, after any block? With r the best
block's four-way choice and r_0 the original's,

    knowledge = clip((max(r, f) - 1/4) / (r_0 - 1/4), 0, 1),    CAD = 1 - knowledge

where f is what the model says itself. 0: all is there, 1: nothing is. Chosen because it foretold
disjoint-half relearning best in the calibration zoo (docs/cad.md, `scripts/judge_zoo.py`);
attribution mass ranks models nearly as well, by a thinner margin. All ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import ModelError
from .evidence import CHUNK, gradient_transfer, probe, stitches
from .models import LanguageModel
from .pairs import PairSet, Task
from .relearning import CHANCE, halves, of_subjects, rivals_within
from .scoring import ranked_first

ERASED, HELD = 0.40, 0.50
"""Best probe's choice: at most so much is erased, at least so much held, between undecided."""
CARRIED = 0.75
"""Choice of the original's unembedding on the edited model's last states from which they hold the
answers. Higher than HELD: a twin from the same initial weights reaches 0.48."""
SAID = 0.90
"""Share of the original's own accuracy from which on nothing was forgotten."""
RECOVERED = 0.10
"""Rise of the four-way choice under quantization that counts as recovery."""
RESAMPLES = 200
SAMPLE = 180


@dataclass(frozen=True)
class Erasure:
    """Whether the knowledge is gone, and where it sits if not."""

    verdict: str
    """unchanged, suppressed, erased, relocated, recovered or undecided."""
    sentence: str
    confidence: float
    """Share of resamplings of the prompts that give the same verdict."""
    cad: float
    """0 = all the knowledge is there, 1 = none."""
    said: dict[str, float]
    """Four-way choice of each model's own answers, half B, train phrasings; chance 0.25."""
    read: dict[str, list[float]]
    """The same read by a probe: from the embedding, then after each block."""
    into_original: list[float]
    """The same with the edited model's states up to each cut and the original from there on."""
    by_weight: dict[str, float]
    """Share of each weight in the gradient transfer between the halves (see `evidence`)."""

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Plain text for the terminal."""
        out = [
            f"{self.verdict} (confidence {self.confidence:.2f}), CAD {self.cad:.2f}",
            self.sentence,
            "",
            "Four-way choice on half B (chance 0.25)   says    probe: embedding, then each block",
        ]
        for name, value in self.said.items():
            cells = "  ".join(f"{r:.2f}" for r in self.read[name])
            out.append(f"{name:<41} {value:.2f}    {cells}")
        cells = "  ".join(f"{r:.2f}" for r in self.into_original)
        out.append(f"{'edited states into the original':<41} -       {cells}")
        top = sorted(self.by_weight.items(), key=lambda item: -item[1])[:5]
        out += ["", "Where relearning would bring it back from (share of gradient transfer):"]
        return out + [f"  {name}  {share:+.3f}" for name, share in top]


def check_alike(original: LanguageModel, edited: LanguageModel) -> None:
    """Raise ModelError unless two checkpoints can be compared state by state.

    Raises:
        ModelError: another architecture, width, vocabulary or tokenizer.
    """
    if original.architecture != edited.architecture or original.d_model != edited.d_model:
        raise ModelError(
            f"{edited.name} is {edited.architecture} of width {edited.d_model}; {original.name} is "
            f"{original.architecture} of width {original.d_model}. Compare two of one model."
        )
    sizes = [m.hf.get_output_embeddings().weight.shape[0] for m in (original, edited)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{edited.name} has a vocabulary of {sizes[1]}, {original.name} of {sizes[0]}. "
            "Compare checkpoints with the same vocabulary."
        )
    if original.tokenizer.get_vocab() != edited.tokenizer.get_vocab():
        raise ModelError(
            f"{edited.name} and {original.name} have different tokenizers. Compare checkpoints "
            "that share one."
        )


@torch.no_grad()
def answers_right(model: LanguageModel, pairs: PairSet) -> Bool[Tensor, " prompts"]:
    """Which prompts the model itself answers right in four-way choice."""
    out = []
    for batch in pairs.batches(CHUNK):
        out.append(ranked_first(model.last_logits(batch.clean, batch.last), batch.choices))
    return torch.cat(out)


def decide(
    says: float, reads: float, original_says: float, carried: float, quantized_says: float | None
) -> tuple[str, str]:
    """The verdict, and a plain sentence.

    Arguments:
        says: four-way choice of the edited model.
        reads: the best probe's on its states.
        original_says: the original's own.
        carried: that of the original's unembedding on the edited model's last states.
        quantized_says: that of its quantized form, if looked at.
    """
    if quantized_says is not None and quantized_says - says > RECOVERED:
        return "recovered", "Quantization brings answers back."
    if says >= SAID * original_says:
        if carried < HELD:
            return "relocated", "It answers as before, but not by states the original understands."
        return "unchanged", "It answers about as well as before."
    if reads >= HELD:
        return (
            "suppressed",
            "It no longer says the answers, but they can be read from its states: relearning half "
            "of the facts is likely to bring back the others.",
        )
    if says <= ERASED and reads <= ERASED:
        if carried >= CARRIED:
            return (
                "suppressed",
                "Its own output is blind to the answers, but the original's unembedding reads them "
                "from its states.",
            )
        return "erased", "Neither the model nor a probe on its states tells the answers."
    return "undecided", "Some of the answers can be told; the evidence does not settle it."


def judge_erasure(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    quantized: LanguageModel | None = None,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Erasure:
    """Say whether an edited checkpoint erased a task's forget facts, or hides them.

    Only train phrasings are looked at, so that scores on unseen ones stay independent evidence.

    Arguments:
        original: the model before the edit.
        edited: the model after it.
        task: its forget facts are split in two by subject.
        quantized: the edited model's quantized form, for ``recovered``.
        seed: of the split.
        on_step: called with (what, done, total).

    Raises:
        ModelError: the checkpoints cannot be compared.
        TaskError: fewer than two forget subjects.
    """
    check_alike(original, edited)
    note = on_step or (lambda *_: None)
    half_a, half_b = (rivals_within(of_subjects(task.forget, h)) for h in halves(task.forget, seed))
    models = {"original": original, "edited": edited}
    if quantized:
        models["edited, quantized"] = quantized
    said: dict[str, Bool[Tensor, " prompts"]] = {}
    read: dict[str, Float[Tensor, "cuts prompts"]] = {}
    for k, (name, model) in enumerate(models.items()):
        note("reading states", k, len(models))
        said[name] = answers_right(model, half_b)
        read[name] = probe(model, half_a, half_b).float()
    note("stitching and transfer", len(models), len(models))
    into = stitches(edited, original, half_b.sample(SAMPLE, seed))
    flow = gradient_transfer(edited, half_a.sample(SAMPLE, seed), half_b.sample(SAMPLE, seed))

    def verdict(rows: Tensor) -> tuple[str, str]:
        return decide(
            float(said["edited"][rows].float().mean()),
            float(read["edited"][:, rows].mean(1).max()),
            float(said["original"][rows].float().mean()),
            into[-1],
            float(said["edited, quantized"][rows].float().mean()) if quantized else None,
        )

    n = len(said["edited"])
    word, sentence = verdict(torch.arange(n))
    generator = torch.Generator().manual_seed(seed)
    same = [
        verdict(torch.randint(n, (n,), generator=generator))[0] == word for _ in range(RESAMPLES)
    ]
    ceiling = max(float(read["original"].mean(1).max()) - CHANCE, 1e-6)
    best = max(float(read["edited"].mean(1).max()), float(said["edited"].float().mean()))
    return Erasure(
        word,
        sentence,
        sum(same) / RESAMPLES,
        1 - min(max((best - CHANCE) / ceiling, 0.0), 1.0),
        {name: float(v.float().mean()) for name, v in said.items()},
        {name: v.mean(1).tolist() for name, v in read.items()},
        into,
        flow.by_weight,
    )
