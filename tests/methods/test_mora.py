"""MoRA: a square matrix between fixed compression and decompression."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError

SHAPES = [Shape(8, 6), Shape(5, 14), Shape(30, 9), Shape(6, 6), Shape(3, 40)]


def segments(x: torch.Tensor, side: int) -> list[torch.Tensor]:
    """x cut into pieces of `side`, the last one filled up with x's first entries."""
    whole = -(-len(x) // side) * side
    return list(torch.cat([x] * (2 + side // len(x)))[:whole].split(side))


def repeated(y: torch.Tensor, out: int) -> torch.Tensor:
    return torch.cat([y] * (1 + out // len(y)))[:out]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sharing(shape: Shape):
    """g(M f(x)): f sums the segments, g repeats."""
    delta = lk.MoRA(rank=2, kind="sharing").build(shape, Pool([shape])).double()
    nn.init.normal_(delta.M)
    x = torch.randn(shape.in_).double()
    side = delta.M.shape[0]
    assert side == round(math.sqrt(2 * (shape.out + shape.in_)))
    expected = repeated(delta.M @ torch.stack(segments(x, side)).sum(0), shape.out)
    torch.testing.assert_close(delta.dense(torch.empty(0)) @ x, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotation(shape: Shape):
    """Segment s is turned by the angles s · 10000^(-2k / side), entry k against entry k + side/2, and meets M alone."""
    delta = lk.MoRA(rank=2).build(shape, Pool([shape])).double()
    nn.init.normal_(delta.M)
    x = torch.randn(shape.in_).double()
    side = delta.M.shape[0]
    assert side % 2 == 0
    pieces = []
    for s, piece in enumerate(segments(x, side)):
        numbers = torch.complex(piece[: side // 2], piece[side // 2 :])
        angles = s * 10000.0 ** (-2 * torch.arange(side // 2).double() / side)
        turned = numbers * torch.polar(torch.ones_like(angles), angles)
        pieces.append(delta.M @ torch.cat([turned.real, turned.imag]))
    expected = repeated(torch.cat(pieces), shape.out)
    torch.testing.assert_close(delta.dense(torch.empty(0)) @ x, expected)
    torch.testing.assert_close(delta.segmentwise(x), expected)


def test_as_many_numbers_as_lora_at_a_higher_rank():
    shape = Shape(64, 64)
    for kind in ("sharing", "rotation"):
        spec = lk.MoRA(rank=4, kind=kind)
        delta = spec.build(shape, Pool([shape])).double()
        assert not delta.M.any()
        lora = lk.LoRA.card.parameters(shape, lk.LoRA(rank=4))
        assert abs(spec.card.parameters(shape, spec) - lora) < 0.1 * lora
        nn.init.normal_(delta.M)
        assert torch.linalg.matrix_rank(delta.dense(torch.empty(0))) >= 22


def test_rank_per_layer_and_file(tmp_path: Path):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10)).double()
    adapter = lk.attach(model, lk.MoRA(rank=2), target_modules=["0", "1"], rank_pattern={"1": 4})
    assert [delta.M.shape[0] for _, _, delta in adapter.deltas()] == [4, 8]
    adapter.save(tmp_path)
    lk.detach(model)
    assert lk.load(model, tmp_path).method == adapter.method


def test_refusals():
    with pytest.raises(LorakitError, match="kind"):
        lk.MoRA(kind="truncation")
    with pytest.raises(LorakitError, match=r"rank 7 exceeds the maximum useful rank of 0 \(6 × 8\), 6"):
        lk.attach(nn.Sequential(nn.Linear(8, 6)), lk.MoRA(rank=7), target_modules=["0"])
