"""What the soak keeps of its runs. (The soak itself: tests/api/test_soak.py.)"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import soak


def test_the_outcome_stands_beside_that_of_the_other_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RESULTS", tmp_path / "soak.json")
    seen = Counter({"answered": 1200, "left": 7, "refused 404": 2, "pin refused": 1, "load": 3, "changed": 4})
    soak.record(600.0, 0, [], seen, [5e8, 7e8, 6e8])
    soak.record(600.0, 2, ["an answer differed"], seen + Counter(killed=5), [5e8, 5e8])
    soak.record(600.0, 0, [], seen, [4e8, 7e8, 6e8])
    table = soak.RESULTS.read_text()
    assert "| 600 | 1,200 | 7 | 3 | 7 | 0 | 400, 700, 600 MB | 0 |" in table
    assert "| 600 | 1,200 | 7 | 3 | 7 | 5 | 500, 500, 500 MB | 1 |" in table
    assert table.count("one process") == 2, "once as data, once in the table"
