"""The tables of research/, what condenses runs into them, and what the pages say of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import condense_runs
import judge_zoo
import pytest
import quantizer_table
import zoo_table
from test_report import make_report

from mansu_interp.evaluation.scores import Flips, Perplexity, Score, ScoreRow
from mansu_interp.evaluation.versions import EDITED, NEVER_TAUGHT, ORIGINAL
from mansu_interp.quantizers.survival import Survival
from mansu_interp.report.records import (
    ForgetScore,
    QuantizerRow,
    RelearningCurve,
    RelearningPoint,
)
from mansu_interp.utils.files import write_json
from mansu_interp.utils.records import to_json

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "research").glob("*.md"))
FAMILIES = ("capitals-", "countries-", "smollm2-")


NF4 = QuantizerRow(
    "nf4",
    promised=True,
    survival=Survival(8, 6, 2, 6, 1.0, 0.99, 0.1),
    choice=ForgetScore(0.9, 0.4, 0.0),
    top1=ForgetScore(0.45, 0.2, 0.0),
    flips=Flips(1, 3, 0.625),
)


def scored(role: str, label: str, full: float, nf4: float) -> ScoreRow:
    choices = {
        ORIGINAL: 1.0,
        EDITED: full,
        ORIGINAL.after("nf4"): 0.9,
        EDITED.after("nf4"): nf4,
    }
    scores = tuple(Score(version, c / 2, c) for version, c in choices.items())
    return ScoreRow(role, label, 40, 0.25, 0.0, scores)


def report(folder: Path, seed: int, after: float, *quantizers: QuantizerRow) -> Path:
    """A report of two forget sets and a retained one, in full precision and after NF4."""
    made = make_report()
    made = replace(
        made,
        command="mansu run",
        config={"model": "models/tiny", "seed": seed, "unlearn": {"method": "mansu"}},
        task=replace(made.task, name="letters"),
        edit=replace(made.edit, edited=8, share=0.01),
        scores=(
            scored("forget", "a", 0.3, 0.2),
            scored("forget", "b", 0.5, after),
            scored("retain", "c", 0.95, 0.9),
        ),
        perplexity=(),
        quantizers=(NF4, *quantizers),
        relearning=(
            RelearningCurve(EDITED, (RelearningPoint(0, 0.3, 0.2), RelearningPoint(20, 0.4, 0.1))),
            RelearningCurve(NEVER_TAUGHT, (RelearningPoint(20, 0.2, 0.25),)),
        ),
    )
    folder.mkdir(parents=True)
    write_json(folder / "report.json", made.to_json())
    return folder


def test_a_run_is_condensed(tmp_path: Path):
    runs, sets = condense_runs.condensed(report(tmp_path / "mine-1", 1, 0.6))
    full, nf4 = runs
    assert [full[k] for k in condense_runs.KEYS] == ["mine", "tiny", "letters", "mansu", 1]
    assert (full["quantizer"], full["prompts"], full["gap_choice"]) == ("none", 80, None)
    assert full["forget_choice"] == pytest.approx(0.4) and full["forget_worst_set"] == 0.5
    assert nf4["forget_choice"] == pytest.approx(0.4) and nf4["gap_choice"] == pytest.approx(0)
    assert nf4["forget_worst_set"] == 0.6
    assert full["retain_worst_loss"] == pytest.approx(0.05)
    assert nf4["retain_worst_loss"] == pytest.approx(0.0)  # against the original after NF4
    assert (nf4["codes_changed"], nf4["other_codes_changed"]) == (0.75, 2)
    assert (nf4["back"], nf4["gone"], nf4["share_kept"]) == (1, 3, 0.99)
    # First or last of four, whichever is more.
    assert (nf4["relearn_steps"], nf4["relearned"], nf4["relearned_reference"]) == (20, 0.4, 0.25)
    assert [(s["quantizer"], s["set"]) for s in sets] == [
        (q, s) for q in ("none", "nf4") for s in "abc"
    ]


def test_a_quantizer_outside_the_set_is_known_by_its_means(tmp_path: Path):
    fp4 = replace(
        NF4, name="fp4", promised=False,
        choice=ForgetScore(0.8, 0.3, -0.1), top1=ForgetScore(0.4, 0.0, -0.2),
    )  # fmt: skip
    runs, sets = condense_runs.condensed(report(tmp_path / "mine-0", 0, 0.6, fp4))
    row = runs[2]
    assert (row["quantizer"], row["promised"]) == ("fp4", False)
    assert (row["forget_choice_original"], row["forget_choice"]) == (0.8, 0.3)
    assert row["gap_choice"] == pytest.approx(-0.1) and row["retain_worst_loss"] is None
    assert not [s for s in sets if s["quantizer"] == "fp4"]


def test_a_trial_of_results_is_condensed(tmp_path: Path):
    """As `results.py` writes it, beside that of the original."""
    rows = (scored("forget", "a", 0.3, 0.2), scored("retain", "c", 0.95, 0.9))
    for name, of in (("original", ORIGINAL), ("npo-2", EDITED)):
        own = [
            replace(r, scores=tuple(s for s in r.scores if s.model.name == of.name)) for r in rows
        ]
        made = {
            "model": "facts", "task": "capitals", "scores": [to_json(r) for r in own],
            "perplexity": [to_json(Perplexity(of, 3.0))], "survival": to_json(NF4.survival),
            "flips": to_json(NF4.flips), "edited": 8, "share": 0.01, "dev_choice": 0.2,
            "seconds": 9.0,
        }  # fmt: skip
        write_json(tmp_path / f"{name}.json", made)
    (full, nf4), sets = condense_runs.condensed(tmp_path / "npo-2.json")
    assert [full[k] for k in condense_runs.KEYS] == ["matched", "facts", "capitals", "npo", 2]
    assert (full["perplexity_original"], full["perplexity"]) == (3.0, 3.0)
    assert (nf4["promised"], nf4["gap_choice"]) == (False, pytest.approx(-0.1))
    assert len(sets) == 4


def test_rows_of_the_same_run_are_replaced(tmp_path: Path):
    path = tmp_path / "runs.csv"
    condense_runs.merge(path, condense_runs.condensed(report(tmp_path / "mine-0", 0, 0.6))[0])
    condense_runs.merge(path, condense_runs.condensed(report(tmp_path / "mine-1", 1, 0.6))[0])
    condense_runs.merge(
        path, condense_runs.condensed(report(tmp_path / "new" / "mine-1", 1, 0.1))[0]
    )
    rows = condense_runs.read_table(path)
    found = [(r["seed"], r["quantizer"], r["forget_worst_set"]) for r in rows]
    assert found == [
        ("0", "none", "0.5"),
        ("0", "nf4", "0.6"),
        ("1", "none", "0.5"),
        ("1", "nf4", "0.2"),
    ]


def test_the_table_over_quantizers(capsys: pytest.CaptureFixture[str]):
    rows = condense_runs.read_table(condense_runs.TABLES / "runs.csv")
    quantizer_table.print_table([r for r in rows if r["run"] == "smollm2-final-margin-0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `none` | - |") and "0.230 ± 0.022" in lines[2]
    assert "-0.042 ± 0.026" in next(line for line in lines if "int4-g32" in line)


def test_names_of_runs_on_the_pages_stand_in_the_table():
    runs = {r["run"] for r in condense_runs.read_table(condense_runs.TABLES / "runs.csv")}
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`([a-z0-9.-]+)`", page.read_text("utf-8"))
        if name.startswith(FAMILIES)
    }
    assert len(named) > 10 and named <= runs


def test_the_zoo_reads_back_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = zoo_table.read_zoo("countries")
    monkeypatch.setattr(zoo_table, "PATH", tmp_path / "zoo.csv")
    zoo_table.write_zoo("countries", rows)
    assert zoo_table.read_zoo("countries") == rows and zoo_table.read_zoo("capitals") == {}


@pytest.mark.parametrize(("horizon", "right"), [(20, 103), (40, 104)])
def test_the_verdicts_agree_with_the_attack_as_the_page_says(horizon: int, right: int):
    rows = judge_zoo.load(["capitals", "countries"], horizon)
    assert sum(r["verdict"] == judge_zoo.expected(r) for r in rows) == right
    assert len(rows) == 110
    text = (ROOT / "research" / "erasure.md").read_text("utf-8")
    assert f"{right} " in text and "of 110" in text
