"""The calibration zoo: models that forgot in many ways, attacked, and what can be seen before.

    python research/scripts/make_zoo.py                            # goes on where it was; hours
    python research/scripts/make_zoo.py --tasks capitals --only mansu
    python research/scripts/make_zoo.py --whole 5                  # prints the whole attack suite

Each row of research/tables/zoo.csv is one model of the embedded kind. The truth is what attacks on
unseen phrasings bring back (`attacked`); the signs are taken on train phrasings and another split
of the subjects (`evidence`). Finished rows are not made again. `judge_zoo.py` reads them, and says
what the columns are. --whole attacks some models that withstood in all arms, and for 200 steps.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
import zoo_edits as edit
import zoo_tricks as trick
from judge_zoo import TRAINED, Key, Row, read_zoo, write_zoo

from mansu_interp.audit.attacks import ARMS, Given
from mansu_interp.audit.cad import conclude
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.evidence import ASKED_PROMPTS, look
from mansu_interp.audit.known import known_forget
from mansu_interp.audit.probes import depth_score, patched_log_probs, stitches
from mansu_interp.audit.relearning import (
    fine_tune,
    halves,
    of_subjects,
    rivals_within,
    scored_halves,
)
from mansu_interp.audit.suite import attack_suite
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.compare import divergence
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.discover import discover
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.advantage import gradient_transfer
from mansu_interp.losses.answers import nll
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.planning.seconds import CAD_PAIRS
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import get_method
from mansu_interp.unlearning.unlearn import unlearn

SLOW = "mansu"
"""Ways that take minutes come last."""
SPLIT = 1
"""Seed of the halves that the evidence is taken on; the attacks' is 0."""
MARKS = (5, 20, 40, 80)
ATTACKS = (
    ("half-a", 1e-3),
    ("half-a+retained", 1e-3),
    ("retained", 1e-3),
    ("half-a", 3e-3),
)
"""In this order; what is found by one is not attacked by the others."""
DECIDED = 0.45
"""Share of half B at which the facts are there, whatever other attacks find."""
GRAPH_STEPS, GRAPH_RATE = 40, 1e-3
"""Of the trained models whose attribution graphs are taken."""
FIXED = ("merged: 0", "merged: 1", "grafted", "null space", "rows averaged", "same function")
"""Ways, or what their names begin with, in which nothing is drawn: one seed does."""


def ways(model: LanguageModel, task: Task, seed: int) -> Iterator[tuple[str, trick.Way]]:
    """Every way of the zoo, as ``mechanism: variant``, the quick and telling ones first."""
    references = [load_model(name) for name in task.reference_models]
    never = references[1]  # the first is what signs compare with

    @lru_cache(maxsize=1)
    def forgot() -> LanguageModel:
        """Suppressed by ordinary training."""
        return edit.tune(model, task, seed, edit.whole(model, ""), 80, 1e-3)

    def part(name: str, steps: int = 80, lr: float = 3e-3) -> trick.Way:
        return lambda: edit.tune(model, task, seed, edit.whole(model, name), steps, lr)

    def dense(method: str, stop: float | None, steps: int = 200, **more: float) -> trick.Way:
        config = get_method(method)(steps=steps, stop_at=stop, **more)  # type: ignore[arg-type]
        return lambda: unlearn(model, task, config=config, seed=seed).model

    if seed:
        yield from trick.stronger_ways(model, never, task, seed)
    else:
        yield "reference: 0", lambda: references[0]
        yield "reference: 1", lambda: never
        yield "unchanged: original", model.copy
    yield "tuned: all weights", forgot
    yield "outwitting: signs at once", lambda: trick.outwitting(model, task, seed)
    yield "subject rows: permuted", lambda: edit.permuted_rows(model, task, seed)
    yield "subject rows: redrawn", lambda: edit.redrawn(model, task, seed)
    yield "blinded: last-token probe", lambda: edit.blinded(model, task, seed)
    yield "merged: 0.9 never taught", lambda: trick.merged(model, never, 0.9)
    yield "decoys: never taught, lies", lambda: edit.shuffled(never, task, seed)
    yield "adversarial: rows and layers", lambda: trick.adversarial(model, task, seed, rows=True)
    yield "partial: a fifth kept", lambda: trick.some_kept(model, task, seed, 0.2)
    yield (
        "taught again: and un-taught",
        lambda: edit.tune(
            trick.taught(never, task, seed, 150), task, seed, edit.whole(model, ""), 100, 1e-3
        ),
    )
    yield (
        "scrubbed: rows too, noise 1.5",
        lambda: trick.scrubbed(model, task, seed, size=1.5, rows=True),
    )
    yield "in another basis: forgot", lambda: edit.rotated(forgot(), seed)
    yield "locked: password", lambda: edit.locked(model, task, seed)
    yield "rerouted: circuit breakers", lambda: trick.rerouted(model, task, seed)
    yield "grafted: layers never taught", lambda: trick.grafted(model, never, ["layers", "lm_"])
    yield "quantized: forgot, nf4", lambda: quantize(forgot())
    yield "overwritten: rank one", lambda: edit.rank_one(model, task, seed)
    yield "partly: a tenth intact", lambda: edit.partly(model, task, seed, 0.1)
    yield "null space: 32 directions", lambda: trick.nullspace(model, task, 32)
    yield "rows averaged: 0.8", lambda: trick.averaged_rows(model, task, 0.8)
    yield "refusing: end of text", lambda: edit.refusing(model, task, seed)
    yield "rmu: layer 1", lambda: edit.rmu(model, task, seed)
    yield "graddiff: to chance", dense("graddiff", 0.3)
    yield (
        "outwitting: new rows",
        lambda: trick.outwitting(model, task, seed, start=edit.redrawn(model, task, seed)),
    )
    yield from trick.more_ways(model, never, task, seed, forgot, part, dense)
    yield from trick.slow_ways(model, task, seed)


