"""The four properties, by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from conftest import make_tiny

from mansu_interp.audit.known import beyond_guesses, p_of_guess
from mansu_interp.audit.relearning import Point, Relearning
from mansu_interp.cli.main import main
from mansu_interp.errors import ArtifactError, ModelError
from mansu_interp.evaluation.engine import EngineModel
from mansu_interp.evaluation.properties import Property, properties, verdict
from mansu_interp.evaluation.scores import (
    Flips,
    Metric,
    Perplexity,
    Score,
    ScoreRow,
    Scores,
    evaluate,
)
from mansu_interp.evaluation.versions import EDITED, ORIGINAL, ModelVersion
from mansu_interp.export.gguf import export_gguf
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.gguf import MADE_FROM, gguf_names
from mansu_interp.quantizers.survival import quantize
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.task import Task

NF4, FP4 = EDITED.after("nf4"), EDITED.after("fp4")
ORIGINALS = {ORIGINAL: 1.0, ORIGINAL.after("nf4"): 1.0}


def made(role: str, choices: dict[ModelVersion, float], chance_top1: float = 0.0) -> ScoreRow:
    """A set that is never answered with the first token, but chosen so often."""
    scores = tuple(Score(version, top1=0.0, choice=c) for version, c in choices.items())
    return ScoreRow(role, "x", 400, 0.25, chance_top1, scores)


def row(choice: float, after: float, chance_top1: float = 0.0) -> ScoreRow:
    return made("forget", {**ORIGINALS, EDITED: choice, NF4: after}, chance_top1)


def with_score(row: ScoreRow, model: ModelVersion, metric: Metric, value: float) -> ScoreRow:
    """The same, but for one number."""
    scores = [replace(s, **{metric: value}) if s.model == model else s for s in row.scores]
    return replace(row, scores=tuple(scores))


def recovery(*rows: ScoreRow) -> Property:
    return properties(Scores(rows))[2]


def test_a_rounding_error_is_no_recovery():
    """Accuracies that are the same but for the order in which they were summed."""
    for after, passed in ((0.3 + 6e-17, True), (0.1 + 0.2, True), (0.301, False)):
        assert recovery(row(0.3, after)).passed is passed, after


def test_a_rise_to_chance_is_no_recovery():
    """In four-way choice and in top-1, each against its own chance; a fall is a fall."""
    key: Metric
    for key, before, after, passed, value in (
        ("choice", 0.1, 0.25, True, 0.0),
        ("choice", 0.1, 0.28, True, 0.0),  # 112 of 400: p = 0.09 by guesses
        ("choice", 0.1, 0.29, False, 0.19),  # 116 of 400: p = 0.04
        ("choice", 0.2, 0.1, True, 0.0),  # top-1, which moves nowhere, is the larger
        ("top1", 0.0, 0.03, True, 0.0),
        ("top1", 0.0, 0.04, False, 0.04),
        ("top1", 0.02, 0.01, True, 0.0),
    ):
        one = with_score(row(0.25, 0.25, chance_top1=0.02), EDITED, key, before)
        gap = recovery(with_score(one, NF4, key, after))
        assert (gap.passed, gap.value) == (passed, pytest.approx(value)), (key, after)
        assert ("that ends at chance is a guess" in gap.sentence) == (passed and after > before)


@pytest.mark.slow
def test_chance_of_top1_is_that_of_a_guess_among_a_relations_answers(
    facts: LanguageModel,
):
    """Over all sets that ask for it, forgotten or kept."""
    countries = load_task("countries", facts)
    asked = [p for by in countries.scored["unseen"].values() for s in by.values() for p in s]
    answers = {p.answer_text for p in asked if p.relation == "language"}
    rows = evaluate({ORIGINAL: facts}, countries, role="forget").rows
    (found,) = [r for r in rows if r.label == "language"]
    assert len(answers) > found.n
    assert found.chance_top1 == pytest.approx(1 / len(answers))
    assert found.models == (ORIGINAL,)
    with pytest.raises(KeyError, match="unlearned nf4 was not scored; known: original"):
        found[NF4]


@pytest.mark.parametrize(
    ("first", "last", "passed"), [(0.4, 0.4, True), (0.41, 0.2, False), (0.2, 0.41, False)]
)
def test_what_comes_back_and_what_is_avoided_both_count(first: float, last: float, passed: bool):
    """Whichever learning rate is worse, before the attack or after it."""
    points = [Point(0.1, 0, 0.0, 0.25, 1.0, last), Point(0.1, 20, 0.0, first, 1.0, 0.3)]
    found = Relearning(points, (9, 9))
    erasure = properties(Scores((row(0.3, 0.3),)), relearning=found)[3]
    assert erasure.passed is passed
    assert erasure.value == max(first, last)
    assert erasure.headroom == pytest.approx(0.4 - max(first, last))
    reason = {0.41: "0.410 of the other half, more than 0.400", 0.2: "rank last of four"}
    assert bool(erasure.reason) is not passed
    assert passed or reason[first] in erasure.reason
    assert passed or erasure.sentence.startswith(f"Not met: {erasure.reason}. At most 20 steps")


def test_the_worst_quantizer_of_a_set_decides():
    """Forgetting, retention and the gap alike; each edit against the original at its precision."""

    originals = {ORIGINAL: 1.0, ORIGINAL.after("nf4"): 0.9, ORIGINAL.after("fp4"): 0.8}
    forget = made("forget", {**originals, EDITED: 0.3, NF4: 0.2, FP4: 0.34})
    # A gain is no loss.
    retain = made("retain", {**originals, EDITED: 0.99, NF4: 0.97, FP4: 0.75})
    right = with_choice({EDITED: [False] * 20, NF4: [False] * 20, FP4: [True] * 8 + [False] * 12})
    scores = Scores((forget, retain), (), right)
    alone = properties(scores, ["nf4"])
    both = properties(scores, ["nf4", "fp4"])
    assert [r.passed for r in alone] == [True, True, True, None]
    assert [r.passed for r in both[:3]] == [True, False, False]
    assert [r.value for r in both[:3]] == pytest.approx([0.34, 0.05, 0.04])
    assert both[1].reason == "the retain score x (four-way, fp4) fell by 0.050, more than 0.030"
    assert both[2].reason == "fp4 raised four-way forget accuracy by 0.040, more than 0.000"
    assert both[2].unit.startswith("fp4 minus full precision")
    assert "nf4 and fp4 changed four-way" in both[2].sentence
    assert "by -0.100 and +0.040" in both[2].sentence
    assert "Under fp4, on 8 prompts" in both[2].sentence
    assert "at the same precision, before and after nf4 and fp4." in both[1].sentence
    for alone_, both_ in zip(alone[:3], both[:3], strict=True):
        assert alone_.sentence.endswith(" Measured, and not judged here: fp4.")
        assert "not judged here" not in both_.sentence


@pytest.mark.parametrize(
    ("neighbour", "perplexity", "reasons"),
    [
        (0.96, 10.4, ""),
        (0.94, 10.4, "the near neighbour x (four-way) fell by 0.060, more than 0.050"),
        (0.96, 10.6, "perplexity rose by 6.0%, more than 5.0%"),
        (0.96, None, "perplexity rose without bound, more than 5.0%"),
        (
            0.9, 20.0,
            "the near neighbour x (four-way) fell by 0.100, more than 0.050 and perplexity rose by "
            "100.0%, more than 5.0%",
        ),
    ],
)  # fmt: skip
def test_retention_says_which_limit_was_passed(
    neighbour: float, perplexity: float | None, reasons: str
):
    near = made("neighbour", {**ORIGINALS, EDITED: neighbour, NF4: 1.0})
    kept = made("retain", {**ORIGINALS, EDITED: 1.0, NF4: 1.0})
    text = [Perplexity(v, 10.0) for v in (*ORIGINALS, NF4)] + [Perplexity(EDITED, perplexity)]
    retention = properties(Scores((row(0.3, 0.3), kept, near), tuple(text)))[1]
    assert (retention.passed, retention.reason) == (not reasons, reasons)
    # Shown is the limit that was passed: no FAIL stands beside a number within its target.
    assert retention.headroom is not None and (retention.headroom >= 0) == (not reasons)
    assert retention.value == pytest.approx(
        1 - neighbour if neighbour < 0.95 else 0.06 if perplexity == 10.6 else float("inf")
        if perplexity is None else 0.0
    )  # fmt: skip


def test_the_verdict_gives_the_reason_of_each_property_that_is_not_met():
    held = properties(Scores((row(0.4, 0.3),)))
    found = verdict(held)
    assert found.passed is False
    assert found.sentence == (
        "2 of 4 properties hold. Not met: meaningful forgetting (x still has 0.400, more than "
        "0.350). Not tested: structural erasure (relearning was left out "
        "(--relearn-steps 0))."
    )
    assert verdict(held[1:]).passed is None and verdict(held[1:3]).passed is True
    assert verdict(held[1:3]).sentence == "2 of 2 properties hold."


def test_scores_stand_beside_each_other():
    def alone(model: ModelVersion, choice: float) -> Scores:
        return Scores(
            (made("forget", {model: choice}),),
            (Perplexity(model, 2.0),),
            {model: {"choice": (True,), "top1": (False,)}},
        )

    one, two = alone(ORIGINAL, 0.5), alone(EDITED, 0.5)
    both = one.beside(two)
    assert both.rows[0].models == (ORIGINAL, EDITED)
    assert both.perplexity == (Perplexity(ORIGINAL, 2.0), Perplexity(EDITED, 2.0))
    assert set(both.right) == {ORIGINAL, EDITED}
    assert one.rows[0].models == (ORIGINAL,)
    again = both.beside(alone(EDITED, 0.7))  # the later one counts
    assert again.rows[0].models == (ORIGINAL, EDITED) and again.rows[0][EDITED].choice == 0.7


def test_a_version_is_a_key_and_reads_as_words():
    assert str(NF4) == "unlearned nf4" and str(EDITED) == "unlearned"
    assert ModelVersion("unlearned", "nf4") == NF4 and {NF4: 1}[EDITED.after("nf4")] == 1
    assert NF4.after(None) == EDITED != ModelVersion("unlearned nf4")


@pytest.mark.parametrize(
    ("back", "gone", "p"), [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (1, 3, 0.625), (6, 0, 0.03125)]
)
def test_flips_by_hand(back: int, gone: int, p: float):
    """2 x (1 + 4) / 16 for one against three."""
    before = [True] * gone + [False] * back + [True, False]
    after = [False] * gone + [True] * back + [True, False]
    assert Flips.between(before, after) == Flips(back, gone, p)


def with_choice(
    right: dict[ModelVersion, list[bool]],
) -> dict[ModelVersion, dict[Metric, tuple[bool, ...]]]:
    """Who is right on which prompts, four-way; by top-1 nobody is."""
    return {v: {"choice": tuple(each), "top1": (False,) * len(each)} for v, each in right.items()}


def test_the_sentence_tells_what_is_behind_a_gap():
    right = with_choice({EDITED: [True, False, False], NF4: [False, True, True]})
    gap = properties(Scores((row(0.3, 0.6),), (), right))[2]
    assert (
        "On 2 prompts the answer came back to the first rank, on 1 it went (p = 1.00"
        in gap.sentence
    )
    right = with_choice({EDITED: [True] * 9, NF4: [False] * 9})
    gap = properties(Scores((row(0.6, 0.3),), (), right))[2]
    assert "on 9 it went (p < 0.01 by chance)" in gap.sentence


@pytest.mark.parametrize(
    ("back", "gone", "passed", "said"),
    [
        (10, 8, True, "cannot tell from none: nf4, four-way +0.100 (10 back, 8 gone, p = 0.81)"),
        (5, 0, True, "cannot tell from none: nf4, four-way +0.100 (5 back, 0 gone, p = 0.06)"),
        (6, 0, False, "On 6 prompts the answer came back"),
    ],
)
def test_a_gap_that_a_sign_test_cannot_tell_from_none_is_no_recovery(
    back: int, gone: int, passed: bool, said: str
):
    before = [True] * gone + [False] * (back + 20)
    after = [False] * gone + [True] * back + [False] * 20
    gap = properties(Scores((row(0.4, 0.5),), (), with_choice({EDITED: before, NF4: after})))[2]
    assert gap.passed is passed and said in gap.sentence
    assert gap.value == pytest.approx(0.0 if passed else 0.1)


def test_too_few_prompts_leave_recovery_open():
    few = replace(row(0.0, 1.0), n=4)
    right = with_choice({EDITED: [False] * 4, NF4: [True] * 4})
    gap = properties(Scores((few,), (), right))[2]
    assert (gap.passed, gap.reason) == (None, "4 prompts are too few to tell a rise from none")


def test_what_was_not_known_is_neither_forgotten_nor_erased():
    """An original at chance: no level of the edited model says anything."""
    ignorant = made("forget", {**dict.fromkeys(ORIGINALS, 0.27), EDITED: 0.1, NF4: 0.1})
    kept = made("retain", {**ORIGINALS, EDITED: 1.0, NF4: 1.0})
    held = properties(Scores((ignorant, kept)))
    assert [p.passed for p in held] == [None, True, None, None]
    why = "0.270 four-way on x at best, where guesses do as well with p = 0.19"
    assert held[0].reason == f"the original does not know the forget facts ({why})"
    assert held[0].headroom is None and verdict(held).passed is None
    assert "Not tested: meaningful forgetting (the original does not" in verdict(held).sentence
    lost = properties(Scores((row(0.3, 0.3), replace(ignorant, role="retain"))))
    assert [p.passed for p in lost] == [True, None, True, None]
    assert lost[1].reason.startswith("the original does not know the retain facts (0.270 four-way")


def test_forgetting_needs_a_fall():
    """Not a level that the original had already, and not one that is there by luck."""
    near = made("forget", {**dict.fromkeys(ORIGINALS, 0.34), EDITED: 0.34, NF4: 0.34})
    held = properties(Scores((near,)))[0]
    assert held.passed is False
    assert held.reason == "x did not fall"
    luck = made("forget", {**dict.fromkeys(ORIGINALS, 0.34), EDITED: 0.33, NF4: 0.33})
    known, after = [True] * 9 + [False] * 11, [True] * 5 + [False] * 14 + [True]
    held = properties(
        Scores((luck,), (), with_choice({ORIGINAL: known, EDITED: after, NF4: after}))
    )
    assert held[0].passed is False
    assert held[0].reason == "the fall cannot be told from none (1 back, 4 gone, p = 0.38)"
    assert properties(Scores((row(0.3, 0.3),)))[0].passed is True


def test_sets_that_the_original_does_not_know_are_named_and_do_not_count():
    unknown = replace(
        made("forget", {**dict.fromkeys(ORIGINALS, 0.27), EDITED: 0.4, NF4: 0.4}), label="y"
    )
    held = properties(Scores((row(0.3, 0.3), unknown)))[0]
    assert held.passed is True and held.value == 0.3
    assert (
        "The original itself answers y (0.270) and y after nf4 (0.270) no better" in held.sentence
    )


def test_guesses_are_counted_by_hand():
    """The fact is the unit, however often it is asked; of fewer than three facts the prompt."""
    assert p_of_guess(1.0, 3, 12) == pytest.approx(1 / 64)
    assert p_of_guess(1.0, 2, 12) == pytest.approx(0.25**12)
    assert p_of_guess(0.5, 4, 40) == pytest.approx((6 * 9 + 4 * 3 + 1) / 256)
    assert p_of_guess(0.62, 4, 40) == p_of_guess(0.5, 4, 40)  # rounded down to whole facts
    assert p_of_guess(0.0, 9, 9) == 1.0 and p_of_guess(0.1, 20, 20, chance=0.0) == 0.0
    exact = sum(math.comb(2000, k) * 3 ** (2000 - k) for k in range(550, 2001)) / 4**2000
    assert p_of_guess(0.275, 2000, 2000) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("share", "top1", "facts", "prompts", "known"),
    [
        (4 / 6, 0.0, 6, 6, True),
        (3 / 6, 1.0, 6, 6, False),
        (1.0, 0.5, 2, 2, False),  # too few to tell by choice: predicted outright, or not known
        (1.0, 1.0, 2, 2, True),
        (1.0, 0.0, 2, 3, True),
    ],
)
def test_what_is_beyond_guesses(share: float, top1: float, facts: int, prompts: int, known: bool):
    assert beyond_guesses(share, top1, facts, prompts) is known


def test_nan_is_no_score(facts: LanguageModel, capitals: Task):
    """Nothing outranks NaN: a broken model would seem to have forgotten all."""
    broken = facts.copy()
    broken.weights[facts.linear_names[0]][0, 0] = float("nan")
    with pytest.raises(ModelError, match=f"facts: the weight {facts.linear_names[0]} holds NaN"):
        evaluate({EDITED: broken}, capitals, role="forget")


# A GGUF file in llama.cpp itself.


@pytest.fixture(scope="module")
def file(facts: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with 16 bits a weight."""
    pytest.importorskip("xllamacpp", reason="llama.cpp itself: needs the wheel xllamacpp")
    path = tmp_path_factory.mktemp("gguf") / "facts.gguf"
    export_gguf(facts, path, "f16")
    return path


