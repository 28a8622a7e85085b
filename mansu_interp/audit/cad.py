"""CAD of knowledge: a number and a verdict on whether an edit erased facts, without the attack.

CAD predicts what relearning would find (`audit.relearning`, where *erased* is defined) from weights
and states alone. The algorithm (all ours):

1. Leave out the facts that the original does not know (`known`); split the other forget subjects
   into halves A and B, and take the train phrasings of each.
2. Ask the original, the edited and, if given, the quantized model for half B: how often does the
   answer rank first of four, and how often last?
3. Probe their states: a linear map fitted on half A, asked for half B (`probes.probe`).
4. Relearn half A in closed form on a copy of the edited model, and ask for half B after each step
   (`linearized.linearized_relearning`).
5. Run the edited model's states on in the original (`probes.stitches`).
6. Decide (`verdict.decide`): compare these shares, the `Evidence`, with thresholds.
7. Resample the prompts: a verdict that most resamplings do not share is undecided
   (`verdict.settle`).
8. CAD itself is 1 - knowledge, from the largest sign (`verdict.number`). Every sign is put on the
   scale of shares that rank first, so that what counts as there, or as gone, does so at the same
   place; that scale runs from chance (0) to the original's own share (1). It lies in the verdict's
   own range: 0.8 to 1 where the facts are erased, below 0.733 where they are there, between where
   it is open.

Of all signs that were tried on the calibration zoo, linearized relearning predicts relearning best
(docs/cad.md, `research/scripts/judge_zoo.py`). The probe is the second: where it finds nearly all
answers in the states of some block, the verdict is "suppressed" whatever the steps bring back,
since a longer attack can find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ModelError, TaskError
from ..models.language_model import LanguageModel
from ..models.layout import output_embeddings
from ..tasks.pairs import PairSet
from ..tasks.task import Task
from ..utils.files import Json
from ..utils.ranges import expect_kind
from .known import known_forget
from .linearized import linearized_relearning
from .probes import probe, ranked, stitches
from .relearning import halves, of_subjects, rivals_within
from .transfer import gradient_transfer
from .verdict import Evidence, decide, number, settle

RESAMPLES = 200
PROBE_PROMPTS, STEP_PROMPTS, ASKED_PROMPTS = 400, 96, 180
"""Prompts of each half whose states are probed; of half A that linearized relearning is given, and
of half B that it is asked for."""
ORIGINAL, EDITED, QUANTIZED = "original", "edited", "edited, quantized"
"""Names of the models in `CAD.predicted` and `CAD.probed`."""


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
    predicted: dict[str, float]
    """Share of half B's answers that each model ranks first of four, train phrasings; chance
    0.25."""
    half_b: list[float]
    """The same of the edited model after each step of linearized relearning."""
    half_a: list[float]
    """The same on half A, which is relearned."""
    ranked_last: list[float]
    """Share of half B's answers that rank last of four: of the edited model itself, then after each
    step; chance 0.25."""
    probed: dict[str, list[float]]
    """Share of half B's answers that a probe finds: in the embedding, then after each block."""
    stitched: list[float]
    """The same with the edited model's states up to each cut and the original from there on."""
    by_weight: dict[str, float]
    """Share of each weight in the gradient transfer between the halves (see `transfer`)."""

    def to_json(self) -> dict[str, Json]:
        """For reports."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Plain text for the terminal."""

        def row(name: str, first: str, shares: list[float]) -> str:
            return f"{name:<41} {first:<7} " + "  ".join(f"{s:.2f}" for s in shares)

        out = [
            f"{self.verdict} (confidence {self.confidence:.2f}), CAD {self.cad:.2f}",
            self.sentence,
            "",
            "Four-way choice on half B (chance 0.25)   itself  probe: embedding, then each block",
        ]
        out += [row(n, f"{v:.2f}", self.probed[n]) for n, v in self.predicted.items()]
        out.append(row("edited states run on by the original", "-", self.stitched))
        out += ["", "Edited, before and after each step of linearized relearning on half A"]
        first, *after = self.predicted["edited"], *self.half_b
        out.append(row("half B, answer first of four", f"{first:.2f}", after))
        first, *after = self.ranked_last
        out.append(row("half B, answer last of four", f"{first:.2f}", after))
        out.append(row("half A, answer first of four", "-", self.half_a))
        top = sorted(self.by_weight.items(), key=lambda item: -item[1])[:5]
        out += ["", "Where relearning would bring it back from (share of gradient transfer):"]
        return out + [f"  {name}  {share:+.3f}" for name, share in top]


