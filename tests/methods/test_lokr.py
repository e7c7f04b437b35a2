"""LoKr: the Kronecker product and its fast form, the sizes of its factors, its scale rules, PEFT's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

import lorakit as lk
from lorakit.core.call import LayerCall
from lorakit.core.delta import Pool, Shape
from lorakit.core.sites import sites_of
from lorakit.errors import LorakitError
from lorakit.files.store import read_config
from lorakit.methods.lokr import LoKrDelta, split_size
from methods.both_ways import both_ways, trained_by_peft


def filled(spec: lk.LoKr, shape: Shape) -> LoKrDelta:
    torch.manual_seed(0)
    delta = spec.build(shape, Pool()).double()
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    assert isinstance(delta, LoKrDelta)
    return delta


@pytest.mark.parametrize(
    "spec",
    [
        lk.LoKr(rank=1),
        lk.LoKr(rank=1, alpha=3.0, decompose_both=True),
        lk.LoKr(rank=9, alpha=3.0),
        lk.LoKr(rank=1, factor=3),
    ],
)
def test_formula_and_fast_form(spec: lk.LoKr) -> None:
    """Row (a, b) of the product is a · o2 + b, column (c, d) is c · i2 + d."""
    layer = nn.Linear(15, 24, bias=False).double()
    delta = filled(spec, Shape(24, 15))
    C = delta.C if "C" in delta.names else delta.C_a @ delta.C_b
    D = delta.D if "D" in delta.names else delta.D_a @ delta.D_b
    expected = torch.einsum("ac,bd->abcd", C, D).reshape(24, 15) * (spec.alpha / spec.rank)
    torch.testing.assert_close(delta.dense(layer.weight), expected)
    x = torch.randn(2, 3, 15, dtype=torch.float64)
    torch.testing.assert_close(delta.act(LayerCall(layer, sites_of(layer)[0], x, None)), x @ expected.T)
    form = delta.form(layer.weight, None)
    torch.testing.assert_close(form.B @ form.A, expected)
    rank = torch.linalg.matrix_rank(C) * torch.linalg.matrix_rank(D)
    assert torch.linalg.matrix_rank(expected) == rank


def test_which_factors_are_whole() -> None:
    assert filled(lk.LoKr(rank=2), Shape(64, 36)).names == ("C", "D_a", "D_b")
    assert filled(lk.LoKr(rank=2, decompose_both=True), Shape(64, 36)).names == ("C_a", "C_b", "D_a", "D_b")
    assert filled(lk.LoKr(rank=4), Shape(64, 36)).names == ("C", "D")  # half of max(8, 6)


def test_scale_rules() -> None:
    assert filled(lk.LoKr(rank=4, alpha=2.0), Shape(64, 36)).scale == 0.5
    assert filled(lk.LoKr(rank=4, alpha=2.0, scale_rule="lycoris"), Shape(64, 36)).scale == 1.0
    assert filled(lk.LoKr(rank=2, alpha=2.0, scale_rule="lycoris"), Shape(64, 36)).scale == 1.0  # alpha / rank
    assert filled(lk.LoKr(rank=2, alpha=6.0, scale_rule="lycoris"), Shape(64, 36)).scale == 3.0


def test_sizes() -> None:
    known = {127: (1, 127), 128: (8, 16), 250: (10, 25), 360: (18, 20), 768: (24, 32), 1024: (32, 32), 11008: (86, 128)}
    assert {size: split_size(size) for size in known} == known
    for size in range(1, 150):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100):
            assert split_size(size, factor) == factorization(size, factor), (size, factor)


def test_with_a_scalar_c_it_is_lora() -> None:
    """Sizes without divisors: C is one number and D the low-rank product."""
    delta = filled(lk.LoKr(rank=2, alpha=2.0), Shape(13, 11))
    assert delta.C.shape == (1, 1)
    torch.testing.assert_close(delta.dense(torch.zeros(13, 11)), delta.C * (delta.D_a @ delta.D_b))


def test_parameters() -> None:
    model = nn.Sequential(nn.Linear(36, 64))
    adapter = lk.attach(model, lk.LoKr(rank=2), target_modules=["0"])
    assert adapter.num_parameters() == 8 * 6 + 2 * (8 + 6)
    assert lk.LoKr.card.parameters(Shape(1536, 576), lk.LoKr(rank=16)) == 1920, "the number in the docstring"


def test_whole_d_in_peft_on_one_dimensional_convolutions() -> None:
    """Not exchanged: for Conv1d with a whole D, PEFT multiplies a matrix with an array of three axes, so that C meets the
    wrong axes and the result, reshaped, is no Kronecker product of channels. (For Conv2d it adds the missing axes.)"""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv1d(4, 6, 3)).double()
    wrapped = trained_by_peft(layer, peft.LoKrConfig(target_modules=["0"], r=4, alpha=4))
    conv = wrapped.base_model.model[0]
    C, D = conv.lokr_w1["default"], conv.lokr_w2["default"]
    assert D.shape == (3, 2, 3)
    product = torch.einsum("ac,bdk->abcdk", C, D).reshape(6, 4, 3)
    found = conv.get_delta_weight("default")
    assert (found - product).abs().max() > 0.01
    garbled = torch.einsum("ac,bdk->badck", C, D).reshape(6, 4, 3)
    torch.testing.assert_close(found, garbled)


def test_whole_d_on_one_dimensional_convolutions_is_not_exchanged_with_peft(tmp_path: Path) -> None:
    """Theirs is refused; ours is read here, is not called PEFT's, and goes through LyCORIS' format and back."""

    def model() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 6, 3))

    trained_by_peft(model(), peft.LoKrConfig(target_modules=["0"], r=4, alpha=4)).save_pretrained(
        str(tmp_path / "theirs")
    )
    with pytest.raises(LorakitError, match=r"lokr_w2 is of a Conv1d, on which PEFT's LoKr with a whole w2"):
        lk.load(model(), tmp_path / "theirs")
    with pytest.raises(LorakitError, match="of a Conv1d"):
        lk.convert(tmp_path / "theirs", None, "lycoris")
    ours, x = model(), torch.randn(2, 4, 9)
    adapter = lk.attach(ours, lk.LoKr(rank=4), name="a", target_modules=["0"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapter.save(tmp_path / "ours")
    lk.convert(tmp_path / "ours", tmp_path / "a.safetensors", "lycoris")
    lk.convert(tmp_path / "a.safetensors", tmp_path / "back", "peft", base=model())
    for name in ("ours", "back"):
        assert read_config(tmp_path / name)["peft_type"] == "LOKR_CONV1D"
        again = model()
        lk.load(again, tmp_path / name)
        torch.testing.assert_close(again(x), ours(x))


def test_lycoris_scale_in_a_peft_file(tmp_path: Path) -> None:
    """PEFT has one rule of scale; the other is written as the alpha that gives the same."""
    spec = lk.LoKr(rank=6, alpha=2.0, scale_rule="lycoris")
    both_ways("llama", peft.LoKrConfig(target_modules=["q_proj"], r=6, alpha=6), spec, tmp_path)


def test_refusals() -> None:
    with pytest.raises(LorakitError, match="factor was given as 0"):
        lk.LoKr(factor=0)
    with pytest.raises(LorakitError, match="scale_rule was given as 'sum'"):
        lk.LoKr(scale_rule="sum")
