"""The QLoRA benchmark fails where the accuracy is not kept, or the float copy is another model."""

from __future__ import annotations

from typing import Any

import pytest

import qlora


def sides(nf4: float, copy: float) -> dict[str, dict[str, Any]]:
    return {"bf16": {"accuracy": 0.85}, "nf4": {"accuracy": nf4, "copy_accuracy": copy}}


def test_what_is_kept_is_not_missed() -> None:
    assert qlora.missed(sides(0.84, 0.836)) == []
    assert qlora.missed(sides(0.88, 0.88)) == []


@pytest.mark.parametrize(
    ("nf4", "copy", "said"), [(0.83, 0.83, "NF4 is 2.0 points below"), (0.85, 0.80, "5.0 points off")]
)
def test_what_is_lost_is_said(nf4: float, copy: float, said: str) -> None:
    (line,) = qlora.missed(sides(nf4, copy))
    assert said in line
