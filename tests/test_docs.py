"""References are up to date, links lead somewhere, and the site asks nothing of the network."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import condense_runs
import judge_zoo
import nbformat
import pytest
import quantizer_table
from test_report import make_report

import mansu_interp
from mansu_interp.evaluation.scores import Flips, Perplexity, Score, ScoreRow
from mansu_interp.evaluation.versions import EDITED, NEVER_TAUGHT, ORIGINAL
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.quantizers.survival import Survival
from mansu_interp.report.records import (
    ForgetScore,
    QuantizerRow,
    RelearningCurve,
    RelearningPoint,
)
from mansu_interp.tasks.load import load_task
from mansu_interp.utils.files import write_json
from mansu_interp.utils.hub import cached_model
from mansu_interp.utils.records import to_json

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS, *ROOT.glob("research/*.md")])
GIVEN_UP = re.compile(
    r"\btwins?\b|hardened|\breserve|\bparting\b|\bparted\b|deepen|\bguard\b|snapped|snapper|"
    r"attack in(side)? the loop|virtual relearning|erasure_view|UnlearnConfig|\bwish(es)?\b",
    re.IGNORECASE,
)
"""Words that the project has given up: the changelog alone may name them."""
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?(?:https?:)?//"
    r"|<link[^>]*rel=\"?(?:stylesheet|preconnect|icon|preload)[^>]*href=\"?(?:https?:)?//"
)
"""What a page loads from another host; links that a reader may follow are none of these."""


FAULT_TABLES = (
    (ROOT / "docs" / "faults.md")
    .read_text("utf-8")
    .partition("## What wrong or unusual input")[2]
    .partition("## Determinism")[0]
)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="help differs elsewhere")
def test_the_command_line_page_is_up_to_date():
    made = load("make_docs").cli_page()
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == made, "run scripts/make_docs.py"


def test_the_python_page_is_up_to_date():
    made = load("make_docs").api_page()
    assert (ROOT / "docs" / "api.md").read_text("utf-8") == made, "run scripts/make_docs.py"


def test_every_public_name_is_on_the_python_page():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    shown = re.findall(r"(?m)^::: mansu_interp\.[\w.]+\.(\w+)$", text)
    beside = [m.rpartition(".")[2] for m in load("make_docs").BESIDE]
    public = [name for name in mansu_interp.__all__ if name != "__version__"]
    assert sorted(set(shown) - set(beside)) == sorted(public)
    assert set(dir(mansu_interp)) == set(mansu_interp.__all__)


def test_every_page_is_reached_from_the_first():
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    names = {p.name for p in DOCS} - {"index.md"}
    assert names <= set(re.findall(r"\]\((\w+\.md)\)", text))
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert not [n for n in names if f": {n}" not in config]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda p: p.name)
def test_pages_use_the_words_of_the_glossary(page: Path):
    if page.name in ("api.md", "cli.md"):
        pytest.skip("made from the package's own names and docstrings")
    found = GIVEN_UP.search(page.read_text("utf-8"))
    assert not found, f"{page.name} says {found[0]!r}" if found else ""


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda p: p.name)
def test_examples_import_public_names(page: Path):
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "mansu_interp":
                missing = {alias.name for alias in node.names} - set(mansu_interp.__all__)
                assert not missing, f"{page.name} imports {missing}"


def test_the_readme_and_the_glossary_are_short():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.split()) <= 500
    assert len((ROOT / "docs" / "glossary.md").read_text("utf-8").splitlines()) <= 40
    assert len([line for line in readme.splitlines() if line.endswith("-m pytest")]) == 1


def test_rows_of_unusual_input_name_their_tests():
    rows = re.findall(r"^\|.*\| `(test_\w+\.py)::(\w+)` \|$", FAULT_TABLES, re.MULTILINE)
    lines = [x for x in FAULT_TABLES.splitlines() if x.startswith("| ") and "| test |" not in x]
    assert len(rows) == len(lines)
    for file, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), f"{file}::{name}"


def test_a_notebook_becomes_a_page_with_its_pictures():
    hooks = load("site_hooks")
    name = "1-which-heads-move-the-subject"
    text, pictures = hooks.notebook_page(ROOT / "tutorials" / f"{name}.ipynb")
    assert text.startswith("# 1. Which heads move the subject?")
    assert "```python\nfrom mansu_interp" in text and list(pictures) == [f"{name}-1.svg"]
    assert f"![What this cell draws]({name}-1.svg)" in text
    assert pictures[f"{name}-1.svg"].lstrip().startswith("<svg")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of mkdocs ends the build."""
    pytest.importorskip("mkdocs", reason='needs pip install "mansu-interp[docs]"')
    pytest.importorskip("mkdocstrings", reason='needs pip install "mansu-interp[docs]"')
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = ELSEWHERE.search(page.read_text("utf-8"))
        assert not found, f"{page.name}: {found[0]}" if found else ""
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text("utf-8"))


