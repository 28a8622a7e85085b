"""What is edited after the last step (ours): the answers go where training did not take them.

`MarginEditor.reach_final_margin`: training ends where its losses balance, a little above its target, and further
above it on some phrasings than on others. Further edits take full precision there, and every
quantized model with it.

`MarginEditor.reach_quantization_margin`: what is fitted on the training's phrasings holds on others but for a scatter, to
which rounding adds: prompt by prompt answers go up and down, and every prompt that goes up reads as
recovery. So the quantized models are parted from full precision, by `parting`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...losses.answers import above_rivals, log_probs
from ...losses.counterfactual import CounterfactualTargets, model_answer_excess
from ...losses.gradients import Weights, gradient
from ...masks.margin_edits import candidate_edits, choose_edits
from ...models.language_model import LanguageModel
from ...tasks.pairs import Pair, PairSet, answer_tokens
from .latent_weights import LatentWeights, gather

PAIRS = 480
"""Prompts, evenly over the phrasings, on which answers are measured: forget ones, and as many that
are kept."""
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
"""How high the answers of some pairs stand in a model (nats)."""
Measured = tuple[Float[Tensor, " pairs"], float, float]
"""What each forget prompt lacks, what is lacking on the whole, and what `OnRound` is told: nats."""
OnRound = Callable[[int, float], None]
"""on_round(rounds done, nats): of `MarginEditor.reach_final_margin` those above the target, of `MarginEditor.reach_quantization_margin` those of
the nearest quantized model below full precision; 0 rounds first."""


@dataclass(frozen=True)
class MarginEditor:
    """Edits weights of the mask that nobody edited yet.

    Those of retained answers are to lose nothing by it, on average over prompts and over the models
    that are to move. In each round a prompt counts by what it lacks.
    """

    latent: LatentWeights
    """After its last `LatentWeights.write`; its models are changed in checkpoint."""
    pairs: PairSet
    """Forget prompts."""
    targets: CounterfactualTargets
    """Against which the `answer_excess` is taken, for all models alike."""
    kept: PairSet
    """Prompts whose answers are kept."""

    def reach_final_margin(
        self, margin: float, most: int, on_round: OnRound | None = None
    ) -> dict[str, float]:
        """Edit until full precision's mean excess lies a margin below 0, and the quantized models
        fall as far, or as many are edited as may be.

        Arguments:
            margin: nats.
            most: edits at most.
            on_round: called before and after each round.

        Returns:
            ``above``, by how much the mean excess is above the target (nats); ``deepening``, how
            many edits were made.
        """

        def measure() -> Measured:
            above = self._excess(self.latent.model) + margin
            mean = float(above.mean())
            return above.clamp_min(0), mean, mean

        made, above = self._rounds(measure, None, most, True, on_round)
        return {"above": above, "deepening": float(made)}

    def reach_quantization_margin(
        self, quantization_margin: float, most: int, on_round: OnRound | None = None
    ) -> dict[str, float]:
        """Edit until in every quantized model the answers' mean excess lies a quantization_margin below full
        precision's, which stays where it is, or as many are edited as may be.

        Arguments:
            quantization_margin: nats.
            most: edits at most.
            on_round: called before and after each round.

        Returns:
            ``apart``, the mean distance of the nearest quantized model (nats); ``parting``, how
            many edits were made.
        """

        def measure() -> Measured:
            full, *others = (self._excess(model) for model in self.latent.models)
            distance = full - torch.stack(others)
            apart = nearest(distance)
            return lacking(distance, quantization_margin), quantization_margin - apart, apart

        made, apart = self._rounds(measure, quantization_margin, most, False, on_round)
        return {"apart": apart, "parting": float(made)}

    def _rounds(
        self,
        measure: Callable[[], Measured],
        wanted: float | None,
        most: int,
        together: bool,
        on_round: OnRound | None,
    ) -> tuple[int, float]:
        """Measure and edit in turns; returns how many edits were made, and what was said last.

        Arguments:
            measure: looks at the models.
            wanted: nats that are to be reached; default: those that are lacking at first.
            most: edits at most.
            together: see `candidate_edits`.
            on_round: see `OnRound`.
        """
        made = 0
        for left in range(ROUNDS, -1, -1):
            lacks, short, said = measure()
            wanted = short if wanted is None else wanted
            if on_round:
                on_round(ROUNDS - left, said)
            if not left or short <= NEAR * wanted:
                break
            made += self._edit(lacks, short / left, (most - made) // left, together)
        return made, said

    def _forgotten(self, model: LanguageModel, part: list[Pair]) -> Float[Tensor, " batch"]:
        return model_answer_excess(model, part, self.targets)

    @torch.no_grad()
    def _excess(self, model: LanguageModel) -> Float[Tensor, " pairs"]:
        return torch.cat([self._forgotten(model, part) for part in self.pairs.parts(BATCH)])

    def _slope(self, pairs: PairSet, level: Level, weights: Float[Tensor, " pairs"]) -> Weights:
        """Of the answers' level at full precision, a mean weighed by pair."""
        parts, model = list(pairs.parts(BATCH)), self.latent.model
        shares = (weights / weights.sum()).split([len(p) for p in parts])
        losses = [
            lambda p=p, w=w: (w * level(model, p)).sum() for p, w in zip(parts, shares, strict=True)
        ]
        names = self.latent.names
        return dict(zip(names, gradient(model, names, losses), strict=True))

    def _edit(
        self, lacks: Float[Tensor, " pairs"], wanted: float, most: int, together: bool
    ) -> int:
        """Edits that move the models so many nats, first order; returns how many.

        Arguments:
            lacks: what each forget prompt counts by.
            together: see `candidate_edits`.
        """
        # A weight that one of the quantizers leaves alone would not part; all others lie side by
        # side.
        latent = self.latent
        x = next((x for x in latent.groups if all(x.grids)), None)
        if x is None:
            return 0
        answers = answer_tokens(self.kept, latent.model.device)

        def retained(model: LanguageModel, part: list[Pair]) -> Float[Tensor, " batch"]:
            return above_rivals(log_probs(model, part), part, answers, lambda some: some.mean(1))

        alike = torch.ones(len(self.kept), device=latent.model.device)
        slope = gather(self._slope(self.pairs, self._forgotten, lacks), x.indices)
        kept = gather(self._slope(self.kept, retained, alike), x.indices)
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
                retained=kept[i],
                weight=DAMPING * share / (DAMPING * share + 1 - share),
                together=together,
            )
            found = choose_edits(some, wanted, most)
            now[i[found.elements]] = found.values
            latent.write_edits(x, now, now != x.original)
        return len(found.elements)


def nearest(distance: Float[Tensor, "quantized pairs"]) -> float:
    """The mean distance of the quantized model that is least apart."""
    return float(distance.mean(1).min())


def lacking(
    distance: Float[Tensor, "quantized pairs"], quantization_margin: float
) -> Float[Tensor, " pairs"]:
    """What each pair lacks of the quantization_margin in the quantized model that lacks most of it."""
    return (quantization_margin - distance).clamp_min(0).amax(0)
