"""Edge attribution: its invariants on tiny models, and TransformerLens as an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import oracle
import pytest
import reference
import torch
from checked import wrong_type
from conftest import make_pairs
from transformers import LlamaConfig, LlamaForCausalLM

from mansu_interp.circuits import attribution
from mansu_interp.circuits.ablation import Ablation
from mansu_interp.circuits.attribution import attribute, fit_memory
from mansu_interp.circuits.config import AttributionConfig, CircuitConfig
from mansu_interp.circuits.metrics import METRICS, choice_margin, log_prob, logit_diff
from mansu_interp.circuits.search.discover import discover
from mansu_interp.circuits.search.faithfulness import circuit_metric
from mansu_interp.errors import (
    ArtifactError,
    CircuitError,
    ConfigError,
    ModelError,
    ResourceError,
)
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.pairs import Batch, Pair, PairSet, collate
from mansu_interp.tasks.task import Task
from mansu_interp.utils import tensors

TinyModel = Callable[[int], LanguageModel]
EAP = AttributionConfig(method="eap")
KV = pytest.mark.parametrize("kv_heads", [4, 2])


def small() -> Batch:
    """Two pairs whose answers are tokens 0 and 3."""
    return Batch(
        clean=torch.zeros(2, 1, dtype=torch.long),
        corrupt=torch.zeros(2, 1, dtype=torch.long),
        last=torch.zeros(2, dtype=torch.long),
        corrupt_last=torch.zeros(2, dtype=torch.long),
        answer=torch.tensor([0, 3]),
        counterfactual=torch.tensor([2, 1]),
        choices=torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]]),
    )


def test_metrics_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.0], [1.0, 1.0, 1.0, 4.0]])
    assert logit_diff(logits, small(), logits).tolist() == [3.0, 3.0]
    total = [math.log(math.e**2 + 2 + 1 / math.e), math.log(3 * math.e + math.e**4)]
    expected = [2 - total[0], 4 - total[1]]
    assert log_prob(logits, small(), logits).tolist() == pytest.approx(expected, rel=1e-5)
    expected = [2 - math.log(2 + 1 / math.e), 4 - math.log(3 * math.e)]
    assert choice_margin(logits, small(), logits).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@KV
@pytest.mark.parametrize("metric", METRICS)
def test_input_edges_sum_to_the_whole_effect_as_steps_grow(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int, metric: str
):
    model, gaps = tiny_model(kv_heads), []
    for steps in (2, 64):
        config = AttributionConfig(ig_steps=steps, metric=metric)  # type: ignore[arg-type]
        found = attribute(model, pairs, config=config)
        gaps.append(abs(found.scores[0].sum() - (found.clean - found.corrupt)))
    assert gaps[1] < 0.005 * max(1.0, abs(found.clean - found.corrupt))
    assert gaps[1] < gaps[0]


@KV
def test_equal_prompts_score_nothing(tiny_model: TinyModel, pairs: PairSet, kv_heads: int):
    same = PairSet("same", tuple(replace(p, corrupt=p.clean) for p in pairs))
    found = attribute(tiny_model(kv_heads), same)
    assert not found.scores.any()
    assert found.clean == found.corrupt != 0


@KV
def test_scores_do_not_depend_on_batches_order_or_padding(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    base = attribute(model, pairs, config=AttributionConfig(ig_steps=3, batch_size=1))
    size = np.abs(base.scores).max()
    backwards = PairSet("backwards", pairs.pairs[::-1])
    for other in (pairs, backwards):
        for batch_size in (2, 5):
            config = AttributionConfig(ig_steps=3, batch_size=batch_size)
            found = attribute(model, other, config=config)
            assert np.abs(found.scores - base.scores).max() < 1e-4 * size
            assert found.clean == pytest.approx(base.clean, abs=1e-5)
    # The mean over all pairs, not over batches: here a batch of 4 and one of 1.
    alone = [
        attribute(model, PairSet("one", (p,)), config=AttributionConfig(ig_steps=3)) for p in pairs
    ]
    mean = np.mean([a.scores for a in alone], axis=0)
    found = attribute(model, pairs, config=AttributionConfig(ig_steps=3, batch_size=4))
    assert np.abs(found.scores - mean).max() < 1e-4 * size


def node_scores(model: LanguageModel, pairs: PairSet) -> dict[str, float]:
    """<a(clean) - a(corrupt), d metric / d a> of every writer, without edges: hooks on the
    Hugging Face modules and autograd alone."""
    heads = model.architecture.n_heads
    total: dict[str, float] = {}
    for pair in pairs:
        batch, runs = collate([pair]), []
        for tokens in (batch.clean, batch.corrupt):
            seen: dict[str, torch.Tensor] = {}

            def keep(name: str, value: torch.Tensor, seen: dict = seen) -> torch.Tensor:
                seen[name] = value if value.requires_grad else value.requires_grad_(True)
                return seen[name]

            base = model.hf.base_model
            hooks = [base.embed_tokens.register_forward_hook(lambda m, i, o: keep("input", o))]
            for n, layer in enumerate(base.layers):
                hooks += [
                    layer.self_attn.o_proj.register_forward_pre_hook(
                        lambda m, i, n=n: (keep(f"z{n}", i[0]),)
                    ),
                    layer.mlp.register_forward_hook(lambda m, i, o, n=n: keep(f"m{n}", o)),
                ]
            logits = model.last_logits(tokens, batch.last)
            value = logit_diff(logits, batch, logits).sum()
            for hook in hooks:
                hook.remove()
            slopes = torch.autograd.grad(value, list(seen.values()))
            runs.append((seen, dict(zip(seen, slopes, strict=True))))
        (clean, _), (corrupt, slopes) = runs
        for name in clean:
            product = (clean[name] - corrupt[name]).detach() * slopes[name]
            if name.startswith("z"):
                per_head = product.unflatten(-1, (heads, -1)).sum((0, 1, 3))
                found = {f"a{name[1:]}.h{h}": float(v) for h, v in enumerate(per_head)}
            else:
                found = {name: float(product.sum())}
            for key, v in found.items():
                total[key] = total.get(key, 0.0) + v / len(pairs)
    return total


@KV
def test_outgoing_edges_sum_to_the_node_score(tiny_model: TinyModel, pairs: PairSet, kv_heads: int):
    model = tiny_model(kv_heads)
    expected = node_scores(model, pairs)
    found = attribute(model, pairs, config=EAP).node_scores()
    assert found.keys() == expected.keys()
    size = max(abs(v) for v in expected.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4 * size), name


def test_edges_agree_with_transformer_lens(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    expected = np.mean([oracle.edge_scores(model, p) for p in pairs], axis=0)
    found = attribute(model, pairs, config=EAP).scores
    size = np.abs(expected).max()
    assert size > 0.01
    assert (expected != 0).sum() > 0.9 * model.graph.n_edges
    assert np.abs(found - expected).max() < 1e-4 * size


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_edges_agree_with_the_definition_written_out(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    expected = np.mean([reference.eap(model, p) for p in pairs], axis=0)
    found = attribute(model, pairs, config=EAP).scores
    size = np.abs(expected).max()
    assert (expected[model.graph.exists] != 0).mean() > 0.9
    assert np.abs(found - expected).max() < 1e-4 * size


def hand_model() -> LanguageModel:
    """One layer, one head that attends evenly and copies, no MLP; token t is 2 x unit vector t, so
    that a norm leaves it alone."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    hf = LlamaForCausalLM(config).eval()
    for name, weight in hf.named_parameters():
        if weight.ndim == 2:
            of_size = {"embed": 2.0, "v_proj": 1.0, "o_proj": 1.0, "lm_head": 1.0}
            size = next((v for k, v in of_size.items() if k in name), 0.0)
            weight.data = size * torch.eye(4)
    return LanguageModel("by hand", hf, None)