def test_the_site_shows_every_public_name(site: Path):
    text = (site / "api.html").read_text("utf-8")
    for module, names in mansu_interp.PUBLIC.items():
        for name in names:
            assert f'id="mansu_interp.{module}.{name}"' in text, name


def test_the_site_has_research_and_tutorials(site: Path):
    assert (site / "research" / "tables" / "zoo.csv").exists()
    assert 'href="research/erasure.html' in (site / "results.html").read_text("utf-8")
    assert 'href="../cad.html"' in (site / "tutorials" / "4-erased-or-hidden.html").read_text(
        "utf-8"
    )


# The example of docs/tasks.md works as typed.

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"


@pytest.mark.slow
def test_the_example_makes_a_task_that_the_model_knows(tmp_path: Path, facts: LanguageModel):
    found = re.search(r"cat > my\.py <<'END'\n(.*?)END\n", PAGE.read_text("utf-8"), re.S)
    assert found
    done = subprocess.run(
        [sys.executable, "-c", found[1]], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    (tmp_path / "my.jsonl").write_text(done.stdout, encoding="utf-8")
    task = load_task(tmp_path / "my.jsonl", facts)
    assert len(task.forget) > 100 and not task.dropped
    assert accuracy(facts, task.scored["unseen"]["forget"]["forget"]).choice > 0.9


# The notebooks: one with their scripts, saved with outputs that are not stale, and each runs.

SCRIPTS = sorted((ROOT / "tutorials").glob("*.py"))
VARIES = "varies"
"""Tag of cells that print what models answer: another processor may round to another word."""
maker: Any = load("make_tutorials")
named = pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)


def saved(script: Path) -> nbformat.NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), 4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell printed, line by line, each number as #: the last digits differ by processor."""
    text = "".join(o.get("text", "") for o in cell.outputs)
    if VARIES in cell.metadata.get("tags", []):
        return [""] * len(text.splitlines())
    return [re.sub(r"[-+−]?\d[\d,.]*%?", "#", line) for line in text.splitlines()]


def test_there_are_six():
    assert [p.stem[:2] for p in SCRIPTS] == ["1-", "2-", "3-", "4-", "5-", "qu"]


@named
def test_script_and_notebook_agree(script: Path):
    def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
        return [(c.cell_type, c.source) for c in notebook.cells]

    assert cells(saved(script)) == cells(maker.notebook_of(script)), "run scripts/make_tutorials.py"


@named
def test_saved_with_outputs_and_static_pictures(script: Path):
    outputs = [o for c in code(saved(script)) for o in c.outputs]
    assert outputs
    assert not [o for o in outputs if o.get("name") == "stderr" or o.output_type == "error"]
    text = script.with_suffix(".ipynb").read_text("utf-8")
    assert str(Path.home()) not in text and str(ROOT) not in text and "widget-state" not in text
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            assert "image/svg+xml" in output["data"]  # an export is never blank
    if "_view(" in script.read_text("utf-8"):
        assert any("image/svg+xml" in o.get("data", {}) for o in outputs)


REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What one of them is about; it runs where the model is in the hub's cache."""


@pytest.mark.slow
@named
def test_runs_and_prints_what_is_saved(script: Path, monkeypatch: pytest.MonkeyPatch):
    if f'load_model("{REAL}")' in script.read_text("utf-8") and not cached_model(REAL, None):
        pytest.skip(f"{REAL} is not in the hub's cache (scripts/get_smollm2.py makes its folder)")
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a worker has one core
    notebook = maker.notebook_of(script)
    maker.execute(notebook)  # raises on the first error, with its traceback
    for was, now in zip(code(saved(script)), code(notebook), strict=True):
        assert printed(now) == printed(was), f"stale: {now.source}"


