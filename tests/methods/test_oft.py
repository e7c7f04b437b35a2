"""OFT: rotations, their two parametrisations, COFT, sizes, PEFT's files and where PEFT is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError
from lorakit.files.formats import spec_from_peft
from lorakit.methods.oft import OFTDelta
from methods.both_ways import both_ways, trained_by_peft
from reference.models import MODELS, assert_same, logits, quiet, twin


def filled(spec: lk.OFT, shape: Shape, size: float = 0.3) -> OFTDelta:
    torch.manual_seed(0)
    delta = spec.build(shape, Pool()).double()
    assert isinstance(delta, OFTDelta)
    nn.init.normal_(delta.Q, std=size)
    return delta


def rotation(delta: OFTDelta) -> Tensor:
    """R, whole."""
    return torch.eye(delta.size, dtype=torch.float64) + delta.change(torch.eye(delta.size, dtype=torch.float64))


def test_formula() -> None:
    """W' = W Rᵀ with R_j = (I + Q)(I - Q)⁻¹ of the skew Q; the exact form's triangle has PEFT's sign."""
    delta = filled(lk.OFT(block_size=3, exact=True), Shape(5, 6))
    I = torch.eye(3, dtype=torch.float64)  # noqa: E741
    blocks = []
    for a, b, c in delta.Q:
        Q = -torch.stack([torch.stack([0 * a, a, b]), torch.stack([-a, 0 * a, c]), torch.stack([-b, -c, 0 * a])])
        blocks.append((I + Q) @ torch.linalg.inv(I - Q))
    R = torch.block_diag(*blocks)
    W = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(rotation(delta), R)
    torch.testing.assert_close(W + delta.dense(W), W @ R.T)


def test_it_turns_and_does_nothing_else() -> None:
    """R Rᵀ = I, det R = 1, and lengths of and angles between W's rows stay."""
    delta = filled(lk.OFT(block_size=4, exact=True), Shape(5, 8))
    R = rotation(delta)
    torch.testing.assert_close(R @ R.T, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=torch.float64))
    W = torch.randn(5, 8, dtype=torch.float64)
    turned = W + delta.dense(W)
    torch.testing.assert_close(turned @ turned.T, W @ W.T)


def test_the_series_approaches_the_exact_form() -> None:
    """With the other sign in the file both are one function of Q; the difference falls like ‖Q‖⁵ for five terms."""
    errors = []
    for size in (0.02, 0.04):
        exact, series = (filled(lk.OFT(block_size=4, exact=e), Shape(5, 8), size) for e in (True, False))
        with torch.no_grad():
            exact.Q.copy_(-series.Q)
        errors.append((rotation(exact) - rotation(series)).abs().max().item())
    assert 2**3.5 < errors[1] / errors[0] < 2**4.5, "the last term, Q⁴, has coefficient 1 instead of 2"
    Q = series.skew()
    I = torch.eye(4, dtype=torch.float64)  # noqa: E741
    torch.testing.assert_close(I + series.turns(), I + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)


