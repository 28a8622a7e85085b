"""How circuits hold under resampling, caveats of models that hardly do a task, explained heads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_families
import torch
from conftest import SHIPPED, make_pairs
from transformers import GPT2Config, GPT2LMHeadModel

from mansu_interp.circuits.attribution import attribute
from mansu_interp.circuits.circuit import Circuit
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.heads import explain
from mansu_interp.circuits.heads.explain import explain_head, explain_heads
from mansu_interp.circuits.heads.runs import Frozen, HeadRuns
from mansu_interp.circuits.metrics import caveat
from mansu_interp.circuits.scores import Attribution
from mansu_interp.circuits.search.discover import discover
from mansu_interp.circuits.search.faithfulness import strongest
from mansu_interp.circuits.search.stability import Resamples, measure_stability, ranks
from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError, CircuitError
from mansu_interp.models.graph import Architecture, Graph
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import PairSet, collate
from mansu_interp.tasks.task import Task
from mansu_interp.viz.data import GraphData
from mansu_interp.viz.view import View, attribution_view, circuit_view

TinyModel = Callable[[int], LanguageModel]
FEW = CircuitConfig(pairs=5, ig_steps=2, faithfulness_pairs=5, top=60)


def crossed(facts: int, phrasings: int) -> PairSet:
    """Every fact in every phrasing."""
    blank = make_pairs((3,))[0]
    return PairSet(
        "crossed",
        tuple(
            replace(blank, subject=f"s{f}", phrasing=f"p{k}")
            for f in range(facts)
            for k in range(phrasings)
        ),
    )


# ---- resampling ----------------------------------------------------------------------------------


def test_facts_and_phrasings_are_drawn_with_replacement():
    """A pair weighs its fact's times its phrasing's draws; of one phrasing, the fact's alone."""
    both, one = (Resamples(p, 50, 0) for p in (crossed(6, 3), crossed(6, 1)))
    assert (both.drawn, one.drawn) == ("facts and phrasings", "facts")
    weights = both.weights(crossed(6, 3)).reshape(50, 6, 3)
    np.testing.assert_allclose(weights.sum((1, 2)), 1)
    rows, columns = 6 * weights.sum(2), 3 * weights.sum(1)
    np.testing.assert_allclose(weights, rows[:, :, None] * columns[:, None] / 18)
    for counts, n in ((rows, 6), (columns, 3), (6 * one.weights(crossed(6, 1)), 6)):
        assert np.allclose(counts, counts.round()) and np.allclose(counts.sum(1), n)
        assert counts.max() > 1 and counts.min() == 0  # with replacement
    again = Resamples(crossed(6, 3), 50, 0).weights(crossed(6, 3)).reshape(50, 6, 3)
    assert (again == weights).all()
    assert (Resamples(crossed(6, 3), 50, 1).weights(crossed(6, 3)) != weights.reshape(50, -1)).any()


@pytest.mark.slow
@pytest.mark.parametrize(("facts", "phrasings"), [(60, 1), (40, 25)])
def test_the_interval_covers_the_truth(facts: int, phrasings: int):
    """Scores of 400 edges, each with an effect of the fact, of the phrasing, and of the pair: in
    about 95 of 100 cases the true mean lies in the interval."""
    draw, pairs, covered = np.random.default_rng(0), crossed(facts, phrasings), []
    exists = np.ones((1, 400), dtype=bool)
    for seed in range(4):
        truth = draw.normal(size=400)
        of_fact = draw.normal(size=(facts, 1, 400))
        of_phrasing = draw.normal(size=(1, phrasings, 400)) * (phrasings > 1)
        of_pair = 0.5 * draw.normal(size=(facts, phrasings, 400))
        scores = (truth + of_fact + of_phrasing + of_pair).reshape(len(pairs), 1, 400)
        resamples = Resamples(pairs, 200, seed)
        resamples(pairs, torch.from_numpy(scores).float())
        resampled = resamples.means()
        found = measure_stability(
            scores.mean(0), resampled, resampled, exists, exists, lambda s: exists, "facts"
        )
        covered.append((found.low <= truth) & (truth <= found.high))
    assert 0.92 < np.mean(covered) < 0.98