def test_a_stale_output_is_seen():
    def cell(text: str) -> nbformat.NotebookNode:
        return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=text)])

    assert printed(cell("mass 0.12\n")) == printed(cell("mass 0.13\n"))
    assert printed(cell("mass 0.12\n")) != printed(cell("share 0.12\n"))


# The tables of research/, what condenses runs into them, and what the pages say of them.

RESEARCH = sorted((ROOT / "research").glob("*.md"))
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
        for page in RESEARCH
        for name in re.findall(r"`([a-z0-9.-]+)`", page.read_text("utf-8"))
        if name.startswith(FAMILIES)
    }
    assert len(named) > 10 and named <= runs


def test_the_zoo_reads_back_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = judge_zoo.read_zoo()
    monkeypatch.setattr(judge_zoo, "PATH", tmp_path / "zoo.csv")
    judge_zoo.write_zoo(dict(reversed(rows.items())))
    assert judge_zoo.read_zoo() == rows and list(judge_zoo.read_zoo()) == sorted(rows)


def test_the_pages_say_what_the_zoo_says(capsys: pytest.CaptureFixture[str]):
    rows = judge_zoo.load()
    judge_zoo.table_of_verdicts(rows)
    printed, text = capsys.readouterr().out, (ROOT / "research" / "erasure.md").read_text("utf-8")
    said = [s for s in printed.splitlines() if s.startswith(("Right: ", "By mechanisms "))]
    assert len(said) == 2 and all(line in text for line in said)
    wrong = printed[printed.index("False erased") : printed.index("False there")].splitlines()[1:]
    assert all(line.strip().split(":")[0].split(", ")[1] in text for line in wrong if line)
    there = sum(r["there"] for r in rows)
    page = (ROOT / "docs" / "cad.md").read_text("utf-8")
    assert f"{len(rows)} versions of the embedded model" in page
    assert f"in {there} of them the facts are there" in page
    for name, sign in judge_zoo.SIGNS.items():
        assert not (row := re.search(rf"(?m)^\| {re.escape(name)} \| (0\.\d+)", text)) or (
            row[1] == f"{judge_zoo.auroc(rows, sign):.3f}"
        )


def test_by_construction_never_taught_is_gone_and_the_originals_own_is_there():
    pairs = list(zip(judge_zoo.load(), judge_zoo.load(by_construction=True), strict=True))
    for found, made in pairs:
        name = made["name"]
        if name.startswith(judge_zoo.NEVER):
            assert not made["there"]
        elif name.startswith(judge_zoo.HELD):
            assert made["there"]
        else:
            assert made["there"] == found["there"]
    # Those that research/erasure.md names; without them the option would decide nothing.
    assert sum(a["there"] != b["there"] for a, b in pairs) == 3


def test_signs_are_judged_on_mechanisms_that_chose_nothing():
    """By hand: the sign separates at 0.5 among b and c, and fails for a alone."""

    def model(mechanism: str, sign: float, there: bool) -> judge_zoo.Row:
        return {"mechanism": mechanism, "x": sign, "there": there}

    rows = [model("a", 0.3, True), model("a", 0.2, False), model("b", 0.9, True)]
    rows += [model("b", 0.4, False), model("c", 0.6, True), model("c", 0.1, False)]
    sign = lambda r: r["x"]  # noqa: E731
    assert judge_zoo.auroc(rows, sign) == pytest.approx(8 / 9)
    assert judge_zoo.threshold(rows[2:], sign) == pytest.approx(0.5)
    for seed in range(5):
        first, second = judge_zoo.split(rows, seed)
        assert not {r["mechanism"] for r in first} & {r["mechanism"] for r in second}
        assert len(first) + len(second) == len(rows)
    fixed = judge_zoo.judged(rows, lambda _: (sign, 0.5), 0)
    assert fixed == "5/6, 1, 0"  # right, false erased, false there
