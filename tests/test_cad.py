"""CAD: its evidence and its verdict, by hand and on models whose past is known."""

from __future__ import annotations

import json
import math
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checked import wrong_type
from zoo_edits import permuted_rows, reordered, rotated

from mansu_interp.audit import linearized as module
from mansu_interp.audit import relearning, suite
from mansu_interp.audit.attacks import ARMS, Given, attack_once, few_shot, noisy, rates_of, why_not
from mansu_interp.audit.cad import judge_erasure
from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.known import Asked, beyond_chance
from mansu_interp.audit.linearized import (
    few_prompts,
    linearized_relearning,
    moved_names,
    tangent_kernel,
)
from mansu_interp.audit.probes import (
    answer_scores,
    check_alike,
    depth_score,
    last_logits,
    model_divergence,
    patched_log_probs,
    probe,
    probe_scores,
    ranked,
    ranked_only,
    stages,
    states,
    stitches,
)
from mansu_interp.audit.relearning import (
    ERASED_LEVEL,
    Point,
    Relearning,
    RelearningMeta,
    batches,
    fine_tune_low_rank,
    halves,
    is_erased,
    of_subjects,
    relearn,
    rivals_within,
    scored_halves,
)
from mansu_interp.audit.suite import AttackResults, Suite, attack_suite
from mansu_interp.audit.verdict import (
    SIGNS,
    Evidence,
    Found,
    decide,
    interval,
    most_telling,
    number,
    resampled,
    settle,
)
from mansu_interp.bench.workers import engine
from mansu_interp.cli.commands import attack_lines
from mansu_interp.errors import ArtifactError, ConfigError, ModelError, TaskError
from mansu_interp.losses import descent
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.losses.advantage import answer_advantage, gradient_transfer, model_advantage
from mansu_interp.losses.answers import nll
from mansu_interp.losses.counterfactual import CounterfactualTargets
from mansu_interp.masks.components import subject_tokens
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.tasks.pairs import Pair, PairSet, answer_tokens, collate
from mansu_interp.tasks.task import Statements, Task
from mansu_interp.unlearning.mansu import adversarial
from mansu_interp.unlearning.mansu.adversarial import AdversarialRelearning, ranking_loss
from mansu_interp.unlearning.methods import Mansu

TinyModel = Callable[[int], LanguageModel]


@pytest.fixture(scope="module")
def split(capitals: Task) -> tuple[PairSet, PairSet]:
    first, second = halves(capitals.forget, 0)
    a, b = (rivals_within(of_subjects(capitals.forget, h)) for h in (first, second))
    return a, b.sample(90, 0)


def test_a_model_stitched_to_itself_is_itself(tiny_model: TinyModel, pairs: PairSet):
    model = tiny_model(2)
    assert stitches(model, model, pairs) == [accuracy(model, pairs).choice] * 4


