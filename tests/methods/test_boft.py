"""BOFT: butterfly factors against permutation matrices, rotations, sizes, PEFT's files with one and with more factors."""

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
from lorakit.methods.boft import BOFTDelta
from methods.both_ways import both_ways, trained_by_peft
from reference.models import quiet, twin


def filled(spec: lk.BOFT, shape: Shape) -> BOFTDelta:
    torch.manual_seed(0)
    delta = spec.build(shape, Pool()).double()
    assert isinstance(delta, BOFTDelta)
    nn.init.normal_(delta.M, std=0.5)
    nn.init.normal_(delta.s)
    return delta


def rotation(delta: BOFTDelta, back: bool = False) -> Tensor:
    eye = torch.eye(delta.size, dtype=torch.float64)
    return eye + delta.change(eye, back)


def butterfly(size: int, c: int, order: int) -> Tensor:
    """P: within stretches of c · 2^order, pieces of c / 2, first those with even numbers and then the odd ones."""
    stretch, half = c * 2**order, c // 2
    source = []
    for start in range(0, size, stretch):
        pieces = [list(range(at, at + half)) for at in range(start, start + stretch, half)]
        source += [index for piece in pieces[0::2] + pieces[1::2] for index in piece]
    P = torch.zeros(size, size, dtype=torch.float64)
    P[torch.arange(size), torch.tensor(source)] = 1
    return P


@pytest.mark.parametrize(("size", "c", "m"), [(12, 3, 1), (16, 4, 2), (24, 2, 3), (32, 4, 4)])
def test_formula(size: int, c: int, m: int) -> None:
    delta = filled(lk.BOFT(block_size=c, factors=m), Shape(5, size))
    I = torch.eye(c, dtype=torch.float64)  # noqa: E741
    R = torch.eye(size, dtype=torch.float64)
    for order in range(m):
        blocks = []
        for M in delta.M[order]:
            Q = (M - M.T) / 2
            blocks.append((I - Q) @ torch.linalg.inv(I + Q))  # the file's sign of Q
        P = butterfly(size, c, order) if m > 1 else torch.eye(size, dtype=torch.float64)
        R = P @ torch.block_diag(*blocks) @ P.T @ R
    torch.testing.assert_close(rotation(delta), R)
    torch.testing.assert_close(rotation(delta, back=True), R.T)
    W = torch.randn(5, size, dtype=torch.float64)
    torch.testing.assert_close(W + delta.dense(W), delta.s[:, None] * (W @ R.T))


def test_it_turns_and_reaches_everything() -> None:
    delta = filled(lk.BOFT(block_size=4, factors=3), Shape(5, 16))
    R = rotation(delta)
    torch.testing.assert_close(R @ R.T, torch.eye(16, dtype=torch.float64))
    assert (R.abs() > 1e-12).all(), "dense once c · 2^(m - 1) >= in"
    few = rotation(filled(lk.BOFT(block_size=4, factors=2), Shape(5, 16)))
    assert (few.abs() > 1e-12).sum() == 16 * 8
    with torch.no_grad():
        delta.s.fill_(1)
    W = torch.randn(5, 16, dtype=torch.float64)
    turned = W + delta.dense(W)
    torch.testing.assert_close(turned @ turned.T, W @ W.T)


def test_nothing_as_large_as_a_permutation_is_kept() -> None:
    delta = lk.BOFT(block_size=4, factors=3).build(Shape(5, 64), Pool())
    assert not list(delta.buffers())
    assert sum(p.numel() for p in delta.parameters()) == 3 * 64 * 4 + 5


def test_parameters() -> None:
    """m · in · c (half of them redundant, as in PEFT's files) and out."""
    model = nn.Sequential(nn.Linear(32, 20))
    assert lk.attach(model, lk.BOFT(), target_modules=["0"]).num_parameters() == 2 * 32 * 4 + 20


def _with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it is with its CUDA extension, whose one job is to make block-diagonal matrices."""
    from peft.tuners.boft import layer

    def block_diagonal(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", block_diagonal)


@pytest.mark.parametrize("factors", [2, 3])
def test_peft_with_several_factors(factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_extension(monkeypatch)
    config = peft.BOFTConfig(target_modules=["q_proj", "down_proj"], boft_block_size=2, boft_n_butterfly_factor=factors)
    both_ways("llama", config, lk.BOFT(block_size=2, factors=factors), tmp_path)


def test_peft_without_its_extension_uses_one_factor() -> None:
    """Whatever the configuration says (peft.md 7.16): a file with more cannot be read there, here it can."""
    layer = nn.Sequential(nn.Linear(16, 8)).double()
    config = peft.BOFTConfig(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=2)
    with quiet():
        wrapped: Any = peft.get_peft_model(twin(layer), config)
    assert wrapped.base_model.model[0].boft_R["default"].shape[0] == 1
    assert spec_from_peft(config.to_dict()).factors == 2


def test_peft_on_convolutions(tmp_path: Path) -> None:
    """PEFT turns a convolution's weight over channels and kernel, as here; with square kernels, which it takes for granted."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    wrapped = trained_by_peft(twin(layer), peft.BOFTConfig(target_modules=["0"], boft_block_size=4))
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    lk.load(layer, tmp_path, name="a")
    with lk.use(layer, "a"):
        torch.testing.assert_close(layer(x), wrapped(x))


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(24, 20))
    with pytest.raises(
        LorakitError, match="block_size=3 is odd, and butterfly factors deal half blocks; take 4, or factors=1"
    ):
        lk.BOFT(block_size=3)
    with pytest.raises(
        LorakitError, match=r"deals 16 features at once on 0, which do not divide its 24\. Here factors=2 works"
    ):
        lk.attach(model, lk.BOFT(block_size=4, factors=3), target_modules=["0"])
    with pytest.raises(LorakitError, match="blocks of the odd size 3"):
        lk.attach(model, lk.BOFT(blocks=8), target_modules=["0"])
    with pytest.raises(LorakitError, match="block_size 5 does not divide 24"):
        lk.attach(model, lk.BOFT(block_size=5, factors=1), target_modules=["0"])
    with pytest.raises(LorakitError, match="factors was given as 0"):
        lk.BOFT(factors=0)
    with pytest.raises(LorakitError, match="both given"):
        lk.BOFT(block_size=4, blocks=2)