def test_stability_by_hand():
    """Two resamples of five edges, of which the circuit has the two strongest."""
    exists = np.ones((1, 5), dtype=bool)
    scores = np.array([[4.0, -3.0, 2.0, 1.0, 0.5]], dtype=np.float32)
    resampled = np.array([[[4.0, -3.0, 2.0, 1.0, 0.5]], [[4.0, 1.0, 2.0, -3.0, 0.5]]])

    def top_two(ranking: np.ndarray) -> np.ndarray:
        chosen = np.zeros((1, 5), dtype=bool)
        chosen[0, np.argsort(-np.abs(ranking[0]))[:2]] = True
        return chosen

    found = measure_stability(
        scores, resampled, resampled, top_two(scores), exists, top_two, "facts"
    )
    assert found.frequency.tolist() == [[1.0, 0.5, 0.0, 0.5, 0.0]]
    assert found.same_sign.tolist() == [[1.0, 0.5, 1.0, 0.5, 1.0]]
    assert found.jaccard == pytest.approx((1 + 1 / 3) / 2)  # the same two; one of three
    assert found.chance == pytest.approx(0.8 / 3.2)  # 2 x 2 / 5 in common, of 4 less that
    # The first ranks alike; in the second, edges 1 and 3 change places: ranks 4 0 3 2 1, 4 2 3 0 1.
    assert found.rank_correlation == pytest.approx((1 + (1 - 6 * 8 / 120)) / 2)
    assert found.low[0, 1] == pytest.approx(-3 + 0.025 * 4)
    assert found.high[0, 1] == pytest.approx(-3 + 0.975 * 4)
    assert ranks(np.array([2.0, 1.0, 2.0, 0.0])).tolist() == [2.5, 1.0, 2.5, 0.0]


def test_one_pass_gives_what_single_pairs_give(tiny_model: TinyModel, pairs: PairSet):
    """Each resample's scores are the weighted mean of the scores of single pairs, attributed by
    themselves; the scores of all are what they are without resampling."""
    model, config = tiny_model(2), AttributionConfig(ig_steps=2, batch_size=2)
    resamples = Resamples(pairs, 7, 3)
    whole = attribute(model, pairs, config=config, on_pairs=resamples)
    assert (whole.scores == attribute(model, pairs, config=config).scores).all()
    alone = [attribute(model, PairSet("one", (p,)), config=config).scores for p in pairs]
    expected = np.einsum("kp,pwr->kwr", resamples.weights(pairs), np.stack(alone))
    np.testing.assert_allclose(resamples.means(), expected, atol=2e-5 * np.abs(expected).max())
    with pytest.raises(CircuitError, match="No pair was scored"):
        resamples.means()


@pytest.mark.slow
def test_after_removal_resamples_are_compared_with_the_circuit_that_is_left(
    tiny_model: TinyModel, pairs: PairSet
):
    config = CircuitConfig(pairs=12, removal_tries=40, faithfulness=0.6, retain_discount=0.0)
    found = discover(tiny_model(2), pairs, config=config, resamples=20, seed=1)
    assert found.stability and found.meta.irreducible is not None
    # The mean of |A & B| / |A | B|, from above by the mean share of the circuit that is in B.
    assert found.stability.jaccard <= float(found.stability.frequency[found.edges].mean()) + 1e-6
    assert discover(tiny_model(2), pairs, config=config, seed=-1).n_edges  # any seed will do