def hand_pairs() -> PairSet:
    """Clean 0 2, corrupt 1 2; the answer is 0, the counterfactual 1."""
    pair = replace(
        make_pairs((2,)).pairs[0],
        clean=(0, 2),
        corrupt=(1, 2),
        answer=0,
        counterfactual=1,
        distractors=(1, 2, 3),
    )
    return PairSet("hand", (pair,))


def test_a_model_solved_by_hand():
    """The head writes (e0 + e2) / 2, so the stream ends as x = (1, 0, 3, 0), and as (0, 1, 3, 0)
    for the corrupt prompt; both have RMS r = sqrt(10) / 2, and the metric is (x0 - x1) / r.

    At the corrupt end its gradient is g = (1, -1, 0, 0) / r + (0, 1, 3, 0) / 4r^3, and
    head -> logits scores g . (1, -1, 0, 0). Restoring token 0 for 1 moves the norm at e1 = (0, 2,
    0, 0) by (2, 0, 0, 0), of which attention passes half: input -> v scores g . (1, 0, 0, 0).
    """
    model, pairs = hand_model(), hand_pairs()
    r = 10**0.5 / 2
    found = attribute(model, pairs, config=EAP)
    assert (found.clean, found.corrupt) == pytest.approx((1 / r, -1 / r), rel=1e-5)
    expected = {
        ("a0.h0", "logits"): 2 / r - 1 / (4 * r**3),
        ("input", "a0.h0<v>"): 1 / r,
    }
    for i, j in np.argwhere(found.graph.exists):
        edge = found.graph.writers[i].id, found.graph.readers[j].id
        assert found.scores[i, j] == pytest.approx(expected.get(edge, 0.0), abs=1e-5), edge
    # Patched one edge at a time: each of these two carries the whole effect, the others nothing.
    for i, j in np.argwhere(found.graph.exists):
        edge = found.graph.writers[i].id, found.graph.readers[j].id
        rest = found.graph.exists.copy()
        rest[i, j] = False
        left = -1 / r if edge in expected else 1 / r
        assert circuit_metric(model, pairs, rest) == pytest.approx(left, abs=1e-5), edge


