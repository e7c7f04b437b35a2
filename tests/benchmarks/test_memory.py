"""The memory benchmark says which prediction is off, and by how much."""

from __future__ import annotations

import memory
from lorakit.insight.plan import Plan

SIDE = {
    "parts": {"base": 1000, "adapter": 0, "gradients": 100, "optimiser": 200, "activations": 300, "total": 1600},
    "grew": 5e6,
}


def planned(activations: int) -> Plan:
    return Plan("lora", 500, 25, 1000, 0, 100, 200, activations)


def test_within_a_tenth_nothing_is_missed() -> None:
    lines, missed = memory.rows_of({"lora": SIDE}, {"lora": planned(320)})
    assert not missed
    assert len(lines) == 5, "a part that neither has is left out"


def test_beyond_it_the_part_is_named() -> None:
    lines, missed = memory.rows_of({"lora": SIDE}, {"lora": planned(400)})
    assert [line.split(":")[0] for line in missed] == ["lora, activations"]
    assert any("+33.3%" in line and "**off**" in line for line in lines)
