"""Which edge scores find circuits: each method against exact patching, and by faithfulness.

    python benchmarks/discovery.py capitals countries            embedded model (two minutes each)
    python benchmarks/discovery.py random gemma3                 random Llama, random Gemma 3
    python benchmarks/discovery.py ioi greater agreement --model FOLDER    such as SmolLM2-135M

Scores are taken on some pairs; the circuits of their rankings are measured on other pairs of the
same task, by ablating all edges outside. On models of at most `SMALL` edges every edge is patched
alone, in the clean run and in the corrupt run; on larger ones, in the clean run, a sample of edges
drawn with the seed and the strongest of every method, on the first half of the pairs, and fewer
circuits are measured on as many others, so that "at 0.85" is known to a factor of two. Columns:

    rho noise, restore   Spearman's correlation of the ranks of |score| and |exact effect|
    top 20, 100          share of the strongest edges by the exact effect in the clean run that are
                         among as many by score
    CPR, CMD             areas of the faithfulness curve (higher, lower is better)
    at 0.85              edges asked for until faithfulness reaches 0.85
    stable               Jaccard index of as many of the strongest edges with those of a bootstrap
                         resample of the pairs, the mean over `RESAMPLES`
    seconds, / EAP       CPU time of one thread, and as a ratio to EAP's
    MB                   with --memory alone: peak memory of a process of its own, beyond the model
                         and one pair scored before (Linux)

"exact" ranks by the exact effect itself, "mean rank" by the mean of the ranks of three methods,
"signed" by the score with its sign, positive first. Other tools' scores: `peer_circuits.py`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import numpy as np
import torch
from attribution import figure_of, peak_beyond
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.patching import patch_edges
from mansu_interp.circuits.search.faithfulness import (
    FRACTIONS,
    faithfulness_curve,
    minimal_edges,
    strongest,
)
from mansu_interp.circuits.search.stability import Resamples, ranks
from mansu_interp.models.graph import Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet
from mansu_interp.tasks.synthetic import KINDS, synthetic_pairs

SMALL = 5000
"""Edges up to which all are patched."""
SAMPLE, STRONGEST = 100, 50
"""Edges that are patched of larger models: drawn, and of each method."""
RESAMPLES, VOCAB = 50, 50
FEW = (0.001, 0.01, 0.1, 1.0)
"""Shares of the edges at which the curve of a larger model is measured."""
METHODS = {
    "EAP": {"method": "eap"},
    "EAP, both ends": {"method": "eap", "at": "both"},
    "EAP-IG": {},
    "EAP-IG, activations": {"method": "eap-ig-activations"},
    "GIM": {"method": "eap", "rules": "gim"},
    "GIM, both ends": {"method": "eap", "at": "both", "rules": "gim"},
    "GIM, EAP-IG": {"rules": "gim"},
    "RelP": {"method": "eap", "rules": "relp"},
    "RelP, both ends": {"method": "eap", "at": "both", "rules": "relp"},
}
SLOW = ("EAP-IG, activations", "GIM, EAP-IG")
"""Not taken on larger models."""
MEAN = ("EAP, both ends", "GIM, both ends", "RelP, both ends")
SIGNED = "EAP-IG"


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of the k largest that both have in common."""
    k = min(k, len(a))
    first, second = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (a, b))
    return len(first & second) / k


def random_model() -> LanguageModel:
    """Three layers of four heads over two keys, of width 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return LanguageModel("random", LlamaForCausalLM(config).eval(), None)


def random_gemma3() -> LanguageModel:
    """Six layers of the shape of Gemma 3 and of width 32: four heads over one key, norms before and
    behind every block and on queries and keys, attention to four tokens but in the last layer."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        architectures=["Gemma3ForCausalLM"],
    )
    model = Gemma3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # 0 as they are made: a factor of one in every norm
            torch.nn.init.normal_(weight, std=0.2)
    return LanguageModel("gemma3", model, None)