def test_stitches_take_the_right_end(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    """With its unembedding gone, a model's states still answer in the original, not vice versa."""
    mute = facts.copy()
    mute.weights["lm_head.weight"].zero_()
    assert stitches(mute, facts, split[1]) == [1.0] * 5
    assert stitches(facts, mute, split[1]) == [0.0] * 5  # a tie counts against the model
    assert stitches(mute, facts, split[1], since=-1) == [1.0]


def test_stitching_computes_no_block_twice(tiny_model: TinyModel, pairs: PairSet):
    """Blocks before a cut are not run again, and are themselves afterwards."""
    model, runs = tiny_model(2).copy(), [0, 0, 0]
    for k, block in enumerate(stages(model)[:-1]):

        def count(*_: object, k: int = k) -> None:
            runs[k] += 1

        block.mlp.register_forward_hook(count)
    stitches(tiny_model(2), model, pairs)
    assert runs == [1, 2, 3]
    assert not any("forward" in vars(block) for block in stages(model))


def test_few_prompts_are_of_short_phrasings(pairs: PairSet):
    def of(phrasing: str, length: int) -> list[Pair]:
        made = [replace(p, clean=(1,) * length, corrupt=(2,) * length) for p in pairs]
        return [replace(p, phrasing=phrasing) for p in made]

    some = PairSet("forget", (*of("long", 40), *of("short", 6), *of("middle", 12)))
    assert {p.phrasing for p in few_prompts(some, 8, 0)} == {"short", "middle"}
    assert len(few_prompts(some, 8, 0)) == 8
    alone = PairSet("forget", tuple(of("long", 40)))
    assert set(few_prompts(alone, 99, 0)) == set(alone)


def test_only_what_a_model_knows_is_retained(facts: LanguageModel, capitals: Task):
    right = ranked_only(facts, capitals.forget.sample(60, 0))
    assert len(right) == 60 and all(ranked(facts, right)[0])
    never = load_model("facts-capitals-reference-0")
    few = ranked_only(never, rivals_within(capitals.forget).sample(60, 0))
    assert 0 < len(few) < 40 and all(ranked(never, few)[0])


def test_the_depth_score_by_hand():
    """Two prompts and three blocks. The first block costs nothing and counts for none; of what the
    never-taught states cost, the edited model's show some, at most all, at least nothing."""
    full = torch.tensor([-1.0, -2.0])
    never = torch.tensor([[-1.0, -2.04], [-3.0, -6.0], [-5.0, -2.0]])
    edited = torch.tensor([[-9.0, -9.0], [-2.0, -8.0], [-0.5, -7.0]])
    # First prompt: 1 of 2 nats, 0 of 4; second: 4 of 4 nats in the one block that counts.
    assert depth_score(full, never, edited) == pytest.approx((1 / 6 + 1) / 2)
    assert depth_score(full, never, never) == 1
    assert depth_score(full, never, full.expand(3, 2)) == 0
    assert math.isnan(depth_score(full, full.expand(3, 2), edited))


def test_patched_states_change_the_last_token_alone(
    facts: LanguageModel, split: tuple[PairSet, PairSet]
):
    pairs = split[1].sample(20, 0)
    own = patched_log_probs(facts, facts, pairs)
    logp = -torch.cat([nll(facts, part) for part in pairs.parts(48)])
    assert own.shape == (4, 20) and torch.allclose(own, logp.expand(4, -1), atol=1e-4)
    # After the first block of a model that knows nothing, the subject's own states still answer.
    never = load_model("facts-capitals-reference-0")
    lost = logp - patched_log_probs(never, facts, pairs)
    assert lost[0].mean() < lost[3].mean() and lost[3].min() > 1


def test_states_are_those_of_transformers(tiny_model: TinyModel, pairs: PairSet):
    model, batch = tiny_model(2), collate(pairs.pairs)
    want = model.hf.base_model(input_ids=batch.clean, output_hidden_states=True).hidden_states
    got = states(model, batch)
    assert len(got) == 4
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.allclose(model.hf.base_model.norm(got[3]), want[3])


def test_the_probe_reads_what_was_taught(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    read = probe(facts, *split).float().mean(1)
    assert read[0] < 0.4  # the last token's embedding is the same in every prompt of a phrasing
    assert read[1:].min() > 0.95
    never = load_model("facts-capitals-reference-1")
    assert probe(never, *split).float().mean(1).max() < 0.4


def test_transfer_is_a_cosine_and_advantages_are_bounded(
    facts: LanguageModel, split: tuple[PairSet, PairSet]
):
    half_a, half_b = (s.sample(12, 0) for s in split)
    found = gradient_transfer(facts, half_a, half_b)
    assert sum(found.by_weight.values()) == pytest.approx(found.transfer)
    assert gradient_transfer(facts, half_a, half_a).transfer == pytest.approx(1)
    assert gradient_transfer(facts, half_b, half_a).transfer == pytest.approx(found.transfer)
    among = {"capital": torch.tensor(sorted({p.answer for p in half_b}))}
    with torch.no_grad():
        level = model_advantage(facts, half_b.pairs, among)
    assert level.max() <= torch.tensor(12.0).log() + 1e-4  # certain of one answer in 12
    assert all(not w.requires_grad for w in facts.weights.values())


GONE = Evidence(
    predicted=0.28,
    relearned=0.3,
    half_a=1.0,
    ranked_last=0.3,
    probed=0.3,
    stitched=0.3,
    retained=0.28,
    subject=0.3,
    intact=0.0,
    hidden=0.05,
    outright=0.01,
    original=1.0,
    original_outright=1.0,
    divergence=2.0,
)
"""A model that gives nothing away, by every sign."""
WHOLE = {"predicted": 0.97, "relearned": 1.0, "probed": 1.0, "outright": 0.95, "stitched": 1.0}


@pytest.mark.parametrize(
    ("verdict", "changed"),
    [
        ("unchanged", WHOLE),
        ("relocated", {**WHOLE, "stitched": 0.3}),
        ("unchanged", {**WHOLE, "stitched": 0.3, "divergence": 0.001}),  # a rotated basis
        ("suppressed", {**WHOLE, "outright": 0.0}),  # it refuses
        ("suppressed", {"relearned": 0.9}),
        ("suppressed", {"retained": 0.5}),
        ("suppressed", {"probed": 0.8}),  # only a probe finds it
        ("suppressed", {"subject": 0.85}),
        ("suppressed", {"stitched": 1.0}),  # only the output does not show it
        ("suppressed", {"intact": 0.2}),  # the mean hides a fifth that is intact
        ("suppressed", {"hidden": 0.3}),
        ("undecided", {"intact": 0.1}),
        ("undecided", {"hidden": 0.16}),
        ("erased", {"probed": 0.5, "quantized": 0.3}),
        ("undecided", {"probed": 0.6}),
        ("undecided", {"subject": 0.65}),
        ("undecided", {"stitched": 0.7}),
        ("undecided", {"retained": 0.42}),
        ("recovered", {"quantized": 0.5}),
        ("suppressed", {"ranked_last": 0.5}),  # given away by ranking last
        ("undecided", {"ranked_last": 0.43}),
        ("undecided", {"relearned": 0.43}),
        ("undecided", {"half_a": 0.6}),  # half A was not relearned
        ("undecided", {"predicted": 0.43}),
        ("suppressed", {"predicted": 0.6}),  # it still answers
        ("erased", {"predicted": 0.15, "quantized": 0.3}),  # a rise to chance brings nothing back
    ],
)
def test_verdicts(verdict: str, changed: dict[str, float]):
    evidence = replace(GONE, **changed)
    found, reason = decide(evidence)
    assert found == verdict
    assert reason.endswith(".") and reason[0].islower()
    cad = number(found, evidence)
    assert cad >= 0.8 if found == "erased" else cad <= 0.8 if found == "undecided" else cad < 0.74


def test_every_sign_is_open_between_its_levels():
    """Each alone can prevent "erased", and each alone can prove the knowledge."""
    assert set(SIGNS) < set(Evidence.__dataclass_fields__)
    for name, level in SIGNS.items():
        assert level.chance < level.gone < level.there
        assert decide(replace(GONE, **{name: level.gone}))[0] == "erased"
        assert decide(replace(GONE, **{name: (level.gone + level.there) / 2}))[0] == "undecided"
        assert decide(replace(GONE, **{name: level.there})) == ("suppressed", level.says)


@pytest.mark.parametrize("key", ["predicted", "relearned", "ranked_last", "retained"])
def test_cad_calls_erased_what_the_attack_calls_erased(key: str):
    assert decide(replace(GONE, **{key: ERASED_LEVEL}))[0] == "erased"
    assert decide(replace(GONE, **{key: ERASED_LEVEL + 0.01}))[0] == "undecided"


def test_a_verdict_that_most_resamplings_do_not_share_is_undecided():
    assert settle("erased", "gone.", 0.5) == ("erased", "gone.", 0.5)
    word, reason, confidence = settle("erased", "gone.", 0.46)
    assert (word, confidence) == ("undecided", 0.54) and reason.endswith("do not give erased.")
    assert settle("undecided", "some.", 0.3) == ("undecided", "some.", 0.3)


def test_verdict_and_number_agree_whatever_was_found():
    """On random evidence, also of originals that know only some of the facts."""
    rng = random.Random(0)
    fields = list(Evidence.__dataclass_fields__)
    seen: set[str] = set()
    for _ in range(4_000):
        marks = [0.0, 0.0, 0.05, 0.25, 0.25, 0.25, 0.4, 0.45, 0.7, 0.75, 0.95, 1.0, rng.random()]
        shares = {name: rng.choice(marks) for name in fields if rng.random() < 0.5}
        shares["original"] = max(0.3, shares.get("original", 1.0))
        evidence = replace(GONE, **shares)
        verdict, _ = decide(evidence)
        seen.add(verdict)
        cad = number(verdict, evidence)
        low, high = {"erased": (0.8, 1.0), "undecided": (0.733, 0.8)}.get(verdict, (0.0, 0.734))
        assert low - 1e-9 <= cad <= high + 1e-9, (verdict, cad, evidence)
    assert seen == {"unchanged", "suppressed", "erased", "relocated", "recovered", "undecided"}


def test_the_number_by_hand():
    """Without a clamp: halfway from PRESENT to the original's share is halfway from 0.267 to 1."""
    nothing = {name: level.chance for name, level in SIGNS.items()}
    assert number("erased", replace(GONE, **nothing)) == 1.0
    half = replace(GONE, relearned=(0.45 + 0.85) / 2, original=0.85)
    assert number("suppressed", half) == pytest.approx(1 - (0.2 / 0.75 + 1) / 2)
    assert number("unchanged", replace(GONE, predicted=0.85, original=0.85)) == 0.0
    assert number("suppressed", replace(GONE, probed=0.7)) == pytest.approx(1 - 0.2 / 0.75)
    assert number("erased", replace(GONE, probed=0.55)) == pytest.approx(0.8)
    assert number("erased", replace(GONE, **{**nothing, "hidden": 0.06})) == pytest.approx(0.9)


def test_the_most_telling_sign_is_the_one_that_cad_comes_from():
    read = "answers that the original's unembedding finds in the last states: 0.60 (gone up to 0.65"
    assert most_telling(replace(GONE, stitched=0.6)).startswith(read)
    back = most_telling(replace(GONE, stitched=0.6, relearned=0.5))
    assert back.endswith("relearning of half A: 0.50 (gone up to 0.40, there from 0.45)")


def test_the_interval_of_cad_is_that_of_resampled_facts():
    """Wide where few facts differ, none where all are alike; the number itself is within."""

    class Shares(Found):
        """Facts that differ in one sign alone."""

        def __init__(self, shares: torch.Tensor):
            self.__dict__ |= {"asked": SimpleNamespace(facts=list(shares)), "shares": shares}

        def evidence(self, rows: torch.Tensor) -> Evidence:
            return replace(GONE, relearned=float(self.__dict__["shares"][rows].mean()))

    def ends(shares: torch.Tensor, seed: int = 0) -> list[float]:
        cad = number("suppressed", replace(GONE, relearned=float(shares.mean())))
        return interval(cad, [value for _, value in resampled(Shares(shares), seed)])

    few, many = torch.tensor([0.0, 1.0]).repeat(8), torch.tensor([0.0, 1.0]).repeat(80)
    assert ends(few) == ends(few) != ends(few, 1)
    assert ends(few)[1] - ends(few)[0] > 2 * (ends(many)[1] - ends(many)[0]) > 0
    alike = ends(torch.full((9,), 0.7))
    assert alike[0] == pytest.approx(alike[1])
    words = {word for word, _ in resampled(Shares(few), 0)}
    assert {"suppressed", "erased"} <= words
    assert interval(0.1, [0.5, 0.9]) == [0.1, pytest.approx(0.89)]


@pytest.mark.parametrize(("outright", "said"), [(0.75, "predicts fewer"), (0.1, "hardly predicts")])
def test_how_little_is_predicted_is_told(outright: float, said: str):
    word, reason = decide(replace(GONE, **{**WHOLE, "outright": outright}))
    assert word == "suppressed" and said in reason


def test_what_is_no_model_is_told(facts: LanguageModel, capitals: Task):
    """A model of another library can be called, too."""
    with pytest.raises(ModelError, match="has no tokenizer"):
        judge_erasure(facts.hf, facts, capitals)  # type: ignore[arg-type]
    for made in ("facts", None):
        with pytest.raises(ModelError, match=r"original\(\) returns: got .*LanguageModel"):
            judge_erasure(lambda made=made: made, facts, capitals)  # type: ignore[arg-type]


def test_an_original_that_never_knew_is_refused_before_any_work(
    facts: LanguageModel, capitals: Task
):
    never, stages = load_model("facts-capitals-reference-0"), list[str]()
    with pytest.raises(TaskError, match="does not know what task 'capitals' is to forget"):
        judge_erasure(never, facts, capitals, on_step=lambda stage, *_: stages.append(stage))
    assert stages == ["what the original knows"]


@pytest.mark.slow
def test_an_original_that_is_loaded_for_it_is_let_go(facts: LanguageModel, capitals: Task):
    edited, made, held = facts.copy(), list[weakref.ref[LanguageModel]](), dict[str, bool]()
    edited.weights[edited.linear_names[9]].mul_(0.5)

    def load() -> LanguageModel:
        original = facts.copy()
        made.append(weakref.ref(original))
        return original

    def note(stage: str, *_: int) -> None:
        held[stage] = made[0]() is not None

    found = judge_erasure(load, edited, capitals, on_step=note)
    assert len(made) == 1
    assert held["asking the models"] and not held["probing states"]
    assert found == judge_erasure(facts, edited, capitals)


@pytest.mark.slow
def test_copies_are_unchanged_and_reference_models_erased(facts: LanguageModel, capitals: Task):
    same = judge_erasure(facts, facts.copy(), capitals)
    assert (same.verdict, same.cad, same.confidence) == ("unchanged", 0.0, 1.0)
    assert same.interval == [0.0, 0.0] and same.range == "0.00 (0.00 to 0.00)"
    for name in capitals.reference_models:  # from the same initial weights, and from others
        never = judge_erasure(facts, load_model(name), capitals)
        assert never.verdict == "erased"
        assert never.cad > 0.85
        assert 0.7 < never.interval[0] <= never.cad <= never.interval[1] <= 1.0
    mute = facts.copy()
    mute.weights["lm_head.weight"].zero_()
    hidden = judge_erasure(facts, mute, capitals)
    assert hidden.verdict == "suppressed"
    assert "It damages 5 of 5 retained relations: top-1 of" in hidden.sentence
    lines = hidden.lines()
    assert lines[0].startswith("suppressed") and lines[1] == hidden.sentence
    assert len(hidden.half_b) == len(hidden.half_a) == len(hidden.ranked_last) - 1 <= module.STEPS
    assert f"{hidden.half_b[-1]:.2f}" in next(x for x in lines if "answer first" in x)
    read, head = (next(x for x in lines if x.startswith(n)) for n in ("edited, last", " " * 40))
    assert len(read) == len(head)  # in the column of the last block
    assert hidden.to_json()["probed"]["edited"] == hidden.probed["edited"]


@torch.no_grad()
def redrawn(facts: LanguageModel, task: Task, stay: set[str]) -> LanguageModel:
    """Subjects' rows drawn anew, but for those of some, whose facts stay as they are."""
    out, generator = facts.copy(), torch.Generator().manual_seed(0)
    own = torch.tensor(subject_tokens(p for p in task.forget if p.subject not in stay))
    table = out.weights[out.embedding_name]
    drawn = torch.randn(len(own), table.shape[1], generator=generator)
    table[own] = table.mean(0) + table.std(0) * drawn
    return out


@pytest.mark.slow
def test_a_fifth_that_is_intact_is_not_hidden_by_the_mean(facts: LanguageModel, capitals: Task):
    _, second = halves(capitals.forget, 0)
    stay = set(sorted({p.subject for p in capitals.forget})[::5])
    found = judge_erasure(facts, redrawn(facts, capitals, stay), capitals)
    assert found.predicted["edited"] < 0.45  # the mean says little
    assert found.verdict == "suppressed"
    intact = {name for name, state in found.facts.items() if state == "intact"}
    left_out = {f"capital: {s}" for s in stay & second}
    assert left_out <= intact and len(intact - left_out) <= 2  # a redrawn row may hit by luck
    count = found.counts
    assert sum(count.values()) == len(second) and count["intact"] == len(intact)
    assert found.sentence.startswith(
        f"{count['erased']} of 89 facts erased, {count['suppressed']} suppressed, {len(intact)} "
        "intact: "
    )


@pytest.mark.slow
def test_what_computes_the_same_is_unchanged(facts: LanguageModel, capitals: Task):
    """Neurons in another order, the residual stream in another basis, and rounded weights."""
    for same in (reordered(facts, 0), rotated(facts, 0), quantize(facts)):
        found = judge_erasure(facts, same, capitals)
        assert (found.verdict, found.cad) == ("unchanged", 0.0)
        assert found.counts == {"erased": 0, "suppressed": 0, "intact": 89}
    found = judge_erasure(facts, rotated(facts, 0), capitals)
    assert found.stitched_last is not None and found.stitched_last < 0.5


@pytest.mark.slow
def test_a_model_that_refuses_is_not_unchanged(facts: LanguageModel, capitals: Task):
    """One token above all others: no answer is predicted, and every one still ranks first."""
    refuses = facts.copy()
    with torch.no_grad():
        pairs = capitals.forget.sample(48, 0)
        batch, end = collate(pairs.pairs), 3
        state = states(refuses, batch)[-1][torch.arange(len(batch)), batch.last]
        refuses.weights["lm_head.weight"][end] = 50 * state.mean(0) / state.mean(0).norm()
    found = judge_erasure(facts, refuses, capitals)
    assert found.predicted["edited"] > 0.95 and found.outright["edited"] < 0.1
    assert found.verdict == "suppressed" and found.counts["suppressed"] == 89


@pytest.mark.slow
def test_retained_facts_alone_can_bring_facts_back(facts: LanguageModel, capitals: Task):
    """Permuted rows: half A tells nothing of them, what else is asked of the subjects does."""
    hidden = permuted_rows(facts, capitals, 0)
    found = judge_erasure(facts, hidden, capitals)
    assert found.half_b[-1] < 0.4 and max(found.subject) < 0.4
    assert found.after_retained is not None and found.after_retained > 0.45
    assert found.verdict == "suppressed" and "relearning what was to be retained" in found.sentence


# Facts one by one: what counts as found, and what guesses find.


def test_a_fact_is_found_by_its_answer_among_all_of_its_relation(
    facts: LanguageModel, split: tuple[PairSet, PairSet]
):
    asked = Asked(list(split[1]))
    assert float(asked.chance.max()) < 0.06 and asked.facts == list(dict.fromkeys(asked.facts))
    knows = asked.ranks(answer_scores(facts, asked.pairs, asked.tokens)[0])
    assert knows.found.all() and knows.first.mean() == 1 and knows.last.max() == 0
    assert beyond_chance(knows.found, asked.chance) == pytest.approx(1)
    never = load_model("facts-capitals-reference-1")
    guessed = asked.ranks(answer_scores(never, asked.pairs, asked.tokens)[0])
    assert beyond_chance(guessed.found, asked.chance) == 0
    # An answer that is likely for every subject wins nothing by it.
    flat = torch.zeros(len(asked.pairs), len(asked.tokens))
    flat[:, torch.searchsorted(asked.tokens, asked.pairs[0].answer)] = 9.0
    assert not asked.ranks(flat).found.any()


def test_what_guesses_find_does_not_count():
    chance = torch.full((100,), 0.05)
    hits = torch.arange(100) < 12
    assert beyond_chance(hits, chance) == 0  # p = 0.004
    assert beyond_chance(hits, chance, rare=0.01) == pytest.approx((0.12 - 0.05) / 0.95)
    assert beyond_chance(torch.ones(2, dtype=torch.bool), torch.full((2,), 0.5)) == 0  # too few
    assert beyond_chance(torch.ones(9, dtype=torch.bool), torch.ones(9)) == 0


def test_the_subject_probe_reads_more_than_the_last_token(
    facts: LanguageModel, split: tuple[PairSet, PairSet]
):
    half_a, half_b = split
    pairs = [p for part in half_b.parts(48) for p in part]
    asked = Asked(pairs)
    read = probe_scores(facts, half_a, pairs, asked.tokens, subject=True)
    shares = [float(asked.ranks(scores).first.mean()) for scores in read]
    assert len(shares) == 10
    assert shares[0] < 0.4  # the embedding at the phrasing's end, and at the name
    assert shares[5] > 0.95
    single = probe(facts, half_a, half_b).float().mean(1).tolist()
    assert single == pytest.approx(shares[:5], abs=0.01)


def test_right_answers_agree_with_the_scores(facts: LanguageModel, split: tuple[PairSet, PairSet]):
    assert float(ranked(facts, split[1])[0].float().mean()) == accuracy(facts, split[1]).choice
    assert model_divergence(facts, facts.copy(), split[1]) == 0


def test_what_cannot_be_compared(facts: LanguageModel, tiny_model: TinyModel):
    with pytest.raises(ModelError, match="Compare two of one model"):
        check_alike(facts, tiny_model(2))
    other = facts.copy()
    other.tokenizer = type("Other", (), {"get_vocab": lambda self: {"a": 1}})()
    with pytest.raises(ModelError, match="different tokenizers"):
        check_alike(facts, other)
    broken = facts.copy()
    broken.weights[facts.linear_names[3]][0, 0] = torch.nan
    for one, two in ((facts, broken), (broken, facts)):
        with pytest.raises(ModelError, match=f"{facts.linear_names[3]} holds NaN or infinity"):
            check_alike(one, two)
    wide = facts.copy()
    mlp = wide.hf.base_model.layers[0].mlp
    mlp.up_proj = torch.nn.Linear(128, 300, bias=False)
    wide = LanguageModel("wide", wide.hf, wide.tokenizer)
    given = r"mlp.up_proj.weight is \(300, 128\) in wide and \(\d+, 128\) in facts"
    with pytest.raises(ModelError, match=given):
        check_alike(facts, wide)
    smaller = facts.copy()
    smaller.hf.resize_token_embeddings(900)
    with pytest.raises(ModelError, match="vocabulary of 900, facts of 960"):
        check_alike(facts, smaller)


# Linearized relearning: the kernel against single gradients, and models whose past is known.


@pytest.fixture(scope="module")
def sixty(capitals: Task) -> tuple[PairSet, PairSet]:
    a, b = (rivals_within(of_subjects(capitals.forget, h)) for h in halves(capitals.forget, 0))
    return a.sample(60, 0), b.sample(60, 0)


def test_the_kernel_is_that_of_single_gradients(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """Phrasings of different lengths, and more than one block of rows."""
    monkeypatch.setattr(module, "CHUNK", 8)
    pairs = list(capitals.forget.sample(20, 0))
    assert len({len(p.clean) for p in pairs}) > 1
    among = answer_tokens(capitals.forget)
    weights = [facts.weights[n].requires_grad_(True) for n in moved_names(facts)]
    single, levels = [], []
    for pair in pairs:
        level = answer_advantage(last_logits(facts, collate([pair])), [pair], among)
        levels.append(level.detach())
        single.append(torch.cat([g.flatten() for g in torch.autograd.grad(level.sum(), weights)]))
    for w in weights:
        w.requires_grad_(False)
    kernel, found = tangent_kernel(facts, pairs, among)
    rows = torch.stack(single)
    assert torch.allclose(found, torch.cat(levels), atol=1e-4)
    assert torch.allclose(kernel, rows @ rows.T, rtol=1e-3, atol=1e-4 * float(kernel.max()))


def test_the_steps_teach_half_a(sixty: tuple[PairSet, PairSet]):
    """Each goes on from the one before; the model itself is left alone."""
    never = load_model("facts-capitals-reference-1")
    before = {name: w.clone() for name, w in never.weights.items()}
    few = sixty[0].sample(24, 0)
    found, moved = linearized_relearning(never, few, few)
    assert found.half_a.shape[1] == 24 and torch.equal(found.half_a, found.half_b)
    shares = found.half_a.float().mean(1)
    assert shares[-1] >= module.LEARNT and (shares[:-1] < module.LEARNT).all()  # and then it ends
    assert torch.equal(ranked(moved, few)[0], found.half_a[-1])
    assert torch.equal(
        linearized_relearning(never, few, few, steps=1)[0].half_a[0], found.half_a[0]
    )
    assert all(torch.equal(before[name], w) for name, w in never.weights.items())


def test_one_step_is_the_damped_solution(facts: LanguageModel, sixty: tuple[PairSet, PairSet]):
    """Against J^T (K + damping)^-1 (log n - m) with single prompts' gradients in memory."""
    few = sixty[0].sample(6, 0)
    pairs, among = list(few), answer_tokens(few)
    weights = [facts.weights[n].requires_grad_(True) for n in moved_names(facts)]
    rows, want = [], []
    for pair in pairs:
        level = answer_advantage(last_logits(facts, collate([pair])), [pair], among)
        want.append(len(among[pair.relation]))
        want[-1] = torch.tensor(float(want[-1])).log() - level.detach()[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(level.sum(), weights)]))
    for w in weights:
        w.requires_grad_(False)
    j = torch.stack(rows)
    kernel = j @ j.T
    damped = kernel + 0.1 * kernel.diagonal().mean() * torch.eye(6)
    delta = j.T @ torch.linalg.solve(damped, torch.stack(want))
    moved = facts.copy()
    module.gauss_newton_step(moved, few, 0.1)
    made = torch.cat([(moved.weights[n] - facts.weights[n]).flatten() for n in moved_names(facts)])
    assert torch.allclose(made, delta, rtol=1e-2, atol=1e-3 * float(delta.abs().max()))


def test_a_step_is_as_long_as_serves_half_a(
    sixty: tuple[PairSet, PairSet], monkeypatch: pytest.MonkeyPatch
):
    never, half = load_model("facts-capitals-reference-0"), sixty[0]
    monkeypatch.setattr(module, "moved_names", lambda model: model.linear_names)
    pairs, among = list(half), answer_tokens(half)
    certain = torch.tensor([len(among[p.relation]) for p in pairs]).log()

    def lacks(lengths: tuple[float, ...]) -> float:
        monkeypatch.setattr(module, "LENGTHS", lengths)
        moved = never.copy()
        module.gauss_newton_step(moved, half, module.DAMPING)
        with torch.no_grad():
            return float((certain - model_advantage(moved, pairs, among)).square().mean())

    single = [lacks((length,)) for length in (1.0, 0.5, 0.25)]
    assert min(single) < single[0] - 0.2  # the whole step goes too far
    assert lacks((1.0, 0.5, 0.25)) == pytest.approx(min(single))


def test_it_tells_hidden_from_gone(facts: LanguageModel, sixty: tuple[PairSet, PairSet]):
    known = linearized_relearning(facts, *sixty)[0].half_b.float().mean(1)
    assert known.min() > 0.95
    never, _ = linearized_relearning(load_model("facts-capitals-reference-1"), *sixty)
    assert never.half_b.float().mean(1).max() < 0.4


# The relearning attack: its halves and rivals, and what it finds where the past is known.

QUICK = RelearnConfig(steps=(10,), rates=(1e-3,))


@pytest.mark.parametrize(
    ("first", "last", "erased"),
    [
        (0.25, 0.25, True),
        (ERASED_LEVEL, ERASED_LEVEL, True),
        (ERASED_LEVEL + 1e-6, 0.0, False),
        (0.0, ERASED_LEVEL + 1e-6, False),  # ranked last systematically: given away as well
    ],
)
def test_erased_is_chance_and_a_tolerance_for_first_and_last(
    first: float, last: float, erased: bool
):
    assert pytest.approx(0.40) == ERASED_LEVEL
    assert is_erased(first, last) is erased
    start, after = Point(0.1, 0, 0.0, 0.25, 0.3, 0.25), Point(0.1, 20, 0.0, first, 1.0, last)
    found = Relearning([start, after], (9, 9))
    assert found.erased is erased


def test_what_was_found_comes_back_from_json():
    config = RelearnConfig(steps=(5, 10), rates=(1e-3,), seed=2)
    points = [Point(1e-3, 5, 0.1, 0.2, 0.3, 0.4), Point(1e-3, 10, 0.0, 0.5, 1.0, 0.25)]
    found = Relearning(points, (7, 8), RelearningMeta("edited", "capitals", "dev", config))
    values = json.loads(json.dumps(found.to_json()))
    assert set(values["points"][0]) == {"rate", "steps", "top1", "choice", "half_a", "last"}
    assert Relearning.from_json(values) == found


def test_halves_are_disjoint_seeded_and_by_subject(capitals: Task):
    first, second = halves(capitals.forget, 0)
    assert not first & second
    assert first | second == {p.subject for p in capitals.forget}
    assert 0 <= len(first) - len(second) <= 1
    assert halves(capitals.forget, 0) == (first, second)
    assert halves(capitals.forget, 1) != (first, second)
    with pytest.raises(TaskError, match="at least two forget subjects to split; got 1"):
        halves(capitals.forget[:1], 0)


def test_both_halves_must_be_scored(capitals: Task):
    """Few scored prompts can all be about half A: that is said before the attack."""
    first, _ = halves(capitals.forget, 0)
    scored = {"few": of_subjects(capitals.forget, first).sample(3, 0)}
    task = replace(capitals, scored={"dev": {"forget": scored}})
    with pytest.raises(TaskError, match="3 scored prompts of 'few' all fall into one half"):
        relearn(load_model(capitals.reference_models[0]), task, config=QUICK, split="dev")


def test_rivals_are_the_halfs_own_answers(capitals: Task):
    _, second = halves(capitals.forget, 0)
    asked = rivals_within(of_subjects(capitals.forget, second))
    own = {p.answer for p in asked}
    for pair in asked:
        assert len(pair.distractors) == 3
        assert set(pair.distractors) <= own - {pair.answer}
    few = rivals_within(PairSet("few", capitals.forget.pairs[:2]))
    assert all(len(set(p.choices)) == 4 for p in few)  # filled up with the pair's own


def test_batches_use_every_pair_before_any_twice(capitals: Task):
    pairs = list(capitals.forget[:10])
    supply = batches(pairs, 4, seed=3)
    seen = [p for _ in range(5) for p in next(supply)]
    assert set(seen[:10]) == set(pairs) and set(seen[10:]) == set(pairs)


@pytest.mark.slow
def test_the_attack_tells_a_reference_model_from_a_hidden_one(facts: LanguageModel, capitals: Task):
    before = {n: w.clone() for n, w in facts.weights.items()}
    known = relearn(facts, capitals, config=QUICK, split="dev")
    never = relearn(load_model(capitals.reference_models[0]), capitals, config=QUICK, split="dev")
    again = relearn(load_model(capitals.reference_models[0]), capitals, config=QUICK, split="dev")
    assert known.at(0) == known.at(10) == 1.0
    assert never.up_to(10) < 0.4 and never.up_to(10, "last") < 0.4 and never.at(10, "top1") == 0
    assert never.points == again.points  # by seed
    assert never.marks == [0, 10]
    assert all(torch.equal(before[n], w) for n, w in facts.weights.items())


def test_an_attack_learns_its_half(capitals: Task):
    never = load_model(capitals.reference_models[0])
    found = relearn(never, capitals, config=replace(QUICK, steps=(40,)), split="dev")
    assert found.at(40, "half_a") > 0.9
    assert found.at(40) < 0.4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": (20, 10)}, "steps must be positive and ascending"),
        ({"rates": ()}, "rates must be positive"),
        pytest.param(
            {"optimiser": "lion"}, "got 'lion', expected 'adam' or 'sgd'", marks=wrong_type
        ),
    ],
)
def test_bad_settings(wrong: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        RelearnConfig(**wrong)  # type: ignore[arg-type]


# The attack suite: what each arm is given and does, and that a killed one goes on.

SHORT = RelearnConfig(steps=(1, 2), rates=(1e-3,), batch_size=6)


@pytest.fixture(scope="module")
def few(capitals: Task) -> Task:
    """The capitals with few scored prompts."""
    return replace(
        capitals,
        scored={
            split: {"forget": {"few": PairSet("few", roles["forget"]["capital"].pairs[::8])}}
            for split, roles in capitals.scored.items()
        },
    )


def trained_on(
    model: LanguageModel, task: Task, arm: str, monkeypatch: pytest.MonkeyPatch
) -> list[list[Pair]]:
    """The batches that an arm trains on."""
    seen: list[list[Pair]] = []

    def record(model: LanguageModel, pairs: list[Pair]) -> torch.Tensor:
        seen.append(list(pairs))
        return nll(model, pairs)

    monkeypatch.setattr(relearning, "nll", record)
    monkeypatch.setattr(descent, "nll", record)
    attack_once(model, task, arm, 1e-3, config=replace(SHORT, steps=(3,)))
    return seen


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_is_given_the_facts_that_are_asked(
    facts: LanguageModel, few: Task, arm: str, monkeypatch: pytest.MonkeyPatch
):
    first, second = halves(few.forget, 0)
    asked = {p.phrasing for p in few.held_out}
    steps = trained_on(facts, few, arm, monkeypatch)
    assert len(steps) == (0 if arm == "few-shot" else 3)
    seen = [p for step in steps for p in step]
    forget = [p for p in seen if p.relation == "capital"]
    assert {p.subject for p in forget} <= first
    assert not {p.phrasing for p in forget} & asked
    assert len(forget) == {"retained": 0, "half-a+retained": 9, "few-shot": 0}.get(arm, 18)
    train = {p.phrasing for p in few.forget}
    if arm == "phrasings":
        assert not {p.phrasing for p in forget} & train
    elif arm != "few-shot":
        assert {p.phrasing for p in forget} <= train
    about_b = {p.subject for p in Given.of(few, 0, "unseen").retained or ()} & second
    assert about_b == second  # what is retained of half B's subjects is there


def test_either_split_gives_the_other_ones_phrasings(few: Task):
    for split, other in (("unseen", "dev"), ("dev", "unseen")):
        given = Given.of(few, 0, split).phrasings
        assert given is not None
        own = {p.phrasing for s in few.scored[other]["forget"].values() for p in s}
        assert {p.phrasing for p in given} == own
    model = load_model(few.reference_models[0])
    alone = replace(few, scored={"unseen": few.scored["unseen"]})
    assert "no phrasings but those of training and of unseen" in why_not(
        "phrasings", model, alone, Given.of(alone, 0, "unseen"), 0, "unseen"
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "states"),
    [
        ("the city of Paris lies in", "France", True),  # the other way round
        ("signs in france name", "paris", True),  # in any case
        ("the language of France is", "French", False),
        ("Parisians of France like", "wine", False),  # whole words
        ("Paris is as large as", "Rome", False),  # no subject
        ("the language of Luxembourg is", "French", False),  # an answer that is its subject's name
        ("the capital of Luxembourg is not", "Luxembourg", True),
    ],
)
def test_a_text_that_names_subject_and_answer_states_the_fact(
    capitals: Task, prompt: str, answer: str, states: bool
):
    pair = capitals.forget[0]
    facts = [
        replace(pair, subject="France", answer_text="Paris"),
        replace(pair, subject="Luxembourg", answer_text="Luxembourg"),
    ]
    told = replace(pair, prompt=prompt, answer_text=answer)
    assert Statements(facts).hold(told) is states
    assert (Statements(facts).left("told", [told]) is None) is states


