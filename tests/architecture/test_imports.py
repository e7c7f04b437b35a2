"""Imports point one way, the method table and its folder agree, and no file has a name that says nothing.

Read from the source by `ast`, so that an import inside a function or for annotations only counts as any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit
from lorakit.edits import EDITS
from lorakit.methods import METHODS, WHOLE

PACKAGE = Path(lorakit.__file__).parent

FLOORS: tuple[str, ...] = (
    "errors native",
    "reading",
    "core",
    "methods models",
    "init edits",
    "adapter",
    "experts optim",
    "files",
    "algebra conversion insight train",
    "peft serve",
    "cli",
)
"""The rooms, from the ground up. A room imports from the floors below its own and from itself, nothing else."""

NARROW: dict[str, frozenset[str]] = {
    "methods": frozenset({"core", "errors"}),
    "optim": frozenset({"adapter", "core", "errors"}),
}
"""Rooms that see less than their floor would allow."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its name below it ("core.layer"; "" for the package itself)."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """`(line, module)` of everything of lorakit that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            names = [ast.literal_eval(node.args[0])] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for name in names:
            if name == "lorakit" or name.startswith("lorakit."):
                steps = name.split(".")[1:]
                yield (
                    node.lineno,
                    next(
                        found
                        for found in (".".join(steps[:end]) for end in range(len(steps), -1, -1))
                        if found in known
                    ),
                )


def room(module: str) -> str:
    return module.partition(".")[0]


def upward(package: Path) -> list[str]:
    """Every import that does not go down, as one line each. The package's own file has the public names and may see all."""
    known = modules(package)
    wrong = []
    for module, path in known.items():
        own = room(module)
        if not own:
            continue
        assert own in FLOOR, f"{own} stands on no floor of this test; say where it belongs"
        for line, other in imports(path, known):
            if not other and own != "cli":  # the command line uses the library as its users do
                if "from lorakit import __version__" not in path.read_text().splitlines()[line - 1]:
                    wrong.append(f"{module}:{line} imports the package itself, whose names come from everywhere")
            elif other and room(other) != own and FLOOR[room(other)] >= FLOOR[own]:
                wrong.append(f"{module}:{line} imports {other}, which stands on its own floor or above")
            elif other and room(other) != own and room(other) not in NARROW.get(own, FLOOR):
                wrong.append(f"{module}:{line} imports {other}; {own} sees {sorted(NARROW[own])} only")
    return wrong


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other, whether at the top, inside functions or for annotations."""
    known = modules(package)
    graph = {
        module: {other for _, other in imports(path, known) if other not in ("", module)}
        for module, path in known.items()
    }
    reach: dict[str, set[str]] = {}
    for module in graph:
        seen: set[str] = set()
        todo = [module]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reach[module] = seen
    found = {
        tuple(sorted(one for one in reach[module] if module in reach[one]))
        for module in graph
        if module in reach[module]
    }
    return [list(group) for group in sorted(found)]


def test_imports_go_down_the_floors() -> None:
    assert upward(PACKAGE) == []


def test_no_module_comes_back_to_itself() -> None:
    assert circles(PACKAGE) == []


PLANTED = {
    "top": "from lorakit.cli.screen import err\n",
    "in a function": "def late():\n    from lorakit.cli import screen\n",
    "for annotations": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lorakit.cli.screen\n",
    "by name": "from importlib import import_module\nimport_module('lorakit.cli.screen')\n",
    "the package": "from lorakit import attach\n",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's imports without the rest of it."""
    known = modules(PACKAGE)
    for path in known.values():
        lines = (f"    import lorakit.{other}" for _, other in imports(path, known) if other)
        there = tmp_path / path.relative_to(PACKAGE)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text("def imported():\n    pass\n" + "\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_an_upward_import_is_seen(copy: Path, planted: str) -> None:
    assert upward(copy) == []
    with (copy / "core/kernel.py").open("a") as file:
        file.write("\n" + planted)
    assert [line for line in upward(copy) if line.startswith("core.kernel:")]


def test_a_circle_is_seen(copy: Path) -> None:
    assert circles(copy) == []
    with (copy / "core/kernel.py").open("a") as file:
        file.write("\n\ndef late():\n    from lorakit.core.layer import Adapted\n")
    assert [group for group in circles(copy) if "core.kernel" in group and "core.layer" in group]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


FAMILIES = {
    "options": "options that several methods have",
    "rotation": "a family that rotates W",
    "fromweight": "a family whose factors are made of W",
}
"""Files of methods/ that hold what several methods share, and no method."""


def test_the_method_table_is_the_folder() -> None:
    """Every row's class stands in a file of methods/, every other file but the families has a row, and names agree."""
    files = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    homes = {method.__module__.rpartition(".")[2] for method in {**METHODS, **WHOLE}.values()}
    assert set(FAMILIES) <= files
    assert homes == files - set(FAMILIES)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.__module__.startswith("lorakit.methods.")


BESIDE_EDITS = {
    "contract": "what every edit fulfils",
    "anatomy": "what a transformer is made of",
    "hooks": "where edits meet a model's calls",
    "prompt_rows": "rows in front of the input",
    "rows": "which row of a batch has which edit",
    "attention": "keys and values beside an attention's",
}
"""Files of edits/ that hold what the edits share, and no edit."""


def test_the_table_of_edits_is_the_folder() -> None:
    files = {path.stem for path in (PACKAGE / "edits").glob("*.py")} - {"__init__"}
    assert set(BESIDE_EDITS) <= files
    assert {edit.__module__.rpartition(".")[2] for edit in EDITS.values()} == files - set(BESIDE_EDITS)
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


def test_adapters_and_methods_know_no_task() -> None:
    """A task is a row of `lorakit.train.tasks`; what an adapter is on a model does not depend on it."""
    from lorakit.models.tasks import TASKS

    names = set(TASKS) - {"embeddings", "features"}  # which are words of their own
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} says {node.value!r}"
        for below in ("core", "methods", "init", "edits", "adapter")
        for path in (PACKAGE / below).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not found, found
    assert any(isinstance(node, ast.Constant) and node.value in names for node in ast.walk(ast.parse(
        (PACKAGE / "train" / "tasks" / "token_cls.py").read_text()
    )))  # fmt: skip
