"""The page "Coming from PEFT": every cell of the table of programs names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_cell_names_a_test() -> None:
    page = (ROOT / "docs" / "peft.md").read_text()
    names = set(re.findall(r"`(test_\w+)`", page))
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "reference").glob("test_peft*.py"))
    defined = set(re.findall(r"def (test_\w+)", tests))
    assert len(names) > 12
    assert not names - defined
