"""Two adapters compared: norms, cosine, principal angles, what only one of them changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.algebra.comparison import principal_angles
from lorakit.errors import LorakitError
from reference.models import MODELS, scramble, twin


def pair(*methods: Any, targets: Any = ("q_proj",)) -> tuple[Any, list[Any]]:
    model = twin(MODELS["llama"]())
    made = [lk.attach(model, one, name=str(i), target_modules=targets) for i, one in enumerate(methods)]
    for index, adapter in enumerate(made):
        scramble(adapter.named_parameters(), seed=index)
    return model, made


def test_the_angles_are_those_that_were_put_in() -> None:
    """A plane in five dimensions, and the same turned by 30° in one direction and by 90° in the other."""
    U = torch.eye(5).double()[:, :2]
    angle = math.radians(30)
    V = torch.zeros(5, 2).double()
    V[0, 0], V[2, 0] = math.cos(angle), math.sin(angle)
    V[3, 1] = 1.0
    found = principal_angles(U, V)
    assert found.least == pytest.approx(30)
    assert found.largest == pytest.approx(90)
    assert found.overlap == pytest.approx(math.cos(angle) ** 2 / 2)


@pytest.mark.parametrize(
    "methods", [(lk.LoRA(rank=2), lk.LoRA(rank=3)), (lk.LoRA(rank=2), lk.DoRA(inner=lk.LoRA(rank=2)))]
)
def test_numbers_are_those_of_the_matrices(methods: Any) -> None:
    from lorakit.algebra.sources import Live

    _, (one, other) = pair(*methods)
    found = lk.diff(one, other)
    ours, theirs = Live(one, "test"), Live(other, "test")
    for place, row in found.layers.items():
        a, b = ours.change(place).dense(), theirs.change(place).dense()
        assert row.norms == pytest.approx((float(a.norm()), float(b.norm())))
        assert row.distance == pytest.approx(float((a - b).norm()))
        assert row.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
    whole = torch.cat([ours.change(p).dense() - theirs.change(p).dense() for p in found.layers])
    assert found.distance == pytest.approx(float(whole.norm()))


def test_the_same_and_the_opposite() -> None:
    _, (one, other) = pair(lk.LoRA(rank=2), lk.LoRA(rank=2))
    turned = lk.scale(one, -2.0).adapter
    found = lk.diff(one, turned)
    assert found.cosine == pytest.approx(-1.0)
    assert found.distance == pytest.approx(3 * found.norms[0])
    for row in found.layers.values():
        assert row.columns is not None
        assert row.rows is not None
        assert row.columns.largest < 1e-3
        assert row.rows.overlap == pytest.approx(1.0)
    apart = lk.diff(one, other)
    assert abs(apart.cosine) < 0.5
    assert all(row.columns is not None and row.columns.overlap < 0.9 for row in apart.layers.values())
    with torch.no_grad():
        for _, _, delta in one.deltas():
            delta.B.zero_()
    nothing = lk.diff(one, other)
    assert all(row.columns is None and row.cosine == 0.0 for row in nothing.layers.values())


def test_what_only_one_changes_counts(tmp_path: Path) -> None:
    model = twin(MODELS["llama"]())
    one = lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["q_proj", "v_proj"])
    other = lk.attach(model, lk.LoRA(rank=2), name="other", target_modules=["v_proj"])
    third = lk.attach(model, lk.LoRA(rank=2), name="third", target_modules=["up_proj"])
    for index, adapter in enumerate((one, other, third)):
        scramble(adapter.named_parameters(), seed=index)
    found = lk.diff(one, other)
    assert {place.rpartition(".")[2] for place in found.alone[0]} == {"q_proj"}
    assert found.alone[1] == ()
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    again = lk.diff(tmp_path / "one", tmp_path / "other")
    assert again.distance == pytest.approx(found.distance, rel=1e-5)
    with pytest.raises(LorakitError, match="one and third change no matrix in common"):
        lk.diff(one, third)
    with pytest.raises(LorakitError, match="rank was given as 0"):
        lk.diff(one, other, rank=0)
    assert lk.diff(one, other, rank=1).layers