def test_what_cannot_be_resampled(tiny_model: TinyModel, pairs: PairSet):
    with pytest.raises(CircuitError, match=r"must be 0, or at least 2: .*; got -1\."):
        discover(tiny_model(2), pairs, config=FEW, resamples=-1)
    with pytest.raises(CircuitError, match=r"one resample has no interval; got 1\."):
        discover(tiny_model(2), pairs, config=FEW, resamples=1)
    with pytest.raises(CircuitError, match="at least two resamples"):
        Resamples(pairs, 1, 0)
    same = PairSet("same", tuple(replace(p, subject="one") for p in pairs))
    with pytest.raises(CircuitError, match="two facts; got 3 and 1"):
        discover(tiny_model(2), same, config=FEW, resamples=3)


@pytest.mark.slow
def test_discovery_with_resamples(tiny_model: TinyModel, pairs: PairSet, tmp_path: Path):
    """The circuit is the same; its stability is that of as many edges, and is saved with it."""
    model, retain = tiny_model(2), make_pairs(seed=5)
    plain = discover(model, pairs, config=FEW, retain=retain)
    found = discover(model, pairs, config=FEW, retain=retain, resamples=20)
    assert plain.stability is None and (plain.edges == found.edges).all()
    stable = found.stability
    assert stable is not None and stable.resamples == 20 and stable.drawn == "facts"
    assert 0 < stable.chance < stable.jaccard <= 1 and 0 < stable.rank_correlation < 1
    assert (stable.low <= stable.high).all() and not stable.frequency[~found.graph.exists].any()
    inside = (stable.low <= found.scores) & (found.scores <= stable.high)
    assert inside[found.edges].mean() > 0.9
    assert stable.sentence in repr(found) and "20 resamples of facts: Jaccard" in stable.sentence
    table = found.to_pandas()
    assert list(table) == ["source", "target", "score", "low", "high", "frequency", "same_sign"]
    first = found.graph.edge(table.source[0], table.target[0])
    assert table.frequency[0] == stable.frequency[first] and table.high[0] == stable.high[first]
    assert list(plain.to_pandas()) == ["source", "target", "score"]
    found.save(tmp_path / "c.json")
    back = Circuit.load(tmp_path / "c.json").stability
    assert back is not None and back.told() == stable.told()
    for name in stable.EDGE:
        own, read = getattr(stable, name), getattr(back, name)
        np.testing.assert_allclose(read[found.edges], own[found.edges], rtol=1e-5)
    assert (found | found).stability is None
    assert Circuit.load(SHIPPED / "facts-capitals.json").stability is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["graph"]["stability"].update(resamples="many"), "resamples is 'many'"),
        (lambda d: d["graph"]["stability"].pop("jaccard"), "stability lacks jaccard"),
        (lambda d: d["links"][0].pop("low"), "an edge has no low"),
        (lambda d: d["links"][0].update(frequency=1.5), r"frequency is 1\.5, not a share"),
    ],
)
def test_damaged_stability(
    tiny_model: TinyModel, pairs: PairSet, tmp_path: Path, change: Callable, message: str
):
    discover(tiny_model(2), pairs, config=FEW, resamples=2).save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    data["links"] = [link for link in data["links"] if link["kind"] == "residual"]
    change(data)
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        Circuit.load(tmp_path / "c.json")