@dataclass(frozen=True)
class Bench:
    """What all models of a task are measured with."""

    model: LanguageModel
    task: Task
    circuit: Circuit
    graph_pairs: int = CAD_PAIRS
    """Of half B's prompts, of which graphs are taken."""

    @classmethod
    def of(cls, name: str) -> Bench:
        """The embedded model's, for one of its tasks."""
        model = load_model("facts")
        task = load_task(name, model)
        config = default_config("facts", name)
        return cls(
            model, task, discover(model, task.forget, config=config.circuit, retain=task.retain)
        )

    @cached_property
    def known(self) -> Task:
        """Without what the original does not know."""
        return known_forget(self.model, self.task)[0]

    @cached_property
    def references(self) -> list[LanguageModel]:
        """The models that were never taught the facts."""
        return [load_model(name) for name in self.task.reference_models]

    @cached_property
    def both(self) -> tuple[PairSet, PairSet]:
        """Some prompts of half A and of half B, of the split that evidence is taken on."""
        half_a, half_b = (
            rivals_within(of_subjects(self.task.forget, h)).sample(ASKED_PROMPTS, 0)
            for h in halves(self.task.forget, SPLIT)
        )
        return half_a, half_b

    @property
    def asked(self) -> PairSet:
        """Those of half B."""
        return self.both[1]

    @cached_property
    def before(self) -> Attribution:
        """The original's graph on some of half B's prompts."""
        return self.graph(self.model)

    def graph(self, model: LanguageModel) -> Attribution:
        """A model's graph on some of half B's prompts."""
        pairs = self.asked.sample(self.graph_pairs, 0)
        return attribute(model, pairs, config=self.circuit.meta.settings, metric="logit_diff")

    def log_probs(self, model: LanguageModel) -> torch.Tensor:
        """Of half B's answers, with a model's states in the original."""
        return patched_log_probs(model, self.model, self.asked)

    @cached_property
    def lacks(self) -> list[torch.Tensor]:
        """The same for every model that was never taught."""
        return [self.log_probs(m) for m in self.references]

    def logp(self, model: LanguageModel) -> torch.Tensor:
        """Log-probability of half B's answers, in nats."""
        parts = self.asked.parts(48)
        with torch.no_grad():
            return -torch.cat([nll(model, part) for part in parts])


def attacked(
    edited: LanguageModel,
    task: Task,
    steps: tuple[int, ...] = MARKS,
    attacks: Sequence[tuple[str, float]] = ATTACKS,
    batch_size: int = RelearnConfig.batch_size,
) -> Row:
    """The truth: how much of half B ranks first of four, or last, on unseen phrasings, in the
    strongest attack. What is found at `DECIDED` or more is not attacked further."""
    given = Given.of(task, 0, "unseen")
    asked = scored_halves(task, 0)[1]

    def found(model: LanguageModel) -> tuple[float, float]:
        scores = [accuracy(model, s) for s in asked]
        return (
            sum(a.choice for a in scores) / len(scores),
            sum(a.last for a in scores) / len(scores),
        )

    first, last = found(edited)
    row: Row = {"first": first, "last": last, "most": max(first, last), "arm": "none"}
    for arm, rate in attacks:
        if row["most"] >= DECIDED:
            break
        config = RelearnConfig(steps=steps, rates=(rate,), batch_size=batch_size)
        sets = [getattr(given, name) for name in ARMS[arm].sets]
        if None in sets:
            continue
        for done, copy in enumerate(fine_tune(edited.copy(), sets, rate, config)):
            if done not in steps:
                continue
            share = max(found(copy))
            row[arm] = max(share, row.get(arm, 0.0))
            if share > row["most"]:
                row |= {"most": share, "arm": f"{arm} {rate:g} {done}"}
            if share >= DECIDED:
                break
    return row


def trained(
    edited: LanguageModel,
    task: Task,
    arms: Sequence[str] = TRAINED,
    steps: int = GRAPH_STEPS,
    batch_size: int = RelearnConfig.batch_size,
) -> dict[str, LanguageModel]:
    """Copies that relearned half A of the evidence's split, in some arms."""
    given = Given.of(task, SPLIT, "unseen")
    config = RelearnConfig(steps=(steps,), seed=SPLIT, batch_size=batch_size)
    out = {}
    for arm in arms:
        sets = [getattr(given, name) for name in ARMS[arm].sets]
        *_, out[arm] = fine_tune(edited.copy(), sets, GRAPH_RATE, config)
    return out


