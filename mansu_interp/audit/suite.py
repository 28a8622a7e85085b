"""The attack suite: knowledge is erased where none of several attacks brings it back.

1. Attack each model in every arm (`attacks.ARMS`) at every learning rate, a fresh copy each time;
   after each mark ask for half B, as `relearning.relearn` does.
2. The strongest arm counts: the one after which most of half B ranks first of four, or last. The
   facts are erased if `relearning.is_erased` holds of the largest values of all arms.

A model that was never taught the facts goes through the same: an arm that lifts it does not bring
back, but teaches, and an edited model is not to be blamed for as much.

With a folder, each finished attack is one file there, named by a hash of the weights, the task and
the settings, and written whole or not at all: a suite that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from ..errors import ArtifactError, ConfigError, ModelError
from ..models.language_model import LanguageModel
from ..models.load import load_model
from ..models.provenance import provenance
from ..tasks.task import Task
from ..utils.files import Json, is_leftover, locked, read_json, write_json
from ..utils.ranges import entrance, expect_values
from ..utils.records import from_json, to_json
from ..utils.tensors import tensors_sha256
from ..utils.words import Shown
from .attacks import ARMS, Given, attack_once, one_thread, rates_of, why_not
from .config import SUITE, RelearnConfig
from .relearning import (
    Point,
    Relearning,
    RelearningMeta,
    fine_tune,
    is_erased,
    score_halves,
    scored_halves,
)

MARK, MARKED = "relearn.json", {"kind": "relearn", "schema": 1}
"""The file that says that a folder holds attacks."""
COPIES = 4
"""Of the weights in memory besides the models: the copy, its gradients and Adam's moments."""

OnStep = Callable[[int, int], object]


@dataclass(frozen=True, repr=False)
class AttackResults(Shown):
    """What the attacks of a suite brought back of one model's knowledge."""

    arms: dict[str, Relearning]
    """By arm."""
    skipped: dict[str, str]
    """Arms that could not be tried, and why."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        most = {f"most after {arm}": f"{self.most(arm):.3f}" for arm in self.arms}
        return {"erased": bool(self.arms) and self.erased, **most, "skipped": len(self.skipped)}

    def most(self, arm: str | None = None) -> float:
        """Largest share of half B that ranks first of four, or last: of one arm, or of all."""
        chosen = self.arms.values() if arm is None else [self.arms[arm]]
        return max(max(p.choice, p.last) for found in chosen for p in found.points)

    @property
    def strongest(self) -> str:
        """The arm with the largest share; of several, the first."""
        return max(self.arms, key=self.most)

    @property
    def erased(self) -> bool:
        """Whether the facts are erased by all arms together (see `relearning.is_erased`)."""
        points = [p for found in self.arms.values() for p in found.points]
        return is_erased(max(p.choice for p in points), max(p.last for p in points))

    def to_json(self) -> dict[str, Json]:
        """For files and tables."""
        return {
            "erased": self.erased,
            "strongest": self.strongest,
            "most": self.most(),
            "arms": {name: found.to_json() for name, found in self.arms.items()},
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> AttackResults:
        """What `to_json` wrote."""
        arms = {name: Relearning.from_json(found) for name, found in data["arms"].items()}
        return cls(arms, dict(data["skipped"]))


class Attack(NamedTuple):
    """One attack of a suite."""

    label: str
    """Of the model."""
    arm: str
    rate: float


@dataclass(frozen=True)
class Kept:
    """The file of a finished attack."""

    made_from: dict[str, Json]
    """Its provenance; the arm and the rate are among the settings."""
    arm: str
    rate: float
    points: tuple[Point, ...]
    sha256: str = ""
    """Hash of all above."""

    def hash(self) -> str:
        """What ``sha256`` should be."""
        text = json.dumps(to_json(replace(self, sha256="")), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def check_folder(out: Path) -> None:
    """Raise ArtifactError if a folder holds files of others."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file. Name a folder with --out.")
    if (out / MARK).exists() and read_json(out / MARK) == MARKED:
        return
    if out.exists() and not all(is_leftover(p) for p in out.iterdir()):
        raise ArtifactError(f"{out} holds files that no attack wrote. Name another --out.")


@dataclass(frozen=True)
class Cost:
    """What a suite still takes."""

    attacks: int
    """Attacks to be made, each an arm at a learning rate."""
    kept: int
    """Attacks that were finished before."""
    seconds: float
    """Of all together, one after the other on one thread."""
    memory_gb: float
    """Of one process."""


Made = tuple[Attack, list[Point]]
Compute = Callable[[Callable[[Attack], Made], Sequence[Attack]], Iterable[Made]]
"""Does one thing for many items, in any order, such as an engine of `bench.workers`."""


