"""VeRA: its formula, the shared pair, the file with and without it."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.store import read_tensors
from methods.peft_files import TARGETS, Net, from_peft, to_peft


def attached(**options: object) -> tuple[nn.Module, lk.Adapter]:
    model = Net().double()
    return model, lk.attach(model, lk.VeRA(rank=6, **options), target_modules=TARGETS)


def test_formula():
    """h = W0 x + Λ_b B Λ_d A x (equation 2 of the paper), with the leading rows and columns of one pair."""
    _, adapter = attached()
    A, B = adapter.pool.vera_A, adapter.pool.vera_B
    assert A.shape == (6, 16)
    assert B.shape == (16, 6)
    for _, site, delta in adapter.deltas():
        nn.init.normal_(delta.lambda_b)
        nn.init.normal_(delta.lambda_d)
        out, in_ = site.layout.shape.out, site.layout.shape.in_
        expected = torch.diag(delta.lambda_b) @ B[:out] @ torch.diag(delta.lambda_d) @ A[:, :in_]
        torch.testing.assert_close(delta.dense(torch.zeros(out, in_)), expected)


def test_start_and_counts():
    """λ_d = 0.1, λ_b = 0; A and B within √(6 / fan in); 43,008 numbers for RoBERTa-base's q and v at rank 1024."""
    _, adapter = attached()
    for _, _, delta in adapter.deltas():
        torch.testing.assert_close(delta.lambda_d.float(), torch.full((6,), 0.1), rtol=0, atol=0)
        assert not delta.lambda_b.any()
    assert 0.9 * (6 / 16) ** 0.5 < adapter.pool.vera_A.abs().max() <= (6 / 16) ** 0.5
    assert 0.9 < adapter.pool.vera_B.abs().max() <= 1
    assert adapter.num_parameters(trainable=True) == sum(6 + out for out in (12, 16, 8))
    shape = lk.core.delta.Shape(768, 768)
    assert 24 * lk.VeRA.card.parameters(shape, lk.VeRA(rank=1024)) == 43_008


def test_only_lambda_b_moves_in_the_first_step():
    model, adapter = attached()
    model(torch.randn(3, 8).double()).square().sum().backward()
    for _, _, delta in adapter.deltas():
        assert delta.lambda_b.grad.abs().max() > 0
        assert not delta.lambda_d.grad.any()


def test_the_pair_is_one_and_comes_from_the_seed():
    first, second, other = (attached(seed=seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first.pool.vera_A, second.pool.vera_A)
    assert not torch.equal(first.pool.vera_A, other.pool.vera_A)
    pairs = {delta.projections()[1].data_ptr() for _, _, delta in first.deltas()}
    assert len(pairs) == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("saved", [True, False])
def test_peft(saved: bool, transposed: bool, tmp_path: Path):
    """Without the projections in the file the seed gives the same ones on both sides."""
    config = peft.VeraConfig(r=6, target_modules=TARGETS, projection_prng_key=5, save_projection=saved)
    _, adapter = from_peft(config, tmp_path / "theirs", transposed)
    assert adapter.method == lk.VeRA(rank=6, seed=5, save_projection=saved)
    assert to_peft(lk.VeRA(rank=6, seed=7, save_projection=saved), tmp_path / "ours", transposed) == []
    assert ("base_model.vera_A" in read_tensors(tmp_path / "ours")) == saved


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"d_initial": 0.0}, {"dropout": 1.0}])
def test_refusals(wrong: dict[str, float]):
    with pytest.raises(LorakitError, match=next(iter(wrong))):
        lk.VeRA(**wrong)
