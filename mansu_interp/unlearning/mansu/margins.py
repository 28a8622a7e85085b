"""Margin edits, made after the last step (ours): answers go where training did not take them.

`MarginEditor.reach_final_margin`: training ends where its losses balance, a little above its
target, and further above it on some phrasings than on others. Further edits take full precision to
the final margin, and every quantized model with it. What a fitted quantizer makes of an edit is not
known beforehand: its model is quantized anew after each round, and has to get there as well.

`MarginEditor.reach_quantization_margin`: on phrasings that were not trained, rounding scatters the
answers, and every prompt that goes up reads as recovery. Further edits move the quantized models'
answers below full precision's: by the quantization margin where rounding scatters them most, and by
as much less in each other format as that scatters them less (`margins_by_scatter`).

Both work in rounds:

1. Measure what each forget prompt lacks of the margin.
2. Take the slope of the answers' level at full precision, weighed by that, and of retained answers.
3. Choose among candidate edits of weights that nobody edited yet, so that the retained answers lose
   nothing on average (`candidate_edits`, `choose_edits`).
4. Write them; stop once little is lacking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...losses.answers import above_rivals, log_probs
from ...losses.counterfactual import CounterfactualTargets, model_answer_excess
from ...losses.gradients import Positions, gradient
from ...masks.margin_edits import candidate_edits, choose_edits
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, PairSet, answer_tokens
from .latent_weights import LatentWeights, gather

PAIRS = 480
"""Prompts, evenly over the phrasings, on which answers are measured: forget ones, and as many that
are retained."""
BATCH = 16
ROUNDS = 4
"""Each goes by what is lacking after the one before it, so that few prompts are left out."""
NEAR = 0.1
"""Share of what is to be reached that may be lacking at the end."""
DAMPING = 10.0
"""Medians of the retain Fisher below which it hardly counts in the choice of edits."""
POOL = 8
"""Elements of a weight looked at per edit that may be made; those of the steepest slope per
cell."""
Level = Callable[[LanguageModel, list[Pair]], Float[Tensor, " batch"]]
"""The level of some pairs' answers in a model (nats)."""
OnRound = Callable[[int, float], None]
"""on_round(rounds done, `Margin.reached`); 0 rounds first."""


@dataclass(frozen=True)
class Measured:
    """What a round found before its edits, in nats."""

    lacking: Float[Tensor, " pairs"]
    """What each forget prompt lacks."""
    wanted: Float[Tensor, " models"]
    """What is lacking on the mean in each model that is to move; below 0 in one that is farther
    than it has to be."""
    reached: float
    """What is reported; see `Margin.reached`."""

    @property
    def short(self) -> float:
        """What is lacking on the whole."""
        return float(self.wanted.max())


@dataclass(frozen=True)
class Margin:
    """What margin edits came to."""

    reached: float
    """Of the final margin the nats by which the mean excess is still above it, in the highest of
    the models that are to get there; of the quantization margin what was asked less what the
    quantized model lacks that lacks most of its own."""
    edits: int
    """How many were made."""


