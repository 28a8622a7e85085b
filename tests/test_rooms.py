"""The walls between modules, read from their imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mansu_interp

PACKAGE = Path(__file__).resolve().parents[1] / "mansu_interp"
ROOT = PACKAGE.parent
PAGES = ("README.md", "CONTRIBUTING.md")


def tree(page: str) -> list[str]:
    """The rooms that a page shows, in its order: top of the list first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = text[text.index("    mansu_interp/\n") :].split("\n\n")[0]
    found = re.findall(r"(?m)^      (\w+)(?:/|\.py) ", block)
    return [name for name in found if (PACKAGE / name).is_dir() or name == "errors"]


RANK = {name: rank for rank, name in enumerate([*tree("CONTRIBUTING.md"), "__main__", "__init__"])}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "data" not in p.relative_to(PACKAGE).parts)


def room(path: Path) -> str:
    """The room of a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(path: Path) -> list[str]:
    """Absolute dotted names of everything a file imports at run time, anywhere in it."""
    package = ["mansu_interp", *path.relative_to(PACKAGE).parts[:-1]]
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if is_typing_only(node):
            return
        if isinstance(node, ast.Import):
            found.extend(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found.append(".".join(base))
            found.extend(".".join([*base, a.name]) for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_both_pages_show_the_rooms_that_there_are():
    for page in PAGES:
        assert tree(page) == [n for n in RANK if not n.startswith("__")], page
    assert {room(p) for p in FILES} == set(RANK)


def test_a_room_holds_about_eight_files():
    folders: dict[Path, int] = {}
    for path in FILES:
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    crowded = {str(f): n for f, n in folders.items() if n > 10 and f.name != "baselines"}
    assert not crowded


SHORTCUTS = {("scores.py", "viz"), ("circuit.py", "viz")}
"""Methods of a line that call a room above, such as `Attribution.view`: imported when called."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path):
    own = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "mansu_interp" or len(parts) == 1 or parts[1] not in RANK:
            continue
        if parts[1] != own and (path.name, parts[1]) not in SHORTCUTS:
            assert RANK[parts[1]] < RANK[own], f"{own} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_each_room_says_which_of_its_names_are_public(path: Path):
    """And holds nothing else: the public names are one list, that of the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    own = [m for m in mansu_interp.PUBLIC if m.partition(".")[0] == path.parent.name]
    names = [n for m in own for n in mansu_interp.PUBLIC[m]]
    said = " ".join((ast.get_docstring(tree) or "").split())
    end = f"Public, from `mansu_interp`: {', '.join(names)}. The rest is implementation."
    assert said.endswith(end if names else "No public names: implementation.")


def test_only_models_imports_transformer_lens():
    users = {room(p) for p in FILES if any(n.startswith("transformer_lens") for n in imported(p))}
    assert users == {"models"}


@pytest.mark.parametrize(
    "name",
    [
        "errors.py", "utils/files.py", "utils/shipped.py", "models/graph.py", "tasks/files.py",
        "tasks/data/benchmarks.py", "circuits/config.py", "circuits/changes.py", "audit/config.py",
        "unlearning/methods.py", "runs/config.py", "runs/defaults.py", "bench/config.py",
        "viz/view.py", "viz/svg.py", "report/story.py", "cli/main.py", "cli/settings.py",
    ],
)  # fmt: skip
def test_these_need_no_torch_by_themselves(name: str):
    found = imported(PACKAGE / name)
    assert not [n for n in found if n.split(".")[0] in ("torch", "transformers")]


def test_only_the_command_line_prints():
    for path in FILES:
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert not calls or room(path) == "cli", f"{path.name} prints in lines {calls}"


def test_the_check_sees_an_import_inside_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "x.py"
    file.write_text("def f():\n    from ..circuit import Circuit\n    import torch.nn\n")
    assert imported(file) == ["mansu_interp.circuit", "mansu_interp.circuit.Circuit", "torch.nn"]
