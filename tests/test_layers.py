"""The walls between modules, read from their imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mansu_interp"
#: Bottom first. A module imports only from rows below its own; within a package, freely.
LAYERS = [
    ["errors"],
    ["config", "graph", "artifacts", "changes", "distributed", "memory", "layout"],
    ["commands", "libraries", "remote"],
    ["tensors"],
    ["defaults", "models", "pairs"],
    ["rows"],
    ["pairing", "taskfiles"],
    ["tasks", "adapters", "quantizers", "stream"],
    ["scoring", "nullspace", "hooked", "floor", "sweep", "provenance", "hub"],
    ["attribution"],
    ["objectives", "faithfulness", "landing", "masks"],
    ["circuit", "ledger", "parting", "relearning", "evidence", "gguf_export"],
    ["linearized_relearning"],
    ["cad", "erasure", "unlearning"],
    ["evaluation", "viz"],
    ["report"],
    ["planning", "runfolder"],
    ["pipeline"],
    ["cells"],
    ["bench"],
    ["cli"],
    ["__main__", "__init__"],
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "data" not in p.relative_to(PACKAGE).parts)


def module(path: Path) -> str:
    """``circuit``, or ``viz`` for everything in that package."""
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


def test_every_module_has_its_place():
    assert {module(p) for p in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path):
    own = module(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "mansu_interp" or len(parts) == 1 or parts[1] not in RANK:
            continue
        if parts[1] != own:
            assert RANK[parts[1]] < RANK[own], f"{own} imports {parts[1]}, which is not below it"


def test_only_models_imports_transformer_lens():
    users = {module(p) for p in FILES if any(n.startswith("transformer_lens") for n in imported(p))}
    assert users == {"models"}


@pytest.mark.parametrize(
    "name",
    ["errors", "config", "commands", "defaults", "graph", "artifacts", "viz", "report", "cli"],
)
def test_these_need_no_torch_by_themselves(name: str):
    for path in FILES:
        if module(path) == name:
            assert not [n for n in imported(path) if n.split(".")[0] in ("torch", "transformers")]


def test_only_the_command_line_prints():
    for path in FILES:
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert not calls or module(path) == "cli", f"{path.name} prints in lines {calls}"


def test_the_check_sees_an_import_inside_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "x.py"
    file.write_text("def f():\n    from ..circuit import Circuit\n    import torch.nn\n")
    assert imported(file) == ["mansu_interp.circuit", "mansu_interp.circuit.Circuit", "torch.nn"]
