"""SHiRA: trained entries at fixed places."""

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from methods.peft_files import TARGETS, Net


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_formula(mask: str):
    """ΔW holds the values at their places and is zero elsewhere; rank · (out + in) of them."""
    torch.manual_seed(6)
    model = Net().double()
    adapter = lk.attach(model, lk.SHiRA(rank=2, mask=mask), target_modules=TARGETS)
    assert adapter.num_parameters(trainable=True) == 2 * (12 + 8 + 16 + 12 + 8 + 16)
    for path, _, delta in adapter.deltas():
        nn.init.normal_(delta.values)
        W = model.get_submodule(path).base.weight
        expected = torch.zeros_like(W)
        for value, (row, column) in zip(delta.values.tolist(), delta.indices.T.tolist(), strict=True):
            assert expected[row, column] == 0
            expected[row, column] = value
        torch.testing.assert_close(delta.dense(W), expected)
        if mask == "magnitude":
            held = W[expected != 0].abs().min()
            assert held >= W[expected == 0].abs().max()


def test_seeds():
    """A seed gives the same places again, in PEFT too; without one every layer and adapter has its own."""

    def places(seed: int | None, start: int = 0) -> list[torch.Tensor]:
        model = Net()
        torch.manual_seed(start)
        adapter = lk.attach(model, lk.SHiRA(rank=1, seed=seed), target_modules=TARGETS)
        return [delta.indices for _, _, delta in adapter.deltas()]

    assert all(torch.equal(a, b) for a, b in zip(places(3, 0), places(3, 1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(places(None, 0), places(None, 1), strict=True))
    theirs = peft.get_peft_model(Net(), peft.ShiraConfig(r=1, random_seed=3, target_modules=TARGETS))
    for path, own in zip(TARGETS, places(3), strict=True):
        assert torch.equal(theirs.get_submodule(f"base_model.model.{path}").shira_indices["default"], own)


def test_refusals():
    with pytest.raises(LorakitError, match=r"rank 5 asks for 100 .* first, which has 96 \(12 × 8\).*4 or less"):
        lk.attach(Net(), lk.SHiRA(rank=5), target_modules=TARGETS)
    with pytest.raises(LorakitError, match="mask"):
        lk.SHiRA(mask="gradient")
