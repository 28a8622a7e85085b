"""Edge scores beside those of other tools: are they the same, and what do they cost?

    python benchmarks/peers.py facts gpt2                        TransformerLens 4.3's own
    python benchmarks/peers.py facts gpt2 --eap-ig FOLDER/src    hannamw/EAP-IG, TransformerLens 3.9

Models: `facts`, the embedded one (16 pairs of `capitals`; heads share keys); `gpt2`, random
weights, four layers of GPT-2 small's width (8 pairs of 15 random tokens); or a folder (pairs of
`agreement`). Each tool and this one score the same pairs on the same model object, in one process,
with the gradient at the same points: TransformerLens has EAP at the corrupt run, EAP-IG has EAP
at the clean run, and EAP-IG with the left ends of its steps, which this package does not offer and
is made to take here. EAP-IG needs a `HookedTransformer`, which TransformerLens 4 has no more, and
TransformerLens 3.9 scores no edges, so that two environments are needed. Columns:

    difference      largest difference of two scores of an edge, over the largest score
    seconds         CPU time, median of several, in turn; one thread
    MB              peak memory of a process of its own, beyond the model and one pair scored before

EAP-IG asks for a GPU by name; here its tensors are made on the CPU. Its sums are over the batch,
so that its scores do not depend on the batch size. Keys and values that heads share are one reader
here and one for each head there, so that theirs are summed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution import figure_of, make_model, make_pairs, peak_beyond
from jaxtyping import Bool, Float

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.config import AttributionConfig
from mansu_interp.circuits.metrics import logit_diff
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Batch, PairSet
from mansu_interp.tasks.synthetic import synthetic_pairs

BATCH, IG_STEPS = 8, 5
REPEATS = 3
Scores = Float[np.ndarray, "writers readers"]
Edges = Bool[np.ndarray, "writers readers"]


class LeftEnds(AttributionConfig):
    """EAP-IG with the gradient at the left end of each step, as hannamw/EAP-IG takes it."""

    def path(self) -> list[float]:
        """Positions on the line, 0 = corrupt."""
        return [k / self.ig_steps for k in range(self.ig_steps)]


class OnCpu:
    """torch, whose zeros are made on the CPU wherever they are asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *shape: Any, device: str = "cpu", **how: Any) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(*shape, **how)


def make(name: str) -> tuple[LanguageModel, PairSet]:
    """A model and its pairs."""
    if name == "gpt2":
        return make_model(layers=4, heads=12), make_pairs(15)
    model = load_model(name)
    if name == "facts":
        return model, load_task("capitals", model).forget.sample(16, 0)
    return model, synthetic_pairs(model, "agreement", 4, 0)


