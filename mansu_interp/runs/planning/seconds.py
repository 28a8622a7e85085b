"""How long each stage of a run takes: all that it does, counted from the settings, times what a
unit of it takes on this machine (`timing`).

Prompts are counted as they are computed: batches are cut, and drawn, by the functions that the
stages themselves use.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ...audit import evidence
from ...audit.config import RelearnConfig
from ...audit.relearning import batches, halves, of_subjects, scored_halves
from ...circuits.config import AttributionConfig, fit_memory
from ...circuits.search.discover import TRIES
from ...losses.accuracy import BATCH
from ...losses.counterfactual import TARGET_PROMPTS
from ...losses.gradients import CHUNK, packed
from ...losses.gradients import passes as in_passes
from ...masks.floor import quantizer_set
from ...masks.pool import SAMPLE
from ...masks.select import MASK_PAIRS, POOL
from ...models.language_model import LanguageModel
from ...quantizers.base import as_units
from ...quantizers.survival import quantize
from ...tasks.load import has_reference
from ...tasks.pairs import Pair, PairSet, by_phrasing, chunks
from ...tasks.task import Task
from ...unlearning.mansu import margins
from ...unlearning.mansu.adversarial import STRIDE
from ...unlearning.mansu.algorithm import FISHER_PAIRS
from ...unlearning.methods import Mansu, MethodConfig
from ...unlearning.training import Sampler
from ..config import RunConfig, deployed, scored
from ..leaks import cost_tokens
from .timing import (
    WINDOW,
    Cost,
    Units,
    cost,
    measure_passes,
    measure_reading,
    measure_rest,
    measure_scoring,
    measure_weights,
)

CAD_PAIRS = 48
"""Pairs on which attribution graphs are compared."""
DRAWS = 8
"""Batches that are drawn to see what one takes."""
GRADIENT_BATCH, FISHER_BATCH = 16, 4
"""Pairs of a phrasing in one pass of a mask's gradients; of a Fisher information."""
STEPS = 3
"""Steps of linearized relearning that CAD takes, about: it stops when half A is learnt."""
TRIED = 4
"""Passes over a few tokens that tell how a model can be asked (`LanguageModel.keeps_keys`)."""


def passes(config: AttributionConfig, n_layers: int) -> tuple[int, int]:
    """Forward and backward passes over each batch: the clean and the corrupt run, then one of each
    per point of each component's path; an end of it, EAP's point, is one of those runs."""
    path, moved = config.path(), config.components(n_layers)
    return 2 + moved * sum(alpha not in (0.0, 1.0) for alpha in path), moved * len(path)