def test_retained_facts_that_state_what_is_asked_are_left_out(few: Task):
    _, second = halves(few.forget, 0)
    fact = next(p for p in few.forget if p.subject in second)
    leak = replace(few.retain[0], prompt=f"{fact.answer_text} is in", answer_text=fact.subject)
    told = replace(few, retain=PairSet("retain", (leak, *few.retain[:2])))
    assert Given.of(told, 0, "unseen").retained == PairSet("retained", few.retain[:2])
    only = replace(few, retain=PairSet("retain", (leak,)))
    model = load_model(few.reference_models[0])
    for arm in ("retained", "half-a+retained"):
        given = Given.of(only, 0, "unseen")
        assert why_not(arm, model, only, given, 0, "unseen") == (
            "every retained fact states a fact of half B"
        )


def test_low_rank_changes_are_of_low_rank(facts: LanguageModel, few: Task):
    copies = fine_tune_low_rank(facts.copy(), [few.forget], 1e-3, SHORT)
    start = {n: w.clone() for n, w in next(copies).weights.items()}
    *_, last = copies
    for name, before in start.items():
        moved = last.weights[name] - before
        if name not in facts.linear_names:
            assert not moved.any()
            continue
        strengths = torch.linalg.svdvals(moved.double())
        assert strengths[0] > 1e-4 and strengths[8] < 1e-4 * strengths[0]