def random_gpt2() -> LanguageModel:
    """Three layers of the shape of GPT-2, of four heads and of width 32."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["GPT2LMHeadModel"],
    )
    return LanguageModel("gpt2", GPT2LMHeadModel(config).eval(), None)


RANDOM = {"random": random_model, "gemma3": random_gemma3, "gpt2": random_gpt2}
"""Models with random weights."""


def random_pairs(n: int, seed: int, model: LanguageModel | None = None) -> PairSet:
    """Pairs of six random tokens that differ in one; the answer is what the model changes most."""
    rng, model, pairs = random.Random(seed), model or random_model(), []
    for k in range(n):
        clean = tuple(rng.randrange(VOCAB) for _ in range(6))
        at, other = rng.randrange(6), rng.randrange(VOCAB)
        corrupt = (*clean[:at], (clean[at] + 1 + other % (VOCAB - 1)) % VOCAB, *clean[at + 1 :])
        tokens, last = torch.tensor([clean, corrupt]), torch.tensor([5, 5])
        with torch.no_grad():
            rise = model.last_logits(tokens, last).diff(dim=0)[0]
        answer, wrong = int(rise.argmin()), int(rise.argmax())
        pairs.append(
            Pair(clean, corrupt, answer, wrong, (wrong,), "random", f"s{k}", "six", f"p{k}", "a")
        )
    return PairSet("random", tuple(pairs))


def make(task: str, folder: str | None, n: int, seed: int) -> tuple[LanguageModel, PairSet]:
    """A model and 2 n pairs."""
    if task in RANDOM:
        model = RANDOM[task]()
        return model, random_pairs(2 * n, seed, model)
    model = load_model(folder or "facts")
    if task in KINDS:
        return model, synthetic_pairs(model, task, 2 * n, seed)
    return model, load_task(task, model).forget.sample(2 * n, seed)


def configured(name: str) -> AttributionConfig:
    """The settings of a method."""
    return AttributionConfig(**METHODS[name])  # type: ignore[arg-type]


def score(
    model: LanguageModel, pairs: PairSet, methods: list[str], seed: int
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], dict[str, float]]:
    """Scores of each method, the same of each resample, and CPU seconds."""
    attribute(model, pairs, config=AttributionConfig(method="eap"))  # warm up
    scores, drawn, seconds = {}, [{} for _ in range(RESAMPLES)], {}
    for name in methods:
        start = time.process_time()
        scores[name] = attribute(model, pairs, config=configured(name)).scores.astype(float)
        seconds[name] = time.process_time() - start
        resamples = Resamples(pairs, RESAMPLES, seed)
        attribute(model, pairs, config=configured(name), on_pairs=resamples)
        for into, values in zip(drawn, resamples.means(), strict=True):
            into[name] = values.astype(float)
    seconds["mean rank"] = sum(seconds[m] for m in MEAN)
    seconds[f"{SIGNED}, signed"] = seconds[SIGNED]
    for each in (scores, *drawn):
        each.update(ranked(model.graph, each))
    return scores, drawn, seconds


def ranked(graph: Graph, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rankings that are made of the scores of methods."""
    exists = graph.exists
    mean, signed = np.zeros(exists.shape), np.zeros(exists.shape)
    mean[exists] = sum(ranks(np.abs(scores[m][exists])) for m in MEAN)
    signed[exists] = ranks(scores[SIGNED][exists])
    return {"mean rank": mean, f"{SIGNED}, signed": signed}


def jaccard(graph: Graph, a: np.ndarray, b: np.ndarray, n: int) -> float:
    """Edges that the circuits of two rankings have in common, over those of either."""
    one, other = (strongest(graph, values, n) for values in (a, b))
    return float((one & other).sum() / (one | other).sum())