def check_alike(original: LanguageModel, edited: LanguageModel) -> None:
    """Raise ModelError unless two checkpoints can be compared state by state.

    Raises:
        ModelError: another architecture, width, vocabulary, tokenizer or shape of a weight, or a
            weight that is not finite.
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
    one, two = ({n: tuple(w.shape) for n, w in m.weights.items()} for m in (original, edited))
    if other := [n for n in {**one, **two} if one.get(n) != two.get(n)]:
        raise ModelError(
            f"The weight {other[0]} is {two.get(other[0], 'missing')} in {edited.name} and "
            f"{one.get(other[0], 'missing')} in {original.name}. Compare two of one model."
        )
    for model in (original, edited):
        model.check_finite()
    if original.get_tokenizer().get_vocab() != edited.get_tokenizer().get_vocab():
        raise ModelError(
            f"{edited.name} and {original.name} have different tokenizers. Compare checkpoints "
            "that share one."
        )


@dataclass(frozen=True)
class _Found:
    """What steps 2 to 5 find, prompt by prompt."""

    first: dict[str, Bool[Tensor, " prompts"]]
    """By model: whether the answer ranks first of four."""
    last: Float[Tensor, " prompts"]
    """1 where the edited model ranks the answer last."""
    probed: dict[str, Float[Tensor, "cuts prompts"]]
    """By model: 1 where a probe finds the answer."""
    half_b: Float[Tensor, "steps asked"]
    """After each step of linearized relearning: 1 where the answer ranks first."""
    half_b_last: Float[Tensor, "steps asked"]
    """And where it ranks last."""
    half_a: Float[Tensor, " steps"]
    """Share of half A's answers that rank first."""
    stitched: list[float]

    def evidence(self, rows: Int[Tensor, " n"], asked: Int[Tensor, " m"]) -> Evidence:
        """The evidence on some prompts of half B, and some of those asked after relearning."""
        quantized = self.first.get(QUANTIZED)
        return Evidence(
            predicted=float(self.first[EDITED][rows].float().mean()),
            relearned=float(self.half_b[-1, asked].mean()),
            half_a=float(self.half_a[-1]),
            ranked_last=max(
                float(self.last[rows].mean()), float(self.half_b_last[-1, asked].mean())
            ),
            probed=float(self.probed[EDITED][:, rows].mean(1).max()),
            stitched=self.stitched[-1],
            original=float(self.first[ORIGINAL][rows].float().mean()),
            quantized=None if quantized is None else float(quantized[rows].float().mean()),
        )


def _look(
    models: dict[str, LanguageModel],
    half_a: PairSet,
    half_b: PairSet,
    seed: int,
    note: Callable[[str, int, int], None],
) -> _Found:
    """Steps 2 to 5."""
    first: dict[str, Bool[Tensor, " prompts"]] = {}
    last: dict[str, Bool[Tensor, " prompts"]] = {}
    probed: dict[str, Float[Tensor, "cuts prompts"]] = {}
    for k, (name, model) in enumerate(models.items()):
        note("probing states", k, len(models))
        first[name], last[name] = ranked(model, half_b)
        probed[name] = probe(model, half_a, half_b).float()
    note("relearning, linearized", 0, 0)
    edited, asked = models[EDITED], half_b.sample(ASKED_PROMPTS, seed)
    steps = linearized_relearning(
        edited,
        half_a.sample(STEP_PROMPTS, seed),
        asked,
        on_step=lambda done, total: note("relearning, linearized", done, total),
    )
    note("stitching", 0, 0)
    return _Found(
        first=first,
        last=last[EDITED].float(),
        probed=probed,
        half_b=steps.half_b.float(),
        half_b_last=steps.ranked_last.float(),
        half_a=steps.half_a.float().mean(1),
        stitched=stitches(edited, models[ORIGINAL], asked),
    )