def test_positions_sum_to_the_scores_and_lie_where_prompts_differ(
    tiny_model: TinyModel, pairs: PairSet
):
    """With prompts that differ at position 2 only, nothing happens before it."""
    changed = [
        replace(p, corrupt=tuple(c if k != 2 else (c + 1) % 50 for k, c in enumerate(p.clean)))
        for p in pairs
        if len(p.clean) > 3
    ]
    model, found_pairs = tiny_model(2), PairSet("one place", tuple(changed))
    found = attribute(model, found_pairs, config=EAP, positions=True)
    by_position = found.by_position
    assert by_position is not None
    assert by_position.shape == (7, *found.scores.shape)
    assert np.allclose(by_position.sum(0), found.scores, atol=1e-5)
    assert not by_position[:2].any()
    embedding = found.graph.writer_index["input"]
    assert not by_position[3:, embedding].any()  # the embedding differs at position 2 alone
    assert by_position[3:].any()
    # A batch with padding scores each pair at its own positions.
    one = [attribute(model, PairSet("one", (p,)), config=EAP, positions=True) for p in changed]
    expected = np.zeros_like(by_position)
    for single in one:
        assert single.by_position is not None
        expected[: len(single.by_position)] += single.by_position / len(changed)
    assert np.allclose(by_position, expected, atol=1e-4 * np.abs(expected).max())


@KV
def test_neurons_and_head_dimensions_sum_to_their_node(
    tiny_model: TinyModel, pairs: PairSet, kv_heads: int
):
    model = tiny_model(kv_heads)
    found = attribute(model, pairs, config=EAP, neurons=True)
    nodes = found.node_scores()
    assert found.neurons.keys() == nodes.keys() - {"input"}
    assert found.neurons["m1"].shape == (48,)
    assert found.neurons["a1.h2"].shape == (8,)
    size = max(abs(v) for v in nodes.values())
    for name, values in found.neurons.items():
        assert values.sum() == pytest.approx(nodes[name], abs=1e-4 * size), name
        assert np.abs(values).max() > 0