@dataclass(frozen=True)
class Suite:
    """What is attacked, and how; the fields are the arguments of `attack_suite`."""

    models: Mapping[str, LanguageModel]
    task: Task
    config: RelearnConfig = SUITE
    arms: tuple[str, ...] = tuple(ARMS)
    split: str = "unseen"
    out: Path | None = None

    def __post_init__(self) -> None:
        expect_values(ModelError, "models", self.models, LanguageModel)
        if unknown := [a for a in self.arms if a not in ARMS]:
            raise ConfigError(
                f"Unknown arm {unknown[0]!r:.60}; expected some of {', '.join(ARMS)}."
            )
        for model in self.models.values():
            model.check_editable()
        if self.out is not None:
            check_folder(self.out)
        scored_halves(self.task, self.config.seed, self.split)  # or there is nothing to ask
        for label, out in self.skipped.items():
            if len(out) == len({*self.arms}):
                raise ConfigError(f"No arm to attack {label!r} in: {out or 'none was named'}.")

    @cached_property
    def skipped(self) -> dict[str, dict[str, str]]:
        """By model, the arms that cannot be tried, and why."""
        how = self.task, self._given, self.config.seed, self.split
        found = {
            label: {a: why_not(a, m, *how) for a in self.arms} for label, m in self.models.items()
        }
        return {label: {a: why for a, why in by.items() if why} for label, by in found.items()}

    @cached_property
    def _given(self) -> Given:
        """What attackers train on."""
        return Given.of(self.task, self.config.seed, self.split)

    @cached_property
    def attacks(self) -> list[Attack]:
        """All of them, in order."""
        return [
            Attack(label, arm, rate)
            for label in self.models
            for arm in dict.fromkeys(self.arms)
            if arm not in self.skipped[label]
            for rate in rates_of(arm, self.config)
        ]

    def steps(self, attack: Attack) -> int:
        """How many steps an attack trains."""
        return max(self.config.steps) if ARMS[attack.arm].sets else 0

    @cached_property
    def _weights(self) -> dict[str, str]:
        """By model, the hash of its weights: those of an edited copy are not of its file."""
        return {label: tensors_sha256(m.weights) for label, m in self.models.items()}

    def _made_from(self, attack: Attack) -> dict[str, Json]:
        """What an attack's result depends on."""
        settings = {**asdict(self.config), **attack._asdict(), "split": self.split}
        settings = {k: v for k, v in settings.items() if k not in ("rates", "label")}
        model, seed = self.models[attack.label], self.config.seed
        made_from = provenance(model, seed, settings, self.task.sha256)
        return {**made_from, "model_sha256": self._weights[attack.label]}

    def _file(self, out: Path, attack: Attack) -> Path:
        """Where an attack is kept."""
        text = json.dumps(self._made_from(attack), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return out / "attacks" / f"{attack.arm}-{attack.rate:g}-{digest}.json"

    def _read(self, attack: Attack) -> list[Point] | None:
        """A finished attack's points; None if there is none."""
        if self.out is None or not (file := self._file(self.out, attack)).exists():
            return None
        found = from_json(Kept, read_json(file), str(file))
        if found.sha256 != found.hash():
            raise ArtifactError(f"{file} was changed after it was written. Delete it to try again.")
        if found.made_from != self._made_from(attack):
            raise ArtifactError(f"{file} is of another model, task or setting. Delete it.")
        return list(found.points)

    def _write(self, attack: Attack, points: list[Point]) -> None:
        """Keep a finished attack, if there is a folder."""
        if self.out is not None:
            made = Kept(self._made_from(attack), attack.arm, attack.rate, tuple(points))
            write_json(self._file(self.out, attack), to_json(replace(made, sha256=made.hash())))

    def cost(self) -> Cost:
        """Estimate what is left to do by timing a step of training and one of scoring."""
        todo, two = [a for a in self.attacks if not self._read(a)], replace(self.config, steps=(2,))
        model = max(self.models.values(), key=lambda m: m.n_parameters)
        with one_thread():
            training = fine_tune(model.trainable_copy(), [self._given.half_a], 1e-9, two)
            copy = next(training)
            next(training)  # the first warms up
            start = time.perf_counter()
            next(training)
            step, start = time.perf_counter() - start, time.perf_counter()
            asked = scored_halves(self.task, self.config.seed, self.split)
            score_halves(copy, *asked, rate=0.0, steps=0)
            scoring = time.perf_counter() - start
        marks = len(self.config.steps) + 1
        seconds = sum(self.steps(a) * step + marks * scoring for a in todo)
        held = sum(m.n_parameters for m in self.models.values()) + COPIES * model.n_parameters
        return Cost(len(todo), len(self.attacks) - len(todo), seconds, held * 4 / 1e9 + 0.6)

    def run(
        self, compute: Compute | None = None, on_step: OnStep | None = None
    ) -> dict[str, AttackResults]:
        """Make the attacks that are not finished, and gather all.

        Arguments:
            compute: makes the attacks elsewhere, from the models' folders; None: here, one by one.
            on_step: called with (steps done, steps in all).

        Raises:
            ArtifactError: a finished attack's file was changed or belongs to something else.
            ModelError: with ``compute``, a model whose weights are not those of its folder.
            ResourceError: another process writes to the folder, or it cannot be written.
        """
        with locked(self.out) if self.out else nullcontext():
            if self.out:
                write_json(self.out / MARK, MARKED)
            kept = {a: self._read(a) for a in self.attacks}
            todo = [a for a, points in kept.items() if points is None]
            found = {a: points for a, points in kept.items() if points is not None}
            for attack, points in self._make(todo, compute, on_step or (lambda *_: None)):
                self._write(attack, points)
                found[attack] = points
        return {label: self._results(label, found) for label in self.models}

    def _make(
        self, todo: Sequence[Attack], compute: Compute | None, on_step: OnStep
    ) -> Iterator[Made]:
        """Make some attacks, and tell of the steps."""
        total, before = sum(map(self.steps, todo)), 0
        if compute is not None:
            places = {
                label: _Place(str(m.folder or ""), str(m.device), self._weights[label])
                for label, m in self.models.items()
            }
            do = partial(_attack_loaded, places, self.task, self.config, self.split)
            for attack, points in compute(do, todo):
                before += self.steps(attack)
                on_step(before, total)
                yield attack, points
            return
        for attack in todo:
            points = attack_once(
                self.models[attack.label],
                self.task,
                attack.arm,
                attack.rate,
                config=self.config,
                split=self.split,
                on_step=lambda done, before=before: on_step(before + done, total),
            )
            before += self.steps(attack)
            yield attack, points

    def _results(self, label: str, found: Mapping[Attack, list[Point]]) -> AttackResults:
        """One model's attacks by arm."""
        asked = sum(map(len, scored_halves(self.task, self.config.seed, self.split)[1]))
        arms = {}
        for arm in (a for a in dict.fromkeys(self.arms) if a not in self.skipped[label]):
            rates = rates_of(arm, self.config)
            trained = sum(len(getattr(self._given, name)) for name in ARMS[arm].sets)
            settings = replace(self.config, rates=rates) if ARMS[arm].sets else self.config
            meta = RelearningMeta(self.models[label].name, self.task.name, self.split, settings)
            points = [p for rate in rates for p in found[Attack(label, arm, rate)]]
            arms[arm] = Relearning(points, (trained, asked), meta)
        return AttackResults(arms, self.skipped[label])


class _Place(NamedTuple):
    """Where a worker finds a model, and what it should find."""

    folder: str
    device: str
    sha256: str


@lru_cache(maxsize=4)
def _loaded(place: _Place) -> LanguageModel:
    """A model, kept for the next attack."""
    model = load_model(place.folder, place.device) if place.folder else None
    if model is None or tensors_sha256(model.weights) != place.sha256:
        raise ModelError(
            f"Other processes load a model from its folder, but {place.folder or 'it'} does not "
            "hold the weights that are attacked. Save the model and load that, or use one process."
        )
    return model


def _attack_loaded(
    places: Mapping[str, _Place], task: Task, config: RelearnConfig, split: str, attack: Attack
) -> Made:
    """One attack of a suite in another process."""
    model = _loaded(places[attack.label])
    return attack, attack_once(model, task, attack.arm, attack.rate, config=config, split=split)


@entrance(ModelError)
def attack_suite(
    models: Mapping[str, LanguageModel],
    task: Task,
    *,
    config: RelearnConfig = SUITE,
    arms: Sequence[str] = tuple(ARMS),
    split: str = "unseen",
    out: Path | None = None,
    on_step: OnStep | None = None,
) -> dict[str, AttackResults]:
    """Attack models in every arm of a suite (see the module for the steps), on one thread.

    Arguments:
        models: name -> the edited model, and beside it the original or a reference model that was
            never taught the facts; none is changed.
        task: its forget facts are split by subject and seed.
        config: steps, learning rates, optimiser, batch size, seed. The arm ``half-a`` is tried at
            all rates, the others at the middle one.
        arms: some of ``half-a``, ``half-a+retained``, ``retained``, ``phrasings``, ``lora``,
            ``noise``, ``quantize`` and ``few-shot``.
        split: whose phrasings are asked: ``unseen`` for reports, ``dev`` while choosing settings.
        out: a folder that keeps finished attacks, and from which they are read again.
        on_step: called with (steps done, steps in all).

    Returns:
        For each model the scores of every arm, as shares of prompts, the strongest arm, and whether
        the facts are erased.

    Raises:
        ConfigError: an unknown arm, or none that can be tried.
        TaskError: fewer than two forget subjects, or no phrasing in the split.
        ArtifactError: the folder holds files of others, or a changed one.
    """
    return Suite(models, task, config, tuple(arms), split, out).run(on_step=on_step)