def test_coft_keeps_every_block_in_its_ball() -> None:
    spec = lk.OFT(block_size=4, coft=True, eps=0.5)
    delta = filled(spec, Shape(5, 8))
    with torch.no_grad():
        delta.Q[1] *= 0.01
    norms = torch.linalg.matrix_norm(delta.skew())
    radius = 0.5 / 2**0.5  # two blocks
    assert norms[0].item() == pytest.approx(radius)
    assert norms[1].item() == pytest.approx((2 * delta.Q[1].square().sum()).sqrt().item()), "inside nothing changes"
    before = delta.Q.detach().clone()
    delta.dense(torch.randn(5, 8, dtype=torch.float64)).sum().backward()
    assert torch.equal(delta.Q, before), "the parameter is not overwritten"
    assert torch.isfinite(delta.Q.grad).all()
    at_start = filled(spec, Shape(5, 8), 0.0)
    at_start.dense(torch.randn(5, 8, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(at_start.Q.grad).all()
    assert at_start.Q.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (lk.OFT(block_size=8), 40 * 7 // 2),
        (lk.OFT(blocks=4), 40 * 9 // 2),
        (lk.OFT(block_size=8, block_share=True), 8 * 7 // 2),
    ],
)
def test_parameters(spec: lk.OFT, count: int) -> None:
    """in (c - 1) / 2, or one block's c (c - 1) / 2; more blocks are fewer numbers."""
    model = nn.Sequential(nn.Linear(40, 20))
    assert lk.attach(model, spec, target_modules=["0"]).num_parameters() == count


def test_an_embedding_turns_its_features() -> None:
    model = nn.Sequential(nn.Embedding(11, 6)).double()
    table = model[0].weight.detach().clone()
    lk.attach(model, lk.OFT(block_size=2, exact=True), target_modules=["0"])
    delta = model[0].deltas_of("default")[""]
    assert delta.Q.shape == (3, 1)
    nn.init.normal_(delta.Q)
    ids = torch.arange(11)
    torch.testing.assert_close(model(ids), table @ rotation(delta))


def test_dropout_leaves_whole_blocks_out() -> None:
    delta = filled(lk.OFT(block_size=2, dropout=0.5), Shape(5, 16)).train()
    x = torch.ones(1, 16, dtype=torch.float64)
    untouched = (delta.change(x).reshape(8, 2) == 0).all(1)
    assert untouched.sum() == 4
    assert not (delta.eval().change(x).reshape(8, 2) == 0).all(1).any()


def test_one_product_and_the_cheaper_side() -> None:
    """The base's product is not run apart; with gradients the inputs are turned, so that no gradient is as large as W."""
    layer = nn.Sequential(nn.Linear(8, 6)).double()
    lk.attach(layer, lk.OFT(block_size=4), target_modules=["0"])
    nn.init.normal_(layer[0].deltas_of("default")[""].Q)
    x = torch.randn(50, 8, dtype=torch.float64)
    y = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
        with lk.merged(layer, "default"):
            torch.testing.assert_close(layer(x), y)


def test_biases_beside_it(tmp_path: Path) -> None:
    """PEFT's word for the biases of adapted layers is each method's own, here "oft_only"; ours is "lora_only" for all."""
    config = peft.OFTConfig(target_modules=["query", "dense"], oft_block_size=8, bias="oft_only")
    both_ways("bert", config, lk.OFT(block_size=8), tmp_path, bias="lora_only")


def test_peft_flag_turns_a_file_around(tmp_path: Path) -> None:
    """PEFT's two branches are inverse rotations (methods.md 4.8): the same tensors with the flag changed turn back. Here
    they do as well, because the file means what PEFT makes of it."""
    base = MODELS["llama"]()
    config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, use_cayley_neumann=False)
    wrapped = trained_by_peft(twin(base), config, 0.05)
    module = wrapped.base_model.model.model.layers[0].self_attn.q_proj.oft_R["default"]
    exact = module.get_weight()
    module.use_cayley_neumann = True
    series = module.get_weight()
    assert (exact @ series - torch.eye(24, dtype=torch.float64)).abs().max() < 1e-2
    assert (exact - series).abs().max() > 0.05


def test_sizes_that_peft_adjusted(tmp_path: Path) -> None:
    """PEFT takes the nearest block size that divides; its files are read, a new adapter is told."""
    base = MODELS["llama"]()
    config = peft.OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=16)
    wrapped = trained_by_peft(twin(base), config)
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    lk.load(base, tmp_path, name="a")
    with lk.use(base, "a"):
        assert_same(logits(base, "llama"), logits(wrapped, "llama"))
    with pytest.raises(LorakitError, match=r"block_size 16 does not divide 24. Near it 6, 8, 12, 24 do"):
        lk.attach(base, lk.OFT(block_size=16), target_modules=["q_proj"])


def test_convolutions_with_a_kernel_are_not_exchanged() -> None:
    """PEFT turns unfolded patches and folds them back, which sums where they overlap: its OFT on such a Conv2d is not the
    identity at the start and disagrees with its own merged form (peft.md 7.9). Here the weight is turned."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    before = layer(x)
    with quiet():
        theirs: Any = peft.get_peft_model(twin(layer), peft.OFTConfig(target_modules=["0"], oft_block_size=4))
    assert (theirs(x) - before).abs().max() > 1.0
    lk.attach(layer, lk.OFT(block_size=4), target_modules=["0"])
    torch.testing.assert_close(layer(x), before)
    nn.init.normal_(layer[0].deltas_of("default")[""].Q)
    y = layer(x)
    lk.merge(layer, "default")
    torch.testing.assert_close(layer(x), y)


def test_refusals() -> None:
    with pytest.raises(LorakitError, match="block_size=4 and blocks=2 were both given"):
        lk.OFT(block_size=4, blocks=2)
    with pytest.raises(LorakitError, match="blocks was given as 0"):
        lk.OFT(blocks=0)
    with pytest.raises(LorakitError, match="size 1 has nothing to turn"):
        lk.OFT(block_size=1)
    with pytest.raises(LorakitError, match="terms was given as 3"):
        lk.OFT(terms=3)
    with pytest.raises(LorakitError, match="eps was given as 0"):
        lk.OFT(eps=0)
    model = nn.Sequential(nn.Linear(40, 20))
    with pytest.raises(LorakitError, match=r"blocks 3 does not divide 40\. Near it 1, 2, 4, 5 do"):
        lk.attach(model, lk.OFT(blocks=3), target_modules=["0"])
    with pytest.raises(LorakitError, match="blocks of size 1, which have nothing to turn; at most 20 blocks do"):
        lk.attach(model, lk.OFT(blocks=40), target_modules=["0"])
    with pytest.raises(LorakitError, match=r"before PEFT 0\.14"):
        spec_from_peft({"peft_type": "OFT", "r": 8})
    for version in ({}, {"peft_version": "0.17.1"}):
        with pytest.raises(LorakitError, match="whose series was another then"):
            spec_from_peft({"peft_type": "OFT", "oft_block_size": 8, "use_cayley_neumann": True, **version})