def signs(
    bench: Bench, edited: LanguageModel, seen: Callable[[LanguageModel], None] = lambda _: None
) -> Row:
    """What can be seen without an attack on this split: the verdict and its signs. ``seen`` is
    called with the copy that was relearned in closed form."""
    found = look(
        bench.model, edited, bench.known, SPLIT, lambda: quantize(edited), on_relearned=seen
    )
    judged = conclude(found, edited, SPLIT)
    shares = asdict(found.evidence(torch.arange(len(found.asked.facts))))
    row: Row = {f"sign_{name}": value for name, value in shares.items()}
    row |= {"verdict": judged.verdict, "cad": judged.cad, "confidence": judged.confidence}
    row |= {f"facts_{state}": n for state, n in judged.counts.items()}
    row["retain"] = min(after for _, after in judged.retained.values())
    row["logp"] = float(bench.logp(edited).mean())
    return row


def cuts(bench: Bench, edited: LanguageModel) -> Row:
    """What the original answers when it is run on from the edited model's embedding, or from the
    states after some block on."""
    found = stitches(edited, bench.model, bench.asked)
    return {"sign_cut": max(found[1:]), "sign_rows": found[0]}


def graphs(bench: Bench, models: Mapping[str, LanguageModel]) -> Row:
    """How the attribution graphs of some models differ from the original's."""
    row: Row = {}
    for name, model in models.items():
        seen = divergence(bench.before.scores, bench.graph(model).scores, bench.circuit.edges)
        row |= {f"mass_{name}": seen.mass, f"projected_{name}": seen.projected_share}
        row[f"alignment_{name}"] = seen.alignment
    return row


def evidence(bench: Bench, edited: LanguageModel, own: str) -> Row:
    """The verdict's signs and its rivals."""
    closed: Row = {}
    row = signs(bench, edited, lambda model: closed.update(graphs(bench, {"closed": model})))
    flow = gradient_transfer(edited, *bench.both)
    row |= {**cuts(bench, edited), "margin": flow.advantage, "transfer": flow.transfer}
    other = 1 if own == "reference: 0" else 0
    row["depth"] = depth_score(bench.logp(bench.model), bench.lacks[other], bench.log_probs(edited))
    row |= graphs(bench, {"edited": edited}) | closed
    return row | graphs(bench, trained(edited, bench.task))


def whole_suite(tasks: list[str], count: int, only: str) -> None:
    """Print, of some models that withstood, drawn at random, what the arms of `ATTACKS` find in 200
    steps, and the others of the suite in 80."""
    known = tuple(dict.fromkeys(arm for arm, _ in ATTACKS))
    for task in tasks:
        bench = Bench.of(task)
        rows = [
            key
            for key, row in read_zoo().items()
            if key[0] == task and only in key[1] and float(row["most"]) < DECIDED
        ]
        random.Random(0).shuffle(rows)
        for _, name, seed in rows[:count]:
            edited = dict(ways(bench.model, bench.task, int(seed)))[name]()
            others = tuple(arm for arm in ARMS if arm not in known)
            for arms, steps in ((others, (20, 80)), (known, (80, 200))):
                config = RelearnConfig(steps=steps, rates=(1e-3,))
                found = attack_suite({name: edited}, bench.task, config=config, arms=arms)[name]
                cells = [
                    f"{arm} {a.up_to(80):.2f}/{a.up_to(80, 'last'):.2f}, {found.most(arm):.2f}"
                    for arm, a in found.arms.items()
                ]
                print(task, name, f"#{seed}", f"up to {steps[-1]}", *cells, sep="  ", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make and measure the calibration zoo.")
    parser.add_argument("--tasks", nargs="+", default=["capitals", "countries"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--whole", type=int, default=0, help="only print the whole suite's finds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.whole:
        whole_suite(args.tasks, args.whole, args.only)
        return
    benches = [Bench.of(name) for name in args.tasks]
    for late, seed in product((False, True), args.seeds):
        both = [list(ways(b.model, b.task, seed)) for b in benches]
        for steps in zip(*both, strict=True):
            for bench, (name, make) in zip(benches, steps, strict=True):
                key: Key = (bench.task.name, name, str(seed))
                if name.startswith(SLOW) != late or (seed and name.startswith(FIXED)):
                    continue
                if args.only not in name or key in read_zoo():
                    continue
                start = time.process_time()
                edited = make()
                made = time.process_time() - start
                row = {**attacked(edited, bench.task), **evidence(bench, edited, name)}
                row["seconds"] = time.process_time() - start
                write_zoo({**read_zoo(), key: row})
                found = f"{row['most']:.2f} {row['arm']} {row['verdict']} {row['cad']:.2f}"
                print(*key, found, f"{made:.0f} + {row['seconds'] - made:.0f} s", flush=True)


if __name__ == "__main__":
    main()
