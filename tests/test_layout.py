"""Every decoder family through the whole path: load, discover, mask, unlearn, save, quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import transformers
from test_families import EACH, FAMILIES, make
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mansu_interp.circuits.compare import compare
from mansu_interp.circuits.config import CircuitConfig
from mansu_interp.circuits.search.discover import discover
from mansu_interp.errors import CircuitError, ModelError
from mansu_interp.export.ledger import Ledger
from mansu_interp.export.verify import verify
from mansu_interp.masks.components import component_slices
from mansu_interp.masks.select import circuit_mask
from mansu_interp.models.graph import Architecture, Graph, Node
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.layout import check_layout, unpack_4bit
from mansu_interp.models.load import load_model
from mansu_interp.models.stream import Stream
from mansu_interp.quantizers.bitsandbytes import NF4
from mansu_interp.quantizers.survival import quantize, survival
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet
from mansu_interp.unlearning.methods import Mansu
from mansu_interp.unlearning.unlearn import unlearn


@EACH
def test_slices_are_what_transformer_lens_reads(family: str):
    model = make(family)
    stream, arch = Stream(model), model.architecture
    for layer in (0, 2):
        for reading in stream.readings(layer):
            for head in range(arch.n_heads if reading.kind == "q" else arch.n_kv_heads):
                [(name, axis, where)] = component_slices(
                    model, Node(reading.kind, layer, head), False
                )
                assert axis == "rows"
                assert torch.equal(model.weights[name][where], reading.weight[head]), reading.kind
        for head in range(arch.n_heads):
            [(name, axis, where)] = component_slices(model, Node("head", layer, head), True)
            assert axis == "cols"
            assert torch.equal(model.weights[name][:, where], stream.output_weight(layer)[:, head])


@lru_cache
def facts() -> LanguageModel:
    return load_model("facts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder(family, tied, dtype)``: a random two-layer model with the tokenizer of `facts`."""

    def build(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        config_name, model_name, settings = FAMILIES[family]
        path = tmp_path_factory.mktemp(family.replace(" ", "-"))
        torch.manual_seed(2)
        layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
        words = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        changed = {"vocab_size": len(facts().tokenizer), layers: 2, **words}
        config = getattr(transformers, f"{config_name}Config")(
            **{**settings, **changed, "tie_word_embeddings": tied}
        )
        hf = getattr(transformers, model_name)(config).to(dtype)
        hf.save_pretrained(path, max_shard_size="40KB")
        facts().tokenizer.save_pretrained(path)
        return path

    return build


CIRCUIT = CircuitConfig(pairs=4, ig_steps=1, faithfulness_pairs=2)


def oriented(model: LanguageModel, pairs: PairSet) -> PairSet:
    """Pairs turned so that the clean prompts give more of the metric: a random model knows none."""

    def gap(pair: Pair, tokens: tuple[int, ...]) -> float:
        logits = model.last_logits(torch.tensor([tokens]), torch.tensor([len(tokens) - 1]))[0]
        return float(logits[pair.answer] - logits[pair.counterfactual])

    turned = (
        p if gap(p, p.clean) > gap(p, p.corrupt) else replace(p, clean=p.corrupt, corrupt=p.clean)
        for p in pairs[:12]
    )
    return PairSet("oriented", tuple(turned))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied"),
    [*((f, False) for f in FAMILIES if f != "llama mqa"), ("gpt2", True), ("gemma3", True)],
)
def test_the_whole_path(family: str, tied: bool, folder: Any, tmp_path: Path):
    dtype = torch.bfloat16 if tied else torch.float32
    place = folder(family, tied, dtype)
    assert len(list(place.glob("*.safetensors"))) > 1
    model = load_model(place)
    model.tokenizer = facts().tokenizer  # qwen2 would not read it with its own rules
    assert model.saved_dtype == dtype
    task = load_task("capitals", model, 4)
    circuit = discover(model, oriented(model, task.forget), config=CIRCUIT)
    mask = circuit_mask(
        circuit, model, budget=0.01, retain=task.retain_sets, forget=task.forget, n_pairs=4
    )
    result = unlearn(model, task, mask, Mansu(steps=2, batch_size=4, lr=0.3))
    result.model.save(tmp_path / "model")
    edited = load_model(tmp_path / "model")
    edited.tokenizer = model.tokenizer
    row = survival(model, edited, NF4())
    assert row.edited == row.survived > 0 and not row.collateral
    assert not verify(model, edited, ledger=Ledger.of(model, edited, ["nf4"], mask)).status
    # What transformers itself loads is what was measured, in the layout that it was given in.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.tensor([task.forget[0].clean])
    assert torch.allclose(theirs(ids).logits, edited.all_logits(ids), atol=1e-4)
    stored = {n: w.shape for n, w in theirs.named_parameters()}
    original = AutoModelForCausalLM.from_pretrained(place)
    assert stored == {n: w.shape for n, w in original.named_parameters()}
    found = compare(
        circuit, model, {"nf4": quantize(edited)}, task.forget.sample(3, 0), config=CIRCUIT
    )
    assert found.models["nf4"].mass >= 0


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "opt", "phi", "gemma3"])
def test_nf4_is_what_bitsandbytes_stores(family: str, folder: Any):
    """Block for block: transformers' own 4-bit loading and ours restore the same weights."""
    place = folder(family)
    ours = quantize(load_model(place), "nf4")
    packed = AutoModelForCausalLM.from_pretrained(
        place,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    )
    layers = {
        f"{n}.weight": m
        for n, m in packed.named_modules()
        if getattr(getattr(m, "weight", None), "quant_state", None) is not None
    }
    assert set(layers) == set(ours.linear_names)
    for name, layer in layers.items():
        assert torch.equal(unpack_4bit(layer).weight, ours.weights[name]), name


