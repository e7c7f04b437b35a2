"""Imports within the server point one way: an engine knows no HTTP, HTTP knows no engine, both know the contract alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorakit

SERVE = Path(lorakit.__file__).parent / "serve"
SEES: dict[str, set[str]] = {
    "request": set(),
    "load": set(),
    "store": {"request"},
    "lifecycle": {"request"},
    "limits": set(),
    "grammar": {"request"},
    "model": {"request", "store", "limits"},
    "engine": {"request", "store", "lifecycle", "model"},
    "remote": {"request", "store", "lifecycle", "limits"},
    "http": {"request", "limits", "grammar"},
}
"""Room or file of `serve` -> what else of `serve` it imports."""

STARTS = {"cluster.py: engine"}
"""A replica of the cluster is an engine in a process of its own."""


def imported(path: Path) -> set[str]:
    """The rooms of `serve` that a file imports, wherever the import stands."""
    found = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[2] for name in found if name.startswith("lorakit.serve.")}


def test_every_file_of_the_room_is_in_the_table() -> None:
    assert {path.stem for path in SERVE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == {
        "__init__",
        *SEES,
    }


@pytest.mark.parametrize("room", SEES)
def test_imports_point_one_way(room: str) -> None:
    files = [*(SERVE / room).glob("*.py")] or [SERVE / f"{room}.py"]
    wrong = {f"{path.name}: {other}" for path in files for other in imported(path) - {room} - SEES[room]}
    assert wrong - STARTS == set()