def test_a_view_of_a_stable_circuit(tiny_model: TinyModel, pairs: PairSet, tmp_path: Path):
    """Edges fade in pictures, closed groups too; a saved view has the numbers."""
    found = discover(tiny_model(2), pairs, config=FEW, resamples=10)
    assert repr(found.stability).startswith("Stability(resamples 10, drawn facts, jaccard ")
    assert len(repr(found.stability)) < 150 and "<td>resamples" in found.stability._repr_html_()
    view = circuit_view(found)
    assert found.view(limit=3).data == circuit_view(found, limit=3).data != view.data
    often = view.data.edges.frequency
    assert often is not None and view.data.resamples == "10 resamples of facts"
    (source, target), score = view.data.edge_ids()[0], view.data.edges.scores[0][0]
    line = f"{source} -> {target}".replace(">", "&gt;").replace("<", "&lt;")
    text = view.svg()
    assert "Opacity: share of 10 resamples of facts whose circuit has the edge." in text
    own = text[text.index(line) :].split("</g>")[0]
    assert f"in {often[0]:.0%} of resamples" in own and f"{score:+.4g}" in own
    assert f'opacity="{0.12 + 0.83 * often[0]:.2f}"' in own
    view.to_json(tmp_path / "view.json")
    assert View.from_json(tmp_path / "view.json").data == view.data
    groups = {"groups": {"low": ["m0", "a0.h0"]}, "closed": ["low"]}
    closed = View(replace(view.data, state=groups)).svg()
    assert "⊞ low" in closed and "of resamples" in closed
    plain = circuit_view(replace(found, stability=None))
    assert "resamples" not in plain.svg() and "frequency" not in plain.data.to_json()["edges"]
    data = view.data.to_json()
    for change, message in (
        ({"frequency": [2.0] * len(often)}, "no share from 0 to 1"),
        ({"low": [0.0]}, "has a column of 1 entries"),
    ):
        with pytest.raises(ArtifactError, match=message):
            GraphData.from_json({**data, "edges": {**data["edges"], **change}})
    with pytest.raises(ArtifactError, match="must come together"):
        GraphData.from_json({**data, "resamples": ""})


# ---- caveats -------------------------------------------------------------------------------------


def test_caveats_by_hand():
    """Sums by fact: clean, corrupt, ranked first, pairs. Gaps 3, 1, 2: 2 +- 1.96 / sqrt(3)."""
    ends = torch.tensor([[3.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], [2.0, 0.0, 0.0, 1.0]])
    assert caveat(ends) == ""
    assert 1.96 / math.sqrt(3) == pytest.approx(1.13, abs=0.01)
    ends[:, 1] = 0.9  # now 1.1 +- 1.13
    assert caveat(ends) == (
        "the metric is 2 on clean prompts and 0.9 on corrupt ones, 1.1 ± 1.1 apart: no gap that "
        "these pairs can tell from none"
    )
    ends[:, 1:3] = torch.tensor([0.0, 0.0])
    assert caveat(ends) == "the model ranks the answer first on 0 of 3 pairs"
    twice = torch.tensor([[6.0, 0.0, 2.0, 2.0], [2.0, 0.0, 2.0, 2.0], [4.0, 3.4, 0.0, 2.0]])
    half = 1.96 * math.sqrt(sum((x - 8.6 / 3) ** 2 for x in (6.0, 2.0, 0.6)) * 1.5) / 6
    assert half > 8.6 / 6 and "no gap" in caveat(twice)  # pairs of a fact are no further evidence


def test_a_model_that_hardly_does_the_task_is_said_so(
    tiny_model: TinyModel, pairs: PairSet, facts: LanguageModel, capitals: Task, tmp_path: Path
):
    found = discover(tiny_model(2), pairs, config=FEW)
    assert "the model ranks the answer first on 0 of 5 pairs" in found.meta.caveat
    assert found.meta.caveat in repr(found) and found.meta.caveat in found._repr_html_()
    assert found.meta.caveat in circuit_view(found).data.facts
    scores = attribute(tiny_model(2), pairs)
    assert scores.caveat in repr(scores) and scores.caveat in attribution_view(scores).data.facts
    scores.save(tmp_path / "s.safetensors")
    assert Attribution.load(tmp_path / "s.safetensors").caveat == scores.caveat != ""
    assert attribute(facts, capitals.forget.sample(8, 0)).caveat == ""


# ---- heads ---------------------------------------------------------------------------------------

VOCAB = PLACES = 16
SHARP = 30.0