def test_a_fused_weight_of_unknown_order_is_named():
    config = transformers.CodeGenConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    model = LanguageModel("codegen", transformers.CodeGenForCausalLM(config).eval(), None)
    with pytest.raises(ModelError, match=r"qkv_proj\.weight holds q, k and v .* 'codegen'"):
        check_layout(model.hf, model.linear_names, 4, 4)


def test_an_mlp_of_unknown_names_is_named():
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = LanguageModel("mixtral", transformers.MixtralForCausalLM(config).eval(), None)
    with pytest.raises(ModelError, match="No weight of layer 0 is known as its MLP; the layer has"):
        check_layout(model.hf, model.linear_names, 4, 2)


# The attribution graph: edge counts of known models, ids, pruning.

KNOWN = {
    "gpt2-small": (Architecture(12, 12, 12), 32_491),
    "gpt2-medium": (Architecture(24, 16, 16), 231_877),
    "gpt2-large": (Architecture(36, 20, 20), 810_703),
    "gpt2-xl": (Architecture(48, 25, 25), 2_235_025),
    "pythia-70m": (Architecture(6, 8, 8, parallel=True), 3_580),
    "pythia-160m": (Architecture(12, 12, 12, parallel=True), 32_347),
    "pythia-410m": (Architecture(24, 16, 16, parallel=True), 231_493),
    "pythia-2.8b": (Architecture(32, 32, 32, parallel=True), 1_591_857),
    "llama-3.1-8b": (Architecture(32, 32, 8), 805_681),
    "llama-3.2-1b": (Architecture(16, 32, 8), 195_865),
    "qwen2.5-0.5b": (Architecture(24, 14, 2), 79_813),
    "gemma-2-2b": (Architecture(26, 8, 4), 50_610),
}


def closed_form(a: Architecture) -> int:
    """The documented sum: q, k, v and MLP readers per layer, then the logits."""
    n, h, k = a.n_layers, a.n_heads, a.n_kv_heads
    layers = sum((1 + i * (h + 1)) * (h + 2 * k + 1) + (0 if a.parallel else h) for i in range(n))
    return layers + 1 + n * (h + 1)


@pytest.mark.parametrize("name", KNOWN)
def test_edge_counts_of_known_models(name: str):
    architecture, count = KNOWN[name]
    assert Graph(architecture).n_edges == count == closed_form(architecture)


@pytest.mark.parametrize(
    "architecture", [Architecture(3, 4, 4), Architecture(3, 4, 2), Architecture(2, 4, 1, True)]
)
def test_ids_are_unique_and_only_an_mlp_is_both_writer_and_reader(architecture: Architecture):
    graph = Graph(architecture)
    writers, readers = [n.id for n in graph.writers], [n.id for n in graph.readers]
    assert len(set(writers)) == len(writers)
    assert len(set(readers)) == len(readers)
    assert set(writers) & set(readers) == {f"m{i}" for i in range(architecture.n_layers)}