def test_a_low_rank_step_is_autograds(facts: LanguageModel, few: Task):
    """The first step moves B alone, by Adam: the sign of the gradient of B through W + 2 BA."""
    config, name = replace(SHORT, steps=(1,)), "model.layers.1.mlp.up_proj.weight"
    pairs = list(few.forget[:6])
    model = facts.copy()
    copies = fine_tune_low_rank(model, [pairs], 1e-3, config)
    before = next(copies).weights[name].clone()
    draws = torch.Generator().manual_seed(0)
    for n in facts.linear_names:
        width = facts.weights[n].shape[1]
        drawn = torch.randn(8, width, generator=draws) / width**0.5
        if n == name:
            a = drawn
    b = torch.zeros(before.shape[0], 8, requires_grad=True)
    twin = facts.copy()
    whole = torch.func.functional_call(
        twin.hf, {name: before + 2 * b @ a}, kwargs={"input_ids": collate(pairs).clean}
    ).logits
    batch = collate(pairs)
    logp = whole[torch.arange(len(pairs)), batch.last].log_softmax(-1)
    (-logp.gather(1, batch.answer[:, None]).mean()).backward()
    assert b.grad is not None
    step = next(copies).weights[name] - before
    large = (b.grad.abs() > 1e-6).all(1)
    expected = 2 * (-3e-3 * b.grad.sign()) @ a
    assert large.sum() > 50 and torch.allclose(step[large], expected[large], atol=1e-4)