def built() -> LanguageModel:
    """A GPT-2 of one layer by hand. The first half of the stream has the token, the second its
    place. Head 0 looks at the token before; head 1 looks at all alike and copies their tokens."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=PLACES, n_embd=32, n_layer=1, n_head=2, n_inner=4,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    hf: Any = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.zero_()
        for norm in (hf.transformer.h[0].ln_1, hf.transformer.h[0].ln_2, hf.transformer.ln_f):
            norm.weight.fill_(1.0)
        hf.transformer.wte.weight[:, :VOCAB] = torch.eye(VOCAB)
        hf.transformer.wpe.weight[:, VOCAB:] = torch.eye(PLACES)
        qkv, out = hf.transformer.h[0].attn.c_attn.weight, hf.transformer.h[0].attn.c_proj.weight
        for place in range(PLACES):
            qkv[VOCAB + place, max(place - 1, 0)] += SHARP  # head 0 asks for the place before,
            qkv[VOCAB + place, 32 + place] = 1.0  # which the keys are
            qkv[place, 64 + 16 + place] = 1.0  # head 1 takes the token,
            out[16 + place, place] = 1.0  # and writes it
    return LanguageModel("built", hf, None)


def prompts(answers_inside: bool) -> PairSet:
    """The answer is the second of four tokens, or none of them."""
    blank, out = make_pairs((4,))[0], []
    for k in range(6):
        clean = (1, 2 + k, 9, 10)
        out.append(
            replace(
                blank,
                clean=clean,
                corrupt=(1, 3 + k, 9, 10),
                answer=2 + k if answers_inside else 12,
                counterfactual=14,
                distractors=(13, 15),
                subject=f"s{k}",
            )
        )
    return PairSet("built", tuple(out))


@pytest.fixture
def few_random_heads(monkeypatch: pytest.MonkeyPatch):
    """Twenty instead of two hundred, each of which is another run of a model of two heads."""
    monkeypatch.setattr(explain, "RANDOM", 20)


@pytest.mark.usefixtures("few_random_heads")
def test_heads_that_were_built_by_hand():
    """One looks at the token before because of places, the other copies; neither does the other."""
    before, copy = explain_heads(built(), prompts(True), ["a0.h1", "a0.h0"])
    assert (before.head, copy.head) == ("a0.h0", "a0.h1")
    assert before.roles == ("previous-token 1.00",) and before.looks_at == "previous"
    assert before.attention == pytest.approx(
        {"subject": 0, "self": 0, "first": 0, "previous": 1, "relation": 0}, abs=1e-3
    )
    assert before.keys[0] == ("input", pytest.approx(before.logit, rel=1e-4))
    assert before.query[0] == ("input", pytest.approx(before.logit, rel=1e-4))
    assert before.effect == pytest.approx(0, abs=1e-6)
    assert copy.roles[0] == "copying 1.00" and copy.scores["previous-token"] < 0.5
    assert copy.attention == pytest.approx(
        {"subject": 0.25, "self": 0.25, "first": 0.25, "previous": 0.25, "relation": 0}
    )
    assert copy.effect > 0 and copy.logit == pytest.approx(0, abs=1e-5)
    # Tokens 1, 9 and 10 stand in every prompt, the answers in one each.
    assert {token for token, _ in copy.raises[:3]} == {"1", "9", "10"}
    assert copy.lowers[0][1] < 0 < copy.raises[0][1]
    table = explain_heads(built(), prompts(True), ["a0.h1"])
    assert "copying 1.00" in repr(table) and "copying 1.00" in table._repr_html_()
    assert table.to_pandas().copying[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.usefixtures("few_random_heads")
def test_a_head_that_moves_the_answer():
    """Turned to look at the second token alone, the copying head is a name-mover; without the
    answer in the prompt it moves nothing."""
    model = built()
    with torch.no_grad():  # every query of head 1 asks for what the key of place 1 has
        model.weights["transformer.h.0.attn.c_attn.bias"][16] = SHARP
        model.weights["transformer.h.0.attn.c_attn.weight"][32 + 16, VOCAB + 1] = 1.0
    mover = explain_head(model, prompts(True), "a0.h1")
    assert mover.scores["name-mover"] == 1 and "name-mover 1.00" in mover.roles
    assert mover.looks_at == "subject" and mover.attention["subject"] > 0.9
    other = explain_head(model, prompts(False), "a0.h1")
    assert other.scores["answer-mover"] == 0 and not any("mover" in r for r in other.roles)


@pytest.mark.parametrize("family", ["llama gqa", "qwen3", "gemma3", "gpt2", "gpt-neox", "olmo2"])
def test_the_logit_is_the_sum_of_its_parts(family: str):
    """By writer of the keys, and by writer of the query: rotary, grouped, with norms behind the
    projections, and parallel. Biases, which belong to no writer, are taken out first."""
    model, pairs = test_families.make(family).copy(), make_pairs((5, 4, 6))
    with torch.no_grad():
        for name, weight in model.weights.items():
            if name.endswith("bias"):
                weight.zero_()
    heads, batch = HeadRuns(model), collate(list(pairs))
    run = heads.run(batch.clean, grad=True)
    writes = heads.all_writes(run)
    for layer in range(3):
        for h in range(4):
            before = writes[: heads.stream.graph.writers_before(layer)]
            logit, n, parts = explain._why(heads, run, batch, (layer, h), batch.real, before)
            pattern = heads.attention(run)[layer * 4 + h]
            own = 0.0
            for row, last in enumerate(batch.last.tolist()):
                log = pattern[row, last, : last + 1].log()
                own += float(log.max() - log.mean())
            assert n == 3 and logit == pytest.approx(own, rel=1e-4)
            for part in parts:
                assert float(part.sum()) == pytest.approx(own, rel=1e-3, abs=1e-4)


def test_the_logit_of_a_peaked_head():
    """Where the softmax leaves nothing of the other tokens: logits grow with the query, and so do
    their parts."""
    told = []
    for factor in (1.0, 1000.0):
        model, batch = test_families.make("llama gqa").copy(), collate(list(make_pairs((5, 4, 6))))
        model.weights["model.layers.0.self_attn.q_proj.weight"].mul_(factor)
        heads = HeadRuns(model)
        run = heads.run(batch.clean, grad=True)
        writes = heads.all_writes(run)[: heads.stream.graph.writers_before(0)]
        logit, _, parts = explain._why(heads, run, batch, (0, 1), batch.real, writes)
        told.append([logit, *(float(part.sum()) for part in parts)])
    pattern = heads.attention(run)[1]
    assert any((pattern[k, last, : last + 1] == 0).any() for k, last in enumerate(batch.last))
    assert told[1] == pytest.approx([1000 * x for x in told[0]], rel=1e-3)


def test_roles_of_tokens_and_frozen_norms():
    batch = collate(list(prompts(True))[:1])
    roles = dict(zip(explain.ROLES, explain._tokens_by_role(batch)[:, 0].tolist(), strict=True))
    assert roles["subject"] == [False, True, False, False] and roles["self"][3]
    assert roles["first"][0] and roles["previous"][2] and not any(roles["relation"])
    x, a = torch.randn(3, 8), torch.randn(3, 8)
    norm = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    frozen = Frozen(norm, x)
    assert torch.allclose(frozen.apply(x) + norm.bias, norm(x), atol=1e-4)
    y = torch.randn(3, 8)
    assert torch.allclose((frozen.apply(a) * y).sum(), (a * frozen.back(y)).sum(), atol=1e-4)
    with pytest.raises(CircuitError, match="neither a LayerNorm nor an RMSNorm"):
        Frozen(torch.tanh, 3 * x)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama gqa", "gemma2", "gpt-neox", "phi", "bloom"])
def test_heads_of_other_families(family: str):
    """Attention adds up to 1; random weights are none of the heads' names but by accident."""
    found = explain_heads(test_families.make(family), make_pairs((5, 4, 6)), ["a0.h0", "a2.h3"])
    for head in found:
        assert sum(head.attention.values()) == pytest.approx(1, abs=1e-4)
        assert all(-1 <= s <= 1 for s in head.scores.values())
        assert len(head.keys) == len(head.query) == (1 if head.head == "a0.h0" else 3)


