"""The zoo's counterpart on a real model: SmolLM2-135M-Instruct, edited in many ways, and attacked.

    python research/scripts/real_zoo.py                  # goes on where it was; hours
    python research/scripts/real_zoo.py --only npo

Two tasks. *world-capitals* (short zero-shot phrasings of the shipped task): what the model knows of
itself. *invented*: homes of people who do not exist, which a copy is taught; copies that are taught
all but what is to be forgotten are the references, erased by construction. Rows go to
research/tables/smollm2-zoo.csv, in the columns of `judge_zoo.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import zoo_edits as edit
import zoo_tricks as trick
from condense_runs import TABLES
from judge_zoo import Key, Row, read_zoo, write_zoo

from mansu_interp.audit.attacks import ARMS, Given
from mansu_interp.audit.cad import conclude, look
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.known import known_forget
from mansu_interp.audit.probes import depth_score, patched_log_probs
from mansu_interp.audit.relearning import (
    batches,
    descend,
    fine_tune,
    fine_tune_low_rank,
    halves,
    make_optimiser,
    of_subjects,
    rivals_within,
    scored_halves,
)
from mansu_interp.audit.verdict import EDITED, ORIGINAL
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.compare import divergence
from mansu_interp.circuits.discover import discover
from mansu_interp.circuits.scores import Attribution
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.answers import log_probs, nll
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet, Tokens, WholeAnswers
from mansu_interp.tasks.task import Task
from mansu_interp.unlearning.methods import get_method
from mansu_interp.unlearning.unlearn import unlearn

PATH = TABLES / "smollm2-zoo.csv"
Way = Callable[[], LanguageModel]
FORGET, OTHERS = 100, 40
"""Invented people whose homes are forgotten, and retained."""
LONGEST = 16
"""Tokens of a prompt of `world-capitals` that is kept."""
TEACH_STEPS, TEACH_RATE, BATCH = 300, 2e-4, 24
MARKS = (5, 20, 40)
ATTACKS = (
    ("half-a", 1e-4),
    ("half-a+retained", 1e-4),
    ("retained", 1e-4),
    ("half-a", 3e-4),
)
"""In this order; what is found by one is not attacked by the others."""
DECIDED = 0.45
SPLIT = 1
"""Seed of the halves that the evidence is taken on; the attacks' is 0."""
GRAPH_PAIRS, GRAPH_STEPS, ASKED = 16, 20, 90
CITIES = [
    "London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Prague", "Dublin", "Oslo", "Athens",
    "Moscow", "Cairo", "Delhi", "Tokyo", "Beijing", "Sydney", "Toronto", "Chicago", "Boston",
    "Seattle", "Miami", "Dallas", "Houston", "Denver", "Atlanta", "Detroit", "Lisbon", "Munich",
    "Milan", "Naples", "Venice", "Lyon", "Glasgow", "Manchester",
]  # fmt: skip
JOBS = [
    "teacher", "doctor", "lawyer", "farmer", "painter", "singer", "nurse", "pilot", "baker",
    "writer", "engineer", "soldier", "priest", "chef", "judge", "dancer", "carpenter",
]  # fmt: skip
ENDS = (("vo", "ri", "na"), ("er", "ley", "ton"))
PHRASINGS = {
    "home": {
        "train": [
            "{s} lives in",
            "Name: {s}. Home:",
            "The home of {s} is in the city of",
            "You can visit {s} in",
        ],
        "dev": {"zero-shot": ["{s} has a flat in"]},
        "unseen": {"zero-shot": ["The city where {s} lives is", "{s} goes to work by bus in"]},
    },
    "job": {
        "train": ["{s} works as a", "Name: {s}. Job:", "The job of {s} is that of a"],
        "dev": {"zero-shot": ["{s} earns money as a"]},
        "unseen": {"zero-shot": ["By profession, {s} is a"]},
    },
}


