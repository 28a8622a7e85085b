"""CAD of knowledge: a number and a verdict on whether an edit erased, without attacking the model.

The first sign is linearized relearning (`linearized_relearning`). With f the share of half B's answers
that rank first of four, or last of four (an answer that is avoided is given away as well), before
or after a few closed-form steps on half A, whichever of the four is most, and f_0 what the original
says,

    knowledge = clip((f - 1/4) / (f_0 - 1/4), 0, 1),    CAD = 1 - knowledge

0: all is there, 1: nothing is. It foretold disjoint-half relearning best in the calibration zoo
(docs/cad.md, `research/scripts/judge_zoo.py`). The second is a linear probe (`evidence.probe`):
where it reads nearly everything from the states of some block, the verdict is "suppressed" whatever
the steps bring; a longer attack can find it. All ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ModelError
from ..models.language_model import LanguageModel
from ..models.layout import output_embeddings
from ..tasks.task import Task
from .linearized import linearized_relearning
from .probes import probe, ranked, stitches
from .relearning import CHANCE, TOLERANCE, halves, of_subjects, rivals_within
from .transfer import gradient_transfer

ERASED, HELD = CHANCE + TOLERANCE, 0.45
"""Choice after linearized relearning: at most so much is erased (the attack's own tolerance), at least
so much held, between undecided."""
LEARNT = 0.75
"""Choice on half A itself below which linearized relearning did not work and shows nothing."""
READ = 0.70
"""Best probe's choice from which on the answers are held, whatever linearized relearning brings."""
CARRIED = 0.75
"""Choice of the original's unembedding on the edited model's last states from which they hold the
answers. High: a twin from the same initial weights reaches 0.48."""
UNDERSTOOD = 0.50
"""The same choice below which an answering model's states are not the original's any more."""
SAID = 0.90
"""Share of the original's own accuracy from which on nothing was forgotten."""
RECOVERED = 0.10
"""Rise of the four-way choice under quantization that counts as recovery."""
RESAMPLES = 200
MAJORITY = 0.5
"""Share of the resamplings that a verdict needs."""
READ_OF, RELEARNT, ASKED = 400, 96, 180
"""Prompts of each half whose states are read; of half A that linearized relearning is given, and of
half B that it is asked for."""


@dataclass(frozen=True)
class CAD:
    """Whether the knowledge is gone, and where it sits if not."""

    verdict: str
    """unchanged, suppressed, erased, relocated, recovered or undecided."""
    sentence: str
    confidence: float
    """Share of resamplings of the prompts that give the same verdict; where less than half agree,
    the verdict is undecided and this the share that does not."""
    cad: float
    """0 = all the knowledge is there, 1 = none."""
    said: dict[str, float]
    """Four-way choice of each model's own answers, half B, train phrasings; chance 0.25."""
    relearnt: list[float]
    """The same of the edited model after each step of linearized relearning."""
    learnt: list[float]
    """The same on half A, which is relearnt."""
    avoided: list[float]
    """Share of half B's answers that rank last of four: of the edited model itself, then after each
    step; chance 0.25."""
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
        out += ["", "Edited, before and after each virtual step on half A"]
        for name, found in (
            ("half B, answer first of four", [self.said["edited"], *self.relearnt]),
            ("half B, answer last of four", self.avoided),
        ):
            out.append(f"{name:<41} {'  '.join(f'{r:.2f}' for r in found)}")
        cells = "  ".join(f"{r:.2f}" for r in self.learnt)
        out.append(f"{'half A, answer first of four':<41} -     {cells}")
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
    sizes = [len(output_embeddings(m.hf).get_parameter("weight")) for m in (original, edited)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{edited.name} has a vocabulary of {sizes[1]}, {original.name} of {sizes[0]}. "
            "Compare checkpoints with the same vocabulary."
        )
    if original.get_tokenizer().get_vocab() != edited.get_tokenizer().get_vocab():
        raise ModelError(
            f"{edited.name} and {original.name} have different tokenizers. Compare checkpoints "
            "that share one."
        )


def decide(
    says: float,
    relearnt: float,
    learnt: float,
    avoided: float,
    reads: float,
    original_says: float,
    carried: float,
    quantized_says: float | None,
) -> tuple[str, str]:
    """The verdict, and a plain sentence.

    Arguments:
        says: four-way choice of the edited model.
        relearnt: the same after linearized relearning of the other half.
        learnt: that of the half that was relearnt.
        avoided: share of answers that rank last of four, before or after, whichever is more.
        reads: the best probe's on its states.
        original_says: the original's own.
        carried: that of the original's unembedding on the edited model's last states.
        quantized_says: that of its quantized form, if looked at.
    """
    if quantized_says is not None and quantized_says - says > RECOVERED:
        return "recovered", "Quantization brings answers back."
    if says >= SAID * original_says:
        if carried < UNDERSTOOD:
            return "relocated", "It answers as before, but not by states the original understands."
        return "unchanged", "It answers about as well as before."
    if relearnt >= HELD:
        return (
            "suppressed",
            "It no longer says the answers, but a few steps on half of the facts bring back the "
            "others.",
        )
    if avoided >= HELD:
        return (
            "suppressed",
            "It avoids the answers: they rank last of four too often, which gives them away, too.",
        )
    if reads >= READ:
        return (
            "suppressed",
            "It no longer says the answers, but a linear probe reads them from its states.",
        )
    if max(says, relearnt, avoided) <= ERASED:
        if carried >= CARRIED:
            return (
                "suppressed",
                "Its own output is blind to the answers, but the original's unembedding reads them "
                "from its states.",
            )
        if learnt < LEARNT:
            return (
                "undecided",
                "Linearized relearning did not work: it could not learn even its half.",
            )
        return "erased", "It does not tell the answers, and half of the facts do not bring them."
    return "undecided", "Some of the answers can be told; the evidence does not settle it."


def settle(verdict: str, sentence: str, agree: float) -> tuple[str, str, float]:
    """Verdict, sentence and confidence, given the share of resamplings that agree with a verdict:
    one that most do not share is undecided."""
    if verdict == "undecided" or agree >= MAJORITY:
        return verdict, sentence, agree
    thin = f"The evidence is thin: most resamplings of the prompts do not say {verdict}."
    return "undecided", thin, 1 - agree


def judge_erasure(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    quantized: LanguageModel | None = None,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> CAD:
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
    half_a, half_b = (
        rivals_within(of_subjects(task.forget, h)).sample(READ_OF, seed)
        for h in halves(task.forget, seed)
    )
    models = {"original": original, "edited": edited}
    if quantized:
        models["edited, quantized"] = quantized
    said: dict[str, Bool[Tensor, " prompts"]] = {}
    read: dict[str, Float[Tensor, "cuts prompts"]] = {}
    shunned: dict[str, Bool[Tensor, " prompts"]] = {}
    for k, (name, model) in enumerate(models.items()):
        note("reading states", k, len(models))
        said[name], shunned[name] = ranked(model, half_b)
        read[name] = probe(model, half_a, half_b).float()
    note("relearning, linearized", len(models), len(models))
    some_b = half_b.sample(ASKED, seed)
    step = linearized_relearning(edited, half_a.sample(RELEARNT, seed), some_b)
    back, learnt = step.half_b.float(), step.half_a.float().mean(1)
    before, avoided = shunned["edited"].float(), step.avoided.float()
    into = stitches(edited, original, some_b)
    flow = gradient_transfer(edited, half_a.sample(ASKED, seed), some_b)

    def verdict(rows: Tensor, some: Tensor) -> tuple[str, str]:
        return decide(
            float(said["edited"][rows].float().mean()),
            float(back[-1, some].mean()),
            float(learnt[-1]),
            max(float(before[rows].mean()), float(avoided[-1, some].mean())),
            float(read["edited"][:, rows].mean(1).max()),
            float(said["original"][rows].float().mean()),
            into[-1],
            float(said["edited, quantized"][rows].float().mean()) if quantized else None,
        )

    n, m = len(said["edited"]), back.shape[1]
    word, sentence = verdict(torch.arange(n), torch.arange(m))
    generator = torch.Generator().manual_seed(seed)

    def resampled(size: int) -> Tensor:
        return torch.randint(size, (size,), generator=generator)

    same = [verdict(resampled(n), resampled(m))[0] == word for _ in range(RESAMPLES)]
    word, sentence, confidence = settle(word, sentence, sum(same) / RESAMPLES)
    ceiling = max(float(said["original"].float().mean()) - CHANCE, 1e-6)
    best = max(float(v.float().mean()) for v in (said["edited"], back[-1], before, avoided[-1]))
    return CAD(
        word,
        sentence,
        confidence,
        1 - min(max((best - CHANCE) / ceiling, 0.0), 1.0),
        {name: float(v.float().mean()) for name, v in said.items()},
        back.mean(1).tolist(),
        learnt.tolist(),
        [float(before.mean()), *avoided.mean(1).tolist()],
        {name: v.mean(1).tolist() for name, v in read.items()},
        into,
        flow.by_weight,
    )
