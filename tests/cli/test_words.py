"""Words that users see: the field's own, so that they can be searched for, and none that was translated word by word."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

import lorakit
from lorakit.errors import plural

PACKAGE = Path(lorakit.__file__).parent
ROOT = Path(__file__).parents[2]

ODD = (
    r"says what it says", r"\bgo(es)? on (regardless|with it|from)", r"\bin few bits\b", r"\bshared beginnings\b",
    r"\bflat rows\b", r"\bwhere labels are\b", r"\bof no format\b", r"\bfloats from /", r"weights: asked for",
    r"\b(begin|start|drawn?|draws|weighs|written|read|made)(ing)? anew\b", r"\bcannot say more than\b",
    r"\bturns it round\b", r"\bours to theirs\b", r"\bthe very bits\b", r"\band (its|their) kin\b", r"\bact whole or not\b",
    r"small range needs", r"\bis no option of\b", r"\bsaw nothing unusual\b", r"\bto go on with a text\b",
    r"\bthat end so\b", r"\btold what to\b", r"\bhold .* now\b",
)  # fmt: skip
"""Sentences of a kind that nobody in the field would write or search for."""

WORDS = ("checkpointing", "packing", "device", "gpu", "neftune", "overwrite", "quantise", "early stopping", "ema")
"""What users look for in `lorakit train --help`."""


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file that are no documentation of its code."""
    tree = ast.parse(path.read_text())
    silent = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.lineno, node.value


def test_no_sentence_is_translated_word_by_word() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in PACKAGE.rglob("*.py")
        for line, text in texts(path)
        for odd in ODD
        if (match := re.search(odd, text, re.IGNORECASE))
    ]
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.name != "files.md")]
    found += [
        f"{page.relative_to(ROOT)}: {match[0]}"
        for page in pages
        for odd in ODD
        if (match := re.search(odd, page.read_text(), re.IGNORECASE))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("word", WORDS)
def test_the_help_has_the_words_of_the_field(word: str, lorakit: Callable[..., Result]) -> None:
    assert word in lorakit("train", "--help").stdout.lower()


def test_counts_and_their_nouns() -> None:
    assert [plural(count, "row") for count in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert plural(1, "batch", "batches") == "1 batch"
    counted = re.compile(r"(?<![\w.{\[-])1 (rows|layers|adapters|steps|tokens|examples|checkpoints)\b")
    found = [f"{path}: {text}" for path in PACKAGE.rglob("*.py") for _, text in texts(path) if counted.search(text)]
    assert not found