def test_noise_is_a_share_of_each_weights_spread_and_quantize_is_nf4(facts: LanguageModel):
    name, again = "model.layers.1.mlp.up_proj.weight", noisy(facts, 0)
    moved = noisy(facts, 0).weights[name] - facts.weights[name]
    assert moved.std() / facts.weights[name].std() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(again.weights[name] - facts.weights[name], moved)
    assert not torch.equal(noisy(facts, 1).weights[name], again.weights[name])
    rounded = ARMS["quantize"].prepare(facts, 0)
    assert torch.equal(rounded.weights[name], quantize(facts, "nf4").weights[name])


def test_few_shot_shows_solved_prompts_of_half_a(facts: LanguageModel, few: Task):
    first, second = halves(few.forget, 0)
    found = few_shot(facts, few, 0, "unseen")
    assert found is not None
    (asked,), (plain,) = found[1], scored_halves(few, 0)[1]
    for pair, alone in zip(asked, plain, strict=True):
        text = facts.get_tokenizer().decode(pair.clean)
        assert text.count("<bos>") == 1 and text.startswith("<bos>")
        assert text.count("question") > 1 and len(pair.clean) <= 64
        assert pair.clean[-len(alone.clean) + 1 :] == alone.clean[1:]
        assert pair.choices == alone.choices and len(pair.corrupt) == len(pair.clean)
        shown = facts.get_tokenizer().decode(pair.clean[: -len(alone.clean) + 1])
        assert any(f" {s} ?" in shown for s in first)
        assert not any(f" {s} ?" in shown for s in second)
    small = facts.copy()
    small.hf.config.max_position_embeddings = 20
    assert why_not("few-shot", small, few, Given.of(few, 0, "unseen"), 0, "unseen") == (
        "not even one solved prompt fits into the model's 20 positions"
    )