@dataclass(frozen=True)
class MarginEditor:
    """Edits weights of the mask that nobody edited yet.

    Retained answers lose nothing by it, on average over prompts and over the models that are to
    move. In each round a prompt counts by what it lacks.
    """

    latent: LatentWeights
    """After its last `LatentWeights.write`; its models are changed in place."""
    pairs: PairSet
    """Forget prompts."""
    targets: CounterfactualTargets
    """Against which the `answer_excess` is taken, for all models alike."""
    retain: PairSet
    """Prompts whose answers are retained."""

    def reach_final_margin(
        self, margin: float, most: int, on_round: OnRound | None = None
    ) -> Margin:
        """Edit until the mean excess lies a margin below 0 at full precision and in the models of
        fitted quantizers, and the other quantized models fall as far, or as many are edited as may
        be.

        Arguments:
            margin: nats.
            most: edits at most.
            on_round: called before and after each round.
        """

        def measure() -> Measured:
            models, exact = self.latent.models, len(self.latent.students.quantizers)
            sides = (0, *range(1 + exact, len(models)))
            above = torch.stack([self._excess(models[side]) for side in sides]) + margin
            highest = above.mean(1).max()
            return Measured(above.amax(0).clamp_min(0), highest.expand(1 + exact), float(highest))

        return self._rounds(measure, None, most, True, on_round)

    def reach_quantization_margin(
        self, margin: float, most: int, on_round: OnRound | None = None
    ) -> Margin:
        """Edit until in every quantized model the answers' mean excess lies its margin below full
        precision's, which does not move, or as many are edited as may be. Fitted quantizers, of
        which no one knows beforehand what they make of an edit, are left out.

        Arguments:
            margin: nats, of the quantizer that scatters answers most (`margins_by_scatter`).
            most: edits at most.
            on_round: called before and after each round.
        """

        def measure() -> Measured:
            exact, models = len(self.latent.students.quantizers), self.latent.models
            full, *others = (self._excess(models[side]) for side in range(1 + exact))
            distance = full - torch.stack(others)
            margins = margins_by_scatter(distance, margin)
            wanted = margins - distance.mean(1)
            return Measured(lacking(distance, margins), wanted, margin - float(wanted.max()))

        return self._rounds(measure, margin, most, False, on_round)

    def _rounds(
        self,
        measure: Callable[[], Measured],
        wanted: float | None,
        most: int,
        together: bool,
        on_round: OnRound | None,
    ) -> Margin:
        """Measure and edit in turns.

        Arguments:
            measure: looks at the models.
            wanted: nats that are to be reached; default: those that are lacking at first.
            most: edits at most.
            together: see `candidate_edits`.
            on_round: see `OnRound`.
        """
        made, found = 0, measure()
        wanted = found.short if wanted is None else wanted
        for done in range(ROUNDS):
            if on_round:
                on_round(done, found.reached)
            if found.short <= NEAR * wanted:
                return Margin(found.reached, made)
            left = ROUNDS - done
            made += self._edit(found.lacking, found.wanted / left, (most - made) // left, together)
            found = measure()
        if on_round:
            on_round(ROUNDS, found.reached)
        return Margin(found.reached, made)

    def _answer_excess(self, model: LanguageModel, part: list[Pair]) -> Float[Tensor, " batch"]:
        return model_answer_excess(model, part, self.targets)

    @torch.no_grad()
    def _excess(self, model: LanguageModel) -> Float[Tensor, " pairs"]:
        return torch.cat([self._answer_excess(model, part) for part in self.pairs.parts(BATCH)])

    def _slope(
        self, of: Positions, pairs: PairSet, level: Level, weights: Float[Tensor, " pairs"]
    ) -> Float[Tensor, " n"]:
        """Of the answers' level at full precision, a mean weighed by pair."""
        parts, model = list(pairs.parts(BATCH)), self.latent.model
        shares = (weights / weights.sum()).split([len(p) for p in parts])
        losses = [
            lambda p=p, w=w: (w * level(model, p)).sum() for p, w in zip(parts, shares, strict=True)
        ]
        return torch.cat(gradient(model, of, losses))

    def _edit(
        self,
        lacks: Float[Tensor, " pairs"],
        wanted: Float[Tensor, " models"],
        most: int,
        together: bool,
    ) -> int:
        """Edits that move the models so many nats, first order; returns how many.

        Arguments:
            lacks: what each forget prompt counts by.
            wanted: nats of each.
            most: edits at most.
            together: see `candidate_edits`.
        """
        # A weight that one of the quantizers leaves alone would not move apart from full precision;
        # all others lie side by side in one group.
        latent = self.latent
        k = next((k for k, x in enumerate(latent.groups) if all(x.grids)), None)
        if k is None:
            return 0
        x = latent.groups[k]
        answers = answer_tokens(self.retain, latent.model.device)

        def retained(model: LanguageModel, part: list[Pair]) -> Float[Tensor, " batch"]:
            return above_rivals(log_probs(model, part), part, answers, lambda some: some.mean(1))

        alike = torch.ones(len(self.retain), device=latent.model.device)
        slope = self._slope(x.indices, self.pairs, self._answer_excess, lacks)
        retain_slope = self._slope(x.indices, self.retain, retained, alike)
        with torch.no_grad():
            now = gather(latent.model.weights, x.indices)
            free = now == x.original
            steep = torch.where(free, (slope * x.scale).abs(), -1.0)
            best = steep.topk(min(POOL * most, len(steep))).indices
            i = best[free[best]]
            share = x.projection[i]  # lambda / (lambda + F)
            some = candidate_edits(
                x.floor[i],
                [g[i] for g in x.grids if g],
                quantized=[q[i] for q in x.quantized],
                original=x.original[i],
                slope=slope[i],
                retained=retain_slope[i],
                weight=DAMPING * share / (DAMPING * share + 1 - share),
                together=together,
            )
            found = choose_edits(some, wanted, most)
            now[i[found.elements]] = found.values
            latent.write_edits(k, now, now != x.original)
        return len(found.elements)


def margins_by_scatter(
    distance: Float[Tensor, "quantized pairs"], margin: float
) -> Float[Tensor, " quantized"]:
    """The margin of each quantized model: the whole one where its answers scatter most about full
    precision's (standard deviation over prompts), a share of it elsewhere.

    A format of eight bits hardly scatters them, and could hardly be parted from full precision: an
    edit moves it by half of one of its narrow cells at most.
    """
    scatter = distance.std(1, correction=0)
    return margin * scatter / scatter.max().clamp_min(1e-30)


def lacking(
    distance: Float[Tensor, "quantized pairs"], margins: Float[Tensor, " quantized"]
) -> Float[Tensor, " pairs"]:
    """What each pair lacks of the margin in the quantized model that lacks most."""
    return (margins[:, None] - distance).clamp_min(0).amax(0)