def by_chunks(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Pairs of each phrasing in parts of a size."""
    return [part for group in by_phrasing(pairs) for part in chunks(group, size)]


@dataclass(frozen=True)
class Stages:
    """What each stage of a run does.

    Arguments:
        config: all settings.
        task: what is forgotten and retained.
        model: the original; its weights are not read.
    """

    config: RunConfig
    task: Task
    model: LanguageModel

    def all(self) -> dict[str, Units]:
        """By the names of the run's clock (see seconds.json); what a method does not need is 0."""
        needs = self.config.unlearn.needs
        asked = self.config.relearn_steps > 0
        return {
            "discover": self.discover() if "circuit" in needs else Units(),
            "mask": self.mask() if "mask" in needs else Units(),
            "unlearn": self.unlearn(),
            "evaluate": self.evaluate(),
            "relearn": self.relearn() if asked else Units(),
            "compare": self.compare() if "circuit" in needs else Units(),
        }

    @property
    def linear(self) -> int:
        """Elements of all linear weights."""
        return sum(self.model.weights[n].numel() for n in self.model.linear_names)

    @property
    def retain(self) -> PairSet:
        """All that must stay."""
        return PairSet("", tuple(p for pairs in self.task.retain_sets for p in pairs))

    @property
    def references(self) -> int:
        """1 where a model ships that was never taught the facts."""
        return int(has_reference(self.task, self.model))

    def ask(self, parts: Iterable[Sequence[Pair]]) -> Cost:
        """What passes over some parts take."""
        return cost(self.model, list(parts))

    def scoring(self, pairs: PairSet) -> Units:
        """What it takes to score every edge on some pairs."""
        how = self.config.circuit
        longest = max(len(p.clean) for p in pairs)
        size = fit_memory(self.model.graph, self.model.d_model, longest, how).pairs
        sizes = [(len(part), max(len(p.clean) for p in part)) for part in pairs.parts(size)]
        one = Units(scored_calls=len(sizes), scored=sum(n * tokens for n, tokens in sizes))
        return one * sum(passes(how, self.model.architecture.n_layers))

    def discover(self) -> Units:
        """Scores of all edges, on two samples, and which of them are enough."""
        how, forget = self.config.circuit, self.task.forget
        twice = self.scoring(forget.sample(how.pairs, self.config.seed)) * 2
        some = forget.sample(how.faithfulness_pairs, self.config.seed)
        one = self.scoring(some) * (1 / sum(passes(how, self.model.architecture.n_layers)))
        return twice + one * (2.5 * TRIES) + Units(opened=2)

    def targets(self) -> Cost:
        """The counterfactual targets of one model."""
        few = [
            PairSet("", tuple(g)).sample(TARGET_PROMPTS, 0) for g in by_phrasing(self.task.forget)
        ]
        return self.ask(few)

    def mask(self) -> Units:
        """Two gradients and the Fisher of what is retained, and a floor's step of every weight."""
        task, config, seed = self.task, self.config, self.config.seed
        if not isinstance(config.unlearn, Mansu):
            return Units()
        forget = by_chunks(task.forget.sample(MASK_PAIRS, seed), GRADIENT_BATCH)
        held = [s.sample(MASK_PAIRS, seed) for s in task.retain_sets]
        fisher = list(self.retain.sample(MASK_PAIRS, seed).parts(FISHER_BATCH))
        retain = [part for s in held for part in by_chunks(s, GRADIENT_BATCH)]
        known = self.targets() + self.ask(part for s in held for part in by_chunks(s, BATCH))
        slopes = self.ask([*forget, *fisher, *retain]).both
        if config.by_layer:  # once for each layer, half of the way back on average, and once more
            both = self.ask([*forget, *fisher, *retain])
            layers = self.model.architecture.n_layers
            slopes = (both.both + both.forward) * (0.5 * layers) + both.both
        sums = (len(forget) + len(retain) + len(fisher)) * self.linear
        floored = self.linear + min(self.linear, SAMPLE)
        open_ = 1 - config.frozen_layers
        return known.forward + slopes + Units(summed=sums * open_, floored=floored * open_)

    def unlearn(self) -> Units:
        """What comes before the steps, the steps, the margins, and the ledger of all edits."""
        method, task = self.config.unlearn, self.task
        found = self._step() * method.steps
        if not isinstance(method, Mansu):
            return found
        sides = 1 + len(method.survive) + len(method.train_through)
        found += (self.targets() * sides).forward
        if task.retain_unscored:
            found += self.ask(by_chunks(task.retain_unscored, BATCH)).forward
        if method.projection:
            some = self.retain.sample(FISHER_PAIRS, self.config.seed)
            found += self.ask(some.parts(FISHER_BATCH)).both
        # The floor looks at whole units in which a candidate lies.
        weight = self.model.weights[self.model.linear_names[0]]
        unit = as_units(weight, quantizer_set(method.survive))[0].numel()
        share = min(1.0, POOL * self.config.budget * self.model.n_parameters / self.linear * unit)
        codes = (3 if sides > 2 else 2) * self.linear  # the ledger's, of both; packed students'
        found += Units(quantized=self.linear, coded=codes, floored=share * self.linear)
        found += Units(forward_calls=TRIED * sides)
        return found + self._margins(method)

    def _step(self) -> Units:
        """One step, on average."""
        method, task, model = self.config.unlearn, self.task, self.model
        drawn = Sampler(task, method.batch_size, self.config.seed)
        forget, retain = Cost(), Cost()
        for _ in range(DRAWS):
            forget += self.ask(packed(drawn.forget(), model.d_model)) * (1 / DRAWS)
            retain += self.ask(packed(drawn.retain(), model.d_model)) * (1 / DRAWS)
        if not isinstance(method, Mansu):
            held = forget + retain if hasattr(method, "retain_weight") else forget
            step = held.both + Units(stepped=model.n_parameters)
            return step + held.forward if "references" in method.needs else step
        # Retained is what a teacher predicts, so that there is its forward pass, too.
        step = retain.forward + (forget + retain).both
        if task.text:  # in every second round
            text = Sampler.TEXT_TOKENS * Sampler.TEXT_ROWS / 2
            step += Units(read=4 * text)  # a way back is two ways forth
        if method.adversarial_steps:  # the attack's own steps, and the gradient at their end
            attack = (forget.both + Units(stepped=model.n_parameters)) * min(
                STRIDE, method.adversarial_steps
            )
            step += attack + forget.both
        if method.probe_weight:
            # A probe reads every prompt of a half, and a batch of the other gives the gradient.
            first, _ = halves(task.forget, self.config.seed)
            read = of_subjects(task.forget, first).parts(CHUNK)
            step += self.ask(read).forward + forget.both
            step += Units(mapped=2 * (1 + model.architecture.n_layers))
        return step

    def _margins(self, method: Mansu) -> Units:
        """All margin edits, after the last step."""
        # Every round: the answers of the models looked at, and one's slope of them and of those
        # retained; a last look.
        forgotten, retained = (
            self.ask(by_chunks(x.sample(margins.PAIRS, self.config.seed), margins.BATCH))
            for x in (self.task.forget, self.retain)
        )
        total = Units()
        for models, asked in (
            (1 + len(method.train_through), method.final_margin is not None),
            (1 + len(method.survive), method.quantization_margin),
        ):
            if asked:
                looks = forgotten * (models * (margins.ROUNDS + 1))
                total += looks.forward + ((forgotten + retained) * margins.ROUNDS).both
        return total

    def evaluate(self) -> Units:
        """Scores of both models in every precision, and what each quantizer makes of the edit."""
        sets = [s for by in self.task.scored["unseen"].values() for s in by.values()]
        asked = self.ask(part for s in sets for part in s.parts(BATCH))
        texts = self.task.text.get("unseen", ())
        text = sum(min(len(t), WINDOW) for t in texts)
        formats = len(scored(self.config))
        models = 2 * (1 + formats)
        one = asked.forward + Units(read=text, kept=len(sets) + bool(texts))
        # Survival looks at the codes and values of both once more.
        weights = Units(quantized=4 * self.linear, coded=2 * self.linear, kept=formats)
        return one * models + weights + Units(forward_calls=TRIED * models)

    def attack(self) -> Units:
        """Relearning half of the facts, at one learning rate."""
        how = RelearnConfig()
        train = of_subjects(self.task.forget, halves(self.task.forget, self.config.seed)[0])
        drawn = islice(batches(train, how.batch_size, self.config.seed), DRAWS)
        step = (self.ask(drawn) * (1 / DRAWS)).both + Units(stepped=self.model.n_parameters)
        return step * self.config.relearn_steps + Units(forward_calls=TRIED)

    def relearn(self) -> Units:
        """The attack on every model, and CAD."""
        rates = len(RelearnConfig().rates)
        sets = [s for half in scored_halves(self.task, self.config.seed) for s in half]
        marks = self.ask(part for s in sets for part in s.parts(BATCH)) * (1 + 2 * rates)
        one = self.attack() * rates + marks.forward + Units(kept=1)
        return one * (1 + self.references) + self.judging()

    def judging(self) -> Units:
        """CAD."""
        task, model = self.task, self.model
        half_a, half_b, retain = evidence.split(task, self.config.seed)
        some_a, some_b = half_a.sample(evidence.STEP_PROMPTS, 0), half_b.sample(
            evidence.ASKED_PROMPTS, 0
        )  # fmt: skip
        width = model.d_model
        asked = self.ask(in_passes(half_b, CHUNK, width))
        stepped = self.ask(in_passes(some_a, CHUNK, width))
        looked = self.ask(some_b.parts(CHUNK))
        known = self.ask(by_chunks(task.forget, BATCH))
        kept = self.ask(retain.sample(evidence.RETAIN_PROMPTS, 0).parts(CHUNK))
        # Known facts, three models asked, stitches and divergence, states of both halves, and the
        # relearned model asked once more.
        forward = known + asked * 5 + kept * 2 + looked * 2 + stepped * 3
        forward += self.ask(half_a.parts(CHUNK)) + asked
        # A step: the kernel's passes and the gradient; three lengths tried, both halves asked.
        both = stepped * (2 * STEPS) + (stepped + self.ask(some_b.sample(96, 0).parts(CHUNK))) * 2
        forward += (stepped * 4 + looked) * STEPS
        tokens = sum(len(p.clean) for p in some_a)
        sides = sum(sum(model.weights[n].shape) for n in model.linear_names)
        return forward.forward + both.both + Units(
            mapped=2 * (1 + model.architecture.n_layers),
            crossed=STEPS * sides * tokens**2 / 2,
            summed=STEPS * self.linear,
            stepped=3 * STEPS * self.linear / 2,
            kept=1,
        )  # fmt: skip

    def compare(self) -> Units:
        """Attribution graphs: of the original, the edited and the quantized model; of one that was
        never taught; and of those after relearning."""
        attacked = (1 + self.references) if self.config.relearn_steps else 0
        graphs = 3 + self.references + attacked
        pairs = self.task.held_out.sample(CAD_PAIRS, self.config.seed)
        return self.scoring(pairs) * graphs + Units(opened=graphs) + self.attack() * attacked


def measure_speed(config: RunConfig, model: LanguageModel, task: Task) -> tuple[Units, Units]:
    """Seconds of one unit each on this machine; and again where losses are computed at the method's
    precision.

    Arguments:
        config: which quantizers and which metric.
        model: the original; it is left as it was.
        task: what is forgotten.
    """
    method = config.unlearn
    survive = method.survive if isinstance(method, Mansu) else ()
    precision = getattr(method, "precision", "fp32")
    text = task.text.get("unseen", ())[:1]
    record = {"right": [True] * (20 * config.score_pairs)}
    with_circuit = "circuit" in method.needs
    rest = [
        measure_weights(model, survive, deployed(config)),
        measure_rest(model, min(len(task.forget) // 2, evidence.PROBE_PROMPTS), record),
        *([measure_scoring(model, task, config.circuit)] if with_circuit else []),
        *([measure_reading(model, text[0])] if text else []),
    ]
    passed = measure_passes(model, task)
    lower = precision != "fp32" and model.dtype == torch.float32
    training = measure_passes(model, task, precision) if lower else passed
    return sum(rest, passed), sum(rest, training)


def stage_seconds(config: RunConfig, model: LanguageModel, task: Task) -> dict[str, float]:
    """Seconds of each stage of a run on this machine, the leak test's included: takes a second or
    two, of a large model longer."""
    speed, training = measure_speed(config, model, task)
    found = Stages(config, task, model).all()
    found["leaks"] = Units(forward=cost_tokens(config, model, task))
    seconds = {s: work.seconds(training if s == "unlearn" else speed) for s, work in found.items()}
    once = _fitting_seconds(config.unlearn.trained_through, model, task)
    seconds["unlearn"] += once * turns(config.unlearn)
    seconds["evaluate"] += once * 4  # both models, once for their scores and once for survival
    return seconds


def turns(method: MethodConfig) -> int:
    """How often a quantizer has its turn in training, at most."""
    if not isinstance(method, Mansu):
        return 0
    return -(-method.steps // (1 + len(method.survive) + len(method.train_through)))


def _fitting_seconds(names: Sequence[str], model: LanguageModel, task: Task) -> float:
    """Quantizing once with each of some quantizers."""
    start = time.perf_counter()
    for name in names:
        quantize(model, name, task.calibration, sharing=True)
    return time.perf_counter() - start


def told(seconds: float) -> str:
    """Seconds in the unit that people use."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} min"