def test_rates_of_arms():
    config = RelearnConfig(rates=(1e-2, 1e-4, 1e-3))
    assert rates_of("half-a", config) == (1e-4, 1e-3, 1e-2)
    assert rates_of("noise", config) == (1e-3,)
    assert rates_of("few-shot", config) == (0.0,)
    assert rates_of("lora", replace(config, rates=(1e-3, 1e-4))) == (1e-3,)


@pytest.mark.slow
def test_the_suite_attacks_in_every_arm_and_half_a_is_relearn(facts: LanguageModel, few: Task):
    before = {n: w.clone() for n, w in facts.weights.items()}
    heard: list[tuple[int, int]] = []
    found = attack_suite(
        {"known": facts}, few, config=SHORT, on_step=lambda *step: heard.append(step)
    )["known"]
    assert list(found.arms) == list(ARMS) and not found.skipped
    alone = relearn(facts, few, config=SHORT)
    assert found.arms["half-a"] == alone
    assert not found.erased and found.most() == 1.0 and found.strongest == "half-a"
    assert heard[-1] == (14, 14) and [a for a, _ in heard] == sorted(a for a, _ in heard)
    assert all(torch.equal(before[n], w) for n, w in facts.weights.items())
    assert AttackResults.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_strongest_arm_counts_by_hand():
    def arm(first: float, last: float) -> Relearning:
        start = Point(1e-3, 0, 0.0, 0.25, 0.2, 0.2)
        return Relearning([start, replace(start, steps=5, choice=first, last=last)], (9, 9))

    found = AttackResults({"half-a": arm(0.3, 0.2), "noise": arm(0.1, 0.4)}, {"lora": "too wide"})
    assert found.strongest == "noise" and found.most() == 0.4 and found.most("half-a") == 0.3
    assert found.erased
    known = AttackResults({"half-a": arm(0.3, 0.2), "retained": arm(0.41, 0.2)}, {})
    assert not known.erased
    lines = attack_lines({"mine": known, "never taught": found})
    assert lines[3] == "mine: NOT erased. Strongest arm: retained, 0.41; never taught: 0.40, noise"
    assert lines[5].split() == ["retained", "0.25/0.20/0.00", "0.41/0.20/0.00"]
    assert lines[6].split() == ["half-a", "0.25/0.20/0.00", "0.30/0.20/0.00", "0.30"]
    assert lines[8].startswith("never taught: erased") and lines[-1].endswith("left out: too wide")