def test_key_ids_say_whether_heads_share_them():
    assert "a1.h3<k>" in Graph(Architecture(2, 4, 4)).reader_index
    grouped = Graph(Architecture(2, 4, 2)).reader_index
    assert "a1.kv1<k>" in grouped
    assert "a1.h1<k>" not in grouped
    assert "a1.h3<q>" in grouped


def test_grouped_readers_feed_their_query_heads():
    graph = Graph(Architecture(2, 4, 2))
    reads = graph.feeds[graph.reader_index["a1.kv1<v>"]]
    assert [graph.writers[i].id for i in reads] == ["a1.h2", "a1.h3"]
    assert [graph.writers[i].id for i in graph.feeds[graph.reader_index["m1"]]] == ["m1"]
    assert graph.feeds[graph.reader_index["logits"]] == ()


def test_who_reads_whom():
    serial, parallel = Graph(Architecture(2, 4, 2)), Graph(Architecture(2, 4, 2, True))
    serial.edge("a0.h3", "m0")
    for source, target in [
        ("a0.h0", "a0.h1<q>"),
        ("m0", "m0"),
        ("m1", "a1.h0<q>"),
        ("logits", "m0"),
        ("input", "nowhere"),
        ("a0.h0", "a1.h0<k>"),  # the keys are grouped here
    ]:
        with pytest.raises(CircuitError, match=f"No edge '{source}' -> '{target}' in Archi"):
            serial.edge(source, target)
    with pytest.raises(CircuitError, match=r"No edge 'a0\.h3' -> 'm0'"):
        parallel.edge("a0.h3", "m0")


@pytest.mark.parametrize("sizes", [(2, 4, 3), (0, 4, 4), (2, 0, 0)])
def test_impossible_architectures(sizes: tuple[int, int, int]):
    with pytest.raises(CircuitError, match="n_kv_heads dividing n_heads; got"):
        Architecture(*sizes)


def chosen(graph: Graph, *edges: tuple[str, str]) -> Any:
    matrix = np.zeros_like(graph.exists)
    for source, target in edges:
        matrix[graph.edge(source, target)] = True
    return matrix


PATH = [("input", "a0.kv0<v>"), ("a0.h1", "m0"), ("m0", "a1.h3<q>"), ("a1.h3", "logits")]


def test_prune_keeps_a_whole_path():
    graph = Graph(Architecture(2, 4, 2))
    whole = chosen(graph, *PATH)
    assert (graph.prune(whole) == whole).all()
    assert (graph.prune(graph.exists) == graph.exists).all()


@pytest.mark.parametrize(
    "dangling",
    [
        ("a0.h2", "logits"),  # head 2 reads kv1, which nothing feeds
        ("input", "m1"),  # m1 is never read
        ("a0.h0", "m1"),
        ("m1", "logits"),
        ("input", "a1.kv0<k>"),  # feeds heads 0 and 1 of layer 1 only
    ],
)
def test_prune_drops_what_dangles(dangling: tuple[str, str]):
    graph = Graph(Architecture(2, 4, 2))
    assert (graph.prune(chosen(graph, *PATH, dangling)) == chosen(graph, *PATH)).all()


def test_prune_drops_everything_when_the_path_is_cut():
    graph = Graph(Architecture(2, 4, 2))
    for cut in range(len(PATH)):
        assert not graph.prune(chosen(graph, *PATH[:cut], *PATH[cut + 1 :])).any()


def test_prune_agrees_with_reachability_in_networkx():
    graph = Graph(Architecture(3, 4, 2))
    rng = np.random.default_rng(0)
    for density in (0.02, 0.05, 0.1):
        edges = (rng.random(graph.exists.shape) < density) & graph.exists
        net = nx.DiGraph()
        net.add_nodes_from([("w", "input"), ("r", "logits")])
        for i, j in np.argwhere(edges):
            net.add_edge(("w", graph.writers[i].id), ("r", graph.readers[j].id))
        for reader, rows in zip(graph.readers, graph.feeds, strict=True):
            for i in rows:
                net.add_edge(("r", reader.id), ("w", graph.writers[i].id))
        fed = nx.descendants(net, ("w", "input")) | {("w", "input")}
        read = nx.ancestors(net, ("r", "logits")) | {("r", "logits")}
        expected = np.zeros_like(edges)
        for i, j in np.argwhere(edges):
            expected[i, j] = ("w", graph.writers[i].id) in fed and (
                "r",
                graph.readers[j].id,
            ) in read
        assert (graph.prune(edges) == expected).all()
        assert expected.sum() < edges.sum()