def chosen(graph: Graph, scores: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """The edges that are patched."""
    if graph.n_edges <= SMALL:
        return graph.exists
    every, out = np.argwhere(graph.exists), np.zeros_like(graph.exists)
    out[tuple(np.random.default_rng(seed).permutation(every)[:SAMPLE].T)] = True
    for values in scores.values():
        size = np.where(graph.exists, np.abs(values), -1.0)
        out[np.unravel_index(np.argsort(-size, axis=None)[:STRONGEST], out.shape)] = True
    return out


def curve_of(ablation: Ablation, graph: Graph, values: np.ndarray) -> tuple[float, float, int]:
    """CPR and CMD of a ranking, and edges asked for until faithfulness reaches 0.85."""
    small = graph.n_edges <= SMALL
    curve = faithfulness_curve(ablation, values, fractions=FRACTIONS if small else FEW)
    _, tried = minimal_edges(graph, values, ablation.faithfulness, tolerance=0.05 if small else 0.5)
    return curve.cpr, curve.cmd, min(count for count, reached in tried if reached >= 0.85)


def table(task: str, folder: str | None, n: int, seed: int) -> None:
    """Print the rows of one task."""
    model, every = make(task, folder, n, seed)
    pairs, others = PairSet(task, every.pairs[:n]), PairSet(task, every.pairs[n:])
    graph, small = model.graph, model.graph.n_edges <= SMALL
    methods = [m for m in METHODS if small or m not in SLOW]
    scores, drawn, seconds = score(model, pairs, methods, seed)
    edges = chosen(graph, scores, seed)
    few = pairs if small else PairSet(task, pairs.pairs[: max(2, n // 2)])
    start = time.process_time()
    noise, restore = patch_edges(model, few, edges, batch_size=128), None
    if small:
        scores["exact"], seconds["exact"] = np.nan_to_num(noise), time.process_time() - start
        restore = patch_edges(model, few, edges, batch_size=128, direction="denoising")
    tested = others if small else PairSet(task, others.pairs[: max(2, n // 2)])
    ablation = Ablation(model, tested)
    print(
        f"\n{task}: {model.name}, {graph.n_edges:,} edges, {len(pairs)} pairs to score, "
        f"{int(edges.sum()):,} edges patched on {len(few)}, {len(tested)} other pairs to measure, "
        f"seed {seed}; the metric there is {ablation.ends[0]:.2f} whole, {ablation.ends[1]:.2f} "
        "ablated\n\n"
        "| method | rho noise | rho restore | top 20 | top 100 | CPR | CMD | at 0.85 | stable | "
        "seconds | / EAP |\n|---|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name, values in scores.items():
        size, exact = np.abs(values[edges]), np.abs(noise[edges])
        cpr, cmd, least = curve_of(ablation, graph, values)
        held = [jaccard(graph, values, x[name], least) for x in drawn if name in x]
        stable = f"{np.mean(held):.2f}" if held else "–"
        back = "–" if restore is None else f"{spearman(size, np.abs(restore[edges])):.2f}"
        print(
            f"| {name} | {spearman(size, exact):.2f} | "
            f"{back} | {overlap(size, exact, 20):.2f} | "
            f"{overlap(size, exact, 100):.2f} | {cpr:.3f} | {cmd:.3f} | {least:,} | "
            f"{stable} | {seconds[name]:.1f} | {seconds[name] / seconds['EAP']:.1f} |",
            flush=True,
        )


def memory(args: argparse.Namespace) -> None:
    """Print what each method takes, each in a process of its own."""
    for task in args.tasks:
        small = make(task, args.model, 1, args.seed)[0].graph.n_edges <= SMALL
        print(f"\n{task}, {args.pairs} pairs\n\n| method | MB |\n|---|---|")
        for name in (m for m in METHODS if small or m not in SLOW):
            command = [__file__, *sys.argv[1:], "--job", name, task]
            print(f"| {name} | {figure_of(command):.0f} |", flush=True)


def peak(name: str, task: str, args: argparse.Namespace) -> float:
    """Peak memory (MB) of one method in this process."""
    model, every = make(task, args.model, args.pairs, args.seed)
    pairs = PairSet(task, every.pairs[: args.pairs])
    config = configured(name)
    return peak_beyond(lambda x: attribute(model, x, config=config), pairs)


def main() -> None:
    """Read the command line and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", help="capitals, countries, random, gemma3, ioi, ...")
    parser.add_argument("--model", help="name or folder; default: the embedded one")
    parser.add_argument("--pairs", type=int, default=24, help="to score; as many to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="what each method takes, instead")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.job:
        print(peak(*args.job, args))
        return
    if args.memory:
        memory(args)
        return
    for task in args.tasks:
        table(task, args.model, args.pairs, args.seed)


if __name__ == "__main__":
    main()