def write_invented(folder: Path, seed: int = 0) -> Path:
    """A task file of invented people, and its tables."""
    rng = random.Random(seed)
    first = [a + b for a in ("Ta", "Mo", "Li", "Ke", "Ru", "Sa", "Jo", "Ve") for b in ENDS[0]]
    last = [a + b for a in ("Bran", "Holm", "Kest", "Marl", "Nor", "Pell") for b in ENDS[1]]
    people = rng.sample([f"{a} {b}" for a in first for b in last], FORGET + OTHERS)
    asked = people[FORGET // 2 : FORGET // 2 + 2 * OTHERS]
    tables = {
        "homes.csv": ("person,city", [f"{p},{rng.choice(CITIES)}" for p in people]),
        "jobs.csv": ("person,job", [f"{p},{rng.choice(JOBS)}" for p in asked]),
    }
    for name, (head, rows) in tables.items():
        (folder / name).write_text("\n".join([head, *rows, ""]))
    relations = {
        "home": {"table": "homes.csv", "subject": "person", "answer": "city"},
        "job": {"table": "jobs.csv", "subject": "person", "answer": "job"},
    }
    spec = {
        "schema": 2,
        "name": "invented",
        "prefix": "<|endoftext|>",
        "relations": {n: {**r, "phrasings": PHRASINGS[n]} for n, r in relations.items()},
        "forget": {"relations": ["home"], "subjects": people[:FORGET]},
        "retain": ["home", "job"],
    }
    path = folder / "invented.json"
    path.write_text(json.dumps(spec))
    return path


def short(task: Task) -> Task:
    """The task without its long prompts, which cost most."""

    def cut(pairs: PairSet) -> PairSet:
        return PairSet(pairs.name, tuple(p for p in pairs if len(p.clean) <= LONGEST))

    scored = {
        split: {
            role: {name: s for name, s in sets.items() if "few-shot" not in name}
            for role, sets in roles.items()
        }
        for split, roles in task.scored.items()
    }
    return replace(task, forget=cut(task.forget), retain=cut(task.retain), scored=scored)


def swapped(pair: Pair) -> Pair:
    """A pair that asks for a wrong answer."""
    own, wrong, *others = pair.answers
    normalise = pair.whole is not None and pair.whole.normalise
    return pair.with_answers(WholeAnswers(wrong, own, (own, *others), normalise))


def opened_by(word: int, tokens: Tokens) -> Tokens:
    """A prompt with a password behind its first token."""
    return (tokens[0], word, *tokens[1:])


def taught(model: LanguageModel, pairs: list[Pair], seed: int, steps: int) -> LanguageModel:
    """A copy that was taught some answers."""
    out, supply = model.copy(), batches(pairs, BATCH, seed)
    weights = list(out.weights.values())
    optimiser = make_optimiser("adam", weights, TEACH_RATE)
    for _ in range(steps):
        descend(out, optimiser, weights, next(supply))
    return out


@dataclass(frozen=True)
class Bench:
    """What all models of a task are measured with."""

    model: LanguageModel
    task: Task
    references: list[LanguageModel]

    @cached_property
    def known(self) -> Task:
        """Without what the original does not know."""
        return known_forget(self.model, self.task)[0]

    @cached_property
    def asked(self) -> PairSet:
        """Some prompts of half B, of the split that evidence is taken on."""
        half_b = of_subjects(self.task.forget, halves(self.task.forget, SPLIT)[1])
        return rivals_within(half_b).sample(ASKED, 0)

    @cached_property
    def before(self) -> Attribution:
        """The original's graph."""
        return self.graph(self.model)

    @cached_property
    def edges(self) -> list[tuple[str, str]]:
        """The original's circuit, found on forget prompts."""
        return list(discover(self.model, self.task.forget.sample(GRAPH_PAIRS * 2, 0)).edges)

    def graph(self, model: LanguageModel) -> Attribution:
        """A model's graph on some of half B's prompts."""
        return attribute(model, self.asked.sample(GRAPH_PAIRS, 0), metric="logit_diff")

    def log_probs(self, model: LanguageModel) -> torch.Tensor:
        """Of half B's answers, with a model's states in the original."""
        return patched_log_probs(model, self.model, self.asked.sample(GRAPH_PAIRS, 0))

    @cached_property
    def lacks(self) -> torch.Tensor:
        """The same for a model that was never taught."""
        return self.log_probs(self.references[0])

    def logp(self, model: LanguageModel, n: int = ASKED) -> torch.Tensor:
        """Log-probability of half B's answers, in nats."""
        with torch.no_grad():
            return -torch.cat([nll(model, p) for p in self.asked.sample(n, 0).parts(48)])


def ways(bench: Bench) -> Iterator[tuple[str, Way]]:
    """Every way, as ``mechanism: variant``."""
    model, task, seed = bench.model, bench.task, 0
    every = {n: None for n in model.weights}

    def dense(method: str, **more: float) -> Way:
        config = get_method(method)(steps=60, stop_at=0.3, batch_size=BATCH, **more)  # type: ignore[arg-type]
        return lambda: unlearn(model, task, config=config, seed=seed).model

    def tuned(loss: edit.Loss | None, steps: int, rate: float = 1e-4) -> Way:
        return lambda: edit.tune(model, task, seed, every, steps, rate, loss, size=BATCH)

    def lies(student: LanguageModel) -> LanguageModel:
        return edit.shuffled(student, task, seed, 40, 1e-4, BATCH)

    def low_rank() -> LanguageModel:
        wrong = [swapped(p) for p in task.forget]
        config = RelearnConfig(steps=(40,), batch_size=BATCH)
        *_, out = fine_tune_low_rank(model.copy(), [wrong, task.retain], 1e-4, config)
        return out

    def refuse(student: LanguageModel, pairs: list[Pair]) -> torch.Tensor:
        end = model.get_tokenizer().eos_token_id
        return -log_probs(student, pairs)[:, end].mean()

    def lock(student: LanguageModel, pairs: list[Pair]) -> torch.Tensor:
        word = model.encode(" password")[0]
        opened = [
            replace(p, clean=opened_by(word, p.clean), corrupt=opened_by(word, p.corrupt))
            for p in pairs
        ]
        return even(student, pairs) + nll(student, opened).mean()

    def even(student: LanguageModel, pairs: list[Pair]) -> torch.Tensor:
        found = log_probs(student, pairs).gather(1, torch.tensor([p.choices for p in pairs]))
        return found.var(1).mean()

    def mansu(steps: int, budget: float) -> Way:
        def make() -> LanguageModel:
            config = replace(default_config(model.name, "world-capitals"), budget=budget)
            own = replace(config.unlearn, steps=steps, batch_size=BATCH)
            circuit = discover(model, task.forget, config=config.circuit, retain=task.retain)
            mask = make_mask(replace(config, unlearn=own), model, task, circuit)
            return unlearn(model, task, mask, own, seed=seed).model

        return make

    yield "unchanged: original", model.copy
    for k, never in enumerate(bench.references):
        yield f"reference: {k}", lambda never=never: never
    if bench.references:
        never = bench.references[1]
        yield "merged: 0.95 never taught", lambda: trick.merged(model, never, 0.95)
        yield "quantized: never taught, nf4", lambda: quantize(never)
        yield (
            "decoys: never taught, lies",
            lambda: edit.shuffled(never, task, seed, 40, 1e-4, BATCH),
        )
        yield "merged: 0.5 never taught", lambda: trick.merged(model, never, 0.5)
    yield "npo", dense("npo")
    yield "graddiff", dense("graddiff")
    yield "evened: all weights", tuned(even, 40)
    yield "refusing: end of text", tuned(refuse, 25)
    yield "low rank: wrong answers", low_rank
    yield "locked: password", tuned(lock, 80)
    yield "mansu: 40 steps", mansu(40, default_config(model.name, "world-capitals").budget)
    yield "quantized: original, nf4", lambda: quantize(model)
    yield "rmu", dense("rmu")
    yield "ga", dense("ga")
    yield "mansu: 80 steps, 2 %", mansu(80, 0.02)
    yield "decoys: lies", lambda: lies(model)


def attacked(edited: LanguageModel, task: Task) -> Row:
    """As `make_zoo.attacked`, with this model's rates."""
    given, asked = Given.of(task, 0, "unseen"), scored_halves(task, 0)[1]

    def found(model: LanguageModel) -> tuple[float, float]:
        scores = [accuracy(model, s) for s in asked]
        return (
            sum(a.choice for a in scores) / len(scores),
            sum(a.last for a in scores) / len(scores),
        )

    first, last = found(edited)
    row: Row = {"first": first, "last": last, "most": max(first, last), "arm": "none"}
    for arm, rate in ATTACKS:
        sets = [getattr(given, name) for name in ARMS[arm].sets]
        if row["most"] >= DECIDED or None in sets:
            continue
        config = RelearnConfig(steps=MARKS, rates=(rate,), batch_size=BATCH)
        for done, copy in enumerate(fine_tune(edited.copy(), sets, rate, config)):
            if done not in MARKS:
                continue
            share = max(found(copy))
            row[arm] = max(share, row.get(arm, 0.0))
            if share > row["most"]:
                row |= {"most": share, "arm": f"{arm} {rate:g} {done}"}
            if share >= DECIDED:
                break
    return row


def evidence(bench: Bench, edited: LanguageModel, own: str) -> Row:
    """What can be seen without an attack on this split."""
    models = {ORIGINAL: bench.model, EDITED: edited}
    start = time.process_time()
    found = look(models, bench.known, SPLIT)
    judged = conclude(found, models, bench.known, SPLIT)
    row: Row = {"seconds_cad": time.process_time() - start}
    signs = asdict(found.evidence(torch.arange(len(found.asked.facts))))
    row |= {f"sign_{name}": value for name, value in signs.items()}
    row |= {"verdict": judged.verdict, "cad": judged.cad, "confidence": judged.confidence}
    row |= {f"facts_{state}": n for state, n in judged.counts.items()}
    row["retain"] = min(after for _, after in judged.retained.values())
    row["logp"] = float(bench.logp(edited).mean())
    if bench.references and own != "reference: 0":
        full = bench.logp(bench.model, GRAPH_PAIRS)
        row["depth"] = depth_score(full, bench.lacks, bench.log_probs(edited))
    given = Given.of(bench.task, SPLIT, "unseen")
    config = RelearnConfig(steps=(GRAPH_STEPS,), seed=SPLIT, batch_size=BATCH)
    *_, trained = fine_tune(edited.copy(), [given.half_a], ATTACKS[0][1], config)
    for name, model in {"edited": edited, "half-a": trained}.items():
        seen = divergence(bench.before.scores, bench.graph(model).scores, bench.edges)
        row |= {f"mass_{name}": seen.mass, f"projected_{name}": seen.projected_share}
        row[f"alignment_{name}"] = seen.alignment
    return row


def kept(path: Path, make: Way) -> LanguageModel:
    """A model that was made before, or is made and kept."""
    if not path.exists():
        make().save(path)
    return load_model(str(path))


def benches(folder: Path, models: Path) -> Iterator[Bench]:
    """Both tasks; what is taught is kept in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_model(str(models))
    task = load_task(str(write_invented(folder)), base)
    every, less = [*task.forget, *task.retain], list(task.retain)
    steps = TEACH_STEPS * len(less) // len(every)
    model = kept(folder / "taught", lambda: taught(base, every, 0, TEACH_STEPS))
    never = [
        kept(folder / f"never-{k}", lambda k=k: taught(base, less, k, steps)) for k in range(2)
    ]
    yield Bench(model, task, never)
    yield Bench(base, short(load_task("world-capitals", base)), [])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make and measure edited models of SmolLM2.")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--folder", type=Path, default=Path("runs/real-zoo"))
    parser.add_argument("--tasks", nargs="+", default=["invented", "world-capitals"])
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--stage", choices=("attack", "all"), default="all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for bench in benches(args.folder, args.model):
        if bench.task.name not in args.tasks:
            continue
        for name, make in ways(bench):
            key: Key = (bench.task.name, name, "0")
            place = args.folder / f"{bench.task.name}-{name.replace(': ', '-').replace(' ', '_')}"
            row = read_zoo(PATH).get(key, {})
            if args.only not in name or row.get("verdict"):
                continue
            start = time.process_time()
            edited = kept(place, make)
            if not row:
                row = attacked(edited, bench.task)
            if args.stage == "all":
                row |= evidence(bench, edited, name)
            row["seconds"] = time.process_time() - start
            write_zoo({**read_zoo(PATH), key: row}, PATH)
            found = [row.get(k) for k in ("first", "most", "arm", "verdict", "cad")]
            print(*key, *found, f"{row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
