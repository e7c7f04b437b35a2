"""FourierFT: trained entries of a spectrum."""

import math
from pathlib import Path

import peft
import pytest
import torch

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.formats import spec_from_peft
from methods.peft_files import TARGETS, Net, from_peft, inputs, to_peft


def test_formula():
    """ΔW[p, q] = scale / (out · in) · Σ_k c_k cos 2π (p j_k / out + q l_k / in): the sum of the paper, by hand."""
    adapter = lk.attach(Net().double(), lk.FourierFT(n_frequency=7, scale=20.0), target_modules=TARGETS)
    assert adapter.num_parameters(trainable=True) == 3 * 7
    for _, site, delta in adapter.deltas():
        out, in_ = site.layout.shape.out, site.layout.shape.in_
        p, q = torch.arange(out)[:, None].double(), torch.arange(in_)[None].double()
        assert delta.places.unique().numel() == 7
        expected = torch.zeros(out, in_).double()
        for c, place in zip(delta.c.tolist(), delta.places.tolist(), strict=True):
            expected += c * torch.cos(2 * math.pi * (p * (place // in_) / out + q * (place % in_) / in_))
        torch.testing.assert_close(delta.dense(torch.empty(0)), expected * 20.0 / (out * in_))


def test_starts():
    """From zero nothing changes and all of c has a gradient."""
    model = Net().double()
    adapter = lk.attach(model, lk.FourierFT(n_frequency=7, start_zero=True), target_modules=TARGETS)
    torch.testing.assert_close(model(inputs().double()), Net().double()(inputs().double()), rtol=0, atol=1e-14)
    model(inputs().double()).square().sum().backward()
    assert all((delta.c.grad != 0).all() for _, _, delta in adapter.deltas())


def test_n_frequency_may_differ_per_layer(tmp_path: Path):
    """In Python, in PEFT's files both ways, and in lorakit.json."""
    pattern = {"second": 30, "third": 10}
    config = peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS, n_frequency_pattern=pattern)
    _, adapter = from_peft(config, tmp_path / "theirs")
    assert [delta.c.numel() for _, _, delta in adapter.deltas()] == [20, 30, 10]
    patterns = {"n_frequency": pattern}
    assert to_peft(lk.FourierFT(n_frequency=20), tmp_path / "ours", patterns=patterns) == []
    again = lk.load(Net(), tmp_path / "ours", name="again")
    assert again.targets.patterns == patterns
    assert [delta.c.numel() for _, _, delta in again.deltas()] == [20, 30, 10]


def test_refusals():
    with pytest.raises(LorakitError, match=r"rank_pattern was given, but fourierft has no rank .* layer: n_frequency"):
        lk.attach(Net(), lk.FourierFT(n_frequency=7), target_modules=TARGETS, rank_pattern={"first": 2})
    with pytest.raises(LorakitError, match="n_frequency was given as 0; it is an integer of at least 1"):
        lk.attach(Net(), lk.FourierFT(), target_modules=TARGETS, patterns={"n_frequency": {"first": 0}})
    with pytest.raises(LorakitError, match="matches none of the 3 adapted layers"):
        lk.attach(Net(), lk.FourierFT(), target_modules=TARGETS, patterns={"n_frequency": {"fist": 3}})
    with pytest.raises(LorakitError, match=r"n_frequency 97 is above the 96 places .* first \(12 × 8\)"):
        lk.attach(Net(), lk.FourierFT(n_frequency=97), target_modules=TARGETS)
    with pytest.raises(LorakitError, match="random_loc_seed"):
        spec_from_peft({"peft_type": "FOURIERFT", "random_loc_seed": None})
    with pytest.raises(LorakitError, match="scale"):
        lk.FourierFT(scale=0.0)
