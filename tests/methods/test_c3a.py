"""C3A: circulant blocks."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from methods.peft_files import TARGETS, Net, from_peft, inputs, to_peft


@pytest.mark.parametrize("size", [1, 2, 4])
def test_formula(size: int):
    """Row p of block (i, j) is its kernel turned p places to the right, over the number of inputs."""
    adapter = lk.attach(Net().double(), lk.C3A(block_size=size), target_modules=TARGETS)
    for _, site, delta in adapter.deltas():
        out, in_ = site.layout.shape.out, site.layout.shape.in_
        nn.init.normal_(delta.k)
        rows = []
        for i in range(out // size):
            rows += [torch.cat([delta.k[i, j].roll(p) for j in range(in_ // size)]) for p in range(size)]
        torch.testing.assert_close(delta.dense(torch.empty(0)), torch.stack(rows) / in_)
        x = torch.randn(3, 5, in_).double()
        torch.testing.assert_close(delta.correlate(x), x @ delta.dense(torch.empty(0)).T)
    assert adapter.num_parameters(trainable=True) == (12 * 8 + 16 * 12 + 8 * 16) // size


def test_starts():
    """Xavier's bound; from zero nothing changes and everything has a gradient."""
    adapter = lk.attach(Net(), lk.C3A(block_size=2), target_modules=TARGETS)
    for _, site, delta in adapter.deltas():
        bound = (6 / (site.layout.shape.out + site.layout.shape.in_)) ** 0.5
        assert 0.8 * bound < delta.k.abs().max() <= bound
    model = Net().double()
    adapter = lk.attach(model, lk.C3A(block_size=2, start_zero=True), target_modules=TARGETS)
    torch.testing.assert_close(model(inputs().double()), Net().double()(inputs().double()), rtol=0, atol=1e-14)
    model(inputs().double()).square().sum().backward()
    assert all((delta.k.grad != 0).all() for _, _, delta in adapter.deltas())


def test_half_precision_inputs():
    """The transform runs in single precision, so that the result is the dense one's to bfloat16's rounding."""
    adapter = lk.attach(Net(), lk.C3A(block_size=4), target_modules=TARGETS)
    _, _, delta = next(adapter.deltas())
    x = torch.randn(3, 8).bfloat16()
    y = delta.correlate(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x.float() @ delta.dense(torch.empty(0)).T, rtol=2**-8, atol=1e-6)


def test_block_size_may_differ_per_layer(tmp_path: Path):
    config = peft.C3AConfig(block_size=4, target_modules=TARGETS, block_size_pattern={"second": 2})
    _, adapter = from_peft(config, tmp_path / "theirs")
    assert [delta.spec.block_size for _, _, delta in adapter.deltas()] == [4, 2, 4]
    assert to_peft(lk.C3A(block_size=2), tmp_path / "ours", patterns={"block_size": {"third": 8}}) == []


def test_refusals():
    with pytest.raises(
        LorakitError, match=r"block_size 8 does not divide both sides of first \(12 × 8\).*1, 2, 4 would"
    ):
        lk.attach(Net(), lk.C3A(block_size=8), target_modules=TARGETS)