def test_llama_cpp_computes_the_checkpoint(facts: LanguageModel, capitals: Task, file: Path):
    """At any positions, in any order, of prompts longer than the ones before."""
    engine = EngineModel.open(file, facts)
    engine.check_tokenizer(capitals, "unseen")
    ids = facts.encode("<bos>the capital of France is Paris. the language of Peru is")
    for n in (3, len(ids), 5):
        tokens = torch.tensor([ids[:n], ids[-n:]])
        assert torch.allclose(engine.all_logits(tokens), facts.all_logits(tokens), atol=0.05)
    tokens, rows = torch.tensor([ids[:9], ids[-9:]]), torch.tensor([1, 0, 1, 1])
    at = torch.tensor([4, 8, 0, 4])
    found = engine.logits_at(tokens, rows, at)
    assert torch.allclose(found, facts.logits_at(tokens, rows, at), atol=0.05)
    assert torch.equal(found[0], found[3])
    long = torch.tensor([(ids * 8)[:90]])  # beyond the first context
    assert torch.allclose(engine.all_logits(long)[0, :9], facts.all_logits(long)[0, :9], atol=0.05)


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "mxfp4", "q4_k_m", "iq4_nl"])
def test_llama_cpp_computes_what_was_de_quantized(
    facts: LanguageModel, kind: str, file: Path, tmp_path: Path
):
    """Up to its rounding of activations to 8 bits; and the file is nearer to its own format than to
    full precision."""
    export_gguf(facts, path := tmp_path / "m.gguf", kind)
    expected, names = quantize(facts, kind), gguf_names(facts)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in (facts.embedding_name, "lm_head.weight"):
        tensor = stored[names[name]]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        expected.weights[name].copy_(torch.from_numpy(values.copy()))
    tokens = torch.tensor([facts.encode("<bos>the capital of France is Paris")])
    found = EngineModel.open(path, facts).all_logits(tokens)
    near, far = ((found - m.all_logits(tokens)).norm() for m in (expected, facts))
    assert near < 0.02 * found.norm() and near < 0.7 * far


