"""Imports point one way, the method table and its folder agree, and no file has a name that says nothing.

Read from the source by `ast`, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit
from lorakit.edits import EDITS
from lorakit.methods import METHODS

PACKAGE = Path(lorakit.__file__).parent

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors native",
        "delta edit",
        "layout",
        "storage kernel",
        "routing rows",
        "board",
        "call replacement",
        "layer",
        "targets init methods optim edits experts",
        "anatomy table",
        "front attending seam calibration",
        "starts",
        "adapter",
        "seats construction attachment",
        "spectrum mixture folder bundle",
        "interchange fingerprint filling store",
        "algebra conversion catalogue insight",
        "peft train serve",
        "studio",
        "cli",
    )
)
"""What a module may import stands before it, or beside it within its own package or group."""

NARROW: dict[str, frozenset[str]] = {
    "methods": frozenset({"delta", "errors"}),
    "edits": frozenset({"edit", "delta", "errors"}),
    "init": frozenset({"delta", "storage", "errors"}),
    "optim": frozenset({"errors"}),
}
"""Packages that see less than their place would allow."""

EXCEPTIONS = {
    ("adapter", "store"): "Adapter.save reads best as a method",
    ("board", "adapter"): "a name in annotations only",
    ("optim", "adapter"): "a name in annotations only",
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """lorakit modules that a file imports, with whether it is for annotations only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "lorakit"
                else [node.module or ""]
            )
        for name in names:
            if name == "lorakit" or name.startswith("lorakit."):
                yield name.removeprefix("lorakit").strip("."), id(node) in typing_only


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def level(name: str) -> int:
    for index, names in enumerate(LAYERS):
        if name in names:
            return index
    raise AssertionError(f"{name} stands in no layer of this test; say where it belongs")


def test_every_module_has_its_place() -> None:
    for path in FILES:
        level(top(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = top(path)
    for imported, typing_only in imports(path):
        other = imported.split(".")[0]
        if other in ("", "__version__", own) or (
            not (PACKAGE / other).exists() and not (PACKAGE / f"{other}.py").exists()
        ):
            continue
        if (own, other) in EXCEPTIONS:
            continue
        assert not typing_only or level(other) <= level(own), f"{own} names {other} in annotations, against the arrow"
        assert level(other) <= level(own), f"{path.name} imports {imported}: {other} stands above {own}"
        if own in NARROW:
            assert other in NARROW[own] | {own}, (
                f"{path.name} imports {imported}; {own} sees {sorted(NARROW[own])} only"
            )


def test_the_exceptions_are_what_they_say() -> None:
    """adapter's import of store is inside Adapter.save alone; those of adapter are for annotations."""
    for path in [PACKAGE / "board.py", *(PACKAGE / "optim").glob("*.py")]:
        assert {typing for name, typing in imports(path) if name.split(".")[0] == "adapter"} <= {True}, path
    tree = ast.parse((PACKAGE / "adapter.py").read_text())

    def takes_store(node: ast.AST) -> bool:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        return "store" in names or (isinstance(node, ast.ImportFrom) and node.module == "lorakit.store")

    assert not [node for node in tree.body if takes_store(node)]
    holders = [
        f"{owner.name}.{function.name}"
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for function in owner.body
        if isinstance(function, ast.FunctionDef) and any(takes_store(node) for node in ast.walk(function))
    ]
    assert holders == ["Adapter.save"]


def test_no_cycles_at_import_time() -> None:
    """Among modules of one layer too: following top-level imports never comes back."""
    graph: dict[str, set[str]] = {}
    for path in [*FILES, PACKAGE / "__init__.py"]:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")
        targets: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lorakit."):
                targets.add(node.module.removeprefix("lorakit."))
        graph[module] = targets

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        for other in graph.get(module, ()):
            if other != module:
                visit(other, (*trail, module))

    for module in graph:
        visit(module, ())


FAMILIES = {"ranked": "a family that gates ranks", "rotation": "a family that rotates W"}
"""Files of methods/ that hold what several methods share, and no method."""


def test_the_method_table_is_the_folder() -> None:
    """Every row's class stands in a file of methods/, every other file but the families has a row, and names agree."""
    files = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    homes = {method.__module__.rpartition(".")[2] for method in METHODS.values()}
    assert set(FAMILIES) <= files
    assert homes == files - set(FAMILIES)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.__module__.startswith("lorakit.methods.")


def test_the_table_of_edits_is_the_folder() -> None:
    files = {path.stem for path in (PACKAGE / "edits").glob("*.py")} - {"__init__"}
    assert {edit.__module__.rpartition(".")[2] for edit in EDITS.values()} == files
    assert all(edit.name == name for name, edit in EDITS.items())


def test_files_are_named_after_what_they_hold() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "base"}
    for path in FILES:
        assert not empty & set(path.stem.split("_")), f"{path.name} says nothing of what is in it"


def test_every_module_says_what_it_is() -> None:
    for path in [*FILES, PACKAGE / "__init__.py"]:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(PACKAGE)} has no docstring"


def test_no_asserts_on_what_users_give() -> None:
    """The core raises LorakitError; nothing in it catches everything in silence."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                silent = all(isinstance(statement, ast.Pass) for statement in node.body)
                assert not (silent and caught in ("", "Exception", "BaseException")), f"{path.name}:{node.lineno}"