def _confidence(found: _Found, verdict: str, seed: int) -> float:
    """Share of resamplings of the prompts that give the same verdict (step 7)."""
    prompts, asked = len(found.last), found.half_b.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def resampled(size: int) -> Int[Tensor, " size"]:
        return torch.randint(size, (size,), generator=generator)

    same = [
        decide(found.evidence(resampled(prompts), resampled(asked)))[0] == verdict
        for _ in range(RESAMPLES)
    ]
    return sum(same) / RESAMPLES


def _check_given(
    original: LanguageModel, edited: LanguageModel, quantized: LanguageModel | None, task: Task
) -> None:
    """Raise ModelError or TaskError unless these are two checkpoints to compare, and a task."""
    for name, model in (("original", original), ("edited", edited)):
        expect_kind(ModelError, name, model, LanguageModel)
        model.check_editable()
    expect_kind(ModelError, "quantized", quantized, LanguageModel, None)
    expect_kind(TaskError, "task", task, Task)
    check_alike(original, edited)


def judge_erasure(
    original: LanguageModel,
    edited: LanguageModel,
    task: Task,
    *,
    quantized: LanguageModel | None = None,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> CAD:
    """Judge whether an edited checkpoint has erased a task's forget facts, or hides them.

    See the module for the steps. Only train phrasings are looked at, so that scores on unseen ones
    stay independent evidence.

    Arguments:
        original: the model before the edit.
        edited: the model after it; it is not changed.
        task: its forget facts are split in two by subject.
        quantized: the edited model's quantized form, for ``recovered``.
        seed: of the split and of the resamplings.
        on_step: called with (stage, done, total).

    Returns:
        The verdict, CAD and the shares behind them.

    Raises:
        ModelError: the checkpoints cannot be compared.
        TaskError: fewer than two forget subjects, or the original does not know the facts.
    """
    _check_given(original, edited, quantized, task)
    task, _ = known_forget(original, task)
    half_a, half_b = (
        rivals_within(of_subjects(task.forget, h)).sample(PROBE_PROMPTS, seed)
        for h in halves(task.forget, seed)
    )
    models = {ORIGINAL: original, EDITED: edited}
    if quantized is not None:
        models[QUANTIZED] = quantized
    note = on_step or (lambda *_: None)
    found = _look(models, half_a, half_b, seed, note)
    note("confidence of the verdict", 0, 0)
    evidence = found.evidence(torch.arange(len(found.last)), torch.arange(found.half_b.shape[1]))
    word, sentence = decide(evidence)
    word, sentence, confidence = settle(word, sentence, _confidence(found, word, seed))
    some_a, some_b = (half.sample(ASKED_PROMPTS, seed) for half in (half_a, half_b))
    return CAD(
        verdict=word,
        sentence=sentence,
        confidence=confidence,
        cad=number(word, evidence),
        predicted={name: float(v.float().mean()) for name, v in found.first.items()},
        half_b=found.half_b.mean(1).tolist(),
        half_a=found.half_a.tolist(),
        ranked_last=[float(found.last.mean()), *found.half_b_last.mean(1).tolist()],
        probed={name: v.mean(1).tolist() for name, v in found.probed.items()},
        stitched=found.stitched,
        by_weight=gradient_transfer(edited, some_a, some_b).by_weight,
    )