def test_kl_is_zero_at_the_clean_run(tiny_model: TinyModel, pairs: PairSet):
    found = attribute(tiny_model(2), pairs, config=AttributionConfig(metric="kl"))
    assert found.clean == pytest.approx(0.0, abs=1e-6)
    assert found.corrupt < -0.01
    logits = torch.tensor([[0.0, math.log(3.0)]])
    same = torch.tensor([[0.0, 0.0]])
    expected = -(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert METRICS["kl"](logits, small(), same).item() == pytest.approx(expected, rel=1e-5)


def test_memory_decides_the_batch(
    tiny_model: TinyModel, pairs: PairSet, monkeypatch: pytest.MonkeyPatch
):
    model, longest = tiny_model(2), 7
    _, one, layers = fit_memory(model.graph, model.d_model, longest, EAP)
    assert layers == 3
    assert one == pytest.approx((16 + 8 * 9) * 7 * 32 * 4 / 1e9)  # 16 writers, 9 readers a layer
    tight = replace(EAP, memory_gb=2.5 * one, batch_size=5)
    assert fit_memory(model.graph, model.d_model, longest, tight)[0] == 2
    seen: list[int] = []
    a = attribute(model, pairs, config=tight, on_batch=lambda done, _: seen.append(done))
    assert seen == [2, 4, 5]
    assert np.allclose(a.scores, attribute(model, pairs, config=EAP).scores, atol=1e-5)
    monkeypatch.setattr(attribution, "check_exact", lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(CircuitError, match=r"7 tokens needs .* by layers; .* Give"):
        attribute(model, pairs, config=replace(EAP, memory_gb=one / 2))


def test_overflow_is_no_score(tiny_model: TinyModel, pairs: PairSet):
    with pytest.raises(CircuitError, match="some scores are not finite"):
        attribute(
            tiny_model(2),
            pairs,
            config=EAP,
            metric=lambda logits, b, c: logit_diff(logits, b, c) * 1e38 * 1e38,
        )


def test_grouped_keys_are_the_sum_of_their_ungrouped_heads(tiny_model: TinyModel, pairs: PairSet):
    """The same function with the shared k and v rows written out once per query head."""
    grouped, full = tiny_model(2), tiny_model(4).copy()
    with torch.no_grad():
        for name, weight in grouped.weights.items():
            same = weight
            if "k_proj" in name or "v_proj" in name:
                same = weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
            full.weights[name].copy_(same)
    a, b = attribute(grouped, pairs), attribute(full, pairs)
    assert a.clean == pytest.approx(b.clean, abs=1e-5)
    tolerance = 1e-4 * np.abs(b.scores).max()
    for id, column in a.graph.reader_index.items():
        reader = a.graph.readers[column]
        if reader.kind in "kv":
            heads = [f"a{reader.layer}.h{h}<{reader.kind}>" for h in a.graph.reading_heads(reader)]
        else:
            heads = [id]
        theirs = sum(b.scores[:, b.graph.reader_index[h]] for h in heads)
        assert np.abs(a.scores[:, column] - theirs).max() < tolerance, id


def test_eap_takes_its_gradient_where_it_says(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(4)
    clean = attribute(model, pairs, config=AttributionConfig(method="eap", at="clean"))
    swapped = PairSet("swapped", tuple(replace(p, clean=p.corrupt, corrupt=p.clean) for p in pairs))
    back = attribute(model, swapped, config=EAP)
    assert np.allclose(clean.scores, -back.scores, atol=1e-5)
    assert not np.allclose(clean.scores, attribute(model, pairs, config=EAP).scores, atol=1e-3)


def test_own_metric_and_progress(tiny_model: TinyModel, pairs: PairSet):
    seen: list[tuple[int, int]] = []
    double = attribute(
        tiny_model(4),
        pairs,
        config=AttributionConfig(ig_steps=2, batch_size=2),
        metric=lambda logits, batch, clean: 2 * logit_diff(logits, batch, clean),
        on_batch=lambda done, total: seen.append((done, total)),
    )
    single = attribute(tiny_model(4), pairs, config=AttributionConfig(ig_steps=2))
    assert np.allclose(double.scores, 2 * single.scores, atol=1e-5)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_no_score_where_no_edge_exists(tiny_model: TinyModel):
    found = attribute(tiny_model(2), make_pairs((3, 5)), config=EAP)
    assert not found.scores[~found.graph.exists].any()
    assert (found.scores[found.graph.exists] != 0).mean() > 0.9


@pytest.mark.slow
def test_sums_over_many_batches_hardly_round(tiny_model: TinyModel):
    """Against float64 sums of what each pair comes to; float32 ones would be further off."""
    model, pairs = tiny_model(2), PairSet("many", make_pairs().pairs * 20)
    sums = [torch.zeros(model.graph.exists.shape, dtype=t) for t in (torch.float64, torch.float32)]

    def add(_: Sequence[Pair], scores: torch.Tensor) -> None:
        for total in sums:
            total.add_(scores[0])

    found = attribute(model, pairs, config=replace(EAP, batch_size=1), on_pairs=add).scores
    exact, rounded = (total.numpy() / len(pairs) for total in sums)

    def off(scores: np.ndarray) -> float:
        return float(np.abs(scores - exact).max() / np.abs(exact).max())

    assert off(found) < 7e-8 < off(rounded)


@pytest.mark.parametrize("settings", [{"ig_steps": 0}, {"pairs": 0}, {"batch_size": -1}])
def test_settings_out_of_range(settings: dict[str, int]):
    with pytest.raises(ConfigError, match="must be at least 1; got"):
        AttributionConfig(**settings)  # type: ignore[arg-type]


@wrong_type
def test_unknown_method():
    with pytest.raises(ConfigError, match="method: got 'atp', expected 'eap-ig' or 'eap'"):
        AttributionConfig(method="atp")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_a_metric_returns_one_number_a_pair(tiny_model: TinyModel, batch_size: int):
    """A mean over the batch would make the scores depend on the batch size."""

    def mean(logits: Any, batch: Batch, clean: Any) -> Any:
        return logit_diff(logits, batch, clean).mean()

    config = AttributionConfig(method="eap", batch_size=batch_size)
    with pytest.raises(
        CircuitError, match=r"returned \[\] for \d pairs, expected \[\d\]: one number"
    ):
        attribute(tiny_model(4), make_pairs(), config=config, metric=mean)


def test_a_metric_without_a_gradient(tiny_model: TinyModel):
    def fixed(logits: Any, batch: Batch, clean: Any) -> Any:
        return logit_diff(logits, batch, clean).detach()

    with pytest.raises(CircuitError, match="no gradient: compute it from the logits"):
        attribute(tiny_model(4), make_pairs(), config=EAP, metric=fixed)


@wrong_type
def test_a_metric_by_another_name(tiny_model: TinyModel):
    with pytest.raises(CircuitError, match="Unknown metric 'bogus'; expected one of logit_diff, "):
        attribute(tiny_model(4), make_pairs(), metric="bogus")  # type: ignore[arg-type]


def test_an_unknown_metric_of_a_circuit(tiny_model: TinyModel):
    model = tiny_model(4)
    with pytest.raises(CircuitError, match="Unknown metric 'bogus'; expected one of logit_diff, "):
        circuit_metric(model, make_pairs(), model.graph.exists, metric="bogus")


def test_prompts_that_the_model_cannot_take(tiny_model: TinyModel):
    """A token beyond the embedding, in a prompt or an answer; more tokens than positions."""
    model, pair = tiny_model(4), make_pairs((4,))[0]
    beyond = replace(pair, clean=(50, *pair.clean[1:])), replace(pair, distractors=(50,))
    for odd in beyond:
        with pytest.raises(
            ModelError, match=r"Token 50 is not in the embedding of tiny, .* 50 rows"
        ):
            attribute(model, PairSet("odd", (pair, odd)))
    long = make_pairs((65,))
    for call in (attribute, Ablation):
        with pytest.raises(ModelError, match="A prompt has 65 tokens and tiny has 64 positions"):
            call(model, long)
    with pytest.raises(ModelError, match="65 tokens"):
        model.last_logits(torch.ones(1, 65, dtype=torch.long), torch.tensor([64]))
    with pytest.raises(ModelError, match="no tokens"):
        model.last_logits(torch.ones(1, 0, dtype=torch.long), torch.tensor([0]))


# An attribution that was killed goes on where it was.


class Killed(BaseException):
    pass


def kill_at(done: int) -> Callable[..., None]:
    """A callback that ends the loop there."""

    def die(*said: object) -> None:
        if said[-2] == done:
            raise Killed

    return die


def test_an_attribution_makes_no_folder_for_its_sums(tiny_model: TinyModel, tmp_path: Path):
    """One that was removed meanwhile stays away, and is told."""
    with pytest.raises(ResourceError, match="There is no folder"):
        attribute(tiny_model(2), make_pairs(), resume=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("due", [0.0, math.inf])
@pytest.mark.parametrize("more", [{}, {"positions": True, "neurons": True}])
def test_a_killed_attribution_ends_the_same(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    due: float,
    more: dict[str, bool],
):
    """Byte for byte; where nothing was due yet, from the first pair on."""
    monkeypatch.setattr(tensors, "SECONDS", due)
    model, pairs, config = tiny_model(2), make_pairs(), AttributionConfig(ig_steps=2, batch_size=2)
    whole, file, seen = attribute(model, pairs, config=config, **more), tmp_path / "a", []

    def go_on() -> None:
        found = attribute(
            model, pairs, config=config, on_batch=lambda d, _: seen.append(d), resume=file, **more
        )
        assert found.scores.tobytes() == whole.scores.tobytes()
        assert (found.clean, found.corrupt, found.caveat) == (
            whole.clean, whole.corrupt, whole.caveat
        )  # fmt: skip
        if more:
            assert found.by_position.tobytes() == whole.by_position.tobytes()
            assert len(found.neurons) == len(whole.neurons) > 0
            for node, values in whole.neurons.items():
                assert found.neurons[node].tobytes() == values.tobytes()

    with pytest.raises(Killed):
        attribute(model, pairs, config=config, on_batch=kill_at(4), resume=file, **more)
    go_on()
    assert seen == ([5] if due == 0 else [2, 4, 5])
    go_on()  # all is done, and none is run again
    assert len(seen) == (1 if due == 0 else 3)


@pytest.mark.slow
def test_what_waits_must_be_of_this_attribution(tiny_model: TinyModel, tmp_path: Path):
    model, file = tiny_model(2), tmp_path / "sums.safetensors"
    attribute(model, make_pairs(), config=EAP, resume=str(file))
    other = tiny_model(2).copy()
    next(iter(other.weights.values()))[0, 0] += 1
    for differs in (
        {"model": tiny_model(4)},
        {"model": other},
        {"pairs": make_pairs(seed=1)},
        {"config": replace(EAP, at="clean")},
        {"metric": "log_prob"},
        {"positions": True},
    ):
        how = {"model": model, "pairs": make_pairs(), "config": EAP, "resume": file, **differs}
        with pytest.raises(ArtifactError, match="of another model, pairs or settings"):
            attribute(**how)
    smaller, seen = replace(EAP, batch_size=3), []  # as after a run out of memory
    attribute(
        model, make_pairs(), config=smaller, resume=file, on_batch=lambda d, _: seen.append(d)
    )
    assert seen == [3, 5]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"is not a readable checkpoint.*Delete it to begin"):
        attribute(model, make_pairs(), config=EAP, resume=file)


def test_functions_cannot_be_resumed(tiny_model: TinyModel, tmp_path: Path):
    for function in ({"metric": logit_diff}, {"on_pairs": lambda *_: None}):
        with pytest.raises(CircuitError, match="leave out resume, or the function"):
            attribute(tiny_model(2), make_pairs(), resume=tmp_path / "sums", **function)


@pytest.mark.slow
def test_a_killed_discovery_goes_on_and_leaves_nothing(
    facts: LanguageModel, capitals: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The forget pairs are not scored again when it was killed at the retain pairs."""
    monkeypatch.setattr(tensors, "SECONDS", 0.0)
    config = CircuitConfig(method="eap", pairs=6, batch_size=2, faithfulness_pairs=4)
    call = partial(discover, facts, capitals.forget, config=config, retain=capitals.retain)
    whole, seen = call(), []

    def die(stage: str, done: int, _: int) -> None:
        if stage == "attribution of retain pairs" and done == 4:
            raise Killed

    with pytest.raises(Killed):
        call(on_step=die, resume=str(tmp_path))  # a path of any kind
    assert len(list(tmp_path.iterdir())) == 2
    again = call(on_step=lambda stage, done, _: seen.append((stage, done)), resume=tmp_path)
    assert [s for s in seen if s[0].startswith("attribution")] == [
        ("attribution of retain pairs", 6)
    ]
    assert again.edges.tobytes() == whole.edges.tobytes()
    assert again.scores.tobytes() == whole.scores.tobytes() and again.meta == whole.meta
    assert not list(tmp_path.iterdir())
