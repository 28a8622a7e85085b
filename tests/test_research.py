"""The tables of research/, what condenses runs into them, and what the pages say of them."""

from __future__ import annotations

import re
from pathlib import Path

import condense_runs
import judge_zoo
import pytest
import quantizer_table
import zoo_table

from mansu_interp.utils.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "research").glob("*.md"))
FAMILIES = ("capitals-", "countries-", "smollm2-")


def report(folder: Path, seed: int, after: float) -> Path:
    """A report of two forget sets and a retained one, in full precision and after NF4."""

    def models(full: float, nf4: float) -> dict[str, dict[str, float]]:
        both = {"original": 1.0, "unlearned": full, "original nf4": 0.9, "unlearned nf4": nf4}
        return {name: {"choice": x, "top1": x / 2} for name, x in both.items()}

    def scored(role: str, label: str, full: float, nf4: float) -> dict[str, object]:
        return {"role": role, "label": label, "n": 40, "models": models(full, nf4)}

    flips = {"back": 1, "gone": 3, "p": 0.625}
    nf4 = {"name": "nf4", "promised": True, "edited": 8, "survived": 6, "collateral": 2}
    made = {
        "command": "mansu run",
        "config": {"model": "models/tiny", "seed": seed, "unlearn": {"method": "mansu"}},
        "task": {"name": "letters"},
        "edit": {"edited": 8, "share": 0.01},
        "scores": [
            scored("forget", "a", 0.3, 0.2),
            scored("forget", "b", 0.5, after),
            scored("retain", "c", 0.95, 0.9),
        ],
        "perplexity": None,
        "quantizers": [nf4 | {"flips": flips}],
        "relearning": {"unlearned": [[0, 0.3], [20, 0.4]], "never taught": [[20, 0.25]]},
    }
    folder.mkdir(parents=True)
    write_json(folder / "report.json", made)
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
    assert (nf4["relearn_steps"], nf4["relearned"], nf4["relearned_reference"]) == (20, 0.4, 0.25)
    assert [(s["quantizer"], s["set"]) for s in sets] == [
        (q, s) for q in ("none", "nf4") for s in "abc"
    ]


def test_older_reports_without_scores_after_a_quantizer(tmp_path: Path):
    path = report(tmp_path / "mine-0", 0, 0.6) / "report.json"
    made = read_json(path)
    gone = {
        "choice": {"original": 0.8, "unlearned": 0.3},
        "top1": {"original": 0.4, "unlearned": 0},
    }
    made["quantizers"].append({**made["quantizers"][0], "name": "fp4", **gone})
    write_json(path, made)
    runs, sets = condense_runs.condensed(path)
    fp4 = runs[2]
    assert (fp4["forget_choice_original"], fp4["forget_choice"]) == (0.8, 0.3)
    assert fp4["gap_choice"] == pytest.approx(-0.1) and fp4["retain_worst_loss"] is None
    assert not [s for s in sets if s["quantizer"] == "fp4"]


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