def test_heads_of_a_circuit(facts: LanguageModel, capitals: Task, tmp_path: Path):
    """From the discovered pairs, for the view; bad heads and missing pairs are told."""
    some = capitals.forget.sample(4, 0)
    config = CircuitConfig(pairs=4, ig_steps=1, faithfulness_pairs=4, top=8)
    found = discover(facts, some, config=config)
    heads = found.explain(facts)
    own = {n.id for n, writes in found.components() if writes and n.kind == "head"}
    assert {h.head for h in heads} == own and len(heads) == len(own) > 0
    first = next(iter(heads))
    assert heads[first.head] is first and first.looks_at in repr(first)
    view = circuit_view(found, model=facts, heads=heads)
    view.to_json(tmp_path / "view.json")
    again = View.from_json(tmp_path / "view.json").data.heads
    assert again[first.head]["looks_at"] == first.looks_at and again == view.data.heads
    data: dict[str, Any] = view.data.to_json()
    with pytest.raises(ArtifactError, match="looks_at is 3"):
        GraphData.from_json({**data, "heads": {"a0.h0": {**again[first.head], "looks_at": 3}}})
    with pytest.raises(
        CircuitError, match=r"'a9\.h0' is no head of facts; heads are called a0\.h0"
    ):
        explain_head(facts, some, "a9.h0")
    with pytest.raises(CircuitError, match=r"does not hold the pairs .* give pairs="):
        replace(found, pairs=None).explain(facts)
    with pytest.raises(CircuitError, match="was not explained"):
        heads["m0"]
    graph = Graph(Architecture(1, 2, 2))
    with pytest.raises(CircuitError, match="The circuit is of"):
        Circuit(graph, graph.exists * 1.0, strongest(graph, graph.exists * 1.0, 9)).explain(facts)


