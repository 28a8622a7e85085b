"""References are up to date, links lead somewhere, and the site asks nothing of the network."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mansu_interp
from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.load import load_task

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
    text, pictures = hooks.notebook_page(ROOT / "tutorials" / "1-discover-a-circuit.ipynb")
    assert text.startswith("# 1. Discover a circuit") and "```python\nfrom mansu_interp" in text
    assert list(pictures) == ["1-discover-a-circuit-1.svg"]
    assert "![What this cell draws](1-discover-a-circuit-1.svg)" in text
    assert pictures["1-discover-a-circuit-1.svg"].lstrip().startswith("<svg")


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
    assert 'href="../cad.html"' in (site / "tutorials" / "4-erasure-or-suppression.html").read_text(
        "utf-8"
    )


# The example of docs/tasks.md works as typed.

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"


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