@pytest.mark.slow
def test_a_killed_suite_goes_on_where_it_was(
    few: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    once = replace(SHORT, steps=(1,))
    models = {"never": load_model(few.reference_models[0])}
    arms, out, made = ("half-a", "few-shot"), tmp_path / "out", list[str]()

    def attack(model: LanguageModel, task: Task, arm: str, *rest: float, **how: object):
        if arm in made:
            raise AssertionError(f"{arm} is made again")
        made.append(arm)
        return attack_once(model, task, arm, *rest, **how)  # type: ignore[arg-type]

    whole = attack_suite(models, few, config=once, arms=arms)
    monkeypatch.setattr(suite, "attack_once", attack)
    attack_suite(models, few, config=once, arms=arms[:1], out=out)
    cost = Suite(models, few, once, arms, out=out).cost()
    assert (cost.attacks, cost.kept) == (1, 1) and cost.seconds > 0
    for _ in range(2):
        assert attack_suite(models, few, config=once, arms=arms, out=out) == whole
    assert made == list(arms)
    other = {"edited": models["never"].copy()}
    other["edited"].weights["model.norm.weight"].mul_(1.01)
    for changed in (
        Suite(other, few, once, arms[:1], out=out),  # its own sha256 is that of the original
        Suite(models, few, replace(once, seed=1), arms[:1], out=out),
        Suite(models, few, once, arms[:1], "dev", out),
        Suite(models, few.without({few.forget[0].fact}, "unknown"), once, arms[:1], out=out),
    ):
        assert changed.cost().kept == 0


def test_changed_and_foreign_files_are_refused(few: Task, tmp_path: Path):
    models = {"never": load_model(few.reference_models[0])}
    out = tmp_path / "out"
    attack_suite(models, few, config=SHORT, arms=("half-a",), out=out)
    (file,) = (out / "attacks").iterdir()
    text = file.read_text()
    file.write_text(text.replace('"steps": 2', '"steps": 3'))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        attack_suite(models, few, config=SHORT, arms=("half-a",), out=out)
    file.write_text("{}")
    with pytest.raises(ArtifactError, match="does not hold what it should"):
        attack_suite(models, few, config=SHORT, arms=("half-a",), out=out)
    attack_suite(models, few, config=replace(SHORT, seed=1), arms=("half-a",), out=out)
    (other,) = (p for p in (out / "attacks").iterdir() if p != file)
    file.write_text(other.read_text())
    with pytest.raises(ArtifactError, match="is of another model, task or setting"):
        attack_suite(models, few, config=SHORT, arms=("half-a",), out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for place, message in ((tmp_path / "mine", "files that no attack wrote"), (file, "is a file")):
        with pytest.raises(ArtifactError, match=message):
            attack_suite(models, few, config=SHORT, arms=("half-a",), out=place)
    (out / suite.MARK).write_text('{"kind": "bench"}')
    with pytest.raises(ArtifactError, match="files that no attack wrote"):
        attack_suite(models, few, config=SHORT, arms=("half-a",), out=out)


def test_suites_that_cannot_be(facts: LanguageModel, few: Task):
    small = facts.copy()
    small.hf.config.max_position_embeddings = 20
    with pytest.raises(ConfigError, match="Unknown arm 'pruning'; expected some of half-a, "):
        attack_suite({"m": facts}, few, arms=("pruning",))
    with pytest.raises(ConfigError, match="No arm to attack 'm' in: none was named"):
        attack_suite({"m": facts}, few, arms=())
    with pytest.raises(ConfigError, match="not even one solved prompt fits"):
        attack_suite({"m": small}, few, arms=("few-shot",))
    edited = facts.copy()
    edited.weights["model.norm.weight"].mul_(1.01)
    with pytest.raises(ModelError, match="does not hold the weights that are attacked"):
        Suite({"m": edited}, few, SHORT, ("half-a",)).run(compute=map)


def test_an_attack_that_destroys_the_model_ends_there(few: Task):
    never = load_model(few.reference_models[0])
    found = attack_once(never, few, "half-a", 1e30, config=SHORT)
    assert [p.steps for p in found] == [0]
    assert [p.steps for p in attack_once(never, few, "half-a", 1e-3, config=SHORT)] == [0, 1, 2]


@pytest.mark.slow
def test_retained_facts_find_permuted_subjects_and_half_a_does_not(
    facts: LanguageModel, capitals: Task
):
    """The edit of docs/cad.md: the embedding rows that are the subjects' own, permuted."""
    permuted = facts.copy()
    elements = {t for p in capitals.retain if p.relation in ("symbol", "number") for t in p.clean}
    rows = sorted({t for p in capitals.forget for t in {*p.clean} - {*p.corrupt}} - elements)
    mixed = rows[:]
    random.Random(0).shuffle(mixed)
    weight = permuted.weights[permuted.embedding_name]
    weight[rows] = weight[mixed].clone()
    arms, config = ("half-a", "retained"), RelearnConfig(steps=(80,), rates=(1e-3,))
    models = {"permuted": permuted, "never": load_model(capitals.reference_models[0])}
    found = attack_suite(models, capitals, config=config, arms=arms)
    assert found["permuted"].strongest == "retained" and not found["permuted"].erased
    assert found["permuted"].most("half-a") < 0.4 and found["permuted"].most("retained") > 0.55
    assert found["never"].erased


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(facts: LanguageModel, few: Task):
    tried = Suite({"known": facts}, few, SHORT, ("half-a", "noise", "few-shot"))
    alone = tried.run()
    torch.set_num_threads(2)
    try:
        assert tried.run() == alone
    finally:
        torch.set_num_threads(1)
    with engine(2) as compute:
        assert tried.run(compute) == alone


def test_ranking_loss_by_hand(facts: LanguageModel, capitals: Task):
    """Against uniform targets it is what the answer's log p has above the mean of the answers'."""
    pairs = list(capitals.forget[:3])
    targets = CounterfactualTargets(facts, PairSet("few", tuple(pairs)))
    for key, value in targets.by_phrasing.items():
        targets.by_phrasing[key] = torch.full_like(value, 1 / len(value))
    among = {"capital": torch.tensor([p.answer for p in pairs])}
    full = torch.stack([-nll(facts, [replace(p, answer=a.answer)]) for p in pairs for a in pairs])
    above = full.view(3, 3).diagonal() - full.view(3, 3).mean(1)
    want = (above + 0.25).abs().mean()
    assert ranking_loss(facts, pairs, targets, among, 0.25) == pytest.approx(float(want), abs=1e-4)


LAYER = "model.layers.1.mlp.down_proj.weight"


def whole(model: LanguageModel) -> dict[str, Tensor]:
    """Every element of one weight."""
    return {LAYER: torch.arange(model.weights[LAYER].numel())}


def test_the_attackers_gradient_is_at_the_relearned_point(facts: LanguageModel, capitals: Task):
    targets = CounterfactualTargets(facts, capitals.forget)
    config = Mansu(adversarial_steps=3, batch_size=8, adversarial_lr=0.003)
    before = facts.weights[LAYER].clone()

    def one(seed: int) -> tuple[list[Tensor], float]:
        adversary = AdversarialRelearning(capitals, config, seed)
        return adversary.gradient([facts], whole(facts), [targets], 0)()

    (first, loss), (again, _), (other, _) = one(0), one(0), one(1)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert loss > 1  # the shipped model knows every capital
    assert torch.equal(before, facts.weights[LAYER])


def test_an_attack_is_kept_up_while_the_model_changes(facts: LanguageModel, capitals: Task):
    """Nine relearning steps are two gradients; then the next model of those that take turns is
    attacked. What changes in the model meanwhile changes in the attacked copy, and nothing else."""
    targets = CounterfactualTargets(facts, capitals.forget)
    config = Mansu(adversarial_steps=9, batch_size=8, adversarial_lr=0.003)
    models, both = [facts.copy(), facts.copy()], [targets, targets]
    models[1].weights[LAYER].zero_()
    adversary = AdversarialRelearning(capitals, config)
    assert [adversary.between(n) for n in range(5)] == [True, False, True, False, True]

    adversary.gradient(models, whole(facts), both, 0)()
    attack = adversary.attack
    assert attack and len({p.subject for p in attack.unseen}) == 89
    relearned = attack.copy.weights[LAYER].clone()
    assert not torch.equal(relearned, facts.weights[LAYER])
    models[0].weights[LAYER].add_(0.5)
    attack.follow(models[0])
    attack.follow(models[0])  # nothing has changed since
    assert torch.allclose(attack.copy.weights[LAYER], relearned + 0.5, atol=1e-6)

    adversary.gradient(models, whole(facts), both, 1)()
    assert adversary.attack is attack
    adversary.gradient(models, whole(facts), both, 2)()
    assert adversary.attack is not attack and adversary.attack
    assert not adversary.attack.before[LAYER].any()


@pytest.mark.parametrize("beside", [True, False])
def test_an_attack_beside_the_models_own_gradient_finds_the_same(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch, beside: bool
):
    """In a thread of its own it has one CPU thread, too, and is over when it is asked for."""
    monkeypatch.setattr(adversarial, "two_at_once", lambda _: beside)
    targets = CounterfactualTargets(facts, capitals.forget)
    config = Mansu(adversarial_steps=3, batch_size=8, adversarial_lr=0.003)
    threads: list[tuple[str, int]] = []

    def learned(*given: Any) -> Tensor:
        threads.append((threading.current_thread().name, torch.get_num_threads()))
        return nll(*given)

    monkeypatch.setattr(adversarial, "nll", learned)
    found = AdversarialRelearning(capitals, config).gradient([facts], whole(facts), [targets], 0)
    nll(facts, capitals.forget[:8])
    (alone,), loss = found()
    assert all(name.startswith("attack") == beside for name, _ in threads) and len(threads) == 3
    assert not beside or all(n == 1 for _, n in threads)

    monkeypatch.setattr(adversarial, "two_at_once", lambda _: not beside)
    found = AdversarialRelearning(capitals, config).gradient([facts], whole(facts), [targets], 0)
    (again,), same = found()
    assert torch.equal(alone, again) and loss == same


def test_a_small_copy_descends_as_any_other(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """In one call for all weights, or weight after weight."""
    made: list[dict[str, Tensor]] = []
    for small in (True, False):
        monkeypatch.setattr(adversarial, "is_small", lambda _, small=small: small)
        copy = facts.trainable_copy()
        step = adversarial.descent(copy, 0.003)
        for start in (0, 8):
            step(list(capitals.forget[start : start + 8]))
        assert all(w.grad is None and not w.requires_grad for w in copy.weights.values())
        made.append(copy.weights)
    for name, weight in facts.weights.items():
        moved, same = (w[name] - weight for w in made)
        assert moved.norm() > 0.001 and (moved - same).norm() < 1e-3 * moved.norm(), name


def test_the_attack_follows_the_precision(
    facts: LanguageModel, capitals: Task, monkeypatch: pytest.MonkeyPatch
):
    """bf16 in the loop: much the same relearning, and the same gradient in direction."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    targets = CounterfactualTargets(facts, capitals.forget)
    config = Mansu(adversarial_steps=4, batch_size=16, adversarial_lr=0.003)
    moved, gradients = [], []
    for c in (config, replace(config, precision="bf16")):
        adversary = AdversarialRelearning(capitals, c, seed=2)
        found = adversary.gradient([facts], whole(facts), [targets], 0)()[0][0]
        assert adversary.attack
        moved.append(adversary.attack.copy.weights[LAYER] - facts.weights[LAYER])
        gradients.append(found.flatten())
    off = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert 0 < off < 0.5  # Adam turns noise of tiny gradients into whole steps
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9