def as_hooked(model: LanguageModel) -> Any:
    """The same weights as a `HookedTransformer`, with the hooks that EAP-IG needs."""
    from transformer_lens import HookedTransformer  # type: ignore[attr-defined]
    from transformer_lens.loading_from_pretrained import (  # type: ignore[import-not-found]
        get_pretrained_model_config,
        get_pretrained_state_dict,
    )

    from mansu_interp.models.layout import turn_back

    turn_back(model.hf)  # its converter knows GPT-2's own layout
    known = copy.deepcopy(model.config)
    if not hasattr(known, "n_ctx") and hasattr(known, "n_positions"):
        known.n_ctx = known.n_positions  # GPT-2's name for it when TransformerLens 3.9 was made
    with tempfile.TemporaryDirectory() as folder:
        known.save_pretrained(folder)
        config = get_pretrained_model_config(folder, device="cpu", dtype=torch.float32)
        state = get_pretrained_state_dict(folder, config, model.hf)
    config.tokenizer_name = None
    out = HookedTransformer(config)
    out.load_and_process_state_dict(
        {k: v.detach().clone() for k, v in state.items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return out.eval()


def ours(model: Any, pairs: PairSet, config: AttributionConfig) -> Scores:
    """This package's."""
    return attribute(model, pairs, config=config).scores


def mean_over_pairs(model: LanguageModel, found: list[dict[Any, float]]) -> Scores:
    """The mean of TransformerLens' own, positions summed."""
    import oracle

    return np.mean([oracle.summed(model, x) for x in found], axis=0)


def of_transformer_lens(model: LanguageModel, pairs: PairSet) -> list[dict[Any, float]]:
    """TransformerLens' own, one pair at a time."""
    import oracle

    return [oracle.by_position(model, pair) for pair in pairs]


@contextmanager
def switched_on(model: Any) -> Iterator[None]:
    """A `HookedTransformer` with the hooks that EAP-IG needs."""
    switches = [model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in]
    if model.cfg.n_key_value_heads:
        switches.append(model.set_ungroup_grouped_query_attention)
    for switch in switches:
        switch(True)
    try:
        yield
    finally:
        for switch in switches:
            switch(False)
        model.zero_grad(set_to_none=True)


def loaded(pairs: PairSet, module: Any) -> list[tuple[Any, ...]]:
    """What EAP-IG's functions take for a data set, and a module of it that reads such batches."""

    def tokens(model: Any, rows: torch.Tensor) -> tuple[Any, ...]:
        lengths = ends[rows.data_ptr()].last + 1
        real = torch.arange(rows.shape[1]) < lengths[:, None]
        return rows, real.long(), lengths, rows.shape[1]

    batches = list(pairs.batches(BATCH))
    ends = {rows.data_ptr(): b for b in batches for rows in (b.clean, b.corrupt)}
    module.torch, module.tokenize_plus = OnCpu(), tokens
    return [(b.clean, b.corrupt, b) for b in batches]


def of_eap_ig(model: Any, pairs: PairSet, method: str) -> torch.Tensor:
    """hannamw/EAP-IG's, in its own order of readers."""
    import eap.attribute  # type: ignore[import-not-found]
    from eap.graph import Graph as TheirGraph  # type: ignore[import-not-found]

    def worse(logits: torch.Tensor, clean: torch.Tensor, _: object, batch: Batch) -> torch.Tensor:
        rows = torch.arange(len(batch))
        return -logit_diff(logits[rows, batch.last], batch, clean[rows, batch.last]).sum()

    loader = loaded(pairs, eap.attribute)
    with switched_on(model):
        graph = TheirGraph.from_model(model)
        eap.attribute.attribute(model, graph, loader, worse, method, ig_steps=IG_STEPS, quiet=True)
    return graph.scores


def metric_by_eap_ig(model: Any, pairs: PairSet, edges: Edges, a: Architecture) -> float:
    """Mean metric of a circuit of this package, measured by hannamw/EAP-IG."""
    import eap.evaluate  # type: ignore[import-not-found]
    from eap.graph import Graph as TheirGraph  # type: ignore[import-not-found]

    def gap(logits: torch.Tensor, _: object, __: object, batch: Batch) -> torch.Tensor:
        rows = torch.arange(len(batch))
        return logit_diff(logits[rows, batch.last], batch, logits[rows, batch.last])

    loader = loaded(pairs, eap.evaluate)
    with switched_on(model):
        graph = TheirGraph.from_model(model)
        graph.in_graph[:] = in_their_order(edges & Graph(a).exists, a) & graph.real_edge_mask
        graph.nodes_in_graph[:] = True
        return float(eap.evaluate.evaluate_graph(model, graph, loader, gap, quiet=True).mean())


def in_our_order(theirs: torch.Tensor, a: Architecture) -> Scores:
    """EAP-IG's scores with shared keys and values summed."""
    layers, last = theirs[:, :-1].reshape(len(theirs), a.n_layers, -1), theirs[:, -1:]
    q, k, v, mlp = layers.split([a.n_heads] * 3 + [1], dim=2)
    k, v = (x.unflatten(2, (a.n_kv_heads, -1)).sum(3) for x in (k, v))
    readers = torch.cat([q, k, v, mlp], 2).flatten(1)
    return torch.cat([readers, last], 1).numpy() * Graph(a).exists


def in_their_order(edges: Edges, a: Architecture) -> torch.Tensor:
    """A circuit of this package in EAP-IG's order: every head of a group has the group's edges."""
    layers, last = edges[:, :-1].reshape(len(edges), a.n_layers, -1), edges[:, -1:]
    q, k, v, mlp = np.split(layers, np.cumsum([a.n_heads, a.n_kv_heads, a.n_kv_heads]), axis=2)
    k, v = (x.repeat(a.n_heads // a.n_kv_heads, axis=2) for x in (k, v))
    readers = np.concatenate([q, k, v, mlp], 2).reshape(len(edges), -1)
    return torch.from_numpy(np.concatenate([readers, last], 1))


def jobs(name: str, eap_ig: str | None) -> dict[str, tuple[Callable[[PairSet], Any], ...]]:
    """By row: how this package scores pairs, how the other does, and how its scores are read."""
    model, _ = make(name)
    eap, clean = (AttributionConfig(method="eap", at=at, batch_size=BATCH) for at in ENDS)
    left = LeftEnds(ig_steps=IG_STEPS, batch_size=BATCH)
    if eap_ig is None:
        here, there = partial(ours, model, config=eap), partial(of_transformer_lens, model)
        return {"TransformerLens, EAP": (here, there, partial(mean_over_pairs, model))}
    hooked = as_hooked(model)
    read = partial(in_our_order, a=model.architecture)
    return {
        f"EAP-IG, {label}": (
            partial(ours, hooked, config=config),
            partial(of_eap_ig, hooked, method=method),
            read,
        )
        for label, config, method in (
            ("EAP", clean, "EAP"),
            (f"EAP-IG, {IG_STEPS} steps", left, "EAP-IG-inputs"),
        )
    }


ENDS = ("corrupt", "clean")


def peak(options: argparse.Namespace, model: str, row: str, which: int) -> float:
    """Peak memory in MB of a process that does one job, beyond what it held before."""
    command = [__file__, model, "--job", row, str(which)]
    return figure_of(command + (["--eap-ig", options.eap_ig] if options.eap_ig else []))


def table(options: argparse.Namespace, name: str) -> None:
    """Print the rows of one model."""
    pairs = make(name)[1]
    for row, (here, there, read) in jobs(name, options.eap_ig).items():
        times: dict[int, list[float]] = {0: [], 1: []}
        found: dict[int, Any] = {}
        for _ in range(REPEATS):
            for which, job in enumerate((here, there)):
                start = time.process_time()
                found[which] = job(pairs)
                times[which].append(time.process_time() - start)
        mine, theirs = found[0], read(found[1])
        off = np.abs(mine - theirs).max() / np.abs(mine).max()
        a, b = (statistics.median(t) for t in times.values())
        memory = [peak(options, name, row, which) for which in (0, 1)]
        print(
            f"| {Path(name).name}, {row} | {off:.1e} | {a:.2f} | {b:.2f} | {b / a:.1f} | "
            f"{memory[0]:.0f} | {memory[1]:.0f} | {memory[1] / memory[0]:.1f} |",
            flush=True,
        )


def main() -> None:
    """Parse the options and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="facts, gpt2 or a folder")
    parser.add_argument("--eap-ig", help="the folder `src` of hannamw/EAP-IG")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path += [str(Path(__file__).parents[1] / "tests"), *filter(None, [options.eap_ig])]
    if options.job:
        row, which = options.job
        name = options.models[0]
        print(peak_beyond(jobs(name, options.eap_ig)[row][int(which)], make(name)[1]))
        return
    print(
        "| model, peer, method | difference | seconds here | there | ratio | MB here | there | "
        "ratio |\n|---|---|---|---|---|---|---|---|"
    )
    for name in options.models:
        try:
            table(options, name)
        except ValueError as error:  # as TransformerLens refuses what it cannot score
            print(f"| {Path(name).name} | refused: {str(error).split(',')[0]} |" + " |" * 6)


if __name__ == "__main__":
    main()