@pytest.mark.slow
def test_evaluate_asks_the_file(facts: LanguageModel, capitals: Task, file: Path, capsys):
    words = ["evaluate", str(file), "--engine", "llama.cpp", "--checkpoint", "facts"]
    assert main([*words, "--task", "capitals", "--quiet"]) == 0
    text = capsys.readouterr().out
    engine, plain = ModelVersion("llama.cpp"), ModelVersion("transformers")
    models = {plain: facts, engine: EngineModel.open(file, facts)}
    scores = evaluate(models, capitals)
    for r in scores.rows:
        cells = [f"{r[v].choice:.3f} / {r[v].last:.3f} / {r[v].top1:.3f}" for v in models]
        assert f"{r.role}: {r.label} {r.n} {' '.join(cells)}" in " ".join(text.split())
    assert "forget, llama.cpp: 1.000, gap +0.000: 0 back, 0 gone, p = 1." in text
    assert main([*words, "--task", "capitals", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flips"] == {"back": 0, "gone": 0, "p": 1.0} and found["engine"] == "llama.cpp"
    assert main(["evaluate", "facts", "--task", "capitals", "--quiet"]) == 0
    assert "llama.cpp" not in capsys.readouterr().out


def test_a_file_that_does_not_belong_is_said(facts: LanguageModel, file: Path, tmp_path, capsys):
    words = ["evaluate", str(file), "--engine", "llama.cpp", "--task", "capitals", "--checkpoint"]
    other = facts.copy()
    assert other.tokenizer is not None
    vocabulary = json.loads(other.tokenizer.backend_tokenizer.to_str())
    known = vocabulary["model"]["vocab"]
    known["capital"], known["language"] = known["language"], known["capital"]
    text = json.dumps(vocabulary)
    other.save(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(text)
    assert main([*words, str(tmp_path / "other")]) == 1
    assert re.search(r"splits \d+ of \d+ prompts otherwise", capsys.readouterr().err)
    wide = make_tiny(4)
    with pytest.raises(
        ArtifactError, match=r"has 960 tokens, its checkpoint 50: they do not belong"
    ):
        EngineModel.open(file, wide)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"llama.cpp cannot load .*cut.gguf: no GGUF file, cut"):
        EngineModel.open(cut, facts)
    with pytest.raises(ArtifactError, match="there is no such file"):
        EngineModel.open(tmp_path / "none.gguf", facts)


def test_a_folder_in_the_place_of_a_file_is_said(tmp_path: Path, capsys):
    """Before anything is loaded."""
    (folder := tmp_path / "b \u00fc").mkdir()
    words = ["evaluate", str(folder), "--engine", "llama.cpp", "--checkpoint", "no-such-model"]
    assert main([*words, "--task", "capitals"]) == 1
    said = capsys.readouterr().err
    assert f"{folder} is a folder, not a GGUF file" in said
    assert f"mansu export '{folder}' --out model.gguf." in said


def test_a_file_of_other_weights_is_refused(facts: LanguageModel, file: Path, tmp_path, capsys):
    """And one of the same values is not, in whichever dtype they were saved again."""
    words = ["evaluate", str(file), "--engine", "llama.cpp", "--task", "capitals", "--checkpoint"]
    edited = facts.copy()
    edited.weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.25
    edited.save(tmp_path / "edited")
    assert main([*words, str(tmp_path / "edited")]) == 1
    said = capsys.readouterr().err
    assert "facts.gguf was made from other weights than the checkpoint's" in said
    again = facts.copy()
    again.saved_dtype = torch.float32
    again.save(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.saved_dtype != facts.saved_dtype
    assert EngineModel.open(file, again).made_from


def test_a_file_that_does_not_say_what_it_was_made_from_is_asked(
    file: Path, tmp_path, capsys, monkeypatch
):
    """With a warning: other converters do not write it."""
    asked = []
    monkeypatch.setattr("mansu_interp.evaluation.scores.evaluate", lambda *a: asked.append(a) or 1)
    monkeypatch.setattr("mansu_interp.cli.deployed.score_lines", lambda *_: [])
    silent = tmp_path / "silent.gguf"
    raw = file.read_bytes()
    assert raw.count(MADE_FROM.encode()) == 1
    silent.write_bytes(raw.replace(MADE_FROM.encode(), b"x" * len(MADE_FROM)))
    words = ["--engine", "llama.cpp", "--task", "capitals", "--checkpoint", "facts", "--quiet"]
    for path, warned in ((silent, True), (file, False)):
        assert main(["evaluate", str(path), *words]) == 0 and asked.pop()
        said = capsys.readouterr().err
        assert (f"nothing in {path} tells whether it was made from facts" in said) == warned
