"""The table of features says what is so: every "yes" of lorakit's names tests, and these exist."""

from __future__ import annotations

import ast
import re

import pytest

from docs.conftest import ROOT

PAGE = (ROOT / "docs" / "features.md").read_text()
TESTS = {int(number): test for number, test in re.findall(r"^(\d+)\. `(\S+)`$", PAGE, re.MULTILINE)}
CELLS = dict(re.findall(r"^\| (?!\*\*)([^|]+) \| ((?:yes|no)[^|]*) \|", PAGE, re.MULTILINE))


def test_a_yes_is_shown_and_a_no_shows_nothing() -> None:
    used: set[int] = set()
    for feature, cell in CELLS.items():
        shown = re.search(r"\(([\d, ]+)\)$", cell)
        assert bool(shown) == cell.startswith("yes"), f"{feature}: {cell}"
        used |= {int(number) for number in shown[1].split(", ")} if shown else set()
    assert used == set(TESTS)
    assert len(CELLS) > 40


@pytest.mark.parametrize("test", TESTS.values())
def test_the_tests_are_there(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