@pytest.mark.slow
def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Stability and heads in the terminal, in JSON and on the page; attribute says the caveat."""
    asked = "<bos>the capital of {} is"
    rows = [("Malta", "Rwanda", "Valletta", "Kigali"), ("Ghana", "Kenya", "Accra", "Nairobi")]
    names = ("clean", "corrupt", "answer", "wrong")
    known, unknown = tmp_path / "known.jsonl", tmp_path / "unknown.jsonl"
    for file, odd in ((known, None), (unknown, "Baku")):
        lines = [(asked.format(s), asked.format(o), odd or a, w) for s, o, a, w in rows]
        file.write_text("\n".join(json.dumps(dict(zip(names, x, strict=True))) for x in lines))
    words = ["discover", "--pairs", str(known), "--resamples", "5", "--explain"]
    words += ["--circuit.ig-steps", "1"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "Stability over 5 resamples of facts: Jaccard" in told
    assert "% of resamples" in told and "looks at" in told
    assert "5 resamples of facts" in (tmp_path / "a" / "circuit.html").read_text()
    assert main([*words, "--out", str(tmp_path / "b"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["stability"]["resamples"] == 5 and data["heads"]
    assert data["strongest"][0]["low"] <= data["strongest"][0]["high"]
    out = ["--out", str(tmp_path / "s.safetensors")]
    assert main(["attribute", "--pairs", str(unknown), *out]) == 0
    assert "The model ranks the answer first on 0 of 2 pairs." in capsys.readouterr().out
    assert main([*words[:3], "--resamples", "-1", "--out", str(tmp_path / "c")]) != 0
